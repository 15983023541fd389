"""The protocol against a model of broker and platform: no reachable state has a command lost or cached twice.

The engine and the store are the real ones. Every call that the engine awaits suspends before and after its effect.
There the model decides what happens next: more of this delivery, another one on the same worker or on another one, the
end of a connection, or of the worker itself. Time only passes when the model says so.
"""

import asyncio
import itertools
import json
import re
from collections.abc import Callable, Collection, Coroutine, Sequence
from contextvars import ContextVar
from copy import copy, deepcopy
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, TypeVar
from zoneinfo import ZoneInfo

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from pika import BasicProperties

from schemas.reply import Reply
from schemas.result import Result
from tests.support.builders import a_command
from tests.support.model_loop import ModelLoop, suspend
from tests.support.suspending import SuspendingStore
from worker.amqp.messages import RESULT_TYPE, Delivery, MessageBuilder, Publication
from worker.amqp.result_messages import ACCEPTED_TYPE, ResultMessages
from worker.amqp.topology import Topology
from worker.core.answer import Answer, Cached, InDoubt, NotSent, Refused
from worker.core.claims import Claim, Key, KnownNotSent, Lease, Loss, Unresolved, Unseen
from worker.core.command import Command
from worker.core.decide import RetryPolicy
from worker.core.doubt import extended
from worker.core.doubt_window import DoubtWindow
from worker.core.envelope import Replay, Task
from worker.core.epoch import REDELIVERED_S, Epoch, Retention
from worker.core.parsing import read_task
from worker.core.platform import Candidate, FoundStates, OwnedByOthers, Sent
from worker.core.resolution import Postpone, Replaced, Resolution
from worker.core.results import Awaited, EntryState
from worker.dead_letters.letter import DeadLetter
from worker.errors import HistoryUnreadable, StoreUnavailable
from worker.idempotency.memory import MemoryStore
from worker.onenet.history import MAX_SKEW, USUAL_SKEW, Window
from worker.processing.circuit_breaker import CircuitBreakers
from worker.processing.engine import Engine
from worker.processing.result_finder import ResultFinder
from worker.telemetry.metrics import Metrics

BEGIN = datetime(2026, 8, 5, tzinfo=UTC)
REQUEST_S, RECONCILE_DELAY_S, LEASE_S = 2, 3, 9
RETENTION = Retention(LEASE_S, RECONCILE_DELAY_S, 10**9)
KEPT = ("_accepted", "_records", "_owners", "_guesses", "_values", "_lookalikes", "_epochs")  # of the store
METRICS = Metrics("0", 1)
POLICY = RetryPolicy((1, 2), max_attempts=50, reconcile_delay_s=RECONCILE_DELAY_S)
HASTY = RetryPolicy((1, 2), max_attempts=1, reconcile_delay_s=RECONCILE_DELAY_S, in_doubt="dead-letter")
RESULT_DELAYS_S = (1, 4)
EXECUTED_AFTER = timedelta(seconds=5)
TOPOLOGY = Topology("onenet", (1, 2, RECONCILE_DELAY_S), RESULT_DELAYS_S)
RESULTS = ResultMessages(TOPOLOGY, RESULT_DELAYS_S, lambda _product: timedelta(0))
MESSAGES = MessageBuilder(TOPOLOGY, "host:1", await_result=RESULTS.first)
CHINA = ZoneInfo("Asia/Shanghai")
FAULTS = ["none", "not sent", "lost, cached", "lost, not cached", "lost, cached late", "of another command", "full"]
STORE_FAULTS = ["not reached", "answer lost"]
ENDS = ["suspended", "suspended", "killed", "disconnected"]
MAX_STEPS = 8  # at once
ALL_STEPS = 100  # more than one delivery has suspensions

T = TypeVar("T")


@dataclass(eq=False)
class Message:
    """A message in the broker, ready at a time; ``holder`` has it unacknowledged."""

    body: bytes
    properties: BasicProperties
    is_returned: bool
    ready_at: datetime
    times_returned: int = 0
    holder: "Worker | None" = None

    @property
    def awaits_result(self) -> bool:
        """Whether it is an accepted command on its way to its result."""
        return self.properties.type == ACCEPTED_TYPE


@dataclass
class Kept:
    """A command as the platform has it."""

    uuid: str
    match_key: bytes
    created_at: datetime


@dataclass
class World:
    """Everything outside of the workers: the time, the broker and the platform."""

    now: datetime = BEGIN
    messages: list[Message] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)
    late: list[Kept] = field(default_factory=list)
    replies: dict[str, set[tuple[str, str | None, str | None]]] = field(default_factory=dict)
    results: dict[str, list[tuple[str, str]]] = field(default_factory=dict)  # the uuid and the result, as often as told
    letters: list[Publication] = field(default_factory=list)

    def seconds(self) -> float:
        return (self.now - BEGIN).total_seconds()

    def pass_time(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)
        self.kept += [kept for kept in self.late if kept.created_at <= self.now]
        self.late = [kept for kept in self.late if kept.created_at > self.now]

    def ready(self) -> list[Message]:
        """Return the messages that the broker may deliver."""
        return [each for each in self.messages if each.holder is None and each.ready_at <= self.now]

    def accepted(self) -> set[str]:
        """Return the uuids of all replies."""
        return {uuid for outcomes in self.replies.values() for _, uuid, _ in outcomes if uuid}

    def take(self, publications: Sequence[Publication]) -> None:
        """Do with publications what the broker does with them."""
        for publication in publications:
            if publication.properties.type == RESULT_TYPE:
                result = Result.model_validate_json(publication.body)
                self.results.setdefault(result.command_id, []).append((result.uuid, result.result))
            elif publication.exchange == TOPOLOGY.replies_exchange:
                reply = Reply.model_validate_json(publication.body)
                code = reply.error.code if reply.error else None
                self.replies.setdefault(str(reply.command_id), set()).add((reply.status, reply.uuid, code))
            elif publication.exchange == TOPOLOGY.dead_letters_exchange:
                self.letters.append(publication)
            else:
                rests = re.search(r"\.(\d+)s$", publication.routing_key)
                ready_at = self.now + timedelta(seconds=int(rests[1]) if rests else 0)
                self.messages.append(Message(publication.body, publication.properties, True, ready_at))


@dataclass
class Faults:
    """What goes wrong while one delivery is processed.

    ``failing_call``: which call of the store fails, and how. ``is_confirm_late``: of a copy that takes the message's
    place.
    """

    request: str = "none"
    is_history_readable: bool = True
    failing_call: tuple[int, str] | None = None
    is_confirm_late: bool = False
    calls: int = 0  # of the store


current_faults: ContextVar[Faults] = ContextVar("current_faults")


class ModelPlatform:
    """The client of a platform that fails as it is told."""

    def __init__(self, world: World) -> None:
        self._world = world

    def knows(self, product: str | None) -> bool:
        return product is None

    async def execute(self, command: Command, not_after: float) -> Sent:
        await suspend()
        answer = self._cache(command, not_after, current_faults.get().request)
        await suspend()
        return Sent(answer, valid_time_omitted=False)

    def now(self, _product: str | None) -> datetime:
        return self._world.now

    async def time_for(self, _command: Command) -> datetime:
        return self._world.now

    async def count_waiting(self, _command: Command, most: int) -> int:
        await suspend()
        if not current_faults.get().is_history_readable:
            raise HistoryUnreadable("no answer", is_outage=True)
        return most

    async def find_states(
        self, _product: str | None, _imei: str, _since: datetime | None, uuids: Collection[str], _acquire: object
    ) -> FoundStates:
        await suspend()
        if not current_faults.get().is_history_readable:
            return FoundStates({}, HistoryUnreadable("no answer", is_outage=True))
        world = self._world
        found = {
            kept.uuid: EntryState(5 if kept.created_at + EXECUTED_AFTER <= world.now else 1)
            for kept in world.kept
            if kept.uuid in uuids
        }
        await suspend()
        return FoundStates(found)

    async def find_candidates(self, command: Command, doubt: DoubtWindow, others: OwnedByOthers) -> list[Candidate]:
        await suspend()
        if not current_faults.get().is_history_readable:
            raise HistoryUnreadable("no answer", is_outage=True)
        until = doubt.until + timedelta(seconds=RECONCILE_DELAY_S)
        window = Window(doubt.since, until, read_at=until)
        found = [
            Candidate(kept.uuid, window.is_within(kept.created_at, USUAL_SKEW), valid_time_omitted=False)
            for kept in sorted(self._world.kept, key=lambda kept: window.distance(kept.created_at))
            if kept.match_key == command.match_key() and window.is_within(kept.created_at, MAX_SKEW)
        ]
        await suspend()
        known = await others([entry.uuid for entry in found])
        return [entry for entry in found if entry.uuid not in known]

    def _cache(self, command: Command, not_after: float, fault: str) -> Answer:
        world = self._world
        if world.seconds() >= not_after or fault == "not sent":
            return NotSent("refused")
        if fault == "full":
            return Refused("onenet_rejected", "system limit", 13, is_limit=True)
        kept = Kept(f"u{len(world.kept) + len(world.late)}", command.match_key(), world.now)
        if fault == "lost, cached late":  # the request is given up when the lease ends
            given_up_at = BEGIN + timedelta(seconds=min(world.seconds() + REQUEST_S, not_after))
            kept.created_at = given_up_at + timedelta(seconds=0.9 * RECONCILE_DELAY_S)
            world.late.append(kept)
        elif fault != "lost, not cached":
            world.kept.append(kept)
        if fault == "none":
            return Cached(kept.uuid)
        if fault == "of another command":
            return Cached(min(world.accepted(), default=kept.uuid))
        world.pass_time(REQUEST_S)
        return InDoubt("no answer")


class FailingStore(SuspendingStore):
    """The real store behind a connection that may fail; it may stand for one that outlives its workers.

    Such a one may lose its last writes, and knows then, as Redis does by the identity of its server.
    """

    def __init__(self, world: World, *, outlives_workers: bool) -> None:
        super().__init__(10**9, LEASE_S, began_at=world.now, clock=world.seconds)
        self._world = world
        self._outlives_workers = outlives_workers
        # The first workers knew each other's records for long: nothing was lost for as long as redeliveries take.
        self._epoch = Epoch(world.now - timedelta(seconds=2 * REDELIVERED_S), follows_loss=False)
        self._losses = 0
        self._epochs: dict[str, int] = {}  # of each record: how many losses were before it
        self._tokens = itertools.count(1)
        self.replica: dict[str, Any] | None = None  # what a replica has

    def replicate(self) -> None:
        """Let the replica have everything."""
        self.replica = deepcopy({name: getattr(self, name) for name in KEPT})

    def fail_over(self) -> None:
        """Promote the replica: whatever was written since it was up to date is lost."""
        assert self.replica is not None
        for name, value in deepcopy(self.replica).items():
            setattr(self, name, value)
        self._epoch = Epoch(self._world.now, follows_loss=True)
        self._losses += 1

    def _grant(self, record: Any, key: Key, now: datetime) -> Lease:
        record.token = next(self._tokens)
        return super()._grant(record, key, now)

    @property
    def local(self) -> Any:
        return None if self._outlives_workers else self

    async def claim(self, key: Key, now: datetime, replay: Replay | None = None, *, is_first: bool = True) -> Claim:
        ends_at = self._world.seconds() + LEASE_S  # as for Redis, whose claim takes its time
        claim = await super().claim(key, now, replay, is_first=is_first)
        if isinstance(claim, Unseen | KnownNotSent | Unresolved):
            claim = replace(claim, lease=replace(claim.lease, ends_at=ends_at))
        return claim

    async def suspended_claim(self, key: Key, now: datetime, replay: Replay | None, *, is_first: bool) -> Claim:
        """Claim in one step, as a script does, and say what may have been lost."""
        claim = await MemoryStore.claim(self, key, now, replay)
        if not self._outlives_workers:
            return claim
        is_of_epoch = self._epochs.get(key.command_id) == self._losses
        if isinstance(claim, Unseen | KnownNotSent | Unresolved):
            self._epochs[key.command_id] = self._losses
        if isinstance(claim, Unseen):
            record = self._records[claim.lease.owner_id]
            claim = self._epoch.unseen(claim.lease, now, RETENTION)
            if claim.loss is not Loss.NONE and (claim.loss is Loss.ANY or not is_first):
                record.doubt = DoubtWindow(None, now)
        elif isinstance(claim, KnownNotSent | Unresolved) and not is_of_epoch:
            record = self._records[claim.lease.owner_id]
            record.doubt = extended(record.doubt, now)
            return replace(claim, loss=Loss.ANY, unrecorded_until=self._epoch.unrecorded_until(now, RETENTION))
        return claim

    @property
    def wants_arrivals(self) -> bool:
        return self._outlives_workers

    async def note_arrival(self, key: Key, arrived_at: datetime) -> None:
        settled_at = self._epoch.began_at + timedelta(seconds=RETENTION.unsettled_s)
        is_settled = not self._epoch.follows_loss or arrived_at >= settled_at
        if is_settled and await MemoryStore.is_known_not_sent(self, key) is None:
            self.mark_not_sent(key)
            self._epochs[key.command_id] = self._losses

    async def suspended(self, call: Callable[..., Coroutine[Any, Any, T]], *args: Any, **options: Any) -> T:
        if not self._outlives_workers:  # no call of the memory suspends
            return await call(*args, **options)
        faults = current_faults.get()
        faults.calls += 1
        number, fault = faults.failing_call or (0, "")
        if faults.calls != number:
            return await super().suspended(call, *args, **options)
        if fault == "answer lost":
            await super().suspended(call, *args, **options)
        raise StoreUnavailable("no answer")


@dataclass(eq=False)
class Processing:
    """One delivery that a worker processes."""

    message: Message
    delivery: Delivery
    task: Task | None  # None: an accepted command on its way to its result
    faults: Faults
    is_connected: bool = True
    is_unconfirmed: bool = False  # its copy, of a command that was not claimed
    has_published: bool = False


class Worker:
    """One process: the engine, and what the consumer does with its resolutions."""

    processings: dict[Processing, asyncio.Task[None]]

    def __init__(self, world: World, store: FailingStore, policy: RetryPolicy) -> None:
        self._world = world
        self.store = store
        self.loop = ModelLoop(world.seconds)
        breakers, history_breakers = self._new_breakers(), self._new_breakers()
        platform = ModelPlatform(world)
        self.engine = Engine(platform, store, breakers, history_breakers, policy, METRICS, lambda: world.now)
        self.finder = ResultFinder(
            platform,
            store,
            breakers,
            history_breakers,
            RESULT_DELAYS_S,
            lambda: 0.0,
            acquire=None,
            now=lambda: world.now,
        )
        self.processings = {}

    def start(self, message: Message, faults: Faults) -> Processing:
        """Deliver a message, and process it to the first suspension."""
        delivery = delivery_of(message, self._world.now)
        message.holder = self
        if message.awaits_result:
            processing = Processing(message, delivery, None, faults)
            self.processings[processing] = self.loop.start(self._look(processing))
            return processing
        task = read_task(delivery.envelope, delivery.body, CHINA, self._world.seconds())
        if self.engine.unstarted.wants_note(task) and faults.failing_call is None:
            self.loop.start(self.engine.unstarted.note_arrival(task)).result()
        processing = Processing(message, delivery, task, faults)
        self.processings[processing] = self.loop.start(self._process(processing, task))
        return processing

    def go_on(self, processing: Processing, steps: int) -> None:
        """Resume a processing so many times, unless it ends before, or waits for something else."""
        task = self.processings[processing]
        while steps and self.loop.can_resume(task):
            self.loop.resume(task)
            steps -= 1
        self.forget_ended()

    def publish(self, processing: Processing) -> None:
        """Resume a processing until it has published, but before it acknowledges, or to its end."""
        while processing in self.processings and not processing.has_published:
            if not self.loop.can_resume(self.processings[processing]):
                return
            self.go_on(processing, 1)

    def forget_ended(self) -> None:
        for processing, task in list(self.processings.items()):
            if task.done():
                del self.processings[processing]
                task.result()

    def lose_connection(self) -> None:
        """The broker gets every unacknowledged message back; the processing goes on, for nothing to be published."""
        for processing in self.processings:
            processing.is_connected = False
            if processing.is_unconfirmed and processing.task is not None:
                self.engine.unstarted.mark_not_sent(processing.task)
        for message in self._world.messages:
            if message.holder is self:
                message.holder = None
                message.times_returned += 1

    async def _process(self, processing: Processing, task: Task) -> None:
        current_faults.set(processing.faults)
        resolution = await self.engine.run(task, partial(self._replace_with, processing, task), lambda _: None)
        await suspend()
        if not isinstance(resolution, Replaced):
            processing.is_unconfirmed = isinstance(resolution, Postpone) and resolution.is_unclaimed
            await self._settle(processing, MESSAGES.publications(processing.delivery, resolution, task.command))

    async def _replace_with(self, processing: Processing, task: Task, resolution: Resolution) -> bool:
        await suspend()
        publications = MESSAGES.publications(processing.delivery, resolution, task.command)
        return await self._settle(processing, publications) and not processing.faults.is_confirm_late

    async def _look(self, processing: Processing) -> None:
        """Do what the consumer of results does with one command."""
        current_faults.set(processing.faults)
        delivery = processing.delivery
        awaited = RESULTS.read(delivery)
        assert awaited is not None
        found: Result | Awaited = awaited
        if self._world.now >= awaited.due_at:
            [found] = await self.finder.find(None, awaited.imei, [awaited])
        await suspend()
        if isinstance(found, Result):
            publication = RESULTS.result(delivery, found)
        else:
            publication = RESULTS.later(delivery, found, self._world.now)
        await self._settle(processing, [publication])

    async def _settle(self, processing: Processing, publications: Sequence[Publication]) -> bool:
        """Publish and acknowledge; tells whether both happened before the connection was lost."""
        if not processing.is_connected:
            return False
        self._world.take(publications)
        processing.has_published = True
        await suspend()
        if not processing.is_connected:
            return False
        processing.is_unconfirmed = False
        self._world.messages.remove(processing.message)
        await suspend()
        return True

    def _new_breakers(self) -> CircuitBreakers:
        """Two failures in a row are an outage already, so that a run often is in one."""
        return CircuitBreakers([None], pause_after_failures=2, probe_interval_s=2, clock=self._world.seconds)


def delivery_of(message: Message, now: datetime) -> Delivery:
    """Return a message as the broker delivers it."""
    count = {"x-delivery-count": message.times_returned} if message.times_returned else {}
    properties = copy(message.properties)
    properties.headers = {**(message.properties.headers or {}), **count}
    return Delivery(1, 1, message.times_returned > 0, properties, message.body, message.is_returned, now.timestamp())


class Protocol(RuleBasedStateMachine):
    """One worker on memory, or a fleet on a shared store."""

    workers_count = 1
    is_shared = False
    has_lookalikes = False  # when their records are gone, lookalikes cannot be told apart
    is_replayed = False
    is_published_once = False
    policy = POLICY
    bodies: dict[str, bytes]

    @initialize()
    def begin(self) -> None:
        self.world = World()
        self.store = FailingStore(self.world, outlives_workers=self.is_shared)
        self.workers = [self.new_worker() for _ in range(self.workers_count)]
        self.killed: list[Worker] = []  # their coroutines are kept, so that nothing of them runs
        commands = [a_command(command_id="a", args="on"), a_command(command_id="b", args="off")]
        if self.has_lookalikes:
            commands.append(commands[0] | {"command_id": "a-lookalike"})
        self.bodies = {command["command_id"]: json.dumps(command).encode() for command in commands}
        self.published: set[str] = set()

    @rule(number=st.integers(0, 2))
    def publish(self, number: int) -> None:
        ids = sorted(self.bodies)
        command_id = ids[number % len(ids)]
        if command_id in self.published and (self.is_published_once or not self.is_shared):
            return  # after a restart on memory the record of an id is lost
        self.published.add(command_id)
        self.world.messages.append(Message(self.bodies[command_id], BasicProperties(), False, self.world.now))

    @rule(seconds=st.sampled_from([0.5, 1, 3, 6, 10, 40]))
    def wait(self, seconds: float) -> None:
        self.pass_time(seconds)

    @precondition(lambda self: self.world.ready())
    @rule(
        which=st.integers(0, 5),
        number=st.integers(0, 1),
        request=st.sampled_from(FAULTS),
        is_history_readable=st.sampled_from([True, True, True, False]),
        failing_call=st.none() | st.none() | st.tuples(st.integers(1, 5), st.sampled_from(STORE_FAULTS)),
        is_confirm_late=st.sampled_from([False, False, False, True]),
        until=st.sampled_from(["the end", "published"]) | st.integers(0, MAX_STEPS),
        end=st.sampled_from(ENDS),
    )
    def deliver(
        self,
        which: int,
        number: int,
        request: str,
        is_history_readable: bool,
        failing_call: tuple[int, str] | None,
        is_confirm_late: bool,
        until: str | int,
        end: str,
    ) -> None:
        """Process a message: to its end, or to any of its suspensions, where its worker goes on with something else."""
        ready, worker = self.world.ready(), self.worker(number)
        if not self.is_shared:  # memory does not fail
            failing_call = None
        request = self.recognisable(request)
        faults = Faults(request, is_history_readable, failing_call, is_confirm_late)
        processing = worker.start(ready[which % len(ready)], faults)
        if until == "published":
            worker.publish(processing)
        else:
            worker.go_on(processing, until if isinstance(until, int) else ALL_STEPS)
        if until != "the end":
            self.interrupt(worker, end)

    @precondition(lambda self: any(worker.processings for worker in self.workers))
    @rule(which=st.integers(0, 5), steps=st.integers(1, MAX_STEPS), end=st.sampled_from(ENDS))
    def go_on(self, which: int, steps: int, end: str) -> None:
        """Process a message that was suspended further, or to its end."""
        under_way = [(worker, each) for worker in self.workers for each in worker.processings]
        worker, processing = under_way[which % len(under_way)]
        worker.go_on(processing, steps)
        self.interrupt(worker, end)

    @precondition(lambda self: self.world.ready())
    @rule(
        which=st.integers(0, 5),
        number=st.integers(0, 1),
        request=st.sampled_from(FAULTS),
        steps=st.integers(1, MAX_STEPS),
    )
    def stall(self, which: int, number: int, request: str, steps: int) -> None:
        """A delivery stands still: its connection is lost, its lease ends, and others go on before it does."""
        ready, worker, other = self.world.ready(), self.worker(number), self.worker(number + 1)
        stalled = worker.start(
            ready[which % len(ready)], Faults(self.recognisable(request) if self.is_shared else "none")
        )
        worker.go_on(stalled, steps)
        worker.lose_connection()
        for _ in range(3 * LEASE_S):
            self.pass_time(1)
            for message in self.world.ready():
                other.go_on(other.start(message, Faults()), ALL_STEPS)
        if stalled in worker.processings:
            worker.go_on(stalled, ALL_STEPS)

    @precondition(lambda self: self.world.ready())
    @rule(which=st.integers(0, 5), number=st.integers(0, 1), returned=st.booleans(), lost=st.booleans())
    def leave_unstarted(self, which: int, number: int, returned: bool, lost: bool) -> None:
        """A worker takes a message and does not start it: it returns it, or loses its connection, or both."""
        ready = [message for message in self.world.ready() if not message.awaits_result]
        if not ready:
            return
        message = ready[which % len(ready)]
        delivery = delivery_of(message, self.world.now)
        task = read_task(delivery.envelope, delivery.body, CHINA, self.world.seconds())
        unstarted = self.worker(number).engine.unstarted
        unstarted.mark_not_sent(task)
        if returned:
            self.world.take([MESSAGES.republish(delivery, unstarted.doubt_of_copy(task), is_stopping=False)])
        if lost or not returned:
            message.times_returned += 1
        else:
            self.world.messages.remove(message)

    def recognisable(self, request: str) -> str:
        """Return a fault; not the uuid of another command where its owner may be forgotten."""
        knows_owners = self.is_shared and not self.is_published_once
        return "none" if request == "of another command" and not knows_owners else request

    def worker(self, number: int) -> Worker:
        return self.workers[number % len(self.workers)]

    def new_worker(self) -> Worker:
        return Worker(self.world, self.store, self.policy)

    def interrupt(self, worker: Worker, end: str) -> None:
        if end == "killed":
            self.kill(worker)
        elif end == "disconnected":
            worker.lose_connection()

    def kill(self, worker: Worker) -> None:
        """End a worker where it is: its deliveries are redelivered, and its memory is lost."""
        worker.lose_connection()
        if not self.is_shared:
            self.store = FailingStore(self.world, outlives_workers=False)
        self.killed.append(worker)
        self.workers[self.workers.index(worker)] = self.new_worker()

    def pass_time(self, seconds: float) -> None:
        self.world.pass_time(seconds)
        for worker in self.workers:
            worker.loop.run()
            worker.forget_ended()

    @invariant()
    def nothing_is_cached_more_often_than_it_was_ordered(self) -> None:
        if not hasattr(self, "world"):
            return
        kept = [each.match_key for each in self.world.kept + self.world.late]
        for match_key in set(kept):
            assert kept.count(match_key) <= (2 if self.has_lookalikes else 1)
        assert len(kept) <= len(self.published)

    @invariant()
    def no_reply_contradicts_another(self) -> None:
        if not hasattr(self, "world"):
            return
        uuids = []
        for outcomes in self.world.replies.values():
            assert len(outcomes) == 1 or self.is_replayed
            assert len([status for status, _, _ in outcomes if status != "failed"]) <= 1
            uuids += [uuid for status, uuid, _ in outcomes if status == "accepted"]
        assert len(uuids) == len(set(uuids))

    @invariant()
    def no_result_contradicts_another(self) -> None:
        """Each uuid has one result, however often it is told, and only what was accepted has one."""
        if not hasattr(self, "world"):
            return
        for command_id, told in self.world.results.items():
            accepted = {uuid for status, uuid, _ in self.world.replies[command_id] if status == "accepted"}
            assert set(told) == {(uuid, "executed") for uuid, _ in told}
            assert {uuid for uuid, _ in told} <= accepted

    def teardown(self) -> None:
        """Calm: what was ordered has its outcome in the end, and what was cached is not said to have failed."""
        self.calm_down()
        world = self.world
        assert world.replies.keys() == self.published
        self.nothing_is_cached_more_often_than_it_was_ordered()
        self.no_reply_contradicts_another()
        assert world.accepted() <= {each.uuid for each in world.kept}
        assert world.accepted() == {uuid for told in world.results.values() for uuid, _ in told}
        if not self.is_undecidable:
            missing = [each for each in world.kept if each.uuid not in world.accepted()]
            assert len(missing) <= self.ambiguous
            assert len({each.match_key for each in missing}) <= 1

    @property
    def ambiguous(self) -> int:
        """How many lookalikes ended as outcome_unknown, because nothing tells the uuids of two in doubt apart."""
        if not {"a", "a-lookalike"} <= self.published:
            return 0
        return sum(
            ("failed", None, "outcome_unknown") in self.world.replies[command_id] for command_id in ("a", "a-lookalike")
        )

    @property
    def is_undecidable(self) -> bool:
        """Whether lookalikes may both have been cached and dead-lettered: nothing tells their uuids apart then."""
        return self.is_replayed and {"a", "a-lookalike"} <= self.published

    def calm_down(self) -> None:
        """Process all that is left, one delivery after the other and without a fault."""
        for _ in range(1000):
            for worker in self.workers:
                for processing in list(worker.processings):
                    worker.go_on(processing, ALL_STEPS)
            ready = self.world.ready()
            if ready:
                self.worker(0).start(ready[0], Faults())
            elif self.world.messages or any(worker.processings for worker in self.workers):
                self.pass_time(1)
            else:
                return
        raise AssertionError("a message is processed for ever")


class Fleet(Protocol):
    """Several workers with a shared store: when one ends, the others read its records."""

    workers_count = 2
    is_shared = True
    has_lookalikes = True


class FleetOnReplicas(Fleet):
    """The same, and the store fails over to a replica that lacks the last writes, again and again.

    Upstream publishes each command once: what it publishes again long after a loss is sent again, as documented. There
    are no lookalikes: where the owner of a uuid was lost, they cannot be told apart.
    """

    is_published_once = True
    has_lookalikes = False

    @rule()
    def replicate(self) -> None:
        self.store.replicate()

    @precondition(lambda self: self.store.replica is not None)
    @rule()
    def fail_over(self) -> None:
        self.store.fail_over()

    @precondition(lambda self: self.store.replica is not None)
    @rule()
    def fail_over_and_wait_for_long(self) -> None:
        """What was returned is delivered soon, and copies come from the delay queues when the failover is long ago."""
        self.store.fail_over()
        for worker in list(self.workers):
            self.kill(worker)
        for message in self.world.ready():
            if message.times_returned:
                self.worker(0).go_on(self.worker(0).start(message, Faults()), ALL_STEPS)
        self.pass_time(2 * REDELIVERED_S)


class Replayed(Protocol):
    """A worker with few attempts, and an operator who replays its dead letters, sometimes twice."""

    policy = HASTY
    is_replayed = True

    @precondition(lambda self: self.world.letters)
    @rule(which=st.integers(0, 5), is_acknowledged=st.booleans())
    def replay(self, which: int, is_acknowledged: bool) -> None:
        """Not acknowledged: the command line ended right after the confirm, and the dead letter is still queued."""
        world = self.world
        self.pass_time(0.001)  # a person takes at least that long
        letter = world.letters[which % len(world.letters)]
        found = DeadLetter(1, letter.routing_key, letter.properties, letter.body, CHINA)
        world.take([MESSAGES.replay(found.delivery(), found.replay(world.now))])
        if is_acknowledged:
            world.letters.remove(letter)

    def teardown(self) -> None:
        """Whatever failed succeeds when it is replayed in calm, unless lookalikes have made it undecidable for good."""
        self.calm_down()
        left = 2 * len(self.world.letters) + len(self.bodies)  # ambiguous lookalikes are dead-lettered again for ever
        while self.world.letters and left:
            left -= 1
            self.replay(0, is_acknowledged=True)
            self.calm_down()
        super().teardown()
        if not self.is_undecidable:
            assert not self.world.letters
            assert all(any(status == "accepted" for status, _, _ in each) for each in self.world.replies.values())


class ReplayedFleet(Replayed):
    """The same with several workers."""

    workers_count = 2
    is_shared = True
    has_lookalikes = True


_SETTINGS = settings(max_examples=300, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck))
TestOneWorkerOnMemory = Protocol.TestCase
TestOneWorkerOnMemory.settings = _SETTINGS
TestFleet: Any = Fleet.TestCase
TestFleet.settings = _SETTINGS
TestFleetOnReplicas: Any = FleetOnReplicas.TestCase
TestFleetOnReplicas.settings = _SETTINGS
TestReplayed: Any = Replayed.TestCase
TestReplayed.settings = _SETTINGS
TestReplayedFleet: Any = ReplayedFleet.TestCase
TestReplayedFleet.settings = _SETTINGS


@pytest.mark.parametrize("waits_s", [[0.5, 3], [40] * 100])
def test_a_message_that_comes_again_beside_its_copy_is_in_doubt_since_before_both(waits_s: list[float]) -> None:
    """The process that sent it is gone with its records; the copy holds the claim in the next, which ends too."""
    model = Protocol()
    model.begin()
    model.publish(number=0)
    calm: dict[str, Any] = {"failing_call": None, "is_confirm_late": False, "is_history_readable": True, "number": 0}
    model.deliver(**calm, request="lost, cached", until="published", end="killed", which=0)
    for seconds in waits_s:
        model.wait(seconds=seconds)
    model.deliver(**calm, request="none", until=0, end="suspended", which=1)
    model.deliver(**calm, request="none", until="the end", end="suspended", which=0)
    model.go_on(end="suspended", steps=3, which=0)
    model.go_on(end="killed", steps=1, which=0)
    model.teardown()
