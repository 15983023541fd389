"""One attempt at one command: what the parts of the engine hand to each other."""

from dataclasses import dataclass

from worker.core.claims import Lease
from worker.core.clock import Clock
from worker.core.command import Command
from worker.core.doubt_window import DoubtWindow
from worker.core.envelope import Envelope, Task
from worker.core.outcome import Outcome, reply_to
from worker.core.resolution import Conclude
from worker.processing.circuit_breaker import CircuitBreakers, Permit


class SendPermit:
    """The permit of a product's circuit breaker for one command: acquired when needed, held at most once."""

    def __init__(self, breakers: CircuitBreakers, product: str | None) -> None:
        self._breakers = breakers
        self._product = product
        self._permit: Permit | None = None

    def acquire(self) -> Permit | None:
        """Return the permit, None where nothing of the product may be sent."""
        if self._permit is None:
            self._permit = self._breakers.try_acquire(self._product)
        return self._permit

    def release(self) -> bool:
        """Give the permit back; returns whether it was held."""
        if self._permit is None:
            return False
        self._permit.release()
        self._permit = None
        return True


@dataclass(frozen=True, slots=True)
class Attempt:
    """A command whose lease this worker holds.

    Attributes:
        task: the delivery.
        command: what it carries.
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
        """What the delivery says of itself."""
        return self.task.envelope

    def conclude(
        self, outcome: Outcome, now: Clock, *, valid_time_omitted: bool = False, is_guess: bool = False
    ) -> Conclude:
        """Return the resolution that ends the command with an outcome."""
        command = self.command
        reply = reply_to(
            outcome, self.number, command.command_id, command.imei, now(), valid_time_omitted=valid_time_omitted
        )
        return Conclude(outcome, reply, self.lease, self.doubt, is_guess=is_guess, holder_crashed=self.holder_crashed)
