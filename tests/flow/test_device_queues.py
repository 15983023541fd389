"""Serial execution of the commands of one device, in order of arrival."""

import pytest

from tests.support.builders import AN_IMEI, a_task
from worker.core.envelope import Envelope, Task
from worker.errors import UnusableCommand
from worker.flow.device_queues import KeyedQueues

OTHER_IMEI = "865820030000002"


@pytest.fixture
def queues() -> KeyedQueues:
    return KeyedQueues(by_device=True, interval_s=0, clock=float)


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
    assert queues.finish(third) is None
    assert queues.try_start(a_task(4))


def test_withdraw_removes_waiting_tasks_by_their_arrival_and_leaves_the_running_one(queues: KeyedQueues) -> None:
    running, old, new = (a_task(number) for number in range(3))
    for each in (running, old, new):
        queues.try_start(each)
    assert queues.withdraw(arrived_before=2) == [old]
    assert queues.waiting == 1
    assert queues.finish(running) is new
    assert queues.withdraw(arrived_before=9) == []


def test_the_memory_of_what_waits_is_known(queues: KeyedQueues) -> None:
    running, waiting, withdrawn = (a_task(number, size=10 + number) for number in range(3))
    for each in (running, waiting, withdrawn):
        queues.try_start(each)
    assert queues.waiting_bytes == 11 + 12
    queues.finish(running)
    assert queues.waiting_bytes == 12
    queues.withdraw(arrived_before=9)
    assert queues.waiting_bytes == 0


def test_the_device_whose_commands_take_most_memory_gives_way(queues: KeyedQueues) -> None:
    """Another device's command that has to wait a moment costs nobody else's turn."""
    for number in range(4):
        queues.try_start(a_task(number, size=40))
    small = [a_task(number, OTHER_IMEI, size=10) for number in range(4, 8)]
    for each in small:
        queues.try_start(each)
    given_way = [queues.withdraw_last_of_largest() for _ in range(3)]
    assert [task.arrived_at for task in given_way] == [3, 2, 1]
    assert (queues.waiting, queues.waiting_bytes) == (3, 30)
    assert queues.finish(small[0]) is small[1]


def test_the_sender_whose_commands_take_most_memory_gives_way(queues: KeyedQueues) -> None:
    """However many devices it spreads them over, and though one device of another sender has more waiting."""
    spread = [str(865820030000000 + number) for number in range(100)]
    for number, imei in enumerate([*spread, *spread]):
        queues.try_start(a_task(number, imei, app_id="spread", size=40))
    for number in range(200, 251):  # 50 of them wait
        queues.try_start(a_task(number, "865820030009999", app_id="billing", size=40))
    given_way = [queues.withdraw_last_of_largest() for _ in range(50)]
    assert {task.envelope.app_id for task in given_way} == {"spread"}
    assert {task.arrived_at for task in given_way} < set(range(100, 200))


def test_who_gives_way_at_a_device_of_two_senders_is_the_one_that_takes_most(queues: KeyedQueues) -> None:
    """The other one's commands for that device keep their order."""
    queues.try_start(a_task(0))
    large = [a_task(number, app_id="large", size=40) for number in (1, 3)]
    small = [a_task(number, app_id="small", size=10) for number in (2, 4)]
    for each in (large[0], small[0], large[1], small[1]):
        queues.try_start(each)
    assert queues.withdraw_last_of_largest() is large[1]
    assert queues.withdraw_last_of_largest() is large[0]
    assert queues.withdraw_last_of_largest() is small[1]
    assert (queues.waiting, queues.waiting_bytes) == (1, 10)
    assert queues.finish(a_task(0)) is small[0]


def test_a_sender_for_whom_the_broker_vouches_gives_way_to_none_that_only_has_its_name(queues: KeyedQueues) -> None:
    queues.try_start(a_task(0))
    forged = [a_task(number, app_id="billing", size=40) for number in (1, 2)]
    for each in [a_task(3, app_id="billing", user_id="billing", size=60), *forged]:
        queues.try_start(each)
    assert queues.withdraw_last_of_largest() is forged[-1]


def test_a_message_without_a_command_never_waits(queues: KeyedQueues) -> None:
    for read in (None, UnusableCommand("is empty")):
        each = Task(Envelope(), read, 0)
        assert queues.try_start(each)
        assert queues.try_start(each)
        assert queues.finish(each) is None


def test_commands_of_one_device_do_not_wait_when_ordering_is_off() -> None:
    queues = KeyedQueues(by_device=False, interval_s=0, clock=float)
    one, other = a_task(1), a_task(2)
    assert queues.try_start(one)
    assert queues.try_start(other)
    assert queues.finish(one) is None


class Resting:
    """Queues with an interval of 10 s, at a time that the test sets."""

    def __init__(self) -> None:
        self.now = 100.0
        self.rests: list[tuple[float, str]] = []
        self.queues = KeyedQueues(by_device=True, interval_s=10, clock=lambda: self.now)
        self.queues.on_wait = lambda free_at, key: self.rests.append((free_at, key))

    def send(self, task: Task) -> None:
        """Run a task that sends its command, to its end."""
        assert self.queues.try_start(task)
        assert task.command is not None
        self.queues.note_sent(task.command)
        assert self.queues.finish(task) is None


def test_a_device_rests_after_a_command_that_was_sent() -> None:
    rig = Resting()
    rig.send(a_task(1))
    rig.now = 109.9
    second, third = a_task(2), a_task(3)
    assert not rig.queues.try_start(second)
    assert not rig.queues.try_start(third)
    assert rig.rests == [(110, AN_IMEI)]
    assert rig.queues.end_rest(AN_IMEI) is second
    assert rig.queues.finish(second) is third  # the second was not sent


def test_a_device_whose_commands_wait_rests_between_them() -> None:
    rig = Resting()
    first, second = a_task(1), a_task(2)
    assert rig.queues.try_start(first)
    assert not rig.queues.try_start(second)
    assert first.command is not None
    rig.queues.note_sent(first.command)
    assert rig.queues.finish(first) is None
    assert rig.rests == [(110, AN_IMEI)]
    assert rig.queues.withdraw(9) == [second]
    assert rig.queues.waiting == 0
    assert rig.queues.end_rest(AN_IMEI) is None
    assert rig.queues.try_start(second)


def test_after_its_rest_a_device_is_free() -> None:
    rig = Resting()
    rig.send(a_task(1))
    rig.now = 110
    rig.send(a_task(2))
    assert rig.rests == []


def test_devices_that_are_not_used_any_more_are_forgotten() -> None:
    rig = Resting()
    for number in range(100):
        rig.send(a_task(number, str(865820030000000 + number)))
    rig.now = 110
    rig.send(a_task(1))
    assert len(rig.queues) == 1
