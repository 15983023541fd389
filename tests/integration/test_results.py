"""Results: what became of each accepted command, published once it is known. Section 1.4 of the contract."""

import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import redis
import requests

from tests.support.builders import AN_IMEI, a_command, in_hours
from tests.support.command_line import TARGET_OPTIONS, run_cli
from tests.support.deployment import SOON_CERTAIN, SOON_S, Deployment
from tests.support.simulator import ACCESS_KEY, API_KEY, PRODUCT_ID, onenet
from tests.support.startup_code import run_at_startup
from tests.support.waiting import PATIENCE_S
from worker.amqp.topology import Topology
from worker.dev.services.broker import LocalBroker
from worker.dev.services.ports import free_port, wait_until
from worker.dev.services.redis import LocalRedis
from worker.simulator.faults import Fault
from worker.simulator.platform import Platform

DELAYS_S = (1, 2)
V2 = {
    "ONENET_API": "v2",
    "ONENET_API_KEY": "",
    "ONENET_PRODUCT_ID": PRODUCT_ID,
    "ONENET_ACCESS_KEY": ACCESS_KEY,
}
DELETED, ALSO_DELETED, ANOTHER_IMEI = "865820035000001", "865820035000002", "865820035000003"

pytestmark = pytest.mark.usefixtures("watched_workers")


@pytest.fixture
def deployment(broker_url: str, tmp_path: Path) -> Iterator[Deployment]:
    with (
        onenet() as simulator,
        Deployment.set_up(broker_url, tmp_path, simulator, SOON_S, result_delays_s=DELAYS_S) as found,
    ):
        yield found


@pytest.fixture
def breakable(own_broker: LocalBroker, tmp_path: Path) -> Iterator[Deployment]:
    """A deployment on a broker that may be killed."""
    with (
        onenet() as simulator,
        Deployment.set_up(own_broker.url, tmp_path, simulator, result_delays_s=DELAYS_S) as found,
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
@pytest.mark.parametrize("settings", [{}, V2], ids=["v1", "v2"])
def test_the_device_answers(
    deployment: Deployment, settings: dict[str, str], behaviour: str, result: str, confirm_status: str
) -> None:
    deployment.simulator.platform.replace_devices({"*": behaviour})
    with deployment.worker(**settings):
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


def test_a_cancelled_command(deployment: Deployment) -> None:
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
    wait_until(lambda: waiting(deployment) == 1, PATIENCE_S, "the command that waits")


def waiting(deployment: Deployment) -> int:
    """Return how many commands wait for their result."""
    topology = deployment.topology
    return sum(map(deployment.upstream.count, [topology.results_queue, *map(topology.result_delay_queue, DELAYS_S)]))


def results(deployment: Deployment, count: int) -> dict[str, dict[str, Any]]:
    """Read replies and results until there are so many results; returns the results by command id."""
    found: dict[str, dict[str, Any]] = {}
    while len(found) < count:
        message = deployment.upstream.reply()
        if message.properties.type == "execute.result":
            found[message.json["command_id"]] = message.json
    return found


def cancel(deployment: Deployment, uuid: str) -> None:
    deployment.simulator.platform.cancels_valid = True
    url = f"{deployment.simulator.url}/nbiot/offline/cancel/{uuid}"
    answer = requests.put(url, params={"imei": AN_IMEI}, headers={"api-key": API_KEY}, timeout=PATIENCE_S)
    assert answer.json()["errno"] == 0


def test_each_of_two_twins_has_its_own_result(deployment: Deployment) -> None:
    """The two commands are alike; one is cancelled, and the device executes the other."""
    expired_time = in_hours(24)
    with deployment.worker() as worker:
        for command_id in ("cancelled", "executed"):
            deployment.upstream.publish(a_command(command_id=command_id, expired_time=expired_time))
        worker.wait_for("command_accepted", count=2)
        cancel(deployment, worker.wait_for("command_accepted", command_id="cancelled")["uuid"])
        deployment.simulator.platform.replace_devices({"*": "up"})
        found = results(deployment, 2)
    assert {command_id: result["result"] for command_id, result in found.items()} == {
        "cancelled": "cancelled",
        "executed": "executed",
    }


@pytest.mark.parametrize("hours", [-30, 30])
def test_a_platform_whose_clock_is_far_away_makes_no_result_late(deployment: Deployment, hours: int) -> None:
    """On its clock the first look would be due 30 hours later, or after each look the next one."""
    deployment.simulator.platform.clock_offset_s = timedelta(hours=hours).total_seconds()
    refused: list[object] = []
    deployment.simulator.on_fault = lambda: refused.append(None)
    deployment.simulator.faults.replace([Fault(kind="errno", endpoint="history", errno=10, error="not found", count=4)])
    deployment.simulator.platform.replace_devices({"*": "up"})
    with deployment.worker():
        deployment.upstream.publish(a_command(expired_time=in_hours(72)))
        assert the_result(deployment)["result"] == "executed"
    assert len(refused) == 4  # and none of these looks was the last one


def test_a_recovered_command_has_its_result(deployment: Deployment) -> None:
    deployment.simulator.platform.replace_devices({"*": "up"})
    deployment.simulator.faults.replace([Fault(kind="drop_after_caching", count=1)])
    with deployment.worker(**SOON_CERTAIN) as worker:
        deployment.upstream.publish(a_command())
        recovered = worker.wait_for("command_recovered")
        [result] = results(deployment, 1).values()
    assert (result["result"], result["uuid"]) == ("executed", recovered["uuid"])


def test_a_command_replayed_long_after_its_outcome_was_unknown_has_its_result(deployment: Deployment) -> None:
    """It was cached two days before its reply: the history is read from then on."""
    platform = deployment.simulator.platform
    deployment.simulator.faults.replace([Fault(kind="drop_after_caching")])
    with deployment.worker(**SOON_CERTAIN, WORKER_IN_DOUBT="dead-letter") as worker:
        deployment.upstream.publish(a_command(expired_time=in_hours(72)))
        assert deployment.upstream.reply().json["error"]["code"] == "outcome_unknown"
        deployment.simulator.faults.replace([])
        replayed = run_cli(
            "dead-letters", "replay", "--all", folder=deployment.folder,
            AMQP_URL=deployment.broker_url, WORKER_NAMESPACE=deployment.topology.namespace,
        )  # fmt: skip
        assert replayed.returncode == 0, replayed.stderr
        uuid = worker.wait_for("command_recovered")["uuid"]
        [cached] = platform.commands
        cached.created_at -= timedelta(days=2)
        platform.replace_devices({"*": "up"})
        [result] = results(deployment, 1).values()
    assert (result["result"], result["uuid"]) == ("executed", uuid)


def test_a_duplicate_of_an_accepted_command_has_no_second_result(deployment: Deployment) -> None:
    command = a_command()
    with deployment.worker() as worker:
        deployment.upstream.publish(command)
        worker.wait_for("command_accepted")
        deployment.upstream.publish(command)
        worker.wait_for("duplicate_suppressed")
        worker.process.signal(signal.SIGTERM)
        assert worker.process.wait() == 0
    assert waiting(deployment) == 1


@pytest.mark.parametrize(
    ("properties", "routing_key", "correlation_id"),
    [
        ({"user_id": "guest", "app_id": "guest"}, "result.executed.guest", "the-one"),
        (
            {"user_id": "guest", "app_id": "guest", "reply_to": "guest.mine", "correlation_id": "42"},
            "guest.mine",
            "42",
        ),
    ],
    ids=["app_id", "reply_to"],
)
def test_with_isolated_systems_a_result_goes_to_its_sender(
    deployment: Deployment, properties: dict[str, Any], routing_key: str, correlation_id: str
) -> None:
    deployment.simulator.platform.replace_devices({"*": "up"})
    with deployment.worker(WORKER_TENANTS="isolated"):
        deployment.upstream.publish(a_command(command_id="the-one"), **properties)
        deployment.upstream.reply()
        result = deployment.upstream.reply()
    assert result.properties.type == "execute.result"
    assert (result.routing_key, result.properties.correlation_id) == (routing_key, correlation_id)


def test_a_deleted_device_ends_as_unknown_and_pauses_nothing_for_others(deployment: Deployment) -> None:
    """The platform may say of it that the key does not match, as of a wrong key."""
    platform = deployment.simulator.platform
    refused: list[object] = []
    deployment.simulator.on_fault = lambda: refused.append(None)
    with deployment.worker(WORKER_PAUSE_AFTER_FAILURES="2") as worker:
        for imei in (DELETED, ALSO_DELETED, ANOTHER_IMEI):
            deployment.upstream.publish(a_command(command_id=imei, imei=imei, expired_time=in_hours(1)))
        worker.wait_for("command_accepted", count=3)
        gone = {"kind": "errno", "endpoint": "history", "errno": 1, "error": "auth failed"}
        deployment.simulator.faults.replace([Fault(imei=imei, **gone) for imei in (DELETED, ALSO_DELETED)])
        wait_until(lambda: len(refused) >= 10, PATIENCE_S, "some refused looks")
        platform.replace_devices({ANOTHER_IMEI: "up"})
        assert results(deployment, 1)[ANOTHER_IMEI]["result"] == "executed"
        platform.clock_offset_s = timedelta(hours=26).total_seconds()
        found = results(deployment, 2)
        assert {found[imei]["result"] for imei in (DELETED, ALSO_DELETED)} == {"unknown"}
        assert not [line for line in worker.events if line["event"] in {"history_paused", "product_paused"}]


def test_a_worker_that_cannot_reach_the_platform_leaves_the_results_to_another_one(
    deployment: Deployment, redis_url: str, tmp_path: Path
) -> None:
    """One worker at a time has the queue of results, and the broker does not know that this one cannot look."""
    deployment.simulator.platform.replace_devices({"*": "up"})
    ids = [f"command-{number}" for number in range(5)]
    soon = run_at_startup(tmp_path, "import worker.flow.result_consumer as it; replace(it, '_HAND_OVER_S', 1)")
    nowhere = f"http://127.0.0.1:{free_port()}"
    with (
        deployment.worker(IDEMPOTENCY_URL=redis_url, ONENET_URL=nowhere, **soon),
        deployment.worker(IDEMPOTENCY_URL=redis_url, **soon),
    ):
        for command_id in ids:
            deployment.upstream.publish(a_command(command_id=command_id, args=command_id))
        found = results(deployment, len(ids))
    assert {result["result"] for result in found.values()} == {"executed"}
    assert [deployment.cached(command_id) for command_id in ids] == [1] * len(ids)


def test_a_killed_broker_costs_no_result(breakable: Deployment, own_broker: LocalBroker) -> None:
    ids = [f"command-{number}" for number in range(20)]
    with breakable.worker() as worker:
        for command_id in ids:
            breakable.upstream.publish(a_command(command_id=command_id, args=command_id))
        worker.wait_for("command_accepted", count=len(ids))
        wait_until(lambda: waiting(breakable) >= len(ids) / 2, PATIENCE_S, "commands that wait")
        own_broker.kill()
        worker.wait_for("broker_connection_lost", count=2)
        own_broker.start()
        breakable.upstream.connect()
        breakable.simulator.platform.replace_devices({"*": "up"})
        found = results(breakable, len(ids))
    assert {result["result"] for result in found.values()} == {"executed"}
    assert [breakable.cached(command_id) for command_id in ids] == [1] * len(ids)


def test_an_emptied_redis_costs_no_result(deployment: Deployment, own_redis: LocalRedis) -> None:
    with deployment.worker(IDEMPOTENCY_URL=own_redis.url) as worker:
        deployment.upstream.publish(a_command())
        worker.wait_for("command_accepted")
        with redis.Redis.from_url(own_redis.url) as client:
            client.flushall()
        deployment.simulator.platform.replace_devices({"*": "up"})
        assert the_result(deployment)["result"] == "executed"
    assert len(deployment.simulator.platform.commands) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_worker_that_ends_during_a_look_leaves_it_to_the_next_one(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    deployment.simulator.platform.replace_devices({"*": "up"})
    with held_histories(monkeypatch) as (is_asked, release):
        with deployment.worker() as worker:
            deployment.upstream.publish(a_command())
            assert is_asked.wait(PATIENCE_S)
            worker.process.signal(number)
            assert worker.process.wait() == (0 if number == signal.SIGTERM else -number)
        release.set()
    with deployment.worker() as worker:
        assert the_result(deployment)["result"] == "executed"
        worker.process.signal(signal.SIGTERM)  # so that it acknowledges what it has published
        assert worker.process.wait() == 0
    assert waiting(deployment) == 0
    assert len(deployment.simulator.platform.commands) == 1


@contextmanager
def held_histories(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[threading.Event, threading.Event]]:
    """Let no history be read before the second event; the first one says that one is asked for."""
    is_asked, release = threading.Event(), threading.Event()
    history = Platform.history

    def held(platform: Platform, query: dict[str, str]) -> dict[str, object]:
        is_asked.set()
        assert release.wait(PATIENCE_S)
        return history(platform, query)

    monkeypatch.setattr(Platform, "history", held)
    try:
        yield is_asked, release
    finally:
        release.set()


def test_a_result_without_a_bound_queue_is_kept(deployment: Deployment) -> None:
    deployment.simulator.platform.replace_devices({"*": "up"})
    with deployment.start_worker() as worker:
        worker.wait_for("consumer_started")
        deployment.upstream.bind_replies("execute.#")
        deployment.upstream.publish(a_command(), app_id="billing")
        assert deployment.upstream.reply().json["status"] == "accepted"
        result = deployment.upstream.get(deployment.topology.unrouted_exchange)
    assert (result.routing_key, result.json["result"]) == ("result.executed.billing", "executed")


def test_a_full_queue_of_a_receiver_holds_up_no_other_result(deployment: Deployment, tmp_path: Path) -> None:
    """Its results are diverted, as replies are: shown with a second instead of half a minute."""
    soon = "import worker.amqp.publisher_supervisor as s; replace(s, 'REFUSED_REPLY_S', 1.0)"
    channel, full = deployment.upstream.channel, f"{deployment.topology.namespace}.full"
    deployment.simulator.platform.replace_devices({"*": "up"})
    with deployment.start_worker(**run_at_startup(tmp_path, soon)) as worker:
        worker.wait_for("consumer_started", count=2)
        channel.queue_declare(full, arguments={"x-max-length": 1, "x-overflow": "reject-publish"})
        channel.queue_bind(full, deployment.topology.replies_exchange, "result.*.billing")
        deployment.upstream.bind_replies("execute.#")
        channel.queue_bind(
            f"{deployment.topology.namespace}.test-replies", deployment.topology.replies_exchange, "result.*.payroll"
        )
        for number in range(3):
            deployment.upstream.publish(a_command(command_id=f"full-{number}"), app_id="billing")
        deployment.upstream.publish(a_command(command_id="other", imei=ANOTHER_IMEI), app_id="payroll")
        assert results(deployment, 1)["other"]["result"] == "executed"
        diverted = [deployment.upstream.get(deployment.topology.unrouted_exchange).json for _ in range(2)]
        kept = deployment.upstream.get(full).json
        assert {each["command_id"] for each in (*diverted, kept)} == {"full-0", "full-1", "full-2"}
        worker.wait_for("reply_diverted", count=2)
        channel.queue_delete(full)


def test_without_the_right_to_declare_a_worker_says_which_queues_are_missing(deployment: Deployment) -> None:
    topology = deployment.topology
    off = Topology(topology.namespace, topology.delay_queues_s)
    with deployment.worker(WORKER_RESULTS="off"), deployment.start_worker(AMQP_DECLARE="false") as worker:
        reason = worker.wait_for("broker_unavailable")["reason"]
        missing = {queue.name for queue in topology.queues()} - {queue.name for queue in off.queues()}
        assert any(name in reason for name in missing)


@pytest.mark.parametrize(("behaviour", "exit_code"), [("up", 0), ("up:METHOD_NOT_ALLOWED", 1)])
def test_send_waits_for_the_reply_and_the_result(
    deployment: Deployment, tmp_path: Path, behaviour: str, exit_code: int
) -> None:
    """Without a time limit of its own it waits for longer than until the first look."""
    deployment.simulator.platform.replace_devices({"*": behaviour})
    with deployment.worker():
        sent = send_and_wait_for_the_result(deployment, tmp_path)
    reply, result = (json.loads(line) for line in sent.stdout.splitlines())
    assert (reply["status"], result["uuid"], sent.returncode) == ("accepted", reply["uuid"], exit_code)
    assert result["result"] == ("failed" if exit_code else "executed")


def test_send_says_why_no_result_may_have_come(deployment: Deployment, tmp_path: Path) -> None:
    with deployment.worker(WORKER_RESULTS="off"):
        sent = send_and_wait_for_the_result(deployment, tmp_path, "--result-timeout", "1")
    assert sent.returncode == 1
    command_id = json.loads(sent.stdout)["command_id"]
    first, second, *_ = sent.stderr.splitlines()
    assert first == f"onenet-worker: the result of {command_id} has not arrived within 1 s"
    assert second.endswith("workers publish results with WORKER_RESULTS=on, 1 s after the reply at the earliest")


def send_and_wait_for_the_result(deployment: Deployment, folder: Path, *more: str) -> CompletedProcess[str]:
    return run_cli(
        "send",
        *TARGET_OPTIONS,
        "--wait-result",
        *more,
        folder=folder,
        AMQP_URL=deployment.broker_url,
        WORKER_NAMESPACE=deployment.topology.namespace,
        WORKER_RESULT_DELAYS=",".join(map(str, DELAYS_S)),
    )


def test_a_command_that_never_expires_has_a_reply_and_a_result(deployment: Deployment) -> None:
    """A wait that ends after the year 9999 must not crash each worker that takes the command."""
    deployment.simulator.platform.replace_devices({"*": "up"})
    with deployment.worker():
        for number, expired_time in enumerate(("9999-12-31T00:00:00", "9999-12-30T12:00:00", "9999-12-30T23:59:59Z")):
            deployment.upstream.publish(a_command(command_id=f"c{number}", expired_time=expired_time))
            assert the_result(deployment)["result"] == "executed"


def test_a_command_whose_valid_time_was_never_set_has_a_result(deployment: Deployment) -> None:
    """Some systems write the beginning of their time."""
    deployment.simulator.platform.replace_devices({"*": "up"})
    with deployment.worker():
        deployment.upstream.publish(a_command(valid_time="1970-01-01T00:00:00"))
        assert the_result(deployment)["result"] == "executed"
