"""Times as they travel: ISO 8601 to the second in, the platform's local time without an offset out."""

import re
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

from schemas.command import TIME_PATTERN

_FORM = re.compile(TIME_PATTERN.removesuffix("$") + r"\Z")  # Python's $ would let a line break pass
_DAY = timedelta(days=1)


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


def platform_time(moment: datetime, platform_zone: ZoneInfo) -> str:
    """Return an instant as OneNET takes it: the platform's local time, without an offset."""
    return moment.astimezone(platform_zone).replace(tzinfo=None).isoformat(timespec="seconds")
