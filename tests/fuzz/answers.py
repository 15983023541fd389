"""Responses of the platform, byte by byte: an answer is certain only if another reader of HTTP and JSON agrees."""

import asyncio
import http.client
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from hypothesis import strategies as st
from pydantic_core import from_json

from tests.fuzz.mutation import encoded, json_texts, mutated, object_text
from tests.fuzz.target import Check, Servers, Target
from tests.support.onenet_client import NEVER, accepting_response, command, onenet_client
from worker.core.answer import Answer, Cached, InDoubt, NotSent, Refused
from worker.core.credentials import Generation
from worker.onenet.client import OneNETClient

_SECOND = "the-second"  # the uuid of the answer to the next command
_SUCCESS = 200
_FAILURES = 500


class _Server:
    """Answers the first request with an input in pieces, and every other one as a platform that is well."""

    def __init__(self) -> None:
        self.url = ""
        self.input = b""
        self.requests_by_connection: list[int] = []

    async def start(self) -> asyncio.Server:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        return server

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = len(self.requests_by_connection)
        self.requests_by_connection.append(0)
        with suppress(asyncio.IncompleteReadError, asyncio.CancelledError, OSError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
                await reader.readexactly(length)
                self.requests_by_connection[number] += 1
                if sum(self.requests_by_connection) > 1:
                    writer.write(accepting_response(_SECOND))
                    continue
                for piece in _pieces(self.input):
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(0)
                if _read_as_http(self.input) is None:  # the client would wait for the rest
                    writer.write_eof()
        writer.close()


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


def _has_uuid(value: Any) -> bool:
    if isinstance(value, dict):
        return any((bool(each) and "uuid" in name.lower()) or _has_uuid(each) for name, each in value.items())
    return isinstance(value, list) and any(map(_has_uuid, value))


def _is_zero(value: object) -> bool:
    """Tell whether a value is 0, in whichever notation."""
    try:
        return not isinstance(value, bool) and isinstance(value, int | float | str) and float(value) == 0
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
        content = from_json(body.decode("utf-8", "replace"))
    except ValueError:
        content = None
    if isinstance(answer, Cached):
        assert status < 300
        assert content["data"]["uuid"].strip() == answer.uuid
        return
    fields = content if isinstance(content, dict) else {}
    assert not _has_uuid(fields.get("data"))
    if isinstance(answer, Refused) and answer.is_misconfigured:
        return
    assert status < _FAILURES
    assert not any(_is_zero(fields.get(name)) for name in ("errno", "code")), "success without a uuid proves nothing"
    if isinstance(answer, NotSent):
        wait_s = answer.retry_after_s
        assert wait_s is None or wait_s >= 0


@contextmanager
def _open(_servers: Servers) -> Iterator[Check]:
    server = _Server()

    async def ask(generation: Generation) -> list[Answer]:
        server.requests_by_connection.clear()
        with onenet_client(server.url, connect_s=30, read_s=30, api=generation) as client:
            return [await _answer_of(client, name) for name in ("first", "second")]

    with asyncio.Runner() as runner:
        listening = runner.run(server.start())

        def check(data: bytes) -> None:
            server.input = data
            first, second = runner.run(ask("v1" if zlib.crc32(data) & 1 else "v2"))
            _check_answer(first, data)
            assert second == Cached(_SECOND) or first == Cached(_SECOND), second
            if server.requests_by_connection[0] > 1:
                assert isinstance(first, Cached)
                whole = _read_as_http(data)
                assert whole is not None, "a connection was used again after garbage"
                assert whole[2] == b"", "a connection was used again although bytes followed the response"

        yield check
        listening.close()


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


@st.composite
def _contents(draw: st.DrawFn) -> bytes:
    """Return the JSON of an answer of either generation, mostly."""
    code, text = draw(st.sampled_from([("errno", "error"), ("code", "msg"), ("errno", "msg")]))
    fields = [(code, draw(_CODES)), (text, draw(_TEXTS))]
    if draw(st.booleans()):
        fields.append(
            ("data", object_text([(draw(st.sampled_from(["uuid", "UUID", "cmd_uuid", "id"])), draw(_UUIDS))]))
        )
    if draw(st.booleans()):
        fields.append((draw(st.sampled_from(["request_id", "data", "errno", "x"])), draw(_odd)))
    return encoded(object_text(fields))


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
    head = b"HTTP/1.1 " + draw(st.sampled_from(_STATUSES)) + b"\r\n"
    for header in draw(st.lists(st.sampled_from(_HEADERS), max_size=2)):
        head += header + b"\r\n"
    framing = draw(st.sampled_from(["length", "length", "chunks", "close"]))
    if framing == "length":
        return head + b"Content-Length: %d\r\n\r\n" % len(body) + body
    if framing == "close":
        return head + b"\r\n" + body
    middle = len(body) // 2
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:middle], body[middle:]) if part)
    return head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"


_PIECES = [
    b"\r\n", b"\n", b"\r", b"\r\n\r\n", b"0\r\n\r\n", b":", b" ", b"\0", b"HTTP/1.1 100 Continue\r\n\r\n",
    b"HTTP/1.1 103 X\r\n\r\n", b"Content-Length: 0\r\n", b"Transfer-Encoding: chunked\r\n", accepting_response(),
    b"-", b"+", b"0x", b"\xff", b"uuid", b"errno", b"{}", b'{"errno":0,"data":{"uuid":"v"}}',
]  # fmt: skip
INPUTS = mutated(_responses(), _PIECES)
TARGET = Target("answers", INPUTS, _open, neighbours=5)
