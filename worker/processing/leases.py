"""Ends leases: records an outcome, or releases the command. A store that fails postpones the command instead."""

from typing import TypeVar

from worker.core.claims import IdempotencyStore
from worker.core.clock import Clock
from worker.core.decide import RetryPolicy, awaiting, postponed
from worker.core.doubt import doubt_of_copy, extended
from worker.core.doubt_window import DoubtWindow
from worker.core.envelope import Envelope
from worker.core.outcome import Accepted, outcome_unknown, reply_to
from worker.core.resolution import AwaitReconciliation, Conclude, Postpone, Unpublished
from worker.errors import StoreError, UuidTaken
from worker.processing.attempt import Attempt

FOREIGN_UUID = "the uuid that it was answered with belongs to another command"
ENTRY_TAKEN = "the entry of the history that was assigned to it belongs to another command by now"


Released = TypeVar("Released", bound=Unpublished)


class Leases:
    """Ends the leases that the engine holds.

    Args:
        store: grants them.
        policy: when to try again.
        now: the time, aware.
    """

    def __init__(self, store: IdempotencyStore, policy: RetryPolicy, now: Clock) -> None:
        self._store = store
        self._policy = policy
        self._now = now

    async def release(self, attempt: Attempt, resolution: Released) -> Released | Postpone:
        """Release a command with its doubt, and return its resolution."""
        try:
            await self._store.release(
                attempt.lease, attempt.doubt, holder_crashed=attempt.holder_crashed and not attempt.is_announced
            )
        except StoreError as exc:
            return self.postpone(attempt.envelope, exc, attempt.doubt, holder_crashed=attempt.holder_crashed)
        return resolution

    async def record(self, envelope: Envelope, conclude: Conclude, *, is_announced: bool = False) -> Unpublished:
        """Record an outcome before its reply is published, so that a later failure repeats the same outcome.

        Args:
            envelope: the parsed properties and headers of the command's delivery.
            conclude: the outcome.
            is_announced: a copy has taken the delivery's place, and decides what follows.

        Returns:
            The resolution of the delivery: the outcome, once it is recorded.
        """
        if conclude.lease is None:
            return conclude
        doubt = _doubt_if_refused(conclude)
        try:
            await self._store.complete(conclude.lease, conclude.reply, doubt, is_guess=conclude.is_guess)
        except UuidTaken:
            return self._await_own_uuid(envelope, conclude, is_announced=is_announced)
        except StoreError as exc:
            return self.postpone(envelope, exc, conclude.doubt, holder_crashed=conclude.holder_crashed)
        return conclude

    def postpone(
        self, envelope: Envelope, error: StoreError, doubt: DoubtWindow | None, *, holder_crashed: bool
    ) -> Postpone:
        """Postpone a command because the store failed: it is not sent without a lease, and in doubt if it was sent."""
        doubt = doubt_of_copy(doubt, envelope, self._now())
        return postponed(envelope, self._policy, str(error), doubt, holder_crashed=holder_crashed)

    def _await_own_uuid(
        self, envelope: Envelope, conclude: Conclude, *, is_announced: bool
    ) -> AwaitReconciliation | Conclude:
        """Treat a uuid that another command owns like a lost answer; the store has released the command."""
        reply, attempt, doubt = conclude.reply, conclude.reply.attempts, _doubt_if_refused(conclude)
        if _is_recovered(conclude):  # another command was given this entry of the history first
            crashed = conclude.holder_crashed
            return awaiting(envelope, self._policy, ENTRY_TAKEN, doubt, attempt=attempt, holder_crashed=crashed)
        # In mode "resend" no history is read, so that the next request uses an attempt.
        if self._policy.mode(envelope) == "resend" and not is_announced:
            attempt += 1
            if attempt > self._policy.max_attempts:
                failed = outcome_unknown(FOREIGN_UUID)
                return Conclude(failed, reply_to(failed, reply.attempts, reply.command_id, reply.imei, self._now()))
        return AwaitReconciliation(self._policy.reconcile_delay_s, attempt, FOREIGN_UUID, doubt)


def _is_recovered(conclude: Conclude) -> bool:
    return isinstance(conclude.outcome, Accepted) and conclude.outcome.recovered


def _doubt_if_refused(conclude: Conclude) -> DoubtWindow:
    """Return when a command may have been sent, should its uuid turn out to be another command's."""
    if _is_recovered(conclude) and conclude.doubt is not None:  # nothing was sent since
        return conclude.doubt
    return extended(conclude.doubt, conclude.reply.completed_at)
