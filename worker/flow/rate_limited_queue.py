"""Holds the tasks of one product, and releases them at the product's rate."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable

from worker.core.envelope import Task
from worker.flow.background import Background

Acquire = Callable[[str | None], Awaitable[float]]
"""Takes one request from a product's rate limit; returns 0, or the seconds until another try may succeed."""

_LOOK_AGAIN_S = 0.5  # how soon it is noticed that a product is paused


class RateLimitedQueue:
    """Releases tasks one by one, in order of arrival, as soon as the rate limit allows each.

    Args:
        acquire: takes one request from the limit; returns 0, or the seconds until another try may succeed.
        is_open: tells whether the product's commands are sent at all; while they are not, they need no rate.
        release: takes each task.
        background: runs the wait.
    """

    def __init__(
        self,
        acquire: Callable[[], Awaitable[float]],
        is_open: Callable[[], bool],
        release: Callable[[Task], object],
        background: Background,
    ) -> None:
        self._acquire = acquire
        self._is_open = is_open
        self._release = release
        self._background = background
        self._tasks: deque[Task] = deque()
        self._is_running = False

    @property
    def is_holding(self) -> bool:
        """Whether a task waits for the rate limit."""
        return bool(self._tasks)

    def put(self, task: Task) -> None:
        """Add a task."""
        self._tasks.append(task)
        if not self._is_running:
            self._is_running = True
            self._background.start(self._run())

    def withdraw(self, arrived_before: float) -> list[Task]:
        """Remove and return the tasks that arrived before a monotonic time."""
        withdrawn = [task for task in self._tasks if task.arrived_at < arrived_before]
        self._tasks = deque(task for task in self._tasks if task.arrived_at >= arrived_before)
        return withdrawn

    async def _run(self) -> None:
        while self._tasks:
            wait_s = await self._acquire() if self._is_open() else 0
            if wait_s:
                await asyncio.sleep(min(wait_s, _LOOK_AGAIN_S))
            elif self._tasks:  # otherwise they were withdrawn meanwhile
                self._release(self._tasks.popleft())
        self._is_running = False
