"""What waits for a product's rate limit."""

import queue
import threading
from collections.abc import Iterator

import pytest

from tests.support.builders import a_task
from tests.support.waiting import PATIENCE_S
from worker.core.envelope import Task
from worker.dev.services.ports import wait_until
from worker.flow.pace import Pacer


class LimitedPacer:
    """A pacer whose rate limit the test opens, one task at a time."""

    def __init__(self) -> None:
        self.allowed = threading.Semaphore(0)
        self.asked = threading.Semaphore(0)
        self.is_sending = True
        self.released: queue.Queue[Task] = queue.Queue()
        self.pacer = Pacer(self.acquire, lambda: self.is_sending, self.released.put)

    def acquire(self) -> float:
        self.asked.release()
        return 0 if self.allowed.acquire(blocking=False) else 0.001

    def next(self) -> Task:
        return self.released.get(timeout=PATIENCE_S)


@pytest.fixture
def limited() -> Iterator[LimitedPacer]:
    limited = LimitedPacer()
    yield limited
    limited.is_sending = False  # releases what is left, so that the pacer's thread stops asking


def test_tasks_are_released_in_order_of_arrival_as_the_rate_limit_allows(limited: LimitedPacer) -> None:
    tasks = [a_task(number) for number in range(3)]
    for each in tasks:
        limited.pacer.put(each)
    limited.allowed.release(2)
    assert [limited.next(), limited.next()] == tasks[:2]
    assert limited.asked.acquire(timeout=PATIENCE_S)
    assert limited.released.empty()
    limited.allowed.release()
    assert limited.next() is tasks[2]


def test_waiting_tasks_can_be_withdrawn_by_their_time_of_arrival(limited: LimitedPacer) -> None:
    old, new = a_task(1), a_task(2)
    limited.pacer.put(old)
    limited.pacer.put(new)
    assert limited.pacer.withdraw(arrived_before=2) == [old]
    limited.allowed.release(2)
    assert limited.next() is new
    assert limited.pacer.withdraw(arrived_before=9) == []


def test_tasks_of_a_paused_product_do_not_wait_for_the_rate_limit(limited: LimitedPacer) -> None:
    """They are only postponed, and the tasks after them should not wait for that."""
    waiting = a_task(1)
    limited.pacer.put(waiting)
    wait_until(lambda: limited.asked.acquire(blocking=False), PATIENCE_S, "the first call of the rate limiter")
    limited.is_sending = False
    assert limited.next() is waiting
