"""Commands whose result is awaited, by the thousand, and the calls that they cost."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pika
import pytest

from tests.support.deployment import Deployment
from tests.support.simulator import onenet
from tests.support.waiting import PATIENCE_S
from tests.support.worker_process import WorkerProcess
from worker.amqp.blocking import declare_on
from worker.amqp.topology import RESULT
from worker.core.results import Awaited
from worker.dev.services.ports import wait_until
from worker.simulator.platform import Platform
from worker.simulator.server import Simulator

LONG_S = 600  # longer than a test: what waits for its second look stays where it is
DELAYS_S = (1, LONG_S)


@contextmanager
def deployment_with_results(broker_url: str, folder: Path) -> Iterator[Deployment]:
    """Yield a deployment whose topology is declared, so that commands can wait before a worker runs."""
    with (
        onenet() as simulator,
        Deployment.set_up(broker_url, folder, simulator, result_delays_s=DELAYS_S) as deployment,
    ):
        declare_on(deployment.upstream.channel, deployment.topology)
        yield deployment


Calls = list[tuple[str, str]]  # of which kind, and for which device


def record_calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Return a list to which all calls of any simulator are added, in their order."""
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


def outstanding(simulator: Simulator, count: int, devices: int, *, product: str | None = None) -> Iterator[Awaited]:
    """Yield commands that the platform has accepted and whose result is due, of one device after the other."""
    now = datetime.now(UTC)
    expired_time = (now + timedelta(days=1)).astimezone(simulator.platform.clock().tzinfo)
    for number in range(count):
        query = {"imei": imei_of(number % devices), "obj_id": "1", "obj_inst_id": "0", "res_id": "1"}
        cached = simulator.platform.execute(query | {"expired_time": f"{expired_time:%Y-%m-%dT%H:%M:%S}"}, b"{}")
        yield Awaited(
            command_id=f"{product}-{number}",
            app_id="",
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


def wait_for_count(deployment: Deployment, worker: WorkerProcess, queue: str, count: int) -> None:
    """Wait until so many messages are in a queue, for as long as they become more.

    There may be more only if the worker lost a connection, after which the broker redelivers unacknowledged messages.
    """
    reached = -1

    def are_more() -> bool:
        nonlocal reached
        former, reached = reached, deployment.upstream.count(queue)
        return reached > former

    while reached < count:
        wait_until(are_more, PATIENCE_S, f"{count} in {queue}")
    trouble = [event for event in worker.events if event["level"] != "info"]
    has_lost_connection = any(event["event"] == "broker_connection_lost" for event in trouble)
    assert reached == count or has_lost_connection, f"{reached} in {queue} instead of {count}, {trouble}"


def make_due(deployment: Deployment) -> None:
    """Move what waits for its second look on, as the broker does after its delay.

    In fact less time has passed than a tenth of that delay, so that reads of the first look would do for the second:
    with the short delay before a first look they do not.
    """
    queue = deployment.topology.result_delay_queue(LONG_S)
    channel, moved = deployment.upstream.connection.channel(), []
    for method, _, body in channel.consume(queue, auto_ack=True, inactivity_timeout=1):
        if method is None:
            break
        moved.append(Awaited.model_validate_json(body or b""))
    channel.close()
    now = datetime.now(UTC)
    publish(deployment, (each.model_copy(update={"due_at": now, "looks": 0}) for each in moved))


def peak_mib(worker: WorkerProcess) -> float:
    status = Path(f"/proc/{worker.process.pid}/status").read_text()
    found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024


def look_up_twice(deployment: Deployment, calls: Calls, count: int, devices: int) -> float:
    """Look commands up that are due in turn of the devices, so that few of each are held at once, and then again.

    Returns the peak of the worker's memory in MiB.
    """
    platform = deployment.simulator.platform
    platform.replace_devices({})
    platform.clock_offset_s = 0
    publish(deployment, outstanding(deployment.simulator, count, devices))
    calls.clear()
    with deployment.worker() as worker:
        wait_for_count(deployment, worker, deployment.topology.result_delay_queue(LONG_S), count)
        assert_one_for_each(calls, devices)

        platform.replace_devices({"*": "up"})
        platform.clock_offset_s = 3600  # by now they have executed everything
        calls.clear()
        make_due(deployment)
        wait_for_count(deployment, worker, deployment.upstream.replies_queue, count)
        assert_one_for_each(calls, devices)
        peak = peak_mib(worker)
    results = [message.json for message in deployment.upstream.take_all()]
    assert {result["result"] for result in results} == {"executed"}
    assert len({result["uuid"] for result in results}) == count
    return peak


def assert_one_for_each(calls: Calls, devices: int) -> None:
    """Check that about one look was made at each device, and that nothing was sent."""
    found = looks(calls)
    assert len(found) == devices
    assert found.total() == len(calls)
    assert found.total() <= 1.1 * devices
