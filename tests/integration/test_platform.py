"""Real workers on a platform as it is: either generation, full device queues, and a clock of its own."""

import json
from pathlib import Path

import pytest

from tests.support.builders import a_command, in_hours
from tests.support.deployment import SOON_CERTAIN, Deployment
from tests.support.simulator import ACCESS_KEY, PRODUCT_ID, onenet
from worker.simulator.faults import Fault
from worker.simulator.platform import Platform

DEVICE, OTHER_DEVICE = "865820035000001", "865820035000002"
V2 = {
    "ONENET_API": "v2",
    "ONENET_API_KEY": "",
    "ONENET_PRODUCT_ID": PRODUCT_ID,
    "ONENET_ACCESS_KEY": ACCESS_KEY,
}


@pytest.fixture
def platform(deployment: Deployment) -> Platform:
    return deployment.simulator.platform


@pytest.mark.parametrize("settings", [{}, V2], ids=["v1", "v2"])
@pytest.mark.parametrize("errno", [None, 13, 5006])
def test_commands_wait_for_room_in_a_full_queue_and_use_no_attempt(
    deployment: Deployment, platform: Platform, settings: dict[str, str], errno: int | None
) -> None:
    platform.queue_limit, platform.queue_errno = 10, errno
    with deployment.worker(**settings) as worker:
        for number in range(12):
            deployment.upstream.publish(a_command(command_id=f"command-{number}", imei=DEVICE, args=str(number)))
        for _ in range(10):
            assert deployment.upstream.reply().json["status"] == "accepted"
        for _ in range(2):
            postponed = worker.wait_for("command_postponed")
            assert postponed["reason"].startswith("the device's queue at OneNET is full: 10 commands wait")
        deployment.upstream.publish(a_command(command_id="of-another-device", imei=OTHER_DEVICE))
        assert deployment.upstream.reply().json["imei"] == OTHER_DEVICE
        platform.replace_devices({DEVICE: "up"})
        for _ in range(2):
            reply = deployment.upstream.reply().json
            assert (reply["status"], reply["attempts"]) == ("accepted", 1)
    assert len({command.args for command in platform.commands}) == len(platform.commands) == 13


@pytest.mark.parametrize("settings", [{}, V2], ids=["v1", "v2"])
def test_a_lost_answer_is_found_in_the_history_of_either_generation(
    deployment: Deployment, settings: dict[str, str]
) -> None:
    deployment.simulator.faults.replace([Fault(kind="drop_after_caching", count=1)])
    with deployment.worker(**SOON_CERTAIN, **settings):
        deployment.upstream.publish(a_command(command_id="lost", imei=DEVICE))
        reply = deployment.upstream.reply().json
    [cached] = deployment.simulator.platform.commands
    assert (reply["status"], reply["uuid"], reply["recovered"]) == ("accepted", cached.uuid, True)


def test_a_device_of_the_platforms_tests_has_four_digits(deployment: Deployment) -> None:
    wanted = a_command(command_id="short", imei="0042")
    with deployment.worker():
        deployment.upstream.publish(wanted)
        first = deployment.upstream.reply().json
        deployment.upstream.publish(wanted)
        assert deployment.upstream.reply().json == first
    assert (first["status"], first["imei"]) == ("accepted", "0042")


def test_products_of_both_generations_are_served_side_by_side(deployment: Deployment, tmp_path: Path) -> None:
    with onenet() as other:
        products = {
            "old": {"api_key": "the-master-key"},
            "moved": {"product_id": PRODUCT_ID, "access_key": ACCESS_KEY, "url": other.url, "api": "v2"},
        }
        (tmp_path / "products.json").write_text(json.dumps(products))
        with deployment.worker(ONENET_PRODUCTS_FILE=str(tmp_path / "products.json")):
            for name in products:
                deployment.upstream.publish(a_command(command_id=name, imei=DEVICE, product=name))
            for _ in products:
                assert deployment.upstream.reply().json["status"] == "accepted"
        assert [request["path"] for request in deployment.simulator.requests] == ["/nbiot/execute/offline"]
        assert [request["path"] for request in other.requests] == ["/nb-iot/execute/offline"]


@pytest.mark.parametrize(
    ("offset_s", "times", "is_omitted"),
    [
        (-7200.0, {"expired_time": -1}, False),
        (-7200.0, {"valid_time": -1}, False),
        (7200.0, {"valid_time": 1}, True),
    ],
    ids=["has expired for us only", "is valid for us only", "is valid for the platform only"],
)
def test_the_first_command_is_decided_by_the_platforms_clock_too(
    deployment: Deployment, platform: Platform, offset_s: float, times: dict[str, float], is_omitted: bool
) -> None:
    """No answer has told the offset yet: the worker asks before it decides."""
    platform.clock_offset_s = offset_s
    with deployment.worker():
        deployment.upstream.publish(
            a_command(command_id="first", imei=DEVICE, **{name: in_hours(hours) for name, hours in times.items()})
        )
        reply = deployment.upstream.reply().json
    assert (reply["status"], reply["valid_time_omitted"], reply["attempts"]) == ("accepted", is_omitted, 1)


def test_tokens_are_signed_for_the_platforms_time(deployment: Deployment, platform: Platform) -> None:
    platform.clock_offset_s = 2 * 3600
    with deployment.worker(**V2):
        for number in range(3):
            deployment.upstream.publish(a_command(command_id=f"command-{number}", imei=DEVICE, args=str(number)))
        assert [deployment.upstream.reply().json["status"] for _ in range(3)] == ["accepted"] * 3


@pytest.mark.parametrize(("offset_s", "valid_in_s"), [(3600.0, 1800), (6.0, 4), (0.0, 2)])
def test_a_command_without_its_valid_time_is_found_after_a_lost_answer(
    deployment: Deployment, platform: Platform, offset_s: float, valid_in_s: int
) -> None:
    """It was left out because it had passed on the platform's clock, which fills in another one."""
    platform.clock_offset_s = offset_s
    with deployment.worker(**SOON_CERTAIN):
        deployment.upstream.publish(a_command(command_id="first", imei=DEVICE))
        assert deployment.upstream.reply().json["status"] == "accepted"
        deployment.simulator.faults.replace([Fault(kind="error_500_after_caching", count=1)])
        deployment.upstream.publish(
            a_command(command_id="lost", imei=DEVICE, args="lost", valid_time=in_hours(valid_in_s / 3600))
        )
        reply = deployment.upstream.reply().json
    [cached] = [command for command in platform.commands if command.args == "lost"]
    assert (reply["uuid"], reply["recovered"]) == (cached.uuid, True)


@pytest.mark.parametrize("offset_s", [-7200.0, 7200.0])
def test_times_are_compared_with_the_platforms_clock(
    deployment: Deployment, platform: Platform, offset_s: float
) -> None:
    platform.clock_offset_s = offset_s
    with deployment.worker() as worker:
        deployment.upstream.publish(a_command(command_id="first", imei=DEVICE))
        assert deployment.upstream.reply().json["status"] == "accepted"
        differs = worker.wait_for("platform_clock_differs")
        assert abs(differs["offset_s"] - offset_s) <= 60  # it may differ by the duration of the request
        # An hour from now: long ago for a platform that is ahead, and not yet there for us.
        deployment.upstream.publish(a_command(command_id="later", imei=DEVICE, valid_time=in_hours(1)))
        reply = deployment.upstream.reply().json
        assert (reply["status"], reply["valid_time_omitted"]) == ("accepted", offset_s > 0)
        deployment.upstream.publish(a_command(command_id="over", imei=DEVICE, expired_time=in_hours(1)))
        reply = deployment.upstream.reply().json
        assert reply["status"] == ("failed" if offset_s > 0 else "accepted")
        if offset_s > 0:
            assert reply["error"]["code"] == "expired"
