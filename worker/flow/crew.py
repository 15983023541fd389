"""Threads that handle tasks, no more of them awake than there is use for.

Threads hinder each other: at every call to the system one gives the interpreter away and then waits for it, which costs
more than most of what a command needs. As many as may be are needed only where the platform takes its time. So a few
are awake while there is work, and more are woken while this process waits for others, not for the processor.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable

from worker.core.envelope import Task

_LOOK_S = 0.001
_PATIENCE = 2  # looks in a row at which none has come back: once may be chance, when others use the processor
_LOOKS_PER_TRIAL = 25  # after which it is tried with more, or with one less: there may be one too many
_BUSY = 0.6  # of one processor: the interpreter, which is what the threads share, has little time left


class Crew:
    """A crew of threads, each of which begins when it is first needed.

    Args:
        handle: handles one task, in one of the threads.
        size: how many threads.
        few: so many are awake at least while there is work.
    """

    def __init__(self, handle: Callable[[Task], object], size: int, few: int) -> None:
        self._handle = handle
        self._size = size
        self._few = few
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._tasks: deque[Task] = deque()
        self._resting: list[threading.Lock] = []  # each thread's own, which wakes it; the latest is woken first
        self._threads = 0
        self._is_ending = False
        self._all_ended = asyncio.Event()
        self._is_looking = False
        self._came_back = 0  # how often a thread came for its next task
        self._came_back_before = 0
        self._in_vain = 0  # looks in a row at which none had come back
        self._at_once = 1  # how many to wake then
        self._looks = 0
        self._began = (0.0, 0.0)  # the trial, and how much of the processor had been used by then
        self._has_one_too_many = False

    def put(self, task: Task) -> None:
        """Take a task. May be called from any thread."""
        with self._lock:
            self._tasks.append(task)
            awake = self._awake
            if awake < self._few:
                self._wake(1)
            must_look = awake > 0 and not self._is_looking
            if must_look:
                self._is_looking = True
                self._begin_trial()
        if must_look:
            self._loop.call_soon_threadsafe(self._look)

    def withdraw(self) -> list[Task]:
        """Take back all that has not begun."""
        with self._lock:
            withdrawn = list(self._tasks)
            self._tasks.clear()
        return withdrawn

    async def end(self) -> None:
        """Wait until all that is here has been handled and the threads have ended; nothing more may come."""
        with self._lock:
            self._is_ending = True
            self._wake(len(self._resting))
            if not self._threads:
                self._all_ended.set()
        await self._all_ended.wait()

    @property
    def _awake(self) -> int:
        return self._threads - len(self._resting)

    def _wake(self, count: int) -> None:
        """Wake so many that rest; where fewer do, others begin."""
        for _ in range(count):
            if self._resting:
                self._resting.pop().release()
            elif self._threads < self._size:
                self._threads += 1
                # A daemon: a request that outlasts the grace period must not keep the process.
                threading.Thread(target=self._work, name=f"handler-{self._threads}", daemon=True).start()

    def _look(self) -> None:
        """See whether more should be awake, as long as tasks wait."""
        with self._lock:
            self._has_one_too_many = False
            self._is_looking = bool(self._tasks)
            if not self._is_looking:
                return
            # Those that rest come at once if all the others wait for the platform, twice as many each time.
            self._in_vain = self._in_vain + 1 if self._came_back == self._came_back_before else 0
            self._came_back_before = self._came_back
            if self._in_vain < _PATIENCE:
                self._at_once = 1
            else:
                self._wake(min(self._at_once, len(self._tasks), len(self._resting)))
                self._at_once = min(2 * self._at_once, self._size)
            self._looks += 1
            if self._looks == _LOOKS_PER_TRIAL:
                self._end_trial()
                self._begin_trial()
        self._loop.call_later(_LOOK_S, self._look)

    def _begin_trial(self) -> None:
        self._looks = 0
        self._began = time.monotonic(), time.process_time()

    def _end_trial(self) -> None:
        """Wake as many again if the processor was hardly used although tasks waited all the time, or let one rest."""
        lasted_s, used_s = time.monotonic() - self._began[0], time.process_time() - self._began[1]
        if used_s < _BUSY * lasted_s:
            self._wake(min(self._awake, len(self._tasks)))
        else:
            self._has_one_too_many = True

    def _work(self) -> None:
        bell = threading.Lock()
        bell.acquire()
        while (task := self._next(bell)) is not None:
            self._handle(task)
            del task  # or a thread that waits for the next one would keep its message, which may be large
            self._came_back += 1
        self._loop.call_soon_threadsafe(self._on_end)

    def _next(self, bell: threading.Lock) -> Task | None:
        """Return the next task, as soon as there is one; None: there will be none any more."""
        while True:
            with self._lock:
                is_one_too_many = self._has_one_too_many and self._awake > self._few
                if self._tasks and (self._is_ending or not is_one_too_many):
                    return self._tasks.popleft()
                if self._is_ending:
                    return None
                self._has_one_too_many = False
                self._resting.append(bell)
            bell.acquire()

    def _on_end(self) -> None:
        with self._lock:
            self._threads -= 1
        if not self._threads:
            self._all_ended.set()
