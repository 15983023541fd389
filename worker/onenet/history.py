"""What a device's command history says about a command in doubt. Pure.

Source: the pages of ``GET /nbiot/offline/history`` and ``GET /nbiot/offline/history/{uuid}``.
"""

import re
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal, TypeVar
from zoneinfo import ZoneInfo

from pydantic import BaseModel, ValidationError

from schemas.onenet import HistoryDetail, HistoryItem, HistoryPage, ResultPage, may_have_entries, whole_number
from worker.core.command import PLATFORM_DEFAULTS, Command
from worker.core.platform import Candidate
from worker.errors import HistoryUnreadable
from worker.onenet.answers import history_error, read_answer
from worker.onenet.comparison import (
    LWM2M_IDS,
    ShownTime,
    Verdict,
    compare_content,
    compare_imei,
    compare_number,
    compare_parameter,
    compare_time,
    compare_type,
    compare_valid_time,
    is_absent,
    overall,
    read_time,
)
from worker.onenet.dialect import Dialect
from worker.onenet.errno import SUCCESS
from worker.onenet.response import Response
from worker.onenet.unambiguous_json import may_repeat_names

PER_PAGE = 100  # the platform's maximum
MAX_PAGES = 100
USUAL_SKEW = timedelta(seconds=5)  # of two synchronized clocks, with times truncated to the second
MAX_SKEW = timedelta(seconds=60)  # of unsynchronized clocks: a match within it, and not USUAL_SKEW, decides nothing

_ZONE_STEP = timedelta(hours=1)  # between neighbouring time zones

_ENTRY_BYTES = 150  # what an entry takes beside its key and its values
_WAITS = 1  # send_status: waiting
_FINAL = {2, 4, 5, 6}  # cancelled, expired, success, failed
_RANGES = {"retry": range(11), "timeout": range(5, 41), "trigger_msg": range(1, 8)}
_RUN_DOWN = {"retry", "timeout"}  # the history may show how much of them is left
# Half of a surrogate pair, which a serializer leaves where it truncates a text.
_LONE_SURROGATE = re.compile(
    r"\\\\|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(\\u[dD][89a-fA-F][0-9a-fA-F]{2})"
)

Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Window:
    """When the platform can have cached the command in doubt.

    Attributes:
        since: the beginning; None: unknown, so any earlier time is possible.
        until: the end.
        read_at: when the history was read, on the platform's clock.
        ahead_s: the most seconds by which the platform's clock may have been ahead of ours, at least 0.
        behind_s: the most seconds by which it may have been behind, at least 0.
    """

    since: datetime | None
    until: datetime
    read_at: datetime
    ahead_s: float = 0.0
    behind_s: float = 0.0

    def is_within(self, moment: datetime, allowed: timedelta, latest: datetime | None = None) -> bool:
        """Tell whether a time lies in the window, if the clocks differ by at most ``allowed``.

        Args:
            moment: the time; of a time that is not known to the second, the earliest possible one.
            allowed: the greatest difference of the clocks.
            latest: of a time that is not known to the second, the latest possible one.
        """
        begin = None if self.since is None else self.since - timedelta(seconds=self.behind_s) - allowed
        is_late_enough = begin is None or begin <= (moment if latest is None else latest)
        return is_late_enough and moment <= self.until + timedelta(seconds=self.ahead_s) + allowed

    def distance(self, moment: datetime) -> timedelta:
        """Return the distance of a time from the beginning of the window, or from its end if it has no beginning."""
        return abs(moment - (self.until if self.since is None else self.since))


class HistoryPages:
    """Follows the pages of one history. It keeps only what tells whether an entry is new: the keys of all entries."""

    def __init__(self) -> None:
        self._keys: dict[str, None] = {}  # a set takes up to three times as much
        self._keys_bytes = 0
        self._total = 0
        self._page_count = 0
        self._is_last_full = False

    @property
    def held_bytes(self) -> int:
        """What the keys take."""
        return self._keys_bytes + sys.getsizeof(self._keys)

    @property
    def total(self) -> int:
        """How many entries the platform says that there are."""
        return self._total

    @property
    def is_complete(self) -> bool:
        """Tell whether there is no further page."""
        # A full page may be followed by another, whatever the total says: it may be the number of entries on the page.
        return len(self._keys) >= self._total and not self._is_last_full

    def add(self, page: HistoryPage) -> list[HistoryItem]:
        """Add the next page; returns its entries that were on none before.

        Raises:
            HistoryUnreadable: the page has no new entry although some are missing, or has more entries than the total;
                or there are too many pages.
        """
        known = len(self._keys)
        if len(page.items) > page.total_count:
            raise HistoryUnreadable(f"a page has {len(page.items)} of {page.total_count} entries")
        new = self.take(page)
        if not new and not self.is_complete:
            raise HistoryUnreadable(f"only {known} of {self._total} entries can be read")
        return new

    def take(self, page: HistoryPage) -> list[HistoryItem]:
        """Add the next page as it is, though entries may be missing; returns its entries that were on none before.

        Raises:
            HistoryUnreadable: there are too many pages.
        """
        self._total = max(self._total, page.total_count)
        new = []
        for place, item in enumerate(page.items):
            # An entry without a uuid is keyed by its position on the page, so that a repeated page has no new entry.
            key = item.cmd_uuid or f"{place} {item!r}"
            if key not in self._keys:
                new.append(item)
                self._keys[key] = None
                self._keys_bytes += sys.getsizeof(key)
        self._page_count += 1
        self._is_last_full = bool(new) and len(page.items) >= PER_PAGE
        if self._page_count == MAX_PAGES and not self.is_complete:
            raise HistoryUnreadable(f"it has more than {MAX_PAGES} pages")
        return new


def held_bytes(item: HistoryItem) -> int:
    """Return how many bytes an entry takes beside its uuid, which is its key; its fields are short."""
    values = (item.type, item.create_time, item.valid_time, item.expired_time, item.trigger_msg, item.send_status)
    return _ENTRY_BYTES + sum(map(sys.getsizeof, values))


def read_page(response: Response, dialect: Dialect) -> HistoryPage:
    """Read one page of a history.

    Raises:
        HistoryUnreadable: the response is not a page, or reports an error.
    """
    return _read(HistoryPage, response, dialect)


def read_result_page(response: Response, dialect: Dialect) -> ResultPage:
    """Read one page of a history, with what became of its commands.

    Raises:
        HistoryUnreadable: the response is not a page, or reports an error.
    """
    return _read(ResultPage, response, dialect)


def read_cancelling(response: Response, dialect: Dialect) -> str | None:
    """Read the answer to a request to cancel; returns why the platform refuses it, None if it does not say so.

    What an answer says is never enough: the state afterwards decides.

    Raises:
        HistoryUnreadable: the platform failed, throttles, or refuses the credentials, or this is not its answer.
    """
    answer = read_answer(response.body, dialect, is_strict=False)
    if answer is None:
        raise HistoryUnreadable(f"the response is not OneNET's JSON: {response.description}", is_outage=True)
    if answer.dialect is not dialect:
        raise history_error(response, answer, dialect, asked_s=None)
    if answer.code == SUCCESS:
        return None
    error = history_error(response, answer, dialect, asked_s=None)
    if error.is_outage or error.is_refused or error.is_throttled:
        raise error
    return str(error)


def read_detail(response: Response, dialect: Dialect) -> HistoryDetail:
    """Read the details of one entry.

    Raises:
        HistoryUnreadable: the response is not an entry's details, or reports an error.
    """
    return _read(HistoryDetail, response, dialect)


def candidates(items: Iterable[HistoryItem], command: Command, window: Window, zone: ZoneInfo) -> list[HistoryItem]:
    """Return the entries that may be the command, by the fields of the list alone, the best first."""
    expires_at = _local(command.expires_at, zone)
    found = []
    for item in items:
        created = read_time(item.create_time, zone)
        verdicts = [compare_type(item.type), _compare_creation(created, window, MAX_SKEW, zone)]
        if not is_absent(item.expired_time):
            verdicts.append(compare_time(expires_at, item.expired_time, zone))
        if overall(verdicts) is not Verdict.DIFFERENT:
            distances = [window.distance(moment) for moment in _moments(created, zone)]
            found.append((min(distances, default=timedelta.max), item))
    return [item for _, item in sorted(found, key=lambda each: each[0])]


def is_waiting(item: HistoryItem, now: datetime, zone: ZoneInfo) -> bool:
    """Tell whether an entry may still wait for its device.

    Args:
        item: an entry of the list.
        now: the time on the platform's clock, aware.
        zone: the zone of the platform's local time.
    """
    status = whole_number(item.send_status)
    if status == _WAITS or status in _FINAL:
        return status == _WAITS
    expires = _moments(read_time(item.expired_time, zone), zone)
    return not expires or max(expires) > now


def match(
    item: HistoryItem,
    detail: HistoryDetail,
    command: Command,
    window: Window,
    zone: ZoneInfo,
    *,
    omitted_until: datetime,
) -> Candidate | None:
    """Return the entry as a candidate; None: a field certainly differs from the command's.

    Args:
        item: the entry as the list has it.
        detail: the entry's details.
        command: the command in doubt.
        window: when the platform can have cached it.
        zone: the zone of the platform's local time.
        omitted_until: the latest ``valid_time`` that may have been left out of the request.
    """
    args = detail.args
    expires_at = _local(command.expires_at, zone)
    valid_at = None if command.valid_at is None else _local(command.valid_at, zone)
    creation, created = _place(read_time(item.create_time, zone), window, MAX_SKEW, zone)
    may_be_omitted = command.valid_at is not None and command.valid_at <= omitted_until

    def compare_optional(name: Literal["retry", "timeout", "trigger_msg"], shown: object) -> Verdict:
        sent, default = getattr(command, name), PLATFORM_DEFAULTS[name]
        return compare_parameter(sent, shown, _RANGES[name], default, may_show_rest=name in _RUN_DOWN)

    def compare_valid(shown: object) -> Verdict:
        return compare_valid_time(valid_at, shown, created, zone, may_be_omitted=may_be_omitted)

    valid_time = compare_valid(args.get("valid_time"))
    if is_absent(args.get("valid_time")) and valid_time is Verdict.UNCLEAR:
        valid_time = compare_valid(item.valid_time)  # which the platform fills in for a command without one
    verdicts = {
        "type": compare_type(item.type),
        "create_time": creation,
        "imei": compare_imei(command.imei, args.get("imei")),
        "obj_id": compare_number(command.obj_id, args.get("obj_id"), LWM2M_IDS),
        "obj_inst_id": compare_number(command.obj_inst_id, args.get("obj_inst_id"), LWM2M_IDS),
        "res_id": compare_number(command.res_id, args.get("res_id"), LWM2M_IDS),
        "expired_time": compare_time(expires_at, _first(args.get("expired_time"), item.expired_time), zone),
        "valid_time": valid_time,
        "retry": compare_optional("retry", args.get("retry")),
        "timeout": compare_optional("timeout", args.get("timeout")),
        "trigger_msg": compare_optional("trigger_msg", _first(args.get("trigger_msg"), item.trigger_msg)),
        "args": compare_content(command.args, detail.content),
    }
    if overall(verdicts.values()) is Verdict.DIFFERENT:
        return None
    unclear = tuple(name for name, verdict in verdicts.items() if verdict is Verdict.UNCLEAR)
    is_within_clock_skew = not unclear and _compare_creation(created, window, USUAL_SKEW, zone) is Verdict.EQUAL
    omitted = valid_at is not None and compare_time(valid_at, args.get("valid_time"), zone) is not Verdict.EQUAL
    return Candidate(item.cmd_uuid, is_within_clock_skew, omitted, unclear)


def _compare_creation(created: ShownTime | None, window: Window, allowed: timedelta, zone: ZoneInfo) -> Verdict:
    """Compare the creation time of an entry with the window."""
    verdict, _ = _place(created, window, allowed, zone)
    return verdict


def _place(
    created: ShownTime | None, window: Window, allowed: timedelta, zone: ZoneInfo
) -> tuple[Verdict, ShownTime | None]:
    """Compare the creation time of an entry with the window; returns it in the reading that lies in the window.

    A time that lies in it only in another reading than as written is unclear.
    """
    if created is None:
        return Verdict.UNCLEAR, None
    if _is_within(created, window, allowed, zone):
        return (Verdict.UNCLEAR if created.uncertainty else Verdict.EQUAL), created
    for reading in created.alternatives(zone):
        if _is_within(reading, window, allowed, zone):
            return Verdict.UNCLEAR, reading
    # Created long after it was read: it is in another zone's time, or otherwise not what it seems.
    is_impossible = all(moment > window.read_at + _ZONE_STEP for moment in _moments(created, zone))
    return Verdict.UNCLEAR if is_impossible else Verdict.DIFFERENT, created


def _is_within(shown: ShownTime, window: Window, allowed: timedelta, zone: ZoneInfo) -> bool:
    moments = [
        (moment.replace(tzinfo=zone), (moment + shown.uncertainty).replace(tzinfo=zone)) for moment in shown.readings
    ]
    return any(window.is_within(first, allowed, last) for first, last in moments)


def _moments(shown: ShownTime | None, zone: ZoneInfo) -> list[datetime]:
    """Return the instants that a shown time may mean: the earliest and the latest of each reading."""
    if shown is None:
        return []
    moments = [moment + more for moment in shown.readings for more in {timedelta(0), shown.uncertainty}]
    return [moment.replace(tzinfo=zone) for moment in moments]


def _local(moment: datetime, zone: ZoneInfo) -> datetime:
    """Return a time in the form in which it was sent: the platform's local time, without an offset."""
    return moment.astimezone(zone).replace(tzinfo=None)


def _first(shown: object, otherwise: object) -> object:
    return otherwise if is_absent(shown) else shown


def _read(model: type[Model], response: Response, dialect: Dialect) -> Model:
    text = response.body.decode("utf-8", "replace")
    text = _LONE_SURROGATE.sub(lambda found: r"\ufffd" if found[1] else found[0], text)
    answer = read_answer(text, dialect, is_strict=False)
    if answer is None and may_repeat_names(text):
        raise HistoryUnreadable(f"its JSON has a name twice, or too many values: {response.description}")
    if answer is None:  # other devices' histories cannot be read either
        raise HistoryUnreadable(f"the response is not OneNET's JSON: {response.description}", is_outage=True)
    if answer.code != SUCCESS or answer.dialect is not dialect:
        raise history_error(response, answer, dialect, asked_s=None)
    if any(map(may_have_entries, answer.others.values())):
        raise HistoryUnreadable(f"it may have entries beside its content: {response.description}")
    with suppress(ValidationError):
        return model.model_validate(answer.data)
    # Without its cause, which keeps what was read.
    raise HistoryUnreadable(f"the response does not have the form of a history: {response.description}")
