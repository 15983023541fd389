"""The HTTP edge against real sockets: what proves that nothing was sent, and when a request is over."""

import dataclasses
import json
import socket
import ssl
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import trustme
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import SecretStr

from tests.support.builders import a_command, fields_of, in_hours
from tests.support.proxies import raw_server
from tests.support.simulator import API_KEY, onenet
from worker.core.answer import Answer, Cached, InDoubt, NotSent, Refused
from worker.core.command import Command, read_command
from worker.core.credentials import ApiKey
from worker.core.doubt import DoubtWindow
from worker.core.platform import Candidate
from worker.core.times import platform_time
from worker.dev.services.ports import free_port, wait_until
from worker.errors import HistoryUnreadable, PlatformUnusable, SettingsError
from worker.onenet import transport
from worker.onenet.client import OneNETClient
from worker.onenet.route import Route
from worker.onenet.transport import HTTPTransport, Watch
from worker.simulator.faults import Fault
from worker.simulator.platform import Platform
from worker.simulator.server import Simulator
from worker.telemetry.tracing import NoTracing

NEVER = float("inf")
NEVER_S = 1_000.0  # so long that a test that waits for it fails
SETTLE_S = 2
CHINA = ZoneInfo("Asia/Shanghai")
ANSWER = b'HTTP/1.1 200 OK\r\nContent-Length: 46\r\n\r\n{"errno":0,"data":{"uuid":"u"},"error":"succ"}'


def an_answer(uuid: str) -> bytes:
    """Return the answer that accepts a command under a uuid."""
    body = json.dumps({"errno": 0, "data": {"uuid": uuid}, "error": "succ"}).encode()
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


CLOSING = ANSWER.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")


def secure_context(folder: Path, host: str) -> ssl.SSLContext:
    """Return a server's TLS for a host, and write the authority that vouches for it to ``ca.pem``."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(host).configure_cert(context)
    return context


def command(**changes: Any) -> Command:
    return read_command(json.dumps(a_command(**{"args": "on", **changes})).encode(), None, CHINA)


@contextmanager
def client(url: str, connect_s: float = 1, read_s: float = 1, ca_file: str | None = None) -> Iterator[OneNETClient]:
    watch = Watch(connect_s + read_s)
    route = Route(url, connect_s, ca_file)
    asking = OneNETClient(
        url,
        {None: ApiKey(api_key=SecretStr(API_KEY))},
        lambda: HTTPTransport(route, read_timeout_s=read_s, watch=watch, tracing=NoTracing()),
        CHINA,
        request_s=connect_s + read_s,
        caching_delay_s=SETTLE_S,
        history_window_s=86_400,
    )
    try:
        yield asking
    finally:
        asking.close()
        watch.stop()


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
        data += _received(sock, 4096)
    return data


def _received(sock: socket.socket, size: int) -> bytes:
    data = sock.recv(size)
    if not data:
        raise ConnectionResetError
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


@pytest.mark.parametrize("is_secure", [False, True])
def test_nothing_within_the_read_timeout_is_enough_to_give_up(is_secure: bool, tmp_path: Path) -> None:
    context = secure_context(tmp_path, "127.0.0.1")

    def keep_silent(sock: socket.socket) -> None:
        if is_secure:
            with context.wrap_socket(sock, server_side=True) as secure:
                _silence(secure)
        else:
            _silence(sock)

    with raw_server(keep_silent) as url:
        secure_url = url.replace("http:", "https:") if is_secure else url
        with client(secure_url, connect_s=NEVER_S, read_s=0.2, ca_file=str(tmp_path / "ca.pem")) as asking:
            assert isinstance(asking.execute(command(), NEVER).answer, InDoubt)


def test_connections_are_kept_for_the_next_request() -> None:
    with onenet() as platform, client(platform.url) as asking:
        for _ in range(3):
            assert isinstance(asking.execute(command(), NEVER).answer, Cached)
        assert len({request["client"][1] for request in platform.requests}) == 1


def test_a_connection_that_sat_idle_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that the platform closed meanwhile looks exactly like an answer that was lost."""
    monkeypatch.setattr(transport, "MAX_IDLE_S", 0.0)
    with onenet() as platform, client(platform.url) as asking:
        for _ in range(3):
            asking.execute(command(), NEVER)
        assert len({request["client"][1] for request in platform.requests}) == 3


def test_a_connection_that_the_platform_closed_is_not_used_again() -> None:
    """Not even if it was used a moment ago: a request sent over it would be in doubt."""
    closed: list[socket.socket] = []

    def answer_and_close(sock: socket.socket) -> None:
        _read_request(sock)
        closed.append(sock)
        sock.sendall(an_answer(f"u{len(closed)}"))

    with raw_server(answer_and_close) as url, client(url) as asking:
        for number in range(1, 6):
            assert asking.execute(command(), NEVER).answer == Cached(f"u{number}")
            wait_until(lambda: closed[-1].fileno() == -1, 10, "the end of the connection")


def test_a_redirect_is_not_followed() -> None:
    with onenet(Fault(kind="redirect")) as platform:
        assert ask(platform.url) == Refused("http_rejected", "HTTP 307", may_concern_all_devices=True)
        assert len(platform.requests) == 1


def test_a_private_authority_is_trusted_where_it_is_named(tmp_path: Path) -> None:
    context = secure_context(tmp_path, "127.0.0.1")

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


def _proxied(monkeypatch: pytest.MonkeyPatch, scheme: str, proxy: str) -> None:
    monkeypatch.setenv(f"{scheme}_proxy", proxy.replace("http://", "user:pass@"))  # without a scheme it is http
    monkeypatch.setenv("no_proxy", "")


def _read_head(sock: socket.socket) -> bytes:
    data = b""
    while not data.endswith(b"\r\n\r\n"):
        data += _received(sock, 1)
    return data


BASIC = b"Proxy-Authorization: Basic dXNlcjpwYXNz"


def test_a_proxy_forwards_what_goes_to_an_unencrypted_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bytes] = []

    def forward(sock: socket.socket) -> None:
        asked.append(_read_request(sock))
        sock.sendall(ANSWER)

    with raw_server(forward) as proxy:
        _proxied(monkeypatch, "http", proxy)
        assert ask("http://onenet.invalid:8080/base") == Cached("u")
    first, *headers = asked[0].partition(b"\r\n\r\n")[0].split(b"\r\n")
    assert first.startswith(b"POST http://onenet.invalid:8080/base/nbiot/execute/offline?imei=")
    assert {b"Host: onenet.invalid:8080", BASIC} <= set(headers)


def test_a_proxys_tunnel_carries_what_goes_to_an_encrypted_platform(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The proxy learns where to, and nothing of the request, nor its own password the platform."""
    context = secure_context(tmp_path, "onenet.invalid")
    asked: list[bytes] = []

    def tunnel(sock: socket.socket) -> None:
        asked.append(_read_head(sock))
        sock.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        with context.wrap_socket(sock, server_side=True) as secure:
            asked.append(_read_request(secure))
            secure.sendall(ANSWER)

    with raw_server(tunnel) as proxy:
        _proxied(monkeypatch, "https", proxy)
        with client("https://onenet.invalid", ca_file=str(tmp_path / "ca.pem")) as asking:
            assert asking.execute(command(), NEVER).answer == Cached("u")
    connect, request = asked
    assert connect.startswith(b"CONNECT onenet.invalid:443 HTTP/1.")
    assert BASIC in connect
    assert request.startswith(b"POST /nbiot/execute/offline?imei=")
    assert BASIC not in request


def test_a_proxy_that_refuses_proves_that_nothing_was_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(sock: socket.socket) -> None:
        _read_head(sock)
        sock.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n")

    with raw_server(refuse) as proxy:
        _proxied(monkeypatch, "https", proxy)
        assert isinstance(ask("https://onenet.invalid"), NotSent)


def test_authorities_that_cannot_be_read_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", __file__)
    with pytest.raises(SettingsError), client("https://onenet.invalid"):
        pass


def test_a_proxy_of_another_kind_is_refused_before_anything_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    _proxied(monkeypatch, "https", "socks5://127.0.0.1:1080")
    with pytest.raises(SettingsError) as refused, client("https://onenet.invalid"):
        pass
    assert "socks5" in refused.value.lines[0]


INTERIM = b"HTTP/1.1 103 Early Hints\r\n\r\n"


@pytest.mark.parametrize(
    "behind",
    [ANSWER.replace(b'"u"', b'"v"'), b"and more", b"H", INTERIM, INTERIM + ANSWER.replace(b'"u"', b'"v"')],
    ids=["an answer", "noise", "one byte", "an interim answer", "both"],
)
def test_what_comes_behind_an_answer_is_never_taken_for_the_next_one(behind: bytes) -> None:
    """The next command would be told another's uuid."""
    asked: list[bytes] = []

    def answer_twice(sock: socket.socket) -> None:
        asked.append(_read_request(sock))
        sock.sendall(an_answer(f"u{len(asked)}") + behind)
        sock.recv(1)  # returns when the client closes the connection

    with raw_server(answer_twice) as url, client(url) as asking:
        assert [asking.execute(command(), NEVER).answer for _ in range(2)] == [Cached("u1"), Cached("u2")]
    assert len(asked) == 2


def test_an_answer_without_a_length_ends_with_its_connection() -> None:
    def answer_and_close(sock: socket.socket) -> None:
        _read_request(sock)
        sock.sendall(ANSWER.replace(b"Content-Length: 46\r\n", b""))

    with raw_server(answer_and_close) as url:
        assert ask(url) == Cached("u")


def just_now() -> DoubtWindow:
    """Return a doubt that covers whatever the platform caches during a test."""
    now = datetime.now(UTC)
    return DoubtWindow(now - timedelta(minutes=1), now + timedelta(minutes=1))


def nobody(_uuids: object) -> set[str]:
    return set()


def cache(simulator: Simulator, wanted: Command, args: str, **changes: str) -> str:
    """Have the platform cache a command for the same device; returns its uuid."""
    query = {
        "imei": wanted.imei,
        "obj_id": str(wanted.obj_id),
        "obj_inst_id": str(wanted.obj_inst_id),
        "res_id": str(wanted.res_id),
        "expired_time": platform_time(wanted.expires_at, CHINA),
    }
    return simulator.platform.execute(query | changes, json.dumps({"args": args}).encode()).uuid


def test_a_command_is_found_among_all_pages_of_its_devices_history() -> None:
    wanted = command()
    with onenet() as simulator, client(simulator.url, read_s=20) as asking:
        for number in range(150):
            cache(simulator, wanted, f"another {number}")
        uuid = cache(simulator, wanted, "on")
        found = asking.find_candidates(wanted, just_now(), nobody)
        assert [entry.uuid for entry in found] == [uuid]
        assert asking.find_candidates(wanted, just_now(), set) == []  # they are all another's


def test_what_is_not_there_is_not_found() -> None:
    with onenet() as simulator, client(simulator.url) as asking:
        assert asking.find_candidates(command(), just_now(), nobody) == []


@pytest.mark.parametrize("kind", ["error_500", "garbage", "errno", "drop", "hang", "not_found"])
def test_a_history_that_cannot_be_read_decides_nothing(kind: Any) -> None:
    fault = Fault(kind=kind, seconds=30, endpoint="history")
    with onenet(fault) as simulator, client(simulator.url) as asking, pytest.raises(HistoryUnreadable):
        asking.find_candidates(command(), just_now(), nobody)


def test_what_only_reads_is_asked_again() -> None:
    with onenet(Fault(kind="error_500", endpoint="history", count=2)) as simulator, client(simulator.url) as asking:
        assert asking.find_candidates(command(), just_now(), nobody) == []


def test_without_credentials_there_is_no_history() -> None:
    wanted = dataclasses.replace(command(), product="gone")
    with onenet() as simulator, client(simulator.url) as asking, pytest.raises(HistoryUnreadable, match="credentials"):
        asking.find_candidates(wanted, just_now(), nobody)


def test_nothing_is_sent_after_the_lease() -> None:
    with onenet() as simulator, client(simulator.url) as asking:
        assert isinstance(asking.execute(command(), time.monotonic() - 1).answer, NotSent)
        assert not simulator.requests


def test_nothing_is_sent_after_the_lease_over_a_connection_that_is_there() -> None:
    with onenet() as simulator, client(simulator.url) as asking:
        assert isinstance(asking.execute(command(), NEVER).answer, Cached)
        assert isinstance(asking.execute(command(), time.monotonic() - 1).answer, NotSent)


def test_a_request_is_over_when_the_lease_is() -> None:
    with raw_server(_silence) as url, client(url, connect_s=60, read_s=60) as asking:
        began = time.monotonic()
        assert isinstance(asking.execute(command(), began + 0.3).answer, InDoubt)
        assert time.monotonic() - began < 30


@pytest.mark.parametrize(("hours", "is_omitted"), [(-1, True), (1, False)])
def test_a_valid_time_that_has_passed_is_left_out_and_that_is_told(hours: float, is_omitted: bool) -> None:
    """The platform refuses one that has passed, and takes its absence for "now"."""
    with onenet() as simulator, client(simulator.url) as asking:
        sent = asking.execute(command(valid_time=in_hours(hours)), NEVER)
        assert isinstance(sent.answer, Cached)
        assert sent.valid_time_omitted == is_omitted
        assert ("valid_time" in simulator.requests[0]["query"]) != is_omitted


def in_seconds(seconds: float) -> datetime:
    return datetime.now(UTC) + timedelta(seconds=seconds)


def find_candidates(simulator: Simulator, wanted: Command, doubt: DoubtWindow | None = None) -> list[Candidate]:
    with client(simulator.url, connect_s=10, read_s=10) as asking:
        return asking.find_candidates(wanted, doubt or just_now(), nobody)


@pytest.fixture
def details(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The uuids of the commands whose details were asked for."""
    asked: list[str] = []
    detail = Platform.detail

    def note(platform: Platform, imei: str, uuid: str) -> dict[str, object]:
        asked.append(uuid)
        return detail(platform, imei, uuid)

    monkeypatch.setattr(Platform, "detail", note)
    return asked


@pytest.fixture
def lists(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The pages of histories that were asked for."""
    asked: list[str] = []
    history = Platform.history

    def note(platform: Platform, query: dict[str, str]) -> dict[str, object]:
        asked.append(query.get("page", "1"))
        return history(platform, query)

    monkeypatch.setattr(Platform, "history", note)
    return asked


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"args": None}, {"args": ""}, {"args": '\u5f00 "x" {}'}, {"valid_time": in_hours(1)},
        {"valid_time": in_hours(-1)}, {"retry": 0, "timeout": 40, "trigger_msg": ["UPDATE"]},
        {"retry": 3, "timeout": 25, "trigger_msg": 7}, {"obj_id": 0, "obj_inst_id": 65535, "res_id": 0},
    ],
    ids=fields_of,
)  # fmt: skip
def test_a_command_whose_answer_was_lost_is_found(changes: dict[str, Any]) -> None:
    wanted = command(**changes)
    fault = Fault(kind="drop_after_caching", count=1)
    with onenet(fault) as simulator, client(simulator.url) as asking:
        since = in_seconds(0)
        sent = asking.execute(wanted, NEVER)
        assert isinstance(sent.answer, InDoubt)
        [cached] = simulator.platform.commands
        entries = asking.find_candidates(wanted, DoubtWindow(since, in_seconds(0)), nobody)
        assert entries == [
            Candidate(cached.uuid, is_within_clock_skew=True, valid_time_omitted=sent.valid_time_omitted)
        ]


def test_one_thing_that_differs_makes_it_another_command() -> None:
    """Were it taken for the command, the command would never be sent."""
    wanted = command()
    with onenet() as simulator:
        cache(simulator, wanted, "on", imei="865820030000002")
        cache(simulator, wanted, "on", res_id="1")
        cache(simulator, wanted, "on", valid_time=platform_time(in_seconds(600), CHINA))
        cache(simulator, wanted, "on", expired_time=platform_time(wanted.expires_at + timedelta(seconds=1), CHINA))
        cache(simulator, wanted, "off")
        assert find_candidates(simulator, wanted) == []


def test_the_list_alone_rules_out_what_it_can(lists: list[str], details: list[str]) -> None:
    """A long history is no flood of requests."""
    wanted = command()
    other = command(expired_time=in_hours(30))
    with onenet() as simulator:
        for _ in range(249):
            cache(simulator, other, "on")
        uuid = cache(simulator, wanted, "on")
        assert [entry.uuid for entry in find_candidates(simulator, wanted)] == [uuid]
    assert lists == ["1", "2", "3"]
    assert details == [uuid]


def test_the_details_of_a_command_are_asked_for_once(details: list[str]) -> None:
    """How it was made never changes, and a device's commands in doubt are looked up one after the other."""
    wanted = command()
    with onenet() as simulator, client(simulator.url) as asking:
        uuids = [cache(simulator, wanted, "on") for _ in range(3)]
        first, second = (asking.find_candidates(wanted, just_now(), nobody) for _ in range(2))
    assert first == second
    assert sorted(details) == sorted(uuids)


def test_what_belongs_to_another_command_is_not_asked_for(details: list[str]) -> None:
    wanted = command()
    offered: list[str] = []
    with onenet() as simulator, client(simulator.url) as asking:
        uuids = [cache(simulator, wanted, "on") for _ in range(3)]
        cache(simulator, command(expired_time=in_hours(30)), "on")  # is ruled out before anybody is asked about it

        def others(candidates: Sequence[str]) -> Collection[str]:
            offered.extend(candidates)
            return {uuids[0], uuids[2]}

        entries = asking.find_candidates(wanted, just_now(), others)
    assert sorted(offered) == sorted(uuids)  # without the blank that the platform shows behind some
    assert [entry.uuid for entry in entries] == [uuids[1]]
    assert details == [uuids[1]]


@pytest.mark.parametrize("kind", ["error_503", "too_many_requests", "no_uuid", "redirect", "error_500_after_caching"])
def test_no_answer_but_a_whole_one_is_a_history(kind: Any) -> None:
    with onenet(Fault(kind=kind, endpoint="history")) as simulator, pytest.raises(HistoryUnreadable):
        find_candidates(simulator, command())


def test_a_command_that_is_not_shown_whole_makes_the_history_unreadable(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = command()
    monkeypatch.setattr(Platform, "detail", lambda *_: {"feedback_msg": []})
    with onenet() as simulator:
        cache(simulator, wanted, "on")
        with pytest.raises(HistoryUnreadable):
            find_candidates(simulator, wanted)


def test_a_page_that_is_missing_makes_the_history_unreadable(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = command()
    history = Platform.history

    def forgetful(platform: Platform, query: dict[str, str]) -> dict[str, object]:
        return history(platform, query) | ({"items": []} if "page" in query else {})

    monkeypatch.setattr(Platform, "history", forgetful)
    with onenet() as simulator:
        for _ in range(101):
            cache(simulator, wanted, "on")
        with pytest.raises(HistoryUnreadable, match="only 100 of 101"):
            find_candidates(simulator, wanted)


def test_what_is_cached_between_two_pages_moves_nothing_from_one_to_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A busy device's history would otherwise never be whole."""
    wanted = command()
    other = command(expired_time=in_hours(30))
    history = Platform.history
    with onenet() as simulator:

        def busy(platform: Platform, query: dict[str, str]) -> dict[str, object]:
            found = history(platform, query)
            if "page" not in query:
                cache(simulator, other, "on")
            return found

        monkeypatch.setattr(Platform, "history", busy)
        for _ in range(150):
            cache(simulator, other, "on")
        uuid = cache(simulator, wanted, "on")
        assert [entry.uuid for entry in find_candidates(simulator, wanted)] == [uuid]


def test_where_nobody_listens_nothing_is_known() -> None:
    with client(f"http://127.0.0.1:{free_port()}") as asking, pytest.raises(HistoryUnreadable, match="refused"):
        asking.find_candidates(command(), just_now(), nobody)


def test_a_key_that_is_not_taken_any_more_is_said() -> None:
    with onenet() as simulator:
        simulator.platform.api_key = "another"
        with pytest.raises(HistoryUnreadable, match="errno 1: auth failed"):
            find_candidates(simulator, command())


@pytest.mark.parametrize(
    "fault",
    [Fault(kind="hang", seconds=600, endpoint="history"), Fault(kind="slow_drip", seconds=0.5, endpoint="history")],
    ids=lambda fault: str(fault.kind),
)
def test_a_look_up_is_over_when_the_two_timeouts_together_are(fault: Fault) -> None:
    """The dripping answer would be whole in the end, each byte of it within the read timeout."""
    with onenet(fault) as simulator, client(simulator.url) as asking:
        began = time.monotonic()
        with pytest.raises(HistoryUnreadable):
            asking.find_candidates(command(), just_now(), nobody)
        assert time.monotonic() - began < 10


@pytest.mark.parametrize("kind", ["error_500", "garbage", "errno", "drop", "no_uuid", "not_found"])
def test_one_failure_of_any_kind_is_made_up_for(kind: Any) -> None:
    wanted = command()
    with onenet(Fault(kind=kind, endpoint="history", count=1)) as simulator:
        uuid = cache(simulator, wanted, "on")
        assert [entry.uuid for entry in find_candidates(simulator, wanted)] == [uuid]


def test_a_history_is_asked_for_only_so_often() -> None:
    with onenet(Fault(kind="error_500", endpoint="history")) as simulator:
        struck: list[None] = []
        simulator.on_fault = lambda: struck.append(None)
        with pytest.raises(HistoryUnreadable, match="HTTP 500"):
            find_candidates(simulator, command())
        assert len(struck) == 3


HISTORY_S = 86_400


@pytest.mark.parametrize(
    ("since_s", "cached_s", "is_within_clock_skew"),
    [
        (None, -3600, [True]), (None, -HISTORY_S, [True]), (None, -HISTORY_S - 7200, []),
        (None, SETTLE_S + 4, [True]), (None, SETTLE_S + 20, [False]), (None, SETTLE_S + 90, []),
        (-10, -10, [True]), (-10, -30, [False]), (-10, -100, []),
    ],
)  # fmt: skip
def test_what_was_cached_too_early_or_too_late_is_not_it(
    since_s: float | None, cached_s: float, is_within_clock_skew: list[bool]
) -> None:
    """Too late: after the time by which the platform has cached a request, if it ever does."""
    wanted = command()
    with onenet() as simulator:
        simulator.platform.now = lambda: in_seconds(cached_s).astimezone(CHINA)
        cache(simulator, wanted, "on")
        since = None if since_s is None else in_seconds(since_s)
        entries = find_candidates(simulator, wanted, DoubtWindow(since, in_seconds(0)))
    assert [entry.is_within_clock_skew for entry in entries] == is_within_clock_skew


def _history_server(
    wanted: Command, cached_at: datetime, headers: str, uuid: str = "u", asked: list[bytes] | None = None
) -> Callable[[socket.socket], None]:
    """Return what serves the history of one command, under these headers."""
    item = {
        "cmd_uuid": uuid,
        "type": "EXECUTE",
        "create_time": cached_at.astimezone(CHINA).strftime("%Y-%m-%d %H:%M:%S"),
        "expired_time": platform_time(wanted.expires_at, CHINA),
    }
    args = {"obj_id": wanted.obj_id, "obj_inst_id": wanted.obj_inst_id, "res_id": wanted.res_id}

    def serve(sock: socket.socket) -> None:
        while True:
            request = b""
            while b"\r\n\r\n" not in request:
                received = sock.recv(4096)
                if not received:
                    return
                request += received
            path = request.split(b" ")[1]
            if asked is not None:
                asked.append(path)
            is_detail = path.startswith(b"/nbiot/offline/history/")
            data = (
                {"args": args, "content": {"args": wanted.args}} if is_detail else {"total_count": 1, "items": [item]}
            )
            body = json.dumps({"errno": 0, "data": data}).encode()
            sock.sendall(f"HTTP/1.1 200 OK\r\n{headers}Content-Length: {len(body)}\r\n\r\n".encode() + body)

    return serve


def _date(seconds: float) -> str:
    return f"Date: {format_datetime(in_seconds(seconds), usegmt=True)}\r\n"


@pytest.mark.parametrize(
    ("clock", "cached_s", "is_within_clock_skew"),
    [
        (0, SETTLE_S + 20, False),
        (20, SETTLE_S + 20, True),
        (-20, SETTLE_S + 20, False),
        (0, -21, False),
        (-20, -21, True),
        ("", SETTLE_S + 20, False),
        ("", 0, True),
        ("Date: today\r\n", 0, True),
    ],
)
def test_a_platforms_clock_that_is_ahead_or_behind_is_allowed_for(
    clock: str | float, cached_s: float, is_within_clock_skew: bool
) -> None:
    headers = clock if isinstance(clock, str) else _date(clock)
    wanted = command()
    with raw_server(_history_server(wanted, in_seconds(cached_s), headers)) as url, client(url) as asking:
        [entry] = asking.find_candidates(wanted, DoubtWindow(in_seconds(-1), in_seconds(0)), nobody)
    assert entry.is_within_clock_skew == is_within_clock_skew


@pytest.mark.parametrize("hours", [-1.1, 1.1])
def test_a_platform_whose_clock_is_an_hour_off_has_no_readable_history(hours: float) -> None:
    """What was asked for might begin after the command was cached."""
    wanted = command()
    server = _history_server(wanted, in_seconds(0), _date(hours * 3600))
    with raw_server(server) as url, client(url) as asking, pytest.raises(HistoryUnreadable, match="clock"):
        asking.find_candidates(wanted, DoubtWindow(in_seconds(-1), in_seconds(0)), nobody)


def test_no_uuid_leads_to_another_page() -> None:
    wanted = command()
    asked: list[bytes] = []
    server = _history_server(wanted, in_seconds(0), "", uuid="../a?b=c&d#e", asked=asked)
    with raw_server(server) as url, client(url) as asking:
        [entry] = asking.find_candidates(wanted, DoubtWindow(in_seconds(-1), in_seconds(0)), nobody)
    assert entry.uuid == "../a?b=c&d#e"
    assert asked[1] == b"/nbiot/offline/history/..%2Fa%3Fb%3Dc%26d%23e?imei=865820030000001"


def test_a_doubt_without_a_beginning_is_looked_for_from_long_before_its_end() -> None:
    """Not from long before now: what is replayed may have failed weeks ago."""
    wanted = command()
    asked: list[bytes] = []
    ended = in_seconds(-20 * 86_400)
    server = _history_server(wanted, ended, "", asked=asked)
    with raw_server(server) as url, client(url) as asking:
        [_] = asking.find_candidates(wanted, DoubtWindow(None, ended), nobody)
    start = platform_time(ended - timedelta(days=1, hours=1), CHINA)
    assert f"start={start.replace(':', '%3A')}".encode() in asked[0]


NO_DEVICE = "000000000000000"


def test_a_check_asks_for_a_history_and_caches_nothing() -> None:
    with onenet() as simulator, client(simulator.url) as asking:
        assert asking.check(None, NO_DEVICE).startswith(simulator.url)
        assert simulator.platform.commands == []


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n", "refuses the credentials"),
        (b'HTTP/1.1 200 OK\r\nContent-Length: 12\r\n\r\n{"errno": 1}', "refuses the credentials"),
        (b'HTTP/1.1 200 OK\r\nContent-Length: 12\r\n\r\n{"errno": 7}', "is down"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", "not as OneNET does"),
        (b"HTTP/1.1 302 Found\r\nLocation: /\r\nContent-Length: 0\r\n\r\n", "not as OneNET does"),
        (b"", "cannot be reached"),
    ],
)
def test_a_check_says_what_is_wrong(answer: bytes, words: str) -> None:
    def serve(sock: socket.socket) -> None:
        sock.recv(65536)
        sock.sendall(answer)

    with raw_server(serve) as url, client(url) as asking, pytest.raises(PlatformUnusable, match=words):
        asking.check(None, NO_DEVICE)


@pytest.mark.parametrize(
    ("errno", "error", "words"),
    [
        (3, "token鉴权失败", ["refuses the credentials", "--imei", NO_DEVICE]),
        (2, "api-key required", ["refuses the credentials"]),
        (3, "auth failed", ["refuses the credentials", "--imei"]),
        (15, "api freq out of limit", ["too many requests"]),
        (1, "internal server error", ["is down"]),
        (17, "nbiot server error", ["is down"]),
        (14, "network latency", ["trouble with device", NO_DEVICE]),
        (8, "not found", ["does not find device", "--imei", NO_DEVICE]),
        (2001, "device not online", ["--imei", NO_DEVICE]),
        (7, "parameter required", ["refuses the request"]),
        (13, "system limit", ["limit"]),
        (4242, "unheard\nof", ["unknown error", "errno 4242: unheard of"]),
    ],
)
@pytest.mark.parametrize("status", ["200 OK", "400 Bad Request"])
def test_a_check_passes_on_errno_0_alone(errno: int, error: str, words: list[str], status: str) -> None:
    """Each other answer fails, in one line that says what kind of error it is, with the platform's own text."""
    body = json.dumps({"errno": errno, "error": error}).encode()

    def serve(sock: socket.socket) -> None:
        sock.recv(65536)
        sock.sendall(b"HTTP/1.1 %b\r\nContent-Length: %d\r\n\r\n%b" % (status.encode(), len(body), body))

    with raw_server(serve) as url, client(url) as asking, pytest.raises(PlatformUnusable) as found:
        asking.check(None, NO_DEVICE)
    for word in [*words, f"errno {errno}", " ".join(error.split())]:
        assert word in str(found.value)
    assert len(str(found.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("status", "body", "is_kind"),
    [
        (200, {"errno": 3, "error": "auth failed"}, "refused"),
        (401, {"errno": 3, "error": "token鉴权失败"}, "refused"),
        (404, b"<html>", "refused"),
        (302, b"", "refused"),
        (200, {"errno": 15, "error": "api freq out of limit"}, "throttled"),
        (429, b"", "throttled"),
        (429, {"errno": 15, "error": "api freq out of limit"}, "throttled"),
        (200, {"errno": 1, "error": "internal server error"}, "outage"),
        (200, {"errno": 17, "error": "nbiot server error"}, "outage"),
        (200, b"<html>", "outage"),
        (204, b"", "outage"),
        (502, b"", "outage"),
        (200, {"errno": 7, "error": "parameter required"}, "neither"),
        (200, {"errno": 10, "error": "device not online"}, "neither"),
        (200, {"errno": 14, "error": "network latency"}, "neither"),
        (400, {"errno": 13, "error": "system limit"}, "neither"),
        (200, {"errno": 0, "error": "succ", "data": {}}, "neither"),
        (404, {"errno": 0, "error": "succ"}, "neither"),
    ],
)
def test_a_history_that_cannot_be_read_says_what_it_tells_of_the_platform(status: int, body: Any, is_kind: str) -> None:
    sent = body if isinstance(body, bytes) else json.dumps(body).encode()

    def serve(sock: socket.socket) -> None:
        while sock.recv(65536):
            sock.sendall(b"HTTP/1.1 %d \r\nContent-Length: %d\r\n\r\n%b" % (status, len(sent), sent))

    with raw_server(serve) as url, client(url) as asking, pytest.raises(HistoryUnreadable) as found:
        asking.find_candidates(command(), just_now(), nobody)
    kinds = {"refused": found.value.is_refused, "throttled": found.value.is_throttled, "outage": found.value.is_outage}
    assert [kind for kind, is_so in kinds.items() if is_so] == ([] if is_kind == "neither" else [is_kind])


def test_a_throttled_history_is_not_asked_for_again_at_once() -> None:
    """That would make it worse."""
    fault = Fault(kind="errno", errno=15, error="api freq out of limit", endpoint="history")
    struck: list[None] = []
    with onenet(fault) as simulator:
        simulator.on_fault = lambda: struck.append(None)
        with pytest.raises(HistoryUnreadable):
            find_candidates(simulator, command())
    assert len(struck) == 1


def _swallow(sock: socket.socket) -> None:
    while sock.recv(65536):
        pass


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_check_of_one_that_never_answers_ends(scheme: str) -> None:
    swallowing = raw_server(_swallow)
    with swallowing as url, client(url.replace("http", scheme), 0.2, 0.2) as asking, pytest.raises(PlatformUnusable):
        asking.check(None, NO_DEVICE)
