"""Dead letters as JSON and as text for a terminal."""

import base64
from datetime import UTC, datetime
from typing import Any

from worker.amqp.field_table import RawFieldValue, decoded
from worker.dead_letters.letter import DeadLetter, Listing


def summary(dead_letter: Listing) -> dict[str, Any]:
    """Return the fields that a list shows, ready for JSON."""
    return {
        "command_id": dead_letter.command_id,
        "reason": dead_letter.reason,
        "error": dead_letter.error,
        "failed_at": utc(dead_letter.failed_at),
        "device": dead_letter.imei,
        "source": dead_letter.source,
        "expires_at": utc(dead_letter.expires_at),
    }


def details(dead_letter: DeadLetter) -> dict[str, Any]:
    """Return the whole message, ready for JSON; a body that is not UTF-8 is encoded in base64."""
    given = {name: value for name, value in vars(dead_letter.properties).items() if value is not None}
    headers = {str(_plain(name)): _plain(decoded(value)) for name, value in given.pop("headers", {}).items()}
    properties = {name: _plain(value) for name, value in given.items()}
    try:
        body = {"body": dead_letter.body.decode()}
    except UnicodeDecodeError:
        body = {"body_base64": base64.b64encode(dead_letter.body).decode()}
    routing_key = {"routing_key": dead_letter.routing_key}
    return summary(dead_letter.listing) | routing_key | {"properties": properties, "headers": headers} | body


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
