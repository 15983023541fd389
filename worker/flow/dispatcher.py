"""Decides when a task runs: after the earlier ones of its device, at its product's rate. Knows no broker."""

import threading
from collections.abc import Callable

from worker.core.envelope import Task
from worker.flow.crew import Crew
from worker.flow.device_queues import KeyedQueues
from worker.flow.pace import Pacer

NewPacer = Callable[[str | None, Callable[[Task], object]], Pacer]
_NEVER = float("inf")


class Dispatcher:
    """Holds tasks until they may run, and runs them.

    Args:
        run: runs one task, in one of the threads.
        queues: keep the order within a device.
        new_pacer: makes what releases a product's tasks at its rate; None: there is no rate limit.
        allows: tells whether a product's commands are sent at all; while they are not, they need no rate.
        concurrency: how many threads.
        few_threads: how many of them are kept awake while there is work; the others only where they are needed.
    """

    def __init__(
        self,
        run: Callable[[Task], object],
        queues: KeyedQueues,
        new_pacer: NewPacer | None,
        allows: Callable[[str | None], bool],
        *,
        concurrency: int,
        few_threads: int,
    ) -> None:
        self._queues = queues
        self._new_pacer = new_pacer
        self._allows = allows
        self._pacers: dict[str | None, Pacer] = {}
        self._pacers_lock = threading.Lock()
        self._crew = Crew(run, concurrency, few_threads)
        self._is_stopping = False

    @property
    def waiting(self) -> int:
        """How many tasks wait for their device."""
        return self._queues.waiting

    @property
    def is_rate_limiting(self) -> bool:
        """Whether tasks are held because their product's rate is used up."""
        return any(pacer.is_holding for pacer in list(self._pacers.values()))

    def must_wait(self, task: Task) -> bool:
        """Tell whether a task would have to wait for its device."""
        return self._queues.is_busy(task)

    def submit(self, task: Task) -> bool:
        """Run a task as soon as its device is free and its product's rate allows; tells whether the device is free."""
        if not self._queues.try_start(task):
            return False
        self._release(task)
        return True

    def finish(self, task: Task) -> None:
        """Note that a task is over, and release the next of its device. May be called from any thread."""
        follower = self._queues.finish(task)
        if follower is not None:
            self._release(follower)

    def withdraw(self) -> list[Task]:
        """Take back all tasks that have not started."""
        behind = self._queues.withdraw(_NEVER)
        ahead = [task for pacer in list(self._pacers.values()) for task in pacer.withdraw(_NEVER)]
        ahead += self._crew.withdraw()  # after the pacers, which put there what they release
        for task in ahead:
            self._queues.finish(task)  # nothing is left behind it
        return [*behind, *ahead]

    def withdraw_older_than(self, arrived_before: float) -> list[Task]:
        """Take back tasks that arrived before a monotonic time and have not started."""
        behind = self._queues.withdraw(arrived_before)
        ahead = [task for pacer in list(self._pacers.values()) for task in pacer.withdraw(arrived_before)]
        for task in self._crew.withdraw():
            if task.arrived_at < arrived_before:
                ahead.append(task)
            else:
                self._crew.put(task)
        for task in ahead:
            self.finish(task)
        return [*behind, *ahead]

    def begin_stop(self) -> None:
        """Let nothing wait for its product's rate any more."""
        self._is_stopping = True

    async def stop(self) -> None:
        """Wait for the tasks that have started."""
        await self._crew.end()

    def _release(self, task: Task) -> None:
        """Give a task to the threads, or first to its product's pacer. May be called from any thread."""
        command = task.command
        if self._new_pacer is None or command is None or self._is_stopping or not self._allows(command.product):
            self._crew.put(task)
            return
        with self._pacers_lock:
            if command.product not in self._pacers:
                self._pacers[command.product] = self._new_pacer(command.product, self._crew.put)
        self._pacers[command.product].put(task)
