"""How long the commands of a device wait for their look, and how much of the rate limit looks have, in a model's time.

An hour of it passes at once; no test waits.
"""

import asyncio
import itertools
from collections import Counter, deque
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from heapq import heappop, heappush
from typing import Any, TypeVar, cast

import pytest
from pika import BasicProperties

from schemas.result import Result
from tests.support.model_loop import ModelLoop
from worker.amqp.messages import Delivery, Publication
from worker.amqp.result_messages import ResultMessages
from worker.amqp.topology import Topology
from worker.core.results import Awaited
from worker.flow.result_consumer import PREFETCH, ResultConsumer, Share

BEGAN = datetime(2026, 11, 22, 8, 0, tzinfo=UTC)
DELAYS_S = (60, 300)
CONSUMER_TIMEOUT_S = 30 * 60  # the broker's default
SLOW, OTHER = "slow", "other"
T = TypeVar("T")


class Model:
    """A loop whose time the test passes."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.loop = ModelLoop(self.clock)

    def clock(self) -> float:
        return self.seconds

    def run(self, make: Callable[[], T]) -> T:
        async def made() -> T:
            return make()

        return self.loop.start(made()).result()

    def start(self, coroutine: Any) -> asyncio.Task[Any]:
        return self.loop.start(coroutine)

    def pass_time(self, seconds: float) -> None:
        self.seconds += seconds
        self.loop.run()


@pytest.fixture
def model() -> Model:
    return Model()


class Platform:
    """Counts looks; those at devices of products that hang never end."""

    def __init__(self, acquire: Callable[[str | None], Any] | None = None) -> None:
        self.hanging: set[str | None] = set()
        self.looks: list[tuple[str | None, str, list[str]]] = []
        self.acquire = acquire
        self.now: Callable[[], datetime] = lambda: BEGAN

    async def find(self, product: str | None, imei: str, due: Sequence[Awaited]) -> list[Result | Awaited]:
        if self.acquire is not None:
            await self.acquire(product)
        self.looks.append((product, imei, [each.command_id for each in due]))
        if product in self.hanging:
            await asyncio.Event().wait()
        return [each.after_look(self.now(), DELAYS_S) for each in due]


class Bench:
    """A result consumer between a broker, which delivers a queue as far as the prefetch allows, and a platform."""

    def __init__(self, model: Model, acquire: Callable[[str | None], Any] | None = None) -> None:
        self.model = model
        self.platform = Platform(acquire)
        self.platform.now = lambda: self.now(None)
        self.queue: deque[Awaited] = deque()
        self.held: dict[int, float] = {}  # since when each delivery is held, by tag
        self.longest_s = 0.0
        self.returned: list[Awaited] = []
        self._numbers = itertools.count(1)
        self._delayed: list[tuple[float, int, Awaited]] = []  # a heap, by the time in seconds
        topology = Topology("test", (1,), DELAYS_S)
        self.consumer: ResultConsumer = model.run(
            lambda: ResultConsumer(
                cast("Any", self.platform),
                ResultMessages(topology, DELAYS_S),
                cast("Any", self),
                [],
                cast("Any", None),
                cast("Any", self),
                cast("Any", None),
                DELAYS_S,
            )
        )
        model.start(self.consumer.run())

    def now(self, _product: str | None) -> datetime:
        return BEGAN + timedelta(seconds=self.model.seconds)

    def put(self, product: str | None, count: int, devices: int | None = None) -> None:
        """Put commands into the queue that are due, each of another device or in turn of so many."""
        for number in range(count):
            self.queue.append(
                Awaited(
                    command_id=f"{product}-{number}",
                    uuid=f"u{number}",
                    imei=str(865820030000000 + number % (devices or count)),
                    product=product,
                    accepted_at=BEGAN,
                    expires_at=BEGAN + timedelta(days=1),
                    last_answer_at=BEGAN + timedelta(days=1),
                    due_at=BEGAN,
                )
            )
        self.model.start(self._deliver())

    def pass_time(self, seconds: float, step_s: float = 0.5) -> None:
        """Let time pass, and what was delayed come back."""
        end = self.model.seconds + seconds
        while self.model.seconds < end:
            self.model.pass_time(step_s)
            while self._delayed and self._delayed[0][0] <= self.model.seconds:
                self.queue.append(heappop(self._delayed)[2])
            self.model.start(self._deliver())

    async def run(self, _listener: object) -> None:
        await asyncio.Event().wait()  # the broker's connection

    async def count_ready(self, _queues: object) -> int:
        return len(self.queue)

    async def consume(self, _prefetch: int) -> None:
        """Deliver nothing more."""
        self.queue.clear()

    @property
    def unacknowledged(self) -> int:
        return len(self.held)

    async def settle(self, delivery: Delivery, publications: Sequence[Publication]) -> bool:
        self.longest_s = max(self.longest_s, self.model.seconds - self.held.pop(delivery.tag))
        for publication in publications:
            awaited = Awaited.model_validate_json(publication.body)
            self.returned.append(awaited)
            heappush(self._delayed, ((awaited.due_at - BEGAN).total_seconds(), next(self._numbers), awaited))
        await self._deliver()
        return True

    async def _deliver(self) -> None:
        while self.queue and len(self.held) < PREFETCH:
            tag = next(self._numbers)
            self.held[tag] = self.model.seconds
            body = self.queue.popleft().model_dump_json().encode()
            self.consumer.on_delivery(Delivery(1, tag, False, BasicProperties(), body, True))

    def looks(self, product: str | None) -> int:
        return sum(1 for found, _, _ in self.platform.looks if found == product)


@pytest.fixture
def bench(model: Model) -> Bench:
    return Bench(model)


def test_commands_of_a_device_that_come_together_have_one_look(bench: Bench, model: Model) -> None:
    bench.put(None, 30, devices=3)
    bench.pass_time(5)
    assert Counter(len(ids) for _, _, ids in bench.platform.looks) == {10: 3}


def test_a_product_whose_looks_hang_keeps_no_other_waiting(bench: Bench, model: Model) -> None:
    bench.platform.hanging = {SLOW}
    bench.put(SLOW, 3 * PREFETCH)
    bench.put(OTHER, 20)
    bench.pass_time(60)
    assert bench.looks(OTHER) == 20
    assert bench.looks(SLOW) <= 4
    assert {each.looks for each in bench.returned if each.product == SLOW} == {0}  # none used up


def test_what_hangs_is_not_held_until_the_broker_closes_the_channel(bench: Bench, model: Model) -> None:
    bench.platform.hanging = {SLOW}
    bench.put(SLOW, 100)
    bench.pass_time(CONSUMER_TIMEOUT_S)
    assert len(bench.held) == bench.looks(SLOW) == 4  # reads have a limit of their own
    assert bench.longest_s < CONSUMER_TIMEOUT_S / 2


def test_at_a_low_rate_nothing_is_held_for_long_and_every_turn_is_used(model: Model) -> None:
    """Ten in a minute, and one look for each three requests: one look in 18 s."""
    share = model.run(lambda: Share(6, lambda _product: asyncio.sleep(0)))
    bench = Bench(model, share.acquire)
    bench.put(None, PREFETCH + 100)
    bench.pass_time(CONSUMER_TIMEOUT_S, 1)
    assert bench.longest_s < CONSUMER_TIMEOUT_S / 2
    assert bench.looks(None) >= CONSUMER_TIMEOUT_S / 18


def test_nothing_is_given_back_as_long_as_looks_keep_up(model: Model) -> None:
    share = model.run(lambda: Share(1 / 300, lambda _product: asyncio.sleep(0)))
    bench = Bench(model, share.acquire)
    bench.put(None, 4 * PREFETCH)
    bench.pass_time(30, 0.005)
    assert bench.looks(None) == 4 * PREFETCH
    assert {each.looks for each in bench.returned} == {1}  # their first look; none came back without


def test_a_lost_session_leaves_no_look_behind(bench: Bench, model: Model) -> None:
    """What was held is delivered again; a look that went on would be one more for the same commands."""
    bench.platform.hanging = {SLOW}
    for _ in range(3):
        bench.put(SLOW, 100)
        bench.pass_time(2)
        bench.consumer.on_lost()
        bench.held.clear()
        bench.pass_time(2)
    tasks = asyncio.all_tasks(model.loop)
    assert len(tasks) == len({"run of the consumer", "run of the broker", "count", "sweep"})


def test_a_stop_waits_for_no_look(bench: Bench, model: Model) -> None:
    """It would have to wait for the rate limit; what is held is delivered to another worker."""
    bench.platform.hanging = {SLOW}
    bench.put(SLOW, 100)
    bench.pass_time(2)
    assert model.start(bench.consumer.stop()).done()


def test_looks_are_spaced_and_have_a_third_of_the_rate(model: Model) -> None:
    taken: list[float] = []

    async def acquire(_product: str | None) -> None:
        taken.append(model.seconds)

    share = model.run(lambda: Share(1, acquire))
    for _ in range(4):
        model.start(share.acquire(None))
    for _ in range(9):
        model.pass_time(1)
    assert taken == [0, 3, 6, 9]


def test_who_gives_up_waiting_has_taken_no_share(model: Model) -> None:
    """Otherwise those that gave up would keep all that follow waiting for ever longer."""
    taken: list[float] = []

    async def acquire(_product: str | None) -> None:
        taken.append(model.seconds)

    share = model.run(lambda: Share(1, acquire))
    model.start(share.acquire(None))
    for _ in range(100):
        model.start(share.acquire(None)).cancel()
    model.loop.run()
    model.start(share.acquire(None))
    model.pass_time(3)
    assert taken == [0, 3]


def test_each_product_has_a_share_of_its_own(model: Model) -> None:
    taken: list[str | None] = []

    async def acquire(product: str | None) -> None:
        taken.append(product)

    share = model.run(lambda: Share(1, acquire))
    for product in (SLOW, SLOW, OTHER):
        model.start(share.acquire(product))
    assert taken == [SLOW, OTHER]
