"""The way of one command: claim it, reconcile or send it, record its outcome, and return its delivery's resolution."""

import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from functools import partial

from schemas.reply import Detail
from worker.core.answer import Answer, InDoubt, NotSent, Refused
from worker.core.backoff import postponement_s
from worker.core.claims import Completed, IdempotencyStore, InProgress, KeyReused
from worker.core.clock import Clock, utc_now
from worker.core.command import Command
from worker.core.decide import NO_RECORD, RetryPolicy, Step, decide, decide_full, next_step, postponed
from worker.core.doubt import (
    doubt_after_answer,
    doubt_after_claim,
    doubt_while_in_progress,
    holder_may_have_crashed,
)
from worker.core.doubt_window import DoubtWindow
from worker.core.envelope import Task
from worker.core.outcome import Failed, Outcome, outcome_unknown, reply_to
from worker.core.platform import PlatformClient
from worker.core.resolution import AwaitReconciliation, Conclude, Duplicate, Postpone, Resolution, Retry, Unpublished
from worker.core.times import why_expired
from worker.errors import StoreError, StoreRefused, UnusableCommand
from worker.processing.attempt import Attempt, SendPermit
from worker.processing.circuit_breaker import CircuitBreakers, Permit
from worker.processing.crash_guard import ANNOUNCE_S, SUSPECT_WAIT_S, CrashGuard, ReplaceWith
from worker.processing.leases import Leases
from worker.processing.reconciler import Reconciler
from worker.processing.reporter import Reporter
from worker.processing.unstarted import Unstarted, key_of
from worker.telemetry.metrics import Metrics

OnHistoryFirst = Callable[[Task], object]
"""Called with a task that gave its permit back: it is no longer a probe."""

PROCESSING_S = SUSPECT_WAIT_S + ANNOUNCE_S + 2.0  # everything but the history and the request


class Engine:
    """Takes one command as far as possible now. Knows no broker: task in, resolution out.

    Args:
        client: sends requests to OneNET.
        store: remembers commands.
        breakers: tell of which products commands may be sent.
        history_breakers: tell of which products histories may be read.
        policy: when to try again.
        metrics: where to count.
        now: the time, aware; replaced in tests.

    Attributes:
        unstarted: postpones tasks that are not run.
        reporter: logs and counts resolutions.
    """

    def __init__(
        self,
        client: PlatformClient,
        store: IdempotencyStore,
        breakers: CircuitBreakers,
        history_breakers: CircuitBreakers,
        policy: RetryPolicy,
        metrics: Metrics,
        now: Clock = utc_now,
        on_send: Callable[[Command], object] = lambda _command: None,
    ) -> None:
        self.unstarted = Unstarted(store, breakers, policy, now)
        self.reporter = Reporter(metrics)
        self._client = client
        self._store = store
        self._breakers = breakers
        self._history_breakers = history_breakers
        self._policy = policy
        self._now = now
        self._on_send = on_send
        self._leases = Leases(store, policy, now)
        self._guard = CrashGuard(store, self._leases, policy, now)
        self._reconciler = Reconciler(client, store, self._leases, breakers, history_breakers, policy)

    def wants_note(self, task: Task) -> bool:
        """Tell whether the arrival of a task should be recorded: not of one that will be refused without a record."""
        return self.unstarted.wants_note(task) and task.command is not None and self._client.knows(task.command.product)

    async def run(self, task: Task, replace_with: ReplaceWith, on_history_first: OnHistoryFirst) -> Resolution:
        """Process one delivery; returns its resolution, an outcome only after it is recorded.

        Args:
            task: the delivery.
            replace_with: publishes a resolution in the delivery's place before processing ends.
            on_history_first: called if a task that held the permit to send needs its history first after all.
        """
        match task.parsed:
            case None:
                return self._guard.postpone_unparsed(task)
            case UnusableCommand() as error:
                failed = Failed(error.code, error.message, error.details)
                return self._conclude_unrecorded(task, failed, error.command_id, error.imei)
            case Command() as command:
                pass
        if task.envelope.delay_left_s:
            return self.unstarted.postpone(task, "its delay queue returned it early", task.envelope.delay_left_s)
        if not self._client.knows(command.product):
            unknown = await self._refuse_unknown_product(task, command)
            if unknown is not None:
                return unknown
        permit = SendPermit(self._breakers, command.product, partial(on_history_first, task))
        # A command in doubt needs its history first, which an open breaker of executions does not hinder.
        if not task.looks_in_doubt and permit.acquire() is None:
            return self.unstarted.postpone_paused(task, command.product)
        try:
            return await self._claim(task, command, permit, replace_with)
        finally:
            permit.release()

    async def _refuse_unknown_product(self, task: Task, command: Command) -> Unpublished | None:
        """End a command whose product is not configured; None: it may have been sent, or has an outcome already."""
        if task.envelope.doubt is not None and not task.envelope.repeats_unknown_product:
            return None
        try:
            is_known_otherwise = await self._store.is_known_not_sent(key_of(command)) is False
        except StoreError as exc:
            return self._leases.postpone(task.envelope, exc, task.envelope.doubt, holder_crashed=False)
        if is_known_otherwise:
            return None
        return self._conclude_unrecorded(task, _unknown_product(command), command.command_id, command.imei)

    async def _claim(self, task: Task, command: Command, permit: SendPermit, replace_with: ReplaceWith) -> Resolution:
        envelope, now = task.envelope, self._now()
        try:
            is_first = not (envelope.may_have_been_sent or envelope.is_copy)
            claim = await self._store.claim(key_of(command), now, envelope.replay, is_first=is_first)
        except StoreError as exc:
            if isinstance(exc, StoreRefused) and await self._has_expired_unsent(task, command):
                failed = _expired(command, await self._client.time_for(command), None)
                return self._conclude_unrecorded(task, failed, command.command_id, command.imei)
            return self._leases.postpone(envelope, exc, envelope.doubt, holder_crashed=False)
        match claim:
            case Completed(reply):
                # Perhaps the very delivery that ended so, back because not all that it led to was confirmed.
                is_look_missing = reply.status == "accepted" and envelope.is_copy
                return Duplicate(reply, repeats_all=envelope.may_have_been_sent or is_look_missing)
            case KeyReused(fields):
                return self._conclude_unrecorded(task, _key_reused(fields), command.command_id, command.imei)
            case InProgress(since):
                doubt = doubt_while_in_progress(since, envelope, now)
                return postponed(envelope, self._policy, "another delivery of it is being processed", doubt)
        attempt = Attempt(
            task,
            command,
            claim.lease,
            envelope.attempt,
            doubt_after_claim(claim, envelope, now),
            holder_may_have_crashed(claim, envelope),
            permit,
        )
        return await self._proceed(attempt, replace_with, claimed_at=now)

    async def _has_expired_unsent(self, task: Task, command: Command) -> bool:
        """Tell whether a command that the store refuses to claim has expired and is known not to have been sent.

        The store may refuse every claim for hours. What the message says counts if the store has no record, or refuses
        to be read as well.
        """
        envelope = task.envelope
        if envelope.is_redelivered or envelope.doubt is not None or envelope.replay is not None:
            return False
        if envelope.crash_count is not None or command.expires_at > await self._client.time_for(command):
            return False
        try:
            is_known = await self._store.is_known_not_sent(key_of(command))
        except StoreError:
            return False
        return envelope.attempt == 1 if is_known is None else is_known

    async def _proceed(self, attempt: Attempt, replace_with: ReplaceWith, claimed_at: datetime) -> Resolution:
        """Take the next step of a command that is claimed."""
        doubt, envelope = attempt.doubt, attempt.envelope
        match next_step(doubt, envelope, self._policy, claimed_at, holder_crashed=attempt.holder_crashed):
            case Failed() as failed:
                return await self._leases.conclude(attempt, failed)
            case Step.WAIT:
                assert doubt is not None  # otherwise there is nothing to wait for
                waiting = attempt.awaiting(self._policy, NO_RECORD)
                waiting = replace(waiting, delay_s=self._policy.wait_s(doubt, claimed_at))
                return await self._leases.release(attempt, waiting)
            case Step.RECONCILE:
                return await self._reconcile(attempt)
            case Step.RECONCILE_WITH_CARE:
                return await self._guard.run_last(attempt, replace_with, self._reconcile)
            case Step.TRY_WITH_CARE:
                return await self._guard.run(attempt, replace_with, self._try_suspect)
            case Step.SEND:
                return await self._send(attempt)

    async def _try_suspect(self, attempt: Attempt) -> Unpublished:
        if attempt.doubt is not None and self._policy.mode(attempt.envelope) == "reconcile":
            return await self._reconcile(attempt)
        return await self._send(attempt)

    async def _reconcile(self, attempt: Attempt) -> Unpublished:
        attempt.permit.give_way()
        return await self._reconciler.run(attempt, self._send)

    async def _send(self, attempt: Attempt) -> Unpublished:
        """Make the one request, and decide what its answer means."""
        command, before = attempt.command, attempt.doubt
        began_at = self._now()
        platform_now = await self._client.time_for(command)
        if command.expires_at <= platform_now:
            return await self._leases.conclude(attempt, _expired(command, platform_now, attempt.doubt))
        permit = attempt.permit.acquire()
        if permit is None:
            return await self._postpone_paused(attempt)
        began = time.monotonic()
        self._on_send(command)
        sent = await self._client.execute(command, attempt.lease.ends_at)
        now = self._now()
        self.reporter.time_request(sent.answer, began)
        self._record(attempt, permit, sent.answer)
        answered = replace(attempt, doubt=doubt_after_answer(before, sent.answer, began_at, now))
        result = await self._decide(answered, permit, sent.answer)
        if isinstance(sent.answer, InDoubt) and not isinstance(result, AwaitReconciliation):
            self.reporter.report_doubt(attempt.task, attempt.number, sent.answer.reason)
        if isinstance(result, Retry | Postpone | AwaitReconciliation):
            return await self._leases.release(answered, result)
        return await self._leases.conclude(answered, result, valid_time_omitted=sent.valid_time_omitted)

    async def _decide(
        self, attempt: Attempt, permit: Permit, answer: Answer
    ) -> Outcome | Retry | Postpone | AwaitReconciliation:
        """Decide what an answer means, for which a refusal over a limit needs a look at the device's queue."""
        command, now = attempt.command, self._client.now(attempt.command.product)
        if isinstance(answer, Refused) and answer.is_limit:
            reason = await self._reconciler.why_full(attempt)
            if reason is not None:
                return decide_full(
                    f"{reason} ({answer.message})",
                    attempt.number,
                    self._policy,
                    rested_s=self._now().timestamp() - attempt.envelope.first_arrived_at,
                    now=now,
                    expires_at=command.expires_at,
                    doubt=attempt.doubt,
                )
        return decide(
            answer,
            attempt.number,
            self._policy,
            now=now,
            expires_at=command.expires_at,
            doubt=attempt.doubt,
            is_paused=permit.is_paused,
        )

    async def _postpone_paused(self, attempt: Attempt) -> Unpublished:
        """Postpone a command, known not to have been cached, until its product is no longer paused."""
        product = attempt.command.product
        delay_s = postponement_s(self._policy.delays_s, self._breakers.suggested_delay_s(product))
        reason = self._breakers.why_paused(product)
        return await self._leases.release(
            attempt, Postpone(delay_s, attempt.number, reason, attempt.doubt, has_jitter=True)
        )

    def _record(self, attempt: Attempt, permit: Permit, answer: Answer) -> None:
        """Report the answer to the circuit breakers."""
        match answer:
            case NotSent(reason, retry_after_s, is_throttled=True):
                permit.record_throttling(reason, retry_after_s)
                self._history_breakers.hold(attempt.command.product, reason, retry_after_s)
            case NotSent(reason, retry_after_s):
                permit.record_failure(reason, retry_after_s)
                self._history_breakers.hold(attempt.command.product, reason, retry_after_s)
            case InDoubt(reason, is_outage=True):
                permit.record_failure(reason)
            case Refused(is_misconfigured=True):
                permit.record_failure(answer.cause)
            case Refused(may_concern_all_devices=True):
                permit.record_failure(answer.cause, device=attempt.command.imei)
            case _:
                permit.record_success()

    def _conclude_unrecorded(self, task: Task, failed: Failed, command_id: str | None, imei: str | None) -> Conclude:
        """Conclude without a record: the message fails the same way each time it is delivered."""
        return Conclude(failed, reply_to(failed, task.envelope.attempt, command_id, imei, self._now()))


def _unknown_product(command: Command) -> Failed:
    message = "is required: there are no default credentials"
    if command.product is not None:
        message = f"{command.product} is not configured"
    return Failed("unknown_product", f"product: {message}", (Detail(field="product", message=message),))


def _key_reused(fields: tuple[str, ...]) -> Failed:
    """``fields``: those that differ. Their values are not told: they may be another command's."""
    message = "the command_id belongs to a command with another content"
    details = [Detail(field="command_id", message=message)]
    details += [Detail(field=name, message="differs from that of the first command with this id") for name in fields]
    differing = f": {', '.join(fields)} {'differs' if len(fields) == 1 else 'differ'}" if fields else ""
    return Failed("command_id_conflict", f"{message}{differing}", tuple(details))


def _expired(command: Command, now: datetime, doubt: DoubtWindow | None) -> Failed:
    message = why_expired(command.expires_at, now)
    if doubt is not None:
        return outcome_unknown(f"expired_time {message}")
    return Failed("expired", f"expired_time {message}", (Detail(field="expired_time", message=message),))
