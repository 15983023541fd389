"""Order within a device: its commands run one at a time, in order of arrival; devices do not wait for each other."""

from collections import deque

from worker.core.envelope import Task


class KeyedQueues:
    """Serial queues by key, the IMEI: a task waits while another one with its key is running.

    A task without a command has no key and never waits.

    Args:
        by_device: False: no task has a key.
    """

    def __init__(self, *, by_device: bool) -> None:
        self.waiting = 0  # tasks in all queues
        self._by_device = by_device
        self._queues: dict[str, deque[Task]] = {}  # by key, while a task with that key is running

    def is_busy(self, task: Task) -> bool:
        """Tell whether another task with this task's key is running."""
        return self._key_of(task) in self._queues

    def try_start(self, task: Task) -> bool:
        """Tell whether a task may run now; if not, it is queued and ``finish`` returns it later."""
        key = self._key_of(task)
        if key is None:
            return True
        queue = self._queues.get(key)
        if queue is None:
            self._queues[key] = deque()
            return True
        queue.append(task)
        self.waiting += 1
        return False

    def finish(self, task: Task) -> Task | None:
        """Mark a running task as finished; returns the next task with its key, which runs from now on."""
        key = self._key_of(task)
        if key is None:
            return None
        queue = self._queues[key]
        if not queue:
            del self._queues[key]
            return None
        self.waiting -= 1
        return queue.popleft()

    def withdraw(self, arrived_before: float) -> list[Task]:
        """Remove and return the waiting tasks that arrived before a monotonic time; running tasks stay."""
        withdrawn: list[Task] = []
        for queue in self._queues.values():
            while queue and queue[0].arrived_at < arrived_before:
                withdrawn.append(queue.popleft())
        self.waiting -= len(withdrawn)
        return withdrawn

    def _key_of(self, task: Task) -> str | None:
        return task.command.imei if self._by_device and task.command is not None else None
