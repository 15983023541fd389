"""The engine in a test: tasks in, resolutions out, with a scripted platform and one history for the order of steps."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, TypeVar
from zoneinfo import ZoneInfo

from pika import BasicProperties

from schemas.reply import Reply
from tests.support.builders import a_command, in_hours
from worker.amqp.messages import REPLAY, Delivery, MessageBuilder, Publication
from worker.amqp.topology import Topology
from worker.core.answer import Answer, Cached, NotSent
from worker.core.claims import Claim, IdempotencyStore, Key, Lease
from worker.core.command import Command
from worker.core.decide import InDoubtMode, RetryPolicy
from worker.core.doubt_window import DoubtWindow
from worker.core.envelope import Envelope, Replay, Task
from worker.core.outcome import Failed
from worker.core.ownership import OwnershipFacts
from worker.core.parsing import read_task
from worker.core.platform import Candidate, OwnedByOthers, PlatformClient, Sent
from worker.core.resolution import (
    AwaitReconciliation,
    Conclude,
    Duplicate,
    Postpone,
    Replaced,
    Resolution,
    Retry,
    Unpublished,
)
from worker.errors import HistoryUnreadable, StoreUnavailable
from worker.idempotency.memory import MemoryStore
from worker.processing.circuit_breaker import CircuitBreakers
from worker.processing.engine import Engine as WorkerEngine
from worker.telemetry.metrics import Metrics

CHINA = ZoneInfo("Asia/Shanghai")
RECONCILE_DELAY_S = 60
DELAYS_S = (5, 30)
MAX_ATTEMPTS = 3
PAUSE_AFTER, PROBE_S = 3, 5
DEVICES = [str(865820030000001 + number) for number in range(3)]
LONG_AGO = datetime.now(UTC).replace(microsecond=0) - timedelta(hours=1)
TOMORROW = in_hours(24)  # the same for every delivery: another time would be another command
PAST_DOUBT = DoubtWindow(LONG_AGO, LONG_AGO + timedelta(seconds=2))  # the history can tell by now

T = TypeVar("T")


def an_envelope(**fields: Any) -> Envelope:
    """Return the envelope of a first delivery that has just arrived, with changes."""
    now = time.time()
    return Envelope(**({"arrived_at": now, "first_arrived_at": now, "published_at": now} | fields))


def a_copy(**fields: Any) -> Envelope:
    """Return the envelope of a copy that a worker published earlier."""
    return an_envelope(**({"is_copy": True} | fields))


def in_doubt(attempt: int = 1, **fields: Any) -> Envelope:
    """Return the envelope of a copy in doubt whose device's history can tell by now."""
    return a_copy(**({"attempt": attempt, "doubt": PAST_DOUBT} | fields))


def a_task(envelope: Envelope | None = None, *, body: bytes | None = None, **changes: Any) -> Task:
    """Return a delivery of command "a": the first one unless an envelope is given, with changes to the command."""
    if body is None:
        body = json.dumps(a_command(**({"command_id": "a", "expired_time": TOMORROW} | changes))).encode()
    return read_task(envelope or an_envelope(), body, CHINA, 0.0)


def notes(envelope: Envelope) -> Mapping[str, Any]:
    """Return the attempt and whatever else a worker noted on a copy."""
    noted = {
        "attempt": envelope.attempt,
        "is_free_attempt": envelope.is_free_attempt,
        "crash_count": envelope.crash_count,
        "doubt": envelope.doubt,
        "replay": envelope.replay,
    }
    return {name: value for name, value in noted.items() if value is not None and value is not False}


def expect(kind: type[T], resolution: Resolution | None) -> T:
    """Return a resolution that must be of one kind."""
    assert isinstance(resolution, kind), resolution
    return resolution


def reply_of(resolution: Resolution) -> Reply:
    """Return the reply of a command that has its outcome, recorded now or earlier."""
    assert isinstance(resolution, Conclude | Duplicate), resolution
    return resolution.reply


def failure_of(resolution: Resolution) -> Failed:
    """Return the failure with which a delivery is concluded; it is dead-lettered as well."""
    outcome = expect(Conclude, resolution).outcome
    assert isinstance(outcome, Failed), outcome
    return outcome


def expect_retry(resolution: Resolution, delay_s: int = DELAYS_S[0]) -> Retry:
    """Return a resolution that must be a retry after ``delay_s`` seconds."""
    retry = expect(Retry, resolution)
    assert retry.delay_s == delay_s
    return retry


def expect_postpone(resolution: Resolution, delay_s: int = DELAYS_S[0]) -> Postpone:
    """Return a resolution that must be a postponement by ``delay_s`` seconds."""
    postpone = expect(Postpone, resolution)
    assert postpone.delay_s == delay_s
    return postpone


def expect_reconciliation(resolution: Resolution | None) -> AwaitReconciliation:
    """Return a resolution that must be the wait for the device's command history."""
    waiting = expect(AwaitReconciliation, resolution)
    assert waiting.delay_s == RECONCILE_DELAY_S
    return waiting


def a_likely(uuid: str) -> Candidate:
    """Return a history entry that matches in every respect."""
    return Candidate(uuid, is_within_clock_skew=True, valid_time_omitted=False)


def an_unclear(uuid: str, *fields: str) -> Candidate:
    """Return a history entry whose fields neither match nor differ for certain."""
    return Candidate(uuid, is_within_clock_skew=False, valid_time_omitted=False, unclear=fields)


class Killed(BaseException):
    """The worker's process was killed."""


async def do_nothing() -> None:
    """Let the platform answer at once."""


@dataclass
class ScriptedPlatform:
    """Answers by a script, and records the calls.

    Attributes:
        steps: the history of all calls.
        products: those that are configured; None is the default one.
        answers: to the next requests; after them each command is cached.
        candidates: what the device's history has; None: it cannot be read.
        history_error: why the history cannot be read.
        waiting: how many commands wait for each device; None: its history cannot be read.
        clock_offset_s: seconds by which its clock is ahead of the worker's.
        valid_time_omitted: whether the requests are without the commands' ``valid_time``.
        on_request: awaited during each request.
        on_history: awaited during each reading of a history.
    """

    steps: list[str]
    products: set[str | None] = field(default_factory=lambda: {None})
    answers: list[Answer] = field(default_factory=list)
    candidates: list[Candidate] | None = field(default_factory=list)
    history_error: HistoryUnreadable | None = None
    waiting: int | None = 0
    clock_offset_s: float = 0.0
    valid_time_omitted: bool = False
    on_request: Callable[[], Awaitable[object]] = do_nothing
    on_history: Callable[[], Awaitable[object]] = do_nothing

    def knows(self, product: str | None) -> bool:
        return product in self.products

    async def execute(self, _command: Command, _not_after: float) -> Sent:
        self.steps.append("request")
        await self.on_request()
        number = self.steps.count("request")
        usual = Cached("u" if number == 1 else f"u{number}")
        return Sent(self.answers.pop(0) if self.answers else usual, self.valid_time_omitted)

    def now(self, _product: str | None) -> datetime:
        return datetime.now(UTC) + timedelta(seconds=self.clock_offset_s)

    async def time_for(self, _command: Command) -> datetime:
        return self.now(None)

    async def count_waiting(self, _command: Command, most: int) -> int:
        self.steps.append("queue")
        await self.on_history()
        if self.waiting is None:
            raise HistoryUnreadable("HTTP 500", is_outage=True)
        return min(self.waiting, most)

    async def find_candidates(
        self, _command: Command, _doubt: DoubtWindow, owned_by_others: OwnedByOthers
    ) -> list[Candidate]:
        self.steps.append("history")
        await owned_by_others([candidate.uuid for candidate in self.candidates or () if candidate.uuid])
        await self.on_history()
        if self.history_error is not None:
            raise self.history_error
        if self.candidates is None:
            raise HistoryUnreadable("HTTP 500", is_outage=True)
        return self.candidates


class RecordingStore(MemoryStore):
    """A real store that records when it is written to, and whose calls can be made to fail.

    Args:
        steps: the history of all calls.
        began_at: when its records begin.
    """

    def __init__(self, steps: list[str], began_at: datetime = LONG_AGO) -> None:
        super().__init__(ttl_s=600, lease_s=600, began_at=began_at)
        self.steps = steps
        self.failing: set[str] = set()  # names of the calls
        self.guesses: list[bool] = []  # of each recorded outcome

    async def claim(self, key: Key, now: datetime, replay: Replay | None = None, *, is_first: bool = True) -> Claim:
        self._check("claim")
        self.steps.append("claim")
        return await super().claim(key, now, replay, is_first=is_first)

    async def complete(self, lease: Lease, reply: Reply, doubt: DoubtWindow | None, *, is_guess: bool = False) -> None:
        self._check("complete")
        self.steps.append("complete")
        self.guesses.append(is_guess)
        await super().complete(lease, reply, doubt, is_guess=is_guess)

    async def release(self, lease: Lease, doubt: DoubtWindow | None, *, holder_crashed: bool = False) -> None:
        self._check("release")
        await super().release(lease, doubt, holder_crashed=holder_crashed)

    async def is_known_not_sent(self, key: Key) -> bool | None:
        self._check("is_known_not_sent")
        return await super().is_known_not_sent(key)

    async def owned_by_others(self, owner_id: str, uuids: Sequence[str]) -> set[str]:
        self._check("owned_by_others")
        return await super().owned_by_others(owner_id, uuids)

    async def ownership(self, lease: Lease, uuids: Sequence[str]) -> OwnershipFacts:
        self._check("ownership")
        return await super().ownership(lease, uuids)

    def _check(self, call: str) -> None:
        if call in self.failing:
            raise StoreUnavailable("Redis: ConnectionError")


class Engine:
    """The worker's engine with everything that it needs; reports what becomes of deliveries as the consumer does.

    Args:
        in_doubt: what becomes of commands in doubt.
        platform: answers; by default scripted.
        store: remembers; by default each process has a new one in memory.
    """

    def __init__(
        self,
        in_doubt: InDoubtMode = "reconcile",
        *,
        platform: PlatformClient | None = None,
        store: IdempotencyStore | None = None,
    ) -> None:
        self.steps: list[str] = []
        self.platform = ScriptedPlatform(self.steps)
        self._client = platform or self.platform
        self._given_store = store
        self.policy = RetryPolicy(DELAYS_S, MAX_ATTEMPTS, RECONCILE_DELAY_S, in_doubt)
        self.messages = MessageBuilder(Topology("onenet", (*DELAYS_S, RECONCILE_DELAY_S)), "host:1")
        self.announced: list[Postpone] = []
        self.published: Unpublished | None = None  # in a message's place, before it was settled
        self.history_first: list[Task] = []  # had the permit to send, and needed their history first
        self.is_confirmed = True
        self.seconds = 0.0  # on the breakers' clock
        self.ahead_s = 0.0  # by how much the engine's clock is ahead
        self._processed: list[tuple[Resolution, Envelope]] = []
        self.restart()

    def restart(self, store: IdempotencyStore | None = None, *, began_at: datetime = LONG_AGO) -> None:
        """Start a new process, which knows only what its store has; by default nothing."""
        self.store = RecordingStore(self.steps, began_at)
        used = store or self._given_store or self.store
        self.breakers = CircuitBreakers([None], PAUSE_AFTER, PROBE_S, lambda: self.seconds)
        self.history_breakers = CircuitBreakers([None], PAUSE_AFTER, PROBE_S, lambda: self.seconds, subject="history")
        self.metrics = Metrics("0", 1)
        self._engine = WorkerEngine(
            self._client, used, self.breakers, self.history_breakers, self.policy, self.metrics, self.now
        )
        self.unstarted = self._engine.unstarted

    def now(self) -> datetime:
        """Return the engine's time."""
        return datetime.now(UTC) + timedelta(seconds=self.ahead_s)

    async def process(self, task: Task) -> Resolution:
        """Process one delivery, and report what becomes of it."""
        resolution = await self._engine.run(task, partial(self._replace_with, task), self.history_first.append)
        self._engine.reporter.report(task, resolution)
        if isinstance(resolution, Replaced) and resolution.result is self.published:
            assert resolution.result is not None
            resolution = resolution.result  # was published before the next suspect
        self._processed.append((resolution, task.envelope))
        return resolution

    async def deliver(self, delivery: Delivery) -> Sequence[Publication]:
        """Process a delivery of the broker; returns what is published."""
        task = read_task(delivery.envelope, delivery.body, CHINA, 0.0)
        return self.messages.publications(delivery, await self.process(task))

    def copy_of(self, resolution: Resolution) -> Envelope:
        """Return the envelope with which the copy that a resolution publishes is delivered."""
        assert isinstance(resolution, Retry | AwaitReconciliation | Postpone), resolution
        original = next(envelope for each, envelope in reversed(self._processed) if each is resolution)
        return self._returned(original, self.messages.publications(_delivery(original), resolution)[0])

    def republished(self, task: Task, *, is_stopping: bool = False) -> Envelope:
        """Return the envelope with which a delivery that was not started is delivered after it was republished."""
        doubt = self.unstarted.doubt_of_copy(task)
        publication = self.messages.republish(_delivery(task.envelope), doubt, is_stopping=is_stopping)
        return self._returned(task.envelope, publication)

    def postponed(self, task: Task) -> Envelope:
        """Return the envelope with which a delivery that was not started is delivered after it was postponed."""
        postpone = self.unstarted.postpone(task, "not started")
        self._processed.append((postpone, task.envelope))
        return self.copy_of(postpone)

    def announcement(self) -> Envelope:
        """Return the envelope of the one copy that was published before an attempt."""
        [postpone] = self.announced
        assert postpone.delay_s == DELAYS_S[0]
        return self.copy_of(postpone)

    async def recorded(self, task: Task) -> Reply:
        """Return the reply that another delivery of a command gets."""
        return expect(Duplicate, await self.process(task)).reply

    def process_during_request(self, task: Callable[[], Task]) -> list[Resolution]:
        """Have another delivery processed during each request; returns the list of what becomes of it."""
        resolutions: list[Resolution] = []

        async def process() -> None:
            resolutions.append(await asyncio.create_task(self.process(task())))

        self.platform.on_request = process
        return resolutions

    async def kill_during_request(self, task: Task) -> None:
        """Process a delivery in a worker that is killed once its request has been sent."""

        async def kill() -> None:
            raise Killed

        self.platform.on_request = kill
        with suppress(Killed):
            await self.process(task)
            raise AssertionError("no request was sent")
        self.platform.on_request = do_nothing

    def pause(self) -> None:
        """Record enough failures to open the circuit breaker of the platform."""
        while (permit := self.breakers.try_acquire(None)) is not None:
            permit.record_failure("HTTP 503")

    def pause_histories(self) -> None:
        """Record enough failed history reads to open their circuit breaker."""
        while (permit := self.history_breakers.try_acquire(None)) is not None:
            permit.record_failure("the command history: HTTP 503")

    async def probe(self, task: Task) -> Resolution:
        """Process a delivery as soon as the next probe is due."""
        self.seconds += self.breakers.retry_in_s()
        return await self.process(task)

    async def probe_histories(self, task: Task) -> Resolution:
        """Process a delivery as soon as the next probe of histories is due."""
        self.seconds += self.history_breakers.retry_in_s()
        return await self.process(task)

    async def last_attempt(self) -> Envelope:
        """Let a command's first two attempts fail; returns the envelope with which it is delivered for its third."""
        self.platform.answers = [NotSent("refused")] * 2
        first = await self.process(a_task())
        return self.copy_of(await self.process(a_task(self.copy_of(first))))

    async def _replace_with(self, task: Task, resolution: Unpublished) -> bool:
        if isinstance(resolution, Postpone):
            self.steps.append("announce")
            self.announced.append(resolution)
        self._processed.append((resolution, task.envelope))
        self.published = resolution
        return self.is_confirmed

    def _returned(self, original: Envelope, publication: Publication) -> Envelope:
        """Return what the worker reads from a copy when the broker delivers it, after its delay."""
        copy = Delivery(1, 1, is_redelivered=False, properties=publication.properties, body=b"", is_returned=True)
        assert copy.envelope.is_copy
        noted_at = original.arrived_at if original.is_unstarted else original.first_arrived_at
        assert copy.envelope.first_arrived_at <= noted_at + 1
        return replace(copy.envelope, delay=None)


def replaced(resolution: Resolution) -> Unpublished | None:
    """Return what became of an attempt whose message a copy has replaced."""
    return expect(Replaced, resolution).result


def redelivered(envelope: Envelope | None = None) -> Envelope:
    """Return an envelope as the broker delivers its message once more."""
    return replace(envelope or an_envelope(), is_redelivered=True)


def _delivery(envelope: Envelope) -> Delivery:
    """Return a delivery that says of itself what an envelope says."""
    replay = envelope.replay
    headers = {} if replay is None else {REPLAY: replay.failed_at.isoformat(timespec="milliseconds")}
    message_id = envelope.message_id if isinstance(envelope.message_id, str) else None
    properties = BasicProperties(headers=headers, message_id=message_id)
    delivery = Delivery(1, 1, envelope.is_redelivered, properties, b"", envelope.is_copy, envelope.arrived_at)
    vars(delivery)["envelope"] = envelope  # where the cached property keeps it
    return delivery
