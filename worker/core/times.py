"""Times in messages (ISO 8601, to the second) and in requests (the platform's local time, without an offset)."""

import re
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

from schemas.command import TIME_PATTERN

_FORM = re.compile(TIME_PATTERN.removesuffix("$") + r"\Z")  # Python's $ also matches before a trailing line break
_DAY = timedelta(days=1)
_DURATION = re.compile(r"([0-9]{1,6})([smhd])\Z")
_UNITS = {"s": timedelta(seconds=1), "m": timedelta(minutes=1), "h": timedelta(hours=1), "d": _DAY}
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_LAST = datetime.max.replace(tzinfo=UTC)


def parse_time(text: str, platform_zone: ZoneInfo) -> datetime:
    """Return the instant of a time in a command.

    Args:
        text: ``YYYY-MM-DDTHH:MM:SS``, followed by ``Z``, ``+HH``, ``+HHMM``, ``+HH:MM`` or nothing.
        platform_zone: the zone of a time without an offset.

    Raises:
        ValueError: the text has another form, or there is no such time.
    """
    if not _FORM.match(text):
        raise ValueError("must be a time as YYYY-MM-DDTHH:MM:SS, with or without an offset")
    try:
        moment = datetime.fromisoformat(text)
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=platform_zone)
        # With a day of margin on both sides no later conversion to another offset can overflow.
        _ = moment.astimezone(UTC) - _DAY, moment.astimezone(UTC) + _DAY
    except (ValueError, OverflowError) as exc:
        raise ValueError("there is no such time") from exc
    return moment


def parse_instant(text: str) -> datetime:
    """Return the instant of an ISO 8601 time with an offset, in UTC.

    Raises:
        ValueError: the text has another form, or there is no such time.
    """
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        raise ValueError("must have an offset")
    try:
        instant = moment.astimezone(UTC)
        _ = instant - _DAY, instant + _DAY  # as in parse_time
    except OverflowError as exc:
        raise ValueError("there is no such time") from exc
    return instant


def parse_duration(text: str) -> timedelta:
    """Read a duration, a whole number and a unit: ``90s``, ``15m``, ``2h`` or ``7d``.

    Raises:
        ValueError: the text has another form.
    """
    found = _DURATION.match(text)
    if found is None:
        raise ValueError("must be a whole number and a unit, such as 90s, 15m, 2h or 7d")
    return int(found[1]) * _UNITS[found[2]]


def after(moment: datetime, wait: timedelta) -> datetime:
    """Return the moment after a wait, in UTC; the last there is, should it come later than the year 9999."""
    try:
        return moment.astimezone(UTC) + wait
    except OverflowError:
        return _LAST


def milliseconds(moment: datetime) -> int:
    """Return the whole milliseconds from 1970 to an instant, rounded down."""
    return (moment - _EPOCH) // timedelta(milliseconds=1)


def platform_time(moment: datetime, platform_zone: ZoneInfo) -> str:
    """Return an instant in OneNET's form: the platform's local time, without an offset."""
    return moment.astimezone(platform_zone).replace(tzinfo=None).isoformat(timespec="seconds")
