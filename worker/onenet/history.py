"""What a device's command history says of a command in doubt. Pure.

Source: the pages of ``GET /nbiot/offline/history`` and ``GET /nbiot/offline/history/{uuid}``.
"""

import json
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal, TypeVar
from zoneinfo import ZoneInfo

from pydantic import BaseModel, ValidationError

from schemas.onenet import HistoryAnswer, HistoryDetail, HistoryItem, HistoryPage
from worker.commands import PLATFORM_DEFAULTS, ExecuteCommand
from worker.doubt import Doubt
from worker.errors import HistoryUnreadable
from worker.onenet.answers import history_error
from worker.onenet.errno import SUCCESS

USUAL_SKEW = timedelta(seconds=5)  # how far two kept clocks may be apart, with times cut to the second
MAX_SKEW = timedelta(seconds=60)  # how far unkept ones may be: what fits but for this decides nothing

_OPTIONAL: tuple[Literal["retry", "timeout", "trigger_msg"], ...] = ("retry", "timeout", "trigger_msg")
_TIME = re.compile(r"(\d{4}-\d\d-\d\d)[T ](\d\d:\d\d:\d\d)(?:[:.](\d{1,6}))?Z?\Z")

Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Entry:
    """A cached command that may be the one in doubt.

    ``is_likely``: it was cached when the one in doubt can have been; otherwise only clocks that are far apart would
    explain it. ``valid_time_omitted``: the command has a ``valid_time``, and this was cached without one.
    """

    uuid: str
    is_likely: bool
    valid_time_omitted: bool


@dataclass(frozen=True, slots=True)
class Window:
    """When the platform can have cached what is in doubt, on the platform's clock; ``since`` None: at any time before.

    ``skew_s``: by how much the platform's clock is ahead of ours, as far as its answers tell.
    """

    since: datetime | None
    until: datetime
    skew_s: float = 0.0

    def is_within(self, moment: datetime, allowed: timedelta) -> bool:
        """Tell whether a moment lies in the window, if the clocks differ by no more than is allowed."""
        ahead = timedelta(seconds=max(0.0, self.skew_s))
        behind = timedelta(seconds=max(0.0, -self.skew_s))
        begins_in_time = self.since is None or self.since - behind - allowed <= moment
        return begins_in_time and moment <= self.until + ahead + allowed

    def distance(self, moment: datetime) -> timedelta:
        """Return how far a moment is from the beginning, or from the end where the beginning is not known."""
        return abs(moment - (self.until if self.since is None else self.since))


class Listing:
    """The pages of one history, put together."""

    def __init__(self) -> None:
        self._items: dict[str, HistoryItem] = {}
        self._total = 0

    @property
    def items(self) -> Collection[HistoryItem]:
        """The commands of all pages, each once."""
        return self._items.values()

    @property
    def is_complete(self) -> bool:
        """Tell whether there is nothing left to ask for."""
        return len(self._items) >= self._total

    def add(self, page: HistoryPage) -> None:
        """Add the next page.

        Raises:
            HistoryUnreadable: it brings nothing new although something is missing.
        """
        known = len(self._items)
        self._total = max(self._total, page.total_count)
        self._items.update({item.cmd_uuid: item for item in page.items})
        if len(self._items) == known and not self.is_complete:
            raise HistoryUnreadable(f"only {known} of {self._total} commands are shown")


def read_page(body: bytes) -> HistoryPage:
    """Read one page of a history.

    Raises:
        HistoryUnreadable: it is none.
    """
    return _read(HistoryPage, body)


def read_detail(body: bytes) -> HistoryDetail:
    """Read one command of a history.

    Raises:
        HistoryUnreadable: it is none.
    """
    return _read(HistoryDetail, body)


def candidates(
    items: Iterable[HistoryItem], command: ExecuteCommand, window: Window, zone: ZoneInfo
) -> list[HistoryItem]:
    """Return what may be the command, as far as the list tells, the best first.

    Raises:
        HistoryUnreadable: one cannot be told from it, because its times cannot be read.
    """
    found = []
    for item in items:
        if item.type.upper() != "EXECUTE":
            continue
        created_at = _time(item.create_time, zone)
        expires_at = None if item.expired_time is None else _time(item.expired_time, zone)
        if not window.is_within(created_at, MAX_SKEW):
            continue
        if expires_at is None or _cut(expires_at) == command.expires_at:
            found.append((window.distance(created_at), item))
    return [item for _, item in sorted(found, key=lambda each: each[0])]


def match(
    item: HistoryItem, detail: HistoryDetail, command: ExecuteCommand, doubt: Doubt, window: Window, zone: ZoneInfo
) -> Entry | None:
    """Return the entry if it has everything that identifies the command, else None.

    Raises:
        HistoryUnreadable: it cannot be told, because something is missing or cannot be read.
    """
    shown = {name: _scalar(value) for name, value in detail.args.items()}
    numbers = {"obj_id": command.obj_id, "obj_inst_id": command.obj_inst_id, "res_id": command.res_id}
    for name, number in numbers.items():
        text = shown.get(name)
        if text is None:
            raise HistoryUnreadable(f"{item.cmd_uuid} is shown without {name}")
        if text != str(number):
            return None
    if shown.get("imei") not in {None, command.imei}:
        return None
    expired_time = shown.get("expired_time") or item.expired_time
    if expired_time is None:
        raise HistoryUnreadable(f"{item.cmd_uuid} is shown without expired_time")
    if _cut(_time(expired_time, zone)) != command.expires_at:
        return None
    shown["trigger_msg"] = shown.get("trigger_msg") or item.trigger_msg
    for parameter in _OPTIONAL:  # one that was not given is shown as absent, or as what the platform took for it
        if (shown.get(parameter) or str(PLATFORM_DEFAULTS[parameter])) != str(command.effective(parameter)):
            return None
    if _args(detail.content) != command.args:
        return None
    created_at = _time(item.create_time, zone)
    valid_time = shown.get("valid_time")
    valid_at = None if valid_time is None else _cut(_time(valid_time, zone))
    if valid_at is not None and valid_at <= created_at and valid_at != command.valid_at:
        valid_at = None  # one that is given must be later: the platform filled in the time at which it came
    if not _may_have_been(valid_at, command, doubt):
        return None
    omitted = command.valid_at is not None and valid_at is None
    return Entry(item.cmd_uuid, window.is_within(created_at, USUAL_SKEW), omitted)


def _may_have_been(shown: datetime | None, command: ExecuteCommand, doubt: Doubt) -> bool:
    """Tell whether the command can have been sent with this ``valid_time``: one that has passed is left out."""
    if command.valid_at is None or shown is not None:
        return shown == command.valid_at
    return command.valid_at <= doubt.until


def _read(model: type[Model], body: bytes) -> Model:
    try:
        answer = HistoryAnswer.model_validate_json(body.decode("utf-8", "replace"))
    except ValidationError as exc:  # not OneNET's, so that other devices' histories cannot be read either
        raise HistoryUnreadable("an answer that is not OneNET's", is_outage=True) from exc
    if answer.errno != SUCCESS:
        raise history_error(answer.errno, answer.error)
    try:
        return model.model_validate(answer.data)
    except ValidationError as exc:
        raise HistoryUnreadable("an answer that is not of the history's form") from exc


def _time(text: str, zone: ZoneInfo) -> datetime:
    """Read a time of the history: with a blank or a T, and perhaps ``:mmm`` behind it."""
    found = _TIME.match(text)
    try:
        if found:
            day, time, fraction = found.groups()
            moment = datetime.fromisoformat(f"{day}T{time}").replace(tzinfo=zone)
            return moment.replace(microsecond=int((fraction or "0").ljust(6, "0")))
    except ValueError:
        pass  # no such day
    raise HistoryUnreadable("a time that cannot be read")


def _cut(moment: datetime) -> datetime:
    return moment.replace(microsecond=0)


def _scalar(value: object) -> str | None:
    return None if value is None else str(value).strip() or None


def _args(content: object) -> str | None:
    """Return the args within a body, which is shown as JSON or as an object."""
    if isinstance(content, str):
        try:
            content = json.loads(content)
        except (ValueError, RecursionError):
            return str(content) or None
    args: object = content.get("args") if isinstance(content, dict) else content
    return None if args is None else str(args)
