"""Results: what became of each accepted command, published once it is known. Section 1.4 of the contract."""

from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.support.builders import AN_IMEI, a_command, in_hours
from tests.support.deployment import Deployment
from tests.support.simulator import API_KEY, onenet
from tests.support.waiting import PATIENCE_S
from worker.dev.services.ports import wait_until

DELAYS_S = (1, 2)

pytestmark = pytest.mark.usefixtures("watched_workers")


@pytest.fixture
def deployment(broker_url: str, tmp_path: Path) -> Iterator[Deployment]:
    with (
        onenet() as simulator,
        Deployment.set_up(broker_url, tmp_path, simulator, result_delays_s=DELAYS_S) as found,
    ):
        yield found


def messages(deployment: Deployment, count: int) -> list[tuple[str, dict[str, Any]]]:
    """Read so many replies and results; returns the type and the body of each."""
    found = [deployment.upstream.reply() for _ in range(count)]
    return [(str(message.properties.type), message.json) for message in found]


def the_result(deployment: Deployment) -> dict[str, Any]:
    """Read the reply and the result of one command; returns the result."""
    (first, reply), (second, result) = messages(deployment, 2)
    assert (first, second) == ("execute.reply", "execute.result")
    assert reply["status"] == "accepted"
    assert {name: result[name] for name in ("command_id", "uuid", "imei")} == {
        name: reply[name] for name in ("command_id", "uuid", "imei")
    }
    return result


@pytest.mark.parametrize(
    ("behaviour", "result", "confirm_status"),
    [
        ("up", "executed", "SUCCESS"),
        ("up:METHOD_NOT_ALLOWED", "failed", "METHOD_NOT_ALLOWED"),
        ("up:REQ_PARAM_ERROR", "failed", "REQ_PARAM_ERROR"),
    ],
)
def test_the_device_answers(deployment: Deployment, behaviour: str, result: str, confirm_status: str) -> None:
    deployment.simulator.platform.replace_devices({"*": behaviour})
    with deployment.worker():
        deployment.upstream.publish(a_command())
        found = the_result(deployment)
    assert (found["result"], found["confirm_status"]) == (result, confirm_status)
    sent, confirmed, observed = (
        datetime.fromisoformat(found[f"{name}_at"]) for name in ("sent", "confirmed", "observed")
    )
    assert sent <= confirmed <= observed


def test_a_device_that_never_connects(deployment: Deployment) -> None:
    with deployment.worker() as worker:
        deployment.upstream.publish(a_command(expired_time=in_hours(1)))
        worker.wait_for("command_accepted")
        deployment.simulator.platform.clock_offset_s = timedelta(hours=2).total_seconds()
        found = the_result(deployment)
    assert (found["result"], found["confirm_status"], found["sent_at"]) == ("expired", None, None)


def test_a_command_that_somebody_cancels(deployment: Deployment) -> None:
    deployment.simulator.platform.cancels_valid = True
    with deployment.worker() as worker:
        deployment.upstream.publish(a_command())
        uuid = worker.wait_for("command_accepted")["uuid"]
        cancel = f"{deployment.simulator.url}/nbiot/offline/cancel/{uuid}"
        answer = requests.put(cancel, params={"imei": AN_IMEI}, headers={"api-key": API_KEY}, timeout=PATIENCE_S)
        assert answer.json()["errno"] == 0
        assert the_result(deployment)["result"] == "cancelled"


def test_an_entry_that_disappears(deployment: Deployment) -> None:
    with deployment.worker() as worker:
        deployment.upstream.publish(a_command(expired_time=in_hours(1)))
        worker.wait_for("command_accepted")
        deployment.simulator.platform.clear()
        deployment.simulator.platform.clock_offset_s = timedelta(hours=26).total_seconds()
        assert the_result(deployment)["result"] == "unknown"


def test_nothing_is_lost_with_all_workers_and_nothing_is_sent_again(deployment: Deployment) -> None:
    ids = [f"command-{number}" for number in range(10)]
    with deployment.worker() as worker:
        for command_id in ids:
            deployment.upstream.publish(a_command(command_id=command_id, args=command_id))
        worker.wait_for("command_accepted", count=len(ids))
        worker.process.kill()
        worker.process.wait()
    deployment.simulator.platform.replace_devices({"*": "up"})
    with deployment.worker() as worker:
        worker.wait_for("command_result", count=len(ids))
        found = messages(deployment, 2 * len(ids))
    results = [body["command_id"] for kind, body in found if kind == "execute.result"]
    assert sorted(results) == sorted(ids)
    assert [deployment.cached(command_id) for command_id in ids] == [1] * len(ids)


def test_a_stopped_worker_returns_what_it_holds(deployment: Deployment) -> None:
    with deployment.worker() as worker:
        deployment.upstream.publish(a_command())
        worker.wait_for("command_accepted")
        waiting = [deployment.topology.results_queue, *map(deployment.topology.result_delay_queue, DELAYS_S)]
    wait_until(lambda: sum(map(deployment.upstream.count, waiting)) == 1, PATIENCE_S, "the command that waits")
