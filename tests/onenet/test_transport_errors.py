"""Every failure of the transport is a ``TransportError``: no exception of a library leaves it.

After https://github.com/encode/httpx/blob/master/tests/test_exceptions.py, with real sockets in the place of mocks.
"""

import asyncio
import builtins
import http.client
import inspect
import re
import select
import socket
import ssl
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import httptools.parser.errors
import pytest
import requests.exceptions
import urllib3.exceptions

from tests.support.onenet_client import https, read_request, server_tls_context, use_proxy
from tests.support.proxies import raw_server
from tests.support.waiting import PATIENCE_S, until
from worker.dev.services.ports import free_port
from worker.errors import TLSError, TransportError
from worker.onenet import transport as transport_module
from worker.onenet.history_reader import HistoryReader
from worker.onenet.response import Response
from worker.onenet.route import Route
from worker.onenet.transport import MAX_RESPONSE_BYTES, HTTPTransport, Request
from worker.telemetry.tracing import NoTracing

SECRETS = ("S3cret", "865820030000001")
PATH, HEADERS = "/nbiot?imei=865820030000001", {"api-key": "S3cret"}
POST = Request(PATH, HEADERS, b"{}")
OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
LIBRARY_WORDS = re.compile(r"Error|Exception|Errno|Remote|Incomplete|Pool|_ssl|\w\(")  # names of classes, and calls
RESET_ON_CLOSE = b"\1\0\0\0\0\0\0\0"  # struct linger: on, 0 seconds


@contextmanager
def http_transport(url: str, ca_file: str | None = None, timeout_s: float = PATIENCE_S) -> Iterator[HTTPTransport]:
    """Yield a transport to a URL."""
    route = Route(url, ca_file)
    transport = HTTPTransport(route, connect_timeout_s=timeout_s, read_timeout_s=timeout_s, tracing=NoTracing())
    try:
        yield transport
    finally:
        transport.close()


@contextmanager
def history_reader(url: str, ca_file: str | None = None, timeout_s: float = PATIENCE_S) -> Iterator[HistoryReader]:
    """Yield a reader of a URL."""
    reader = HistoryReader(
        Route(url, ca_file),
        connect_timeout_s=timeout_s,
        read_timeout_s=timeout_s,
        concurrency=1,
        tracing=NoTracing(),
    )
    try:
        yield reader
    finally:
        reader.close()


async def post(url: str, ca_file: str | None = None, timeout_s: float = PATIENCE_S) -> Response:
    """Send one request that must not be repeated."""
    with http_transport(url, ca_file, timeout_s) as transport:
        return await transport.send(POST, time.monotonic() + 2 * timeout_s)


async def get(url: str, ca_file: str | None = None, timeout_s: float = PATIENCE_S) -> Response:
    """Read once."""
    with history_reader(url, ca_file, timeout_s) as reader:
        return await reader.get(PATH, HEADERS, time.monotonic() + 2 * timeout_s)


Send = Callable[[str, str | None, float], Awaitable[Response]]
SENDERS = pytest.mark.parametrize("send", [post, get], ids=["POST", "GET"])


async def failure(
    url: str, *, ca_file: str | None = None, timeout_s: float = PATIENCE_S, send: Send = post
) -> TransportError:
    """Send one request, which must fail; returns the error, which must say what happened and no secret."""
    with pytest.raises(TransportError) as caught:
        await send(url, ca_file, timeout_s)
    error = caught.value
    assert error.reason == str(error)
    assert error.reason
    assert not [secret for secret in SECRETS if secret in error.reason]
    assert not LIBRARY_WORDS.search(error.reason), error.reason
    return error


async def late_failure(url: str, *, ca_file: str | None = None, send: Send = post) -> TransportError:
    """Send one request, which must fail by a time limit; returns the error.

    On a slow machine a short time limit passes before anything is sent, so it is tried with longer ones.
    """
    for timeout_s in (0.5, 5, 50):
        error = await failure(url, ca_file=ca_file, timeout_s=timeout_s, send=send)
        if error.may_have_been_sent:
            break
    return error


def responding(response: bytes) -> Callable[[socket.socket], None]:
    """Return a server that sends these bytes after a request and closes the connection."""

    def serve(sock: socket.socket) -> None:
        read_request(sock)
        sock.sendall(response)

    return serve


def responding_silently(sock: socket.socket) -> None:
    read_request(sock)
    sock.recv(1)  # returns when the client closes the connection


def responding_slowly(sock: socket.socket) -> None:
    read_request(sock)
    sock.sendall(OK + b"X: ")
    while not select.select([sock], [], [], 0.05)[0]:  # until the client closes the connection
        sock.sendall(b"x")


def responding_endlessly(sock: socket.socket) -> None:
    read_request(sock)
    sock.sendall(OK + b"\r\n")
    while True:
        sock.sendall(b" " * MAX_RESPONSE_BYTES)


def resetting(sock: socket.socket) -> None:
    read_request(sock)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    sock.close()


def resetting_at_once(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    sock.close()


AFTER_THE_REQUEST: dict[str, Callable[[socket.socket], None]] = {
    "connection closed": responding(b""),
    "connection reset": resetting,
    "no response": responding_silently,
    "response cut by the deadline": responding_slowly,
    "endless body": responding_endlessly,
    "too many header bytes": responding(OK + b"X: " + b"x" * MAX_RESPONSE_BYTES),
    "not HTTP": responding(b"220 mail.example.org ESMTP\r\n"),
    "TLS alert": responding(b"\x15\x03\x01\x00\x02\x02\x46"),
    "HTTP/2 settings": responding(b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"),
    "status line cut": responding(b"HTTP/1.1 20"),
    "status not a number": responding(b"HTTP/1.1 OK\r\n\r\n"),
    "status too long": responding(b"HTTP/1.1 2000 OK\r\n\r\n"),
    "version unknown": responding(b"HTTP/9.9.9 200 OK\r\n\r\n"),
    "headers cut": responding(OK + b"Content-Length: 5\r\n"),
    "header without a colon": responding(OK + b"Content-Length 5\r\n\r\nhello"),
    "header with NUL": responding(OK + b"X: a\0b\r\nContent-Length: 0\r\n\r\n"),
    "length not a number": responding(OK + b"Content-Length: five\r\n\r\nhello"),
    "length negative": responding(OK + b"Content-Length: -5\r\n\r\nhello"),
    "length too large": responding(OK + b"Content-Length: 99999999999999999999999\r\n\r\nhello"),
    "two lengths": responding(OK + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello"),
    "length and chunks": responding(OK + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\nhello"),
    "body cut": responding(OK + b"Content-Length: 50\r\n\r\nhello"),
    "chunk size not a number": responding(CHUNKED + b"xyz\r\nhello\r\n0\r\n\r\n"),
    "chunk size negative": responding(CHUNKED + b"-5\r\nhello\r\n0\r\n\r\n"),
    "chunk size too large": responding(CHUNKED + b"f" * 40 + b"\r\nhello"),
    "chunk cut": responding(CHUNKED + b"5\r\nhel"),
    "chunk without its end": responding(CHUNKED + b"5\r\nhelloo\r\n0\r\n\r\n"),
    "last chunk missing": responding(CHUNKED + b"5\r\nhello\r\n"),
    "protocol upgrade": responding(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\nConnection: upgrade\r\n\r\n"),
    "interim response alone": responding(b"HTTP/1.1 103 Early Hints\r\n\r\n"),
    "a request": responding(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"),
}


@pytest.mark.parametrize("serve", AFTER_THE_REQUEST.values(), ids=AFTER_THE_REQUEST)
@SENDERS
async def test_a_failed_or_malformed_response_may_follow_a_sent_request(
    serve: Callable[[socket.socket], None], send: Send
) -> None:
    with raw_server(serve) as url:
        error = await late_failure(url, send=send)
    assert error.may_have_been_sent
    assert not isinstance(error, TLSError)


def never_accepting() -> tuple[socket.socket, list[socket.socket]]:
    """Return a listener whose backlog is full, and the sockets that fill it."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(0)
    fillers = [socket.socket() for _ in range(4)]
    for filler in fillers:
        filler.setblocking(False)
        filler.connect_ex(listener.getsockname())
    return listener, fillers


@pytest.mark.parametrize(
    "host",
    ["no-such-host.invalid", "a" * 64 + ".invalid", "[::ffff:0:0:0:1]", "256.256.256.256"],
    ids=["unknown", "label too long", "address without a route", "not an address"],
)
@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_an_unreachable_host_is_a_transport_error_before_the_request(scheme: str, host: str) -> None:
    error = await failure(f"{scheme}://{host}:9", timeout_s=5)
    assert not error.may_have_been_sent
    assert host in error.reason or "there is no route" in error.reason or "in time" in error.reason


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_a_refused_connection_is_a_transport_error_before_the_request(scheme: str) -> None:
    error = await failure(f"{scheme}://127.0.0.1:{free_port()}")
    assert not error.may_have_been_sent
    assert error.reason == "the connection was refused: nothing listens there"


async def test_a_connect_timeout_is_a_transport_error_before_the_request() -> None:
    listener, fillers = never_accepting()
    error = await failure(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout_s=0.2)
    for sock in (listener, *fillers):
        sock.close()
    assert not error.may_have_been_sent


async def test_a_deadline_that_passed_before_the_connection_is_a_transport_error_before_the_request() -> None:
    serving = raw_server(responding(b""))
    with serving as url, http_transport(url) as transport, pytest.raises(TransportError) as caught:
        await transport.send(POST, time.monotonic() - 1)
    assert not caught.value.may_have_been_sent


def receiving_only(sock: socket.socket) -> None:
    while sock.recv(65536):
        pass


HANDSHAKES: dict[str, Callable[[socket.socket], None]] = {
    "connection closed": lambda sock: sock.close(),
    "connection reset": resetting_at_once,
    "no response": receiving_only,
    "plain HTTP": lambda sock: sock.sendall(OK + b"\r\n"),
    "noise": lambda sock: sock.sendall(b"\x16\x03\x03" + b"\xff" * 4096),
    "TLS alert": lambda sock: sock.sendall(b"\x15\x03\x03\x00\x02\x02\x28"),
}


@pytest.mark.parametrize("serve", HANDSHAKES.values(), ids=HANDSHAKES)
async def test_a_failed_tls_handshake_is_a_transport_error_before_the_request(
    serve: Callable[[socket.socket], None],
) -> None:
    with raw_server(serve) as url:
        assert not (await failure(https(url), timeout_s=0.5)).may_have_been_sent


def serving_tls(context: ssl.SSLContext, serve: Callable[[ssl.SSLSocket], object]) -> Callable[[socket.socket], None]:
    """Return a server behind TLS."""

    def handshake_and_serve(sock: socket.socket) -> None:
        with context.wrap_socket(sock, server_side=True) as secure:
            serve(secure)

    return handshake_and_serve


async def test_an_untrusted_certificate_is_a_tls_error_before_the_request(tmp_path: Path) -> None:
    with raw_server(serving_tls(server_tls_context(tmp_path, "127.0.0.1"), read_request)) as url:
        error = await failure(https(url))
    assert isinstance(error, TLSError)
    assert not error.may_have_been_sent
    assert "self-signed certificate" in error.reason or "unable to get local issuer" in error.reason


async def test_a_certificate_of_another_host_is_a_tls_error_before_the_request(tmp_path: Path) -> None:
    with raw_server(serving_tls(server_tls_context(tmp_path, "example.org"), read_request)) as url:
        error = await failure(https(url), ca_file=str(tmp_path / "ca.pem"))
    assert isinstance(error, TLSError)
    assert not error.may_have_been_sent


async def test_an_old_tls_version_is_a_tls_error_before_the_request(tmp_path: Path) -> None:
    context = server_tls_context(tmp_path, "127.0.0.1")
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1"):
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1
    with raw_server(serving_tls(context, read_request)) as url:
        error = await failure(https(url), ca_file=str(tmp_path / "ca.pem"))
    assert isinstance(error, TLSError)
    assert not error.may_have_been_sent


def garbling(secure: ssl.SSLSocket) -> None:
    """Read the request, then write bytes that are no TLS record to the connection."""
    read_request(secure)
    socket.socket.sendall(secure, b"\x17\x03\x03\x00\x20" + b"\xff" * 32)
    socket.socket.recv(secure, 65536)


async def test_tls_that_fails_after_the_request_is_a_tls_error_of_a_request_that_may_have_been_sent(
    tmp_path: Path,
) -> None:
    with raw_server(serving_tls(server_tls_context(tmp_path, "127.0.0.1"), garbling)) as url:
        error = await failure(https(url), ca_file=str(tmp_path / "ca.pem"))
    assert isinstance(error, TLSError)
    assert error.may_have_been_sent


@pytest.mark.parametrize("serve", [read_request, responding_silently, responding(OK + b"Content-Length: 5\r\n\r\n")])
async def test_a_lost_response_over_tls_is_a_transport_error_of_a_request_that_may_have_been_sent(
    serve: Callable[[Any], object], tmp_path: Path
) -> None:
    with raw_server(serving_tls(server_tls_context(tmp_path, "127.0.0.1"), serve)) as url:
        assert (await late_failure(https(url), ca_file=str(tmp_path / "ca.pem"))).may_have_been_sent


CONNECT_RESPONSES = {
    "407": b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n",
    "502 with a body": b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 5\r\n\r\nhello",
    "closed": b"",
    "not HTTP": b"220 mail.example.org ESMTP\r\n\r\n",
    "status not a number": b"HTTP/1.1 OK\r\n\r\n",
    "status out of range": b"HTTP/1.1 99999 OK\r\n\r\n",
    "status line too long": b"HTTP/1.1 200 " + b"x" * 70_000,
    "header line too long": b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70_000,
    "too many headers": OK + b"X: x\r\n" * 200 + b"\r\n",
    "headers cut": b"HTTP/1.1 200 OK\r\nX: x",
    "no TLS in the tunnel": OK + b"\r\n" + OK + b"\r\n",
}


@pytest.mark.parametrize("response", CONNECT_RESPONSES.values(), ids=CONNECT_RESPONSES)
@pytest.mark.parametrize("is_https_proxy", [False, True], ids=["http proxy", "https proxy"])
async def test_a_proxy_that_refuses_or_breaks_the_tunnel_is_a_transport_error_before_the_request(
    response: bytes, is_https_proxy: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    context = server_tls_context(tmp_path, "127.0.0.1")

    def serve(sock: Any) -> None:
        read_request(sock)
        sock.sendall(response)

    with raw_server(serving_tls(context, serve) if is_https_proxy else serve) as proxy:
        named = (https(proxy) if is_https_proxy else proxy).replace("://", "://svc:S3cret@")
        use_proxy(monkeypatch, "https", named)
        assert not (await failure("https://onenet.invalid", ca_file=str(tmp_path / "ca.pem"))).may_have_been_sent


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_an_unreachable_proxy_is_a_transport_error_before_the_request(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_proxy(monkeypatch, scheme, f"http://svc:S3cret@127.0.0.1:{free_port()}")
    assert not (await failure(f"{scheme}://onenet.invalid")).may_have_been_sent


async def test_a_proxy_that_does_not_speak_tls_is_a_tls_error_before_the_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with raw_server(lambda sock: sock.sendall(OK + b"\r\n")) as proxy:
        use_proxy(monkeypatch, "https", https(proxy).replace("://", "://svc:S3cret@"))
        error = await failure("https://onenet.invalid")
    assert isinstance(error, TLSError)
    assert not error.may_have_been_sent


def exception_classes(*modules: ModuleType) -> list[type[Exception]]:
    """Return every exception class that the modules define or export, without the warnings."""
    found = {
        member
        for module in modules
        for _, member in inspect.getmembers(module, inspect.isclass)
        if issubclass(member, Exception) and not issubclass(member, Warning)
    }
    return sorted(found, key=lambda kind: f"{kind.__module__}.{kind.__qualname__}")


OS_ERRORS = [kind for kind in exception_classes(builtins) if issubclass(kind, OSError)]
CLASSES = exception_classes(urllib3.exceptions, requests.exceptions, http.client, ssl)
TLS_ERRORS = ssl.SSLError | urllib3.exceptions.SSLError | requests.exceptions.SSLError


def raised(kind: type[Exception]) -> Exception:
    """Return an exception of a class, whatever arguments the class wants, with a text."""
    error = kind.__new__(kind)
    error.args = ("it failed",)
    # The texts of these are made of attributes.
    if kind is http.client.IncompleteRead:
        vars(error).update(partial=b"", expected=5)
    elif issubclass(kind, http.client.IncompleteRead):
        vars(error).update(partial=0, expected=5, length=b"x")
    return error


@pytest.mark.parametrize("kind", [*OS_ERRORS, *exception_classes(ssl)], ids=lambda kind: kind.__qualname__)
async def test_every_error_while_connecting_is_a_transport_error_before_the_request(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library may raise any of them in a later version, or in a case that no server of these tests causes."""
    error = raised(kind)

    async def fail(*_: object) -> socket.socket:
        raise error

    monkeypatch.setattr(asyncio.get_running_loop(), "sock_connect", fail)
    found = await failure("http://127.0.0.1:9")
    assert not found.may_have_been_sent
    assert isinstance(found, TLSError) == issubclass(kind, ssl.SSLError)


@pytest.mark.parametrize(
    "kind",
    [*OS_ERRORS, *exception_classes(ssl, httptools.parser.errors)],
    ids=lambda kind: f"{kind.__module__}.{kind.__qualname__}",
)
async def test_every_error_while_reading_is_a_transport_error_of_a_request_that_may_have_been_sent(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    error = raised(kind)

    class Broken:
        def feed_data(self, _data: bytes) -> None:
            raise error

    monkeypatch.setattr(transport_module, "HttpResponseParser", lambda _: Broken())
    with raw_server(responding(OK + b"\r\n")) as url:
        found = await failure(url)
    assert found.may_have_been_sent
    assert isinstance(found, TLSError) == issubclass(kind, ssl.SSLError)


@pytest.mark.parametrize("kind", [*CLASSES, *OS_ERRORS], ids=lambda kind: f"{kind.__module__}.{kind.__qualname__}")
async def test_every_error_of_the_libraries_while_reading_a_history_is_a_transport_error(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    error = raised(kind)

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(requests.Session, "request", fail)
    with raw_server(receiving_only) as url:
        found = await failure(url, timeout_s=PATIENCE_S, send=get)
    assert isinstance(found, TLSError) == issubclass(kind, TLS_ERRORS)


@SENDERS
async def test_a_cancelled_request_is_cut(send: Send) -> None:
    arrived, ended = threading.Event(), threading.Event()

    def serve(sock: socket.socket) -> None:
        read_request(sock)
        arrived.set()
        with suppress(OSError):
            sock.recv(1)  # returns when the client closes the connection
        ended.set()

    with raw_server(serve) as url:
        sending = asyncio.ensure_future(send(url, None, 1_000))
        await until(arrived.is_set)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        await until(ended.is_set)


async def test_nothing_more_of_a_request_leaves_after_its_deadline() -> None:
    """The server reads nothing at first, so that a part of the request waits in this process.

    On a slow machine a short deadline passes before anything is sent, so it is tried with longer ones.
    """
    may_read, ended = threading.Event(), threading.Event()
    received: list[int] = []
    body = b"x" * 50_000_000

    def serve(sock: socket.socket) -> None:
        assert may_read.wait(PATIENCE_S)
        with suppress(OSError):
            while data := sock.recv(65536):
                received.append(len(data))
        ended.set()

    with raw_server(serve) as url, http_transport(url, timeout_s=1_000) as transport:
        for deadline_s in (0.3, 3, 30):
            with pytest.raises(TransportError) as caught:
                await transport.send(Request(PATH, HEADERS, body), time.monotonic() + deadline_s)
            if caught.value.may_have_been_sent:
                break
        may_read.set()
        await until(ended.is_set)
    assert caught.value.may_have_been_sent
    assert sum(received) < len(body)


@pytest.mark.parametrize(
    "piece", [b"HTTP/1.1 200 OK\r\nX: ", OK + b"Content-Length: 9999\r\n\r\n"], ids=["head", "body"]
)
async def test_a_response_that_drips_does_not_hold_the_readers_thread_beyond_the_deadline(piece: bytes) -> None:
    """The reader has one thread, which must be there for the next read."""
    connections: list[int] = []

    def drip_once(sock: socket.socket) -> None:
        read_request(sock)
        connections.append(1)
        if len(connections) > 1:
            sock.sendall(OK + b"Content-Length: 5\r\n\r\nhello")
            return
        sock.sendall(piece)
        while not select.select([sock], [], [], 0.05)[0]:  # until the client closes the connection
            sock.sendall(b"x")

    with raw_server(drip_once) as url, history_reader(url, timeout_s=1_000) as reader:
        with pytest.raises(TransportError, match="deadline"):
            await reader.get(PATH, HEADERS, time.monotonic() + 0.3)
        connections.append(1)  # a slow machine may not have made the first connection in time
        assert (await reader.get(PATH, HEADERS, time.monotonic() + PATIENCE_S)).body == b"hello"


async def test_a_proxy_that_drips_its_answer_does_not_hold_the_readers_thread_beyond_the_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ended = threading.Event()

    def drip(sock: socket.socket) -> None:
        read_request(sock)
        sock.sendall(OK + b"X: ")
        with suppress(OSError):
            while not select.select([sock], [], [], 0.05)[0]:
                sock.sendall(b"x")
        ended.set()

    with raw_server(drip) as proxy:
        use_proxy(monkeypatch, "https", proxy)
        with history_reader("https://onenet.invalid", timeout_s=1_000) as reader:
            with pytest.raises(TransportError, match="deadline"):
                await reader.get(PATH, HEADERS, time.monotonic() + 0.3)
            await until(ended.is_set)


async def test_a_connection_that_is_not_made_in_time_is_named_so() -> None:
    """Beneath the timeout of asyncio there is a cancellation, which tells an operator nothing."""

    def say_nothing(sock: socket.socket) -> None:
        while sock.recv(65536):
            pass

    with raw_server(say_nothing) as url:
        error = await failure(url.replace("http", "https"), timeout_s=0.2)  # already late is late as well
    assert error.reason == "the connection was not made in time"
    assert not error.may_have_been_sent


async def test_look_ups_of_the_platform_that_hang_do_not_hinder_those_of_the_broker_and_of_redis(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The event loop looks up their names in a few threads of its own."""
    look_up, may_answer = socket.getaddrinfo, threading.Event()

    def hang(host: str, *rest: Any, **options: Any) -> Any:
        if host == "platform.invalid":
            assert may_answer.wait(PATIENCE_S)
        return look_up(host, *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    with http_transport("http://platform.invalid", timeout_s=PATIENCE_S) as transport:
        sends = [asyncio.create_task(transport.send(POST, time.monotonic() + PATIENCE_S)) for _ in range(40)]
        await asyncio.sleep(0)
        try:
            assert await asyncio.get_running_loop().getaddrinfo("localhost", 80)
        finally:
            may_answer.set()
        for error in await asyncio.gather(*sends, return_exceptions=True):
            assert isinstance(error, TransportError)
            assert not error.may_have_been_sent
