"""The HTTP edge against real sockets: what proves that nothing was sent, and when a request is over."""

import dataclasses
import json
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import trustme
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import SecretStr

from tests.rig import API_KEY, a_command, onenet, raw_server
from worker.answer import Answer, Cached, InDoubt, NotSent, Refused
from worker.commands import ExecuteCommand, read_command
from worker.doubt import Doubt
from worker.errors import HistoryUnreadable
from worker.localservices.ports import free_port, wait_until
from worker.onenet import http
from worker.onenet.client import OneNETClient
from worker.onenet.http import BoundedHTTP
from worker.settings import ApiKey, Credentials
from worker.simulator.faults import Fault
from worker.simulator.server import Simulator
from worker.times import platform_time

NEVER = float("inf")
SETTLE_S = 2
CHINA = ZoneInfo("Asia/Shanghai")
ANSWER = b'HTTP/1.1 200 OK\r\nContent-Length: 46\r\n\r\n{"errno":0,"data":{"uuid":"u"},"error":"succ"}'


CLOSING = ANSWER.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")


def command() -> ExecuteCommand:
    return read_command(str(a_command(args="on")).replace("'", '"').encode(), None, CHINA)


@contextmanager
def client(url: str, connect_s: float = 1, read_s: float = 1, ca_file: str | None = None) -> Iterator[OneNETClient]:
    edge = BoundedHTTP(url, connect_timeout_s=connect_s, read_timeout_s=read_s, ca_file=ca_file, connections=4)
    try:
        products: dict[str | None, Credentials] = {None: ApiKey(api_key=SecretStr(API_KEY))}
        yield OneNETClient(url, products, edge, CHINA, latest_caching_s=SETTLE_S, history_s=86_400)
    finally:
        edge.close()


def ask(url: str) -> Answer:
    with client(url) as asking:
        return asking.execute(command(), NEVER).answer


def test_nobody_listens_so_nothing_was_sent() -> None:
    found = ask(f"http://127.0.0.1:{free_port()}")
    assert isinstance(found, NotSent)
    assert "refused" in found.reason


def test_a_name_that_is_not_known_proves_that_nothing_was_sent() -> None:
    assert isinstance(ask("http://no-such-host.invalid"), NotSent)


def test_a_connection_that_is_not_made_in_time_proves_that_nothing_was_sent() -> None:
    """A full backlog: the kernel drops what it has no room for, so the connection is never made."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        waiting = []
        for _ in range(4):
            sock = socket.socket()
            sock.setblocking(False)
            sock.connect_ex(listener.getsockname())
            waiting.append(sock)
        found = ask(f"http://127.0.0.1:{listener.getsockname()[1]}")
        for sock in waiting:
            sock.close()
    assert isinstance(found, NotSent)


def test_tls_that_fails_proves_that_nothing_was_sent() -> None:
    """The handshake comes before the first byte of a request, and the key travels in the request."""
    with onenet() as plain:
        assert isinstance(ask(plain.url.replace("http:", "https:")), NotSent)
        assert not plain.requests


def _read_request(sock: socket.socket) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data or not data.endswith(b"}"):
        data += sock.recv(4096)
    return data


def _close(sock: socket.socket) -> None:
    _read_request(sock)


def _reset(sock: socket.socket) -> None:
    _read_request(sock)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    sock.close()


def _half_an_answer(sock: socket.socket) -> None:
    _read_request(sock)
    sock.sendall(ANSWER[:60])


def _no_http(sock: socket.socket) -> None:
    _read_request(sock)
    sock.sendall(b"220 mail.example.org ESMTP\r\n")


def _endless_answer(sock: socket.socket) -> None:
    _read_request(sock)
    sock.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        sock.sendall(b" " * 65536)


def _silence(sock: socket.socket) -> None:
    _read_request(sock)
    sock.recv(1)


def _negative_chunk(sock: socket.socket) -> None:
    _read_request(sock)
    sock.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\nabc")


def _switching(sock: socket.socket) -> None:
    _read_request(sock)
    sock.sendall(b"HTTP/1.1 101 Switching Protocols\r\n\r\n" + ANSWER)


@pytest.mark.parametrize(
    "behaviour", [_close, _reset, _half_an_answer, _no_http, _endless_answer, _silence, _negative_chunk, _switching]
)
def test_whatever_breaks_after_the_first_byte_leaves_a_doubt(behaviour: Callable[[socket.socket], None]) -> None:
    with raw_server(behaviour) as url:
        assert isinstance(ask(url), InDoubt)


def _drip(text: bytes) -> Callable[[socket.socket], None]:
    def behave(sock: socket.socket) -> None:
        _read_request(sock)
        for byte in text:
            sock.sendall(bytes([byte]))
            sock.settimeout(0.2)
            try:
                sock.recv(1)  # returns early only when the client is gone
            except TimeoutError:
                continue
            return

    return behave


@given(
    st.binary(max_size=60),
    st.sampled_from([b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"]),
)
@settings(max_examples=50, deadline=None)
def test_no_bytes_of_an_answer_do_more_than_leave_a_doubt(noise: bytes, beginning: bytes) -> None:
    """An error that nobody expects would end the worker, and put all that is under way in doubt."""

    def answer(sock: socket.socket) -> None:
        _read_request(sock)
        sock.sendall(beginning + noise)

    with raw_server(answer) as url:
        assert not isinstance(ask(url), (NotSent, Cached))


def test_interim_answers_are_not_the_answer() -> None:
    """The real one, left in the connection, would be taken for the answer to the next command."""
    asked: list[bytes] = []

    def hint_and_answer(sock: socket.socket) -> None:
        while True:
            asked.append(_read_request(sock))
            sock.sendall(b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n")
            sock.sendall(ANSWER.replace(b'"u"', b'"%d"' % len(asked)))

    with raw_server(hint_and_answer) as url, client(url) as asking:
        assert [asking.execute(command(), NEVER).answer for _ in range(3)] == [Cached("1"), Cached("2"), Cached("3")]


@pytest.mark.parametrize(
    "text", [ANSWER, CLOSING, ANSWER[:40] + b"\r\nX: " * 100], ids=["body", "body-of-the-last-answer", "headers"]
)
def test_a_dripping_answer_is_over_when_the_two_timeouts_together_are(text: bytes) -> None:
    """Each byte comes well within the read timeout, so that in the end the answer would be whole."""
    with raw_server(_drip(text)) as url:
        assert ask(url) == InDoubt("no whole answer within 2 s")


def test_connections_are_kept_for_the_next_request() -> None:
    with onenet() as platform, client(platform.url) as asking:
        for _ in range(3):
            assert isinstance(asking.execute(command(), NEVER).answer, Cached)
        assert len({request["client"][1] for request in platform.requests}) == 1


def test_a_connection_that_sat_idle_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that the platform closed meanwhile looks exactly like an answer that was lost."""
    monkeypatch.setattr(http, "MAX_IDLE_S", 0.0)
    with onenet() as platform, client(platform.url) as asking:
        for _ in range(3):
            asking.execute(command(), NEVER)
        assert len({request["client"][1] for request in platform.requests}) == 3


def test_a_connection_that_the_platform_closed_is_not_used_again() -> None:
    closed: list[socket.socket] = []

    def answer_and_close(sock: socket.socket) -> None:
        _read_request(sock)
        closed.append(sock)
        sock.sendall(ANSWER)

    with raw_server(answer_and_close) as url, client(url) as asking:
        for number in range(1, 4):
            assert asking.execute(command(), NEVER).answer == Cached("u")
            wait_until(lambda: closed[-1].fileno() == -1, 10, "the end of the connection")
            assert len(closed) == number


def test_a_redirect_is_not_followed() -> None:
    with onenet(Fault(kind="redirect")) as platform:
        assert ask(platform.url) == Refused("http_rejected", "HTTP 307")
        assert len(platform.requests) == 1


def test_a_private_authority_is_trusted_where_it_is_named(tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)

    def answer(sock: socket.socket) -> None:
        with context.wrap_socket(sock, server_side=True) as secure:
            _read_request(secure)
            secure.sendall(ANSWER)

    with raw_server(answer) as url:
        secure_url = url.replace("http:", "https:")
        with client(secure_url, ca_file=str(tmp_path / "ca.pem")) as asking:
            assert asking.execute(command(), NEVER).answer == Cached("u")
        assert isinstance(ask(secure_url), NotSent)


def test_a_proxy_of_the_environment_is_decided_upon_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with onenet() as platform:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
        monkeypatch.setenv("no_proxy", "")
        with client(platform.url.replace("127.0.0.1", "onenet.invalid")) as proxied:
            monkeypatch.delenv("http_proxy")
            assert isinstance(proxied.execute(command(), NEVER).answer, NotSent)


def just_now() -> Doubt:
    """Return a doubt that covers whatever the platform caches during a test."""
    now = datetime.now(UTC)
    return Doubt(now - timedelta(minutes=1), now + timedelta(minutes=1))


def nobody(_uuids: object) -> set[str]:
    return set()


def cache(simulator: Simulator, wanted: ExecuteCommand, args: str) -> str:
    """Have the platform cache a command for the same device; returns its uuid."""
    query = {
        "imei": wanted.imei,
        "obj_id": str(wanted.obj_id),
        "obj_inst_id": str(wanted.obj_inst_id),
        "res_id": str(wanted.res_id),
        "expired_time": platform_time(wanted.expires_at, CHINA),
    }
    return simulator.platform.execute(query, json.dumps({"args": args}).encode()).uuid


def test_a_command_is_found_among_all_pages_of_its_devices_history() -> None:
    wanted = command()
    with onenet() as simulator, client(simulator.url, read_s=20) as asking:
        for number in range(150):
            cache(simulator, wanted, f"another {number}")
        uuid = cache(simulator, wanted, "on")
        found = asking.look_up(wanted, just_now(), nobody)
        assert [entry.uuid for entry in found] == [uuid]
        assert asking.look_up(wanted, just_now(), set) == []  # they are all another's


def test_what_is_not_there_is_not_found() -> None:
    with onenet() as simulator, client(simulator.url) as asking:
        assert asking.look_up(command(), just_now(), nobody) == []


@pytest.mark.parametrize("kind", ["error_500", "garbage", "errno", "drop", "hang", "not_found"])
def test_a_history_that_cannot_be_read_decides_nothing(kind: Any) -> None:
    fault = Fault(kind=kind, seconds=30, endpoint="history")
    with onenet(fault) as simulator, client(simulator.url) as asking, pytest.raises(HistoryUnreadable):
        asking.look_up(command(), just_now(), nobody)


def test_what_only_reads_is_asked_again() -> None:
    with onenet(Fault(kind="error_500", endpoint="history", count=2)) as simulator, client(simulator.url) as asking:
        assert asking.look_up(command(), just_now(), nobody) == []


def test_without_credentials_there_is_no_history() -> None:
    wanted = dataclasses.replace(command(), product="gone")
    with onenet() as simulator, client(simulator.url) as asking, pytest.raises(HistoryUnreadable, match="credentials"):
        asking.look_up(wanted, just_now(), nobody)


def test_nothing_is_sent_after_the_lease() -> None:
    with onenet() as simulator, client(simulator.url) as asking:
        assert isinstance(asking.execute(command(), time.monotonic() - 1).answer, NotSent)
        assert not simulator.requests
