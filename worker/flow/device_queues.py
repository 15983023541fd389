"""Order within a device: one command at a time, in order of arrival, while the other devices go on."""

import threading
from collections import deque

from worker.core.task import Task


class KeyedQueues:
    """A lane for each device that is busy; thread-safe.

    Args:
        by_device: False: nothing ever waits for anything else.
    """

    def __init__(self, *, by_device: bool) -> None:
        self.waiting = 0
        self._by_device = by_device
        self._lock = threading.Lock()
        self._lanes: dict[str, deque[Task]] = {}  # by IMEI: what waits behind the one that is busy

    def is_busy(self, task: Task) -> bool:
        """Tell whether a task would have to wait."""
        return self._lane_of(task) in self._lanes

    def enter(self, task: Task) -> bool:
        """Tell whether a task may go now; otherwise it waits in its lane."""
        name = self._lane_of(task)
        if name is None:
            return True
        with self._lock:
            lane = self._lanes.get(name)
            if lane is None:
                self._lanes[name] = deque()
                return True
            lane.append(task)
            self.waiting += 1
            return False

    def leave(self, task: Task) -> Task | None:
        """Note that a task which was let go is over; returns the next of its lane, which may go now."""
        name = self._lane_of(task)
        if name is None:
            return None
        with self._lock:
            lane = self._lanes[name]
            if not lane:
                del self._lanes[name]
                return None
            self.waiting -= 1
            return lane.popleft()

    def withdraw(self, arrived_before: float) -> list[Task]:
        """Take out what waits and arrived before a monotonic time."""
        withdrawn: list[Task] = []
        with self._lock:
            for lane in self._lanes.values():
                while lane and lane[0].arrived_at < arrived_before:
                    withdrawn.append(lane.popleft())
            self.waiting -= len(withdrawn)
        return withdrawn

    def _lane_of(self, task: Task) -> str | None:
        return task.command.imei if self._by_device and task.command is not None else None
