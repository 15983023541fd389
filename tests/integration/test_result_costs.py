"""What results cost: calls of the platform, counted at the simulator, and memory."""

import json
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from scripts.documents import looks_until_expired
from tests.support.builders import a_command, in_hours
from tests.support.deployment import Deployment
from tests.support.outstanding import (
    Calls,
    deployment_with_results,
    imei_of,
    look_up_twice,
    looks,
    outstanding,
    publish,
    record_calls,
)
from tests.support.simulator import API_KEY, onenet
from tests.support.waiting import PATIENCE_S
from worker.dev.services.ports import wait_until
from worker.flow.result_consumer import PREFETCH
from worker.simulator.faults import Fault

HANG_S = 600.0
LOOKS_AT_ONCE = 4  # of one product

pytestmark = pytest.mark.usefixtures("watched_workers")


@pytest.fixture
def deployment(broker_url: str, tmp_path: Path) -> Iterator[Deployment]:
    with deployment_with_results(broker_url, tmp_path) as found:
        yield found


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return record_calls(monkeypatch)


def test_a_device_costs_one_call_for_each_look_at_all_of_its_commands(deployment: Deployment, calls: Calls) -> None:
    """``tests/chaos`` has ten times as many."""
    look_up_twice(deployment, calls, 2_000, 200)


def test_each_look_is_one_call_and_there_are_no_more_than_the_gaps_allow(
    broker_url: str, tmp_path: Path, calls: Calls
) -> None:
    """Of commands that no device takes, which is the most: ``docs/results.md`` computes it with the default delays."""
    delays_s, lifetime_s, devices = (1, 2), 20, 10
    with (
        onenet() as simulator,
        Deployment.set_up(broker_url, tmp_path, simulator, result_delays_s=delays_s) as deployment,
        deployment.worker() as worker,
    ):
        for number in range(devices):
            deployment.upstream.publish(a_command(imei=imei_of(number), expired_time=in_hours(lifetime_s / 3600)))
        worker.wait_for("command_result", count=devices)
        results = [line for line in worker.events if line["event"] == "command_result"]
    assert {line["result"] for line in results} == {"expired"}
    assert looks(calls) == {line["imei"]: line["attempt"] for line in results}
    assert max(looks(calls).values()) <= looks_until_expired(timedelta(seconds=lifetime_s), delays_s)


def test_commands_and_looks_share_the_rate_limit(deployment: Deployment, calls: Calls) -> None:
    """Looks have at most a third of it while commands wait, and about that even then."""
    publish(deployment, outstanding(deployment.simulator, 200, 200))
    calls.clear()
    count = 90
    with deployment.worker(ONENET_RATE_LIMIT="10/second"):
        wait_until(lambda: bool(calls), PATIENCE_S, "a look")
        for number in range(count):
            deployment.upstream.publish(a_command(imei=imei_of(1000 + number)))
        wait_until(lambda: sum(name == "execute" for name, _ in calls) == count, 2 * PATIENCE_S, "all commands")
        kinds = [name for name, _ in calls]
    beside = kinds[kinds.index("execute") : len(kinds) - kinds[::-1].index("execute")]
    assert count / 5 <= beside.count("history") <= count / 2 + 5


def test_looks_that_hang_hold_up_no_command(deployment: Deployment) -> None:
    hanging: list[None] = []
    deployment.simulator.on_fault = lambda: hanging.append(None)
    deployment.simulator.faults.replace([Fault(kind="hang", endpoint="history", seconds=HANG_S)])
    publish(deployment, outstanding(deployment.simulator, 100, 100))
    with deployment.worker(WORKER_CONCURRENCY="4", ONENET_RATE_LIMIT="100/second") as worker:
        wait_until(lambda: len(hanging) >= LOOKS_AT_ONCE, PATIENCE_S, "looks that hang")
        for number in range(20):
            deployment.upstream.publish(a_command(imei=imei_of(number)))
        worker.wait_for("command_accepted", count=20)


def test_commands_that_hang_hold_up_no_look(deployment: Deployment) -> None:
    deployment.simulator.faults.replace([Fault(kind="hang", endpoint="execute", seconds=HANG_S)])
    deployment.simulator.platform.replace_devices({"*": "up"})
    deployment.simulator.platform.clock_offset_s = -3600
    publish(deployment, outstanding(deployment.simulator, 20, 20))
    deployment.simulator.platform.clock_offset_s = 0
    for number in range(20):
        deployment.upstream.publish(a_command(imei=imei_of(number)))
    with deployment.worker(WORKER_CONCURRENCY="4", ONENET_RATE_LIMIT="100/second") as worker:
        worker.wait_for("command_result", count=20)
        assert not any(line["event"] == "command_accepted" for line in worker.events)


def test_a_product_whose_looks_hang_keeps_no_other_waiting(deployment: Deployment) -> None:
    """More of its commands are due than may be held, and those of the other product are behind them."""
    deployment.simulator.faults.replace([Fault(kind="hang", endpoint="history", seconds=HANG_S)])
    products = deployment.folder / "products.json"
    with onenet() as other:
        other.platform.replace_devices({"*": "up"})
        other.platform.clock_offset_s = -3600
        products.write_text(json.dumps({"other": {"api_key": API_KEY, "url": other.url}}))
        publish(deployment, outstanding(deployment.simulator, 2 * PREFETCH, 2 * PREFETCH))
        publish(deployment, outstanding(other, 5, 5, product="other"))
        other.platform.clock_offset_s = 0
        with deployment.worker(ONENET_PRODUCTS_FILE=str(products)) as worker:
            worker.wait_for("command_result", count=5)
            found = [line["command_id"] for line in worker.events if line["event"] == "command_result"]
    assert sorted(found) == [f"other-{number}" for number in range(5)]
