"""What becomes of one delivery: the closed set that is carried out."""

from dataclasses import dataclass
from typing import ClassVar

from schemas.reply import Detail, FailureCode, RejectionCode, Status


@dataclass(frozen=True, slots=True)
class Accepted:
    """A reply with the uuid. ``recovered``: it was found in the device's command history."""

    status: ClassVar[Status] = "accepted"
    uuid: str
    recovered: bool = False


@dataclass(frozen=True, slots=True)
class Rejected:
    """A reply with OneNET's no."""

    status: ClassVar[Status] = "rejected"
    code: RejectionCode
    message: str
    errno: int | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """A reply with the reason, and a dead letter."""

    status: ClassVar[Status] = "failed"
    code: FailureCode
    message: str
    details: tuple[Detail, ...] = ()


@dataclass(frozen=True, slots=True)
class Retry:
    """Back through the delay queue of ``delay_s`` seconds, to be attempt number ``attempt``.

    ``is_least``: the platform asked for the wait, so that jitter must not shorten it.
    """

    delay_s: int
    attempt: int
    reason: str
    honours_retry_after: bool = False


@dataclass(frozen=True, slots=True)
class AwaitReconciliation:
    """To rest until the device's command history can tell whether attempt number ``attempt`` was taken.

    ``is_counted``: False where that attempt uses up none, because the platform was down for all.
    """

    attempt: int
    reason: str
    consumes_attempt: bool = True

    @property
    def used(self) -> int:
        """How many attempts are used up, should it not have been taken."""
        return self.attempt if self.consumes_attempt else self.attempt - 1


Final = Accepted | Rejected | Failed
Outcome = Final | Retry | AwaitReconciliation
