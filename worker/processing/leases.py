"""Ends leases: records an outcome, or releases the command. A store that fails postpones the command instead."""

from dataclasses import replace
from typing import TypeVar

from worker.core.claims import IdempotencyStore
from worker.core.clock import Clock
from worker.core.decide import RetryPolicy, postponed
from worker.core.doubt import doubt_of_copy, extended
from worker.core.doubt_window import DoubtWindow
from worker.core.envelope import Envelope
from worker.core.outcome import Accepted, Failed, Outcome, outcome_unknown, reply_to
from worker.core.resolution import AwaitReconciliation, Conclude, Postpone, Unpublished
from worker.errors import StoreError, StoreRefused, UuidTaken
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

    async def conclude(
        self, attempt: Attempt, outcome: Outcome, *, valid_time_omitted: bool = False, is_guess: bool = False
    ) -> Unpublished:
        """Record an outcome before its reply is published, so that a later failure repeats the same outcome.

        Args:
            attempt: at the command.
            outcome: of the command.
            valid_time_omitted: ``valid_time`` had passed and was left out of the request.
            is_guess: the uuid may as well belong to a lookalike.

        Returns:
            The resolution of the delivery: the outcome, once it is recorded.
        """
        id_, imei, now = attempt.command.command_id, attempt.command.imei, self._now()
        reply = reply_to(outcome, attempt.number, id_, imei, now, valid_time_omitted=valid_time_omitted)
        is_recovered = isinstance(outcome, Accepted) and outcome.recovered
        doubt = attempt.doubt  # should the uuid turn out to be another command's
        if doubt is None or not is_recovered:  # otherwise nothing was sent since
            doubt = extended(doubt, reply.completed_at)
        try:
            await self._store.complete(attempt.lease, reply, doubt, is_guess=is_guess)
        except UuidTaken:
            if is_recovered:  # another command was given this entry of the history first
                return replace(attempt, doubt=doubt).awaiting(self._policy, ENTRY_TAKEN)
            return self._await_own_uuid(attempt, doubt)
        except StoreError as exc:
            is_expired = isinstance(outcome, Failed) and outcome.code == "expired"
            if is_expired and attempt.doubt is None and isinstance(exc, StoreRefused):
                return Conclude(outcome, reply)  # without a record: it expires again however often it is delivered
            return self.postpone(attempt.envelope, exc, attempt.doubt, holder_crashed=attempt.holder_crashed)
        return Conclude(outcome, reply)

    def postpone(
        self, envelope: Envelope, error: StoreError, doubt: DoubtWindow | None, *, holder_crashed: bool
    ) -> Postpone:
        """Postpone a command because the store failed: it is not sent without a lease, and in doubt if it was sent."""
        doubt = doubt_of_copy(doubt, envelope, self._now())
        return postponed(envelope, self._policy, str(error), doubt, holder_crashed=holder_crashed)

    def _await_own_uuid(self, attempt: Attempt, doubt: DoubtWindow) -> AwaitReconciliation | Conclude:
        """Treat a uuid that another command owns like a lost answer; the store has released the command."""
        number, command = attempt.number, attempt.command
        # In mode "resend" no history is read, so that the next request uses an attempt.
        if self._policy.mode(attempt.envelope) == "resend" and not attempt.is_announced:
            number += 1
            if number > self._policy.max_attempts:
                failed = outcome_unknown(FOREIGN_UUID)
                return Conclude(failed, reply_to(failed, attempt.number, command.command_id, command.imei, self._now()))
        return AwaitReconciliation(self._policy.reconcile_delay_s, number, FOREIGN_UUID, doubt)
