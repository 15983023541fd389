"""When a task runs: after the earlier ones of its device, at its product's rate, and not too many at once."""

import asyncio
from functools import partial

import pytest

from tests.support.builders import AN_IMEI, a_task
from tests.support.waiting import PATIENCE_S, until
from worker.core.envelope import Envelope, Task
from worker.flow.background import Background
from worker.flow.device_queues import KeyedQueues
from worker.flow.dispatcher import Dispatcher
from worker.flow.rate_limited_queue import Acquire, Turns

CONCURRENCY = 3
OTHERS = [str(865820031000000 + number) for number in range(20)]


class Rig:
    """A dispatcher whose tasks the test ends, in whatever order."""

    def __init__(
        self, acquire: Acquire | None = None, *, concurrency: int = CONCURRENCY, interval_s: float = 0
    ) -> None:
        self.started: list[Task] = []
        self.running: list[Task] = []
        self.turns = Turns()
        self.queues = KeyedQueues(by_device=True, interval_s=interval_s, clock=asyncio.get_running_loop().time)
        self.dispatcher = Dispatcher(
            self._start,
            self.queues,
            acquire,
            lambda _product: True,
            concurrency=concurrency,
            background=Background(),
            turns=self.turns,
        )

    def submit(self, *tasks: Task) -> None:
        for each in tasks:
            self.dispatcher.submit(each)

    def finish(self, task: Task) -> None:
        self.running.remove(task)
        self.dispatcher.finish(task)

    def finish_all(self) -> None:
        """End every task in the order in which they started, those that start meanwhile too."""
        while self.running:
            self.finish(self.running[0])

    def _start(self, task: Task) -> None:
        self.started.append(task)
        self.running.append(task)


@pytest.fixture
async def rig() -> Rig:
    return Rig()


async def test_no_more_tasks_run_at_once_than_the_concurrency(rig: Rig) -> None:
    tasks = [a_task(number, imei) for number, imei in enumerate(OTHERS)]
    rig.submit(*tasks)
    assert rig.running == tasks[:CONCURRENCY]
    most = 0
    while rig.running:
        rig.finish(rig.running[-1])
        most = max(most, len(rig.running))
    assert most == CONCURRENCY
    assert rig.started == tasks


async def test_tasks_of_one_device_run_one_at_a_time_in_order_of_arrival(rig: Rig) -> None:
    own = [a_task(number) for number in range(5)]
    rig.submit(*own)
    for each in own:
        assert rig.running == [each]
        rig.finish(each)
    assert rig.running == []


async def test_submit_tells_whether_the_device_is_free(rig: Rig) -> None:
    first, second = a_task(1), a_task(2)
    assert rig.dispatcher.submit(first)
    assert not rig.dispatcher.submit(second)
    assert rig.queues.waiting == 1


async def test_a_device_with_many_waiting_tasks_delays_no_ready_task_of_another() -> None:
    """The next task of the device waits behind those that were ready before it."""
    rig = Rig(concurrency=1)
    backlog = [a_task(number) for number in range(100)]
    others = [a_task(1000 + number, imei) for number, imei in enumerate(OTHERS)]
    rig.submit(*backlog, *others)
    rig.finish_all()
    assert rig.started[: 1 + len(others)] == [backlog[0], *others]
    assert [task for task in rig.started if task in backlog] == backlog


async def test_two_devices_with_many_waiting_tasks_take_turns() -> None:
    rig = Rig(concurrency=1)
    rig.submit(*(a_task(number, imei) for number in range(10) for imei in OTHERS[:2]))
    rig.finish_all()
    devices = [task.command.imei for task in rig.started if task.command is not None]
    assert devices == OTHERS[:2] * 10


async def test_every_task_that_has_not_started_can_be_withdrawn() -> None:
    """Behind a busy device, ready, and waiting for the rate limit."""
    allowed = [CONCURRENCY + 2]

    async def acquire(_product: str | None) -> float:
        allowed[0] -= 1
        return 0 if allowed[0] >= 0 else 60

    rig = Rig(acquire)
    tasks = [a_task(number, imei) for number, imei in enumerate(OTHERS)]
    behind = [a_task(100 + number, OTHERS[0]) for number in range(3)]
    rig.submit(*tasks, *behind)
    await until(lambda: allowed[0] < 0)
    assert rig.running == tasks[:CONCURRENCY]
    assert rig.dispatcher.is_rate_limiting
    withdrawn = rig.dispatcher.withdraw()
    assert sorted(withdrawn, key=lambda task: task.arrived_at) == [*tasks[CONCURRENCY:], *behind]
    assert not rig.dispatcher.is_rate_limiting
    assert rig.queues.waiting == 0
    rig.finish_all()
    assert rig.started == tasks[:CONCURRENCY]
    rig.submit(a_task(200, OTHERS[5]))  # its device is free: the withdrawn task does not hold it
    assert rig.queues.try_start(a_task(201, OTHERS[6]))


async def test_tasks_are_withdrawn_by_their_time_of_arrival_and_newer_ones_of_their_devices_go_on(rig: Rig) -> None:
    running = [a_task(number, imei) for number, imei in enumerate(OTHERS[:CONCURRENCY])]
    old_ready, new_behind_it = a_task(10, OTHERS[10]), a_task(20, OTHERS[10])
    old_behind, new_behind = a_task(11, OTHERS[0]), a_task(21, OTHERS[0])
    rig.submit(*running, old_ready, old_behind, new_behind_it, new_behind)
    assert set(rig.dispatcher.withdraw(20)) == {old_ready, old_behind}
    rig.finish_all()
    assert set(rig.started) == {*running, new_behind_it, new_behind}


async def test_tasks_that_waited_too_long_for_the_rate_limit_are_withdrawn_and_newer_ones_go_on() -> None:
    is_open = asyncio.Event()

    async def acquire(_product: str | None) -> float:
        return 0 if is_open.is_set() else 0.001

    rig = Rig(acquire)
    old, new = a_task(1), a_task(2)
    rig.submit(old, new)
    assert rig.dispatcher.withdraw(2) == [old]
    is_open.set()
    await until(lambda: rig.started == [new])


async def test_a_stop_waits_for_the_tasks_that_run(rig: Rig) -> None:
    tasks = [a_task(number, imei) for number, imei in enumerate(OTHERS[:2])]
    rig.submit(*tasks)
    rig.dispatcher.begin_stop()
    stopping = asyncio.create_task(rig.dispatcher.stop())
    rig.finish(tasks[0])
    await asyncio.sleep(0)
    assert not stopping.done()
    rig.finish(tasks[1])
    async with asyncio.timeout(PATIENCE_S):
        await stopping


async def test_a_stop_waits_for_a_task_that_starts_when_another_ends(rig: Rig) -> None:
    first, second = a_task(1), a_task(2)
    rig.submit(first, second)
    stopping = asyncio.create_task(rig.dispatcher.stop())
    rig.finish(first)
    await asyncio.sleep(0)
    assert not stopping.done()
    rig.finish(second)
    async with asyncio.timeout(PATIENCE_S):
        await stopping


async def test_after_a_stop_has_begun_no_task_waits_for_the_rate_limit() -> None:
    async def acquire(_product: str | None) -> float:
        raise AssertionError

    rig = Rig(acquire)
    rig.dispatcher.begin_stop()
    each = a_task(1)
    rig.submit(each)
    assert rig.running == [each]


async def test_a_message_without_a_command_waits_for_no_device_and_no_rate() -> None:
    async def acquire(_product: str | None) -> float:
        raise AssertionError

    rig = Rig(acquire)
    each = Task(Envelope(), None, 0)
    rig.submit(each)
    assert rig.running == [each]


async def test_products_do_not_wait_for_each_others_rate() -> None:
    async def acquire(product: str | None) -> float:
        return 60 if product == "slow" else 0

    rig = Rig(acquire)
    slow, quick = a_task(1, AN_IMEI, product="slow"), a_task(2, OTHERS[0], product="quick")
    rig.submit(slow, quick)
    await until(lambda: rig.started == [quick])
    assert rig.dispatcher.is_rate_limiting


async def test_a_resting_device_goes_on_by_itself_and_holds_up_no_other() -> None:
    rig = Rig(interval_s=60)
    first, second, other = a_task(1), a_task(2), a_task(3, OTHERS[0])
    rig.submit(first, second)
    assert first.command is not None
    rig.queues.note_sent(first.command)
    rig.finish(first)
    rig.submit(other)
    assert rig.running == [other]
    rig.dispatcher.withdraw()

    rig = Rig(interval_s=0.05)
    rig.submit(first, second)
    began = asyncio.get_running_loop().time()
    rig.queues.note_sent(first.command)
    rig.finish(first)
    await until(lambda: rig.running == [second])
    assert asyncio.get_running_loop().time() - began >= 0.05


async def test_commands_and_reads_of_one_product_take_turns() -> None:
    """Neither a queue of commands nor a series of reads takes every request that the rate allows."""
    allowed, taken = [0], [0]

    async def acquire(_product: str | None) -> float:
        if not allowed[0]:
            return 0.001
        allowed[0] -= 1
        taken[0] += 1
        return 0

    def is_taken(number: int) -> bool:
        return taken[0] == number

    rig = Rig(acquire, concurrency=100)
    tasks = [a_task(number, imei) for number, imei in enumerate(OTHERS)]
    rig.submit(*tasks)
    reads = [asyncio.create_task(rig.turns.acquire(None, acquire)) for _ in range(10)]
    for number in range(1, 7):
        allowed[0] = 1
        await until(partial(is_taken, number))
    await until(lambda: len(rig.running) >= 1)
    assert sum(read.done() for read in reads) >= 4
    for read in reads:
        read.cancel()
    rig.dispatcher.withdraw()
