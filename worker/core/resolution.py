"""What becomes of one delivery: the closed set that the engine returns and the broker edge carries out."""

from dataclasses import dataclass

from schemas.reply import Reply
from worker.core.doubt_window import DoubtWindow
from worker.core.outcome import Outcome


@dataclass(frozen=True, slots=True)
class Conclude:
    """The command has its outcome, which is recorded unless the message fails the same way however often it arrives."""

    outcome: Outcome
    reply: Reply


@dataclass(frozen=True, slots=True)
class Duplicate:
    """The command has had its outcome: publish the recorded reply again.

    ``repeats_all``: what was to be published with it may be missing too: a dead letter, or the look-up of the result.
    """

    reply: Reply
    repeats_all: bool = False


@dataclass(frozen=True, slots=True)
class Retry:
    """Try again through the delay queue of ``delay_s`` seconds, as attempt number ``attempt``: one is used up.

    ``honours_retry_after``: the platform asked for the wait, so jitter must not shorten it.
    """

    delay_s: int
    attempt: int
    reason: str
    doubt: DoubtWindow | None = None
    honours_retry_after: bool = False


@dataclass(frozen=True, slots=True)
class AwaitReconciliation:
    """Wait ``delay_s`` seconds, until the device's command history can tell whether attempt ``attempt`` was cached.

    ``is_free``: that attempt uses up none, because the platform was down for all devices.
    """

    delay_s: int
    attempt: int
    reason: str
    doubt: DoubtWindow
    is_free: bool = False
    crash_count: int | None = None

    @property
    def attempts_used(self) -> int:
        """How many attempts are used up, should this one turn out not to have been cached."""
        return self.attempt - 1 if self.is_free else self.attempt


@dataclass(frozen=True, slots=True)
class Postpone:
    """Process the command later, through the delay queue of ``delay_s`` seconds: no attempt is used up.

    ``is_free``: the attempt in doubt, if any, uses up none. ``is_unclaimed``: the store was not asked, so that it does
    not know the command. ``has_jitter``: the wait may be a little shorter.
    """

    delay_s: int
    attempt: int
    reason: str
    doubt: DoubtWindow | None = None
    is_free: bool = False
    crash_count: int | None = None
    is_unclaimed: bool = False
    has_jitter: bool = False


Unpublished = Conclude | Duplicate | Retry | AwaitReconciliation | Postpone


@dataclass(frozen=True, slots=True)
class Replaced:
    """A copy has already taken the message's place and will find what is recorded.

    ``result``: what the attempt came to, to be reported and not published; None: none was made, since the copy was not
    confirmed in time.
    """

    result: Unpublished | None


Resolution = Unpublished | Replaced
