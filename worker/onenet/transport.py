"""HTTP/1.1 for requests that must not be repeated: knows whether any byte was sent, and enforces one deadline.

Errors of the libraries are translated into ``TransportError`` here, and nowhere else.
"""

import asyncio
import re
import socket
import ssl
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPException, RemoteDisconnected, responses
from http.client import IncompleteRead as CutOff

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser
from urllib3.exceptions import HTTPError, IncompleteRead
from urllib3.exceptions import TimeoutError as LibraryTimeoutError

from worker import __version__
from worker.core.connection_faults import connection_fault
from worker.errors import TLSError, TransportError
from worker.onenet.connecting import connected_socket
from worker.onenet.response import Response, redacted
from worker.onenet.route import Route, Server
from worker.onenet.tls import BufferedReader, TLSLayer
from worker.telemetry.tracing import Tracing

MAX_IDLE_S = 4.0  # less than the 5 s after which common servers close an idle connection
MAX_RESPONSE_BYTES = 256 * 1024  # an answer has some hundred bytes, and as many as WORKER_CONCURRENCY are held at once
COMMON_HEADERS = {
    "Accept": "application/json",
    "Accept-Encoding": "identity",
    "User-Agent": f"onenet-execute-worker/{__version__}",
}
_MAX_HEADERS = 100  # as many as http.client allows
_MAX_TUNNEL_HEAD_BYTES = 16 * 1024
CONNECT_TOO_LATE = "the connection was not made in time"
_MAX_REASON_CHARS = 200
_TUNNEL_HEAD = re.compile(rb"HTTP/1\.[01] (\d{3})(?: [^\r\n]*)?\r?\n(?:[^\r\n]+\r?\n)*\r?\n")
_TUNNEL_REFUSED = re.compile(r"Tunnel connection failed: (\d{3})")  # of http.client
_LENGTHS = {b"content-length", b"transfer-encoding"}
_CLOSED = "the connection was closed before the response was complete"
# Of the libraries that read histories; the first kind that fits is used. Their texts contain names of classes.
_WORDS: tuple[tuple[type[Exception] | tuple[type[Exception], ...], str], ...] = (
    (RemoteDisconnected, _CLOSED),
    ((CutOff, IncompleteRead), _CLOSED),
    (LibraryTimeoutError, "nothing arrived within the read timeout"),
    (HttpParserUpgrade, "malformed response: it changes the protocol"),
    ((HTTPException, HTTPError), "malformed response"),
)


@dataclass(frozen=True, slots=True)
class Request:
    """One POST; ``path`` is relative to the platform's URL and includes the query."""

    path: str
    headers: Mapping[str, str]
    body: bytes = b""


class HTTPTransport:
    """Sends each POST once, within one deadline that also bounds a response that arrives byte by byte.

    Args:
        route: how the platform is reached.
        connect_timeout_s: longest duration of making a connection, from the look-up of the name to the end of TLS.
        read_timeout_s: longest wait for the next bytes.
        tracing: makes a span for each request.

    Attributes:
        secrets: what no text about a response may contain.
    """

    def __init__(self, route: Route, *, connect_timeout_s: float, read_timeout_s: float, tracing: Tracing) -> None:
        self.secrets = route.secrets
        self._route = route
        self._connect_timeout_s = connect_timeout_s
        self._read_timeout_s = read_timeout_s
        self._tracing = tracing
        self._target_prefix = route.target_prefix
        self._common_headers = _lines(route.headers | COMMON_HEADERS)
        self._idle: list[_Connection] = []  # the most recently used one is last, and is reused first
        self._is_closed = False

    async def send(
        self, request: Request, deadline: float, is_unique: Callable[[Response], bool] = lambda _: False
    ) -> Response:
        """Send one request and read the complete response. If it is cancelled, the connection is cut.

        A server or a gateway may send a response twice, and the duplicate may arrive after the next request was sent.
        A duplicate 429 or refusal could not be told from the response to that request. So connections are reused only
        after responses that are unique.

        Args:
            request: what to send.
            deadline: the monotonic time at which the connection is cut, so that nothing more can leave.
            is_unique: tells whether a response can be told from every other one; otherwise its connection is closed.

        Raises:
            TransportError: no complete response, or none that can be read.
        """
        url = self._route.base_url + request.path.partition("?")[0]  # without the query, which names the device
        with self._tracing.requesting("POST", url) as answered:
            try:
                data = self._serialized(request)
                connection = self._idle_connection() or await self._connect(deadline)
            except (OSError, ValueError) as exc:  # ValueError: a host or a header that cannot be encoded
                raise transport_error(exc, may_have_been_sent=False, host=self._route.first.host) from exc
            is_kept = False
            try:
                response = await connection.exchange(data, deadline)
                is_kept = is_unique(response) and connection.is_reusable and not self._is_closed
            except (HttpParserError, HttpParserUpgrade, OSError) as exc:
                raise transport_error(exc, may_have_been_sent=True) from exc
            finally:
                if is_kept:
                    while self._idle and not self._idle[0].is_fresh:  # those that are not needed any more
                        self._idle.pop(0).abort()
                    self._idle.append(connection)
                else:
                    connection.abort()
            answered(response.status)
            return response

    def close(self) -> None:
        """Close the idle connections; requests in flight continue."""
        self._is_closed = True
        while self._idle:
            self._idle.pop().abort()

    def _idle_connection(self) -> "_Connection | None":
        while self._idle:
            connection = self._idle.pop()
            if connection.is_usable():
                return connection
            connection.abort()
        return None

    def _serialized(self, request: Request) -> bytes:
        head = (
            f"POST {self._target_prefix}{request.path} HTTP/1.1\r\n{self._common_headers}"
            f"{_lines(request.headers)}Content-Length: {len(request.body)}\r\n\r\n"
        )
        return head.encode("latin-1") + request.body

    async def _connect(self, deadline: float) -> "_Connection":
        """Return a new connection that is ready for a request; no byte of a request has been sent.

        One limit holds for all of it: looking the name up, all addresses, the proxy's answer, and both layers of TLS.
        """
        connect_by = asyncio.get_running_loop().time() + self._connect_timeout_s
        try:
            async with asyncio.timeout_at(min(deadline, connect_by)):
                return await self._new_connection()
        except TimeoutError as exc:
            raise TimeoutError(CONNECT_TOO_LATE) from exc

    async def _new_connection(self) -> "_Connection":
        loop, route = asyncio.get_running_loop(), self._route
        sock = await connected_socket(route.first, route.look_ups, self._connect_timeout_s)
        connection = _Connection(sock, self._read_timeout_s)
        tunnel = None if route.proxy is None or route.is_forwarded else _Tunnel()
        outer = self._tls_layer(route.first, tunnel or connection) if route.first.is_tls else None
        transport, _ = await loop.create_connection(lambda: outer or tunnel or connection, sock=sock)
        inner = None
        try:
            if outer is not None:
                await outer.secured()
            if tunnel is not None:
                await tunnel.open(route.platform.authority, route.proxy_headers)
                inner = self._tls_layer(route.platform, connection)
                tunnel.become(inner)
                await inner.secured()
        except BaseException:
            transport.abort()
            raise
        connection.layers = [layer for layer in (outer, inner) if layer is not None]
        return connection

    def _tls_layer(self, server: Server, upper: asyncio.Protocol) -> TLSLayer:
        assert self._route.tls is not None
        return TLSLayer(self._route.tls, server.tls_name, upper)


class _Tunnel(asyncio.Protocol):
    """Asks a proxy for a tunnel."""

    def __init__(self) -> None:
        self._head = b""
        self._transport: asyncio.Transport | None = None
        self._opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def open(self, authority: str, headers: Mapping[str, str]) -> None:
        """Ask for a tunnel.

        Raises:
            OSError: the proxy refuses it, or its answer is unreadable.
        """
        assert self._transport is not None
        request = f"CONNECT {authority} HTTP/1.1\r\n{_lines({'Host': authority, **headers})}\r\n"
        self._transport.write(request.encode("latin-1"))
        await self._opened

    def become(self, protocol: asyncio.Protocol) -> None:
        """Have a protocol use the tunnel."""
        assert self._transport is not None
        self._transport.set_protocol(protocol)
        protocol.connection_made(self._transport)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._head += data
        match = _TUNNEL_HEAD.match(self._head)
        if match is None:
            if len(self._head) > _MAX_TUNNEL_HEAD_BYTES or b"\n\n" in self._head.replace(b"\r", b""):
                self._fail(OSError("the proxy's answer is not HTTP"))
        elif match[1] != b"200":
            status = int(match[1])  # and not the proxy's words, which may repeat its password
            self._fail(OSError(_tunnel_refused(status)))
        elif match.end() < len(self._head):
            self._fail(OSError("bytes follow the proxy's answer"))  # the platform does not speak first
        elif not self._opened.done():
            self._opened.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(exc or ConnectionResetError("the proxy closed the connection"))

    def _fail(self, error: Exception) -> None:
        if not self._opened.done():
            self._opened.set_exception(error)
            self._opened.exception()  # marks it as retrieved: asyncio logs errors that nothing awaits


class _Connection(BufferedReader):
    """One connection, for one request at a time; httptools parses the responses."""

    def __init__(self, sock: socket.socket, read_timeout_s: float) -> None:
        super().__init__()
        self.is_reusable = False  # the last response was complete, nothing followed it, and the server keeps it open
        self.layers: Sequence[TLSLayer] = ()
        self._sock = sock
        self._read_timeout_s = read_timeout_s
        self._loop = asyncio.get_running_loop()
        self._parser: HttpResponseParser | None = None  # of the exchange in progress: each refers to the other
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[Response] | None = None  # of the request in flight
        self._timer: asyncio.TimerHandle | None = None
        self._deadline = self._active_at = 0.0  # monotonic
        self._error: Exception | None = None  # why the connection was lost
        self._received = 0
        self._forget_response()

    @property
    def is_fresh(self) -> bool:
        """Whether its last response was a moment ago, and nothing is known to have arrived since."""
        return self.is_reusable and self._loop.time() - self._active_at < MAX_IDLE_S

    def is_usable(self) -> bool:
        """Tell whether nothing has arrived since the last response, not even the end of the connection."""
        if not self.is_fresh or any(layer.has_part_of_a_record for layer in self.layers):
            return False
        try:  # what arrived since the event loop last looked
            self._sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    async def exchange(self, request: bytes, deadline: float) -> Response:
        """Send one request and return its complete response.

        Raises:
            TransportError: nothing was sent, or the response is too long.
            HttpParserError, HttpParserUpgrade: the bytes received are not an HTTP response.
            OSError: the connection was lost, or nothing arrived in time.
        """
        now = self._loop.time()
        if now >= deadline:
            raise TransportError("the deadline has passed", may_have_been_sent=False)
        if self._transport is None or self._transport.is_closing():
            error = self._error or ConnectionResetError("the connection was closed before the request")
            raise transport_error(error, may_have_been_sent=False)
        self.is_reusable = False
        self._received = 0
        self._deadline, self._active_at = deadline, now
        self._parser = HttpResponseParser(self)
        self._answer = self._loop.create_future()
        try:
            self._watch()
            self._transport.write(request)
            return await self._answer
        finally:
            self._answer = self._parser = None
            self._forget_response()  # the connection may be kept for a while

    def abort(self) -> None:
        """Close the connection at once, without sending what is still buffered."""
        self.is_reusable = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._transport is not None:
            self._transport.abort()

    def _watch(self) -> None:
        """Have a timer run at the latest when the request is late. Most requests find that of an earlier one."""
        due = min(self._deadline, self._active_at + self._read_timeout_s)
        if self._timer is not None:
            if self._timer.when() <= due:
                return
            self._timer.cancel()
        self._timer = self._loop.call_at(due, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        if self._answer is None or self._answer.done():
            return
        now = self._loop.time()
        if now >= self._deadline:
            self._fail(TimeoutError("the deadline passed before the response was complete"))
        elif now >= self._active_at + self._read_timeout_s:
            self._fail(TimeoutError("nothing arrived within the read timeout"))
        else:
            self._watch()

    def _fail(self, error: Exception) -> None:
        if self._answer is None:
            self._error = self._error or error
        elif not self._answer.done():
            self._answer.set_exception(error)  # and not kept here: its traceback refers to this connection
        self.abort()

    def _succeed(self, response: Response) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(response)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if self._answer is None or self._answer.done():
            self._fail(ConnectionResetError("bytes arrived without a request"))  # they would answer the next one
            return
        self._active_at = self._loop.time()
        if not self._received and not data.startswith(b"H"):  # the parser skips blank lines
            self._fail(HttpParserError("the response does not begin with HTTP"))
            return
        self._received += len(data)
        if self._received > MAX_RESPONSE_BYTES:
            text = f"the response is longer than {MAX_RESPONSE_BYTES} bytes"
            self._fail(TransportError(text, may_have_been_sent=True))
            return
        assert self._parser is not None
        try:
            self._parser.feed_data(data)
            self.is_reusable &= self._ends_with_the_response(data)
        except (HttpParserError, HttpParserUpgrade) as exc:
            self.is_reusable = False
            if self._response is None:  # otherwise only what follows the response is malformed
                self._fail(exc)
                return
        if self._response is not None:
            self._succeed(self._response)

    def eof_received(self) -> None:
        self.is_reusable = False
        if self._parser is not None and self._has_headers and not _LENGTHS & self._headers.keys():
            # Without a length, the response ends with its connection.
            self._succeed(Response(self._parser.get_status_code(), self._headers, self._body))

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(exc or ConnectionResetError(_CLOSED))
        self._transport, self.layers = None, ()  # which refer to this connection

    def _ends_with_the_response(self, data: bytes) -> bool:
        """Tell whether no byte follows the response in what was read."""
        return data.endswith(self._last_chunk if b"content-length" in self._headers else b"\r\n\r\n")

    def _forget_response(self) -> None:
        self._response: Response | None = None
        self._headers: dict[bytes, bytes] = {}
        self._header_count = 0
        self._body = self._last_chunk = b""
        self._has_headers = False

    def on_message_begin(self) -> None:
        if self._response is not None:
            self.is_reusable = False  # an unsolicited message, which would be taken for the next response

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._response is None:
            self._header_count += 1
            if self._header_count > _MAX_HEADERS:
                raise HttpParserError("the response has too many headers")
            self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        assert self._parser is not None
        self._has_headers = True
        encoding = self._headers.get(b"transfer-encoding")
        if encoding is not None and (
            encoding.lower() != b"chunked" or self._parser.get_status_code() == HTTPStatus.NO_CONTENT
        ):
            raise HttpParserError("the length of the response is not clear")  # the parser trusts the last encoding

    def on_body(self, body: bytes) -> None:
        if self._response is None:
            self._body += body
            self._last_chunk = body

    def on_message_complete(self) -> None:
        assert self._parser is not None
        status = self._parser.get_status_code()
        if self._response is not None:
            return  # an unsolicited message after the response
        if status < HTTPStatus.OK:
            self._forget_response()  # an interim response: the final one follows
        else:
            self.is_reusable = self._parser.should_keep_alive()
            self._response = Response(status, self._headers, self._body)


def transport_error(
    error: Exception,
    *,
    may_have_been_sent: bool,
    is_tls: bool = False,
    host: str | None = None,
    secrets: Sequence[str] = (),
) -> TransportError:
    """Return the error of a library as one of the worker's.

    Args:
        error: the library's.
        may_have_been_sent: bytes of the request may have reached the platform.
        is_tls: TLS failed, although the error's type does not tell.
        host: the name that was looked up.
        secrets: what a text of the server that the error quotes must not contain.
    """
    causes = _causes(error)
    cause = causes[-1]  # the outer ones quote the request's URL and headers
    refused = _TUNNEL_REFUSED.match(str(cause)) if type(cause) is OSError else None
    words = next((words for each in reversed(causes) for kind, words in _WORDS if isinstance(each, kind)), None)
    if words is None or (isinstance(cause, OSError) and cause.errno is not None):
        words = redacted(connection_fault(cause, host), secrets, _MAX_REASON_CHARS)
    if refused is not None:  # with the server's own words behind the status
        words = _tunnel_refused(int(refused[1]))
    if isinstance(cause, HttpParserError):
        words = f"malformed response: {words}"
    kind = TLSError if is_tls or any(isinstance(each, ssl.SSLError) for each in causes) else TransportError
    return kind(words, may_have_been_sent=may_have_been_sent)


def _tunnel_refused(status: int) -> str:
    return f"the proxy refuses the tunnel: {status} {responses.get(status, '')}".rstrip()


def _causes(error: BaseException) -> list[BaseException]:
    """Return an error and what caused it, down to the error of the operating system."""
    causes = [error]
    while not (isinstance(error, UnicodeError) or (isinstance(error, OSError) and error.errno is not None)):
        inner = getattr(error, "reason", None) or error.__cause__ or error.__context__
        if not isinstance(inner, Exception) or not str(inner):  # a timeout of asyncio, and the cancellation beneath
            break
        causes.append(inner)
        error = inner
    return causes


def _lines(headers: Mapping[str, str]) -> str:
    return "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
