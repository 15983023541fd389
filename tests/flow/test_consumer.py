"""What the consumer takes, holds and returns, in interleavings that a real broker seldom brings about.

The consumer, the processor, the circuit breakers and the device queues are real. The broker is a fake queue that
delivers within the prefetch and answers when the test says so.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
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
from worker.core.claims import IdempotencyStore, Lease
from worker.core.command import Command
from worker.core.decide import RetryPolicy
from worker.core.doubt_window import DoubtWindow
from worker.core.platform import Candidate, OwnedByOthers, Sent
from worker.errors import StoreUnavailable
from worker.flow.consumer import Consumer
from worker.flow.device_queues import KeyedQueues
from worker.flow.rate_limited_queue import Acquire, Turns
from worker.idempotency.memory import MemoryStore
from worker.processing.circuit_breaker import CircuitBreakers
from worker.processing.engine import Engine
from worker.processing.store_watch import StoreWatch
from worker.telemetry.metrics import Metrics
from worker.telemetry.tracing import NoTracing

PREFETCH, CONCURRENCY, PROBE_S = 6, 4, 0.05
LONG_AGO = datetime.now(UTC) - timedelta(hours=1)
DEVICES = [str(865820030000000 + number) for number in range(100)]


@dataclass
class BlockingPlatform:
    """A platform that answers when the test lets it, and records what it was asked, in order."""

    answer: Callable[[Command], Answer] = lambda command: Cached(command.command_id)  # each its own uuid
    may_answer: asyncio.Event = field(default_factory=asyncio.Event)
    asked: list[str] = field(default_factory=list)
    may_show_history: asyncio.Event = field(default_factory=asyncio.Event)
    looked_up: list[str] = field(default_factory=list)

    def knows(self, _product: str | None) -> bool:
        return True

    async def execute(self, command: Command, _not_after: float) -> Sent:
        self.asked.append(command.command_id)
        await self.may_answer.wait()
        return Sent(self.answer(command), valid_time_omitted=False)

    def now(self, _product: str | None) -> datetime:
        return datetime.now(UTC)

    async def time_for(self, _command: Command) -> datetime:
        return datetime.now(UTC)

    async def count_waiting(self, _command: Command, _most: int) -> int:
        return 0

    async def find_candidates(self, command: Command, _doubt: DoubtWindow, _others: OwnedByOthers) -> list[Candidate]:
        self.looked_up.append(command.command_id)
        await self.may_show_history.wait()
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
        self.may_confirm = asyncio.Event()
        self.may_confirm.set()
        self.session = 1
        self.is_connected, self.is_blocked = True, False
        self._count = 0
        self.bodies: list[bytes] = []
        self._counted: set[int] = set()  # what is unacknowledged of the present consumers
        self._settling = 0  # how many calls of settle() have not returned

    def put(
        self,
        command_id: str,
        imei: str,
        product: str | None = None,
        *,
        doubt: DoubtWindow | None = None,
        crash_count: int = 0,
    ) -> None:
        body = json.dumps(a_command(command_id=command_id, imei=imei, product=product)).encode()
        self.bodies.append(body)
        headers: dict[str, Any] = {} if doubt is None else {"x-onenet-in-doubt": str(doubt)}
        self.put_again(body, headers | ({"x-onenet-crash-count": crash_count} if crash_count else {}))

    def put_again(self, body: bytes, headers: dict[str, Any] | None = None) -> None:
        """Put another copy of a message into the queue, which says nothing of the first."""
        self._count += 1
        properties = BasicProperties(headers=headers or None)
        self.ready.append(Delivery(self.session, self._count, False, properties, body, bool(headers)))
        self.deliver()

    def deliver(self) -> None:
        while self.ready and len(self._counted) < self.prefetch:
            delivery = self.ready.pop(0)
            self.unacknowledged[delivery.tag] = delivery
            self._counted.add(delivery.tag)
            self.consumer.on_delivery(delivery)

    async def lose_session(self) -> None:
        """Lose the session as ``Broker`` does: nothing is confirmed any more, then the consumer learns of it."""
        void = list(self.unacknowledged.values())
        self.session += 1
        self.may_confirm.set()
        self.unacknowledged.clear()
        self._counted.clear()
        await asyncio.sleep(0)
        self.consumer.on_lost()
        await until(lambda: not self._settling)  # a new session takes longer than that
        again = [replace(delivery, session=self.session, is_redelivered=True) for delivery in void]
        self.ready = [*again, *self.ready]

    async def consume(self, prefetch: int) -> None:
        self.asked_for.append(prefetch)
        if prefetch < self.prefetch:
            self._counted.clear()  # the prefetch is each consumer's own, and these consumers end
        self.prefetch = prefetch
        self.deliver()  # before the answer has arrived
        await self.may_confirm_consume.wait()

    async def settle(self, delivery: Delivery, publications: Sequence[Publication]) -> bool:
        if delivery.session != self.session:
            return False
        command_id = json.loads(delivery.body)["command_id"]
        self.published += [(publication.exchange, command_id) for publication in publications]
        self._settling += 1
        try:
            return await asyncio.shield(self._confirm(delivery))  # it comes, whether or not anybody still waits for it
        finally:
            self._settling -= 1

    async def look_at_queue(self) -> tuple[int, int]:
        return len(self.ready), 1

    async def _confirm(self, delivery: Delivery) -> bool:
        await asyncio.sleep(0)  # the confirm takes at least one turn of the loop
        await self.may_confirm.wait()
        if delivery.session != self.session:
            return False
        self.unacknowledged.pop(delivery.tag)
        self._counted.discard(delivery.tag)
        self.deliver()
        return True

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


class BreakerClock:
    """The clock of the circuit breakers, which can be stopped: no probe is due then."""

    def __init__(self) -> None:
        self._stopped_at: float | None = None

    def __call__(self) -> float:
        return time.monotonic() if self._stopped_at is None else self._stopped_at

    def stop(self) -> None:
        self._stopped_at = time.monotonic()

    def go_on(self) -> None:
        self._stopped_at = None


@dataclass
class Harness:
    """A consumer between a queue and a platform."""

    queue: FakeBroker
    platform: BlockingPlatform
    breakers: CircuitBreakers
    breaker_clock: BreakerClock
    consumer: Consumer
    clock: Clock
    metrics: Metrics

    async def pause(self) -> None:
        """Let the platform refuse a command, which pauses its product, until nothing is consumed any more."""
        self.breaker_clock.stop()
        self.platform.answer = lambda _: NotSent("refused")
        self.platform.may_answer.set()
        self.queue.put("last-straw", DEVICES[0])
        await until(lambda: 0 in self.queue.asked_for)
        self.breaker_clock.go_on()

    async def pause_product(self, product: str) -> None:
        """Let the platform refuse a command of one product, which pauses it until ``breaker_clock`` goes on."""
        self.breaker_clock.stop()
        self.platform.answer = lambda _: NotSent("503")
        self.platform.may_answer.set()
        self.queue.put("last-straw", DEVICES[0], product)
        await until(lambda: self.breakers.paused()[product] and not self.queue.unacknowledged)

    def published_to(self, exchange: str) -> list[str]:
        return [command_id for target, command_id in self.queue.published if target == f"onenet.{exchange}"]


@asynccontextmanager
async def harness(
    products: Sequence[str | None] = (None,),
    acquire: Acquire | None = None,
    look_s: float = PROBE_S,
    store: IdempotencyStore | None = None,
    interval_s: float = 0,
) -> AsyncIterator[Harness]:
    platform, queue, clock = BlockingPlatform(), FakeBroker(), Clock()
    breaker_clock = BreakerClock()
    breakers = CircuitBreakers(products, 1, PROBE_S, breaker_clock)
    history_breakers = CircuitBreakers(products, 1, PROBE_S, subject="history")
    metrics = Metrics("0", CONCURRENCY)
    policy = RetryPolicy((5, 60), max_attempts=9, reconcile_delay_s=60)
    queues = KeyedQueues(by_device=True, interval_s=interval_s, clock=asyncio.get_running_loop().time)
    used = store or MemoryStore(3600, 60, began_at=LONG_AGO)
    queue.consumer = Consumer(
        Engine(platform, used, breakers, history_breakers, policy, metrics, clock, queues.note_sent),
        MessageBuilder(Topology("onenet", (5, 60)), "host:1"),
        cast("Any", queue),
        breakers,
        StoreWatch(used, used.ping),
        queues,
        acquire,
        Turns(),
        metrics,
        NoTracing(),
        ZoneInfo("Asia/Shanghai"),
        concurrency=CONCURRENCY,
        usual_prefetch=PREFETCH,
        probe_interval_s=look_s,
    )
    try:
        yield Harness(queue, platform, breakers, breaker_clock, queue.consumer, clock, metrics)
    finally:
        platform.may_answer.set()
        platform.may_show_history.set()
        async with asyncio.timeout(PATIENCE_S):
            await queue.consumer.stop()


class UnwritableStore(MemoryStore):
    """A store that grants leases and records no outcome."""

    async def complete(self, lease: Lease, reply: Reply, doubt: DoubtWindow | None, *, is_guess: bool = False) -> None:
        raise StoreUnavailable("Redis: ConnectionError")


async def test_no_reply_is_published_before_its_outcome_is_recorded() -> None:
    async with harness(store=UnwritableStore(3600, 60, began_at=LONG_AGO)) as found:
        found.platform.may_answer.set()
        found.queue.put("unrecorded", DEVICES[0])
        await until(lambda: found.published_to("retry") == ["unrecorded"])
        assert found.published_to("replies") == []


async def test_each_settled_command_is_reported_once() -> None:
    async with harness() as found:
        found.platform.may_answer.set()
        for number in range(3):
            found.queue.put(f"command-{number}", DEVICES[number])
        await until(lambda: len(found.published_to("replies")) == 3)
        labels = {"outcome": "accepted", "reason": "answered"}
        assert found.metrics.registry.get_sample_value("onenet_worker_commands_total", labels) == 3


async def test_a_stop_during_a_prefetch_change_still_cancels_the_consumers() -> None:
    """Nothing would take the deliveries that arrive after it, and the grace period would run out."""
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


async def test_the_prefetch_shrinks_when_commands_no_longer_wait_for_a_busy_device(monkeypatch: Any) -> None:
    """A worker that holds more than it can process keeps it from other workers, beyond consumer_timeout."""
    monkeypatch.setattr("worker.flow.prefetch.SWEEP_S", 0.01)

    async with harness() as found:
        for number in range(10 * PREFETCH):
            found.queue.put(f"hot-{number}", DEVICES[0])
        await until(lambda: found.queue.prefetch > 5 * PREFETCH)
        found.platform.may_answer.set()
        await until(lambda: found.queue.prefetch == PREFETCH)
        await until(lambda: len(found.published_to("replies")) == 10 * PREFETCH)
        assert found.published_to("returns") == []


async def test_a_command_that_waits_too_long_for_its_turn_is_returned_to_the_queue(monkeypatch: Any) -> None:
    """The broker's consumer_timeout does not depend on what a delivery waits for."""
    monkeypatch.setattr("worker.flow.prefetch.SWEEP_S", 0.01)

    async with harness() as found:
        for number in range(PREFETCH):
            found.queue.put(f"command-{number}", DEVICES[number])
        await until(lambda: len(found.platform.asked) == CONCURRENCY)
        monkeypatch.setattr("worker.flow.consumer.MAX_HELD_S", 0.0)
        await until(lambda: len(found.published_to("returns")) == PREFETCH - CONCURRENCY)
        assert found.published_to("returns") == [f"command-{number}" for number in range(CONCURRENCY, PREFETCH)]


async def test_a_delivery_that_arrives_before_consume_is_confirmed_becomes_the_probe() -> None:
    """Returned to the queue, it would be behind everything that arrived after it."""
    async with harness() as found:
        await found.pause()
        found.platform.answer = lambda command: Cached(command.command_id)
        for number in range(3 * PREFETCH):
            found.queue.put(f"command-{number:02}", DEVICES[1])
        await until(lambda: len(found.published_to("replies")) == 3 * PREFETCH)
        assert found.published_to("replies") == [f"command-{number:02}" for number in range(3 * PREFETCH)]
        assert found.published_to("returns") == []


async def test_a_product_due_for_a_probe_does_not_wait_behind_a_product_that_is_down() -> None:
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


async def test_a_product_is_not_due_while_its_probe_is_in_progress() -> None:
    """Otherwise command after command is taken and postponed until the probe has its answer."""
    async with harness() as found:
        await found.pause()
        found.platform.may_answer.clear()
        await until(lambda: found.breakers.retry_in_s() == 0)
        probe = found.breakers.try_acquire(None)
        assert probe is not None
        assert found.breakers.retry_in_s() > 0
        probe.release()
        assert found.breakers.retry_in_s() == 0


async def test_a_postponed_command_is_not_in_doubt_when_the_session_is_lost_before_the_confirm() -> None:
    """It is sent as soon as it is delivered again, without a look at its history."""
    async with harness(products=["a", "b"]) as found:
        await found.pause_product("a")
        found.queue.may_confirm.clear()
        found.queue.put("a-1", DEVICES[1], "a")
        await until(lambda: "a-1" in found.published_to("retry"))
        await found.queue.lose_session()
        found.platform.answer = lambda command: Cached(command.command_id)
        found.breaker_clock.go_on()
        await until(lambda: can_be_sent(found.breakers, "a"))
        found.queue.deliver()
        await until(lambda: "a-1" in found.published_to("replies"))
        assert found.platform.looked_up == []


async def test_a_command_postponed_after_the_session_was_lost_is_not_in_doubt() -> None:
    """Its copy is not even published, and the consumer was told of the loss before it was postponed."""
    async with harness(products=["a", "b"]) as found:
        await found.pause_product("a")
        found.queue.put("a-1", DEVICES[1], "a")  # its coroutine has not run yet
        found.queue.session += 1
        found.consumer.on_lost()
        await until(lambda: found.consumer.in_flight == 0)
        [lost] = found.queue.unacknowledged.values()
        found.queue.ready.append(replace(lost, session=found.queue.session, is_redelivered=True))
        found.queue.unacknowledged.clear()
        found.platform.answer = lambda command: Cached(command.command_id)
        found.breaker_clock.go_on()
        await until(lambda: can_be_sent(found.breakers, "a"))
        found.queue.deliver()
        await until(lambda: "a-1" in found.published_to("replies"))
        assert found.platform.looked_up == []


async def test_a_command_in_progress_when_the_session_is_lost_is_recorded_and_its_redelivery_gets_the_reply() -> None:
    async with harness() as found:
        found.queue.put("in-progress", DEVICES[0])
        await until(lambda: found.platform.asked == ["in-progress"])
        await found.queue.lose_session()
        found.platform.may_answer.set()
        await until(lambda: found.consumer.in_flight == 0)
        assert found.queue.published == []  # its delivery is void
        found.queue.deliver()
        await until(lambda: not found.queue.unacknowledged)
        assert found.published_to("replies") == ["in-progress"]
        assert found.platform.asked == ["in-progress"]


async def test_commands_that_had_not_started_when_the_session_was_lost_are_sent_once_they_are_redelivered() -> None:
    async with harness() as found:
        ids = [f"command-{number}" for number in range(PREFETCH)]
        for number, command_id in enumerate(ids):
            found.queue.put(command_id, DEVICES[number])
        await until(lambda: len(found.platform.asked) == CONCURRENCY)
        await found.queue.lose_session()
        found.platform.may_answer.set()
        await until(lambda: found.consumer.in_flight == 0)
        found.queue.deliver()
        await until(lambda: sorted(found.published_to("replies")) == ids)
        assert sorted(found.platform.asked) == ids
        assert found.platform.looked_up == []


async def test_commands_that_wait_for_the_rate_limit_return_to_the_queue_on_stop() -> None:
    async def acquire(_product: str | None) -> float:
        return 0 if not found.platform.asked else 60

    async with harness(acquire=acquire) as found:
        found.platform.may_answer.set()
        found.queue.put("first", DEVICES[0])
        await until(lambda: found.published_to("replies") == ["first"])
        found.queue.put("second", DEVICES[0])
        found.queue.put("third", DEVICES[1])
        await until(lambda: found.consumer.is_rate_limiting)
        await found.consumer.stop()
        assert found.published_to("returns") == ["second", "third"]
        assert found.platform.asked == ["first"]


async def test_a_stop_while_the_rate_limit_is_asked_leaves_no_command_between_two_queues() -> None:
    """A command lost there would never be settled, and the grace period would run out."""
    is_asked, may_answer = asyncio.Event(), asyncio.Event()

    async def acquire(_product: str | None) -> float:
        is_asked.set()
        await may_answer.wait()
        return 0

    async with harness(acquire=acquire) as found:
        found.platform.may_answer.set()
        found.queue.put("first", DEVICES[0])
        found.queue.put("second", DEVICES[0])
        await is_asked.wait()
        stopping = asyncio.create_task(found.consumer.stop())
        await until(lambda: 0 in found.queue.asked_for)
        may_answer.set()
        await stopping
        assert found.published_to("returns") == ["first", "second"]
        assert not found.queue.unacknowledged


async def test_a_stop_waits_for_a_probe_and_for_its_confirm() -> None:
    async with harness() as found:
        await found.pause()
        found.platform.may_answer.clear()
        found.queue.put("probe", DEVICES[1])
        await until(lambda: "probe" in found.platform.asked)
        found.queue.may_confirm.clear()
        stopping = asyncio.create_task(found.consumer.stop())
        found.platform.answer = lambda command: Cached(command.command_id)
        found.platform.may_answer.set()
        await until(lambda: "probe" in found.published_to("replies"))
        assert not stopping.done()
        found.queue.may_confirm.set()
        await stopping
        assert not found.queue.unacknowledged


async def test_nothing_is_taken_while_publishing_is_blocked() -> None:
    async with harness() as found:
        found.consumer.on_blocked(True)
        await until(lambda: found.queue.asked_for == [0])
        found.consumer.on_blocked(False)
        await until(lambda: found.queue.asked_for == [0, PREFETCH])


RIPE = DoubtWindow(LONG_AGO, LONG_AGO + timedelta(seconds=2))


async def test_commands_in_doubt_do_not_keep_a_new_command_from_being_the_probe() -> None:
    """Even if their histories are never answered, and there are more of them in front of it than run at once."""
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


async def test_a_probe_that_turns_out_in_doubt_is_followed_by_another_before_its_history_is_read() -> None:
    """Only the store knows that it is in doubt."""
    async with harness(look_s=3600) as found:
        found.platform.answer = lambda command: (
            InDoubt("lost") if command.command_id == "doubtful" else NotSent("refused")
        )
        found.platform.may_answer.set()
        found.breaker_clock.stop()
        found.queue.put("doubtful", DEVICES[0])
        await until(lambda: 0 in found.queue.asked_for)
        found.breaker_clock.go_on()
        found.clock.ahead_s = 600  # so that its history can tell
        found.queue.put_again(found.queue.bodies[0])
        found.queue.put("new", DEVICES[1])
        found.platform.answer = lambda command: Cached(command.command_id)
        await until(lambda: "new" in found.published_to("replies"))
        assert found.platform.looked_up == ["doubtful"]
        assert "doubtful" not in found.published_to("replies")


async def test_a_suspect_whose_announcement_is_confirmed_too_late_is_not_tried_and_its_delivery_acknowledged(
    monkeypatch: Any,
) -> None:
    """Its copy has taken its place, and tries it."""
    monkeypatch.setattr("worker.flow.consumer.ANNOUNCE_S", 0.01)
    async with harness() as found:
        found.platform.may_answer.set()
        found.platform.may_show_history.set()
        found.queue.may_confirm.clear()
        found.queue.put("suspect", DEVICES[0], doubt=RIPE, crash_count=1)
        await until(lambda: found.published_to("retry") == ["suspect"])
        await until(lambda: found.consumer.in_flight == 0)
        assert found.queue.unacknowledged
        found.queue.may_confirm.set()
        await until(lambda: not found.queue.unacknowledged)
        assert (found.platform.asked, found.platform.looked_up) == ([], [])
        assert found.published_to("retry") == ["suspect"]


async def test_a_suspect_is_tried_once_its_announcement_is_confirmed() -> None:
    async with harness() as found:
        found.platform.may_answer.set()
        found.platform.may_show_history.set()
        found.queue.may_confirm.clear()
        found.queue.put("suspect", DEVICES[0], doubt=RIPE, crash_count=1)
        await until(lambda: found.published_to("retry") == ["suspect"])
        assert found.platform.looked_up == []
        found.queue.may_confirm.set()
        await until(lambda: found.consumer.in_flight == 0)
        assert found.platform.looked_up == ["suspect"]


async def test_a_device_that_rests_with_many_waiting_commands_delays_no_other_device() -> None:
    """They are far more than the prefetch; on stop they return to the queue without waiting for the interval."""
    async with harness(interval_s=3600) as found:
        found.platform.may_answer.set()
        for number in range(400):
            found.queue.put(f"slow-{number}", DEVICES[0])
        for number, imei in enumerate(DEVICES[1:]):
            found.queue.put(f"quick-{number}", imei)
        await until(lambda: len(found.published_to("replies")) == len(DEVICES))
        assert found.platform.asked.count("slow-0") == 1
        assert [each for each in found.platform.asked if each.startswith("slow")] == ["slow-0"]
        await found.consumer.stop()
        assert not found.queue.unacknowledged
        assert set(found.published_to("returns")) <= {f"slow-{number}" for number in range(1, 400)}
        assert found.platform.looked_up == []
