"""Threads that handle tasks: as few as do, as many as it takes, and none left behind."""

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.support.builders import a_task
from tests.support.waiting import PATIENCE_S, until
from worker.core.envelope import Task
from worker.flow.crew import Crew

SIZE, FEW = 8, 2


@dataclass
class Work:
    """Notes what is handled, by whom and how much of it at a time; goes on when it may."""

    may_go_on: threading.Event = field(default_factory=threading.Event)
    before_each: Callable[[], object] = lambda: None
    done: list[Task] = field(default_factory=list)
    threads: set[threading.Thread] = field(default_factory=set)
    most: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    under_way: int = 0

    def handle(self, each: Task) -> None:
        with self._lock:
            self.threads.add(threading.current_thread())
            self.under_way += 1
            self.most = max(self.most, self.under_way)
        self.before_each()
        self.may_go_on.wait(PATIENCE_S)
        with self._lock:
            self.under_way -= 1
            self.done.append(each)


def running(test: Callable[[Crew, Work], object]) -> Work:
    """Let a test coroutine have a crew, which has ended when this returns."""
    work = Work()

    async def run() -> None:
        crew = Crew(work.handle, SIZE, FEW)
        async with asyncio.timeout(PATIENCE_S):
            result = test(crew, work)
            assert asyncio.iscoroutine(result)
            await result
            await crew.end()

    asyncio.run(run())
    for thread in work.threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    return work


def test_where_all_wait_for_the_platform_as_many_are_woken_as_there_are() -> None:
    async def test(crew: Crew, work: Work) -> None:
        for number in range(3 * SIZE):
            crew.put(a_task(number))
        await until(lambda: work.under_way == SIZE)
        work.may_go_on.set()

    work = running(test)
    assert work.most == SIZE
    assert len(work.done) == 3 * SIZE


def test_more_are_woken_where_one_or_another_always_comes_back_but_all_have_time() -> None:
    """A platform that takes a few milliseconds."""
    tickets = threading.Semaphore(0)

    async def test(crew: Crew, work: Work) -> None:
        work.before_each = lambda: tickets.acquire(timeout=PATIENCE_S)
        work.may_go_on.set()
        for number in range(3 * SIZE):
            crew.put(a_task(number))
        number = 3 * SIZE
        while work.under_way < SIZE:
            tickets.release()  # so that one is back at nearly every look
            crew.put(a_task(number))
            number += 1
            await asyncio.sleep(0.001)  # the platform's time
        tickets.release(number)

    running(test)


def test_a_task_that_another_thread_puts_is_handled_while_all_that_are_awake_wait() -> None:
    """As a pacer does: the loop learns of it all the same."""

    async def test(crew: Crew, work: Work) -> None:
        for number in range(FEW):
            crew.put(a_task(number))
        await until(lambda: work.under_way == FEW)
        await asyncio.to_thread(crew.put, a_task(FEW))
        await until(lambda: work.under_way == FEW + 1)
        work.may_go_on.set()

    assert len(running(test).done) == FEW + 1


def test_what_has_not_begun_can_be_withdrawn() -> None:
    async def test(crew: Crew, work: Work) -> None:
        tasks = [a_task(number) for number in range(2 * SIZE)]
        for each in tasks:
            crew.put(each)
        await until(lambda: work.under_way == SIZE)
        assert crew.withdraw() == tasks[SIZE:]
        work.may_go_on.set()

    assert len(running(test).done) == SIZE


def test_what_is_there_is_finished_before_the_end() -> None:
    async def test(crew: Crew, work: Work) -> None:
        for number in range(3 * SIZE):
            crew.put(a_task(number))
        work.may_go_on.set()

    assert len(running(test).done) == 3 * SIZE


def test_none_ends_while_there_is_work_even_if_it_is_one_too_many() -> None:
    async def test(crew: Crew, work: Work) -> None:
        work.may_go_on.set()
        for number in range(500 * SIZE):  # so long that it is tried with one less, again and again
            crew.put(a_task(number))
        for _ in range(20):
            await asyncio.sleep(0)

    assert len(running(test).done) == 500 * SIZE


def test_a_crew_that_never_had_work_ends() -> None:
    async def test(crew: Crew, work: Work) -> None:
        pass

    assert not running(test).threads
