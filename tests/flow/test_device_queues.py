"""One command at a time for each device, in order of arrival."""

import pytest
from pika import BasicProperties

from tests.support.builders import a_task
from worker.amqp.messages import Delivery
from worker.core.task import Task
from worker.errors import UnusableCommand
from worker.flow.device_queues import KeyedQueues

OTHER = "865820030000002"


@pytest.fixture
def lanes() -> KeyedQueues:
    return KeyedQueues(by_device=True)


def test_a_busy_device_keeps_its_own_commands_waiting_and_no_others(lanes: KeyedQueues) -> None:
    first, second, third = (a_task(number) for number in range(3))
    assert lanes.enter(first)
    assert not lanes.enter(second)
    assert not lanes.enter(third)
    assert lanes.enter(a_task(3, OTHER))
    assert lanes.waiting == 2
    assert lanes.leave(first) is second
    assert lanes.leave(second) is third
    assert lanes.waiting == 0
    assert lanes.is_busy(first)
    assert lanes.leave(third) is None
    assert not lanes.is_busy(first)
    assert lanes.enter(a_task(4))


def test_what_waits_can_be_withdrawn_and_what_is_busy_stays(lanes: KeyedQueues) -> None:
    busy, old, new = (a_task(number) for number in range(3))
    for each in (busy, old, new):
        lanes.enter(each)
    assert lanes.withdraw(arrived_before=2) == [old]
    assert lanes.waiting == 1
    assert lanes.leave(busy) is new
    assert lanes.withdraw(arrived_before=9) == []


def test_what_carries_no_command_waits_for_nothing(lanes: KeyedQueues) -> None:
    delivery = Delivery(1, 1, "", False, BasicProperties(), b"", False)
    for read in (None, UnusableCommand("is empty")):
        each = Task(delivery, read, 0)
        assert lanes.enter(each)
        assert lanes.enter(each)
        assert lanes.leave(each) is None


def test_without_an_order_nothing_waits() -> None:
    lanes = KeyedQueues(by_device=False)
    one, other = a_task(1), a_task(2)
    assert lanes.enter(one)
    assert lanes.enter(other)
    assert lanes.leave(one) is None
