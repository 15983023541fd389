"""A platform, or who stands in its place, that answers without end: it costs its own command, in bounded memory."""

import asyncio
import gc
import itertools
import json
import socket
import tracemalloc
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from schemas.onenet import HistoryDetail, HistoryItem
from tests.support.memory import retained_by
from tests.support.onenet_client import (
    NEVER,
    accepting_response,
    command,
    current_doubt,
    execute_once,
    none_owned,
    onenet_client,
    read_request,
    server_tls_context,
)
from tests.support.proxies import raw_server
from worker.core.answer import Cached, InDoubt
from worker.errors import HistoryUnreadable
from worker.onenet.history import MAX_PAGES, PER_PAGE, match
from worker.onenet.history_memory import MAX_BODY_BYTES, DetailCache, EntryMemory
from worker.onenet.response import Response
from worker.onenet.tls import BufferedReader
from worker.onenet.transport import MAX_RESPONSE_BYTES

MIB = 1024 * 1024
HELD_BYTES = 16 * MIB  # by all histories together
Serve = Callable[[socket.socket], None]


def answering(*bodies: bytes, head: bytes = b"") -> Serve:
    """Return a server that gives these answers in turn, the last of them again and again."""
    numbers = itertools.count()

    def serve(sock: socket.socket) -> None:
        read_request(sock)
        body = bodies[min(next(numbers), len(bodies) - 1)]
        sock.sendall(b"HTTP/1.1 200 OK\r\n%bContent-Length: %d\r\n\r\n" % (head, len(body)))
        sock.sendall(body)  # and no copy of it

    return serve


def ok(data: object) -> bytes:
    return json.dumps({"errno": 0, "error": "succ", "data": data}).encode()


@pytest.mark.parametrize("uuid", ["u", "u" * 64, "!~", "u ", " u\r\n\t"])
async def test_a_uuid_of_visible_characters_is_taken_without_the_blanks_around_it(uuid: str) -> None:
    with raw_server(answering(ok({"uuid": uuid}))) as url:
        assert await execute_once(url) == Cached(uuid.strip())


@pytest.mark.parametrize(
    "uuid", ["u" * 65, "u" * 60_000, "u v", "u\nv", "u\x7f", "\u5f00", "u\u3000", "\x1bu", "", " ", 5, ["u"], {"u": 1}]
)
async def test_an_answer_with_any_other_uuid_leaves_the_command_in_doubt(uuid: object) -> None:
    with raw_server(answering(ok({"uuid": uuid}))) as url:
        found = await execute_once(url)
    assert isinstance(found, InDoubt)
    assert len(found.reason) < 300


@pytest.mark.parametrize(
    "body",
    [
        b'{"errno":3,"error":"%s","data":null}' % (b"x" * 50_000),
        b'{"errno":%s,"error":"x","data":null}' % (b"9" * 4_000),
        b'{"errno":-%s,"error":"x","data":null}' % (b"9" * 60_000),
        b'{"errno":0,"error":"%s","data":{"uuid":"%s"}}' % (b"x" * 30_000, b"u" * 30_000),
        b'{"errno":7,"error":"%s","data":[%s]}' % (b"internal " * 3_000, b"[]," * 10_000 + b"[]"),
        b"<html>" + b"x" * 60_000,
        b"x" * MIB,
    ],
    ids=["text", "number", "longer number", "uuid", "outage", "page", "too long"],
)
async def test_what_is_kept_of_an_enormous_answer_is_short(body: bytes) -> None:
    with raw_server(answering(body)) as url:
        assert len(repr(await execute_once(url))) < 1_000


@pytest.mark.parametrize("line", [b"X: %b\r\n" % (b"x" * 1_000), b"X: x\r\n"], ids=["long", "many"])
async def test_an_answer_with_a_flood_of_headers_leaves_the_command_in_doubt(line: bytes) -> None:
    head = b"HTTP/1.1 200 OK\r\n" + line * 5_000

    def serve(sock: socket.socket) -> None:
        read_request(sock)
        sock.sendall(accepting_response().replace(b"HTTP/1.1 200 OK\r\n", head))

    with raw_server(serve) as url, onenet_client(url, connect_s=30, read_s=30) as client:
        assert isinstance((await client.execute(command(), NEVER)).answer, InDoubt)
        with pytest.raises(HistoryUnreadable):
            await client.find_candidates(command(), current_doubt(), none_owned)


def entry(number: int, **fields: Any) -> dict[str, Any]:
    """Return an entry that the list does not tell from any command, as its fields are of unknown forms."""
    return {"cmd_uuid": f"{number:064}", "type": "?", "create_time": "?", **fields}


def endless(of_page: Callable[[int], object]) -> Serve:
    """Return a server of a history without an end; ``of_page`` returns the data of one page."""
    numbers = itertools.count()

    def serve(sock: socket.socket) -> None:
        read_request(sock)
        body = ok(of_page(next(numbers)))
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))

    return serve


def page_of(number: int, size: int, **fields: Any) -> dict[str, Any]:
    items = [entry(number * size + place, **fields) for place in range(size)]
    return {"total_count": 10**9, "items": items}


HISTORIES: dict[str, Serve] = {
    "pages": endless(lambda number: page_of(number, PER_PAGE)),
    "long fields": endless(lambda number: page_of(number, PER_PAGE, expired_time="x" * 2_000, valid_time="y" * 100)),
    "entries without a uuid": endless(
        lambda number: {"total_count": 10**9, "items": [{"cmd_uuid": "u v", "type": f"{number}"}] * PER_PAGE}
    ),
    "pages of a thousand": endless(lambda number: page_of(number, 1_000)),
    "pages of many": endless(lambda number: {"total_count": 10**9, "items": [{}] * 50_000}),
    "the same page": endless(lambda _: page_of(0, PER_PAGE)),
    "uuids too long": endless(lambda number: {"total_count": 1, "items": [{"cmd_uuid": str(number) * 900_000}]}),
    "a page too long": endless(lambda _: {"total_count": 1, "items": [{"cmd_uuid": "u", "more": "x" * MIB}]}),
    "nothing but brackets": endless(lambda _: {"total_count": 0, "items": [], "more": [[]] * 60_000}),
    "a total that is too large": endless(lambda _: {"total_count": 10**4_000, "items": []}),
}


@pytest.mark.parametrize("serve", HISTORIES.values(), ids=HISTORIES)
async def test_histories_without_an_end_are_read_at_once_in_bounded_memory(serve: Serve) -> None:
    """None of them proves anything."""

    async def find() -> object:
        try:
            return await client.find_candidates(command(), current_doubt(), none_owned)
        except HistoryUnreadable as exc:
            return "unreadable" if len(str(exc)) < 400 else str(exc)

    with raw_server(serve) as url, onenet_client(url, connect_s=120, read_s=120) as client:
        tracemalloc.start()
        try:
            before, _ = tracemalloc.get_traced_memory()
            found = await asyncio.gather(*(find() for _ in range(2)))
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert found == ["unreadable"] * 2
    # The server is in this process too: its answers, and the JSON of one page while it is read.
    assert peak - before < HELD_BYTES + 16 * MIB


async def assert_read_up_to_a_bound(begin: bytes, more: bytes) -> None:
    """Read a history from a server that repeats ``more`` until the connection is closed."""
    most = 64 * MIB
    sent: list[int] = []

    def serve(sock: socket.socket) -> None:
        read_request(sock)
        sock.sendall(begin)
        sent.append(0)
        while sent[-1] < most:
            sock.sendall(more)
            sent[-1] += len(more)

    unreadable = pytest.raises(HistoryUnreadable)
    with raw_server(serve) as url, onenet_client(url, connect_s=60, read_s=60) as client, unreadable:
        await client.find_candidates(command(), current_doubt(), none_owned)
    assert sent
    assert max(sent) < most


@pytest.mark.parametrize("status", [b"200", b"302", b"307", b"404", b"500"])
async def test_a_body_without_an_end_is_read_up_to_its_bound_whatever_the_status(status: bytes) -> None:
    """That of a redirect too, which requests reads whole although it does not follow it."""
    await assert_read_up_to_a_bound(b"HTTP/1.1 %b X\r\nLocation: /\r\n\r\n" % status, b"x" * 65_536)


@pytest.mark.parametrize(
    "more",
    [b"0\r\n" + b"X: y\r\n" * 10_000, b"1;%b\r\nx\r\n" % (b"y" * 60_000)],
    ids=["trailers", "extensions of chunks"],
)
async def test_what_has_no_end_beside_the_body_is_read_up_to_a_bound_too(more: bytes) -> None:
    """The size of a body in chunks says nothing about that of its chunks' lines, nor of what follows it."""
    begin = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    await assert_read_up_to_a_bound(begin, more)


async def test_no_more_pages_are_asked_for_than_a_history_may_have() -> None:
    asked: list[int] = []

    def of_page(number: int) -> object:
        asked.append(number)
        return page_of(number, 1)

    too_many = pytest.raises(HistoryUnreadable, match="more than 100 pages")
    with raw_server(endless(of_page)) as url, onenet_client(url, connect_s=60, read_s=60) as client, too_many:
        await client.find_candidates(command(), current_doubt(), none_owned)
    assert len(asked) == MAX_PAGES


async def test_more_entries_that_may_be_the_command_than_ever_decide_anything_make_the_history_unreadable() -> None:
    page = {"total_count": 102, "items": [{"type": str(number)} for number in range(1_000, 1_102)]}
    serving = raw_server(answering(ok(page), ok({"total_count": 102, "items": []})))
    too_many = pytest.raises(HistoryUnreadable, match="more than 100 of its entries")
    with serving as url, onenet_client(url, connect_s=30, read_s=30) as client, too_many:
        await client.find_candidates(command(), current_doubt(), none_owned)


async def test_a_history_that_takes_long_to_compare_is_unreadable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands of other devices wait meanwhile: comparing takes place on the event loop."""
    monkeypatch.setattr("worker.onenet.device_histories._MAX_COMPARING_S", 0)
    page = {"total_count": 1, "items": [{"type": "1000"}]}
    too_long = pytest.raises(HistoryUnreadable, match="too long to compare")
    serving = raw_server(answering(ok(page), ok({"total_count": 1, "items": []})))
    with serving as url, onenet_client(url, connect_s=30, read_s=30) as client, too_long:
        await client.find_candidates(command(), current_doubt(), none_owned)


async def test_other_commands_go_on_between_the_entries_of_a_history(monkeypatch: pytest.MonkeyPatch) -> None:
    """The entries have no uuid, so that no detail is waited for between them."""
    page = {"total_count": 60, "items": [{"type": str(number)} for number in range(1_000, 1_060)]}
    turns = 0
    compared_at: list[int] = []

    async def take_turns() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    def noted(*args: Any, **named: Any) -> Any:
        compared_at.append(turns)
        return match(*args, **named)

    monkeypatch.setattr("worker.onenet.device_histories.match", noted)
    serving = raw_server(answering(ok(page), ok({"total_count": 60, "items": []})))
    with serving as url, onenet_client(url, connect_s=30, read_s=30) as client:
        other = asyncio.create_task(take_turns())
        await client.find_candidates(command(), current_doubt(), none_owned)
        other.cancel()
    assert len(set(compared_at)) == len(compared_at) == 60


async def test_details_of_any_size_are_compared_and_kept_in_bounded_memory() -> None:
    """A detail that is too long for a command's decides nothing: the entry may be the command."""
    content = {"args": "on", "more": "x" * 100_000}
    detail = {"args": {"imei": "1" * 50_000, "more": "x" * 50_000}, "content": content}
    answers = ok(page_of(0, 3) | {"total_count": 3}), ok(detail)
    with raw_server(answering(*answers)) as url, onenet_client(url, connect_s=30, read_s=30) as client:
        found = await client.find_candidates(command(), current_doubt(), none_owned)
    assert [(len(each.uuid), {"imei", "args"} <= set(each.unclear)) for each in found] == [(64, True)] * 3


async def most_held_between_turns(work: Awaitable[object]) -> int:
    """Do some work; returns the most bytes that were held at any turn of the event loop meanwhile.

    What is made and dropped within one turn does not count: there is one of it, however many commands there are. There
    is no collector of cycles, which may come late.
    """
    most = 0

    async def watch() -> None:
        nonlocal most
        while True:
            most = max(most, tracemalloc.get_traced_memory()[0] - before)
            await asyncio.sleep(0)

    gc.collect()
    gc.disable()
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    watching = asyncio.create_task(watch())
    try:
        await work
        await asyncio.sleep(0)
    finally:
        watching.cancel()
        tracemalloc.stop()
        gc.enable()
    return most


# As many values as an answer may have, in the form that takes the most memory: more than 1.5 MiB.
TABLES = json.loads("[" + ",".join(['{"":' * 60 + "0" + "}" * 60] * 150) + "]")


@pytest.mark.parametrize(
    "data",
    [
        {"total_count": "x", "items": [], "more": TABLES},
        {"total_count": 0, "items": [], "more": [TABLES]},
        {"total_count": 1, "items": [], "x": TABLES},
        TABLES,
    ],
    ids=["no total", "more entries", "too few entries", "list"],
)
async def test_of_a_page_that_is_none_only_the_bytes_are_held(data: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither while the next try waits, nor by the error, which says what was wrong while its outcome is recorded."""
    monkeypatch.setattr("worker.onenet.history_reader.backoff_s", lambda *_, **__: 0.0)
    errors: list[HistoryUnreadable] = []

    async def find() -> None:
        for _ in range(3):
            with pytest.raises(HistoryUnreadable) as caught:
                await client.find_candidates(command(), current_doubt(), none_owned)
            errors.append(caught.value)
            await asyncio.sleep(0)

    with raw_server(answering(ok(data))) as url, onenet_client(url, connect_s=120, read_s=120) as client:
        assert await most_held_between_turns(find()) < MIB


async def test_an_error_does_not_keep_a_body_that_is_too_long() -> None:
    errors: list[HistoryUnreadable] = []

    async def find() -> None:
        for _ in range(8):
            with pytest.raises(HistoryUnreadable) as caught:
                await client.find_candidates(command(), current_doubt(), none_owned)
            errors.append(caught.value)
            await asyncio.sleep(0)

    with (
        raw_server(answering(b"x" * (MAX_BODY_BYTES + 1))) as url,
        onenet_client(url, connect_s=120, read_s=120) as client,
    ):
        assert await most_held_between_turns(find()) < MIB


async def test_of_a_detail_only_its_bytes_are_held_while_the_next_one_is_read() -> None:
    """They are compared one after another, however many histories are read at once."""
    answers = ok(page_of(0, 4) | {"total_count": 4}), ok({"args": {}, "content": TABLES})
    found: list[object] = []

    async def find() -> None:
        found.extend(await client.find_candidates(command(), current_doubt(), none_owned))

    with raw_server(answering(*answers)) as url, onenet_client(url, connect_s=120, read_s=120) as client:
        assert await most_held_between_turns(find()) < MIB
    assert len(found) == 4


LONG = b"x" * 200_000
ENDINGS = {
    "refused": b"Content-Length: %d\r\n\r\n%b" % (len(LONG), LONG),
    "cut short": b"Content-Length: %d\r\n\r\n%b" % (len(LONG) + 1, LONG),
    "malformed": b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\nx\r\n" % (len(LONG), LONG),
    "until closed": b"\r\n" + LONG,
    "too long": b"Content-Length: %d\r\n\r\n%b" % (MAX_RESPONSE_BYTES, LONG + LONG),
}


def is_long_response(each: object) -> bool:
    return isinstance(each, Response) and len(each.body) >= len(LONG)


@pytest.mark.parametrize("is_secure", [False, True], ids=["plain", "TLS"])
@pytest.mark.parametrize("ending", ENDINGS.values(), ids=ENDINGS)
async def test_nothing_is_left_of_an_exchange_however_it_ends(ending: bytes, is_secure: bool, tmp_path: Path) -> None:
    """Not even until the collector of cycles comes."""
    context = server_tls_context(tmp_path, "127.0.0.1")
    response = b"HTTP/1.1 200 OK\r\n" + ending

    def serve(sock: socket.socket) -> None:
        with context.wrap_socket(sock, server_side=True) if is_secure else sock as stream:
            read_request(stream)
            stream.sendall(response)

    async def execute() -> None:
        for _ in range(8):
            assert isinstance((await client.execute(command(), NEVER)).answer, InDoubt)
        for _ in range(10):
            await asyncio.sleep(0)  # connections are closed at the next turns
        left.extend(each for each in gc.get_objects() if isinstance(each, BufferedReader) or is_long_response(each))

    left: list[object] = []
    with raw_server(serve) as plain_url:
        url = plain_url.replace("http:", "https:") if is_secure else plain_url
        with onenet_client(url, connect_s=30, read_s=30, ca_file=str(tmp_path / "ca.pem")) as client:
            assert await most_held_between_turns(execute()) < MIB
    assert left == []


async def test_a_connection_that_is_kept_holds_no_answer() -> None:
    numbers = itertools.count()

    def serve(sock: socket.socket) -> None:
        while read_request(sock):
            body = ok({"uuid": f"u{next(numbers)}", "more": "x" * 200_000})
            sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))

    with raw_server(serve) as url, onenet_client(url, connect_s=30, read_s=30) as client:
        gc.collect()
        gc.disable()
        try:
            for number in range(3):
                assert (await client.execute(command(), NEVER)).answer == Cached(f"u{number}")
                await asyncio.sleep(0)  # the event loop holds the result of what it ran until its next turn
                assert not any(map(is_long_response, gc.get_objects()))
        finally:
            gc.enable()


async def test_no_entry_of_a_page_is_held_while_the_next_one_is_read_to_count_those_that_wait() -> None:
    """Only their keys are counted."""
    held: list[int] = []

    def of_page(number: int) -> object:
        items = [each for each in gc.get_objects() if isinstance(each, HistoryItem)]
        held.append(sum(each.trigger_msg == "this test's" for each in items))
        return page_of(number, 500 if number < 3 else 0, trigger_msg="this test's") | {"total_count": 1_500}

    with raw_server(endless(of_page)) as url, onenet_client(url, connect_s=30, read_s=30) as client:
        gc.collect()
        await client.count_waiting(command(), 10_000)
    assert held == [0, 0, 0, 0]


def test_the_oldest_details_are_forgotten_before_they_take_more_than_their_share() -> None:
    cache = DetailCache()

    def fill() -> None:
        for number in range(2_000):
            cache.add("url", f"{number}", HistoryDetail(args={"retry": 3}, content={"args": f"{number}" * 1_000}))

    assert retained_by(fill) < 3 * MIB
    fill()
    assert cache.get("url", "0") is None
    newest = cache.get("url", "1999")
    assert newest is not None
    assert newest.content == {"args": "1999" * 1_000}


def test_details_that_two_searches_have_read_count_once() -> None:
    cache, detail = DetailCache(), HistoryDetail(args={}, content="x" * 10_000)
    for number in range(1_000):
        cache.add("url", f"{number // 2}", detail)
    assert cache.get("url", "499") == detail
    assert cache.get("url", "400") == detail  # a hundred of them have room


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3311.0, 10**39, "3311 ", True, None], ids=repr)
def test_details_are_kept_as_they_were_written(value: object) -> None:
    cache, detail = DetailCache(), HistoryDetail(args={"obj_id": value}, content=[value])
    cache.add("url", "u", detail)
    assert repr(cache.get("url", "u")) == repr(detail)


def test_a_short_history_is_read_however_much_the_long_ones_hold() -> None:
    memory = EntryMemory()
    with memory.of_one_search() as one, memory.of_one_search() as other, memory.of_one_search() as short:
        one.hold(3 * MIB)
        with pytest.raises(HistoryUnreadable) as caught:
            other.hold(3 * MIB)
        assert caught.value.is_rate_limited  # it is tried again, and no attempt is used
        short.hold(64 * 1024)
        with pytest.raises(HistoryUnreadable) as caught:
            one.hold(3 * MIB + 1)
        assert not caught.value.is_rate_limited
    with memory.of_one_search() as later:
        later.hold(3 * MIB)


async def test_commands_that_wait_are_counted_behind_tens_of_thousands_that_are_over() -> None:
    """Only the keys of the entries are kept: a device with a long history can have a full queue too."""
    size = 250
    total = (MAX_PAGES - 1) * size + 3

    def of_page(number: int) -> object:
        places = range(number * size, min(total, (number + 1) * size))
        items = [{"cmd_uuid": f"{place:036}", "send_status": 5 if place < total - 3 else 1} for place in places]
        return {"total_count": total, "items": items}

    with raw_server(endless(of_page)) as url, onenet_client(url, connect_s=120, read_s=120) as client:
        assert await client.count_waiting(command(), 10) == 3


async def test_a_long_body_is_read_up_to_its_bound() -> None:
    page = {"total_count": 1, "items": [{"cmd_uuid": "u", "more": "x" * (MAX_BODY_BYTES - 1_000)}]}
    with raw_server(answering(ok(page))) as url, onenet_client(url, connect_s=30, read_s=30) as client:
        assert await client.count_waiting(command(), 10) == 1
