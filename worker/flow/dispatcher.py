"""Decides when a task runs: after the earlier ones of its device, at its product's rate. Knows no broker."""

import asyncio
import math
from collections import deque
from collections.abc import Callable

from worker.core.envelope import Task
from worker.flow.background import Background
from worker.flow.device_queues import KeyedQueues
from worker.flow.rate_limited_queue import Acquire, RateLimitedQueue, Turns


class Dispatcher:
    """Holds tasks until they may run, and starts them.

    Args:
        start: starts a task; ``finish`` must be called at its end.
        queues: keep the order within a device, and the interval between two of its commands.
        acquire: takes one request from a product's rate limit; None: there is no rate limit.
        allows: tells whether a product's commands are sent at all; while they are not, they need no rate.
        concurrency: how many tasks run at once.
        background: runs the waits for the rate limit.
        turns: shared with whatever else takes requests from the rate limit.
    """

    def __init__(
        self,
        start: Callable[[Task], object],
        queues: KeyedQueues,
        acquire: Acquire | None,
        allows: Callable[[str | None], bool],
        *,
        concurrency: int,
        background: Background,
        turns: Turns,
    ) -> None:
        self._start = start
        self._queues = queues
        self._acquire = acquire
        self._allows = allows
        self._concurrency = concurrency
        self._background = background
        self._turns = turns
        loop = asyncio.get_running_loop()
        queues.on_wait = lambda free_at, key: loop.call_at(free_at, self._end_rest, key)
        self._rate_limited: dict[str | None, RateLimitedQueue] = {}
        self._ready: deque[Task] = deque()  # waiting only because enough tasks are running
        self._running = 0
        self._is_stopping = False
        self._is_idle = asyncio.Event()
        self._is_idle.set()

    @property
    def is_rate_limiting(self) -> bool:
        """Whether tasks are held because their product's rate is used up."""
        return any(queue.is_holding for queue in self._rate_limited.values())

    def submit(self, task: Task) -> bool:
        """Run a task as soon as its device is free and its product's rate allows; tells whether the device is free."""
        if not self._queues.try_start(task):
            return False
        self._release(task)
        return True

    def finish(self, task: Task) -> None:
        """Note that a task which ran is over, and start the next."""
        self._running -= 1
        self._leave_device(task)
        while self._ready and self._running < self._concurrency:
            self._run(self._ready.popleft())
        if not self._running:
            self._is_idle.set()

    def withdraw(self, arrived_before: float = math.inf) -> list[Task]:
        """Take back the tasks that have not started and that arrived before a monotonic time."""
        behind = self._queues.withdraw(arrived_before)  # first: else they would follow those whose device is free
        ahead = [task for queue in self._rate_limited.values() for task in queue.withdraw(arrived_before)]
        ahead += [task for task in self._ready if task.arrived_at < arrived_before]
        self._ready = deque(task for task in self._ready if task.arrived_at >= arrived_before)
        for task in ahead:
            self._leave_device(task)
        return [*behind, *ahead]

    def begin_stop(self) -> None:
        """Let nothing wait for its product's rate any more."""
        self._is_stopping = True

    async def stop(self) -> None:
        """Wait for the tasks that have started."""
        await self._is_idle.wait()

    def _release(self, task: Task) -> None:
        """Start a task, or first give it to its product's rate limit."""
        command = task.command
        if self._acquire is None or command is None or self._is_stopping or not self._allows(command.product):
            self._run_or_wait(task)
        else:
            self._queue_of(command.product, self._acquire).put(task)

    def _queue_of(self, product: str | None, acquire: Acquire) -> RateLimitedQueue:
        if product not in self._rate_limited:
            self._rate_limited[product] = RateLimitedQueue(
                lambda: acquire(product),
                lambda: self._allows(product),
                self._run_or_wait,
                self._background,
                self._turns.of(product),
            )
        return self._rate_limited[product]

    def _run_or_wait(self, task: Task) -> None:
        if self._running < self._concurrency and not self._ready:
            self._run(task)
        else:
            self._ready.append(task)

    def _run(self, task: Task) -> None:
        self._running += 1
        self._is_idle.clear()
        self._start(task)

    def _leave_device(self, task: Task) -> None:
        follower = self._queues.finish(task)
        if follower is not None:
            self._release(follower)

    def _end_rest(self, key: str) -> None:
        first = self._queues.end_rest(key)
        if first is not None:
            self._release(first)
