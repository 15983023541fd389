"""The OneNET client on real sockets: the lease, valid_time, and check."""

import asyncio
import json
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from pydantic import SecretStr

from tests.support.builders import in_hours
from tests.support.onenet_client import (
    CHINA,
    NEVER,
    NEVER_S,
    cache,
    command,
    current_doubt,
    none_owned,
    onenet_client,
    read_request,
)
from tests.support.proxies import raw_server
from tests.support.simulator import ACCESS_KEY, API_KEY, PRODUCT_ID, onenet
from worker.core.answer import Cached, InDoubt, NotSent, Refused
from worker.core.credentials import AccessKey, ApiKey, Generation, Product
from worker.core.times import platform_time
from worker.errors import HistoryUnreadable, PlatformUnusable
from worker.simulator.devices import CANCELLED, EXPIRED


def _never_answer(sock: socket.socket) -> None:
    read_request(sock)
    sock.recv(1)  # returns when the client closes the connection


async def test_nothing_is_sent_after_the_lease_has_ended() -> None:
    with onenet() as simulator, onenet_client(simulator.url) as client:
        assert isinstance((await client.execute(command(), time.monotonic() - 1)).answer, NotSent)
        assert not simulator.requests


async def test_nothing_is_sent_over_a_reused_connection_after_the_lease_has_ended() -> None:
    with onenet() as simulator, onenet_client(simulator.url) as client:
        assert isinstance((await client.execute(command(), NEVER)).answer, Cached)
        assert isinstance((await client.execute(command(), time.monotonic() - 1)).answer, NotSent)


async def test_a_request_is_cut_when_the_lease_ends() -> None:
    """On a slow machine a short lease ends before anything is sent, so it is tried with longer ones."""
    with raw_server(_never_answer) as url, onenet_client(url, connect_s=NEVER_S, read_s=NEVER_S) as client:
        for lease_s in (0.3, 3, 30):
            answer = (await client.execute(command(), time.monotonic() + lease_s)).answer
            if not isinstance(answer, NotSent):
                break
        assert isinstance(answer, InDoubt)


@pytest.mark.parametrize(("hours", "is_omitted"), [(-1, True), (1, False)])
async def test_a_valid_time_in_the_past_is_omitted_and_reported(hours: float, is_omitted: bool) -> None:
    """The platform refuses a valid_time in the past; without one it takes the current time."""
    with onenet() as simulator, onenet_client(simulator.url) as client:
        sent = await client.execute(command(valid_time=in_hours(hours)), NEVER)
        assert isinstance(sent.answer, Cached)
        assert sent.valid_time_omitted == is_omitted
        assert ("valid_time" in simulator.requests[0]["query"]) != is_omitted


NO_DEVICE = "000000000000000"
NO_DATE = "; the platform does not tell its time"


async def test_check_reads_a_history_and_caches_nothing() -> None:
    with onenet() as simulator, onenet_client(simulator.url) as client:
        assert await client.check(None, NO_DEVICE) == "credentials accepted (v1)"
        assert simulator.platform.commands == []


@pytest.mark.parametrize(
    ("response", "words"),
    [
        (b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n", "refuses the credentials"),
        (b'HTTP/1.1 200 OK\r\nContent-Length: 12\r\n\r\n{"errno": 1}', "refuses the credentials"),
        (b'HTTP/1.1 200 OK\r\nContent-Length: 12\r\n\r\n{"errno": 7}', "is down"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", "not as OneNET does"),
        (b"HTTP/1.1 302 Found\r\nLocation: /\r\nContent-Length: 0\r\n\r\n", "not as OneNET does"),
        (b"", "cannot be reached"),
    ],
)
async def test_check_names_the_fault_of_the_platform(response: bytes, words: str) -> None:
    def serve(sock: socket.socket) -> None:
        sock.recv(65536)
        sock.sendall(response)

    with raw_server(serve) as url, onenet_client(url) as client, pytest.raises(PlatformUnusable, match=words):
        await client.check(None, NO_DEVICE)


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
async def test_check_succeeds_only_for_errno_0(errno: int, error: str, words: list[str], status: str) -> None:
    """Every other errno fails, in one line with the kind of error and the platform's own text."""
    body = json.dumps({"errno": errno, "error": error}).encode()

    def serve(sock: socket.socket) -> None:
        sock.recv(65536)
        sock.sendall(b"HTTP/1.1 %b\r\nContent-Length: %d\r\n\r\n%b" % (status.encode(), len(body), body))

    with raw_server(serve) as url, onenet_client(url) as client, pytest.raises(PlatformUnusable) as found:
        await client.check(None, NO_DEVICE)
    for word in [*words, f"errno {errno}", " ".join(error.split())]:
        assert word in str(found.value)
    assert len(str(found.value).splitlines()) == 1


def _swallow(sock: socket.socket) -> None:
    while sock.recv(65536):
        pass


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_check_of_a_platform_that_never_answers_times_out(scheme: str) -> None:
    swallowing = raw_server(_swallow)
    with (
        swallowing as url,
        onenet_client(url.replace("http", scheme), 0.2, 0.2) as client,
        pytest.raises(PlatformUnusable),
    ):
        await client.check(None, NO_DEVICE)


def _response(body: dict[str, object]) -> bytes:
    content = json.dumps(body).encode()
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(content), content)


@contextmanager
def _platform(*bodies: dict[str, object]) -> Iterator[tuple[str, list[bytes]]]:
    """Serve these answers, one for each connection; yields the URL and the requests."""
    requests: list[bytes] = []
    answers = iter(bodies)

    def serve(sock: socket.socket) -> None:
        requests.append(read_request(sock))
        sock.sendall(_response(next(answers)))

    with raw_server(serve) as url:
        yield url, requests


V1_SUCCESS: dict[str, object] = {"errno": 0, "error": "succ", "data": {"uuid": "u"}}
V2_SUCCESS: dict[str, object] = {"code": 0, "msg": "succ", "data": {"uuid": "u"}, "request_id": "r"}
NO_HISTORY = {"total_count": 0}


@pytest.mark.parametrize(
    ("api", "success", "path", "header", "body"),
    [
        ("v1", V1_SUCCESS, b"/nbiot/execute/offline?", b"api-key: ", {"args": "on"}),
        ("v1", V1_SUCCESS, b"/nbiot/execute/offline?", b"api-key: ", {}),
        ("v2", V2_SUCCESS, b"/nb-iot/execute/offline?", b"Authorization: version=2022-05-01&res=products%2F123123&",
         {"args": "on"}),
        ("v2", V2_SUCCESS, b"/nb-iot/execute/offline?", b"Authorization: version=2022-05-01&res=products%2F123123&",
         {}),
    ],
)  # fmt: skip
async def test_a_command_is_sent_as_the_generation_of_the_platform_wants_it(
    api: Generation, success: dict[str, object], path: bytes, header: bytes, body: dict[str, str]
) -> None:
    """The body is always JSON: one table of the platform has an error for a missing body."""
    args = body.get("args")
    wanted = replace(command(imei="0042"), args=args)
    with _platform(success) as (url, requests), onenet_client(url, api=api) as client:
        assert (await client.execute(wanted, NEVER)).answer == Cached("u")
    [request] = requests
    head, _, content = request.partition(b"\r\n\r\n")
    assert head.startswith(b"POST " + path + b"imei=0042&")
    assert b"\r\nContent-Type: application/json\r\n" in head
    assert b"\r\n" + header in head
    assert json.loads(content) == body


async def test_a_history_of_v2_is_read_at_its_paths() -> None:
    """The look for a command in doubt, its detail included."""
    wanted = command()
    shown = platform_time(datetime.now(UTC), CHINA).replace("T", " ")
    item = {"cmd_uuid": "u", "type": "EXECUTE", "create_time": shown}
    query = {
        "imei": wanted.imei,
        "obj_id": wanted.obj_id,
        "obj_inst_id": wanted.obj_inst_id,
        "res_id": wanted.res_id,
        "expired_time": platform_time(wanted.expires_at, CHINA),
    }
    answers: list[dict[str, object]] = [
        {"code": 0, "msg": "succ", "data": {"total_count": 1, "items": [item]}, "request_id": "r"},
        {"code": 0, "msg": "succ", "data": {"args": query, "content": {"args": "on"}}, "request_id": "r"},
    ]
    with _platform(*answers) as (url, requests), onenet_client(url, api="v2") as client:
        [found] = await client.find_candidates(wanted, current_doubt(), none_owned)
    assert found.uuid == "u"
    paths = [request.split()[1].partition(b"?")[0] for request in requests]
    assert paths == [b"/nb-iot/offline/history", b"/nb-iot/offline/history/u"]


@pytest.mark.parametrize("api", ["v1", "v2"])
async def test_check_says_which_generation_answered(api: Generation) -> None:
    answers = {
        "v1": {"errno": 0, "error": "succ", "data": NO_HISTORY},
        "v2": {"code": 0, "msg": "succ", "data": NO_HISTORY, "request_id": "r"},
    }
    with _platform(answers[api]) as (url, _), onenet_client(url, api=api) as client:
        assert await client.check(None, NO_DEVICE) == f"credentials accepted ({api}){NO_DATE}"
    other: Generation = "v2" if api == "v1" else "v1"
    with (
        _platform(answers[api]) as (url, _),
        onenet_client(url, api=other) as client,
        pytest.raises(PlatformUnusable, match=f"^ONENET_API: the platform answers as {api}, but {other} is configured"),
    ):
        await client.check(None, NO_DEVICE)


async def test_check_says_what_came_without_the_key() -> None:
    def serve(sock: socket.socket) -> None:
        request = read_request(sock)
        body = b"<html>you sent " + request.lower().partition(b"api-key: ")[2].partition(b"\r\n")[0]
        body += b"\r\n" + API_KEY.encode()
        sock.sendall(b"HTTP/1.1 403 No\r\nContent-Type: text/html\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))

    with raw_server(serve) as url, onenet_client(url) as client, pytest.raises(PlatformUnusable) as found:
        await client.check(None, NO_DEVICE)
    assert str(found.value) == "refuses the credentials: HTTP 403, text/html: ***"


async def test_each_product_is_sent_to_its_own_platform() -> None:
    """Also after the products were read again."""
    with _platform(V1_SUCCESS, V1_SUCCESS) as (first, at_first), _platform(V2_SUCCESS) as (second, at_second):
        key = AccessKey(product_id=PRODUCT_ID, access_key=SecretStr(ACCESS_KEY))
        with onenet_client(first) as client:
            default = Product(first, "v1", ApiKey(api_key=SecretStr(API_KEY)))
            assert client.replace_products({None: default, "other": Product(second, "v2", key)}) == {"other"}
            assert isinstance((await client.execute(command(product="other"), NEVER)).answer, Cached)
            moved = Product(first, "v1", key)
            assert client.replace_products({None: default, "other": moved}) == {"other"}
            await client.execute(command(product="other"), NEVER)
    assert at_second[0].startswith(b"POST /nb-iot/")
    assert at_first[0].startswith(b"POST /nbiot/")


@pytest.mark.parametrize(
    ("offset_s", "note"),
    [
        (8 * 3600, r"; the platform's clock is 28,(7[4-9]|80)\d s ahead of this machine's: commands expire by it$"),
        (-600, r"; the platform's clock is (5[4-9]\d|600) s behind this machine's: commands expire by it$"),
        (0, r"credentials accepted \(v1\)$"),
    ],
)
async def test_check_tells_how_far_the_platforms_clock_is_away(offset_s: float, note: str) -> None:
    """At least: it cannot tell an offset from the duration of the request."""
    with onenet() as simulator, onenet_client(simulator.url) as client:
        simulator.platform.clock_offset_s = offset_s
        assert re.search(note, await client.check(None, NO_DEVICE))


async def test_whether_valid_time_has_passed_is_decided_on_the_platforms_clock() -> None:
    """The platform refuses a valid_time that has passed for it, and takes one that has passed for us only."""
    with onenet() as simulator, onenet_client(simulator.url) as client:
        simulator.platform.clock_offset_s = 4 * 3600
        first = await client.execute(command(), NEVER)
        assert isinstance(first.answer, Cached)
        ahead = await client.execute(command(command_id="b", valid_time=in_hours(2)), NEVER)
        assert (type(ahead.answer), ahead.valid_time_omitted) == (Cached, True)
    with onenet() as simulator, onenet_client(simulator.url) as client:
        simulator.platform.clock_offset_s = -4 * 3600
        await client.execute(command(), NEVER)
        behind = await client.execute(command(command_id="b", valid_time=in_hours(-2)), NEVER)
        assert (type(behind.answer), behind.valid_time_omitted) == (Cached, False)


@pytest.mark.parametrize(("clock_s", "times"), [(-7200, {"expired_time": -1}), (7200, {"valid_time": 1})])
async def test_commands_that_come_at_once_wait_for_the_platforms_first_time(
    clock_s: float, times: dict[str, float]
) -> None:
    """They are decided on its clock, though the first of them has it asked for and the others do not."""
    with onenet() as simulator, onenet_client(simulator.url) as client:
        simulator.platform.clock_offset_s = clock_s
        hours = {name: in_hours(value) for name, value in times.items()}
        wanted = [command(command_id=str(number), **hours) for number in range(20)]
        decided = await asyncio.gather(*map(client.time_for, wanted))
    assert {abs((now - datetime.now(UTC)).total_seconds() - clock_s) < 60 for now in decided} == {True}


async def test_no_command_expires_by_one_odd_date() -> None:
    """A second answer tells that it was odd."""
    with onenet() as simulator, onenet_client(simulator.url) as client:
        simulator.platform.clock_offset_s = 365 * 86_400
        await client.execute(command(), NEVER)
        assert abs(client.now(None) - datetime.now(UTC)) < timedelta(seconds=60)
        simulator.platform.clock_offset_s = 0
        assert abs(await client.time_for(command()) - datetime.now(UTC)) < timedelta(seconds=60)


@pytest.mark.parametrize("status", [200, 500])
async def test_an_answer_that_refuses_a_history_tells_the_platforms_time(status: int) -> None:
    date = format_datetime(datetime.now(UTC) - timedelta(hours=2), usegmt=True).encode()
    body = b'{"errno": 10, "error": "device not online"}'

    def serve(sock: socket.socket) -> None:
        sock.recv(65536)
        head = b"HTTP/1.1 %d \r\nContent-Type: application/json\r\nDate: %b" % (status, date)
        sock.sendall(head + b"\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))

    with raw_server(serve) as url, onenet_client(url) as client:
        now = await client.time_for(command(expired_time=in_hours(-1)))
    assert abs((now - datetime.now(UTC)).total_seconds() + 7200) < 60


async def test_a_valid_time_that_passes_on_the_way_is_left_out_of_another_request() -> None:
    """The platform refuses it, so it has not cached the command."""
    with onenet() as simulator, onenet_client(simulator.url) as client:
        simulator.platform.now = lambda: datetime.now(CHINA) + timedelta(seconds=1)
        soon = (datetime.now(CHINA) + timedelta(seconds=1)).replace(microsecond=0)
        sent = await client.execute(command(valid_time=soon.isoformat()), NEVER)
    assert (type(sent.answer), sent.valid_time_omitted) == (Cached, True)


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (404, b"<html>not found</html>"),
        (500, b'{"code": 500, "msg": "internal error", "request_id": "r"}'),
        (200, b'{"errno": 2, "error": "auth failed"}'),
    ],
)
async def test_a_refusal_of_something_else_than_valid_time_is_followed_by_no_other_request(
    status: int, body: bytes
) -> None:
    asked = []

    def serve(sock: socket.socket) -> None:
        asked.append(read_request(sock))
        sock.sendall(b"HTTP/1.1 %d \r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body))

    with raw_server(serve) as url, onenet_client(url) as client:
        soon = datetime.now(CHINA).replace(microsecond=0) + timedelta(seconds=1)
        sent = await client.execute(command(valid_time=soon.isoformat()), NEVER)
    assert isinstance(sent.answer, Refused)
    assert len(asked) == 1


@pytest.mark.parametrize("offset_s", [-5 * 3600, 5 * 3600])
async def test_the_history_of_a_platform_with_another_clock_is_found(offset_s: float) -> None:
    """Where it starts is said in the platform's time."""
    with onenet() as simulator, onenet_client(simulator.url) as client:
        simulator.platform.clock_offset_s = offset_s
        sent = await client.execute(command(), NEVER)
        assert isinstance(sent.answer, Cached)
        [found] = await client.find_candidates(command(), current_doubt(), none_owned)
        assert found.uuid == sent.answer.uuid


async def test_a_clock_that_is_first_seen_in_a_history_is_known_to_the_next_read() -> None:
    with onenet() as simulator, onenet_client(simulator.url) as client:
        simulator.platform.clock_offset_s = -5 * 3600
        with pytest.raises(HistoryUnreadable, match="the platform's clock is"):
            await client.find_candidates(command(), current_doubt(), none_owned)
        assert await client.find_candidates(command(), current_doubt(), none_owned) == []


@pytest.mark.parametrize(("cached", "counted"), [(0, 0), (3, 3), (10, 10), (12, 10)])
async def test_the_waiting_commands_of_a_device_are_counted_up_to_a_bound(cached: int, counted: int) -> None:
    with onenet() as simulator, onenet_client(simulator.url) as client:
        for number in range(cached):
            cache(simulator, command(), f"args-{number}")
        cache(simulator, command(imei="865820030000999"), "of another device")
        assert await client.count_waiting(command(), 10) == counted


async def test_waiting_commands_are_found_behind_many_that_are_over() -> None:
    with onenet() as simulator, onenet_client(simulator.url) as client:
        cache(simulator, command(), "waits")
        for number in range(250):
            cache(simulator, command(), f"over-{number}")
            simulator.platform.commands[-1].send_status = (CANCELLED, EXPIRED)[number % 2]
        assert await client.count_waiting(command(), 10) == 1


async def test_a_foreign_outage_is_a_doubt_once_the_configured_generation_has_accepted_a_command() -> None:
    """Before that it is the error that the setting is wrong."""
    accepted = b'{"errno": 0, "error": "succ", "data": {"uuid": "u"}}'
    outage = b'{"code": 500, "msg": "internal error", "request_id": "r"}'
    bodies = [outage, accepted, outage]

    def serve(sock: socket.socket) -> None:
        while bodies and read_request(sock):
            body = bodies.pop(0)
            sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))

    with raw_server(serve) as url, onenet_client(url) as client:
        answers = [(await client.execute(command(command_id=str(number)), NEVER)).answer for number in range(3)]
    assert [type(answer) for answer in answers] == [Refused, Cached, InDoubt]
    assert all("ONENET_API" in str(answer) for answer in (answers[0], answers[2]))
