"""Lets commands go at a rate, and holds up no thread that has something else to do."""

import threading
import time
from collections import deque
from collections.abc import Callable

from worker.core.envelope import Task

_LOOK_AGAIN_S = 0.5  # how soon it is noticed that a product's commands are sent no longer


class Pacer:
    """Lets one product's tasks go one by one, each when there is a slot for it. Waits in a thread of its own.

    Args:
        take_slot: takes a slot; returns 0, or the seconds until there may be one.
        is_open: tells whether the product's commands are sent at all; while they are not, none needs a slot.
        let_go: takes each task, at once.
    """

    def __init__(
        self, take_slot: Callable[[], float], is_open: Callable[[], bool], let_go: Callable[[Task], object]
    ) -> None:
        self._take_slot = take_slot
        self._is_open = is_open
        self._let_go = let_go
        self._changed = threading.Condition()
        self._tasks: deque[Task] = deque()
        threading.Thread(target=self._run, name="pacer", daemon=True).start()

    @property
    def is_holding(self) -> bool:
        """Whether something waits for its slot."""
        return bool(self._tasks)

    def put(self, task: Task) -> None:
        with self._changed:
            self._tasks.append(task)
            self._changed.notify()

    def withdraw(self, arrived_before: float) -> list[Task]:
        """Take out what waits and arrived before a monotonic time."""
        with self._changed:
            withdrawn = [task for task in self._tasks if task.arrived_at < arrived_before]
            self._tasks = deque(task for task in self._tasks if task.arrived_at >= arrived_before)
        return withdrawn

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._tasks)
            wait_s = self._take_slot() if self._is_open() else 0
            if wait_s:
                time.sleep(min(wait_s, _LOOK_AGAIN_S))  # nothing that comes meanwhile brings the slot nearer
                continue
            with self._changed:  # while it goes over: whoever withdraws finds it here or there
                if self._tasks:  # otherwise it was withdrawn meanwhile
                    self._let_go(self._tasks.popleft())
