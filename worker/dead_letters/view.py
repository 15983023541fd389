"""Dead letters as JSON and as text for a terminal."""

import base64
import codecs
import json
from datetime import UTC, datetime
from typing import Any

from worker.amqp.bodies import TruncatedBody
from worker.amqp.field_table import RawFieldValue, decoded
from worker.dead_letters.groups import Group
from worker.dead_letters.letter import DeadLetter, Listing


def summary(dead_letter: Listing) -> dict[str, Any]:
    """Return the fields that a list shows, ready for JSON."""
    return {
        "digest": dead_letter.digest,
        "command_id": dead_letter.command_id,
        "reason": dead_letter.reason,
        "error": dead_letter.error,
        "failed_at": utc(dead_letter.failed_at),
        "device": dead_letter.imei,
        "source": dead_letter.source,
        "expires_at": utc(dead_letter.expires_at),
    }


def details(dead_letter: DeadLetter, now: datetime) -> dict[str, Any]:
    """Return the whole message, ready for JSON; a body that is not UTF-8 is encoded in base64.

    A body that was cut because it is too large for a command says so: ``is_body_cut``.
    """
    given = {name: value for name, value in vars(dead_letter.properties).items() if value is not None}
    headers = {str(_plain(name)): _plain(decoded(value)) for name, value in given.pop("headers", {}).items()}
    properties = {name: _plain(value) for name, value in given.items()}
    routing_key = {"routing_key": dead_letter.routing_key}
    known = summary(dead_letter.listing(now)) | routing_key | {"properties": properties, "headers": headers}
    return known | _body(dead_letter.body)


def group(found: Group) -> dict[str, Any]:
    """Return a group of dead letters, ready for JSON."""
    return {
        "count": found.count,
        "reason": found.reason,
        "error": found.error,
        "oldest": utc(found.oldest),
        "newest": utc(found.newest),
        "example": found.example,
    }


def text_of(dead_letter: DeadLetter) -> str:
    """Return the body for people: JSON with one field in a line, and any other body with its odd bytes escaped."""
    if dead_letter.is_json:
        return json.dumps(json.loads(dead_letter.body), indent=2, ensure_ascii=False)
    return dead_letter.body.decode(errors="backslashreplace")


def _body(body: bytes) -> dict[str, Any]:
    cut = {"is_body_cut": True} if isinstance(body, TruncatedBody) else {}
    try:
        # Of a body that was cut, half a character may be the end.
        text = codecs.getincrementaldecoder("utf-8")().decode(body, final=not cut)
    except UnicodeDecodeError:
        return {"body_base64": base64.b64encode(body).decode(), **cut}
    return {"body": text, **cut}


def utc(moment: datetime | None, timespec: str = "milliseconds") -> str | None:
    """Return a moment in UTC as ISO 8601, or None for None."""
    return None if moment is None else moment.astimezone(UTC).isoformat(timespec=timespec)


def _plain(value: Any) -> Any:
    """Convert a property or header to types that JSON has."""
    match value:
        case bytes():
            return value.decode(errors="backslashreplace")
        case dict():
            return {str(_plain(name)): _plain(item) for name, item in value.items()}
        case list():
            return [_plain(item) for item in value]
        case None | bool() | int() | float() | str():
            return value
        case RawFieldValue(moment=datetime() as moment):
            return utc(moment)
        case RawFieldValue(text=str() as text):
            return text
        case _:
            return str(value)
