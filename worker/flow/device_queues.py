"""Order within a device: its commands run one at a time, in order of arrival; devices do not wait for each other."""

from collections import OrderedDict, deque
from collections.abc import Callable

from worker.core.command import Command
from worker.core.envelope import Sender, Task
from worker.core.shares import Shares


class KeyedQueues:
    """Serial queues by key, the IMEI: a task waits while another one with its key is running, or its key rests.

    A task without a command has no key and never waits.

    Args:
        by_device: False: no task has a key.
        interval_s: how long a key rests after a task that may have sent something.
        clock: the monotonic time.
    """

    def __init__(self, *, by_device: bool, interval_s: float, clock: Callable[[], float]) -> None:
        self.waiting = 0  # tasks in all queues
        self.waiting_bytes = 0  # the memory that their messages take
        self.on_wait: Callable[[float, str], object]  # told when a rest that tasks wait for ends; then: end_rest
        self._by_device = by_device
        self._interval_s = interval_s
        self._clock = clock
        self._queues: dict[str, deque[Task]] = {}  # by key, while a task with that key is running or waiting
        self._shares: dict[Sender, Shares[str]] = {}  # the memory that the waiting tasks of each sender take, by key
        self._sent: set[str] = set()  # the keys whose running task may have sent something
        # When each rest ends that no task waits for. Ascending, because all rests last equally long.
        self._rests: OrderedDict[str, float] = OrderedDict()

    def __len__(self) -> int:
        """Return the number of keys that are remembered."""
        return len(self._queues) + len(self._rests)

    def try_start(self, task: Task) -> bool:
        """Tell whether a task may run now; if not, it is queued, and ``finish`` or ``end_rest`` returns it later."""
        key = self._key_of(task)
        if key is None:
            return True
        queue = self._queues.get(key)
        if queue is None:
            self._queues[key] = queue = deque()
            free_at = self._rests.pop(key, 0)
            if free_at <= self._clock():
                return True
            self.on_wait(free_at, key)
        queue.append(task)
        self.waiting += 1
        self.waiting_bytes += task.size
        self._shares.setdefault(task.envelope.sender, Shares()).add(key, task.size)
        return False

    def note_sent(self, command: Command) -> None:
        """Note that the running task of a command may send something, so that its key rests afterwards."""
        if self._by_device and self._interval_s:
            self._sent.add(command.imei)

    def finish(self, task: Task) -> Task | None:
        """Mark a running task as finished; returns the next task with its key, if that runs from now on."""
        key = self._key_of(task)
        if key is None:
            return None
        if key not in self._sent:
            return self._next(key)
        self._sent.discard(key)
        now = self._clock()
        free_at = now + self._interval_s
        if self._queues[key]:
            self.on_wait(free_at, key)
        else:
            del self._queues[key]
            while self._rests and next(iter(self._rests.values())) <= now:
                self._rests.popitem(last=False)
            self._rests[key] = free_at
        return None

    def end_rest(self, key: str) -> Task | None:
        """Return the next task with a key whose rest is over; it runs from now on. None: all were withdrawn."""
        return self._next(key)

    def withdraw(self, arrived_before: float) -> list[Task]:
        """Remove and return the waiting tasks that arrived before a monotonic time; running tasks stay."""
        withdrawn: list[Task] = []
        for key, queue in self._queues.items():
            while queue and queue[0].arrived_at < arrived_before:
                withdrawn.append(queue.popleft())
                self._forget_waiting(key, withdrawn[-1])
        return withdrawn

    def withdraw_last_of_largest(self) -> Task:
        """Remove and return a waiting task of the sender whose waiting tasks take most memory.

        It is the last one for that of its keys whose tasks take most: so neither another sender, however many keys this
        one uses, nor another device of the same sender has to make room.
        """
        sender = max(self._shares, key=lambda each: self._shares[each].total)
        key = self._shares[sender].largest()
        queue = self._queues[key]
        index = next(index for index in reversed(range(len(queue))) if queue[index].envelope.sender == sender)
        task = queue[index]
        del queue[index]
        self._forget_waiting(key, task)
        return task

    def _next(self, key: str) -> Task | None:
        queue = self._queues[key]
        if not queue:
            del self._queues[key]
            return None
        task = queue.popleft()
        self._forget_waiting(key, task)
        return task

    def _forget_waiting(self, key: str, task: Task) -> None:
        self.waiting -= 1
        self.waiting_bytes -= task.size
        sender = task.envelope.sender
        shares = self._shares[sender]
        shares.remove(key, task.size)
        if not shares.total:
            del self._shares[sender]

    def _key_of(self, task: Task) -> str | None:
        return task.command.imei if self._by_device and task.command is not None else None
