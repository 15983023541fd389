"""``/livez``, ``/readyz`` and ``/metrics`` over HTTP, from threads of their own."""

import json
import socket
import socketserver
import sys
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from worker.errors import SettingsError
from worker.telemetry.health import Health, ProbeResult
from worker.telemetry.metrics import Metrics

_POLL_S = 0.1  # how long closing may take
_PATIENCE_S = 10  # with a client that does not go on

Endpoint = Callable[[], tuple[HTTPStatus, str, bytes]]


class HealthServer:
    """The HTTP server of one worker.

    Args:
        host: address to listen on.
        port: port to listen on.
        health: answers the probes.
        metrics: are shown.

    Raises:
        SettingsError: that address cannot be listened on.
    """

    def __init__(self, host: str, port: int, health: Health, metrics: Metrics) -> None:
        pages: dict[str, Endpoint] = {
            "/livez": lambda: _probe(health.liveness()),
            "/readyz": lambda: _probe(health.readiness()),
            "/metrics": lambda: (HTTPStatus.OK, CONTENT_TYPE_LATEST, generate_latest(metrics.registry)),
        }
        try:
            self._server = _Server(host, port, pages)
        except OSError as exc:
            raise SettingsError(
                [f"HTTP_HOST, HTTP_PORT: cannot listen on {host}:{port}: {exc.strerror or exc}; port 0 turns this off"]
            ) from exc
        self._thread = threading.Thread(target=self._server.serve_forever, args=(_POLL_S,), name="http", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()


def _probe(result: ProbeResult) -> tuple[HTTPStatus, str, bytes]:
    status = HTTPStatus.OK if result.ok else HTTPStatus.SERVICE_UNAVAILABLE
    return status, "application/json", json.dumps(result.details).encode() + b"\n"


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, host: str, port: int, pages: dict[str, Endpoint]) -> None:
        self.pages = pages
        self.address_family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        super().__init__((host, port), _Handler)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's own looks up this machine's name, which may take long

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # which is a client that went away
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    timeout = _PATIENCE_S

    def do_GET(self) -> None:
        page = self.server.pages.get(urlsplit(self.path).path)
        if page is None:
            found = ", ".join(self.server.pages)
            self._answer(HTTPStatus.NOT_FOUND, "text/plain", f"there are {found}\n".encode())
        else:
            self._answer(*page())

    def do_HEAD(self) -> None:
        self.do_GET()

    def _answer(self, status: HTTPStatus, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        """Say nothing: probes come every few seconds."""
