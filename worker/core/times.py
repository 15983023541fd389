"""Times in messages (ISO 8601, to whole seconds) and in requests (the platform's local time, without an offset)."""

import re
from datetime import UTC, datetime, timedelta, timezone
from zoneinfo import ZoneInfo

from schemas.command import TIME_PATTERN
from worker.printable import printable

_FORM = re.compile(TIME_PATTERN.removesuffix("$") + r"\Z")  # Python's $ also matches before a trailing line break
_FRACTION = re.compile(r"\.[0-9]+")
_MAX_SHOWN_CHARS = 40
_DAY = timedelta(days=1)
_DURATION = re.compile(r"([0-9]{1,6})([smhd])\Z")
_UNITS = {"s": timedelta(seconds=1), "m": timedelta(minutes=1), "h": timedelta(hours=1), "d": _DAY}
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_LAST = datetime.max.replace(tzinfo=UTC)


def parse_time(text: str, platform_zone: ZoneInfo) -> datetime:
    """Return the instant of a time in a command, to the second: the platform takes no fraction, so it is cut off.

    Args:
        text: ``YYYY-MM-DDTHH:MM:SS``, perhaps with a fraction, followed by ``Z``, ``+HH``, ``+HHMM``, ``+HH:MM`` or
            nothing.
        platform_zone: the zone of a time without an offset.

    Raises:
        ValueError: the text has another form, or there is no such time.
    """
    if not _FORM.match(text):
        raise ValueError(wrong_form(text))
    try:
        moment = datetime.fromisoformat(_FRACTION.sub("", text))
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=platform_zone)
        # With a day of margin on both sides no later conversion to another offset can overflow.
        _ = moment.astimezone(UTC) - _DAY, moment.astimezone(UTC) + _DAY
    except (ValueError, OverflowError) as exc:
        raise ValueError(f"there is no such time: {text}") from exc
    return moment


def wrong_form(text: object) -> str:
    """Return what is wrong with a time that has another form, for people."""
    shown = f", not '{printable(text[:_MAX_SHOWN_CHARS])}'" if isinstance(text, str) else ""
    return f"must be a time such as 2026-11-30T08:00:00, 2026-11-30T08:00:00Z or 2026-11-30T08:00:00+08:00{shown}"


def as_understood(moment: datetime) -> str:
    """Return an instant of a command for people, with the zone in which it was read: ``2026-11-30 08:00:00 +08:00``."""
    text = moment.isoformat(sep=" ", timespec="seconds")
    zone = f" (ONENET_TIMEZONE {moment.tzinfo.key})" if isinstance(moment.tzinfo, ZoneInfo) else ""
    return f"{text[:19]} {text[19:]}{zone}"


def why_expired(expires_at: datetime, now: datetime) -> str:
    """Return for people why a command counts as expired.

    Args:
        expires_at: as it was read from the command.
        now: the time on the platform's clock, aware.
    """
    is_local = isinstance(expires_at.tzinfo, ZoneInfo)
    given = f"{expires_at.replace(tzinfo=None).isoformat()} was read as " if is_local else ""
    clock = as_understood(now.astimezone(timezone(expires_at.utcoffset() or timedelta())))
    return f"has passed: {given}{as_understood(expires_at)}; it was {clock} by the platform's clock"


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
