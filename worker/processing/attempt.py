"""One attempt at one command, as the parts of the engine pass it to each other."""

from collections.abc import Callable
from dataclasses import dataclass

from worker.core.claims import Lease
from worker.core.command import Command
from worker.core.decide import RetryPolicy, awaiting
from worker.core.doubt_window import DoubtWindow
from worker.core.envelope import Envelope, Task
from worker.core.resolution import AwaitReconciliation
from worker.processing.circuit_breaker import CircuitBreakers, Permit


class SendPermit:
    """The permit of a product's circuit breaker for one command: acquired when needed, held at most once.

    Args:
        breakers: give the permit.
        product: of the command.
        on_history_first: called if the permit is given back because the history has to be read first.
    """

    def __init__(self, breakers: CircuitBreakers, product: str | None, on_history_first: Callable[[], object]) -> None:
        self._breakers = breakers
        self._product = product
        self._on_history_first = on_history_first
        self._permit: Permit | None = None

    def acquire(self) -> Permit | None:
        """Return the permit, or None while the product is paused; one that is held ends with a pause by hand."""
        if self._permit is not None and self._permit.is_revoked:
            self.release()
        if self._permit is None:
            self._permit = self._breakers.try_acquire(self._product)
        return self._permit

    def give_way(self) -> None:
        """Give the permit back while the command's history is read, so that the next command may be the probe."""
        if self._permit is not None:
            self.release()
            self._on_history_first()

    def release(self) -> None:
        """Give the permit back, if it is held."""
        if self._permit is not None:
            self._permit.release()
            self._permit = None


@dataclass(frozen=True, slots=True)
class Attempt:
    """A command whose lease this worker holds.

    Attributes:
        task: the delivery.
        command: the command in it.
        lease: the right to process it.
        number: which attempt this is; the first is 1.
        doubt: when the command may have been sent.
        holder_crashed: an earlier attempt may have crashed its worker.
        permit: to send it.
        is_announced: a copy of the message says that it is being tried, and will come back for the outcome.
    """

    task: Task
    command: Command
    lease: Lease
    number: int
    doubt: DoubtWindow | None
    holder_crashed: bool
    permit: SendPermit
    is_announced: bool = False

    @property
    def envelope(self) -> Envelope:
        """The envelope of the delivery."""
        return self.task.envelope

    def awaiting(self, policy: RetryPolicy, reason: str) -> AwaitReconciliation:
        """Return the resolution by which the command, which is in doubt, waits for its device's history."""
        assert self.doubt is not None  # otherwise there is nothing to wait for
        return awaiting(
            self.envelope, policy, reason, self.doubt, attempt=self.number, holder_crashed=self.holder_crashed
        )
