"""Times as they travel: ISO 8601 to the second in, the platform's local time without an offset out."""

import re
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

from schemas.command import TIME_PATTERN

_FORM = re.compile(TIME_PATTERN.removesuffix("$") + r"\Z")  # Python's $ would let a line break pass
_DAY = timedelta(days=1)
_DURATION = re.compile(r"([0-9]{1,6})([smhd])\Z")
_UNITS = {"s": timedelta(seconds=1), "m": timedelta(minutes=1), "h": timedelta(hours=1), "d": _DAY}
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def parse_time(text: str, platform_zone: ZoneInfo) -> datetime:
    """Return the instant that a command's time names.

    Args:
        text: ``YYYY-MM-DDTHH:MM:SS``, with ``Z``, ``+HH``, ``+HHMM``, ``+HH:MM`` or nothing behind it.
        platform_zone: where a time without an offset is read.

    Raises:
        ValueError: not such a time, or no such day.
    """
    if not _FORM.match(text):
        raise ValueError("must be a time as YYYY-MM-DDTHH:MM:SS, with or without an offset")
    try:
        moment = datetime.fromisoformat(text)
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=platform_zone)
        # A day of room on both sides, so that no later conversion to another offset leaves the calendar.
        _ = moment.astimezone(UTC) - _DAY, moment.astimezone(UTC) + _DAY
    except (ValueError, OverflowError) as exc:
        raise ValueError("there is no such time") from exc
    return moment


def parse_duration(text: str) -> timedelta:
    """Read a whole number and a unit: ``90s``, ``15m``, ``2h`` or ``7d``.

    Raises:
        ValueError: it is not such a text.
    """
    found = _DURATION.match(text)
    if found is None:
        raise ValueError("must be a whole number and a unit, such as 90s, 15m, 2h or 7d")
    return int(found[1]) * _UNITS[found[2]]


def milliseconds(moment: datetime) -> int:
    """Return the milliseconds from 1970 to an instant, cut off as where a time is written with three digits."""
    return (moment - _EPOCH) // timedelta(milliseconds=1)


def platform_time(moment: datetime, platform_zone: ZoneInfo) -> str:
    """Return an instant as OneNET takes it: the platform's local time, without an offset."""
    return moment.astimezone(platform_zone).replace(tzinfo=None).isoformat(timespec="seconds")
