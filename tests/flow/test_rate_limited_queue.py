"""Tasks of one product that wait for its rate limit."""

import asyncio

import pytest

from tests.support.builders import a_task
from tests.support.waiting import until
from worker.core.envelope import Task
from worker.flow.background import Background
from worker.flow.rate_limited_queue import RateLimitedQueue


class Limited:
    """A queue whose rate limit the test opens, one task at a time."""

    def __init__(self) -> None:
        self.allowed = 0
        self.asked = 0
        self.is_sending = True
        self.released: list[Task] = []
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.queue = RateLimitedQueue(
            self._acquire, lambda: self.is_sending, self.released.append, Background(), asyncio.Lock()
        )

    def put(self, *tasks: Task) -> None:
        for each in tasks:
            self.queue.put(each)

    async def is_asked_again(self) -> None:
        """Wait until the rate limit has refused what is first in the queue."""
        asked = self.asked
        await until(lambda: self.asked > asked + 1)

    async def _acquire(self) -> float:
        self.asked += 1
        await self.may_answer.wait()
        if not self.allowed:
            return 0.001
        self.allowed -= 1
        return 0


@pytest.fixture
async def limited() -> Limited:
    return Limited()


async def test_tasks_are_released_in_order_of_arrival_as_the_rate_limit_allows(limited: Limited) -> None:
    tasks = [a_task(number) for number in range(3)]
    limited.allowed = 2
    limited.put(*tasks)
    await limited.is_asked_again()
    assert limited.released == tasks[:2]
    assert limited.queue.is_holding
    limited.allowed = 1
    await until(lambda: limited.released == tasks)
    assert not limited.queue.is_holding


async def test_a_task_after_an_idle_time_is_released_too(limited: Limited) -> None:
    first, second = a_task(1), a_task(2)
    limited.allowed = 2
    limited.put(first)
    await until(lambda: limited.released == [first])
    limited.put(second)
    await until(lambda: limited.released == [first, second])


async def test_waiting_tasks_are_withdrawn_by_their_time_of_arrival(limited: Limited) -> None:
    old, new = a_task(1), a_task(2)
    limited.put(old, new)
    await limited.is_asked_again()
    assert limited.queue.withdraw(arrived_before=2) == [old]
    limited.allowed = 2
    await until(lambda: limited.released == [new])
    assert limited.queue.withdraw(arrived_before=9) == []


async def test_a_task_withdrawn_while_the_rate_limit_is_asked_for_it_is_not_released(limited: Limited) -> None:
    limited.allowed = 2
    limited.may_answer.clear()
    withdrawn, later = a_task(1), a_task(2)
    limited.put(withdrawn)
    await until(lambda: limited.asked)
    assert limited.queue.withdraw(arrived_before=9) == [withdrawn]
    limited.put(later)
    limited.may_answer.set()
    await until(lambda: limited.released)
    assert limited.released == [later]


async def test_tasks_of_a_paused_product_do_not_wait_for_the_rate_limit(limited: Limited) -> None:
    """They are only postponed, and the tasks after them should not wait for that."""
    waiting = [a_task(1), a_task(2)]
    limited.put(*waiting)
    await limited.is_asked_again()
    limited.is_sending = False
    await until(lambda: limited.released == waiting)
