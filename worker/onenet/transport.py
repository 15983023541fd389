"""HTTP/1.1 for requests that must not be repeated: records whether any byte was sent, and enforces one deadline.

One ``send`` per request and as few ``recv`` calls as possible: each system call releases the GIL, and getting it back
under contention costs more than everything else of a request. Errors of the libraries are translated into
``TransportError`` here, and nowhere else.
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
from http.client import HTTPException
from typing import Any

import urllib3
from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser
from urllib3.connection import HTTPConnection

from worker import __version__
from worker.errors import TLSError, TransportError
from worker.onenet.route import Route
from worker.telemetry.tracing import Tracing

MAX_IDLE_S = 4.0  # less than the 5 s after which common servers close an idle connection
MAX_RESPONSE_BYTES = 1024 * 1024
_CHUNK_BYTES = 4 * 1024
_MAX_REASON_CHARS = 200


@dataclass(frozen=True, slots=True)
class Request:
    """One request; ``path`` is relative to the platform's URL and includes the query."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes | None = None


@dataclass(frozen=True, slots=True)
class Response:
    """A complete response; header names are in lower case."""

    status: int
    headers: Mapping[bytes, bytes]
    body: bytes

    def header(self, name: str) -> str | None:
        """Return the value of a header, named in lower case."""
        value = self.headers.get(name.encode())
        return None if value is None else value.decode("latin-1")


@dataclass(slots=True, eq=False)
class InFlightRequest:
    """The state of one request. ``may_have_been_sent``: bytes of it may have reached the platform."""

    deadline: float  # monotonic
    may_have_been_sent: bool = False
    sock: object = None


class HTTPTransport:
    """Sends each request once, within one deadline that also bounds a response that arrives byte by byte.

    Args:
        route: how the platform is reached.
        read_timeout_s: longest wait for the next bytes.
        watch: cuts connections at the deadlines of their requests.
        tracing: makes a span for each request.
    """

    def __init__(self, route: Route, *, read_timeout_s: float, watch: "Watch", tracing: Tracing) -> None:
        self._route = route
        self._read_timeout_s = read_timeout_s
        self._watch = watch
        self._tracing = tracing
        common_headers = {
            **self._route.headers,
            "Accept": "application/json",
            "Accept-Encoding": "identity",
            "User-Agent": f"onenet-execute-worker/{__version__}",
        }
        self._common_headers = _lines(common_headers)
        self._target_prefix = self._route.target_prefix
        self._idle: list[_Connection] = []  # the most recently used one is last, and is reused first
        self._is_closed = False

    def send(
        self, request: Request, in_flight: InFlightRequest, is_unique: Callable[[Response], bool] = lambda _: False
    ) -> Response:
        """Send one request and read the complete response.

        A server or a gateway may send a response twice, and the duplicate may arrive after the next request was sent.
        A duplicate 429, refusal or empty history could not be told from the response to that request. So only
        connections of POSTs are reused, and only after responses that are unique.

        Args:
            request: what to send.
            in_flight: its deadline; ``may_have_been_sent`` is set on it.
            is_unique: tells whether a response can be told from every other one; otherwise its connection is closed.

        Raises:
            TransportError: no complete response, or none that can be read.
        """
        url = self._route.base_url + request.path.partition("?")[0]  # without the query, which names the device
        try:
            with self._tracing.requesting(request.method, url) as answered:
                response = self._send(request, in_flight, is_unique)
                answered(response.status)
        except TransportError:
            raise
        except (ssl.SSLError, urllib3.exceptions.SSLError) as exc:
            raise TLSError(_root_cause(exc), may_have_been_sent=in_flight.may_have_been_sent) from exc
        except (HttpParserError, HttpParserUpgrade) as exc:
            reason = f"malformed response: {_root_cause(exc)}"
            raise TransportError(reason, may_have_been_sent=in_flight.may_have_been_sent) from exc
        # ValueError: what urllib3 and http.client raise for a host or a header that they cannot encode.
        except (urllib3.exceptions.HTTPError, HTTPException, OSError, ValueError) as exc:
            raise TransportError(_root_cause(exc), may_have_been_sent=in_flight.may_have_been_sent) from exc
        return response

    def _send(self, request: Request, in_flight: InFlightRequest, is_unique: Callable[[Response], bool]) -> Response:
        reused = self._idle_connection() if request.method == "POST" else None
        connection = reused or _Connection(self._route.open(), self._read_timeout_s)
        in_flight.sock = connection.sock
        self._watch.begin(in_flight)
        try:
            response = connection.send(self._serialized(request), in_flight)
            is_reusable = is_unique(response) and connection.is_reusable
        except BaseException:
            self._watch.end(in_flight)
            connection.close()
            raise
        if self._watch.end(in_flight) and is_reusable and not self._is_closed:
            self._idle.append(connection)
        else:
            connection.close()
        return response

    def close(self) -> None:
        """Close the idle connections; requests in flight continue."""
        self._is_closed = True
        while self._idle:
            self._idle.pop().close()

    def _idle_connection(self) -> "_Connection | None":
        with contextlib.suppress(IndexError):  # no idle connection is left
            while True:
                connection = self._idle.pop()
                # Bytes that arrived while it was idle would be taken for the next response.
                if time.monotonic() - connection.used_at < MAX_IDLE_S and connection.is_silent:
                    return connection
                connection.close()
        return None

    def _serialized(self, request: Request) -> bytes:
        body = request.body or b""
        length = f"Content-Length: {len(body)}\r\n" if request.method == "POST" else ""
        first = f"{request.method} {self._target_prefix}{request.path} HTTP/1.1\r\n"
        return f"{first}{self._common_headers}{_lines(request.headers)}{length}\r\n".encode("latin-1") + body


def _lines(headers: Mapping[str, str]) -> str:
    return "".join([f"{name}: {value}\r\n" for name, value in headers.items()])


def _root_cause(error: BaseException) -> str:
    """Describe the innermost error: the outer ones quote the request's URL and headers."""
    cause: BaseException = error
    while (inner := getattr(cause, "reason", None) or cause.__cause__ or cause.__context__) is not None:
        if not isinstance(inner, BaseException):
            break
        cause = inner
    text = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(cause)
    return f"{type(cause).__name__}: {text}"[:_MAX_REASON_CHARS]


class _Connection:
    """One connection, for one request at a time; httptools parses the responses."""

    def __init__(self, connection: HTTPConnection, read_timeout_s: float) -> None:
        self.sock = connection.sock
        _limit(self.sock, read_timeout_s)
        self.used_at = 0.0  # monotonic
        self.is_reusable = False  # the last response was complete, nothing followed it, and the server keeps it open
        self._connection = connection
        self._parser = HttpResponseParser(self)
        self._reset()

    @property
    def is_silent(self) -> bool:
        """Whether nothing has arrived since the last response, not even the end of the connection."""
        if type(self.sock) is not socket.socket:
            return not _decrypted_bytes(self.sock) and self._connection.is_connected
        try:
            self.sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)  # the cheapest check: one system call
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def close(self) -> None:
        self._connection.close()

    def send(self, request: bytes, in_flight: InFlightRequest) -> Response:
        """Send one request and read its complete response.

        Raises:
            HttpParserError, HttpParserUpgrade: the bytes received are not an HTTP response.
            TransportError: the response is too long.
            OSError: the connection was lost, or nothing arrived in time.
        """
        self._reset()
        if time.monotonic() >= in_flight.deadline:
            raise TimeoutError("the deadline passed while the connection was made")
        in_flight.may_have_been_sent = True
        self.sock.sendall(request)
        received = 0
        while self._response is None:
            data = self._receive()
            received += len(data)
            if received > MAX_RESPONSE_BYTES:
                raise TransportError(f"the response is longer than {MAX_RESPONSE_BYTES} bytes", may_have_been_sent=True)
            if data:
                self._parse(data)
            elif self._has_headers and not {b"content-length", b"transfer-encoding"} & self._headers.keys():
                # Without a length, the response ends with its connection.
                return Response(self._parser.get_status_code(), self._headers, self._body)
            else:
                raise ConnectionResetError("the connection was closed before the response was complete")
        self.used_at = time.monotonic()
        return self._response

    def _receive(self) -> bytes:
        with contextlib.suppress(BlockingIOError):  # raised when the kernel's receive timeout expires
            return self.sock.recv(_CHUNK_BYTES) or b""  # TLS within TLS returns 0 at the end of the stream
        raise TimeoutError("nothing arrived within the read timeout")

    def _parse(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
            self.is_reusable &= self._ends_with_the_response(data)
        except (HttpParserError, HttpParserUpgrade):
            self.is_reusable = False
            if self._response is None:  # otherwise only what follows the response is malformed
                raise

    def _ends_with_the_response(self, data: bytes) -> bool:
        """Tell whether no byte follows the response in what was read."""
        return data.endswith(self._last_chunk if b"content-length" in self._headers else b"\r\n\r\n")

    def _reset(self) -> None:
        self.is_reusable = False
        self._response: Response | None = None
        self._headers: dict[bytes, bytes] = {}
        self._body = self._last_chunk = b""
        self._has_headers = False

    def on_message_begin(self) -> None:
        if self._response is not None:
            self.is_reusable = False  # an unsolicited message, which would be taken for the next response

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._response is None:
            self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        self._has_headers = True

    def on_body(self, body: bytes) -> None:
        self._body += body
        self._last_chunk = body

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        if self._response is not None:
            return  # an unsolicited message after the response
        if status < HTTPStatus.OK:
            self._reset()  # an interim response: the final one follows
        else:
            self.is_reusable = self._parser.should_keep_alive()
            self._response = Response(status, self._headers, self._body)


def _decrypted_bytes(sock: Any) -> int:
    """Return how many bytes TLS has received and decrypted, or is about to, that have not been read."""
    if isinstance(sock, ssl.SSLSocket):
        return sock.pending()
    # TLS within a proxy's TLS: the outer layer's bytes, the inner layer's encrypted ones, and its decrypted ones.
    return _decrypted_bytes(sock.socket) + int(sock.incoming.pending) + int(sock.sslobj.pending())


def _limit(sock: Any, timeout_s: float) -> None:
    """Bound each read and write of a connected socket."""
    if type(sock) is not socket.socket:  # TLS, which needs Python's own timeout
        sock.settimeout(timeout_s)
        return
    # In the kernel: Python's own timeout costs one more system call before each read and write.
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
