"""``/livez``, ``/readyz`` and ``/metrics`` over HTTP, served by a thread with an event loop of its own.

They answer even if the worker's event loop hangs, and whatever clients do: all of them together have a few connections,
and the oldest gives way to a new one. So a probe, which sends its request at once, is answered however many clients
send nothing, send it byte by byte, or never read the answer.
"""

import asyncio
import json
import re
import socket
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from prometheus_client import make_wsgi_app

from worker.errors import SettingsError
from worker.telemetry.health import Health, ProbeResult
from worker.telemetry.logs import get_logger
from worker.telemetry.metrics import Metrics

MAX_CONNECTIONS = 50
MAX_HEAD_BYTES = 8 * 1024  # as common servers have it
_REQUEST_S = 10.0  # to read a request, to compute the response and to write it, together
_BACKLOG = 1024  # of the kernel, without a descriptor; all of them wait for a fraction of a second
_NO_CONNECTION_S = 0.1  # before another try, where none can be accepted
_CLOSING_S = 2.0
_LOG_INTERVAL_S = 60.0
_REQUEST_LINE = re.compile(
    r"([A-Z]+) (?:http://(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::\d+)?)?(/[!->@-~]*)(?:\?([!-~]*))? HTTP/1\.[01]"
)
_FIELD = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\t -~\x80-\xff]*)")
_HEAD_END = re.compile(rb"\r?\n\r?\n")
# The library fails on other versions of a format than numbers.
_ACCEPT = re.compile(r"(?:(?!version=)[ -~]|version=\d{1,9}(?:\.\d{1,9})*(?![^;, ]))*")

log = get_logger()


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
        try:
            self._listener = _listening(host, port)
        except OSError as exc:
            fault = f"cannot listen on {host}:{port}: {exc.strerror or exc}"
            raise SettingsError(
                [f"HTTP_HOST, HTTP_PORT: {fault}; set HTTP_PORT to a free port, or to 0 for none"]
            ) from exc
        self._health = health
        self._metrics = make_wsgi_app(metrics.registry)
        # One each: a flood of requests for the metrics holds up no readiness.
        self._readiness_thread = ThreadPoolExecutor(1, thread_name_prefix="http-readiness")
        self._metrics_thread = ThreadPoolExecutor(1, thread_name_prefix="http-metrics")
        self._readiness: asyncio.Future[ProbeResult] | None = None
        # Connections, the oldest first.
        self._reading: dict[asyncio.Task[None], None] = {}
        self._answering: dict[asyncio.Task[None], None] = {}
        self._logged_at = -_LOG_INTERVAL_S  # monotonic
        self._runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        self._loop = self._runner.get_loop()
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening, and cut all connections."""
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._stop)
        self._thread.join(_CLOSING_S)

    def _run(self) -> None:
        with self._runner, self._listener, suppress(asyncio.CancelledError):
            self._runner.run(self._accept())
        for thread in (self._readiness_thread, self._metrics_thread):
            thread.shutdown(wait=False, cancel_futures=True)

    def _stop(self) -> None:
        for task in asyncio.all_tasks(self._loop):
            task.cancel()

    async def _accept(self) -> None:
        while True:
            try:
                connection, _ = await self._loop.sock_accept(self._listener)
            except OSError:  # this process can open no more files, or the client has gone
                await self._close_oldest_above(0)
                await asyncio.sleep(_NO_CONNECTION_S)
                continue
            connection.setblocking(False)
            self._reading[asyncio.create_task(self._serve(connection))] = None
            await asyncio.sleep(0)  # if its request is here already, it is answered now
            await self._close_oldest_above(MAX_CONNECTIONS)

    async def _close_oldest_above(self, most: int) -> None:
        """Close the oldest connection if there are more than so many.

        Those that have not sent their request come first, except the newest, which had no time to.
        """
        closable = [*[*self._reading][:-1], *self._answering]
        if closable and len(self._reading) + len(self._answering) > most:
            closable[0].cancel()
            await asyncio.wait(closable[:1])

    async def _serve(self, connection: socket.socket) -> None:
        """Answer the one request of a connection."""
        task: Any = asyncio.current_task()
        try:
            with connection:
                async with asyncio.timeout(_REQUEST_S):
                    head = await self._read_head(connection)
                    if head is not None:
                        self._answering[task] = self._reading.pop(task)
                        await self._loop.sock_sendall(connection, await self._respond(head))
        except OSError:  # of which TimeoutError is one
            pass
        except Exception:  # of any kind: a client must not end the server, nor flood the log
            if time.monotonic() - self._logged_at >= _LOG_INTERVAL_S:
                self._logged_at = time.monotonic()
                log.exception("http_request_failed")
        finally:
            self._reading.pop(task, None)
            self._answering.pop(task, None)

    async def _read_head(self, connection: socket.socket) -> str | None:
        """Read a request line and headers, without the empty line; None: the client has ended before.

        Of one that is too long only the beginning is read, which no request line and headers can be.
        """
        head = b""
        while len(head) <= MAX_HEAD_BYTES:
            data = await self._loop.sock_recv(connection, MAX_HEAD_BYTES + 1 - len(head))
            if not data:
                return None
            head += data
            if (end := _HEAD_END.search(head)) is not None:
                return head[: end.start()].decode("latin-1")
        return ""

    async def _respond(self, head: str) -> bytes:
        """Return the whole response to a request."""
        request = _Request.parse(head)
        if request is None:
            return _response(HTTPStatus.BAD_REQUEST, b"the request cannot be read\n")
        if request.method not in {"GET", "HEAD"}:
            return _response(HTTPStatus.METHOD_NOT_ALLOWED, b"use GET or HEAD\n", Allow="GET, HEAD")
        match request.path:
            case "/livez":
                response = _probe(self._health.liveness())
            case "/readyz":
                response = _probe(await self._ready())
            case "/metrics":
                response = await self._loop.run_in_executor(self._metrics_thread, self._page, request)
            case _:
                response = _response(HTTPStatus.NOT_FOUND, b"there are /livez, /readyz, /metrics\n")
        return response[: response.index(b"\r\n\r\n") + 4] if request.method == "HEAD" else response

    async def _ready(self) -> ProbeResult:
        """Compute the readiness, once for all clients that ask for it meanwhile."""
        if self._readiness is None or self._readiness.done():
            self._readiness = self._loop.run_in_executor(self._readiness_thread, self._health.readiness)
        return await asyncio.shield(self._readiness)

    def _page(self, request: "_Request") -> bytes:
        """Return the metrics in the format, the encoding and the selection that are asked for."""
        answer: list[Any] = []
        accept = request.headers.get("accept", "")
        environment = {
            "REQUEST_METHOD": "GET",
            "PATH_INFO": request.path,
            "QUERY_STRING": request.query,
            "HTTP_ACCEPT": accept if _ACCEPT.fullmatch(accept) else "",
            "HTTP_ACCEPT_ENCODING": request.headers.get("accept-encoding", ""),
        }
        body = b"".join(self._metrics(environment, lambda _status, headers: answer.extend(headers)))
        return _response(HTTPStatus.OK, body, **dict(answer))


@dataclass(frozen=True, slots=True)
class _Request:
    method: str
    path: str
    query: str
    headers: Mapping[str, str]

    @classmethod
    def parse(cls, head: str) -> "_Request | None":
        """Parse a request line and headers; None: they are no request of HTTP/1."""
        first, *others = (line.removesuffix("\r") for line in head.split("\n"))
        line, fields = _REQUEST_LINE.fullmatch(first), [_FIELD.fullmatch(each) for each in others]
        if line is None or None in fields:
            return None
        return cls(line[1], line[2], line[3] or "", {each[1].lower(): each[2].strip() for each in fields if each})


def _listening(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


def _probe(result: ProbeResult) -> bytes:
    status = HTTPStatus.OK if result.ok else HTTPStatus.SERVICE_UNAVAILABLE
    return _response(status, json.dumps(result.details).encode() + b"\n", **{"Content-Type": "application/json"})


def _response(status: HTTPStatus, body: bytes, **headers: str) -> bytes:
    fields = {"Content-Type": "text/plain", **headers, "Content-Length": str(len(body)), "Connection": "close"}
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"HTTP/1.1 {status.value} {status.phrase}\r\n{lines}\r\n".encode("latin-1") + body
