"""Lets the device's command history decide what became of a command in doubt, and whether its queue is full."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial

from worker.core.claims import IdempotencyStore
from worker.core.decide import RetryPolicy, decide_unreadable, postponed
from worker.core.outcome import Accepted, Failed, outcome_unknown
from worker.core.ownership import Ambiguous, Assigned, LookalikeInProgress, NoCandidate, assign_uuid
from worker.core.platform import DEVICE_QUEUE, Candidate, PlatformClient
from worker.core.poison import is_poison, poisoned
from worker.core.resolution import AwaitReconciliation, Unpublished
from worker.errors import HistoryUnreadable, StoreError
from worker.processing.attempt import Attempt
from worker.processing.circuit_breaker import CircuitBreakers, record_unreadable
from worker.processing.leases import Leases

MAX_NAMED = 3  # candidates that one message to an operator names

Send = Callable[[Attempt], Awaitable[Unpublished]]


class Reconciler:
    """Finds out whether a command was cached, or whether there is room for it.

    Args:
        client: reads the histories.
        store: tells whose the uuids are.
        leases: ends the leases.
        breakers: of executions.
        history_breakers: of histories.
        policy: when to try again.
    """

    def __init__(
        self,
        client: PlatformClient,
        store: IdempotencyStore,
        leases: Leases,
        breakers: CircuitBreakers,
        history_breakers: CircuitBreakers,
        policy: RetryPolicy,
    ) -> None:
        self._client = client
        self._store = store
        self._leases = leases
        self._breakers = breakers
        self._history_breakers = history_breakers
        self._policy = policy

    async def run(self, attempt: Attempt, send: Send) -> Unpublished:
        """Read the history of a command in doubt.

        Args:
            attempt: at the command.
            send: sends it, once it is known not to have been cached.
        """
        try:
            return await self._reconcile(attempt, send)
        except StoreError as exc:
            return self._leases.postpone(attempt.envelope, exc, attempt.doubt, holder_crashed=attempt.holder_crashed)

    async def why_full(self, attempt: Attempt) -> str | None:
        """Return why a command that met a limit of the platform has to rest; None: the device's queue is not full."""
        product = attempt.command.product
        permit = self._history_breakers.try_acquire(product)
        if permit is None:
            reason = self._history_breakers.reason_of(product)
            return f"the device's queue at OneNET may be full; command histories are not read for now: {reason}"
        try:
            waiting = await self._client.count_waiting(attempt.command, DEVICE_QUEUE)
            permit.record_success()
        except HistoryUnreadable as exc:
            record_unreadable(exc, permit, self._breakers, product, attempt.command.imei)
            return f"the device's queue at OneNET may be full; its command history could not be read: {exc}"
        finally:
            permit.release()
        return f"the device's queue at OneNET is full: {waiting} commands wait" if waiting >= DEVICE_QUEUE else None

    async def _reconcile(self, attempt: Attempt, send: Send) -> Unpublished:
        product = attempt.command.product
        permit = self._history_breakers.try_acquire(product)
        if permit is None:
            reason = f"command histories are not read for now: {self._history_breakers.reason_of(product)}"
            return await self._leases.release(
                attempt, replace(attempt.awaiting(self._policy, "answer lost"), reason=reason)
            )
        result: Sequence[Candidate] | Failed | AwaitReconciliation
        try:
            result = await self._find(attempt)
            permit.record_success()
        except HistoryUnreadable as exc:
            record_unreadable(exc, permit, self._breakers, product, attempt.command.imei)
            is_free = permit.is_paused or exc.is_throttled or exc.is_rate_limited
            result = decide_unreadable(
                str(exc), attempt.awaiting(self._policy, "answer lost"), self._policy, is_paused=is_free
            )
        finally:
            permit.release()
        match result:  # here, where an error is gone: it keeps all entries that were read
            case Failed():
                return await self._leases.conclude(attempt, result)
            case AwaitReconciliation():
                return await self._leases.release(attempt, result)
            case candidates:
                return await self._decide(attempt, candidates, send)

    async def _find(self, attempt: Attempt) -> Sequence[Candidate]:
        assert attempt.doubt is not None  # otherwise there is nothing to reconcile
        owned_by_others = partial(self._store.owned_by_others, attempt.lease.owner_id)
        return await self._client.find_candidates(attempt.command, attempt.doubt, owned_by_others)

    async def _decide(self, attempt: Attempt, candidates: Sequence[Candidate], send: Send) -> Unpublished:
        likely = [each.uuid for each in candidates if each.is_within_clock_skew and not each.unclear]
        unlikely = [each.uuid for each in candidates if not each.is_within_clock_skew and not each.unclear]
        unclear = [each for each in candidates if each.unclear]
        unclear_uuids = [each.uuid for each in unclear]
        facts = await self._store.ownership(attempt.lease, [*likely, *unlikely, *unclear_uuids])
        owner_id = attempt.lease.owner_id
        assignment = assign_uuid(owner_id, likely, unlikely, facts)
        reason = "the device's command history has several like it, and no record tells which is whose"
        if isinstance(assignment, NoCandidate) and unclear:
            # Only now: a platform writes one value in one way, so an equal entry leaves no doubt about the others.
            assignment = assign_uuid(owner_id, [], unclear_uuids, facts)
            reason = _describe(unclear)
        match assignment:
            case Assigned(uuid, is_guess):
                omitted = any(each.uuid == uuid and each.valid_time_omitted for each in candidates)
                recovered = Accepted(uuid, recovered=True)
                return await self._leases.conclude(attempt, recovered, valid_time_omitted=omitted, is_guess=is_guess)
            case Ambiguous():
                return await self._leases.conclude(attempt, outcome_unknown(reason))
            case LookalikeInProgress():
                reason = "a command just like it is being processed"
                postpone = postponed(
                    attempt.envelope, self._policy, reason, attempt.doubt, holder_crashed=attempt.holder_crashed
                )
                return await self._leases.release(attempt, postpone)
            case NoCandidate():
                return await self._send_absent(attempt, send)

    async def _send_absent(self, attempt: Attempt, send: Send) -> Unpublished:
        """Send a command that is known now not to have been cached."""
        waiting = attempt.awaiting(self._policy, "answer lost")
        absent = replace(attempt, doubt=None)
        if is_poison(attempt.envelope, holder_crashed=attempt.holder_crashed):
            return await self._leases.conclude(absent, poisoned(attempt.envelope))
        if not attempt.holder_crashed:  # otherwise it is unknown whether that attempt was made
            if waiting.attempts_used >= self._policy.max_attempts:
                message = f"given up after {attempt.number} attempts: the last one was not cached"
                return await self._leases.conclude(absent, Failed("retries_exhausted", message))
            absent = replace(absent, number=waiting.attempts_used + 1)
        return await send(absent)


def _describe(unclear: Sequence[Candidate]) -> str:
    """Name the candidates that cannot be told from the command, for an operator who looks at them."""
    named = [f"{each.uuid or 'one without a cmd_uuid'} ({', '.join(each.unclear)})" for each in unclear[:MAX_NAMED]]
    more = f" and {len(unclear) - MAX_NAMED} more" if len(unclear) > MAX_NAMED else ""
    return f"entries of the device's command history cannot be told from it, in these fields: {'; '.join(named)}{more}"
