"""The pace of real workers: the interval of a device, and the rate limit with the reads of the history."""

from datetime import UTC, datetime, timedelta

import pytest

from tests.support.builders import a_command
from tests.support.deployment import Deployment
from tests.support.waiting import PATIENCE_S
from worker.dev.services.ports import wait_until

DEVICES = ["865820033000001", "865820033000002"]
RATE_S = 0.5  # between two requests


def assert_spaced(moments: list[datetime], began: datetime, interval_s: float) -> None:
    """Check that the nth command was cached n intervals after the beginning.

    Two of them may be cached in quick succession: a slow platform caches the first one late.
    """
    for number, moment in enumerate(moments):
        assert moment - began >= timedelta(seconds=number * interval_s)


def test_the_commands_of_a_device_are_spaced_while_another_device_goes_on(deployment: Deployment) -> None:
    interval_s = 0.5
    with deployment.worker(ONENET_DEVICE_INTERVAL=str(interval_s)):
        began = datetime.now(UTC)
        for number in range(8):
            imei = DEVICES[number % 2]
            deployment.upstream.publish(a_command(command_id=f"command-{number}", imei=imei))
        for _ in range(8):
            assert deployment.upstream.reply().json["status"] == "accepted"
    cached = deployment.simulator.platform.commands
    for imei in DEVICES:
        moments = [command.created_at for command in cached if command.query["imei"] == imei]
        assert len(moments) == 4
        assert_spaced(moments, began, interval_s)
    assert {command.query["imei"] for command in cached[:4]} == set(DEVICES)


@pytest.mark.parametrize("imei", DEVICES)
def test_without_order_the_commands_of_a_device_are_spaced_too(deployment: Deployment, imei: str) -> None:
    with deployment.worker(ONENET_DEVICE_INTERVAL="0.3", WORKER_ORDERING="none"):
        began = datetime.now(UTC)
        for number in range(4):
            deployment.upstream.publish(a_command(command_id=f"command-{number}", imei=imei))
        for _ in range(4):
            assert deployment.upstream.reply().json["status"] == "accepted"
    moments = [command.created_at for command in deployment.simulator.platform.commands]
    assert_spaced(moments, began, 0.3)


def test_two_workers_share_one_limit_through_redis(deployment: Deployment, redis_url: str) -> None:
    settings = {"IDEMPOTENCY_URL": redis_url, "ONENET_RATE_LIMIT": "2/second"}
    with deployment.worker(**settings), deployment.worker(**settings):
        began = datetime.now(UTC)
        for number in range(8):
            deployment.upstream.publish(a_command(command_id=f"command-{number}", imei=str(865820034000000 + number)))
        wait_until(lambda: len(deployment.simulator.platform.commands) == 8, PATIENCE_S, "all of them")
    last = max(command.created_at for command in deployment.simulator.platform.commands)
    assert last - began >= timedelta(seconds=7 * RATE_S)
