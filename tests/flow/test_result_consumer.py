"""How long commands wait for their look, and how much of the rate limit looks have, in a model's time."""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import pytest

from schemas.result import Result
from tests.support.results_model import BEGAN, ModelTime, ResultsModel
from worker.core.results import Awaited
from worker.flow.rate_limited_queue import Share
from worker.flow.result_consumer import PREFETCH

DELAYS_S = (60, 300)
CONSUMER_TIMEOUT_S = 30 * 60  # the broker's default
SLOW, OTHER = "slow", "other"


def due(product: str | None, count: int, devices: int | None = None) -> Iterator[Awaited]:
    """Yield commands that are due, each of another device or in turn of so many."""
    for number in range(count):
        yield Awaited(
            command_id=f"{product}-{number}",
            app_id="",
            uuid=f"u{number}",
            imei=str(865820030000000 + number % (devices or count)),
            product=product,
            accepted_at=BEGAN,
            is_recovered=False,
            expires_at=BEGAN + timedelta(days=1),
            last_answer_at=BEGAN + timedelta(days=1),
            due_at=BEGAN,
        )


class Platform:
    """Has no result, and records the looks; those at devices of products that hang never end."""

    def __init__(self, time: ModelTime, acquire: Callable[[str | None], Any] | None = None) -> None:
        self.hanging: set[str | None] = set()
        self.looks: list[tuple[str | None, int]] = []  # of which product, and at how many commands
        self._time = time
        self._acquire = acquire

    def was_hindered(self) -> bool:
        return False

    async def find(self, product: str | None, _imei: str, due: Sequence[Awaited]) -> list[Result | Awaited]:
        if self._acquire is not None:
            await self._acquire(product)
        self.looks.append((product, len(due)))
        if product in self.hanging:
            await asyncio.Event().wait()
        return [each.after_look(self._time.now(), self._time.now(), DELAYS_S) for each in due]


class Bench(ResultsModel):
    """A result consumer and such a platform; with an interval between two requests, at the rate limit."""

    def __init__(self, time: ModelTime, interval_s: float | None = None) -> None:
        share = None if interval_s is None else time.make(lambda: Share(interval_s, lambda _product: asyncio.sleep(0)))
        self.platform = Platform(time, None if share is None else share.acquire)
        super().__init__(time, self.platform, DELAYS_S)

    def looks(self, product: str | None) -> int:
        return sum(found == product for found, _ in self.platform.looks)


@pytest.fixture
def time() -> ModelTime:
    return ModelTime()


@pytest.fixture
def bench(time: ModelTime) -> Bench:
    return Bench(time)


def test_commands_of_a_device_that_come_together_have_one_look(bench: Bench) -> None:
    bench.put(due(None, 30, devices=3))
    bench.pass_time(5)
    assert Counter(count for _, count in bench.platform.looks) == {10: 3}


def test_a_product_whose_looks_hang_keeps_no_other_waiting(bench: Bench) -> None:
    bench.platform.hanging = {SLOW}
    bench.put(due(SLOW, 3 * PREFETCH))
    bench.put(due(OTHER, 20))
    bench.pass_time(60)
    assert bench.looks(OTHER) == 20
    assert bench.looks(SLOW) <= 4
    assert {each.looks for each in bench.returned if each.product == SLOW} == {0}  # none used up


def test_what_hangs_is_not_held_until_the_broker_closes_the_channel(bench: Bench) -> None:
    bench.platform.hanging = {SLOW}
    bench.put(due(SLOW, 100))
    bench.pass_time(CONSUMER_TIMEOUT_S)
    assert len(bench.held) == bench.looks(SLOW) == 4  # reads have a limit of their own
    assert bench.longest_s < CONSUMER_TIMEOUT_S / 2


def test_at_a_low_rate_nothing_is_held_for_long_and_every_turn_is_used(time: ModelTime) -> None:
    """Ten in a minute, and one look for each three requests: one look in 18 s."""
    bench = Bench(time, interval_s=6)
    bench.put(due(None, 3 * PREFETCH // 5))
    bench.pass_time(CONSUMER_TIMEOUT_S, 1)
    assert bench.longest_s < CONSUMER_TIMEOUT_S / 2
    assert bench.looks(None) >= CONSUMER_TIMEOUT_S / 18


def test_nothing_is_given_back_as_long_as_looks_keep_up(time: ModelTime) -> None:
    bench = Bench(time, interval_s=1 / 300)
    bench.put(due(None, 4 * PREFETCH))
    bench.pass_time(30, 0.005)
    assert bench.looks(None) == 4 * PREFETCH
    assert {each.looks for each in bench.returned} == {1}  # their first look; none came back without


def test_a_lost_session_leaves_no_look_behind(bench: Bench, time: ModelTime) -> None:
    """What was held is delivered again; a look that went on would be one more for the same commands."""
    bench.platform.hanging = {SLOW}
    for _ in range(3):
        bench.put(due(SLOW, 100))
        bench.pass_time(2)
        bench.consumer.on_lost()
        bench.held.clear()
        bench.pass_time(2)
    tasks = asyncio.all_tasks(time.loop)
    assert len(tasks) == len({"run of the consumer", "run of the broker", "count", "sweep", "hand over"})


def test_a_stop_waits_for_no_look(bench: Bench, time: ModelTime) -> None:
    """It would have to wait for the rate limit; what is held is delivered to another worker."""
    bench.platform.hanging = {SLOW}
    bench.put(due(SLOW, 100))
    bench.pass_time(2)
    assert time.start(bench.consumer.stop()).done()


def test_looks_are_spaced_and_have_a_third_of_the_rate(time: ModelTime) -> None:
    taken: list[float] = []

    async def acquire(_product: str | None) -> None:
        taken.append(time.seconds)

    share = time.make(lambda: Share(1, acquire))
    for _ in range(4):
        time.start(share.acquire(None))
    for _ in range(9):
        time.pass_time(1)
    assert taken == [0, 3, 6, 9]


def test_who_gives_up_waiting_has_taken_no_share(time: ModelTime) -> None:
    """Otherwise those that gave up would keep all that follow waiting for ever longer."""
    taken: list[float] = []

    async def acquire(_product: str | None) -> None:
        taken.append(time.seconds)

    share = time.make(lambda: Share(1, acquire))
    time.start(share.acquire(None))
    for _ in range(100):
        time.start(share.acquire(None)).cancel()
    time.loop.run()
    time.start(share.acquire(None))
    time.pass_time(3)
    assert taken == [0, 3]


def test_each_product_has_a_share_of_its_own(time: ModelTime) -> None:
    taken: list[str | None] = []

    async def acquire(product: str | None) -> None:
        taken.append(product)

    share = time.make(lambda: Share(1, acquire))
    for product in (SLOW, SLOW, OTHER):
        time.start(share.acquire(product))
    assert taken == [SLOW, OTHER]
