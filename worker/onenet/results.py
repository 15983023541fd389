"""What a device's command history says of accepted commands. Pure.

Source: the page of ``GET /nbiot/offline/history``; ``confirm_status`` is a word there and a number in the push.
"""

from collections.abc import Iterable
from datetime import UTC, datetime
from zoneinfo import ZoneInfo

from schemas.onenet import CONFIRM_STATUSES, UNKNOWN_FORM, ResultItem, whole_number
from worker.core.platform import CachedCommand
from worker.core.results import NO_STATE, EntryState
from worker.onenet.comparison import read_time

_KINDS = ("READ", "WRITE", "EXECUTE")  # a word in the history, its place here in a push
_NEVER = datetime.min.replace(tzinfo=UTC)


def state_of(entries: Iterable[ResultItem], zone: ZoneInfo) -> EntryState:
    """Return what all entries with one uuid say of its command.

    Args:
        entries: one as a rule, or none; entries that contradict each other say nothing of its state.
        zone: the zone of the platform's local time.
    """
    states = {_state_of(entry, zone) for entry in entries}
    if len({state.send_status for state in states}) != 1:
        return NO_STATE
    return max(states, key=_latest)  # the same each time, in whichever order they come


def cached_command(item: ResultItem, zone: ZoneInfo) -> CachedCommand:
    """Return what one entry says.

    Args:
        item: the entry.
        zone: the zone of the platform's local time.
    """
    return CachedCommand(
        item.cmd_uuid,
        _kind(item.type),
        _instant(item.create_time, zone),
        _instant(item.valid_time, zone),
        _instant(item.expired_time, zone),
        _state_of(item, zone),
    )


def _kind(shown: object) -> str | None:
    number = whole_number(shown)
    if number is not None:
        return _KINDS[number] if 0 <= number < len(_KINDS) else None
    return shown.upper() if isinstance(shown, str) and shown.upper() in _KINDS else None


def _latest(state: EntryState) -> tuple[datetime, datetime, str]:
    return state.confirmed_at or _NEVER, state.sent_at or _NEVER, state.confirm_status or ""


def _state_of(entry: ResultItem, zone: ZoneInfo) -> EntryState:
    return EntryState(
        whole_number(entry.send_status),
        _confirm_status(entry.confirm_status),
        _instant(entry.send_time, zone),
        _instant(entry.confirm_time, zone),
    )


def _confirm_status(shown: object) -> str | None:
    number = whole_number(shown)
    if number is not None:
        return CONFIRM_STATUSES[number] if 0 <= number < len(CONFIRM_STATUSES) else str(number)
    return shown if isinstance(shown, str) and shown.isprintable() and shown not in {"", UNKNOWN_FORM} else None


def _instant(shown: object, zone: ZoneInfo) -> datetime | None:
    """Return the instant of a time in the history; None where it has none, or may mean several."""
    found = read_time(shown, zone)
    if found is None or len(set(found.readings)) != 1:
        return None
    return found.readings[0].replace(tzinfo=zone).astimezone(UTC)
