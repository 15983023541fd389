"""The protocol against a model of broker and platform: no reachable state has a command lost or cached twice.

The handler and the store are the real ones. The model decides what comes when: deliveries, copies, redeliveries,
faults, and at which point a worker ends. Time only passes when the model says so.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from pika import BasicProperties

from schemas.reply import Reply
from tests.support.builders import a_command
from worker.amqp.messages import Delivery, MessageBuilder, Publication
from worker.amqp.topology import Topology
from worker.core.answer import Answer, Cached, InDoubt, NotSent
from worker.core.claims import Claim, Key, Lease, OnRecorded, Unseen
from worker.core.command import Command
from worker.core.decide import RetryPolicy
from worker.core.doubt_window import DoubtWindow
from worker.core.envelope import Replay
from worker.core.ownership import OwnershipFacts
from worker.core.parsing import read_task
from worker.core.platform import Candidate, OwnedByOthers, Sent
from worker.core.resolution import Resolution
from worker.dead_letters.letter import DeadLetter
from worker.errors import HistoryUnreadable
from worker.idempotency.memory import MemoryStore
from worker.onenet.history import MAX_SKEW, USUAL_SKEW, Window
from worker.processing.circuit_breaker import CircuitBreakers
from worker.processing.crash_guard import ReplaceWith
from worker.processing.engine import Engine
from worker.telemetry.metrics import Metrics

BEGIN = datetime(2026, 8, 5, tzinfo=UTC)
REQUEST_S, RECONCILE_DELAY_S, LEASE_S = 2, 3, 9
METRICS = Metrics("0", 1)
POLICY = RetryPolicy((1, 2), max_attempts=50, reconcile_delay_s=RECONCILE_DELAY_S)
HASTY = RetryPolicy((1, 2), max_attempts=1, reconcile_delay_s=RECONCILE_DELAY_S, in_doubt="dead-letter")
TOPOLOGY = Topology("onenet", (1, 2, RECONCILE_DELAY_S))
MESSAGES = MessageBuilder(TOPOLOGY, "host:1")
CHINA = ZoneInfo("Asia/Shanghai")
FAULTS = ["none", "not sent", "lost, cached", "lost, not cached", "lost, cached late"]
POINTS = ["claim", "request", "answer", "history", "ownership", "release", "complete", "mark", "marked"]
ENDS = ["acknowledged", "published only", "nothing"]


class Killed(BaseException):
    """The worker's process ended."""


@dataclass
class Message:
    """A message in the broker, ready at a time."""

    body: bytes
    properties: BasicProperties
    is_returned: bool
    ready_at: datetime
    times_returned: int = 0


@dataclass
class Kept:
    """A command as the platform has it."""

    uuid: str
    match_key: bytes
    created_at: datetime


@dataclass
class World:
    """Everything outside of the workers: the time, the broker and the platform; and the next fault."""

    now: datetime = BEGIN
    messages: list[Message] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)
    late: list[Kept] = field(default_factory=list)
    replies: dict[str, set[tuple[str, str | None, str | None]]] = field(default_factory=dict)
    letters: list[Publication] = field(default_factory=list)
    fault: str = "none"
    is_history_readable: bool = True
    ends_at: str | None = None

    def seconds(self) -> float:
        return (self.now - BEGIN).total_seconds()

    def pass_time(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)
        self.kept += [kept for kept in self.late if kept.created_at <= self.now]
        self.late = [kept for kept in self.late if kept.created_at > self.now]

    def come_to(self, point: str) -> None:
        if self.ends_at == point:
            self.ends_at = None
            raise Killed

    def take(self, publications: Sequence[Publication]) -> None:
        """Do with publications what the broker does with them."""
        for publication in publications:
            if publication.exchange == TOPOLOGY.replies_exchange:
                reply = Reply.model_validate_json(publication.body)
                code = reply.error.code if reply.error else None
                self.replies.setdefault(str(reply.command_id), set()).add((reply.status, reply.uuid, code))
            elif publication.exchange == TOPOLOGY.dead_letters_exchange:
                self.letters.append(publication)
            else:
                rests = re.search(r"\.(\d+)s$", publication.routing_key)
                ready_at = self.now + timedelta(seconds=int(rests[1]) if rests else 0)
                self.messages.append(Message(publication.body, publication.properties, True, ready_at))


class ModelPlatform:
    """The client of a platform that fails as the world says."""

    def __init__(self, world: World) -> None:
        self._world = world

    def knows(self, product: str | None) -> bool:
        return product is None

    def execute(self, command: Command, not_after: float) -> Sent:
        world = self._world
        world.come_to("request")
        if world.seconds() >= not_after or world.fault == "not sent":
            return Sent(NotSent("refused"), valid_time_omitted=False)
        kept = Kept(f"u{len(world.kept) + len(world.late)}", command.match_key(), world.now)
        answer: Answer = Cached(kept.uuid)
        if world.fault == "lost, cached late":
            kept.created_at = world.now + timedelta(seconds=REQUEST_S + 0.9 * RECONCILE_DELAY_S)
            world.late.append(kept)
        elif world.fault != "lost, not cached":
            world.kept.append(kept)
        if world.fault != "none":
            world.pass_time(REQUEST_S)
            answer = InDoubt("no answer")
        world.come_to("answer")
        return Sent(answer, valid_time_omitted=False)

    def find_candidates(self, command: Command, doubt: DoubtWindow, others: OwnedByOthers) -> list[Candidate]:
        world = self._world
        world.come_to("history")
        if not world.is_history_readable:
            raise HistoryUnreadable("no answer", is_outage=True)
        window = Window(doubt.since, doubt.until + timedelta(seconds=RECONCILE_DELAY_S))
        found = [
            Candidate(kept.uuid, window.is_within(kept.created_at, USUAL_SKEW), valid_time_omitted=False)
            for kept in sorted(world.kept, key=lambda kept: window.distance(kept.created_at))
            if kept.match_key == command.match_key() and window.is_within(kept.created_at, MAX_SKEW)
        ]
        known = others([entry.uuid for entry in found])
        return [entry for entry in found if entry.uuid not in known]


class MortalStore(MemoryStore):
    """The real store, in which the worker may be killed; it may stand for one that outlives its workers."""

    def __init__(self, world: World, *, outlives_workers: bool) -> None:
        super().__init__(10**9, LEASE_S, began_at=world.now, clock=world.seconds)
        self._world = world
        self._outlives_workers = outlives_workers

    @property
    def local(self) -> Any:
        return None if self._outlives_workers else self

    def claim(self, key: Key, now: datetime, replay: Replay | None = None) -> Claim:
        claim = super().claim(key, now, replay)
        self._world.come_to("claim")
        return Unseen(claim.lease, now) if self._outlives_workers and isinstance(claim, Unseen) else claim

    def release(self, lease: Lease, doubt: DoubtWindow | None, *, holder_crashed: bool = False) -> None:
        super().release(lease, doubt, holder_crashed=holder_crashed)
        self._world.come_to("release")

    def ownership(self, lease: Lease, uuids: Sequence[str]) -> OwnershipFacts:
        facts = super().ownership(lease, uuids)
        self._world.come_to("ownership")
        return facts

    def complete(
        self, lease: Lease, reply: Reply, doubt: DoubtWindow | None, on_recorded: OnRecorded, *, is_guess: bool = False
    ) -> None:
        super().complete(lease, reply, doubt, on_recorded, is_guess=is_guess)
        self._world.come_to("complete")


class Protocol(RuleBasedStateMachine):
    """One worker on memory, or a fleet on a shared store."""

    is_shared = False
    has_lookalikes = False  # when their records are gone, lookalikes cannot be told apart
    is_replayed = False
    policy = POLICY
    bodies: dict[str, bytes]

    @initialize()
    def begin(self) -> None:
        self.world = World()
        self.store = MortalStore(self.world, outlives_workers=self.is_shared)
        self.breakers, self.history_breakers = self.new_breakers(), self.new_breakers()
        commands = [a_command(command_id="a", args="on"), a_command(command_id="b", args="off")]
        if self.has_lookalikes:
            commands.append(commands[0] | {"command_id": "a-lookalike"})
        self.bodies = {command["command_id"]: json.dumps(command).encode() for command in commands}
        self.published: set[str] = set()

    @rule(number=st.integers(0, 2))
    def publish(self, number: int) -> None:
        ids = sorted(self.bodies)
        command_id = ids[number % len(ids)]
        if command_id in self.published and not self.is_shared:
            return  # after a restart on memory the record of an id is lost
        self.published.add(command_id)
        self.world.messages.append(Message(self.bodies[command_id], BasicProperties(), False, self.world.now))

    @rule(seconds=st.sampled_from([0.5, 1, 3, 10, 40]))
    def wait(self, seconds: float) -> None:
        self.world.pass_time(seconds)

    @precondition(lambda self: any(message.ready_at <= self.world.now for message in self.world.messages))
    @rule(
        which=st.integers(0, 5),
        fault=st.sampled_from(FAULTS),
        is_history_readable=st.sampled_from([True, True, True, False]),
        point=st.none() | st.sampled_from(POINTS),
        end=st.sampled_from(ENDS),
    )
    def deliver(self, which: int, fault: str, is_history_readable: bool, point: str | None, end: str) -> None:
        world = self.world
        ready = [message for message in world.messages if message.ready_at <= world.now]
        message = ready[which % len(ready)]
        world.fault, world.is_history_readable, world.ends_at = fault, is_history_readable, point
        self.handle(message, end)
        world.fault, world.is_history_readable, world.ends_at = "none", True, None

    @precondition(lambda self: any(message.ready_at <= self.world.now for message in self.world.messages))
    @rule(which=st.integers(0, 5), is_connection_lost=st.booleans())
    def leave_unstarted(self, which: int, is_connection_lost: bool) -> None:
        """A worker takes a message and does not start it: it returns it to the queue, or loses its connection."""
        ready = [message for message in self.world.messages if message.ready_at <= self.world.now]
        message = ready[which % len(ready)]
        delivery = self.delivery_of(message)
        task = read_task(delivery.envelope, delivery.body, CHINA, self.world.seconds())
        unstarted = self.engine().unstarted
        unstarted.mark_not_sent(task)
        if is_connection_lost:
            message.times_returned += 1
        else:
            self.world.take([MESSAGES.republish(delivery, unstarted.doubt_of_copy(task))])
            self.world.messages.remove(message)

    def handle(self, message: Message, end: str = "acknowledged") -> None:
        """Give a message to a worker, which may end at its point, or when it has published, or before."""
        world = self.world

        delivery = self.delivery_of(message)

        def replace_with(resolution: Resolution) -> bool:
            world.come_to("mark")
            world.take(MESSAGES.publications(delivery, resolution))
            world.messages.remove(message)
            world.come_to("marked")
            return True

        try:
            resolution = self.process(delivery, replace_with)
        except Killed:
            self.restart(message)
            return
        publications = MESSAGES.publications(delivery, resolution)
        if end != "nothing":
            world.take(publications)
        if end != "acknowledged":
            self.restart(message)
        elif publications:
            world.messages.remove(message)

    def process(self, delivery: Delivery, replace_with: ReplaceWith) -> Resolution:
        """Process a delivery with a new engine."""
        task = read_task(delivery.envelope, delivery.body, CHINA, self.world.seconds())
        resolutions: list[Resolution] = []
        self.engine().run(task, replace_with, lambda _: None, resolutions.append)
        [resolution] = resolutions
        return resolution

    def engine(self) -> Engine:
        world = self.world
        return Engine(
            ModelPlatform(world),
            self.store,
            self.breakers,
            self.history_breakers,
            self.policy,
            METRICS,
            lambda: world.now,
        )

    def delivery_of(self, message: Message) -> Delivery:
        count = {"x-delivery-count": message.times_returned} if message.times_returned else {}
        properties = BasicProperties(headers={**(message.properties.headers or {}), **count})
        return Delivery(
            1, 1, message.times_returned > 0, properties, message.body, message.is_returned, self.world.now.timestamp()
        )

    def new_breakers(self) -> CircuitBreakers:
        """Two failures in a row are an outage already, so that a run often is in one."""
        return CircuitBreakers([None], pause_after_failures=2, probe_interval_s=2, clock=self.world.seconds)

    def restart(self, message: Message) -> None:
        """A worker has ended: its deliveries are redelivered, and its memory is lost."""
        message.times_returned += 1
        self.breakers, self.history_breakers = self.new_breakers(), self.new_breakers()
        if not self.is_shared:
            self.store = MortalStore(self.world, outlives_workers=False)

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

    def teardown(self) -> None:
        """Calm: what was ordered has its outcome in the end, and what was cached is not said to have failed."""
        self.calm_down()
        world = self.world
        assert world.replies.keys() == self.published
        self.nothing_is_cached_more_often_than_it_was_ordered()
        self.no_reply_contradicts_another()
        accepted = {uuid for outcomes in world.replies.values() for _, uuid, _ in outcomes if uuid}
        kept = {each.uuid for each in world.kept}
        assert accepted <= kept
        assert accepted == kept or self.is_undecidable

    @property
    def is_undecidable(self) -> bool:
        """Whether lookalikes may both have been cached and dead-lettered: nothing tells their uuids apart then."""
        return self.is_replayed and {"a", "a-lookalike"} <= self.published

    def calm_down(self) -> None:
        world = self.world
        for _ in range(1000):
            if not world.messages:
                break
            ready = [message for message in world.messages if message.ready_at <= world.now]
            if ready:
                self.handle(ready[0])
            else:
                world.pass_time(1)
        assert not world.messages


class Fleet(Protocol):
    """Several workers with a shared store: when one ends, the others read its records."""

    is_shared = True
    has_lookalikes = True


class Replayed(Protocol):
    """A worker with few attempts, and an operator who replays its dead letters, sometimes twice."""

    policy = HASTY
    is_replayed = True

    @precondition(lambda self: self.world.letters)
    @rule(which=st.integers(0, 5), is_acknowledged=st.booleans())
    def replay(self, which: int, is_acknowledged: bool) -> None:
        """Not acknowledged: the command line ended right after the confirm, and the dead letter is still queued."""
        world = self.world
        world.pass_time(0.001)  # a person takes at least that long
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

    is_shared = True
    has_lookalikes = True


_SETTINGS = settings(max_examples=300, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck))
TestOneWorkerOnMemory = Protocol.TestCase
TestOneWorkerOnMemory.settings = _SETTINGS
TestFleet: Any = Fleet.TestCase
TestFleet.settings = _SETTINGS
TestReplayed: Any = Replayed.TestCase
TestReplayed.settings = _SETTINGS
TestReplayedFleet: Any = ReplayedFleet.TestCase
TestReplayedFleet.settings = _SETTINGS
