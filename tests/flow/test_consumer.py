"""What the consumer takes, holds and returns, in interleavings that a real broker seldom brings about.

The consumer, the processor, the circuit breakers and the device queues are real. The broker is a fake queue that
delivers within the prefetch and answers when the test says so.
"""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, cast
from zoneinfo import ZoneInfo

from pika import BasicProperties

from schemas.reply import Reply
from tests.support.builders import a_command
from tests.support.waiting import PATIENCE_S, until
from worker.amqp.messages import Delivery, MessageBuilder, Publication
from worker.amqp.topology import Topology
from worker.core.answer import Answer, Cached, InDoubt, NotSent
from worker.core.claims import IdempotencyStore, Lease, OnRecorded
from worker.core.command import Command
from worker.core.decide import RetryPolicy
from worker.core.doubt_window import DoubtWindow
from worker.core.platform import Candidate, OwnedByOthers, Sent
from worker.errors import StoreUnavailable
from worker.flow import pace
from worker.flow.consumer import Consumer
from worker.flow.device_queues import KeyedQueues
from worker.idempotency.memory import MemoryStore
from worker.processing.circuit_breaker import CircuitBreakers
from worker.processing.engine import Engine
from worker.telemetry.metrics import Metrics
from worker.telemetry.tracing import NoTracing

PREFETCH, CONCURRENCY, PROBE_S = 6, 4, 0.05
LONG_AGO = datetime.now(UTC) - timedelta(hours=1)
DEVICES = [str(865820030000000 + number) for number in range(100)]


@dataclass
class BlockingPlatform:
    """A platform that answers when the test lets it, and records what it was asked, in order."""

    answer: Callable[[Command], Answer] = lambda command: Cached(command.command_id)  # each its own uuid
    may_answer: threading.Event = field(default_factory=threading.Event)
    asked: list[str] = field(default_factory=list)
    may_show_history: threading.Event = field(default_factory=threading.Event)
    looked_up: list[str] = field(default_factory=list)

    def knows(self, _product: str | None) -> bool:
        return True

    def execute(self, command: Command, _not_after: float) -> Sent:
        self.asked.append(command.command_id)
        self.may_answer.wait(PATIENCE_S)
        return Sent(self.answer(command), valid_time_omitted=False)

    def find_candidates(self, command: Command, _doubt: DoubtWindow, _others: OwnedByOthers) -> list[Candidate]:
        self.looked_up.append(command.command_id)
        self.may_show_history.wait(PATIENCE_S)
        return []


class FakeBroker:
    """A fake broker: one queue, delivered within the prefetch."""

    def __init__(self) -> None:
        self.consumer: Consumer
        self.ready: list[Delivery] = []
        self.unacknowledged: dict[int, Delivery] = {}
        self.published: list[tuple[str, str]] = []  # where to, and which command
        self.prefetch = PREFETCH
        self.asked_for: list[int] = []
        self.may_confirm_consume = asyncio.Event()
        self.may_confirm_consume.set()
        self.confirms = True
        self.can_publish = True
        self._loop = asyncio.get_running_loop()
        self._count = 0
        self.bodies: list[bytes] = []
        self._counted: set[int] = set()  # what is unacknowledged of the present consumers

    def put(self, command_id: str, imei: str, product: str | None = None, *, doubt: DoubtWindow | None = None) -> None:
        body = json.dumps(a_command(command_id=command_id, imei=imei, product=product)).encode()
        self._count += 1
        properties = BasicProperties(headers=None if doubt is None else {"x-onenet-in-doubt": str(doubt)})
        self.bodies.append(body)
        self.ready.append(Delivery(1, self._count, False, properties, body, doubt is not None))
        self.deliver()

    def put_again(self, body: bytes) -> None:
        """Put another copy of a message into the queue, which says nothing of the first."""
        self._count += 1
        self.ready.append(Delivery(1, self._count, False, BasicProperties(), body, False))
        self.deliver()

    def deliver(self) -> None:
        while self.ready and len(self._counted) < self.prefetch:
            delivery = self.ready.pop(0)
            self.unacknowledged[delivery.tag] = delivery
            self._counted.add(delivery.tag)
            self.consumer.on_delivery(delivery)

    async def consume(self, prefetch: int) -> None:
        self.asked_for.append(prefetch)
        if prefetch < self.prefetch:
            self._counted.clear()  # the prefetch is each consumer's own, and these consumers end
        self.prefetch = prefetch
        self.deliver()  # before the answer has arrived
        await self.may_confirm_consume.wait()

    def settle(
        self,
        delivery: Delivery,
        publications: Sequence[Publication],
        on_confirmed: Callable[[], object] | None = None,
    ) -> None:
        self._loop.call_soon_threadsafe(self._settle, delivery, publications, on_confirmed)

    def _settle(
        self, delivery: Delivery, publications: Sequence[Publication], on_confirmed: Callable[[], object] | None
    ) -> None:
        command_id = json.loads(delivery.body)["command_id"]
        for publication in publications:
            self.published.append((publication.exchange, command_id))
        if self.confirms:
            self.unacknowledged.pop(delivery.tag, None)
            self._counted.discard(delivery.tag)
            if on_confirmed is not None:
                on_confirmed()
            self.deliver()

    async def drain(self) -> None:
        await until(lambda: not self.unacknowledged)


def can_be_sent(breakers: CircuitBreakers, product: str) -> bool:
    """Tell whether a command of a product could be sent now, if only as a probe."""
    permit = breakers.try_acquire(product)
    if permit is not None:
        permit.release()
    return permit is not None


@dataclass
class Clock:
    """The clock of the processor, which may be ahead."""

    ahead_s: float = 0

    def __call__(self) -> datetime:
        return datetime.now(UTC) + timedelta(seconds=self.ahead_s)


@dataclass
class Harness:
    """A consumer between a queue and a platform."""

    queue: FakeBroker
    platform: BlockingPlatform
    breakers: CircuitBreakers
    consumer: Consumer
    clock: Clock
    metrics: Metrics

    async def pause(self) -> None:
        """Let the platform refuse a command, which pauses its product, until nothing is consumed any more."""
        self.platform.answer = lambda _: NotSent("refused")
        self.platform.may_answer.set()
        self.queue.put("last-straw", DEVICES[0])
        await until(lambda: 0 in self.queue.asked_for)

    def published_to(self, exchange: str) -> list[str]:
        return [command_id for target, command_id in self.queue.published if target == f"onenet.{exchange}"]


@asynccontextmanager
async def harness(
    products: Sequence[str | None] = (None,),
    new_pacer: Any = None,
    look_s: float = PROBE_S,
    store: IdempotencyStore | None = None,
) -> Any:
    platform, queue, clock = BlockingPlatform(), FakeBroker(), Clock()
    breakers = CircuitBreakers(products, 1, PROBE_S)
    history_breakers = CircuitBreakers(products, 1, PROBE_S, subject="history")
    metrics = Metrics("0", CONCURRENCY)
    policy = RetryPolicy((5, 60), max_attempts=9, reconcile_delay_s=60)
    used = store or MemoryStore(3600, 60, began_at=LONG_AGO)
    queue.consumer = Consumer(
        Engine(
            platform,
            used,
            breakers,
            history_breakers,
            policy,
            metrics,
            clock,
        ),
        MessageBuilder(Topology("onenet", (5, 60)), "host:1"),
        cast("Any", queue),
        breakers,
        KeyedQueues(by_device=True),
        new_pacer,
        metrics,
        NoTracing(),
        ZoneInfo("Asia/Shanghai"),
        concurrency=CONCURRENCY,
        few_threads=2,
        usual_prefetch=PREFETCH,
        probe_interval_s=look_s,
    )
    try:
        yield Harness(queue, platform, breakers, queue.consumer, clock, metrics)
    finally:
        platform.may_answer.set()
        platform.may_show_history.set()
        async with asyncio.timeout(PATIENCE_S):
            await queue.consumer.stop()


class UnwritableStore(MemoryStore):
    """A store that grants leases and records no outcome."""

    def complete(
        self, lease: Lease, reply: Reply, doubt: DoubtWindow | None, on_recorded: OnRecorded, *, is_guess: bool = False
    ) -> None:
        on_recorded(StoreUnavailable("Redis: ConnectionError"))


def test_no_reply_is_published_before_its_outcome_is_recorded() -> None:
    async def play() -> None:
        async with harness(store=UnwritableStore(3600, 60, began_at=LONG_AGO)) as found:
            found.platform.may_answer.set()
            found.queue.put("unrecorded", DEVICES[0])
            await until(lambda: found.published_to("retry") == ["unrecorded"])
            assert found.published_to("replies") == []

    asyncio.run(play())


def test_each_settled_command_is_reported_once() -> None:
    async def play() -> None:
        async with harness() as found:
            found.platform.may_answer.set()
            for number in range(3):
                found.queue.put(f"command-{number}", DEVICES[number])
            await until(lambda: len(found.published_to("replies")) == 3)
            labels = {"outcome": "accepted", "reason": "answered"}
            assert found.metrics.registry.get_sample_value("onenet_worker_commands_total", labels) == 3

    asyncio.run(play())


def test_a_stop_during_a_prefetch_change_still_cancels_the_consumers() -> None:
    """No thread would take the deliveries that arrive after it, and the grace period would run out."""

    async def play() -> None:
        async with harness() as found:
            found.queue.may_confirm_consume.clear()
            for number in range(2 * PREFETCH):
                found.queue.put(f"hot-{number}", DEVICES[0])
            await until(lambda: len(found.queue.asked_for) == 1)  # the broker has not answered yet
            stopping = asyncio.create_task(found.consumer.stop())
            await asyncio.sleep(0)
            found.platform.may_answer.set()
            found.queue.may_confirm_consume.set()
            async with asyncio.timeout(PATIENCE_S):
                await stopping
            assert found.queue.asked_for[-1] == 0
            assert not found.queue.unacknowledged

    asyncio.run(play())


def test_the_prefetch_shrinks_when_commands_no_longer_wait_for_a_busy_device(monkeypatch: Any) -> None:
    """A worker that holds more than its threads can process keeps it from other workers, beyond consumer_timeout."""
    monkeypatch.setattr("worker.flow.prefetch.SWEEP_S", 0.01)

    async def play() -> None:
        async with harness() as found:
            for number in range(10 * PREFETCH):
                found.queue.put(f"hot-{number}", DEVICES[0])
            await until(lambda: found.queue.prefetch > 5 * PREFETCH)
            found.platform.may_answer.set()
            await until(lambda: found.queue.prefetch == PREFETCH)
            await until(lambda: len(found.published_to("replies")) == 10 * PREFETCH)
            assert found.published_to("returns") == []

    asyncio.run(play())


def test_a_command_that_waits_too_long_for_a_thread_is_returned_to_the_queue(monkeypatch: Any) -> None:
    """The broker's consumer_timeout does not depend on what a delivery waits for."""
    monkeypatch.setattr("worker.flow.prefetch.SWEEP_S", 0.01)

    async def play() -> None:
        async with harness() as found:
            for number in range(PREFETCH):
                found.queue.put(f"command-{number}", DEVICES[number])
            await until(lambda: len(found.platform.asked) == CONCURRENCY)
            monkeypatch.setattr("worker.flow.consumer.MAX_HELD_S", 0.0)
            await until(lambda: len(found.published_to("returns")) == PREFETCH - CONCURRENCY)
            assert found.published_to("returns") == [f"command-{number}" for number in range(CONCURRENCY, PREFETCH)]

    asyncio.run(play())


def test_a_delivery_that_arrives_before_consume_is_confirmed_becomes_the_probe() -> None:
    """Returned to the queue, it would be behind everything that arrived after it."""

    async def play() -> None:
        async with harness() as found:
            await found.pause()
            found.platform.answer = lambda command: Cached(command.command_id)
            for number in range(3 * PREFETCH):
                found.queue.put(f"command-{number:02}", DEVICES[1])
            await until(lambda: len(found.published_to("replies")) == 3 * PREFETCH)
            assert found.published_to("replies") == [f"command-{number:02}" for number in range(3 * PREFETCH)]
            assert found.published_to("returns") == []

    asyncio.run(play())


def test_a_product_due_for_a_probe_does_not_wait_behind_a_product_that_is_down() -> None:
    async def play() -> None:
        async with harness(products=["a", "b"], look_s=3600) as found:
            is_down = {"a", "b"}
            found.platform.answer = lambda command: (
                NotSent("503") if command.product in is_down else Cached(command.command_id)
            )
            found.platform.may_answer.set()
            found.queue.put("a-0", DEVICES[0], "a")
            found.queue.put("b-0", DEVICES[1], "b")
            await until(lambda: not found.breakers.allows_any())
            is_down.discard("a")
            for number in range(100):
                found.queue.put(f"b-{number + 1}", DEVICES[2], "b")
            found.queue.put("a-1", DEVICES[3], "a")
            await until(lambda: "a-1" in found.published_to("replies"))

    asyncio.run(play())


def test_a_product_is_not_due_while_its_probe_is_in_progress() -> None:
    """Otherwise command after command is taken and postponed until the probe has its answer."""

    async def play() -> None:
        async with harness() as found:
            await found.pause()
            found.platform.may_answer.clear()
            await until(lambda: found.breakers.retry_in_s() == 0)
            probe = found.breakers.try_acquire(None)
            assert probe is not None
            assert found.breakers.retry_in_s() > 0
            probe.release()
            assert found.breakers.retry_in_s() == 0

    asyncio.run(play())


def test_a_postponed_command_is_not_in_doubt_when_the_connection_is_lost_before_the_confirm() -> None:
    async def play() -> None:
        async with harness(products=["a", "b"]) as found:
            found.platform.answer = lambda _: NotSent("503")
            found.platform.may_answer.set()
            found.queue.put("a-0", DEVICES[0], "a")
            await until(lambda: not found.breakers.allows("a"))
            found.queue.confirms = False
            found.queue.put("a-1", DEVICES[1], "a")
            await until(lambda: "a-1" in found.published_to("retry"))
            found.consumer.on_lost()
            lost = dict(found.queue.unacknowledged)
            found.queue.unacknowledged.clear()
            found.queue.confirms = True
            found.platform.answer = lambda command: Cached(command.command_id)
            await until(lambda: can_be_sent(found.breakers, "a"))
            [again] = [item for item in lost.values() if b"a-1" in item.body]
            found.consumer.on_delivery(Delivery(2, 1, True, again.properties, again.body, False))
            await until(lambda: "a-1" in found.published_to("replies"))  # it was sent at once, without its history

    asyncio.run(play())


def test_a_stop_finds_a_command_that_a_thread_was_about_to_give_to_a_pacer(monkeypatch: Any) -> None:
    """A command lost between two queues would never be settled, and the grace period would run out."""
    is_leaving, may_leave = threading.Event(), threading.Event()

    class SlowQueues(KeyedQueues):
        def finish(self, task: Any) -> Any:
            follower = super().finish(task)
            if follower is not None and not is_leaving.is_set():
                is_leaving.set()
                may_leave.wait(PATIENCE_S)
            return follower

    monkeypatch.setattr("tests.flow.test_consumer.KeyedQueues", SlowQueues)
    slots: Iterator[float] = iter([0.0])

    def new_pacer(_product: str | None, let_go: Any) -> pace.Pacer:
        return pace.Pacer(lambda: next(slots, 60.0), lambda: True, let_go)

    async def play() -> None:
        async with harness(new_pacer=new_pacer) as found:
            found.queue.put("first", DEVICES[0])
            found.queue.put("second", DEVICES[0])
            found.platform.may_answer.set()
            await until(is_leaving.is_set)
            stopping = asyncio.create_task(found.consumer.stop())
            await until(lambda: 0 in found.queue.asked_for)
            may_leave.set()
            async with asyncio.timeout(PATIENCE_S):
                await stopping
            assert found.published_to("replies") == ["first", "second"] or found.published_to("returns") == ["second"]

    asyncio.run(play())


RIPE = DoubtWindow(LONG_AGO, LONG_AGO + timedelta(seconds=2))


def test_commands_in_doubt_do_not_keep_a_new_command_from_being_the_probe() -> None:
    """Even if their histories are never answered, and there are more of them in front of it than threads."""

    async def play() -> None:
        async with harness() as found:
            await found.pause()
            found.platform.answer = lambda command: Cached(command.command_id)
            for number in range(10 * CONCURRENCY):
                found.queue.put(f"in-doubt-{number}", DEVICES[number + 1], doubt=RIPE)
            found.queue.put("new", DEVICES[50])
            await until(lambda: "new" in found.published_to("replies"))
            assert len(found.platform.looked_up) <= CONCURRENCY - 1
            assert not [command_id for command_id in found.published_to("replies") if command_id != "new"]
            found.platform.may_show_history.set()
            in_doubt = {f"in-doubt-{number}" for number in range(10 * CONCURRENCY)}
            await until(lambda: in_doubt <= {*found.published_to("replies"), *found.published_to("retry")})

    asyncio.run(play())


def test_a_probe_that_turns_out_in_doubt_is_followed_by_another_before_its_history_is_read() -> None:
    """Only the store knows that it is in doubt."""

    async def play() -> None:
        async with harness(look_s=3600) as found:
            found.platform.answer = lambda command: (
                InDoubt("lost") if command.command_id == "doubtful" else NotSent("refused")
            )
            found.platform.may_answer.set()
            found.queue.put("doubtful", DEVICES[0])
            await until(lambda: 0 in found.queue.asked_for)
            found.clock.ahead_s = 600  # so that its history can tell
            found.queue.put_again(found.queue.bodies[0])
            found.queue.put("new", DEVICES[1])
            found.platform.answer = lambda command: Cached(command.command_id)
            await until(lambda: "new" in found.published_to("replies"))
            assert found.platform.looked_up == ["doubtful"]
            assert "doubtful" not in found.published_to("replies")

    asyncio.run(play())
