"""What becomes of an accepted command: when it is looked up at the platform, and what an entry says of it. Pure.

Only the platform's history tells all of it, and only after ``valid_time``. What it says is final once it says so: a
result that is found twice is the same twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, Self

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field

from schemas.command import CommandId, Imei
from schemas.reply import Reply
from schemas.result import Result, ResultKind
from worker.core.command import Command
from worker.core.times import after

UNKNOWN_AFTER = timedelta(days=1)  # after expired_time
_BEGINNING = datetime(2000, 1, 1, tzinfo=UTC)  # nothing was accepted, or is due, before
_MARGIN = timedelta(seconds=10)  # for what a last answer takes to show in the history
_EARLY_PART = 10  # one of so many parts of a delay makes no difference to a look

_CANCELLED, _EXPIRED, _SUCCESS, _FAILED, _NO_ANSWER = 2, 4, 5, 6, 7  # send_status
_FINAL: dict[int, ResultKind] = {_CANCELLED: "cancelled", _EXPIRED: "expired", _SUCCESS: "executed", _FAILED: "failed"}


def _usable(moment: datetime) -> datetime:
    """Return a moment in UTC, with room to calculate; a message may have been written by anybody."""
    if moment < _BEGINNING:
        raise ValueError(f"is before {_BEGINNING:%Y-%m-%d}")
    return after(moment, timedelta(0))


_Moment = Annotated[AwareDatetime, AfterValidator(_usable)]


class Awaited(BaseModel):
    """An accepted command on its way to its result, as the worker's own messages carry it.

    Attributes:
        app_id: the system that sent it, empty if unknown.
        product: None for the default one.
        accepted_at: when the command's reply says that it was.
        is_recovered: its uuid was found in the history, so that it may have been cached long before.
        valid_at: before this time, on the platform's clock, the platform does not send it; None: at once, or it has
            passed.
        expires_at: on the platform's clock.
        last_answer_at: after this time, on the platform's clock, nothing more comes from the device.
        looks: how often the platform was asked.
        due_at: when to ask next, on our clock: the platform's may be far from it, and is not always known.
        unreadable_since: since when, on our clock, its history cannot be read although its time is over; None: it is
            not over, or the history was not read since.
        refused_since: since when, on our clock, that is not because the platform is down, throttles or is paused.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")  # a newer version may know more

    command_id: CommandId
    app_id: str
    uuid: str = Field(min_length=1)
    imei: Imei
    product: str | None
    accepted_at: _Moment
    is_recovered: bool
    valid_at: _Moment | None = None
    expires_at: _Moment
    last_answer_at: _Moment
    looks: int = Field(0, ge=0)
    due_at: _Moment
    unreadable_since: _Moment | None = None
    refused_since: _Moment | None = None

    @property
    def unknown_at(self) -> datetime:
        """When the result is unknown, if the platform has told nothing final by then."""
        return after(self.expires_at, UNKNOWN_AFTER)

    @property
    def cached_since(self) -> datetime | None:
        """When it was cached at the earliest, on our clock; None: nobody knows."""
        return None if self.is_recovered else self.accepted_at

    def after_look(self, now: datetime, platform_now: datetime, delays_s: Sequence[int]) -> Self:
        """Return the same after another look that told nothing final.

        Args:
            now: on our clock, aware.
            platform_now: on the platform's clock, aware.
            delays_s: seconds before each look; the last repeats.
        """
        looks = self.looks + 1
        wait = _until_next_look(self, platform_now, _delay(delays_s, looks))
        return self.model_copy(update={"looks": looks, "due_at": after(now, wait)})

    def is_served_by(
        self, read_at: datetime, platform_read_at: datetime, platform_now: datetime, delays_s: Sequence[int]
    ) -> bool:
        """Tell whether an earlier read of the device's history is late enough for the look that is due.

        It may have begun shortly before the command was due, if no mark of the command has passed since.

        Args:
            read_at: when it began, on our clock, aware.
            platform_read_at: the same on the platform's clock, aware.
            platform_now: on the platform's clock, aware.
            delays_s: seconds before each look; the last repeats.
        """
        is_late_enough = self.due_at - _delay(delays_s, self.looks) / _EARLY_PART <= read_at
        marks = (self.last_answer_at, self.unknown_at)
        return is_late_enough and not any(platform_read_at < mark <= platform_now for mark in marks)

    def unread(self, now: datetime, platform_now: datetime, *, may_be_over_soon: bool) -> Self:
        """Return the same after its history could not be read.

        Args:
            now: on our clock, aware.
            platform_now: on the platform's clock, aware.
            may_be_over_soon: the platform is down, throttles or is paused.
        """
        if platform_now < self.unknown_at:
            return self
        refused_since = None if may_be_over_soon else self.refused_since or now
        return self.model_copy(
            update={"unreadable_since": self.unreadable_since or now, "refused_since": refused_since}
        )

    def is_given_up(self, now: datetime, delays_s: Sequence[int]) -> bool:
        """Tell whether its history cannot be read for so long that it never may be.

        One read that fails is not enough, however late it is: all workers may have been stopped for days.

        Args:
            now: on our clock, aware.
            delays_s: seconds before each look.
        """
        if self.refused_since is not None and now - self.refused_since >= timedelta(seconds=2 * max(delays_s)):
            return True
        return self.unreadable_since is not None and now - self.unreadable_since >= UNKNOWN_AFTER

    def later(self, now: datetime, delay_s: float) -> Self:
        """Return the same for another time, with no look used up."""
        return self.model_copy(update={"due_at": after(now, timedelta(seconds=delay_s))})


def await_result(command: Command, app_id: str, reply: Reply, ahead: timedelta, delays_s: Sequence[int]) -> Awaited:
    """Return what to look up for a command that was accepted.

    Args:
        command: that was accepted.
        app_id: the system that sent it, empty if unknown.
        reply: says so.
        ahead: by how much the platform's clock is ahead of ours.
        delays_s: seconds before each look; the last repeats.
    """
    answers = (command.effective("retry") + 1) * timedelta(seconds=command.effective("timeout"))
    accepted_at = reply.completed_at + ahead  # on the platform's clock
    begins = max(accepted_at, command.valid_at or accepted_at)  # nothing can happen before
    awaited = Awaited(
        command_id=command.command_id,
        app_id=app_id,
        uuid=reply.uuid or "",
        imei=command.imei,
        product=command.product,
        accepted_at=reply.completed_at,
        is_recovered=reply.recovered,
        valid_at=command.valid_at if begins > accepted_at else None,
        expires_at=command.expires_at,
        last_answer_at=after(command.expires_at, answers + _MARGIN),
        due_at=reply.completed_at,
    )
    wait = _until_next_look(awaited, begins, _delay(delays_s, 0))
    return awaited.model_copy(update={"due_at": after(begins, wait - ahead)})


@dataclass(frozen=True, slots=True)
class EntryState:
    """What the entry of a cached command says of it.

    Attributes:
        send_status: the platform's number; None: none that is known, or its entries contradict each other.
        confirm_status: the platform's word; None: none.
        sent_at: when it was sent to the device, aware; None: unknown.
        confirmed_at: when the device answered, aware; None: unknown.
    """

    send_status: int | None
    confirm_status: str | None = None
    sent_at: datetime | None = None
    confirmed_at: datetime | None = None


NO_STATE = EntryState(None)


def decide_result(awaited: Awaited, state: EntryState, now: datetime, observed_at: datetime) -> Result | None:
    """Return the result of a command, or None if it has to be looked up again.

    Args:
        awaited: the command.
        state: what its entry says; ``NO_STATE`` where there is none, or the history cannot be read.
        now: the time on the platform's clock, aware.
        observed_at: when the history was read, aware.
    """
    kind: ResultKind | None = None if state.send_status is None else _FINAL.get(state.send_status)
    if kind is None and state.send_status == _NO_ANSWER and now >= awaited.last_answer_at:
        kind = "failed"  # before that a repetition may still be answered
    if kind is None and now >= awaited.unknown_at:
        kind = "unknown"
    if kind is None:
        return None
    return Result(
        command_id=awaited.command_id,
        uuid=awaited.uuid,
        imei=awaited.imei,
        result=kind,
        confirm_status=state.confirm_status,
        sent_at=state.sent_at,
        confirmed_at=state.confirmed_at,
        observed_at=observed_at,
    )


def _until_next_look(awaited: Awaited, platform_now: datetime, delay: timedelta) -> timedelta:
    """Return the time until the next look: the delay, or less if nothing more can come from the device by then."""
    marks = (mark for mark in (awaited.last_answer_at, awaited.unknown_at) if platform_now < mark)
    return min(delay, next(marks, after(platform_now, delay)) - platform_now)


def _delay(delays_s: Sequence[int], looks: int) -> timedelta:
    return timedelta(seconds=delays_s[min(looks, len(delays_s) - 1)])
