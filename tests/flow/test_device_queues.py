"""Serial execution of the commands of one device, in order of arrival."""

import pytest

from tests.support.builders import a_task
from worker.core.envelope import Envelope, Task
from worker.errors import UnusableCommand
from worker.flow.device_queues import KeyedQueues

OTHER_IMEI = "865820030000002"


@pytest.fixture
def queues() -> KeyedQueues:
    return KeyedQueues(by_device=True)


def test_commands_wait_only_for_earlier_commands_of_their_own_device(queues: KeyedQueues) -> None:
    first, second, third = (a_task(number) for number in range(3))
    assert queues.try_start(first)
    assert not queues.try_start(second)
    assert not queues.try_start(third)
    assert queues.try_start(a_task(3, OTHER_IMEI))
    assert queues.waiting == 2
    assert queues.finish(first) is second
    assert queues.finish(second) is third
    assert queues.waiting == 0
    assert queues.is_busy(first)
    assert queues.finish(third) is None
    assert not queues.is_busy(first)
    assert queues.try_start(a_task(4))


def test_withdraw_removes_waiting_tasks_by_their_arrival_and_leaves_the_running_one(queues: KeyedQueues) -> None:
    running, old, new = (a_task(number) for number in range(3))
    for each in (running, old, new):
        queues.try_start(each)
    assert queues.withdraw(arrived_before=2) == [old]
    assert queues.waiting == 1
    assert queues.finish(running) is new
    assert queues.withdraw(arrived_before=9) == []


def test_a_message_without_a_command_never_waits(queues: KeyedQueues) -> None:
    for read in (None, UnusableCommand("is empty")):
        each = Task(Envelope(), read, 0)
        assert queues.try_start(each)
        assert queues.try_start(each)
        assert queues.finish(each) is None


def test_commands_of_one_device_do_not_wait_when_ordering_is_off() -> None:
    queues = KeyedQueues(by_device=False)
    one, other = a_task(1), a_task(2)
    assert queues.try_start(one)
    assert queues.try_start(other)
    assert queues.finish(one) is None
