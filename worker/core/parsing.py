"""From the bytes of a message to a command that may be sent, or to an error that names the field."""

import json
import re
from collections.abc import Sequence
from datetime import datetime
from typing import Literal, NoReturn
from zoneinfo import ZoneInfo

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from schemas.command import COMMAND, COMMAND_ID_PATTERN, MAX_ARGS_BYTES, MAX_BODY_BYTES
from schemas.reply import Detail
from worker.core.command import Command, product_name
from worker.core.envelope import Envelope, Task
from worker.core.json_faults import json_words
from worker.core.outcome import outcome_unknown
from worker.core.poison import is_quarantined
from worker.core.tenants import violations, was_never_sent
from worker.core.times import as_understood, parse_time, wrong_form
from worker.errors import InvalidCommand, InvalidMessage, RefusedInDoubt, UnusableCommand

_COMMAND_ID = re.compile(COMMAND_ID_PATTERN.removesuffix("$") + r"\Z")
_IMEI = re.compile(r"(?:[0-9]{15}|[0-9]{4})\Z")
_TRIGGER_BITS = {"REGISTER": 1, "UPDATE": 2, "NOTIFY": 4}
_IDENTIFIER = "must be a whole number from 0 to 65535"
# What each field must be, whatever is wrong with it; tests/core/test_parsing.py compares the limits with the schema.
_RULES = {
    "command_id": "must be a string of 1-128 of A-Za-z0-9._:-",
    "imei": "must be a string of 15 digits, or 4",
    "obj_id": _IDENTIFIER,
    "obj_inst_id": _IDENTIFIER,
    "res_id": _IDENTIFIER,
    "retry": "must be a whole number from 0 to 10",
    "timeout": "must be a whole number from 5 to 40 (seconds)",
    "trigger_msg": "must be a whole number from 1 to 7, or a list of REGISTER, UPDATE and NOTIFY, each at most once",
    "args": f"must be a string of at most {MAX_ARGS_BYTES} bytes in UTF-8",
    "product": "must be a string",
}
_TIMES: tuple[Literal["expired_time", "valid_time"], ...] = ("expired_time", "valid_time")
_KINDS: dict[type, str] = {
    type(None): "null", bool: "true or false", int: "a number", float: "a number with a fraction or an exponent",
    str: "a string", list: "a list", dict: "an object",
}  # fmt: skip
_OTHER_KIND = frozenset({"string_type", "int_type"})
# What Python's decoder says, and what it means; its words are no interface.
_MAX_DETAILS = 20
_MAX_FIELD_CHARS = 100


def read_task(
    envelope: Envelope,
    body: bytes,
    platform_zone: ZoneInfo,
    arrived_at: float,
    *,
    size: int = 0,
    is_readable: bool = True,
    is_isolated: bool = False,
) -> Task:
    """Return what a delivery carries, unless parsing it may be what crashes workers.

    Args:
        envelope: what the delivery says of itself.
        body: the message's body.
        platform_zone: where times without an offset are read.
        arrived_at: when it arrived, monotonic.
        size: how much memory the message takes, in bytes.
        is_readable: the body is short enough to be parsed.
        is_isolated: the upstream systems do not trust each other.
    """
    if is_quarantined(envelope) and is_readable:
        return Task(envelope, None, arrived_at, size)
    try:
        command = read_command(body, envelope.message_id, platform_zone, envelope.app_id)
        if is_isolated and (found := violations(envelope)):
            raise _refused(envelope, found, command)
        return Task(envelope, command, arrived_at, size)
    except UnusableCommand as exc:
        # Its traceback would keep the body, which may be large, until the garbage collector runs.
        exc.__traceback__ = exc.__cause__ = exc.__context__ = None
        return Task(envelope, exc, arrived_at, size)


def read_command(body: bytes, message_id: object, platform_zone: ZoneInfo, app_id: str = "") -> Command:
    """Return the command that a message carries.

    Args:
        body: the message's body.
        message_id: the AMQP property of that name, None where it is not set.
        platform_zone: where times without an offset are read.
        app_id: the upstream system that sent it; empty where the message names none.

    Raises:
        InvalidMessage: the body is no JSON object.
        InvalidCommand: a field breaks its rule.
    """
    try:
        fields = _parse(body)
    except InvalidMessage as exc:
        exc.command_id = as_command_id(message_id)
        raise
    command_id, details = _command_id(fields, message_id)
    imei = fields.get("imei")
    known_imei = imei if isinstance(imei, str) and _IMEI.match(imei) else None

    def invalid(found: Sequence[Detail]) -> NoReturn:
        raise _invalid_command(found, command_id, known_imei)

    try:
        command = COMMAND.validate_python(fields)
    except ValidationError as exc:
        found = _details(exc, fields)
        invalid(found + [detail for detail in details if detail.field not in {item.field for item in found}])
    times = dict[str, datetime]()
    for name in _TIMES:
        if name in command:
            try:
                times[name] = parse_time(str(command[name]), platform_zone)
            except ValueError as exc:
                details.append(Detail(field=name, message=str(exc)))
    valid_at = times.get("valid_time")
    if valid_at is not None and "expired_time" in times and times["expired_time"] <= valid_at:
        expired, valid = as_understood(times["expired_time"]), as_understood(valid_at)
        message = f"must be later than valid_time: it was read as {expired}, and valid_time as {valid}"
        details.append(Detail(field="expired_time", message=message))
    if details or command_id is None:
        invalid(details)
    trigger = command.get("trigger_msg")
    return Command(
        command_id=command_id,
        imei=command["imei"],
        obj_id=command["obj_id"],
        obj_inst_id=command["obj_inst_id"],
        res_id=command["res_id"],
        expires_at=times["expired_time"],
        valid_at=valid_at,
        retry=command.get("retry"),
        timeout=command.get("timeout"),
        trigger_msg=sum(_TRIGGER_BITS[name] for name in trigger) if isinstance(trigger, list) else trigger,
        args=command.get("args"),
        product=product_name(command.get("product")),
        app_id=app_id,
    )


def as_command_id(value: object) -> str | None:
    """Return a value if it can be a command's id."""
    return value if isinstance(value, str) and _COMMAND_ID.match(value) else None


def _invalid_command(found: Sequence[Detail], command_id: str | None, imei: str | None) -> InvalidCommand:
    return InvalidCommand(_text(found), tuple(found), command_id=command_id, imei=imei)


def _refused(envelope: Envelope, found: Sequence[Detail], command: Command) -> UnusableCommand:
    """Return why a command is refused whose sender claims what it may not.

    Neither its record nor its history is read, not even if it may have been sent: the sender who claims to be another
    would get the answer of the other's command.
    """
    if was_never_sent(envelope):
        return _invalid_command(found, command.command_id, command.imei)
    text = outcome_unknown(f"it is not sent any more: {_text(found)}").message
    return RefusedInDoubt(text, tuple(found), command_id=command.command_id, imei=command.imei)


def _text(found: Sequence[Detail]) -> str:
    return "; ".join(f"{detail.field}: {detail.message}" if detail.field else detail.message for detail in found)


def _command_id(fields: dict[str, object], message_id: object) -> tuple[str | None, list[Detail]]:
    """Return the id, from the body or else the property, and what is wrong with the two."""
    from_property = as_command_id(message_id)
    from_body = as_command_id(fields.get("command_id"))
    if message_id is not None and from_property is None:
        message = "the AMQP property message_id must be 1-128 of A-Za-z0-9._:-"
    elif message_id is not None and "command_id" in fields and from_body != from_property:
        message = "must be the same as the AMQP property message_id"
    elif message_id is None and "command_id" not in fields:
        message = "is required unless the AMQP property message_id is set"
    else:
        return from_body or from_property, []
    return from_body or from_property, [Detail(field="command_id", message=message)]


class _NoNumber:
    """Stands for NaN and the infinities, which Python's parser reads and JSON does not have."""

    def __init__(self, text: str) -> None:
        self.text = text


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields: dict[str, object] = {}
    for name, value in pairs:
        if name in fields:
            raise _invalid_message(name, "stands in the object twice")
        for item in value if isinstance(value, list) else (value,):
            if isinstance(item, _NoNumber):
                raise _invalid_message(name, f"{item.text} is not JSON")
        fields[name] = value
    return fields


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_NoNumber)


def _invalid_message(field: str, message: str) -> InvalidMessage:
    field = _printable(field)
    return InvalidMessage(f"{field}: {message}" if field else message, (Detail(field=field, message=message),))


def _parse(body: bytes) -> dict[str, object]:
    if len(body) > MAX_BODY_BYTES:
        raise _invalid_message("", f"the body has more than {MAX_BODY_BYTES} bytes")
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise _invalid_message("", f"the body is not UTF-8: byte {exc.start + 1}") from exc
    if not text.strip():
        raise _invalid_message("", "the body is empty")
    if text.startswith("\ufeff"):
        raise _invalid_message("", "the body is not JSON: it begins with a byte order mark")
    try:
        found = _DECODER.decode(text)
    except json.JSONDecodeError as exc:
        raise _invalid_message("", f"the body is not JSON: {_json_error(exc)}") from exc
    except (RecursionError, ValueError) as exc:  # nested too deep; an integer of thousands of digits
        raise _invalid_message("", "the body is not JSON that can be read: too deep, or a number too long") from exc
    if not isinstance(found, dict):
        raise _invalid_message("", "the body is not a JSON object")
    return found


def _json_error(error: json.JSONDecodeError) -> str:
    line = f"line {error.lineno}, " if "\n" in error.doc.strip() else ""
    return f"{line}column {error.colno}: {json_words(error)}"


def _details(error: ValidationError, fields: dict[str, object]) -> list[Detail]:
    """One detail per error, named by the top-level field, without the value that was given unless it is a time."""
    details: dict[str, Detail] = {}
    for item in error.errors(include_input=False, include_url=False, include_context=False)[:_MAX_DETAILS]:
        name = str(item["loc"][0]) if item["loc"] else ""
        # A list may have several errors, which are all told by the field's rule.
        details.setdefault(name, Detail(field=_printable(name), message=_message(item, name, fields)))
    return list(details.values())


def _message(error: ErrorDetails, name: str, fields: dict[str, object]) -> str:
    match error["type"]:
        case "missing":
            return "is required"
        case "extra_forbidden":
            return "is not a field of a command"
        case "value_error":
            return error["msg"].removeprefix("Value error, ")  # our own words
    if name in _TIMES:
        return wrong_form(fields[name])
    if error["type"] == "string_unicode":
        return f"{'must' if name else 'the name of a field must'} not contain a lone surrogate: UTF-8 cannot encode it"
    is_item = isinstance(error["loc"][-1], int)
    other = f", not {_KINDS[type(fields[name])]}" if error["type"] in _OTHER_KIND and not is_item else ""
    return f"{_RULES[name]}{other}"


def _printable(field: str) -> str:
    """Cut a field's name to what a header and a log line can carry; a lone surrogate fits neither."""
    return field[:_MAX_FIELD_CHARS].encode("utf-8", "replace").decode()
