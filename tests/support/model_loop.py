"""An event loop in a model's time: the model decides which task runs next, and how far; or that none runs any more."""

import asyncio
from asyncio import _set_running_loop  # asyncio's seam for other event loops
from collections.abc import Callable, Coroutine
from contextvars import Context, copy_context
from functools import partial
from typing import Any, TypeVar, TypeVarTuple

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


async def suspend() -> None:
    """Suspend the current task until the model resumes it."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, ModelLoop)
    await loop.suspension()


class ModelLoop(asyncio.BaseEventLoop):
    """Runs the tasks of one worker, each from one ``suspend`` to the next.

    A worker is killed by running its loop no more. Its coroutines are closed when they are garbage-collected: what
    their ``finally`` blocks schedule here never runs.

    Args:
        clock: the model's time in seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__()
        self._clock = clock
        self._ready: list[tuple[asyncio.Handle, Callable[[], object]]] = []
        self._timers: list[tuple[asyncio.TimerHandle, Callable[[], object]]] = []
        self._suspended: dict[asyncio.Task[Any] | None, asyncio.Future[None]] = {}

    def start(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start a task, and run it to its first suspension."""
        task = asyncio.Task(coroutine, loop=self)
        self.run()
        return task

    def can_resume(self, task: asyncio.Task[Any]) -> bool:
        """Tell whether a task is suspended; otherwise it has ended, or waits for another task or for time to pass."""
        return task in self._suspended

    def resume(self, task: asyncio.Task[Any]) -> None:
        """Run a suspended task to its next suspension, and whatever waited for it."""
        self._suspended.pop(task).set_result(None)
        self.run()

    def run(self) -> None:
        """Run everything that can run at the model's time."""
        _set_running_loop(self)
        try:
            while self._ready or self._has_due_timer():
                handle, call = self._ready.pop(0)
                if not handle.cancelled():
                    call()
        finally:
            _set_running_loop(None)

    async def suspension(self) -> None:
        """Wait until the current task is resumed."""
        self._suspended[asyncio.current_task()] = future = self.create_future()
        await future

    def time(self) -> float:
        return self._clock()

    def is_closed(self) -> bool:
        return True  # there is nothing to close

    def get_debug(self) -> bool:
        return False

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def call_soon(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append((handle, partial((context or copy_context()).run, callback, *args)))
        return handle

    def call_at(
        self, when: float, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        self._timers.append((handle, partial((context or copy_context()).run, callback, *args)))
        return handle

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Ignore that the tasks of a killed worker never end."""

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        self._timers = [each for each in self._timers if each[0] is not handle]

    def _has_due_timer(self) -> bool:
        """Make the timers ready that are due, and tell whether there were any."""
        due = [each for each in self._timers if each[0].when() <= self.time()]
        self._timers = [each for each in self._timers if each not in due]
        self._ready += due
        return bool(due)
