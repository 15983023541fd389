"""What one delivery says of itself, in the worker's own terms: nothing here knows a broker."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import NamedTuple

from worker.core.command import Command
from worker.core.doubt_window import DoubtWindow
from worker.errors import UnusableCommand

_CLOCKS_DIFFER_S = 2.0


class Sender(NamedTuple):
    """Who sent a message. One for whom the broker vouches is never taken for one that only has the same name."""

    name: str
    is_vouched_for: bool


@dataclass(frozen=True, slots=True)
class Replay:
    """An operator's order to try a failed command again.

    ``failed_at``: when the command failed, to the millisecond, so that each failure is replayed once, however often the
    order arrives. ``doubt``: when the command may have been sent before; None: it is known not to have been cached.
    ``code``: the error code of that failure, on the order itself and on no copy of it; else empty.
    """

    failed_at: datetime
    doubt: DoubtWindow | None
    code: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Envelope:
    """One delivery without its body.

    Attributes:
        is_redelivered: the broker delivered this message before.
        is_copy: a worker or a replay republished it through the worker's own exchange, so its headers are believed.
        times_returned: how often the broker took the message back from a consumer.
        attempt: the number of this attempt; the first is 1.
        is_free_attempt: the attempt that is in doubt uses up none, because the platform was down for all devices.
        is_unstarted: the message was returned to the queue by a worker that had not started it.
        crash_count: attempts announced on the message before they started; None unless the command is suspected of
            crashing workers. Includes attempts that finished: only the store can tell them apart.
        doubt: when the command may have been sent, as far as the message says.
        replay: an operator's order to try it again.
        arrived_at: when this delivery arrived, in seconds of the epoch.
        first_arrived_at: when the command first arrived at a worker, in seconds of the epoch. Copies of what a stopping
            worker returned unstarted have the time of the first arrival after that.
        delay: from when until when its delay queue was to hold it, in seconds of the epoch; None: it was in none.
        published_at: when the command was published as far as its property says, else ``first_arrived_at``.
        message_id: the AMQP property; None where it is not set, bytes where it is not UTF-8.
        app_id: the upstream system that the message names; empty where it names none, or not in UTF-8.
        user_id: the user who published it, for whom the broker vouches; None where it vouches for none.
        reply_to: the routing key that the message asks for; None where it asks for none.
        trace: the W3C trace headers.
    """

    is_redelivered: bool = False
    is_copy: bool = False
    times_returned: int = 0
    attempt: int = 1
    is_free_attempt: bool = False
    is_unstarted: bool = False
    crash_count: int | None = None
    doubt: DoubtWindow | None = None
    replay: Replay | None = None
    arrived_at: float = 0.0
    first_arrived_at: float = 0.0
    delay: tuple[float, float] | None = None
    published_at: float = 0.0
    message_id: object = None
    app_id: str = ""
    user_id: str | None = None
    reply_to: str | None = None
    trace: Mapping[str, str] = field(default_factory=dict)

    @property
    def sender(self) -> Sender:
        """Who sent the message, as far as that is known: anybody may write any ``app_id``."""
        return Sender(self.app_id, is_vouched_for=False) if self.user_id is None else Sender(self.user_id, True)

    @property
    def delay_left_s(self) -> float:
        """For how many seconds more its delay queue was to hold it; 0 where it came back in time.

        A policy of the broker may shorten the delays. Clocks may differ a little, and one may have been set meanwhile.
        """
        if self.delay is None:
            return 0
        since, until = self.delay
        left_s = until - self.arrived_at
        is_early = since <= self.arrived_at and left_s > max(_CLOCKS_DIFFER_S, (until - since) / 10)
        return left_s if is_early else 0

    @property
    def may_have_been_sent(self) -> bool:
        """Whether the command may have been sent before, as far as the message says."""
        return self.is_redelivered or self.attempt > 1 or self.doubt is not None or self.replay is not None

    @property
    def repeats_unknown_product(self) -> bool:
        """Whether, as far as the message says, nothing was tried since the command failed for its unknown product."""
        return self.replay is not None and self.replay.code == "unknown_product" and not self.is_redelivered

    @property
    def may_have_twin(self) -> bool:
        """Whether the message that it was copied from may have been delivered again, if its worker crashed in between.

        A copy that a stopping worker returned to the queue is trusted: only two crashes, one during that stop, break
        this.
        """
        return self.is_copy and not self.is_unstarted


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """A delivery on its way through this process.

    Attributes:
        envelope: what the delivery says of itself.
        parsed: its command, or why it carries none; None: parsing it may be what crashes workers.
        arrived_at: monotonic time in seconds.
        size: how much memory its message takes, in bytes.
    """

    envelope: Envelope
    parsed: Command | UnusableCommand | None
    arrived_at: float
    size: int = 0

    @property
    def command(self) -> Command | None:
        """The command, if the delivery carries one."""
        return self.parsed if isinstance(self.parsed, Command) else None

    @property
    def looks_in_doubt(self) -> bool:
        """Whether the command may have been sent, as far as the message says: its history comes before a request."""
        return self.command is not None and (self.envelope.is_redelivered or self.envelope.doubt is not None)
