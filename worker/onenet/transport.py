"""HTTP for a request that must not be repeated: knows whether bytes left, and is over when its time is over.

A request leaves in one piece and its answer is read in as few as it comes, since what costs most here is what threads
do to each other around every call to the system.
"""

import contextlib
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import requests
from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser
from urllib3.connection import HTTPConnection

from worker import __version__
from worker.onenet.route import Route
from worker.telemetry.tracing import Tracing

MAX_IDLE_S = 4.0  # less than the 5 s after which common servers close an idle connection
MAX_ANSWER_BYTES = 1024 * 1024
_CHUNK_BYTES = 4 * 1024


@dataclass(frozen=True, slots=True)
class Request:
    """One request; ``path`` is below the platform's URL, and has its query."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes | None = None


@dataclass(frozen=True, slots=True)
class Response:
    """A whole answer; the names of its headers are in lower case."""

    status: int
    headers: Mapping[bytes, bytes]
    body: bytes

    def header(self, name: str) -> str | None:
        """Return a header's value; its name is in lower case."""
        value = self.headers.get(name.encode())
        return None if value is None else value.decode("latin-1")


@dataclass(slots=True, eq=False)
class InFlightRequest:
    """One request and its answer. ``may_have_been_sent``: bytes of it may have reached the platform."""

    deadline: float  # monotonic
    may_have_been_sent: bool = False
    sock: object = None


class HTTPTransport:
    """Sends requests, each once, and each within a time that bounds it as a whole, a dripping answer included.

    Args:
        route: how the platform is reached.
        read_timeout_s: longest wait for the next bytes.
        watch: cuts what takes too long.
        tracing: spans each request.
    """

    def __init__(self, route: Route, *, read_timeout_s: float, watch: "Watch", tracing: Tracing) -> None:
        self._route = route
        self._read_timeout_s = read_timeout_s
        self._watch = watch
        self._tracing = tracing
        usual = {
            **self._route.headers,
            "Accept": "application/json",
            "Accept-Encoding": "identity",
            "User-Agent": f"onenet-execute-worker/{__version__}",
        }
        self._head = _lines(usual)
        self._target = self._route.target
        self._idle: list[_Connection] = []  # the one that was used last comes first
        self._is_closed = False

    def send(
        self, request: Request, exchange: InFlightRequest, is_unique: Callable[[Response], bool] = lambda _: False
    ) -> Response:
        """Send one request and read the whole answer.

        A server or a gateway may send an answer twice, and the second copy may arrive after the next request has left.
        A second 429, refusal or empty history could not be told from the answer to that request, so that only the
        connections of POSTs are used again, and only those whose answers are unique.

        Args:
            request: what to send.
            exchange: how long it may take.
            is_unique: tells whether an answer can be told from every other one; otherwise its connection is closed.

        Raises:
            requests.RequestException, urllib3.exceptions.HTTPError, HTTPException, OSError: no whole answer, or none
                that can be read; ``exchange.may_have_been_sent`` tells what that means.
        """
        url = self._route.base_url + request.path.partition("?")[0]  # without the device
        with self._tracing.requesting(request.method, url) as answered:
            response = self._send(request, exchange, is_unique)
            answered(response.status)
        return response

    def _send(self, request: Request, exchange: InFlightRequest, is_unique: Callable[[Response], bool]) -> Response:
        kept = self._idle_wire() if request.method == "POST" else None
        wire = kept or _Connection(self._route.open(), self._read_timeout_s)
        exchange.sock = wire.sock
        self._watch.begin(exchange)
        try:
            response = wire.ask(self._written(request), exchange)
            is_kept = is_unique(response) and wire.is_kept
        except BaseException:
            self._watch.end(exchange)
            wire.close()
            raise
        if self._watch.end(exchange) and is_kept and not self._is_closed:
            self._idle.append(wire)
        else:
            wire.close()
        return response

    def close(self) -> None:
        """Close the idle connections; what is under way goes on."""
        self._is_closed = True
        while self._idle:
            self._idle.pop().close()

    def _idle_wire(self) -> "_Connection | None":
        with contextlib.suppress(IndexError):  # there is none
            while True:
                wire = self._idle.pop()
                # What has arrived meanwhile belongs to no request: it would be taken for the next request's answer.
                if time.monotonic() - wire.used_at < MAX_IDLE_S and wire.is_silent:
                    return wire
                wire.close()
        return None

    def _written(self, request: Request) -> bytes:
        body = request.body or b""
        length = f"Content-Length: {len(body)}\r\n" if request.method == "POST" else ""
        first = f"{request.method} {self._target}{request.path} HTTP/1.1\r\n"
        return f"{first}{self._head}{_lines(request.headers)}{length}\r\n".encode("latin-1") + body


def _lines(headers: Mapping[str, str]) -> str:
    return "".join([f"{name}: {value}\r\n" for name, value in headers.items()])


class _Connection:
    """One connection, on which requests and their answers follow each other; httptools tells what is in those."""

    def __init__(self, connection: HTTPConnection, read_timeout_s: float) -> None:
        self.sock = connection.sock
        _limit(self.sock, read_timeout_s)
        self.used_at = 0.0  # monotonic
        self.is_kept = False  # and not closed behind the last answer
        self._connection = connection
        self._parser = HttpResponseParser(self)
        self._forget()

    @property
    def is_silent(self) -> bool:
        """Whether nothing has come since the last answer, not even the connection's end."""
        if type(self.sock) is not socket.socket:
            return not _decrypted_bytes(self.sock) and self._connection.is_connected
        try:
            self.sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)  # the cheapest look: one call to the system
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def close(self) -> None:
        self._connection.close()

    def ask(self, request: bytes, exchange: InFlightRequest) -> Response:
        """Send one request and read its whole answer.

        Raises:
            requests.ConnectionError: what comes is no HTTP, or it ends too early.
            OSError: the connection is lost, or nothing came in time.
        """
        self._forget()
        if time.monotonic() >= exchange.deadline:
            raise TimeoutError("the connection took all the time that the request had")
        exchange.may_have_been_sent = True
        self.sock.sendall(request)
        received = 0
        while self._response is None:
            data = self._receive()
            received += len(data)
            if received > MAX_ANSWER_BYTES:
                raise requests.ConnectionError(f"the answer is longer than {MAX_ANSWER_BYTES} bytes")
            if data:
                self._read(data)
            elif self._has_head and not {b"content-length", b"transfer-encoding"} & self._headers.keys():
                return Response(self._parser.get_status_code(), self._headers, self._body)  # which this is the end of
            else:
                raise ConnectionResetError("the connection was closed before the answer was whole")
        self.used_at = time.monotonic()
        return self._response

    def _receive(self) -> bytes:
        with contextlib.suppress(BlockingIOError):  # which is how the kernel's limit shows
            return self.sock.recv(_CHUNK_BYTES) or b""  # TLS within TLS says 0 at the end
        raise TimeoutError("nothing came in time")

    def _read(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
            self.is_kept &= self._ends_with_the_answer(data)
        except (HttpParserError, HttpParserUpgrade) as exc:
            self.is_kept = False
            if self._response is None:  # otherwise it is only what follows the answer that cannot be read
                raise requests.ConnectionError("what came is no answer") from exc

    def _ends_with_the_answer(self, data: bytes) -> bool:
        """Tell whether nothing of what has been read is left over behind the answer."""
        return data.endswith(self._last if b"content-length" in self._headers else b"\r\n\r\n")

    def _forget(self) -> None:
        self.is_kept = False
        self._response: Response | None = None
        self._headers: dict[bytes, bytes] = {}
        self._body = self._last = b""
        self._has_head = False

    def on_message_begin(self) -> None:
        if self._response is not None:
            self.is_kept = False  # nobody has asked for this: it would be taken for the next request's answer

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._response is None:
            self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        self._has_head = True

    def on_body(self, body: bytes) -> None:
        self._body += body
        self._last = body

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        if self._response is not None:
            return  # something else, behind the answer
        if status < HTTPStatus.OK:
            self._forget()  # the answer itself is still to come
        else:
            self.is_kept = self._parser.should_keep_alive()
            self._response = Response(status, self._headers, self._body)


def _decrypted_bytes(sock: Any) -> int:
    """Return how many bytes TLS has taken from the network that nobody has read yet."""
    if isinstance(sock, ssl.SSLSocket):
        return sock.pending()
    # TLS within a proxy's TLS: what the outer one has, what the inner one has not decrypted yet, and what it has.
    return _decrypted_bytes(sock.socket) + int(sock.incoming.pending) + int(sock.sslobj.pending())


def _limit(sock: Any, timeout_s: float) -> None:
    """Bound each read and write of a connected socket."""
    if type(sock) is not socket.socket:  # TLS, which needs Python's own limit
        sock.settimeout(timeout_s)
        return
    # In the kernel: for a limit of its own Python asks the system twice, before and for each read and write.
    sock.settimeout(None)
    limit = struct.pack("ll", *divmod(round(timeout_s * 1_000_000), 1_000_000))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)


class Watch:
    """Cuts every exchange whose time is over, from a thread of its own: a socket's timeout only bounds one read.

    Args:
        request_s: the longest that most exchanges may take, in seconds.
    """

    def __init__(self, request_s: float) -> None:
        self._request_s = request_s
        self._changed = threading.Condition()
        self._exchanges: set[InFlightRequest] = set()
        self._wakes_at = time.monotonic()
        self._is_stopped = False
        threading.Thread(target=self._run, name="http-watch", daemon=True).start()

    def begin(self, exchange: InFlightRequest) -> None:
        with self._changed:
            self._exchanges.add(exchange)
            if exchange.deadline < self._wakes_at:
                self._changed.notify()

    def end(self, exchange: InFlightRequest) -> bool:
        """Let an exchange be; returns whether it was in time."""
        with self._changed:
            is_here = exchange in self._exchanges
            self._exchanges.discard(exchange)
        return is_here

    def stop(self) -> None:
        with self._changed:
            self._is_stopped = True
            self._changed.notify()

    def _run(self) -> None:
        with self._changed:  # what has ended is not in the set, so its connection is not cut under the next request
            while not self._is_stopped:
                now = time.monotonic()
                for exchange in [exchange for exchange in self._exchanges if exchange.deadline <= now]:
                    self._exchanges.discard(exchange)
                    _cut(exchange)
                # Most requests have all the time there is, so that none of them has to wake this thread.
                self._wakes_at = min([now + self._request_s, *(exchange.deadline for exchange in self._exchanges)])
                self._changed.wait(self._wakes_at - now)


def _cut(exchange: InFlightRequest) -> None:
    sock = getattr(exchange.sock, "socket", exchange.sock)  # TLS within a proxy's TLS wraps it
    if isinstance(sock, socket.socket):
        with contextlib.suppress(OSError):  # it has just been closed: nothing is left to cut
            # The plain socket's method even under TLS: the thread that reads is using the TLS state.
            socket.socket.shutdown(sock, socket.SHUT_RDWR)
