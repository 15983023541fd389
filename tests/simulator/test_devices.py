"""Devices that execute, fail, or let their commands expire, and what the history says of them."""

from collections.abc import Iterator
from datetime import datetime, timedelta

import pytest

from schemas.onenet import CONFIRM_STATUSES
from tests.support.simulator import onenet
from tests.support.simulator_client import IMEI, SimulatorClient
from worker.simulator import platform as platform_module
from worker.simulator.platform import CHINA

START = datetime(2026, 3, 1, 12, 0, 0, 185_000, tzinfo=CHINA)


class Clock:
    """The platform's clock, which tests move."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> datetime:
        return self.now

    def in_s(self, seconds: float) -> str:
        return f"{START + timedelta(seconds=seconds):%Y-%m-%dT%H:%M:%S}"

    def set(self, seconds: float) -> None:
        self.now = START + timedelta(seconds=seconds)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def client(clock: Clock) -> Iterator[SimulatorClient]:
    with onenet() as simulator:
        simulator.platform.now = clock
        yield SimulatorClient(simulator)


def cached(client: SimulatorClient, clock: Clock, valid_s: int | None = None, expires_s: int = 3600) -> str:
    valid = {} if valid_s is None else {"valid_time": clock.in_s(valid_s)}
    return client.cached(expired_time=clock.in_s(expires_s), **valid)


def states(client: SimulatorClient, clock: Clock) -> list[int]:
    items = client.history(start=clock.in_s(-60), sort="ASC")["data"]["items"]
    return [item["send_status"] for item in items]


def test_the_commands_of_a_device_that_is_down_wait_until_they_expire(client: SimulatorClient, clock: Clock) -> None:
    cached(client, clock, expires_s=60)
    assert states(client, clock) == [1]
    clock.set(61)
    assert states(client, clock) == [4]


def test_a_device_that_is_up_executes_valid_commands_one_second_apart(client: SimulatorClient, clock: Clock) -> None:
    client.control("devices", {IMEI: "up"})
    later = cached(client, clock, valid_s=30)
    for _ in range(2):
        cached(client, clock)
    assert states(client, clock) == [1, 3, 1]
    clock.set(1)
    assert states(client, clock) == [1, 5, 3]
    clock.set(2)
    assert states(client, clock) == [1, 5, 5]
    clock.set(40)
    assert states(client, clock) == [5, 5, 5]
    found = client.detail(later)["data"]
    assert (found["send_time"][:19], found["confirm_time"][:19]) == ("2026-03-01 12:00:30", "2026-03-01 12:00:31")


def test_a_device_that_comes_up_executes_what_waited(client: SimulatorClient, clock: Clock) -> None:
    cached(client, clock, expires_s=50)
    uuid = cached(client, clock)
    clock.set(100)
    client.control("devices", {"*": "up"})
    clock.set(110)
    assert states(client, clock) == [4, 5]
    assert client.detail(uuid)["data"]["send_time"].startswith("2026-03-01 12:01:40")


def test_a_device_that_goes_down_leaves_what_was_not_sent(client: SimulatorClient, clock: Clock) -> None:
    client.control("devices", {"*": "up"})
    for _ in range(3):
        cached(client, clock)
    clock.set(1.5)
    client.control("devices", {"*": "down"})
    clock.set(100)
    assert states(client, clock) == [5, 5, 1]


@pytest.mark.parametrize("status", CONFIRM_STATUSES)
def test_a_confirmed_command_has_its_confirm_status(client: SimulatorClient, clock: Clock, status: str) -> None:
    client.control("devices", {IMEI: f"up:{status}"})
    uuid = client.cached(expired_time=clock.in_s(3600), timeout=40, retry=2)
    clock.set(30)
    is_silent = status == "TIME_OUT"
    assert ("confirm_status" in client.detail(uuid)["data"]) is not is_silent
    clock.set(41)
    found = client.detail(uuid)["data"]
    assert (found["send_status"], found["confirm_status"]) == (5 if status == "SUCCESS" else 6, status)
    assert ("cmd_result" in found) is (status == "SUCCESS")
    assert int(found["remain"]) == (0 if is_silent else 2)
    assert found["feedback_msg"][0].keys() == {"feedback_time", "feedback_status"}


def test_the_list_has_every_documented_field_of_a_confirmed_command(client: SimulatorClient, clock: Clock) -> None:
    client.control("devices", {IMEI: "up"})
    uuid = cached(client, clock)
    clock.set(5)
    [item] = client.history(start=clock.in_s(-60))["data"]["items"]
    common = {
        *("type", "create_time", "valid_time", "expired_time", "send_time", "trigger_msg", "send_status"),
        *("confirm_time", "confirm_status", "imei", "remain"),
    }
    assert set(item) == common | {"cmd_uuid", "feedback_time"}
    assert set(client.detail(uuid)["data"]) == common | {"args", "content", "cmd_result", "feedback_msg"}


def test_a_waiting_command_has_neither_send_time_nor_confirm_time(client: SimulatorClient, clock: Clock) -> None:
    cached(client, clock)
    [item] = client.history(start=clock.in_s(-60))["data"]["items"]
    assert not {"send_time", "confirm_time", "confirm_status", "feedback_time"} & set(item)


def test_the_log_has_a_line_for_each_stage(client: SimulatorClient, clock: Clock) -> None:
    client.control("devices", {IMEI: "up:NOT_FOUND"})
    uuid = cached(client, clock, valid_s=10)
    assert [line["time"] for line in client.log(uuid)["data"]] == ["Sun Mar 01 12:00:00 CST 2026"]
    clock.set(20)
    lines = client.log(uuid)["data"]
    assert [line["time"][11:19] for line in lines] == ["12:00:00", "12:00:10", "12:00:11"]
    assert [line["log"].partition(" type")[0].partition(",")[0] for line in lines] == [
        "received command", "send command", "received confirm message",
    ]  # fmt: skip
    assert "command send status: [6], confirm status: [3]" in lines[2]["log"]


def test_all_commands_that_wait_for_their_valid_time_are_cancelled(client: SimulatorClient, clock: Clock) -> None:
    valid, first, second = (cached(client, clock, valid_s) for valid_s in (None, 60, 30))
    answer = client.call("PUT", "cancel/all", {})
    assert answer["data"].pop("succ") == [second, first]  # in the order in which they become valid
    assert answer == {"errno": 0, "error": "succ", "data": {"failed": [valid], "total": 3}}
    assert states(client, clock) == [1, 2, 2]
    assert client.call("PUT", "cancel/all/", {})["data"] == {"succ": [], "failed": [valid], "total": 1}


def test_a_command_that_waits_for_its_device_can_be_cancelled_if_configured(
    client: SimulatorClient, clock: Clock
) -> None:
    """The documentation says "before its valid_time", and names waiting commands without that restriction."""
    uuid = cached(client, clock)
    assert client.cancel(uuid)["errno"] == 5006
    client.simulator.platform.cancels_valid = True
    assert client.cancel(uuid)["errno"] == 0
    assert client.cancel(uuid)["errno"] == 5006
    assert states(client, clock) == [2]


def test_a_full_queue_has_room_after_a_command_was_executed_cancelled_or_expired(
    client: SimulatorClient, clock: Clock
) -> None:
    client.simulator.platform.queue_limit = 3
    cached(client, clock, expires_s=60)
    uuid = cached(client, clock, valid_s=600)
    cached(client, clock)

    def is_full() -> bool:
        answer = client.execute(expired_time=clock.in_s(3600)).json()
        return bool(answer["errno"])

    assert is_full()
    clock.set(61)
    assert not is_full()
    assert is_full()
    client.cancel(uuid)
    assert not is_full()
    assert is_full()
    client.control("devices", {"*": "up"})
    assert not is_full()


def test_devices_can_be_replaced_while_the_simulator_runs(client: SimulatorClient) -> None:
    wanted = {IMEI: "offline"}
    assert client.control("devices", wanted).json() == wanted
    assert client.execute().json()["errno"] == 2001
    assert client.control("devices", {IMEI: "sleeping"}).status_code == 422
    assert client.control("devices", [IMEI]).status_code == 422
    assert client.control("devices").json() == wanted


def test_the_oldest_commands_are_dropped(
    client: SimulatorClient, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory of a long run is bounded."""
    monkeypatch.setattr(platform_module, "_MAX_COMMANDS", 3)
    uuids = [cached(client, clock) for _ in range(5)]
    assert [command.uuid for command in client.simulator.platform.commands] == uuids[2:]
    assert len(states(client, clock)) == 3
    assert client.detail(uuids[0])["errno"] == 5108
