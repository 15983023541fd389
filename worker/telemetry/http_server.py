"""``/livez``, ``/readyz`` and ``/metrics`` over HTTP, served by threads: they answer even if the event loop hangs."""

import json
import socket
import socketserver
import sys
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry
from prometheus_client.exposition import MetricsHandler
from typing_extensions import override

from worker.errors import SettingsError
from worker.telemetry.health import Health, ProbeResult
from worker.telemetry.metrics import Metrics

_SHUTDOWN_POLL_S = 0.1  # upper bound of the time that closing takes
_REQUEST_TIMEOUT_S = 10  # for a client that does not finish its request

Endpoint = Callable[[], tuple[HTTPStatus, bytes]]


class HealthServer:
    """The HTTP server for probes and metrics of one worker.

    Args:
        host: address to listen on.
        port: port to listen on.
        health: answers the probes.
        metrics: are exposed to Prometheus.

    Raises:
        SettingsError: the address is not available.
    """

    def __init__(self, host: str, port: int, health: Health, metrics: Metrics) -> None:
        probes: dict[str, Endpoint] = {
            "/livez": lambda: _probe(health.liveness()),
            "/readyz": lambda: _probe(health.readiness()),
        }
        try:
            self._server = _Server(host, port, probes, metrics.registry)
        except OSError as exc:
            raise SettingsError(
                [f"HTTP_HOST, HTTP_PORT: cannot listen on {host}:{port}: {exc.strerror or exc}; port 0 turns this off"]
            ) from exc
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(_SHUTDOWN_POLL_S,), name="http", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()


def _probe(result: ProbeResult) -> tuple[HTTPStatus, bytes]:
    status = HTTPStatus.OK if result.ok else HTTPStatus.SERVICE_UNAVAILABLE
    return status, json.dumps(result.details).encode() + b"\n"


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, host: str, port: int, probes: dict[str, Endpoint], registry: CollectorRegistry) -> None:
        self.probes = probes
        self.registry = registry
        self.address_family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        super().__init__((host, port), _Handler)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer would look up the host name, which may take long

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # OSError: the client disconnected
            super().handle_error(request, client_address)


class _Handler(MetricsHandler):
    """Adds the probes to Prometheus' own handler, which negotiates OpenMetrics and gzip and filters by ``name[]``.

    It speaks HTTP/1.0: Prometheus' handler sends no Content-Length, so the end of the connection ends the response.
    """

    server: _Server
    timeout = _REQUEST_TIMEOUT_S

    def setup(self) -> None:
        super().setup()
        self.registry = self.server.registry

    @override
    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if path in self.server.probes:
            status, body = self.server.probes[path]()
            self._respond(status, "application/json", body)
        elif path != "/metrics":
            known = ", ".join((*self.server.probes, "/metrics"))
            self._respond(HTTPStatus.NOT_FOUND, "text/plain", f"there are {known}\n".encode())
        elif self.command == "HEAD":
            self._respond(HTTPStatus.OK, CONTENT_TYPE_LATEST)
        else:
            super().do_GET()

    do_HEAD = do_GET  # noqa: N815 - http.server calls it by this name

    def _respond(self, status: HTTPStatus, content_type: str, body: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
