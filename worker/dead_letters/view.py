"""Dead letters as JSON and as text for a terminal."""

import json
from datetime import datetime
from typing import Any

from worker.amqp.bodies import body_document
from worker.amqp.field_table import RawFieldValue, decoded
from worker.dead_letters.groups import Group
from worker.dead_letters.letter import DeadLetter, Listing
from worker.printable import utc


def summary(dead_letter: Listing) -> dict[str, Any]:
    """Return the fields that a list shows, ready for JSON."""
    return {
        "digest": dead_letter.digest,
        "command_id": dead_letter.command_id,
        "reason": dead_letter.reason,
        "error": dead_letter.error,
        "failed_at": utc(dead_letter.failed_at),
        "imei": dead_letter.imei,
        "source": dead_letter.source,
        "expires_at": utc(dead_letter.expires_at),
    }


def details(dead_letter: DeadLetter, now: datetime) -> dict[str, Any]:
    """Return the whole message, ready for JSON; for its body see ``body_document``."""
    given = {name: value for name, value in vars(dead_letter.properties).items() if value is not None}
    headers = {str(_plain(name)): _plain(decoded(value)) for name, value in given.pop("headers", {}).items()}
    properties = {name: _plain(value) for name, value in given.items()}
    routing_key = {"routing_key": dead_letter.routing_key}
    known = summary(dead_letter.listing(now)) | routing_key | {"properties": properties, "headers": headers}
    return known | body_document(dead_letter.body)


def group(found: Group) -> dict[str, Any]:
    """Return a group of dead letters, ready for JSON."""
    return {
        "count": found.count,
        "reason": found.reason,
        "error": found.error,
        "oldest_at": utc(found.oldest),
        "newest_at": utc(found.newest),
        "example_digest": found.example,
    }


def text_of(dead_letter: DeadLetter) -> str:
    """Return the body for people: JSON with one field in a line, and any other body with its odd bytes escaped."""
    if dead_letter.is_json:
        return json.dumps(json.loads(dead_letter.body), indent=2, ensure_ascii=False)
    return dead_letter.body.decode(errors="backslashreplace")


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
