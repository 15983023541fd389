"""A rate: its slots in this process and in Redis, and what waits for them."""

import queue
import threading
from collections.abc import Iterator
from uuid import uuid4

import pytest

from tests.flow.test_device_queues import task
from tests.support.rig import PATIENCE_S
from worker.core.rate import Rate
from worker.core.task import Task
from worker.dev.services.ports import wait_until
from worker.dev.services.redis import LocalRedis
from worker.flow.pace import Pacer
from worker.flow.rate_limiter import RateLimiter

SLOW = Rate(1, 86_400)  # so that no test sees a second slot come due


@pytest.fixture(params=["memory", "redis"])
def url(request: pytest.FixtureRequest) -> str | None:
    return None if request.param == "memory" else str(request.getfixturevalue("redis_url"))


def test_a_slot_is_given_once_and_then_it_takes_time(url: str | None) -> None:
    slots = RateLimiter(SLOW, f"test-{uuid4()}", url)
    assert slots.take(None) == 0
    assert 86_000 < slots.take(None) <= 86_400


def test_each_product_has_slots_of_its_own(url: str | None) -> None:
    slots = RateLimiter(SLOW, f"test-{uuid4()}", url)
    assert [slots.take(product) for product in (None, "heating", "default")] == [0, 0, 0]
    assert slots.take("heating") > 0


def test_a_tenth_of_a_second_may_be_made_up_for(url: str | None) -> None:
    slots = RateLimiter(Rate(100_000, 10_000), f"test-{uuid4()}", url)  # 10 a second
    assert slots.take(None) == 0
    assert slots.take(None) > 0
    slots = RateLimiter(Rate(36_000_000, 360_000), f"test-{uuid4()}", url)  # 100 a second: 10 at once
    assert [slots.take(None) for _ in range(10)] == [0] * 10


def test_a_fleet_shares_its_slots(redis_url: str) -> None:
    namespace = f"test-{uuid4()}"
    one, other = (RateLimiter(SLOW, namespace, redis_url) for _ in range(2))
    assert one.take(None) == 0
    assert other.take(None) > 0


def test_without_redis_nothing_is_held_up_here(own_redis: LocalRedis) -> None:
    """The store has the last word then, and it sends nothing."""
    slots = RateLimiter(SLOW, f"test-{uuid4()}", own_redis.url)
    own_redis.kill()
    try:
        assert [slots.take(None), slots.take(None)] == [0, 0]
    finally:
        own_redis.start()


class Rig:
    """A pacer whose slots the test hands out."""

    def __init__(self) -> None:
        self.slots = threading.Semaphore(0)
        self.asked = threading.Semaphore(0)
        self.is_open = True
        self.gone: queue.Queue[Task] = queue.Queue()
        self.pacer = Pacer(self.take_slot, lambda: self.is_open, self.gone.put)

    def take_slot(self) -> float:
        self.asked.release()
        return 0 if self.slots.acquire(blocking=False) else 0.001

    def next(self) -> Task:
        return self.gone.get(timeout=PATIENCE_S)


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.is_open = False  # which lets go of what is left, so that its thread rests


def test_tasks_go_in_their_order_each_with_a_slot(rig: Rig) -> None:
    tasks = [task(number) for number in range(3)]
    for each in tasks:
        rig.pacer.put(each)
    rig.slots.release(2)
    assert [rig.next(), rig.next()] == tasks[:2]
    assert rig.asked.acquire(timeout=PATIENCE_S)
    assert rig.gone.empty()
    rig.slots.release()
    assert rig.next() is tasks[2]


def test_what_waits_can_be_withdrawn(rig: Rig) -> None:
    old, new = task(1), task(2)
    rig.pacer.put(old)
    rig.pacer.put(new)
    assert rig.pacer.withdraw(arrived_before=2) == [old]
    rig.slots.release(2)
    assert rig.next() is new
    assert rig.pacer.withdraw(arrived_before=9) == []


def test_what_is_not_sent_needs_no_slot(rig: Rig) -> None:
    """The commands of a paused product only have to be put aside, and nothing behind them should wait for that."""
    waiting = task(1)
    rig.pacer.put(waiting)
    wait_until(lambda: rig.asked.acquire(blocking=False), PATIENCE_S, "its first try")
    rig.is_open = False
    assert rig.next() is waiting
