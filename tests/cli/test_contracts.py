"""The published contracts: the files match the program's output, and the worker conforms to them."""

import asyncio
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, get_args
from zoneinfo import ZoneInfo

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from pika import BasicProperties
from typer.testing import CliRunner

from schemas.command import BEYOND_THE_SCHEMA
from schemas.command import EXAMPLE as COMMAND_EXAMPLE
from schemas.reply import EXAMPLES as REPLY_EXAMPLES
from schemas.reply import RejectionCode, Status
from tests.support.builders import a_command
from tests.support.engine import PAST_DOUBT, Engine, a_likely
from worker.amqp.messages import Delivery, Publication
from worker.cli.contracts import asyncapi, command_schema, reply_schema, result_schema
from worker.cli.program import app
from worker.core.answer import Cached, InDoubt, NotSent, Refused
from worker.core.parsing import read_command
from worker.errors import UnusableCommand

PUBLISHED = Path(__file__).parents[2] / "docs" / "contracts"
COMMAND, REPLY, RESULT = command_schema(), reply_schema(), result_schema()
COMMANDS, REPLIES = Draft202012Validator(COMMAND), Draft202012Validator(REPLY)
ASYNCAPI = asyncapi()


@pytest.mark.parametrize(
    ("document", "file"),
    [
        ("command", "command.schema.json"),
        ("reply", "reply.schema.json"),
        ("result", "result.schema.json"),
        ("asyncapi", "asyncapi.json"),
    ],
)
def test_the_published_contracts_are_the_output_of_the_command_schema(document: str, file: str) -> None:
    printed = CliRunner().invoke(app, ["schema", document])
    assert (PUBLISHED / file).read_bytes() == printed.stdout_bytes, "`make docs` regenerates it"


@pytest.mark.parametrize("schema", [COMMAND, REPLY, RESULT], ids=["command", "reply", "result"])
class TestASchema:
    def test_a_schema_is_valid_and_has_a_description(self, schema: dict[str, Any]) -> None:
        Draft202012Validator.check_schema(schema)
        assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
        assert schema["$id"].startswith("urn:")
        assert schema["title"]
        assert all(field["description"] for field in schema["properties"].values())

    def test_a_schema_accepts_its_examples(self, schema: dict[str, Any]) -> None:
        assert schema["examples"]
        for example in schema["examples"]:
            Draft202012Validator(schema).validate(example)

    def test_a_schema_has_only_patterns_that_every_validator_reads_alike(self, schema: dict[str, Any]) -> None:
        r"""No \d, which is more than ASCII to some, and no $ alone, before which some let a line break pass."""
        found = [inner for inner in _subschemas(schema) if isinstance(inner.get("pattern"), str)]
        patterns = [inner for inner in found if inner["pattern"] != "\\n"]
        assert patterns
        for inner in patterns:
            assert re.fullmatch(r"\^[^\\$^]+\$", inner["pattern"])
            assert "(?" not in inner["pattern"]
            is_nullable = inner["type"] == ["string", "null"]
            assert inner["not"] == {"pattern": "\\n"} | ({"not": {"type": "null"}} if is_nullable else {})


def _subschemas(schema: object) -> Iterator[dict[str, Any]]:
    if isinstance(schema, dict):
        yield schema
    for inner in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        yield from _subschemas(inner)


@dataclass(frozen=True)
class Message:
    """What decides whether a command is valid."""

    fields: dict[str, Any]
    message_id: object = None

    @property
    def body(self) -> bytes:
        return json.dumps(self.fields).encode()

    @property
    def times(self) -> list[datetime | None]:
        return [_instant(self.fields[name]) for name in ("valid_time", "expired_time") if name in self.fields]


def _instant(text: str) -> datetime | None:
    """Return what a time of the right form names, None where there is no such time."""
    offset = (re.sub(r"\.[0-9]+", "", text[19:]).replace(":", "").strip("Z") or "+").ljust(5, "0")
    try:
        local = datetime.strptime(text[:19], "%Y-%m-%dT%H:%M:%S").replace(tzinfo=UTC)
        instant = local - timedelta(hours=int(offset[:3]), minutes=int(offset[0] + offset[3:]))
        _ = instant - timedelta(days=1), instant + timedelta(days=1)
    except (ValueError, OverflowError):
        return None
    return instant


def _has_not_one_id(message: Message) -> bool:
    asked, given = message.message_id, message.fields.get("command_id")
    if asked is None:
        return given is None
    return not (isinstance(asked, str) and re.fullmatch("[A-Za-z0-9._:-]{1,128}", asked)) or given not in (None, asked)


def _expires_too_early(message: Message) -> bool:
    valid_at, expires_at = [None, *message.times][-2:]
    return valid_at is not None and expires_at is not None and expires_at <= valid_at


def _has_a_lone_surrogate(message: Message) -> bool:
    return any(isinstance(value, str) and re.search("[\ud800-\udfff]", value) for value in message.fields.values())


# Whether a message that the schema accepts breaks a rule of BEYOND_THE_SCHEMA, in its order.
BREAKS: tuple[Callable[[Message], bool], ...] = (
    _has_not_one_id,
    lambda message: None in message.times,
    _expires_too_early,
    lambda message: len(message.fields.get("args", "").encode("utf-8", "surrogatepass")) > 2048,
    _has_a_lone_surrogate,
    lambda message: any(isinstance(value, float) for value in message.fields.values()),
    lambda message: len(message.body) > 65_536,
    lambda message: False,  # its body is JSON to the letter; below there are some that are not
)


def _body(**changes: Any) -> bytes:
    return json.dumps(a_command(command_id="a", **changes)).encode()


# For each rule some bodies that break it, with the property message_id and the field that the worker names.
BREACHES: tuple[list[tuple[bytes, object, str]], ...] = (
    [
        (json.dumps(a_command(command_id=None)).encode(), None, "command_id"),
        (_body(), "b", "command_id"),
        (_body(), "a\n", "command_id"),
    ],
    [
        (_body(expired_time="2099-02-30T00:00:00"), None, "expired_time"),
        (_body(valid_time="0001-01-01T00:00:00Z"), None, "valid_time"),
        (_body(expired_time="9999-12-31T00:00:00Z"), None, "expired_time"),
    ],
    [
        (_body(expired_time="2099-01-01T00:00:00Z", valid_time="2099-01-01T00:00:00Z"), None, "expired_time"),
        (_body(expired_time="2099-01-01T08:00:00+09:00", valid_time="2099-01-01T00:00:00Z"), None, "expired_time"),
    ],
    [(_body(args="开" * 683), None, "args")],
    [(_body(args="\ud800"), None, "args"), (_body(product="\udfff"), None, "product")],
    [
        (_body(retry=1.0), None, "retry"),
        (_body(trigger_msg=7.0), None, "trigger_msg"),
        (_body(obj_id=0).replace(b'"obj_id": 0', b'"obj_id": 1e3'), None, "obj_id"),
    ],
    [(_body() + b" " * 65_536, None, "")],
    [
        (_body().decode().encode("utf-16"), None, ""),
        (b"\xef\xbb\xbf" + _body(), None, ""),
        (_body(retry=1).replace(b'"retry"', b'"retry": 1, "retry"'), None, "retry"),
    ],
)


@pytest.mark.parametrize(
    ("rule", "breach"),
    [
        pytest.param(rule, breach, id=f"{rule[:40]}-{number}")
        for rule, breaches in zip(BEYOND_THE_SCHEMA, BREACHES, strict=True)
        for number, breach in enumerate(breaches)
    ],
)
def test_rules_beyond_the_schema_are_checked_by_the_worker(rule: str, breach: tuple[bytes, object, str]) -> None:
    body, message_id, field = breach
    assert COMMANDS.is_valid(json.loads(body)), "the schema can express it"
    with pytest.raises(UnusableCommand) as caught:
        read_command(body, message_id, ZoneInfo("UTC"))
    assert [detail.field for detail in caught.value.details] == [field]
    assert f"- {rule}\n" in COMMAND["description"]


SOON = datetime.now(UTC).replace(tzinfo=None) + timedelta(days=1)
an_id = st.text("abcXYZ019._:-", min_size=1, max_size=128)
an_identifier = st.integers(0, 65535)
a_time = st.builds(
    lambda moment, fraction, offset: f"{moment.isoformat(timespec='seconds')}{fraction}{offset}",
    st.datetimes() | st.just(SOON),
    st.sampled_from(["", ".1", ".123", ".123456", ".999999999"]),
    st.sampled_from(["", "Z", "+08", "-0330", "+23:59", "-23:59"]),
)
the_triggers = st.lists(st.sampled_from(["REGISTER", "UPDATE", "NOTIFY"]), min_size=1, max_size=3, unique=True)
right_fields = st.fixed_dictionaries(
    {
        "imei": st.text("0123456789", min_size=15, max_size=15),
        "obj_id": an_identifier,
        "obj_inst_id": an_identifier,
        "res_id": an_identifier,
        "expired_time": a_time,
    },
    optional={
        "command_id": an_id,
        "valid_time": a_time,
        "retry": st.integers(0, 10),
        "timeout": st.integers(5, 40),
        "trigger_msg": st.integers(1, 7) | the_triggers,
        "args": st.text() | st.sampled_from(["x" * 2048, "开" * 682]),
        "product": st.text(),
    },
)
NAMES = tuple(COMMAND["properties"])
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=3,
)
ODD_NUMBERS = [-1, 0, 1, 4, 5, 7, 8, 10, 11, 40, 41, 65535, 65536, 10**30, 1.0, -0.0, 7.0, 7.5, 1e300, True, "7"]
ODD_TEXTS = [
    *("", "x" * 128, "x" * 129, "x" * 2049, "开" * 683, "x" * 65_000, "\ud800", "a\x00", "é", "a\n"),
    *("\uff18" * 15, "٣" * 15, "8" * 14, "8" * 15, "8" * 16, "8" * 15 + "\n"),
]
ODD_TIMES = [
    *("2027-02-30T00:00:00", "2027-02-29T00:00:00", "2028-02-29T00:00:00", "2027-04-31T00:00:00Z"),
    *("0000-01-01T00:00:00", "0001-01-01T23:59:59", "0001-01-02T00:00:00Z", "0001-01-02T00:00:00+00:01"),
    *("9999-12-30T23:59:59", "9999-12-31T00:00:00Z", "9999-12-30T23:59:59-00:01", "2027-13-01T00:00:00"),
    *("2027-01-01T24:00:00", "2027-01-01T23:59:60", "2027-01-01T00:00:00z", "2027-01-01T00:00:00+24:00"),
    *("2027-01-01T00:00:00.0", "2027-01-01 00:00:00", "2027-01-01T00:00", "2027-01-01T00:00:00+8"),
    *("2027-01-01", "\uff12027-01-01T00:00:00", "2027-01-01T00:00:00Z\n"),
]
ODD_TRIGGERS = [
    *([], ["UPDATE"], ["UPDATE", "UPDATE"], ["update"], ["UPDATE", 4], [["UPDATE"]], ["REGISTER"] * 4),
    *({"UPDATE": 2}, "UPDATE", *ODD_NUMBERS),
]
ODD: dict[str, list[Any]] = dict.fromkeys(NAMES, ODD_NUMBERS) | {
    **dict.fromkeys(("command_id", "imei", "args", "product"), ODD_TEXTS),
    **dict.fromkeys(("expired_time", "valid_time"), ODD_TIMES),
    "trigger_msg": ODD_TRIGGERS,
}


def _twists(value: object) -> list[object]:
    """Return what looks like a value and is another."""
    match value:
        case bool():
            return [int(value)]
        case int():
            return [float(value), str(value), value == 1, [value], -value]
        case str():
            return [f"{value}\n", f" {value}", f"{value}é", value.lower(), value[:-1], [value]]
        case list():
            return [value * 2, [*value, "OTHER"], value[1:], value[0] if value else 0]
        case _:
            return [None]


@st.composite
def messages(draw: st.DrawFn) -> Message:
    """Draw a valid message, or one with up to three changes that may make it invalid."""
    fields = draw(right_fields)
    message_id = draw(st.none() | st.just(fields.get("command_id")) | an_id)
    fields.setdefault("command_id", message_id or draw(an_id))
    for change in draw(st.lists(st.sampled_from(["remove", "replace", "twist", "add", "message_id"]), max_size=3)):
        name = draw(st.sampled_from(NAMES))
        match change:
            case "remove":
                fields.pop(name, None)
            case "replace":
                fields[name] = draw(st.sampled_from(ODD[name]) | anything)
            case "twist" if name in fields:
                fields[name] = draw(st.sampled_from(_twists(fields[name])))
            case "add":
                fields[draw(st.text(max_size=5) | st.sampled_from(["IMEI", "imei ", "args\n"]))] = draw(anything)
            case "message_id":
                message_id = draw(st.sampled_from(["", "a b", "a\n", "é", "x" * 129, b"\xff", 7]) | an_id)
    return Message(fields, message_id)


def _worker_accepts(message: Message) -> bool:
    try:
        read_command(message.body, message.message_id, ZoneInfo("UTC"))
    except UnusableCommand:
        return False
    return True


def _objections(message: Message) -> list[str]:
    """Return what the contract has against a message."""
    if not COMMANDS.is_valid(json.loads(message.body)):
        return ["the schema"]
    return [rule for rule, breaks in zip(BEYOND_THE_SCHEMA, BREAKS, strict=True) if breaks(message)]


@settings(max_examples=1000, deadline=None)
@given(messages())
def test_schema_and_worker_agree_on_generated_commands(message: Message) -> None:
    objections = _objections(message)
    for objection in objections or ["none"]:
        event(objection)
    assert _worker_accepts(message) is (objections == [])


@pytest.mark.parametrize("name", NAMES)
def test_schema_and_worker_agree_on_edge_cases(name: str) -> None:
    whole = COMMAND_EXAMPLE | {"retry": 3, "timeout": 25, "product": "heating"}
    for value in [*ODD[name], *_twists(whole[name])]:
        message = Message(whole | {name: value})
        assert _worker_accepts(message) is (_objections(message) == []), value


def _component(name: str) -> Draft202012Validator:
    """Return a validator of one of the AsyncAPI document's schemas."""
    return Draft202012Validator({"$ref": f"#/components/schemas/{name}", "components": ASYNCAPI["components"]})


def _check_against_asyncapi(publication: Publication, channel: str, message: str, **parameters: str) -> None:
    """Hold that a message is what the AsyncAPI document says that the worker sends."""
    place, form = ASYNCAPI["channels"][channel], ASYNCAPI["components"]["messages"][message]
    assert publication.exchange == place["bindings"]["amqp"]["exchange"]["name"]
    assert publication.routing_key == place["address"].format(**parameters)
    assert all(
        parameters[name] in found.get("enum", parameters.values()) for name, found in place["parameters"].items()
    )
    headers = form["headers"]["$ref"].rpartition("/")[2]
    _component(headers).validate(publication.properties.headers or {})
    if "bindings" in form:
        assert publication.properties.content_type == form["contentType"]
        assert publication.properties.type == form["bindings"]["amqp"]["messageType"]


answers = (
    st.builds(Cached, st.text(min_size=1))
    | st.builds(Refused, st.sampled_from(get_args(RejectionCode)), st.text(), st.none() | st.integers())
    | st.builds(NotSent, st.text())
    | st.builds(InDoubt, st.text())
)
headers = st.fixed_dictionaries(
    {},
    optional={
        "x-onenet-attempt": st.integers(1, 9),
        "x-onenet-in-doubt": st.just(str(PAST_DOUBT)),
        "traceparent": st.text(),
    },
)


@settings(deadline=None)
@given(
    messages() | st.builds(lambda: Message(a_command())),
    answers,
    headers,
    st.sampled_from([[], [a_likely("u")], [a_likely("u"), a_likely("v")]]),
)
def test_every_published_message_conforms_to_its_schema_and_the_asyncapi_document(
    message: Message, answer: Cached | Refused | NotSent | InDoubt, headers: dict[str, Any], found: list[Any]
) -> None:
    engine = Engine("reconcile" if found else "dead-letter")
    engine.platform.answers, engine.platform.candidates = [answer], found
    name = message.message_id if isinstance(message.message_id, str) else None
    properties = BasicProperties(message_id=name, app_id="billing", expiration="1", user_id="u", headers=headers)
    delivery = Delivery(1, 1, False, properties, message.body, is_returned=True)
    for publication in asyncio.run(engine.deliver(delivery)):
        if publication.exchange == "onenet.replies":
            reply = json.loads(publication.body)
            event(reply["status"])
            REPLIES.validate(reply)
            assert datetime.fromisoformat(reply["completed_at"]).utcoffset() == timedelta(0)
            _check_against_asyncapi(publication, "replies", "reply", status=reply["status"], source="billing")
        elif publication.exchange == "onenet.dead-letters":
            code = str((publication.properties.headers or {})["x-onenet-reason"])
            event(code)
            _check_against_asyncapi(publication, "deadLetters", "deadLetter", code=code)


@pytest.mark.parametrize(
    "changes",
    [
        {"uuid": None},
        {"uuid": ""},
        {"error": REPLY_EXAMPLES["failed"]["error"]},
        {"status": "failed", "uuid": None},
        {"status": "rejected", "uuid": None, "error": REPLY_EXAMPLES["failed"]["error"]},
        {"status": "failed", "uuid": None, "error": REPLY_EXAMPLES["rejected"]["error"]},
        {"status": "failed", "error": REPLY_EXAMPLES["failed"]["error"]},
        {"attempts": 0},
        {"imei": "1"},
        {"command_id": "a\n"},
    ],
    ids=str,
)
def test_an_inconsistent_reply_is_invalid(changes: dict[str, Any]) -> None:
    assert not REPLIES.is_valid(REPLY_EXAMPLES["accepted"] | changes)


@pytest.mark.parametrize("field", ["command_id", "imei"])
def test_a_reply_to_a_message_without_id_or_device_is_valid(field: str) -> None:
    reply = REPLY_EXAMPLES["failed"] | {field: None}
    REPLIES.validate(reply)
    _component("Reply").validate(reply)


def test_the_asyncapi_document_contains_the_published_schemas_and_valid_examples() -> None:
    for name, schema in (("Command", COMMAND), ("Reply", REPLY), ("Result", RESULT)):
        text = json.dumps({key: value for key, value in schema.items() if key not in ("$schema", "$id", "$defs")})
        published = json.loads(text.replace("#/$defs/", "#/components/schemas/"))
        found = dict(ASYNCAPI["components"]["schemas"][name])
        if name == "Command":
            trigger = published["properties"].pop("trigger_msg")
            found["properties"] = dict(found["properties"])
            one_form = found["properties"].pop("trigger_msg")
            assert one_form.pop("description").startswith(trigger["description"])
            assert one_form in trigger["oneOf"]
        assert found == published
    for message in ASYNCAPI["components"]["messages"].values():
        for example in message["examples"]:
            for part in ("headers", "payload"):
                if part in example and part in message and "$ref" in message[part]:
                    _component(message[part]["$ref"].rpartition("/")[2]).validate(example[part])


def test_generators_of_code_find_one_type_for_each_field_of_a_message_and_a_name_for_each_enumeration() -> None:
    """`make asyncapi` has one make models; this is why they are of use."""
    schemas = [ASYNCAPI["components"]["schemas"][name] for name in ("Command", "Reply", "Result", "Detail")]
    flat = [{key: value for key, value in schema.items() if key != "dependentSchemas"} for schema in schemas]
    fields = [field for inner in _subschemas(flat) for field in inner.get("properties", {}).values()]
    assert len(fields) > 30
    for field in fields:
        assert not field.keys() & {"anyOf", "oneOf", "allOf", "const"}
        assert isinstance(field["type"], str) or (len(field["type"]) == 2 and field["type"][1] == "null")
    named = [inner for inner in _subschemas(flat) if "enum" in inner or "object" in inner.get("type", ())]
    titles = [inner["title"] for inner in named]
    assert len(set(titles)) == len(titles) == 9


def test_the_description_of_a_reply_says_which_values_occur_together() -> None:
    for status in get_args(Status):
        assert f"\n- {status}: " in REPLY["description"]
