"""One delivery's way through: validate, recall, send or reconcile, decide; then others publish and acknowledge."""

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from zoneinfo import ZoneInfo

from schemas.reply import Detail, Reply, ReplyError
from worker.amqp.messages import Delivery, MessageBuilder, Publication
from worker.core.answer import Answer, InDoubt, NotSent, Refused
from worker.core.backoff import postponement_s
from worker.core.claims import (
    Ambiguous,
    Assigned,
    Completed,
    IdempotencyStore,
    InProgress,
    Key,
    KeyReused,
    KnownNotSent,
    Lease,
    LookalikeInProgress,
    NoCandidate,
    Unresolved,
    Unseen,
)
from worker.core.command import Command, as_command_id, read_command
from worker.core.decide import InDoubtMode, RetryPolicy, decide, decide_unreadable, unknown
from worker.core.doubt import DoubtWindow
from worker.core.outcome import Accepted, AwaitReconciliation, Failed, Final, Outcome, Rejected, Retry
from worker.core.platform import Candidate, PlatformClient
from worker.core.task import Task
from worker.errors import HistoryUnreadable, StoreError, UnusableCommand, UuidTaken
from worker.processing.circuit_breaker import CircuitBreakers, Permit
from worker.telemetry.logs import get_logger
from worker.telemetry.metrics import Metrics

MAX_UNFINISHED = 5  # tries that ended with the worker, after which a command is a poison message
MAX_UNREAD = 2  # more of them, after which even reading its history is left alone
MAX_NAMED = 3  # entries of a history in one message to an operator
MAX_RETURNS = 10  # half of what the broker allows before it sets a message aside by itself, without a reply
SUSPECT_WAIT_S = 1.0  # how long one suspect waits for another
PASS_ON_S = 2.0  # how long a confirm may take before a suspect is tried
HANDLING_S = SUSPECT_WAIT_S + PASS_ON_S + 2.0  # everything but the history and the request

_NOT_ITS_OWN = "the uuid that it was answered with belongs to another command"

log = get_logger()

PassOn = Callable[[Sequence[Publication]], bool]
"""Publishes, acknowledges the delivery once that is confirmed, and tells whether it was within ``PASS_ON_S``."""

End = Callable[[Sequence[Publication] | None], object]
"""Is told what must be confirmed before the delivery is acknowledged.

None: it was not begun, since nothing of its product is sent now.
"""


@dataclass(slots=True)
class _Turn:
    """One delivery of one command while it is handled."""

    delivery: Delivery
    command: Command
    passage: Permit | None  # through the gate of executions; None: it has not been asked for yet, or was given back
    pass_on: PassOn
    began: float
    attempt: int
    doubt: DoubtWindow | None  # all that is in doubt so far, this turn's own request included
    holder_crashed: bool = False  # a former try may have ended its worker
    is_marked: bool = False  # a copy of the message will come back for the outcome

    @property
    def unfinished(self) -> int | None:
        """Return what a copy of the message says of unfinished tries: none began since it was last marked."""
        return self.tries if self.holder_crashed else None

    @property
    def tries(self) -> int:
        """How many tries may have ended their worker; of those that only read the history the broker keeps count."""
        marked = self.delivery.unfinished or 0
        return marked + self.delivery.times_returned if marked >= MAX_UNFINISHED else marked

    @property
    def is_poison(self) -> bool:
        """Whether it has ended its worker too often to be sent once more."""
        return self.holder_crashed and self.tries >= MAX_UNFINISHED

    @property
    def may_read_history(self) -> bool:
        """Whether its history may be read before it is given up: a former try may have ended well, and told so.

        Where no record lasts, nothing else tells that from a try which ended the worker.
        """
        return self.doubt is not None and self.tries < MAX_UNFINISHED + MAX_UNREAD

    def doubt_lost_try(self, unrecorded_until: datetime | None) -> None:
        """Put a redelivery in doubt where the record may be older than the try that its message was delivered for."""
        if self.delivery.is_redelivered and unrecorded_until is not None:
            self.holder_crashed = True
            self.doubt = _prolonged(self.doubt, unrecorded_until)

    def settled(self, reason: str) -> AwaitReconciliation:
        """Return what the message says of the attempt that is in doubt."""
        return AwaitReconciliation(self.attempt, reason, consumes_attempt=self.delivery.consumes_attempt)

    @property
    def about(self) -> dict[str, object]:
        return {"command_id": self.command.command_id, "imei": self.command.imei, "attempt": self.attempt}


@dataclass(frozen=True, slots=True)
class _Unrecorded:
    """The outcome of a command that is held: recorded first, so that whatever fails from there on repeats it."""

    turn: _Turn
    hold: Lease
    reply: Reply
    outcome: Final

    @property
    def doubt(self) -> DoubtWindow:
        """When the command may have been sent, should this turn out to be the outcome of another one."""
        return _prolonged(self.turn.doubt, self.reply.completed_at)


_Ending = Sequence[Publication] | _Unrecorded


class Processor:
    """Handles deliveries, each in the thread that calls.

    Args:
        client: asks OneNET.
        store: remembers commands.
        outgoing: writes the messages.
        gates: tell of which products commands may be sent.
        history_gates: tell of which products histories may be read.
        policy: when to try again.
        platform_zone: where times without an offset are read.
        metrics: are told what happens.
        clock: the time, aware; replaced in tests.
    """

    def __init__(
        self,
        client: PlatformClient,
        store: IdempotencyStore,
        outgoing: MessageBuilder,
        gates: CircuitBreakers,
        history_gates: CircuitBreakers,
        policy: RetryPolicy,
        platform_zone: ZoneInfo,
        metrics: Metrics,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._client = client
        self._store = store
        self._outgoing = outgoing
        self.on_history_first: Callable[[Delivery], object] = lambda _: None
        """Is told, in any thread, of a delivery that looked new and turns out in doubt: it is no probe any more."""
        self._gates = gates
        self._history_gates = history_gates
        self._policy = policy
        self._zone = platform_zone
        self._metrics = metrics
        self._now = clock
        self._one_suspect = threading.Lock()

    def read(self, delivery: Delivery, now: float) -> Task:
        """Read the command of a delivery that came at a monotonic time."""
        if _is_suspect_to_read(delivery):
            return Task(delivery, None, now)
        try:
            return Task(delivery, read_command(delivery.body, delivery.message_id, self._zone), now)
        except UnusableCommand as exc:
            # Its traceback would keep the body, which may be large, until the garbage collector comes.
            exc.__traceback__ = exc.__cause__ = exc.__context__ = None
            return Task(delivery, exc, now)

    def handle(self, task: Task, pass_on: PassOn, end: End) -> None:
        """Handle one delivery.

        Args:
            task: what came.
            pass_on: lets a copy take the delivery's place before it ends.
            end: is called once, perhaps by another thread and after this has returned.
        """
        ending = self._ending_of(task, pass_on)
        if not isinstance(ending, _Unrecorded):
            end(ending)
            return

        def on_recorded(error: StoreError | None) -> None:
            match error:
                case None:
                    end(self._recorded(ending))
                case UuidTaken():
                    end(self._not_its_own(ending))
                case StoreError():
                    end(self._not_remembered(ending.turn, error))

        self._store.complete(ending.hold, ending.reply, ending.doubt, on_recorded)

    def rest(self, task: Task, at_least_s: float = 0) -> Publication:
        """Have a delivery that was not begun come again later: nothing of it is used up, nor put in doubt."""
        delivery = task.delivery
        product = None if task.command is None else task.command.product
        delay_s = postponement_s(self._policy.delays_s, max(at_least_s, self._gates.rest_s(product)))
        return self._outgoing.postpone(delivery, delay_s, self._doubt_of_copy(task), delivery.unfinished)

    def hand_back(self, task: Task) -> Publication:
        """Put a delivery that was not begun back into the queue, as if it had never been taken."""
        return self._outgoing.hand_back(task.delivery, self._doubt_of_copy(task))

    def mark_not_sent(self, task: Task) -> None:
        """Remember that a delivery which has become void was not started, so that its next one raises no doubt."""
        # What may have been sent before this process remains in doubt; what carries no command is never sent.
        if task.command is not None and not task.delivery.may_have_been_sent:
            self._store.mark_not_sent(_key(task.command))

    def _doubt_of_copy(self, task: Task) -> DoubtWindow | None:
        """Return what is in doubt of a delivery that was not begun.

        A doubled message is, once its twin has been claimed: the record of that may go before the copy comes again.
        """
        now = self._now()
        doubt = task.delivery.doubt_of_copy(now)
        if doubt is None and task.command is not None and self._store.is_claimed_here(_key(task.command)):
            return DoubtWindow(None, now)
        return doubt

    def _ending_of(self, task: Task, pass_on: PassOn) -> _Ending | None:
        began = time.monotonic()
        delivery = task.delivery
        match task.read:
            case None:
                return self._set_back(delivery, began)
            case UnusableCommand() as exc:
                failed = Failed(exc.code, exc.message, exc.details)
                return self._conclude(delivery, failed, began, command_id=exc.command_id, imei=exc.imei)
            case Command() as command:
                pass
        if not self._client.knows(command.product) and delivery.doubt is None:
            message = "is not configured" if command.product is not None else "is required: there are no default ones"
            details = (Detail(field="product", message=message),)
            failed = Failed("unknown_product", f"product: {message}", details)
            return self._conclude(delivery, failed, began, command_id=command.command_id, imei=command.imei)
        passage = None
        if not task.looks_in_doubt:  # otherwise its history comes first, which executions that are paused do not hinder
            passage = self._gates.enter(command.product)
            if passage is None:
                return None
        turn = _Turn(delivery, command, passage, pass_on, began, delivery.attempt, delivery.doubt)
        try:
            return self._recall(turn)
        except StoreError as exc:
            return self._not_remembered(turn, exc)
        finally:
            if turn.passage is not None:
                turn.passage.end()

    def _not_remembered(self, turn: _Turn, error: StoreError) -> Sequence[Publication]:
        """Put off what the store has failed: nothing is sent unguarded, and what was sent is in doubt."""
        if turn.delivery.is_redelivered:  # a copy does not look it
            turn.doubt = DoubtWindow(None, self._now()).union(turn.doubt)
        return self._put_off(turn, str(error))

    def _recall(self, turn: _Turn) -> _Ending:
        """Ask the store what is known of the command, and go on accordingly."""
        delivery, command = turn.delivery, turn.command
        now = self._now()
        claim = self._store.claim(_key(command), now, delivery.replay)
        match claim:
            case Completed(reply):
                return self._repeat(delivery, reply)
            case KeyReused():
                message = "the command_id belongs to a command with another content"
                failed = Failed("command_id_conflict", message, (Detail(field="command_id", message=message),))
                return self._conclude(delivery, failed, turn.began, command_id=command.command_id, imei=command.imei)
            case InProgress(since):
                turn.doubt = DoubtWindow(since, now).union(turn.doubt)  # all there is, should its record be lost
                return self._put_off(turn, "another delivery of it is being handled")
            case Unseen(hold, unrecorded_until, forgotten_before):
                turn.holder_crashed = delivery.is_redelivered or delivery.unfinished is not None
                if delivery.replay is not None:  # it may have come before, and its record be lost
                    turn.doubt = DoubtWindow(min(delivery.replay.failed_at, now), now).union(turn.doubt)
                elif delivery.is_redelivered:
                    turn.doubt = _prolonged(turn.doubt, now)
                elif delivery.attempt > 1 or turn.doubt is not None or _is_forgotten(delivery, forgotten_before):
                    turn.doubt = _prolonged(turn.doubt, unrecorded_until)
            case KnownNotSent(hold, unrecorded_until):
                turn.doubt_lost_try(unrecorded_until)
            case Unresolved(hold, doubt, holder_crashed, unrecorded_until):
                turn.holder_crashed = holder_crashed
                turn.doubt = doubt.union(turn.doubt)
                turn.doubt_lost_try(unrecorded_until)
        return self._go_on(turn, hold, now)

    def _go_on(self, turn: _Turn, hold: Lease, now: datetime) -> _Ending:
        """Handle a command that is held."""
        in_doubt = self._in_doubt(turn)
        if turn.is_poison and not (in_doubt == "reconcile" and turn.may_read_history):
            return self._finish(turn, hold, _poison(turn))
        if turn.doubt is not None and in_doubt == "dead-letter":
            return self._finish(turn, hold, unknown("no record tells what became of it"))
        if turn.doubt is not None and in_doubt == "reconcile":
            if now < turn.doubt.until + timedelta(seconds=self._policy.settle_s):
                return self._settle(turn, hold, turn.settled("no record tells what became of it"))
            if not turn.holder_crashed or turn.is_poison:  # no mark for this: the broker counts how often it returns
                return self._reconcile(turn, hold, turn.doubt)
        if turn.holder_crashed:
            return self._try_suspect(turn, hold)
        return self._send(turn, hold)

    def _in_doubt(self, turn: _Turn) -> InDoubtMode:
        """Return what becomes of a doubt: a person who has a command replayed wants its history read."""
        return self._policy.in_doubt if turn.delivery.replay is None else "reconcile"

    def _try_suspect(self, turn: _Turn, hold: Lease) -> _Ending:
        """Try a command that may have ended a worker: one at a time, and not without a mark on its message.

        The mark must be there before the try, so a copy that counts one more unfinished try takes the message's place.
        It comes back for what the store knows then; if the store knows nothing, that try ended with its worker.
        """
        if not self._one_suspect.acquire(timeout=SUSPECT_WAIT_S):
            self._store.release(hold, turn.doubt, holder_crashed=True)
            return self._put_off(turn, "another command is being tried with care")
        try:
            now = self._now()
            unfinished = turn.tries + 1
            doubt = DoubtWindow(now, now).union(turn.doubt)
            marked = self._outgoing.postpone(turn.delivery, self._policy.delays_s[0], doubt, unfinished)
            if not turn.pass_on([marked]):
                self._store.release(hold, turn.doubt, holder_crashed=True)
                return ()
            turn.is_marked = True
            with suppress(StoreError):  # the lease's end will tell
                if turn.doubt is not None and self._in_doubt(turn) == "reconcile":
                    ending = self._reconcile(turn, hold, turn.doubt)
                else:
                    ending = self._send(turn, hold)
                if isinstance(ending, _Unrecorded):
                    self._record_now(ending)
            return ()
        finally:
            self._one_suspect.release()

    def _record_now(self, ending: _Unrecorded) -> None:
        """Record an outcome that a copy of the message will come for."""
        is_over = threading.Event()

        def on_recorded(error: StoreError | None) -> None:
            if error is None:
                self._recorded(ending)
            elif isinstance(error, UuidTaken):
                self._note_doubt(ending.turn, _NOT_ITS_OWN)  # the copy finds the command in doubt
            is_over.set()

        self._store.complete(ending.hold, ending.reply, ending.doubt, on_recorded)
        is_over.wait()

    def _reconcile(self, turn: _Turn, hold: Lease, doubt: DoubtWindow) -> _Ending:
        """Let the device's command history decide."""
        if turn.passage is not None:  # nothing is sent yet: the next command may be the probe of executions
            turn.passage.end()
            turn.passage = None
            self.on_history_first(turn.delivery)
        settled = turn.settled("answer lost")
        product = turn.command.product
        passage = self._history_gates.enter(product)
        if passage is None:
            reason = f"command histories are not read for now: {self._history_gates.reason_of(product)}"
            return self._settle(turn, hold, replace(settled, reason=reason))
        try:
            entries = self._client.find_candidates(turn.command, doubt, partial(self._store.owned_by_others, hold.key))
            passage.answered()
        except HistoryUnreadable as exc:
            self._tell_of_history(turn, passage, exc)
            is_free = passage.is_paused or exc.is_throttled
            outcome = decide_unreadable(str(exc), settled, self._policy, is_paused=is_free)
            return (
                self._settle(turn, hold, outcome)
                if isinstance(outcome, AwaitReconciliation)
                else self._end(turn, hold, outcome)
            )
        finally:
            passage.end()
        likely = [entry.uuid for entry in entries if entry.is_within_clock_skew]
        unlikely = [entry.uuid for entry in entries if not entry.is_within_clock_skew and not entry.unclear]
        unclear = [entry for entry in entries if entry.unclear]
        choice = self._store.own(hold, likely, unlikely)
        reason = "the device's command history has several like it, and no record tells which is whose"
        if isinstance(choice, NoCandidate) and unclear:
            # Only now: a platform writes one value in one way, so an equal entry leaves no doubt about the others.
            choice = self._store.own(hold, [], [entry.uuid for entry in unclear])
            reason = _unclear(unclear)
        match choice:
            case Assigned(uuid):
                log.info("command_recovered", **turn.about, uuid=uuid)
                omitted = any(entry.uuid == uuid and entry.valid_time_omitted for entry in entries)
                return self._finish(turn, hold, Accepted(uuid, recovered=True), omitted=omitted)
            case Ambiguous():
                return self._finish(turn, hold, unknown(reason))
            case LookalikeInProgress():
                self._let_go(turn, hold)
                return self._put_off(turn, "a command just like it is being handled")
            case NoCandidate():
                return self._send_after_all(turn, hold, settled)

    def _send_after_all(self, turn: _Turn, hold: Lease, settled: AwaitReconciliation) -> _Ending:
        """Send a command that is known now not to have been cached."""
        turn.doubt = None
        if turn.is_poison:
            return self._finish(turn, hold, _poison(turn))
        if not turn.holder_crashed:  # otherwise nobody knows whether that attempt was begun
            if settled.used >= self._policy.max_attempts:
                message = f"given up after {turn.attempt} attempts: the last one was not cached"
                return self._finish(turn, hold, Failed("retries_exhausted", message))
            turn.attempt = settled.used + 1
        return self._send(turn, hold)

    def _send(self, turn: _Turn, hold: Lease) -> _Ending:
        began_at = self._now()
        if turn.command.expires_at <= began_at:
            if turn.doubt is not None:
                return self._finish(turn, hold, unknown("expired_time has passed"))
            details = (Detail(field="expired_time", message="has passed"),)
            return self._finish(turn, hold, Failed("expired", "expired_time has passed", details))
        passage = turn.passage = turn.passage or self._gates.enter(turn.command.product)
        if passage is None:
            return self._wait_unsent(turn, hold)
        former = turn.doubt
        turn.doubt = DoubtWindow(began_at, began_at).union(former)  # until its answer says otherwise
        began = time.monotonic()
        sent = self._client.execute(turn.command, hold.ends_at)
        now = self._now()
        self._metrics.time_request(sent.answer, began)
        self._tell(turn, passage, sent.answer)
        if isinstance(sent.answer, InDoubt):
            turn.doubt = DoubtWindow(began_at, now).union(former)
        elif isinstance(sent.answer, NotSent | Refused):
            turn.doubt = former
        outcome = decide(
            sent.answer,
            turn.attempt,
            self._policy,
            now=now,
            expires_at=turn.command.expires_at,
            was_in_doubt=former is not None,
            is_paused=passage.is_paused,
        )
        if isinstance(sent.answer, InDoubt) and not isinstance(outcome, AwaitReconciliation):
            self._note_doubt(turn, sent.answer.reason)
        return self._end(turn, hold, outcome, omitted=sent.valid_time_omitted)

    def _wait_unsent(self, turn: _Turn, hold: Lease) -> Sequence[Publication]:
        """Have a command that is known not to have been cached wait until its product is sent; it uses no attempt."""
        product = turn.command.product
        delay_s = postponement_s(self._policy.delays_s, self._gates.rest_s(product))
        again = Retry(delay_s, turn.attempt, f"nothing is sent for now: {self._gates.reason_of(product)}")
        return self._try_again(turn, hold, again)

    def _try_again(self, turn: _Turn, hold: Lease, again: Retry) -> Sequence[Publication]:
        self._store.release(hold, turn.doubt)
        self._note_retry(turn, again.attempt, again.delay_s, again.reason)
        return [self._outgoing.retry(turn.delivery, again, turn.doubt)]

    def _tell(self, turn: _Turn, passage: Permit, answer: Answer) -> None:
        """Tell a product's gates what the answer to a command says of the platform."""
        match answer:
            case NotSent(reason, asked_s, is_throttled=True):
                passage.throttled(reason, asked_s)
                self._history_gates.hold(turn.command.product, reason, asked_s)
            case NotSent(reason, asked_s):
                passage.failed(reason, asked_s)
                self._history_gates.hold(turn.command.product, reason, asked_s)
            case InDoubt(reason, is_outage=True):
                passage.failed(reason)
            case Refused(may_concern_all_devices=True):
                passage.refused(answer.cause, turn.command.imei)
            case _:
                passage.answered()

    def _tell_of_history(self, turn: _Turn, passage: Permit, error: HistoryUnreadable) -> None:
        """Tell a product's gates what an unreadable history says of the platform."""
        reason = f"the command history: {error}"
        if error.is_throttled:
            passage.throttled(reason, error.retry_after_s)
            self._gates.hold(turn.command.product, reason, error.retry_after_s)
        elif error.is_outage:
            passage.failed(reason, error.retry_after_s)
        elif error.is_refused:
            passage.refused(reason, turn.command.imei)

    def _end(self, turn: _Turn, hold: Lease, outcome: Outcome, *, omitted: bool = False) -> _Ending:
        match outcome:
            case AwaitReconciliation():
                return self._settle(turn, hold, outcome)
            case Retry():
                return self._try_again(turn, hold, outcome)
            case Accepted() | Rejected() | Failed():
                return self._finish(turn, hold, outcome, omitted=omitted)

    def _settle(self, turn: _Turn, hold: Lease, outcome: AwaitReconciliation) -> Sequence[Publication]:
        """Let a command in doubt rest until its device's history can tell."""
        assert turn.doubt is not None  # or there would be nothing to settle
        self._let_go(turn, hold)
        settle_s = self._policy.settle_s
        self._note_doubt(turn, outcome.reason, settle_s=settle_s)
        return [self._outgoing.settle(turn.delivery, outcome, settle_s, turn.doubt, turn.unfinished)]

    def _let_go(self, turn: _Turn, hold: Lease) -> None:
        self._store.release(hold, turn.doubt, holder_crashed=turn.holder_crashed and not turn.is_marked)

    def _put_off(self, turn: _Turn, reason: str) -> Sequence[Publication]:
        """Have a message come again a little later; no attempt is used up."""
        delay_s = self._policy.delays_s[0]
        self._note_retry(turn, turn.delivery.attempt, delay_s, reason)
        # The try that is counted last may be the one that is under way elsewhere.
        unfinished = turn.unfinished if turn.delivery.unfinished is None else turn.tries
        return [self._outgoing.postpone(turn.delivery, delay_s, turn.doubt, unfinished)]

    def _set_back(self, delivery: Delivery, began: float) -> Sequence[Publication]:
        """Put a message off that comes back again and again, before the broker sets it aside without a reply.

        Most are innocent, and were merely held by workers that ended. Nothing is done with it here that could be what
        ended them, not even reading it.
        """
        unfinished = (delivery.unfinished or 0) + 1
        if unfinished > MAX_UNFINISHED:
            failed = Failed("poison_message", "the worker ended again and again before it had read this message")
            return self._conclude(delivery, failed, began, command_id=as_command_id(delivery.message_id), imei=None)
        doubt = _prolonged(delivery.doubt, self._now())
        return [self._outgoing.postpone(delivery, self._policy.delays_s[0], doubt, unfinished)]

    def _finish(self, turn: _Turn, hold: Lease, outcome: Final, *, omitted: bool = False) -> _Unrecorded:
        """End a command that is held."""
        reply = _reply(outcome, turn.attempt, turn.command.command_id, turn.command.imei, self._now(), omitted=omitted)
        return _Unrecorded(turn, hold, reply, outcome)

    def _recorded(self, ending: _Unrecorded) -> Sequence[Publication]:
        return self._publications(ending.turn.delivery, ending.reply, ending.outcome, ending.turn.began)

    def _not_its_own(self, ending: _Unrecorded) -> Sequence[Publication]:
        """Settle a command whose answer had the uuid of another one, as if the answer had been lost.

        The store has let go of it already, in the same step in which it refused the outcome.
        """
        turn, settle_s = ending.turn, self._policy.settle_s
        attempt = turn.attempt
        if self._in_doubt(turn) == "resend":  # without a look at the history, so that the next request uses an attempt
            attempt += 1
            if attempt > self._policy.max_attempts:
                failed, command = unknown(_NOT_ITS_OWN), turn.command
                return self._conclude(
                    turn.delivery, failed, turn.began, command_id=command.command_id, imei=command.imei
                )
        outcome = AwaitReconciliation(attempt, _NOT_ITS_OWN)
        self._note_doubt(turn, outcome.reason, settle_s=settle_s)
        return [self._outgoing.settle(turn.delivery, outcome, settle_s, ending.doubt, None)]

    def _conclude(
        self, delivery: Delivery, failed: Failed, began: float, *, command_id: str | None, imei: str | None
    ) -> Sequence[Publication]:
        """End a message that no record is kept of: it fails the same way however often it comes."""
        reply = _reply(failed, delivery.attempt, command_id, imei, self._now())
        return self._publications(delivery, reply, failed, began)

    def _repeat(self, delivery: Delivery, reply: Reply) -> Sequence[Publication]:
        self._metrics.count_duplicate()
        log.info(
            "duplicate_suppressed",
            command_id=reply.command_id,
            imei=reply.imei,
            attempt=delivery.attempt,
            status=reply.status,
        )
        publications = [self._outgoing.reply(delivery, reply)]
        if reply.status == "failed" and delivery.may_have_been_sent:
            # Perhaps the very delivery that failed, back because its dead letter was not confirmed.
            publications.append(self._dead_letter(delivery, reply))
        return publications

    def _publications(self, delivery: Delivery, reply: Reply, outcome: Final, began: float) -> Sequence[Publication]:
        publications = [self._outgoing.reply(delivery, reply)]
        self._metrics.count_outcome(outcome)
        fields = {
            "command_id": reply.command_id,
            "imei": reply.imei,
            "attempt": reply.attempts,
            "duration_ms": round((time.monotonic() - began) * 1000, 1),
        }
        match outcome:
            case Accepted(uuid):
                log.info("command_accepted", **fields, uuid=uuid)
            case Rejected(code, message, errno):
                log.warning("command_rejected", **fields, code=code, errno=errno, reason=message)
            case Failed(code, message):
                log.warning("command_failed", **fields, code=code, reason=message)
                publications.append(self._dead_letter(delivery, reply))
        return publications

    def _dead_letter(self, delivery: Delivery, reply: Reply) -> Publication:
        assert isinstance(reply.error, ReplyError)
        self._metrics.count_dead_letter(reply.error.code)
        return self._outgoing.dead_letter(delivery, reply)

    def _note_retry(self, turn: _Turn, next_attempt: int, delay_s: int, reason: str) -> None:
        self._metrics.count_retry()
        log.warning(
            "command_retry_scheduled",
            **turn.about,
            next_attempt=next_attempt,
            delay_s=delay_s,
            reason=reason,
        )

    def _note_doubt(self, turn: _Turn, reason: str, **more: object) -> None:
        self._metrics.count_doubt()
        log.warning("command_in_doubt", **turn.about, reason=reason, **more)


def _unclear(entries: Sequence[Candidate]) -> str:
    """Say which entries of a history may be a command, for an operator who looks at them."""
    shown = [f"{entry.uuid or 'one without a cmd_uuid'} ({', '.join(entry.unclear)})" for entry in entries[:MAX_NAMED]]
    more = f" and {len(entries) - MAX_NAMED} more" if len(entries) > MAX_NAMED else ""
    return f"entries of the device's command history cannot be told from it, in these fields: {'; '.join(shown)}{more}"


def _poison(turn: _Turn) -> Failed:
    message = f"the worker ended {turn.tries} times while it handled this command"
    return Failed("poison_message", message)


def _is_suspect_to_read(delivery: Delivery) -> bool:
    """Tell whether a message comes back again and again, so that reading it may be what ends the workers."""
    return delivery.is_redelivered and delivery.times_returned >= MAX_RETURNS


def _is_forgotten(delivery: Delivery, forgotten_before: datetime | None) -> bool:
    """Tell whether a message is a copy whose command may have been sent before the store's records begin.

    The message that it was copied from may have come again, and have been sent, if its worker ended in between.
    """
    if forgotten_before is None or not delivery.is_returned:
        return False
    return delivery.first_arrived_at < forgotten_before.timestamp()


def _key(command: Command) -> Key:
    return Key(command.command_id, command.content_hash(), command.match_key())


def _prolonged(doubt: DoubtWindow | None, until: datetime) -> DoubtWindow:
    """Return a doubt that covers tries until then of which there is no record; none began before a noted one."""
    return DoubtWindow(None, until) if doubt is None else DoubtWindow(doubt.since, max(doubt.until, until))


def _reply(
    outcome: Final, attempt: int, command_id: str | None, imei: str | None, now: datetime, *, omitted: bool = False
) -> Reply:
    error = None
    match outcome:
        case Rejected(code, message, errno):
            error = ReplyError(code=code, message=message, errno=errno)
        case Failed(failure, message, details):
            error = ReplyError(code=failure, message=message, details=details or None)
    return Reply(
        command_id=command_id,
        status=outcome.status,
        uuid=outcome.uuid if isinstance(outcome, Accepted) else None,
        imei=imei,
        error=error,
        attempts=attempt,
        recovered=isinstance(outcome, Accepted) and outcome.recovered,
        valid_time_omitted=omitted,
        completed_at=now,
    )
