"""Responses of the platform, byte by byte: what is concluded is certain only if another reader of HTTP and JSON agrees.

An input is the response to a command, to the read of a page of a history, and to that of an entry's details. One that
ends with ``...`` goes on without an end: its last line is repeated.
"""

import asyncio
import http.client
import io
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import datetime, timedelta
from typing import Any
from unittest.mock import patch

from hypothesis import strategies as st

from schemas.onenet import usable_uuid
from tests.fuzz.mutation import encoded, json_texts, mutated, object_text, parsed
from tests.fuzz.target import Check, Servers, Target
from tests.support.builders import AN_IMEI
from tests.support.onenet_client import CHINA, NEVER, accepting_response, command, none_owned, onenet_client
from worker.core.answer import Answer, Cached, InDoubt, NotSent, Refused
from worker.core.credentials import Generation
from worker.core.doubt_window import DoubtWindow
from worker.core.platform import Candidate
from worker.errors import HistoryUnreadable
from worker.onenet.client import OneNETClient

_SECOND = "the-second"  # the uuid of the answer to the next command
_SUCCESS = 200
_FAILURES = 500
_DAY_S = 86_400
_ENDLESS = b"..."
_PIECE_BYTES = 64 * 1024
_MOST_BYTES = 64 * 1024 * 1024  # far more than is read of an answer and fits into the buffers of a connection
_MOST_WAITING = 10
_ENTRY = {
    "cmd_uuid": "u",
    "type": "EXECUTE",
    "create_time": "2026-08-05 12:00:01",
    "expired_time": "2026-08-06 08:00:00",
    "send_status": 1,
}
_ARGS = {
    "imei": AN_IMEI,
    "obj_id": "3311",
    "obj_inst_id": "0",
    "res_id": "5850",
    "expired_time": "2026-08-06T08:00:00",
}
_CONTENT = {"args": "on"}
_TRIED_AT = datetime(2026, 8, 5, 12, 0, 0, tzinfo=CHINA)
_DOUBT = DoubtWindow(_TRIED_AT, _TRIED_AT + timedelta(seconds=2))


def _well(data: Any) -> bytes:
    """Return a response that both generations of the platform could give."""
    body = json.dumps({"errno": 0, "error": "succ", "code": 0, "msg": "succ", "data": data}).encode()
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


_WELL = {
    "command": accepting_response(_SECOND),
    "page": _well({"total_count": 1, "items": [_ENTRY]}),
    "detail": _well({"args": _ARGS, "content": _CONTENT}),
}


class _Server:
    """Answers the first request of one kind with an input in pieces, every other one as a platform that is well."""

    def __init__(self) -> None:
        self.url = ""
        self.requests_by_connection: list[int] = []
        self.more_bytes = 0  # were sent of an input without an end
        self._kind = ""
        self._input = b""
        self._is_endless = self._is_given = False

    async def start(self) -> asyncio.Server:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        return server

    def give(self, kind: str, data: bytes) -> None:
        """Answer the next request of a kind with an input."""
        self.requests_by_connection.clear()
        self.more_bytes = 0
        self._kind, self._input, self._is_given = kind, data.removesuffix(_ENDLESS), False
        self._is_endless = data.endswith(_ENDLESS)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = len(self.requests_by_connection)
        self.requests_by_connection.append(0)
        with suppress(asyncio.IncompleteReadError, asyncio.CancelledError, OSError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
                await reader.readexactly(int(length or 0))
                self.requests_by_connection[number] += 1
                kind = _kind_of(head)
                if kind != self._kind or self._is_given:
                    writer.write(_WELL[kind])
                    continue
                self._is_given = True
                await self._send_input(writer)
                if kind != "command" or _read_as_http(self._input) is None:  # the client would wait for the rest
                    writer.write_eof()
        writer.close()

    async def _send_input(self, writer: asyncio.StreamWriter) -> None:
        for piece in _pieces(self._input):
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
        line = _last_line(self._input)
        more = line * (_PIECE_BYTES // len(line) + 1)
        while self._is_endless and self.more_bytes < _MOST_BYTES:
            writer.write(more)
            await writer.drain()
            self.more_bytes += len(more)


def _kind_of(head: bytes) -> str:
    if head.startswith(b"POST"):
        return "command"
    return "page" if b"/history?" in head else "detail"


def _last_line(data: bytes) -> bytes:
    """Return what an input without an end repeats."""
    return (data.splitlines(keepends=True) or [b"x"])[-1]


def _pieces(data: bytes) -> list[bytes]:
    """Divide an input in up to three places, always the same."""
    number = zlib.crc32(data)
    places = sorted({number % (len(data) + 1), (number >> 8) % (len(data) + 1), (number >> 16) % (len(data) + 1)})
    return [data[start:end] for start, end in zip([0, *places], [*places, len(data)], strict=True) if start < end]


class _Stream:
    """What http.client reads from."""

    def __init__(self, data: bytes) -> None:
        self.file = io.BytesIO(data)
        self.file.close = lambda: None  # type: ignore[method-assign]  # what follows a response is read too

    def makefile(self, _mode: str) -> io.BytesIO:
        return self.file


def _final_response(stream: _Stream) -> http.client.HTTPResponse:
    """Return the first response that is not an interim one; its body has not been read."""
    while True:
        response = http.client.HTTPResponse(stream, method="POST")  # type: ignore[arg-type]  # it only calls makefile
        response.begin()
        if response.status >= _SUCCESS:
            return response


def _read_as_http(data: bytes) -> tuple[int, bytes, bytes] | None:
    """Return status, body and the bytes that follow, as http.client reads a response; None: it is not whole."""
    stream = _Stream(data)
    try:
        response = _final_response(stream)
        if response.will_close:
            return None
        body = response.read()
    except (http.client.HTTPException, ValueError, OverflowError, OSError):
        return None
    return response.status, body, stream.file.read()


def _read_to_the_end(data: bytes) -> tuple[int, bytes] | None:
    """Return status and body of a response that may end with its connection."""
    stream = _Stream(data)
    try:
        response = _final_response(stream)
        return response.status, response.read()
    except (http.client.HTTPException, ValueError, OverflowError, OSError):
        return None


class _Twice(ValueError):
    """A name stands in an object twice."""


def _object(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name.lower() for name, _ in fields}) < len(fields):
        raise _Twice
    return dict(fields)


def _read_as_json(text: str) -> Any:
    """Return the value of a JSON text as Python's own parser reads it; None: it is no JSON, or nested too deeply.

    Raises:
        _Twice: a name stands in an object twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except _Twice:
        raise
    except (ValueError, RecursionError):
        return None


def _has_uuid(value: Any) -> bool:
    """Tell whether there is a uuid anywhere, by its name, also in JSON within a text."""
    if isinstance(value, dict):
        return any((bool(each) and _is_uuid_name(name)) or _has_uuid(each) for name, each in value.items())
    if isinstance(value, list):
        return any(map(_has_uuid, value))
    return isinstance(value, str) and value[:1] in ("{", "[", '"') and _has_uuid(parsed(value.encode(errors="replace")))


def _is_uuid_name(name: str) -> bool:
    letters = re.sub("[ _-]", "", name.lower())
    return "uuid" in letters or "cmdid" in letters


def _has_bare_uuid(value: Any) -> bool:
    if isinstance(value, dict | list):
        return any(map(_has_bare_uuid, value.values() if isinstance(value, dict) else value))
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", value) is not None


def _equals(value: object, number: int) -> bool:
    """Tell whether a value is a number, in whichever notation."""
    try:
        return not isinstance(value, bool) and isinstance(value, int | float | str) and float(value) == number
    except (ValueError, OverflowError):
        return False


def _check_answer(answer: Answer, data: bytes) -> None:
    """An answer other than "in doubt" is what the other reader finds too."""
    assert isinstance(answer, Cached | Refused | NotSent | InDoubt)
    if isinstance(answer, InDoubt):
        assert answer.reason
        return
    found = _read_to_the_end(data)
    assert found is not None, "only the worker can read it"
    status, body = found
    try:
        content = _read_as_json(body.decode("utf-8", "replace"))
    except _Twice as exc:
        raise AssertionError("another reader takes another value") from exc
    if isinstance(answer, Cached):
        assert status < 300
        assert content["data"]["uuid"].strip() == answer.uuid
        return
    fields = content if isinstance(content, dict) else {}
    assert not _has_uuid(content)
    assert not _has_bare_uuid(fields.get("data"))
    if isinstance(answer, Refused) and answer.is_misconfigured:
        return
    assert status < _FAILURES
    assert not any(_equals(fields.get(name), 0) for name in ("errno", "code")), "success without a uuid proves nothing"
    if isinstance(answer, NotSent):
        wait_s = answer.retry_after_s
        assert wait_s is None or 0 <= wait_s <= _DAY_S


def _check_search(kind: str, found: list[Candidate] | None, data: bytes) -> None:
    """A history without the command is what the other reader finds too."""
    if found:
        assert all(usable_uuid(each.uuid) == each.uuid for each in found)
    elif found is not None:
        assert not _may_be_cached(kind, data), "the history proves nothing"


def _may_be_cached(kind: str, data: bytes) -> bool:
    """Tell whether a page, or the details of its entry, leave open that the command was cached."""
    status, body = _read_to_the_end(data) or (0, b"")
    try:
        content = _read_as_json(body.decode("utf-8", "replace"))
    except _Twice:
        return True
    if status != _SUCCESS or not isinstance(content, dict) or not isinstance(content.get("data"), dict):
        return True
    if not any(_equals(content.get(name), 0) for name in ("errno", "code")):
        return True
    if any(map(_may_be_entries, (content | {"data": None}).values())):
        return True
    found = content["data"]
    if kind == "detail":
        args = found.get("args") if isinstance(found.get("args"), dict) else {}
        return found.get("content") in (None, _CONTENT) and _has_nothing_else_than(_ARGS, args)
    items = found.get("items") or []
    totals = [found[name] for name in ("total_count", "count") if found.get(name) is not None]
    is_whole = bool(totals) and all(_equals(total, len(items)) for total in totals)
    if any(map(_may_be_entries, (found | {"items": None}).values())):
        return True
    return not is_whole or any(not isinstance(each, dict) or _has_nothing_else_than(_ENTRY, each) for each in items)


def _may_be_entries(value: Any) -> bool:
    """Tell whether a field that is not documented may have entries: a list that is not empty, or an entry itself."""
    if isinstance(value, list):
        return bool(value)
    return _has_uuid(value) or (isinstance(value, dict) and any(map(_may_be_entries, value.values())))


def _has_nothing_else_than(wanted: dict[str, Any], found: dict[str, Any]) -> bool:
    """Tell whether each of these fields is absent, or as it would be documented; the uuid and the state may differ."""
    names = wanted.keys() - {"cmd_uuid", "send_status"}
    return all(found.get(name) in (None, "") or str(found[name]) == wanted[name] for name in names)


@contextmanager
def _open(_servers: Servers) -> Iterator[Check]:
    server = _Server()

    def client(generation: Generation) -> AbstractContextManager[OneNETClient]:
        return onenet_client(server.url, connect_s=30, read_s=30, api=generation)

    async def ask(generation: Generation) -> list[Answer]:
        with client(generation) as asking:
            return [await _answer_of(asking, name) for name in ("first", "second")]

    async def search(generation: Generation) -> list[Candidate] | None:
        with client(generation) as searching:
            wanted = command(expired_time=_ARGS["expired_time"])
            with suppress(HistoryUnreadable):
                return await searching.find_candidates(wanted, _DOUBT, none_owned)
        return None

    async def count(generation: Generation) -> int | None:
        with client(generation) as counting, suppress(HistoryUnreadable):
            return await counting.count_waiting(command(), _MOST_WAITING)
        return None

    with asyncio.Runner() as runner, patch("worker.onenet.history_reader.backoff_s", lambda *_, **__: 0.0):
        listening = runner.run(server.start())

        def check(data: bytes) -> None:
            generation: Generation = "v1" if zlib.crc32(data) & 1 else "v2"
            read = data if not data.endswith(_ENDLESS) else data[: -len(_ENDLESS)] + _last_line(data[: -len(_ENDLESS)])
            server.give("command", data)
            first, second = runner.run(ask(generation))
            _check_answer(first, read)
            assert second == Cached(_SECOND) or first == Cached(_SECOND), second
            if server.requests_by_connection[0] > 1:
                assert isinstance(first, Cached)
                whole = _read_as_http(read)
                assert whole is not None, "a connection was used again after garbage"
                assert whole[2] == b"", "a connection was used again although bytes followed the response"
            assert server.more_bytes < _MOST_BYTES
            for kind in ("page", "detail"):
                server.give(kind, data)
                _check_search(kind, runner.run(search(generation)), read)
                _check_reads(server)
            server.give("page", data)
            waiting = runner.run(count(generation))
            assert waiting is None or 0 <= waiting <= _MOST_WAITING
            _check_reads(server)

        yield check
        listening.close()


def _check_reads(server: _Server) -> None:
    """Each read has a connection of its own, and an answer without an end is read up to a bound."""
    assert max(server.requests_by_connection) == 1
    assert server.more_bytes < _MOST_BYTES


async def _answer_of(client: OneNETClient, args: str) -> Answer:
    return (await client.execute(command(args=args), NEVER)).answer


_STATUSES = (
    b"200 OK", b"200 OK", b"201 X", b"204 No Content", b"302 Found", b"400 X", b"401 X", b"404 X", b"429 X", b"500 X",
    b"503 X", b"599 X",
)  # fmt: skip
_UUIDS = st.sampled_from(
    ['"u"', '""', '" u "', '"\\u0000"', '"' + "u" * 900 + '"', "null", "7", '["u"]', '{"uuid":"u"}']
)
_CODES = st.sampled_from(
    ["0", "1", "3", "7", "10", "2001", "10403", "10407", "-1", '"0"', "0.0", "1e0", "true", "9" * 30]
)
_TEXTS = st.sampled_from(
    ['"succ"', '"auth failed"', '"too many requests"', '"device not online"', '"系统错误"', "null", "1"]
)
_odd = json_texts(names=("errno", "error", "code", "msg", "data", "uuid", "request_id"))


_with_uuids = st.lists(
    st.tuples(st.sampled_from(["uuid", "uuid", "UUID", "cmd_uuid", "cmd_id", "id"]), _UUIDS), min_size=1, max_size=2
).map(object_text)
_ITEMS = [
    _ENTRY, _ENTRY | {"type": "READ"}, _ENTRY | {"create_time": "2026-08-04 12:00:00"}, _ENTRY | {"cmd_uuid": None},
    {"cmd_uuid": "v", "type": "READ"}, {"cmd_uuid": "../v?w#x", "type": "?"}, {}, None, 7,
]  # fmt: skip


_MORE_OF_A_PAGE = [
    ("items", "[]"), ("Items", json.dumps([_ENTRY])), ("total_count", "0"), ("count", "0"), ("count", "1"),
    ("item", json.dumps(_ENTRY)), ("list", "[null]"), ("list", "[]"), ("page", "1"), ("of", '{"of":[7]}'),
    ("text", json.dumps(json.dumps([_ENTRY]))),
]  # fmt: skip
_seldom = st.integers(0, 3).map(lambda number: number == 0)


@st.composite
def _pages(draw: st.DrawFn) -> str:
    items = draw(st.lists(st.sampled_from(_ITEMS), max_size=2))
    total = draw(st.sampled_from([len(items), len(items), len(items), str(len(items)), 0, 1, 101, None]))
    texts = [json.dumps(each) for each in items]
    texts = [f'{text[:-1]},"type":"READ"}}' if text.endswith("}") and draw(_seldom) else text for text in texts]
    fields = [(draw(st.sampled_from(["total_count", "total_count", "count"])), json.dumps(total))]
    fields.append((draw(st.sampled_from(["items"] * 4 + ["list"])), f"[{','.join(texts)}]"))
    if draw(_seldom):
        fields.append(draw(st.sampled_from(_MORE_OF_A_PAGE)))
    return object_text(draw(st.permutations(fields)))


@st.composite
def _details(draw: st.DrawFn) -> str:
    args = _ARGS | draw(st.dictionaries(st.sampled_from([*_ARGS]), st.sampled_from(["1", 0, None, "?"]), max_size=1))
    return json.dumps({"args": args, "content": draw(st.sampled_from([_CONTENT, {"args": "off"}, {}, None, "?"]))})


@st.composite
def _contents(draw: st.DrawFn) -> bytes:
    """Return the JSON of an answer of either generation, mostly."""
    code, text = draw(st.sampled_from([("errno", "error"), ("code", "msg"), ("errno", "msg")]))
    fields = [(code, draw(_CODES)), (text, draw(_TEXTS))]
    if draw(st.booleans()):
        fields.append(("data", draw(_with_uuids | _pages() | _details() | _with_uuids.map(json.dumps))))
    if draw(st.booleans()):
        fields.append((draw(st.sampled_from(["request_id", "data", "errno", "x"])), draw(_odd | _with_uuids)))
    if draw(_seldom):
        fields.append((draw(st.sampled_from(["data", "uuid", "code"])), draw(_CODES | _with_uuids | _pages())))
    return encoded(object_text(draw(st.permutations(fields))))


_HEADERS = (
    b"Content-Type: application/json", b"Content-Type: text/html", b"Connection: close", b"Connection: keep-alive",
    b"Retry-After: 7", b"Retry-After: 9" + b"9" * 400, b"Retry-After: Wed, 21 Oct 2099 07:28:00 GMT",
    b"Retry-After: \xb2", b"Date: Sat, 28 Nov 2026 21:27:46 GMT", b"Date: Sat, 99 Nov 0000 99:99:99 +9999",
    b"Content-Encoding: gzip", b"Transfer-Encoding: gzip", b"Content-Length: 3", b"Location: http://127.0.0.1:9/",
    b"X: \xff\x00", b"Upgrade: h2c",
)  # fmt: skip


@st.composite
def _responses(draw: st.DrawFn) -> bytes:
    body = draw(_contents())
    end = draw(st.sampled_from([b""] * 15 + [_ENDLESS]))
    head = b"HTTP/1.1 " + draw(st.sampled_from(_STATUSES)) + b"\r\n"
    for header in draw(st.lists(st.sampled_from(_HEADERS), max_size=2)):
        head += header + b"\r\n"
    framing = draw(st.sampled_from(["length", "length", "chunks", "close"]))
    if framing == "length":
        return head + b"Content-Length: %d\r\n\r\n" % len(body) + body + end
    if framing == "close":
        return head + b"\r\n" + body + end
    middle = len(body) // 2
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:middle], body[middle:]) if part)
    return head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n" + end


_PIECES = [
    b"\r\n", b"\n", b"\r", b"\r\n\r\n", b"0\r\n\r\n", b":", b" ", b"\0", b"HTTP/1.1 100 Continue\r\n\r\n",
    b"HTTP/1.1 103 X\r\n\r\n", b"Content-Length: 0\r\n", b"Transfer-Encoding: chunked\r\n", accepting_response(),
    b"-", b"+", b"0x", b"\xff", b"uuid", b"errno", b"{}", b'{"errno":0,"data":{"uuid":"v"}}',
    b'"total_count":0', b'"items":[]', b'"data":{"total_count":0},', b"1;x\r\n", _ENDLESS,
]  # fmt: skip
INPUTS = mutated(_responses(), _PIECES)
TARGET = Target("answers", INPUTS, _open, neighbours=5)
