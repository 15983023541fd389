"""Postpones or republishes deliveries that were not started, and keeps their attempts, doubt and crash counts."""

from contextlib import suppress
from datetime import UTC, datetime

from worker.core.backoff import postponement_s
from worker.core.claims import IdempotencyStore, Key
from worker.core.clock import Clock
from worker.core.command import Command
from worker.core.decide import RetryPolicy
from worker.core.doubt import doubt_of_copy, is_forgotten
from worker.core.doubt_window import DoubtWindow
from worker.core.envelope import Task
from worker.core.resolution import Postpone
from worker.errors import StoreError
from worker.processing.circuit_breaker import CircuitBreakers


class Unstarted:
    """Postpones deliveries that were not started, and computes the doubt window of their copies.

    Args:
        store: remembers commands.
        breakers: tell how long nothing may be sent.
        policy: when to try again.
        now: the time, aware.
    """

    def __init__(self, store: IdempotencyStore, breakers: CircuitBreakers, policy: RetryPolicy, now: Clock) -> None:
        self._store = store
        self._breakers = breakers
        self._policy = policy
        self._now = now

    def postpone(self, task: Task, reason: str, at_least_s: float = 0) -> Postpone:
        """Postpone a delivery: no attempt is used up, and nothing is put in doubt."""
        envelope = task.envelope
        product = None if task.command is None else task.command.product
        suggested_s = max(at_least_s, self._breakers.suggested_delay_s(product))
        return Postpone(
            postponement_s(self._policy.delays_s, suggested_s),
            envelope.attempt,
            reason,
            self.doubt_of_copy(task),
            is_free=envelope.is_free_attempt,
            crash_count=envelope.crash_count,
            is_unclaimed=True,
        )

    def postpone_paused(self, task: Task, product: str | None) -> Postpone:
        """Postpone a delivery because nothing of its product is sent for now."""
        return self.postpone(task, self._breakers.why_paused(product))

    def doubt_of_copy(self, task: Task) -> DoubtWindow | None:
        """Return the doubt window for a copy of a delivery that was not started.

        A duplicate message counts as in doubt once its original was claimed here, because that record may be gone when
        the copy returns. So does a copy whose record may be gone already.
        """
        now = self._now()
        doubt = doubt_of_copy(task.envelope.doubt, task.envelope, now)
        local = self._store.local
        if doubt is not None or task.command is None or local is None:
            return doubt
        if is_forgotten(local.forgotten_before, task.envelope):
            return DoubtWindow(None, local.forgotten_before)
        return DoubtWindow(None, now) if local.was_claimed(key_of(task.command)) else None

    def wants_note(self, task: Task) -> bool:
        """Tell whether a delivery that has just arrived should be noted."""
        is_first = not (task.envelope.may_have_been_sent or task.envelope.is_copy)
        return is_first and task.command is not None and self._store.wants_arrivals

    async def note_arrival(self, task: Task) -> None:
        """Record that a command has arrived: if this worker is killed before it claims it, it is not in doubt."""
        assert task.command is not None  # otherwise it has no record
        with suppress(StoreError):  # it may be in doubt then
            await self._store.note_arrival(key_of(task.command), datetime.fromtimestamp(task.envelope.arrived_at, UTC))

    def mark_not_sent(self, task: Task) -> None:
        """Record that a delivery was not started, so that its redelivery is not in doubt."""
        local = self._store.local
        if local is None or task.command is None:
            return
        # What may have been sent before this process remains in doubt.
        if not task.envelope.may_have_been_sent and not is_forgotten(local.forgotten_before, task.envelope):
            local.mark_not_sent(key_of(task.command))


def key_of(command: Command) -> Key:
    """Return what a command's record is found by."""
    return Key(command.command_id, command.content_hash(), command.match_key(), command.app_id, command.field_digests())
