"""Reads of the command history from a real HTTP server: what is found, retried, skipped and unreadable."""

import asyncio
import dataclasses
import json
import socket
import time
from collections.abc import Callable, Collection, Sequence
from datetime import datetime, timedelta
from email.utils import format_datetime
from functools import partial
from typing import Any

import pytest

from tests.support.builders import fields_of, in_hours
from tests.support.onenet_client import (
    CACHING_DELAY_S,
    CHINA,
    HISTORY_WINDOW_S,
    NEVER,
    cache,
    command,
    current_doubt,
    in_seconds,
    none_owned,
    onenet_client,
)
from tests.support.proxies import raw_server
from tests.support.simulator import onenet
from tests.support.waiting import PATIENCE_S
from worker.core.answer import Cached, InDoubt
from worker.core.command import Command
from worker.core.doubt_window import DoubtWindow
from worker.core.platform import Candidate
from worker.core.times import platform_time
from worker.dev.services.ports import free_port
from worker.errors import HistoryUnreadable
from worker.onenet.search_time import SearchTime
from worker.simulator.faults import Fault
from worker.simulator.platform import Platform
from worker.simulator.server import Simulator


async def all_owned(uuids: Sequence[str]) -> Collection[str]:
    return set(uuids)


async def test_a_command_is_found_on_the_last_page_of_a_long_history() -> None:
    wanted = command()
    with onenet() as simulator, onenet_client(simulator.url, read_s=20) as client:
        for number in range(150):
            cache(simulator, wanted, f"another {number}")
        uuid = cache(simulator, wanted, "on")
        found = await client.find_candidates(wanted, current_doubt(), none_owned)
        assert [candidate.uuid for candidate in found] == [uuid]
        assert (
            await client.find_candidates(wanted, current_doubt(), all_owned) == []
        )  # every uuid belongs to another command


async def test_an_empty_history_has_no_candidate() -> None:
    with onenet() as simulator, onenet_client(simulator.url) as client:
        assert await client.find_candidates(command(), current_doubt(), none_owned) == []


@pytest.mark.parametrize("kind", ["error_500", "garbage", "errno", "drop", "hang", "not_found"])
async def test_a_history_that_fails_on_every_try_is_unreadable(kind: Any) -> None:
    fault = Fault(kind=kind, seconds=2 * PATIENCE_S, endpoint="history")
    read_s = 1 if kind == "hang" else PATIENCE_S
    with (
        onenet(fault) as simulator,
        onenet_client(simulator.url, read_s=read_s) as client,
        pytest.raises(HistoryUnreadable),
    ):
        await client.find_candidates(command(), current_doubt(), none_owned)


async def test_a_read_of_the_history_is_repeated_after_a_failure() -> None:
    with (
        onenet(Fault(kind="error_500", endpoint="history", count=2)) as simulator,
        onenet_client(simulator.url) as client,
    ):
        assert await client.find_candidates(command(), current_doubt(), none_owned) == []


async def test_the_history_of_a_product_without_credentials_is_unreadable() -> None:
    wanted = dataclasses.replace(command(), product="gone")
    with (
        onenet() as simulator,
        onenet_client(simulator.url) as client,
        pytest.raises(HistoryUnreadable, match="credentials"),
    ):
        await client.find_candidates(wanted, current_doubt(), none_owned)


async def find_candidates(simulator: Simulator, wanted: Command, doubt: DoubtWindow | None = None) -> list[Candidate]:
    with onenet_client(simulator.url, connect_s=10, read_s=10) as client:
        return await client.find_candidates(wanted, doubt or current_doubt(), none_owned)


@pytest.fixture
def details(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The uuids of the entries whose details were read."""
    asked: list[str] = []
    detail = Platform.detail

    def note(platform: Platform, imei: str, uuid: str) -> dict[str, object]:
        asked.append(uuid)
        return detail(platform, imei, uuid)

    monkeypatch.setattr(Platform, "detail", note)
    return asked


@pytest.fixture
def lists(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The pages of histories that were read."""
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
async def test_a_command_whose_response_was_lost_is_found(changes: dict[str, Any]) -> None:
    wanted = command(**changes)
    fault = Fault(kind="drop_after_caching", count=1)
    with onenet(fault) as simulator, onenet_client(simulator.url) as client:
        since = in_seconds(0)
        sent = await client.execute(wanted, NEVER)
        assert isinstance(sent.answer, InDoubt)
        [cached] = simulator.platform.commands
        entries = await client.find_candidates(wanted, DoubtWindow(since, in_seconds(0)), none_owned)
        assert entries == [
            Candidate(cached.uuid, is_within_clock_skew=True, valid_time_omitted=sent.valid_time_omitted)
        ]


async def test_an_entry_that_differs_in_one_field_is_another_command() -> None:
    """If it were taken for the command, the command would never be sent."""
    wanted = command()
    with onenet() as simulator:
        cache(simulator, wanted, "on", imei="865820030000002")
        cache(simulator, wanted, "on", res_id="1")
        cache(simulator, wanted, "on", valid_time=platform_time(in_seconds(600), CHINA))
        cache(simulator, wanted, "on", expired_time=platform_time(wanted.expires_at + timedelta(seconds=1), CHINA))
        cache(simulator, wanted, "off")
        assert await find_candidates(simulator, wanted) == []


async def test_details_are_read_only_for_entries_that_the_list_does_not_exclude(
    lists: list[str], details: list[str]
) -> None:
    """A long history must not cause a flood of requests."""
    wanted = command()
    other = command(expired_time=in_hours(30))
    with onenet() as simulator:
        for _ in range(249):
            cache(simulator, other, "on")
        uuid = cache(simulator, wanted, "on")
        assert [entry.uuid for entry in await find_candidates(simulator, wanted)] == [uuid]
    assert lists == ["1", "2", "3"]
    assert details == [uuid]


async def test_the_details_of_an_entry_are_read_once(details: list[str]) -> None:
    """They never change, and the commands in doubt of one device are searched for one after the other."""
    wanted = command()
    with onenet() as simulator, onenet_client(simulator.url) as client:
        uuids = [cache(simulator, wanted, "on") for _ in range(3)]
        first, second = [await client.find_candidates(wanted, current_doubt(), none_owned) for _ in range(2)]
    assert first == second
    assert sorted(details) == sorted(uuids)


async def test_the_details_of_an_entry_owned_by_another_command_are_not_read(details: list[str]) -> None:
    wanted = command()
    offered: list[str] = []
    with onenet() as simulator, onenet_client(simulator.url) as client:
        uuids = [cache(simulator, wanted, "on") for _ in range(3)]
        cache(simulator, command(expired_time=in_hours(30)), "on")  # the list excludes it before owners are looked up

        async def others(candidates: Sequence[str]) -> Collection[str]:
            offered.extend(candidates)
            return {uuids[0], uuids[2]}

        entries = await client.find_candidates(wanted, current_doubt(), others)
    assert sorted(offered) == sorted(uuids)  # without the trailing blank that the platform adds to some
    assert [entry.uuid for entry in entries] == [uuids[1]]
    assert details == [uuids[1]]


@pytest.mark.parametrize("kind", ["error_503", "too_many_requests", "no_uuid", "redirect", "error_500_after_caching"])
async def test_an_error_response_is_never_a_history(kind: Any) -> None:
    with onenet(Fault(kind=kind, endpoint="history")) as simulator, pytest.raises(HistoryUnreadable):
        await find_candidates(simulator, command())


async def test_an_incomplete_detail_makes_the_history_unreadable(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = command()
    monkeypatch.setattr(Platform, "detail", lambda *_: {"feedback_msg": []})
    with onenet() as simulator:
        cache(simulator, wanted, "on")
        with pytest.raises(HistoryUnreadable):
            await find_candidates(simulator, wanted)


async def test_a_missing_page_makes_the_history_unreadable(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = command()
    history = Platform.history

    def forgetful(platform: Platform, query: dict[str, str]) -> dict[str, object]:
        return history(platform, query) | ({"items": []} if "page" in query else {})

    monkeypatch.setattr(Platform, "history", forgetful)
    with onenet() as simulator:
        for _ in range(101):
            cache(simulator, wanted, "on")
        with pytest.raises(HistoryUnreadable, match="only 100 of 101"):
            await find_candidates(simulator, wanted)


async def test_a_command_cached_between_two_page_reads_moves_no_entry_to_another_page(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Otherwise the history of a busy device would never be complete."""
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
        assert [entry.uuid for entry in await find_candidates(simulator, wanted)] == [uuid]


async def test_a_refused_connection_makes_the_history_unreadable() -> None:
    with onenet_client(f"http://127.0.0.1:{free_port()}") as client, pytest.raises(HistoryUnreadable, match="refused"):
        await client.find_candidates(command(), current_doubt(), none_owned)


async def test_refused_credentials_make_the_history_unreadable() -> None:
    with onenet() as simulator:
        simulator.platform.api_key = "another"
        with pytest.raises(HistoryUnreadable, match="errno 1: auth failed"):
            await find_candidates(simulator, command())


@pytest.mark.parametrize(
    "fault",
    [Fault(kind="hang", seconds=600, endpoint="history"), Fault(kind="slow_drip", seconds=0.5, endpoint="history")],
    ids=lambda fault: str(fault.kind),
)
async def test_a_search_is_cut_after_both_timeouts_together(fault: Fault) -> None:
    """Each byte of the slow response arrives within the read timeout, so that it would be complete in the end."""
    with onenet(fault) as simulator, onenet_client(simulator.url, 1, 1) as client:
        began = time.monotonic()
        with pytest.raises(HistoryUnreadable):
            await client.find_candidates(command(), current_doubt(), none_owned)
        assert time.monotonic() - began < PATIENCE_S


@pytest.mark.parametrize("kind", ["error_500", "garbage", "errno", "drop", "no_uuid", "not_found"])
async def test_one_failure_of_any_kind_is_retried(kind: Any) -> None:
    wanted = command()
    with onenet(Fault(kind=kind, endpoint="history", count=1)) as simulator:
        uuid = cache(simulator, wanted, "on")
        assert [entry.uuid for entry in await find_candidates(simulator, wanted)] == [uuid]


async def test_a_history_page_is_tried_three_times() -> None:
    with onenet(Fault(kind="error_500", endpoint="history")) as simulator:
        faults: list[None] = []
        simulator.on_fault = lambda: faults.append(None)
        with pytest.raises(HistoryUnreadable, match="HTTP 500"):
            await find_candidates(simulator, command())
        assert len(faults) == 3


@pytest.mark.parametrize(
    ("since_s", "cached_s", "is_within_clock_skew"),
    [
        (None, -3600, [True]), (None, -HISTORY_WINDOW_S, [True]), (None, -HISTORY_WINDOW_S - 7200, []),
        (None, CACHING_DELAY_S + 4, [True]), (None, CACHING_DELAY_S + 20, [False]), (None, CACHING_DELAY_S + 90, []),
        (-10, -10, [True]), (-10, -30, [False]), (-10, -100, []),
    ],
)  # fmt: skip
async def test_an_entry_cached_outside_the_doubt_window_is_not_the_command(
    since_s: float | None, cached_s: float, is_within_clock_skew: list[bool]
) -> None:
    """The window ends when the platform can no longer cache the request."""
    # No entry has zero seconds: its time might be a truncated one, and would be unclear.
    wanted, until = command(), in_seconds(0).replace(second=45)
    with onenet() as simulator:
        clock = simulator.platform.now
        simulator.platform.now = lambda: (until + timedelta(seconds=cached_s)).astimezone(CHINA)
        cache(simulator, wanted, "on")
        simulator.platform.now = clock
        since = None if since_s is None else until + timedelta(seconds=since_s)
        entries = await find_candidates(simulator, wanted, DoubtWindow(since, until))
    assert [entry.is_within_clock_skew for entry in entries] == is_within_clock_skew


def _history_server(
    wanted: Command, cached_at: datetime, headers: str, uuid: str = "u", asked: list[bytes] | None = None
) -> Callable[[socket.socket], None]:
    """Return a server of a history with one entry, which sends these headers."""
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
        (0, CACHING_DELAY_S + 20, False),
        (20, CACHING_DELAY_S + 20, True),
        (-20, CACHING_DELAY_S + 20, False),
        (0, -21, False),
        (-20, -21, True),
        ("", CACHING_DELAY_S + 20, False),
        ("", 0, True),
        ("Date: today\r\n", 0, True),
    ],
)
async def test_the_offset_of_the_platforms_clock_shifts_the_doubt_window(
    clock: str | float, cached_s: float, is_within_clock_skew: bool
) -> None:
    headers = clock if isinstance(clock, str) else _date(clock)
    wanted = command()
    with raw_server(_history_server(wanted, in_seconds(cached_s), headers)) as url, onenet_client(url) as client:
        [entry] = await client.find_candidates(wanted, DoubtWindow(in_seconds(-1), in_seconds(0)), none_owned)
    assert entry.is_within_clock_skew == is_within_clock_skew


async def test_a_platform_clock_that_is_an_hour_behind_makes_the_history_unreadable() -> None:
    """The range that was read might begin after the command was cached."""
    wanted = command()
    server = _history_server(wanted, in_seconds(0), _date(-1.1 * 3600))
    with raw_server(server) as url, onenet_client(url) as client, pytest.raises(HistoryUnreadable, match="clock"):
        await client.find_candidates(wanted, DoubtWindow(in_seconds(-1), in_seconds(0)), none_owned)


@pytest.mark.parametrize(("offset_s", "later_offset_s"), [(7200, 0), (-7200, 0), (0, 7200), (-3600, 3600)])
async def test_a_command_is_found_although_the_platforms_clock_was_set_after_it(
    offset_s: float, later_offset_s: float
) -> None:
    with onenet() as simulator, onenet_client(simulator.url) as client:
        for each in (offset_s, later_offset_s):
            simulator.platform.clock_offset_s = each
            for _ in range(5):
                await client.execute(command(imei="865820030000002"), NEVER)
            if each == offset_s:
                sent = await client.execute(command(), NEVER)
        found = await client.find_candidates(command(), DoubtWindow(in_seconds(-10), in_seconds(0)), none_owned)
    assert isinstance(sent.answer, Cached)
    assert [each.uuid for each in found] == [sent.answer.uuid]


async def test_a_uuid_with_url_characters_is_quoted_in_the_path() -> None:
    wanted = command()
    asked: list[bytes] = []
    server = _history_server(wanted, in_seconds(0), "", uuid="../a?b=c&d#e", asked=asked)
    with raw_server(server) as url, onenet_client(url) as client:
        [entry] = await client.find_candidates(wanted, DoubtWindow(in_seconds(-1), in_seconds(0)), none_owned)
    assert entry.uuid == "../a?b=c&d#e"
    assert asked[1] == b"/nbiot/offline/history/..%2Fa%3Fb%3Dc%26d%23e?imei=865820030000001"


async def test_an_open_doubt_window_is_searched_from_the_history_window_before_its_end() -> None:
    """Not from before now: a replayed dead letter may have failed weeks ago."""
    wanted = command()
    asked: list[bytes] = []
    ended = in_seconds(-20 * 86_400)
    server = _history_server(wanted, ended, "", asked=asked)
    with raw_server(server) as url, onenet_client(url) as client:
        [_] = await client.find_candidates(wanted, DoubtWindow(None, ended), none_owned)
    start = platform_time(ended - timedelta(days=1, hours=1), CHINA)
    assert f"start={start.replace(':', '%3A')}".encode() in asked[0]


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
async def test_an_unreadable_history_carries_the_kind_of_failure(status: int, body: Any, is_kind: str) -> None:
    sent = body if isinstance(body, bytes) else json.dumps(body).encode()

    def serve(sock: socket.socket) -> None:
        while sock.recv(65536):
            sock.sendall(b"HTTP/1.1 %d \r\nContent-Length: %d\r\n\r\n%b" % (status, len(sent), sent))

    with raw_server(serve) as url, onenet_client(url) as client, pytest.raises(HistoryUnreadable) as found:
        await client.find_candidates(command(), current_doubt(), none_owned)
    kinds = {"refused": found.value.is_refused, "throttled": found.value.is_throttled, "outage": found.value.is_outage}
    assert [kind for kind, is_so in kinds.items() if is_so] == ([] if is_kind == "neither" else [is_kind])


async def test_a_throttled_read_of_the_history_is_not_repeated() -> None:
    """Repeating it would make the overload worse."""
    fault = Fault(kind="errno", errno=15, error="api freq out of limit", endpoint="history")
    faults: list[None] = []
    with onenet(fault) as simulator:
        simulator.on_fault = lambda: faults.append(None)
        with pytest.raises(HistoryUnreadable):
            await find_candidates(simulator, command())
    assert len(faults) == 1


@pytest.mark.parametrize("status", [413, 429, 503])
async def test_the_wait_that_a_refused_read_asks_for_is_kept(status: int) -> None:
    requests: list[bytes] = []

    def serve(sock: socket.socket) -> None:
        requests.append(sock.recv(65536))
        sock.sendall(b"HTTP/1.1 %d \r\nRetry-After: 7\r\nContent-Length: 0\r\n\r\n" % status)

    with raw_server(serve) as url, onenet_client(url) as client, pytest.raises(HistoryUnreadable) as found:
        await client.find_candidates(command(), current_doubt(), none_owned)
    assert (found.value.retry_after_s == 7.0) == (status == 429)
    assert found.value.is_throttled == (status == 429)
    assert (len(requests) == 1) == (status == 429)


async def test_a_page_with_many_more_entries_than_asked_for_is_unreadable() -> None:
    """Each of them would hold up the event loop."""
    body = b'{"errno": 0, "data": {"total_count": 1, "items": [%b]}}' % b",".join([b"{}"] * 1001)

    def serve(sock: socket.socket) -> None:
        sock.recv(65536)
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))

    with raw_server(serve) as url, onenet_client(url) as client, pytest.raises(HistoryUnreadable):
        await client.find_candidates(command(), current_doubt(), none_owned)


async def test_each_try_of_a_read_whose_connection_is_lost_takes_one_request_of_the_limit() -> None:
    taken: list[str | None] = []
    requests: list[bytes] = []

    async def acquire(product: str | None) -> None:
        taken.append(product)

    def serve(sock: socket.socket) -> None:
        requests.append(sock.recv(65536))

    with raw_server(serve) as url, onenet_client(url, acquire=acquire) as client, pytest.raises(HistoryUnreadable):
        await client.find_candidates(command(), current_doubt(), none_owned)
    assert len(taken) == len(requests) == 3


async def test_each_read_of_a_page_or_a_detail_takes_one_request_of_the_products_limit(
    details: list[str], lists: list[str]
) -> None:
    taken: list[str | None] = []

    async def acquire(product: str | None) -> None:
        taken.append(product)

    wanted = command()
    with onenet() as simulator, onenet_client(simulator.url, read_s=20, acquire=acquire) as client:
        for number in range(3):
            cache(simulator, wanted, f"another {number}")
        cache(simulator, wanted, "on")
        assert len(await client.find_candidates(wanted, current_doubt(), none_owned)) == 1
    assert taken == [None] * (len(lists) + len(details))
    assert len(lists) == 1
    assert len(details) == 4


async def test_a_repeated_read_takes_another_request_of_the_limit() -> None:
    taken: list[str | None] = []

    async def acquire(product: str | None) -> None:
        taken.append(product)

    with (
        onenet(Fault(kind="error_500", endpoint="history", count=1)) as simulator,
        onenet_client(simulator.url, acquire=acquire) as client,
    ):
        assert await client.find_candidates(command(), current_doubt(), none_owned) == []
    assert len(taken) == 2


async def test_a_wait_for_the_rate_limit_does_not_count_against_the_deadline() -> None:
    """Else a slow limit would make every history unreadable, for ever."""

    async def acquire(_product: str | None) -> None:
        await asyncio.sleep(0.3)  # longer than the deadline of the search, which is 0.2 s

    search = SearchTime(0.2, partial(acquire, None), 60)
    before = search.deadline
    await search.acquire()
    assert search.deadline >= before + 0.3


async def test_a_rate_limit_that_allows_no_read_soon_makes_the_history_unreadable_for_now() -> None:
    async def acquire(_product: str | None) -> None:
        await asyncio.Event().wait()

    with onenet() as simulator, onenet_client(simulator.url, acquire=acquire) as client:
        with pytest.raises(HistoryUnreadable, match="rate limit") as found:
            await client.find_candidates(command(), current_doubt(), none_owned)
        assert list(simulator.requests) == []
    assert found.value.is_rate_limited
    assert not any((found.value.is_throttled, found.value.is_outage, found.value.is_refused))
