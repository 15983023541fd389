"""What results cost: calls of the platform, counted at the simulator, and memory."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pika
import pytest

from scripts.documents import looks_until_expired
from tests.support.builders import a_command, in_hours
from tests.support.deployment import Deployment
from tests.support.simulator import API_KEY, onenet
from tests.support.waiting import PATIENCE_S
from tests.support.worker_process import WorkerProcess
from worker.amqp.blocking import declare_on
from worker.amqp.topology import RESULT
from worker.core.results import Awaited
from worker.dev.services.ports import wait_until
from worker.flow.result_consumer import PREFETCH
from worker.simulator.faults import Fault
from worker.simulator.platform import Platform
from worker.simulator.server import Simulator

LONG_S = 600  # longer than a test: what waits for its second look stays where it is
DELAYS_S = (1, LONG_S)
HANG_S = 600.0
LOOKS_AT_ONCE = 4  # of one product

Calls = list[tuple[str, str]]  # of which kind, and for which device

pytestmark = pytest.mark.usefixtures("watched_workers")


@pytest.fixture
def deployment(broker_url: str, tmp_path: Path) -> Iterator[Deployment]:
    with (
        onenet() as simulator,
        Deployment.set_up(broker_url, tmp_path, simulator, result_delays_s=DELAYS_S) as found,
    ):
        declare_on(found.upstream.channel, found.topology)
        yield found


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """All calls of any simulator, in their order."""
    found: Calls = []
    for name in ("execute", "history"):
        monkeypatch.setattr(Platform, name, _recording(found, name, getattr(Platform, name)))
    return found


def _recording(found: Calls, name: str, call: Any) -> Any:
    def record(platform: Platform, query: dict[str, str], *rest: Any) -> Any:
        found.append((name, query["imei"]))
        return call(platform, query, *rest)

    return record


def looks(calls: Calls) -> Counter[str]:
    """Count the looks at each device."""
    return Counter(imei for name, imei in calls if name == "history")


def imei_of(number: int) -> str:
    return str(865820030000000 + number)


def outstanding(
    simulator: Simulator, count: int, devices: int, *, product: str | None = None, first: int = 0
) -> Iterator[Awaited]:
    """Yield commands that the platform has accepted and whose result is due, of one device after the other."""
    now = datetime.now(UTC)
    expired_time = (now + timedelta(days=1)).astimezone(simulator.platform.clock().tzinfo)
    for number in range(count):
        query = {"imei": imei_of(first + number % devices), "obj_id": "1", "obj_inst_id": "0", "res_id": "1"}
        cached = simulator.platform.execute(query | {"expired_time": f"{expired_time:%Y-%m-%dT%H:%M:%S}"}, b"{}")
        yield Awaited(
            command_id=f"{product}-{number}",
            uuid=cached.uuid,
            imei=query["imei"],
            product=product,
            accepted_at=now,
            is_recovered=False,
            expires_at=now + timedelta(days=1),
            last_answer_at=now + timedelta(days=1, seconds=110),
            due_at=now,
        )


def publish(deployment: Deployment, commands: Iterable[Awaited]) -> None:
    """Publish the messages that the broker returns when the result of a command is due."""
    channel = deployment.upstream.connection.channel()  # without confirms, which take most of the time
    exchange = deployment.topology.returns_exchange
    properties = pika.BasicProperties(delivery_mode=pika.DeliveryMode.Persistent)
    for command in commands:
        channel.basic_publish(exchange, RESULT, command.model_dump_json().encode(), properties)
    channel.close()


def wait_for_count(deployment: Deployment, queue: str, count: int) -> None:
    """Wait until so many messages are in a queue, for as long as they become more."""
    reached = -1
    while reached < count:
        former = reached
        wait_until(lambda: deployment.upstream.count(queue) > former, PATIENCE_S, f"{count} in {queue}")  # noqa: B023
        reached = deployment.upstream.count(queue)
    assert reached == count


def make_due(deployment: Deployment) -> None:
    """Move what waits for its second look on, as the broker does after its delay."""
    queue = deployment.topology.result_delay_queue(LONG_S)
    channel, moved = deployment.upstream.connection.channel(), []
    now = datetime.now(UTC)
    for method, _, body in channel.consume(queue, auto_ack=True, inactivity_timeout=1):
        if method is None:
            break
        moved.append(Awaited.model_validate_json(body or b"").model_copy(update={"due_at": now}))
    channel.close()
    publish(deployment, moved)


def peak_mib(worker: WorkerProcess) -> float:
    status = Path(f"/proc/{worker.process.pid}/status").read_text()
    found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024


def look_up_twice(deployment: Deployment, calls: Calls, count: int, devices: int) -> float:
    """Look commands up that are due in turn of the devices, so that few of each are held at once, and then again.

    Returns the peak of the worker's memory in MiB.
    """
    publish(deployment, outstanding(deployment.simulator, count, devices))
    calls.clear()
    with deployment.worker() as worker:
        wait_for_count(deployment, deployment.topology.result_delay_queue(LONG_S), count)
        assert_one_for_each(calls, devices)

        deployment.simulator.platform.replace_devices({"*": "up"})
        deployment.simulator.platform.clock_offset_s = 3600  # by now they have executed everything
        calls.clear()
        make_due(deployment)
        wait_for_count(deployment, deployment.upstream.replies_queue, count)
        assert_one_for_each(calls, devices)
        return peak_mib(worker)


def assert_one_for_each(calls: Calls, devices: int) -> None:
    found = looks(calls)
    assert len(found) == devices
    assert found.total() <= 1.1 * devices


@pytest.mark.parametrize(("count", "devices"), [(2_000, 200), (20_000, 2_000)])
def test_a_device_costs_one_call_for_each_look_at_all_of_its_commands(
    deployment: Deployment, calls: Calls, count: int, devices: int
) -> None:
    peak = look_up_twice(deployment, calls, count, devices)
    print(f"{count} commands of {devices} devices: {peak:.0f} MiB")
    messages = deployment.upstream.take_all()
    assert {message.json["result"] for message in messages} == {"executed"}
    assert len({message.json["uuid"] for message in messages}) == count
    assert {name for name, _ in calls} == {"history"}  # looking sends nothing


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
