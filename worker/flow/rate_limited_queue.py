"""Who takes the next request from a product's rate limit: tasks, reads for commands in doubt, and reads for results."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable

from worker.core.envelope import Task
from worker.flow.background import Background

Acquire = Callable[[str | None], Awaitable[float]]
"""Takes one request from a product's rate limit; returns 0, or the seconds until another try may succeed."""

_PARTS = 3  # one of so many requests, at most, is a read for results
_LOOK_AGAIN_S = 0.5  # how soon it is noticed that a product is paused


class Turns:
    """One lock for each product, held while waiting for its rate limit.

    Locks of asyncio serve in order of arrival, so neither the commands nor the reads of the history starve the others.
    """

    def __init__(self) -> None:
        self._locks: dict[str | None, asyncio.Lock] = {}

    def of(self, product: str | None) -> asyncio.Lock:
        """Return the lock of a configured product."""
        return self._locks.setdefault(product, asyncio.Lock())

    async def acquire(self, product: str | None, acquire: Acquire) -> None:
        """Take one request from a product's rate limit, and wait until that is allowed."""
        async with self.of(product):
            wait_s = await acquire(product)
            while wait_s:
                await asyncio.sleep(wait_s)
                wait_s = await acquire(product)


class Share:
    """Gives reads for results a third of the rate limit at most, evenly spaced, so that commands have the rest.

    Args:
        interval_s: seconds between two requests that the rate limit allows.
        acquire: takes one request of a product from the rate limit, and waits until that is allowed.
    """

    def __init__(self, interval_s: float, acquire: Callable[[str | None], Awaitable[None]]) -> None:
        self._interval_s = _PARTS * interval_s
        self._acquire = acquire
        self._loop = asyncio.get_running_loop()
        self._turns: dict[str | None, asyncio.Lock] = {}  # of configured products
        self._next_at: dict[str | None, float] = {}  # on the loop's clock

    async def acquire(self, product: str | None) -> None:
        """Take one request, and wait until that is allowed; who gives up waiting has taken none."""
        async with self._turns.setdefault(product, asyncio.Lock()):
            await asyncio.sleep(self._next_at.get(product, 0.0) - self._loop.time())
            await self._acquire(product)
            self._next_at[product] = self._loop.time() + self._interval_s


class RateLimitedQueue:
    """Releases tasks one by one, in order of arrival, as soon as the rate limit allows each.

    Args:
        acquire: takes one request from the limit; returns 0, or the seconds until another try may succeed.
        is_open: tells whether the product's commands are sent at all; while they are not, they need no rate.
        release: takes each task.
        background: runs the wait.
        turn: held while one task waits for the limit.
    """

    def __init__(
        self,
        acquire: Callable[[], Awaitable[float]],
        is_open: Callable[[], bool],
        release: Callable[[Task], object],
        background: Background,
        turn: asyncio.Lock,
    ) -> None:
        self._acquire = acquire
        self._is_open = is_open
        self._release = release
        self._background = background
        self._turn = turn
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
            async with self._turn:
                wait_s = await self._next_wait_s()
                while wait_s:
                    await asyncio.sleep(min(wait_s, _LOOK_AGAIN_S))
                    wait_s = await self._next_wait_s()
            if self._tasks:  # otherwise they were withdrawn meanwhile
                self._release(self._tasks.popleft())
        self._is_running = False

    async def _next_wait_s(self) -> float:
        """Take one request from the limit if a task needs it; returns the seconds until another try may succeed."""
        return await self._acquire() if self._tasks and self._is_open() else 0
