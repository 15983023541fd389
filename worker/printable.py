"""Text from outside, made safe to show: it can neither move a cursor, nor forge a line, nor hide a part of itself.

Everything that a person reads in a terminal passes through here: lines of the log, errors and the output of commands.
"""

import json
from datetime import UTC, datetime


def printable(text: str, *, keep: str = "") -> str:
    """Escape every character that is not printable, as Python does in string literals.

    These are the control characters (ESC, DEL and C1 among them), line and paragraph separators, marks that change the
    direction of writing, invisible characters, blanks other than the usual one, and halves of surrogate pairs.

    Args:
        text: the text.
        keep: characters to leave as they are, such as line breaks.
    """
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char in keep else char.encode("unicode_escape").decode() for char in text
    )


def printable_json(value: object) -> str:
    """Return a value as one line of JSON that is readable in every script, and printable."""
    text = json.dumps(value, ensure_ascii=False)
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in text)


def counted(count: int, noun: str) -> str:
    """Return a number with its noun: ``1 dead letter``, ``2,000 dead letters``."""
    return f"{count:,} {noun if count == 1 else _plural(noun)}"


def utc(moment: datetime | None) -> str | None:
    """Return an aware moment in UTC as ISO 8601, in the form of replies; None for None."""
    return None if moment is None else moment.astimezone(UTC).isoformat().replace("+00:00", "Z")


def _plural(noun: str) -> str:
    return f"{noun[:-1]}ies" if noun.endswith("ply") else f"{noun}s"
