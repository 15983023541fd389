"""Proxies, private authorities, IPv6 and redirects: alike for what is sent once and for the reads of the history."""

import socket
import ssl
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.onenet_client import InnerTLS, https, read_request, server_tls_context, use_proxy
from tests.support.proxies import raw_server
from tests.support.waiting import PATIENCE_S
from worker.dev.services.ports import free_port
from worker.errors import TLSError, TransportError
from worker.onenet.history_reader import HistoryReader
from worker.onenet.response import Response
from worker.onenet.route import Route
from worker.onenet.transport import HTTPTransport, Request
from worker.telemetry.tracing import NoTracing

PATH = "/nbiot?imei=865820030000001"
HELLO = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
BASIC = b"Proxy-Authorization: Basic dXNlcjpwYXNz"
TIMES: dict[str, Any] = {"connect_timeout_s": PATIENCE_S, "read_timeout_s": PATIENCE_S, "tracing": NoTracing()}
Send = Callable[[Route], Awaitable[Response]]


async def post(route: Route) -> Response:
    transport = HTTPTransport(route, **TIMES)
    try:
        return await transport.send(Request(PATH, {"api-key": "S3cret"}), time.monotonic() + PATIENCE_S)
    finally:
        transport.close()


async def get(route: Route) -> Response:
    reader = HistoryReader(route, concurrency=1, **TIMES)
    try:
        return await reader.get(PATH, {"api-key": "S3cret"}, time.monotonic() + PATIENCE_S)
    finally:
        reader.close()


pytestmark = pytest.mark.parametrize("send", [post, get], ids=["POST", "GET"])


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the machine's proxies and authorities from the environment."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)


class Recorder:
    """A server that says hello; ``asked`` are the requests."""

    def __init__(self) -> None:
        self.asked: list[bytes] = []

    def serve(self, sock: Any) -> None:
        self.asked.append(read_request(sock))
        sock.sendall(HELLO)

    def tunnel(self, sock: Any) -> None:
        """Agree to a tunnel."""
        self.asked.append(read_request(sock))
        sock.sendall(b"HTTP/1.1 200 Connection established\r\nVia: x\r\n\r\n")

    @property
    def first_line(self) -> bytes:
        return self.asked[-1].partition(b"\r\n")[0]


def with_password(proxy: str) -> str:
    return proxy.replace("://", "://user:pass@")


def over_tls(context: ssl.SSLContext, serve: Callable[[Any], None]) -> Callable[[socket.socket], None]:
    def serve_tls(sock: socket.socket) -> None:
        with context.wrap_socket(sock, server_side=True) as secure:
            serve(secure)

    return serve_tls


async def test_a_request_names_host_path_and_credentials(send: Send) -> None:
    server = Recorder()
    with raw_server(server.serve) as url:
        assert (await send(Route(f"{url}/base", None))).body == b"hello"
    method = send.__name__.upper().encode()
    assert server.first_line == method + b" /base/nbiot?imei=865820030000001 HTTP/1.1"
    lines = server.asked[0].split(b"\r\n")
    assert f"Host: {url.removeprefix('http://')}".encode() in lines
    assert {b"api-key: S3cret", b"Accept: application/json", b"Accept-Encoding: identity"} <= set(lines)
    assert [line for line in lines if line.startswith(b"User-Agent: onenet-execute-worker/")]


async def test_a_proxy_forwards_requests_to_an_http_platform(send: Send, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = Recorder()
    with raw_server(proxy.serve) as url:
        use_proxy(monkeypatch, "http", with_password(url))
        assert (await send(Route("http://onenet.invalid:8080/base", None))).body == b"hello"
    assert proxy.first_line.split()[1] == b"http://onenet.invalid:8080/base/nbiot?imei=865820030000001"
    assert {b"Host: onenet.invalid:8080", BASIC} <= set(proxy.asked[0].split(b"\r\n"))


async def test_an_https_proxy_forwards_requests_to_an_http_platform(
    send: Send, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    proxy = Recorder()
    with raw_server(over_tls(server_tls_context(tmp_path, "127.0.0.1"), proxy.serve)) as url:
        use_proxy(monkeypatch, "http", with_password(https(url)))
        route = Route("http://onenet.invalid", str(tmp_path / "ca.pem"))
        assert (await send(route)).body == b"hello"
    assert proxy.first_line.split()[1] == b"http://onenet.invalid/nbiot?imei=865820030000001"
    assert BASIC in proxy.asked[0]


async def test_a_proxy_tunnels_requests_to_an_https_platform(
    send: Send, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The proxy sees the platform's host, not the request; the platform does not see the proxy's password."""
    context = server_tls_context(tmp_path, "onenet.invalid")
    server = Recorder()

    def serve(sock: socket.socket) -> None:
        server.tunnel(sock)
        over_tls(context, server.serve)(sock)

    with raw_server(serve) as url:
        use_proxy(monkeypatch, "https", with_password(url))
        assert (await send(Route("https://onenet.invalid", str(tmp_path / "ca.pem")))).body == b"hello"
    connect, request = server.asked
    assert connect.startswith(b"CONNECT onenet.invalid:443 HTTP/1.")
    assert BASIC in connect
    assert b"api-key" not in connect
    assert request.split()[1] == b"/nbiot?imei=865820030000001"
    assert BASIC not in request


async def test_an_https_proxy_tunnels_requests_to_an_https_platform(
    send: Send, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    context = server_tls_context(tmp_path, "127.0.0.1")
    server = Recorder()

    def serve(outer: ssl.SSLSocket) -> None:
        server.tunnel(outer)
        server.serve(InnerTLS(outer, context))

    with raw_server(over_tls(context, serve)) as url:
        use_proxy(monkeypatch, "https", with_password(https(url)))
        assert (await send(Route("https://127.0.0.1:1234", str(tmp_path / "ca.pem")))).body == b"hello"
    connect, request = server.asked
    assert connect.startswith(b"CONNECT 127.0.0.1:1234 HTTP/1.")
    assert request.split()[1] == b"/nbiot?imei=865820030000001"


async def test_a_tunnel_to_an_ipv6_address_names_it_in_brackets(send: Send, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = Recorder()
    with raw_server(proxy.serve) as url:
        use_proxy(monkeypatch, "https", url)
        with pytest.raises(TransportError):
            await send(Route("https://[2001:db8::1]:8443", None))
    assert proxy.first_line.split()[1] == b"[2001:db8::1]:8443"


async def test_a_host_in_no_proxy_is_reached_directly(send: Send, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Recorder()
    with raw_server(server.serve) as url:
        use_proxy(monkeypatch, "http", f"http://127.0.0.1:{free_port()}")
        monkeypatch.setenv("no_proxy", "example.org,127.0.0.1")
        assert (await send(Route(url, None))).body == b"hello"


async def test_the_environment_is_read_once(send: Send, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Recorder()
    with raw_server(server.serve) as url:
        use_proxy(monkeypatch, "http", url)
        route = Route("http://onenet.invalid", None)
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
        assert (await send(route)).body == b"hello"


@pytest.mark.parametrize("refusal", [b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n", b"HTTP/1.1 502 X\r\n\r\n"])
async def test_nothing_is_sent_through_a_tunnel_that_the_proxy_refuses(
    send: Send, refusal: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(sock: socket.socket) -> None:
        read_request(sock)
        sock.sendall(refusal)

    with raw_server(refuse) as url:
        use_proxy(monkeypatch, "https", with_password(url))
        with pytest.raises(TransportError) as caught:
            await send(Route("https://onenet.invalid", None))
    assert refusal.split()[1].decode() in caught.value.reason
    assert "pass" not in caught.value.reason


async def test_a_private_authority_is_trusted_only_if_it_is_configured(send: Send, tmp_path: Path) -> None:
    server = Recorder()
    with raw_server(over_tls(server_tls_context(tmp_path, "127.0.0.1"), server.serve)) as url:
        assert (await send(Route(https(url), str(tmp_path / "ca.pem")))).body == b"hello"
        with pytest.raises(TLSError):
            await send(Route(https(url), None))
    assert len(server.asked) == 1


async def test_only_the_private_authority_is_trusted_if_one_is_configured(send: Send, tmp_path: Path) -> None:
    """The environment's authorities, and those of requests, add nothing to it."""
    for folder in ("ours", "foreign"):
        (tmp_path / folder).mkdir()
    context = server_tls_context(tmp_path / "foreign", "127.0.0.1")
    server_tls_context(tmp_path / "ours", "127.0.0.1")
    route = Route("https://onenet.invalid", str(tmp_path / "ours" / "ca.pem"))
    assert route.tls is not None
    trusted = len(route.tls.get_ca_certs())
    server = Recorder()
    with raw_server(over_tls(context, server.serve)) as url, pytest.MonkeyPatch.context() as patched:
        patched.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "foreign" / "ca.pem"))
        used = Route(https(url), str(tmp_path / "ours" / "ca.pem"))
        with pytest.raises(TLSError):
            await send(used)
    assert used.tls is not None
    assert len(used.tls.get_ca_certs()) == trusted == 1
    assert not server.asked


async def test_a_certificate_of_another_host_is_refused(send: Send, tmp_path: Path) -> None:
    server = Recorder()
    serving = raw_server(over_tls(server_tls_context(tmp_path, "example.org"), server.serve))
    with serving as url, pytest.raises(TLSError):
        await send(Route(https(url), str(tmp_path / "ca.pem")))
    assert not server.asked


@pytest.mark.parametrize("is_secure", [False, True], ids=["http", "https"])
async def test_an_ipv6_address_is_reached(send: Send, is_secure: bool, tmp_path: Path) -> None:
    server = Recorder()
    serve = over_tls(server_tls_context(tmp_path, "::1"), server.serve) if is_secure else server.serve
    with raw_server(serve, "::1") as url:
        route = Route(https(url) if is_secure else url, str(tmp_path / "ca.pem") if is_secure else None)
        assert (await send(route)).body == b"hello"
    assert f"Host: {url.removeprefix('http://')}".encode() in server.asked[0].split(b"\r\n")


async def test_an_ipv6_proxy_is_used(send: Send, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = Recorder()
    with raw_server(proxy.serve, "::1") as url:
        use_proxy(monkeypatch, "http", url)
        assert (await send(Route("http://onenet.invalid", None))).body == b"hello"


async def test_the_second_address_of_a_name_is_tried_if_the_first_refuses(
    send: Send, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Recorder()
    with raw_server(server.serve) as url:
        port = int(url.rpartition(":")[2])
        refusing, serving = ("127.0.0.1", free_port()), ("127.0.0.1", port)
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address) for address in (refusing, serving)]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
        assert (await send(Route(f"http://onenet.invalid:{port}", None))).body == b"hello"


async def test_a_redirect_is_not_followed_and_a_cookie_is_not_kept(send: Send) -> None:
    asked: list[bytes] = []

    def redirect(sock: socket.socket) -> None:
        asked.append(read_request(sock))
        sock.sendall(b"HTTP/1.1 302 Found\r\nLocation: /other\r\nSet-Cookie: a=b\r\nContent-Length: 0\r\n\r\n")

    with raw_server(redirect) as url:
        for _ in range(2):
            assert (await send(Route(url, None))).status == 302
    assert len(asked) == 2
    assert not [request for request in asked if b"cookie" in request.lower()]


async def test_a_compressed_body_is_not_expanded(send: Send) -> None:
    """A small response may become an enormous one, and the worker asks for none that is compressed."""

    def serve(sock: socket.socket) -> None:
        read_request(sock)
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 5\r\n\r\n\x1f\x8bxyz")

    with raw_server(serve) as url:
        assert (await send(Route(url, None))).body == b"\x1f\x8bxyz"
