"""The HTTP transport on real sockets: what proves that nothing was sent, and when a request ends."""

import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.onenet_client import (
    NEVER,
    NEVER_S,
    accepting_response,
    command,
    execute_once,
    onenet_client,
    read_request,
    server_tls_context,
    use_proxy,
)
from tests.support.proxies import raw_server
from tests.support.simulator import onenet
from tests.support.waiting import until
from worker.core.answer import Cached, InDoubt, NotSent, Refused
from worker.dev.services.ports import free_port
from worker.errors import SettingsError
from worker.onenet import transport
from worker.simulator.faults import Fault

ACCEPTED = accepting_response()
CLOSING = ACCEPTED.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")


async def test_a_refused_connection_proves_that_nothing_was_sent() -> None:
    found = await execute_once(f"http://127.0.0.1:{free_port()}")
    assert isinstance(found, NotSent)
    assert "refused" in found.reason


async def test_an_unresolvable_host_proves_that_nothing_was_sent() -> None:
    assert isinstance(await execute_once("http://no-such-host.invalid"), NotSent)


async def test_a_connect_timeout_proves_that_nothing_was_sent() -> None:
    """The listener's backlog is full: the kernel drops further handshakes, so the connection is never made."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        waiting = []
        for _ in range(4):
            sock = socket.socket()
            sock.setblocking(False)
            sock.connect_ex(listener.getsockname())
            waiting.append(sock)
        found = await execute_once(f"http://127.0.0.1:{listener.getsockname()[1]}", connect_s=0.2)
        for sock in waiting:
            sock.close()
    assert isinstance(found, NotSent)


async def test_a_failed_tls_handshake_proves_that_nothing_was_sent() -> None:
    """The handshake precedes the first byte of the request, which carries the key."""
    with onenet() as plain:
        assert isinstance(await execute_once(plain.url.replace("http:", "https:")), NotSent)
        assert not plain.requests


def _close(sock: socket.socket) -> None:
    read_request(sock)


def _reset(sock: socket.socket) -> None:
    read_request(sock)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    sock.close()


def _truncated_response(sock: socket.socket) -> None:
    read_request(sock)
    sock.sendall(ACCEPTED[:60])


def _not_http(sock: socket.socket) -> None:
    read_request(sock)
    sock.sendall(b"220 mail.example.org ESMTP\r\n")


def _endless_response(sock: socket.socket) -> None:
    read_request(sock)
    sock.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        sock.sendall(b" " * 65536)


def _silence(sock: socket.socket) -> None:
    read_request(sock)
    sock.recv(1)


def _negative_chunk(sock: socket.socket) -> None:
    read_request(sock)
    sock.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\nabc")


def _switching(sock: socket.socket) -> None:
    read_request(sock)
    sock.sendall(b"HTTP/1.1 101 Switching Protocols\r\n\r\n" + ACCEPTED)


@pytest.mark.parametrize(
    "behaviour",
    [_close, _reset, _truncated_response, _not_http, _endless_response, _silence, _negative_chunk, _switching],
)
async def test_a_failure_after_the_first_byte_of_the_request_leaves_the_command_in_doubt(
    behaviour: Callable[[socket.socket], None],
) -> None:
    with raw_server(behaviour) as url:
        assert isinstance(await execute_once(url), InDoubt)


def _drip(text: bytes) -> Callable[[socket.socket], None]:
    def behave(sock: socket.socket) -> None:
        read_request(sock)
        for byte in text:
            sock.sendall(bytes([byte]))
            sock.settimeout(0.2)
            try:
                sock.recv(1)  # returns early only when the client closes the connection
            except TimeoutError:
                continue
            return

    return behave


@given(
    st.binary(max_size=60),
    st.sampled_from([b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"]),
)
@settings(max_examples=50, deadline=None)
async def test_random_response_bytes_never_count_as_accepted_or_as_not_sent(noise: bytes, beginning: bytes) -> None:
    """An unexpected exception would end the worker and leave every command in flight in doubt."""

    def answer(sock: socket.socket) -> None:
        read_request(sock)
        sock.sendall(beginning + noise)

    with raw_server(answer) as url:
        assert not isinstance(await execute_once(url), (NotSent, Cached))


async def test_an_interim_response_is_not_taken_for_the_final_one() -> None:
    """The final response, left in the connection, would be taken for the response to the next command."""
    asked: list[bytes] = []

    def hint_and_answer(sock: socket.socket) -> None:
        while True:
            asked.append(read_request(sock))
            sock.sendall(b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n")
            sock.sendall(ACCEPTED.replace(b'"u"', b'"%d"' % len(asked)))

    with raw_server(hint_and_answer) as url, onenet_client(url) as client:
        assert [(await client.execute(command(), NEVER)).answer for _ in range(3)] == [
            Cached("1"),
            Cached("2"),
            Cached("3"),
        ]


@pytest.mark.parametrize(
    "text", [ACCEPTED, CLOSING, ACCEPTED[:40] + b"\r\nX: " * 100], ids=["body", "body of the last response", "headers"]
)
async def test_a_response_that_arrives_byte_by_byte_is_cut_after_both_timeouts_together(text: bytes) -> None:
    """Each byte arrives well within the read timeout, so that the response would be complete in the end."""
    with raw_server(_drip(text)) as url:
        assert await execute_once(url, connect_s=1) == InDoubt("no complete response within 2 s")


@pytest.mark.parametrize("is_secure", [False, True])
async def test_a_request_fails_when_no_byte_arrives_within_the_read_timeout(is_secure: bool, tmp_path: Path) -> None:
    context = server_tls_context(tmp_path, "127.0.0.1")

    def keep_silent(sock: socket.socket) -> None:
        if is_secure:
            with context.wrap_socket(sock, server_side=True) as secure:
                _silence(secure)
        else:
            _silence(sock)

    with raw_server(keep_silent) as url:
        secure_url = url.replace("http:", "https:") if is_secure else url
        with onenet_client(secure_url, connect_s=NEVER_S, read_s=0.2, ca_file=str(tmp_path / "ca.pem")) as client:
            assert isinstance((await client.execute(command(), NEVER)).answer, InDoubt)


async def test_a_connection_is_reused_for_the_next_request() -> None:
    with onenet() as platform, onenet_client(platform.url) as client:
        for _ in range(3):
            assert isinstance((await client.execute(command(), NEVER)).answer, Cached)
        assert len({request["client"][1] for request in platform.requests}) == 1


async def test_a_connection_that_was_idle_too_long_is_not_reused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request over a connection that the platform closed meanwhile looks exactly like a lost response."""
    monkeypatch.setattr(transport, "MAX_IDLE_S", 0.0)
    with onenet() as platform, onenet_client(platform.url) as client:
        for _ in range(3):
            await client.execute(command(), NEVER)
        assert len({request["client"][1] for request in platform.requests}) == 3


async def test_a_connection_that_the_platform_closed_is_not_reused() -> None:
    """Not even if it was used a moment ago: a command sent over it would be in doubt."""
    closed: list[socket.socket] = []

    def answer_and_close(sock: socket.socket) -> None:
        read_request(sock)
        closed.append(sock)
        sock.sendall(accepting_response(f"u{len(closed)}"))

    with raw_server(answer_and_close) as url, onenet_client(url) as client:
        for number in range(1, 6):
            assert (await client.execute(command(), NEVER)).answer == Cached(f"u{number}")
            await until(lambda: closed[-1].fileno() == -1)


async def test_a_redirect_is_not_followed() -> None:
    with onenet(Fault(kind="redirect")) as platform:
        assert await execute_once(platform.url) == Refused(
            "http_rejected", "HTTP 307, no content type, without a printable body", may_concern_all_devices=True
        )
        assert len(platform.requests) == 1


async def test_a_private_certificate_authority_is_trusted_only_if_it_is_configured(tmp_path: Path) -> None:
    context = server_tls_context(tmp_path, "127.0.0.1")

    def answer(sock: socket.socket) -> None:
        with context.wrap_socket(sock, server_side=True) as secure:
            read_request(secure)
            secure.sendall(ACCEPTED)

    with raw_server(answer) as url:
        secure_url = url.replace("http:", "https:")
        with onenet_client(secure_url, ca_file=str(tmp_path / "ca.pem")) as client:
            assert (await client.execute(command(), NEVER)).answer == Cached("u")
        assert isinstance(await execute_once(secure_url), NotSent)


async def test_the_proxy_of_the_environment_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with onenet() as platform:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
        monkeypatch.setenv("no_proxy", "")
        with onenet_client(platform.url.replace("127.0.0.1", "onenet.invalid")) as proxied:
            monkeypatch.delenv("http_proxy")
            assert isinstance((await proxied.execute(command(), NEVER)).answer, NotSent)


def _read_head(sock: socket.socket) -> bytes:
    data = b""
    while not data.endswith(b"\r\n\r\n"):
        received = sock.recv(1)
        if not received:
            raise ConnectionResetError
        data += received
    return data


def _with_password(proxy: str) -> str:
    """Return a proxy's URL with user and password, and without a scheme, which means http."""
    return proxy.replace("http://", "user:pass@")


BASIC = b"Proxy-Authorization: Basic dXNlcjpwYXNz"


async def test_a_proxy_forwards_requests_to_an_http_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bytes] = []

    def forward(sock: socket.socket) -> None:
        asked.append(read_request(sock))
        sock.sendall(ACCEPTED)

    with raw_server(forward) as proxy:
        use_proxy(monkeypatch, "http", _with_password(proxy))
        assert await execute_once("http://onenet.invalid:8080/base") == Cached("u")
    first, *headers = asked[0].partition(b"\r\n\r\n")[0].split(b"\r\n")
    assert first.startswith(b"POST http://onenet.invalid:8080/base/nbiot/execute/offline?imei=")
    assert {b"Host: onenet.invalid:8080", BASIC} <= set(headers)


async def test_a_proxy_tunnels_requests_to_an_https_platform(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The proxy sees the platform's host, not the request; the platform does not see the proxy's password."""
    context = server_tls_context(tmp_path, "onenet.invalid")
    asked: list[bytes] = []

    def tunnel(sock: socket.socket) -> None:
        asked.append(_read_head(sock))
        sock.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        with context.wrap_socket(sock, server_side=True) as secure:
            asked.append(read_request(secure))
            secure.sendall(ACCEPTED)

    with raw_server(tunnel) as proxy:
        use_proxy(monkeypatch, "https", _with_password(proxy))
        with onenet_client("https://onenet.invalid", ca_file=str(tmp_path / "ca.pem")) as client:
            assert (await client.execute(command(), NEVER)).answer == Cached("u")
    connect, request = asked
    assert connect.startswith(b"CONNECT onenet.invalid:443 HTTP/1.")
    assert BASIC in connect
    assert request.startswith(b"POST /nbiot/execute/offline?imei=")
    assert BASIC not in request


async def test_a_tunnel_that_the_proxy_refuses_proves_that_nothing_was_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(sock: socket.socket) -> None:
        _read_head(sock)
        sock.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n")

    with raw_server(refuse) as proxy:
        use_proxy(monkeypatch, "https", _with_password(proxy))
        assert isinstance(await execute_once("https://onenet.invalid"), NotSent)


def test_unreadable_certificate_authorities_are_a_settings_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", __file__)
    with pytest.raises(SettingsError), onenet_client("https://onenet.invalid"):
        pass


def test_a_socks_proxy_is_a_settings_error(monkeypatch: pytest.MonkeyPatch) -> None:
    use_proxy(monkeypatch, "https", "socks5://127.0.0.1:1080")
    with pytest.raises(SettingsError) as refused, onenet_client("https://onenet.invalid"):
        pass
    assert "socks5" in refused.value.lines[0]


INTERIM = b"HTTP/1.1 103 Early Hints\r\n\r\n"


@pytest.mark.parametrize(
    "extra",
    [ACCEPTED.replace(b'"u"', b'"v"'), b"and more", b"H", INTERIM, INTERIM + ACCEPTED.replace(b'"u"', b'"v"')],
    ids=["a response", "noise", "one byte", "an interim response", "both"],
)
async def test_bytes_after_a_response_are_never_taken_for_the_next_response(extra: bytes) -> None:
    """The next command would be accepted under the uuid of another."""
    asked: list[bytes] = []

    def answer_twice(sock: socket.socket) -> None:
        asked.append(read_request(sock))
        sock.sendall(accepting_response(f"u{len(asked)}") + extra)
        sock.recv(1)  # returns when the client closes the connection

    with raw_server(answer_twice) as url, onenet_client(url) as client:
        assert [(await client.execute(command(), NEVER)).answer for _ in range(2)] == [Cached("u1"), Cached("u2")]
    assert len(asked) == 2


async def test_a_response_without_a_length_ends_with_its_connection() -> None:
    def answer_and_close(sock: socket.socket) -> None:
        read_request(sock)
        sock.sendall(ACCEPTED.replace(b"Content-Length: 46\r\n", b""))

    with raw_server(answer_and_close) as url:
        assert await execute_once(url) == Cached("u")
