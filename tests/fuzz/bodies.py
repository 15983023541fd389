"""Bodies of commands: each is a command that asks OneNET for exactly what it says, or an error that names the field."""

import asyncio
import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any
from unittest import mock
from urllib.parse import parse_qsl
from zoneinfo import ZoneInfo

from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from pika import BasicProperties
from pika.frame import Header
from pydantic_core import from_json

from schemas.command import COMMAND
from tests.fuzz.mutation import ODD_JSON, encoded, json_texts, mutated, object_text
from tests.fuzz.target import Check, Servers, Target
from tests.support.onenet_client import NEVER, onenet_client
from worker.amqp.messages import Delivery, MessageBuilder, fitted
from worker.amqp.topology import Topology
from worker.core.command import Command
from worker.core.envelope import Envelope
from worker.core.outcome import Failed, reply_to
from worker.core.parsing import read_command, read_task
from worker.core.resolution import Conclude
from worker.errors import UnusableCommand
from worker.onenet.client import OneNETClient
from worker.onenet.response import Response
from worker.onenet.transport import HTTPTransport, Request

ZONE = ZoneInfo("Asia/Shanghai")
NOW = datetime(2026, 8, 5, tzinfo=UTC)
MESSAGES = MessageBuilder(Topology("onenet", (5,)), "host:1")
SMALLEST_FRAME = 4_096
_SCHEMA = Draft202012Validator(COMMAND.json_schema())
_TRIGGERS = {"REGISTER": 1, "UPDATE": 2, "NOTIFY": 4}
_MESSAGE_IDS: tuple[Any, ...] = (None, None, None, "a", "not valid", b"\xff")

_numbers = st.integers(0, 65_535).map(str)
_times = st.sampled_from(
    ["2099-01-01T00:00:00", "2099-12-31T23:59:59Z", "2099-06-01T12:00:00+08", "2099-02-29T00:00:00",
     "9999-12-31T23:59:59"]
).map(json.dumps)  # fmt: skip
_FIELDS = {
    "command_id": st.sampled_from(['"a"', '"A.b_c:d-e"', '"' + "i" * 128 + '"']),
    "imei": st.sampled_from(['"865820030000001"', '"0042"', '"\\u0030042"']),
    "obj_id": _numbers,
    "obj_inst_id": _numbers,
    "res_id": _numbers,
    "expired_time": _times,
    "valid_time": st.sampled_from(['"2020-01-01T00:00:00Z"', '"2098-12-31T16:00:00Z"']),
    "retry": st.integers(0, 10).map(str),
    "timeout": st.integers(5, 40).map(str),
    "trigger_msg": st.sampled_from(["1", "7", '["UPDATE"]', '["NOTIFY","REGISTER"]']),
    "args": st.text(max_size=20).map(json.dumps) | st.text(max_size=20).map(lambda text: f'"{text}"'),
    "product": st.text(max_size=4).map(json.dumps),
}
_odd = json_texts(names=tuple(_FIELDS))
_OPTIONAL = ("valid_time", "retry", "timeout", "trigger_msg", "args")
_REQUIRED = tuple(name for name in _FIELDS if name not in {*_OPTIONAL, "product"})


@st.composite
def _commands(draw: st.DrawFn) -> bytes:
    """Return a valid command, or one with a few fields that are odd, missing, unknown or doubled."""
    names = [*_REQUIRED, *(name for name in _OPTIONAL if draw(st.booleans()))]
    fields = [(name, draw(_FIELDS[name])) for name in names]
    for _ in range(draw(st.integers(0, 2))):
        change = (draw(st.sampled_from([*_FIELDS]) | st.text(max_size=3)), draw(_odd))
        at = draw(st.integers(0, len(fields)))
        fields = [*fields[:at], change, *fields[at + draw(st.integers(0, 1)) :]]
    return encoded(object_text(fields))


_EXTREMES = st.sampled_from(
    [b"[" * 60_000, b'{"a":' * 13_000, b"1" * 6_000, b'{"args":"' + b"\\ud800" * 900 + b'"}', b'"' + b"x" * 70_000]
)
_PIECES = [encoded(text) for text in ODD_JSON] + [
    b"\0", b"\xef\xbb\xbf", b"\xff", b"\xed\xa0\x80", b"\xc0\xaf", b'"', b"\\", b"{", b"}", b"//", b"\r\n", b"e5",
]  # fmt: skip
INPUTS = mutated(_commands() | _odd.map(encoded) | _EXTREMES, _PIECES)


class _Recorder:
    """Takes the place of the network: accepts every request, and keeps the last."""

    def __init__(self) -> None:
        self.requests: list[Request] = []

    async def send(self, _transport: HTTPTransport, request: Request, _deadline: float, is_unique: Any) -> Response:
        self.requests.append(request)
        response = Response(200, {}, b'{"errno":0,"error":"succ","data":{"uuid":"u"}}')
        is_unique(response)
        return response


@contextmanager
def _open(_servers: Servers) -> Iterator[Check]:
    recorder = _Recorder()

    async def send(*args: Any) -> Response:
        return await recorder.send(*args)

    with (
        mock.patch.object(HTTPTransport, "send", send),
        onenet_client("http://127.0.0.1:9") as client,
        asyncio.Runner() as runner,
    ):

        def check(body: bytes) -> None:
            message_id = _MESSAGE_IDS[zlib.crc32(body) % len(_MESSAGE_IDS)]
            parsed = read_task(Envelope(message_id=message_id), body, ZONE, 0.0).parsed
            if isinstance(parsed, Command):
                _check_command(parsed, body, message_id)
                _check_request(runner, client, recorder, parsed, body)
            else:
                assert isinstance(parsed, UnusableCommand)
                _check_error(parsed, body, message_id)

        yield check


def _check_error(error: UnusableCommand, body: bytes, message_id: Any) -> None:
    """It names what is wrong, and reply and dead letter can be published."""
    assert error.details
    assert all(detail.message and len(detail.field) <= 100 for detail in error.details)
    outcome = Failed(error.code, error.message, error.details)
    reply = reply_to(outcome, 1, error.command_id, error.imei, NOW)
    delivery = Delivery(1, 1, False, BasicProperties(message_id=message_id), body, is_returned=False)
    for publication in MESSAGES.publications(delivery, Conclude(outcome, reply)):
        sent = fitted(publication, SMALLEST_FRAME)
        assert len(Header(1, len(sent.body), sent.properties).marshal()) <= SMALLEST_FRAME


def _fields(body: bytes) -> Mapping[str, Any]:
    """Read a body with another parser than the worker's."""
    found = from_json(body, allow_inf_nan=False)
    assert isinstance(found, dict)
    return found


def _check_command(command: Command, body: bytes, message_id: object) -> None:
    fields = _fields(body)
    assert _SCHEMA.is_valid(fields)
    assert command.command_id == fields.get("command_id", message_id)
    assert message_id in {None, command.command_id}
    for options in ({"sort_keys": True, "indent": 2}, {"ensure_ascii": False}):
        again = read_command(json.dumps(fields, **options).encode(), message_id, ZONE)
        assert again == command
        assert (again.content_hash(), again.match_key()) == (command.content_hash(), command.match_key())


def _check_request(
    runner: asyncio.Runner, client: OneNETClient, recorder: _Recorder, command: Command, body: bytes
) -> None:
    """The request asks for the values of the body, in the platform's time, and for nothing else."""
    if command.product is not None:
        return
    recorder.requests.clear()
    sent = runner.run(client.execute(command, NEVER))
    [request] = recorder.requests
    query = parse_qsl(request.path.partition("?")[2], keep_blank_values=True, strict_parsing=True, errors="strict")
    fields = _fields(body)
    trigger = fields.get("trigger_msg")
    wanted = {name: str(fields[name]) for name in ("imei", "obj_id", "obj_inst_id", "res_id")}
    wanted |= {name: str(fields[name]) for name in ("retry", "timeout") if name in fields}
    if trigger is not None:
        wanted["trigger_msg"] = str(sum(map(_TRIGGERS.__getitem__, trigger)) if isinstance(trigger, list) else trigger)
    for name in ("expired_time", "valid_time"):
        if name in fields and not (name == "valid_time" and sent.valid_time_omitted):
            wanted[name] = _local(fields[name])
    assert sorted(query) == sorted(wanted.items())
    assert from_json(request.body) == ({"args": fields["args"]} if "args" in fields else {})


def _local(text: str) -> str:
    moment = datetime.fromisoformat(text)
    return (
        (moment if moment.tzinfo is None else moment.astimezone(ZONE)).strftime("%Y-%m-%dT%H:%M:%S").rjust(19, "0")[:19]
    )


TARGET = Target("bodies", INPUTS, _open, neighbours=20)
