"""Flow control: pauses while the platform is down, the rate limit, and the order of each device's commands."""

import itertools
import json
import os
import signal
from bisect import bisect_left
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.support.builders import a_command
from tests.support.deployment import SOON_CERTAIN, Deployment
from tests.support.outcomes import assert_each_accepted_once, outcomes_of, publish_many
from tests.support.proxies import Proxy
from tests.support.simulator import ACCESS_KEY, API_KEY, PRODUCT_ID, onenet
from tests.support.waiting import PATIENCE_S
from worker.amqp.blocking import declare_on
from worker.dev.services.ports import wait_until
from worker.simulator.faults import Fault
from worker.simulator.server import Simulator

pytestmark = pytest.mark.usefixtures("watched_workers")

PAUSE_AFTER = 5
QUICK = {"WORKER_PAUSE_AFTER_FAILURES": str(PAUSE_AFTER), "WORKER_PROBE_INTERVAL": "0.2", "WORKER_CONCURRENCY": "4"}
CALM = QUICK | {"WORKER_PROBE_INTERVAL": "600"}


def assert_no_dead_letters(deployment: Deployment) -> None:
    assert deployment.upstream.count(deployment.topology.dead_letters_exchange) == 0


@pytest.mark.parametrize(
    "fault",
    [
        Fault(kind="error_503"),
        Fault(kind="error_500_after_caching"),
        Fault(kind="errno", errno=5117, error="rpc error"),
        Fault(kind="too_many_requests", seconds=0),
        Fault(kind="hang", seconds=5),
    ],
    ids=lambda fault: fault.kind,
)
def test_a_platform_outage_costs_no_command_and_no_attempt(deployment: Deployment, fault: Fault) -> None:
    """More probes fail than there are attempts, and still no command is dead-lettered."""
    with onenet(latency_s=0.02) as simulator:
        deployment.simulator = simulator
        with deployment.worker(**QUICK, **SOON_CERTAIN, WORKER_MAX_ATTEMPTS="2") as worker:
            ids = publish_many(deployment, 20)
            worker.wait_for("command_accepted", count=10)
            simulator.faults.replace([fault, Fault(kind="error_503", endpoint="history")])
            ids += publish_many(deployment, 130, first=20)  # in time for the outage
            paused = worker.wait_for("consumption_paused")
            assert "failures in a row" in paused["reason"]
            worker.wait_for("probe_failed", count=4)
            assert deployment.upstream.count(deployment.topology.execute_queue) > 0
            simulator.faults.replace([])
            worker.wait_for("product_resumed")
            assert_each_accepted_once(deployment, ids)
    assert_no_dead_letters(deployment)


def test_commands_sent_as_failing_probes_keep_their_attempts(deployment: Deployment) -> None:
    """Each command is the probe several times, and in doubt after each."""
    deployment.simulator.faults.replace([Fault(kind="error_503")])
    settings = QUICK | {"WORKER_PAUSE_AFTER_FAILURES": "2", "WORKER_MAX_ATTEMPTS": "2", "WORKER_PROBE_INTERVAL": "0.01"}
    with deployment.worker(**settings, **SOON_CERTAIN) as worker:
        ids = publish_many(deployment, 2)
        worker.wait_for("probe_failed", count=6)
        deployment.simulator.faults.replace([])
        assert_each_accepted_once(deployment, ids)
    assert_no_dead_letters(deployment)


def test_the_worker_resumes_when_an_unreachable_platform_is_back(deployment: Deployment) -> None:
    """The latency makes the outage begin under load: the simulator still serves connections that are open."""
    with onenet(Fault(kind="refuse", seconds=3, count=1), latency_s=0.05) as simulator:
        deployment.simulator = simulator
        with deployment.worker(**QUICK, **SOON_CERTAIN) as worker:
            ids = publish_many(deployment, 100)
            assert "the connection was refused" in worker.wait_for("consumption_paused")["reason"]
            worker.wait_for("product_resumed")
            assert_each_accepted_once(deployment, ids)
    assert_no_dead_letters(deployment)


def test_a_paused_worker_leaves_commands_in_the_broker_and_stops_gracefully(deployment: Deployment) -> None:
    deployment.simulator.faults.replace([Fault(kind="too_many_requests", seconds=0)])
    with deployment.worker(**CALM) as worker:
        ids = publish_many(deployment, 60)
        worker.wait_for("consumption_paused")
        wait_until(lambda: deployment.upstream.consumers() == 0, PATIENCE_S, "the end of consuming")
        asked = len(deployment.simulator.requests)
        assert asked < PAUSE_AFTER + int(QUICK["WORKER_CONCURRENCY"])
        waiting = [deployment.topology.execute_queue, *map(deployment.topology.retry_queue, (1, 2))]
        wait_until(lambda: sum(map(deployment.upstream.count, waiting)) == 60, PATIENCE_S, "all of them in the broker")
        assert len(deployment.simulator.requests) == asked
        worker.process.signal(signal.SIGTERM)
        assert worker.process.wait() == 0
    deployment.simulator.faults.replace([])
    with deployment.worker():
        assert_each_accepted_once(deployment, ids)


def test_a_pause_survives_a_lost_broker_connection(deployment: Deployment) -> None:
    proxy = Proxy(deployment.broker_url)
    deployment.simulator.faults.replace([Fault(kind="too_many_requests", seconds=0)])
    with deployment.worker(**QUICK, **SOON_CERTAIN, AMQP_URL=proxy.url) as worker:
        ids = publish_many(deployment, 60)
        worker.wait_for("consumption_paused")
        proxy.cut()
        worker.wait_for("broker_connected", count=2)
        worker.wait_for("probe_failed", count=3)
        assert len([event for event in worker.events if event["event"] == "consumer_started"]) == 1
        deployment.simulator.faults.replace([])
        assert_each_accepted_once(deployment, ids)
    proxy.close()


def test_a_new_connection_that_takes_only_a_probe_is_not_reported_as_consuming(deployment: Deployment) -> None:
    """All commands wait for their next attempt, so that the worker waits for a probe when it is connected again."""
    proxy = Proxy(deployment.broker_url)
    deployment.simulator.faults.replace([Fault(kind="too_many_requests", seconds=0)])
    with deployment.worker(**QUICK, WORKER_RETRY_DELAYS="600", AMQP_URL=proxy.url) as worker:
        publish_many(deployment, PAUSE_AFTER)
        worker.wait_for("consumption_paused")
        waiting = deployment.topology.retry_queue(600)
        wait_until(lambda: deployment.upstream.count(waiting) == PAUSE_AFTER, PATIENCE_S, "all in the retry queue")
        wait_until(lambda: deployment.upstream.consumers() == 1, PATIENCE_S, "the wait for a probe")
        proxy.cut()
        worker.wait_for("broker_connected", count=2)
        wait_until(lambda: deployment.upstream.consumers() == 1, PATIENCE_S, "the wait for a probe")
        worker.process.signal(signal.SIGTERM)
        assert worker.process.wait() == 0
        assert len([event for event in worker.events if event["event"] == "consumer_started"]) == 1
    proxy.close()


def test_a_wrong_key_pauses_the_product_before_a_full_queue_is_rejected(deployment: Deployment) -> None:
    """A few commands are rejected before consecutive refusals show that the whole product is affected."""
    products = deployment.folder / "products.json"
    products.write_text(json.dumps({"meters": {"api_key": "mistyped"}}))
    with deployment.worker(**CALM, ONENET_PRODUCTS_FILE=str(products), ONENET_API_KEY="") as worker:
        ids = [f"command-{number}" for number in range(100)]
        for number, command_id in enumerate(ids):
            imei = str(865820030000000 + number)
            deployment.upstream.publish(a_command(command_id=command_id, imei=imei, args=command_id, product="meters"))
        assert "authentication refused" in worker.wait_for("consumption_paused")["reason"]

        products.write_text("{")
        worker.process.signal(signal.SIGHUP)
        assert "ONENET_PRODUCTS_FILE" in worker.wait_for("products_not_reloaded")["reason"]
        products.unlink()
        os.mkfifo(products)
        worker.process.signal(signal.SIGHUP)
        worker.wait_for("products_not_reloaded", reason=f"ONENET_PRODUCTS_FILE: is not a regular file ({products})")
        products.unlink()
        products.write_text(json.dumps({"meters": {"api_key": API_KEY}}))
        worker.process.signal(signal.SIGHUP)
        reloaded = worker.wait_for("products_reloaded")
        assert (reloaded["products"], reloaded["changed"]) == (1, 1)

        replies = outcomes_of(deployment, ids)
        found = Counter(status for status, _ in replies.values())
        assert found == {"rejected": PAUSE_AFTER - 1, "accepted": 100 - PAUSE_AFTER + 1}
        assert API_KEY not in json.dumps(worker.events)
    assert_no_dead_letters(deployment)


def test_a_key_that_changes_on_disk_is_used_once_the_former_is_refused(deployment: Deployment) -> None:
    """No signal is needed: a container cannot get one when a secret is renewed."""
    secret = deployment.folder / "key"
    secret.write_text("former\n")
    with deployment.worker(**QUICK, ONENET_API_KEY="", ONENET_API_KEY_FILE=str(secret)) as worker:
        ids = publish_many(deployment, 2 * PAUSE_AFTER)
        assert "authentication refused" in worker.wait_for("product_paused")["reason"]
        secret.write_text(f"{API_KEY}\n")
        reloaded = worker.wait_for("products_reloaded")
        assert (reloaded["products"], reloaded["changed"]) == (1, 1)
        found = Counter(status for status, _ in outcomes_of(deployment, ids).values())
        assert found == {"rejected": PAUSE_AFTER - 1, "accepted": PAUSE_AFTER + 1}
        assert API_KEY not in json.dumps(worker.events)


@pytest.mark.parametrize("kind", ["not_found", "redirect"])
def test_a_gateway_that_refuses_all_requests_pauses_the_product(deployment: Deployment, kind: Any) -> None:
    deployment.simulator.faults.replace([Fault(kind=kind)])
    with deployment.worker(**QUICK) as worker:
        ids = publish_many(deployment, 500)
        assert "in front of OneNET" in worker.wait_for("consumption_paused")["reason"]
        worker.wait_for("probe_failed", count=3)
        deployment.simulator.faults.replace([])
        found = Counter(status for status, _ in outcomes_of(deployment, ids).values())
        assert found == {"rejected": PAUSE_AFTER - 1, "accepted": 500 - PAUSE_AFTER + 1}
    assert_no_dead_letters(deployment)


def test_refused_requests_of_one_device_do_not_pause_the_product(deployment: Deployment) -> None:
    deployment.simulator.faults.replace([Fault(kind="errno", errno=1, error="auth failed", imei="865820039000000")])
    with deployment.worker(**CALM) as worker:
        refused = [f"refused-{number}" for number in range(50)]
        for command_id in refused:
            deployment.upstream.publish(a_command(command_id=command_id, imei="865820039000000"))
        assert set(outcomes_of(deployment, refused).values()) == {("rejected", None)}
        assert_each_accepted_once(deployment, publish_many(deployment, 20))
        assert not [event for event in worker.events if event["event"] == "product_paused"]


def test_throttled_commands_use_up_no_attempt_and_slow_down_the_worker(deployment: Deployment) -> None:
    """Each command is throttled more often than it has attempts."""
    struck: list[datetime] = []
    deployment.simulator.on_fault = lambda: struck.append(deployment.simulator.platform.now())
    deployment.simulator.faults.replace([Fault(kind="errno", errno=15, error="api freq out of limit", count=9)])
    with deployment.worker(**QUICK, WORKER_MAX_ATTEMPTS="2") as worker:
        ids = publish_many(deployment, 3)
        replies = {reply["command_id"]: reply for reply in deployment.upstream.replies(3)}
        assert replies.keys() == set(ids)
        assert {(reply["status"], reply["attempts"]) for reply in replies.values()} == {("accepted", 1)}
        assert "api freq out of limit" in worker.wait_for("product_paused", count=2)["reason"]
        assert not [event for event in worker.events if event["event"] == "probe_failed"]
    assert [deployment.cached(command_id) for command_id in ids] == [1, 1, 1]
    assert struck[-1] - struck[0] >= timedelta(seconds=3)  # at least two waits, the second twice as long as the first


def test_failing_history_reads_delay_no_new_command(deployment: Deployment) -> None:
    """At first execute requests fail too, with lost answers, so that later only a new command can be their probe."""
    unreadable = Fault(kind="error_500", endpoint="history")
    deployment.simulator.faults.replace([Fault(kind="error_500_after_caching", count=12), unreadable])
    with deployment.worker(**QUICK, **SOON_CERTAIN, WORKER_MAX_ATTEMPTS="5") as worker:
        in_doubt = publish_many(deployment, 12)
        worker.wait_for("product_paused")
        worker.wait_for("history_paused")
        deployment.simulator.faults.replace([unreadable])
        new = publish_many(deployment, 300, first=100)
        assert_each_accepted_once(deployment, new)
        worker.wait_for("history_probe_failed", count=2)
        assert not [event for event in worker.events if event["event"] == "command_recovered"]
        deployment.simulator.faults.replace([])
        worker.wait_for("history_resumed")
        assert_each_accepted_once(deployment, in_doubt)
    assert_no_dead_letters(deployment)


def test_commands_in_doubt_are_recovered_while_executions_are_paused(deployment: Deployment) -> None:
    deployment.simulator.faults.replace([Fault(kind="error_500_after_caching")])
    with deployment.worker(**QUICK, **SOON_CERTAIN) as worker:
        ids = publish_many(deployment, PAUSE_AFTER + 3)
        worker.wait_for("product_paused")
        assert_each_accepted_once(deployment, ids)
        worker.wait_for("command_recovered", count=len(ids))
        assert not [event for event in worker.events if event["event"] in {"product_resumed", "history_paused"}]


def test_sighup_without_a_products_file_terminates_the_worker(deployment: Deployment) -> None:
    """Without a file to reload, SIGHUP keeps its default meaning."""
    with deployment.worker() as worker:
        worker.process.signal(signal.SIGHUP)
        assert worker.process.wait() == -signal.SIGHUP


def test_retry_after_pauses_all_requests_of_the_worker(deployment: Deployment) -> None:
    struck: list[datetime] = []
    deployment.simulator.on_fault = lambda: struck.append(deployment.simulator.platform.now())
    with deployment.worker(WORKER_CONCURRENCY="4") as worker:
        deployment.simulator.faults.replace([Fault(kind="too_many_requests", seconds=3, count=1)])
        ids = publish_many(deployment, 100)
        worker.wait_for("consumption_paused")
        assert_each_accepted_once(deployment, ids)
    [began] = struck
    received = [datetime.fromisoformat(request["received_at"]) for request in deployment.simulator.requests]
    # Only those that left before the answer had arrived: at most one more for each that was in flight with it.
    assert len([moment for moment in received if began < moment < began + timedelta(seconds=3)]) <= 2 * 4
    assert [moment for moment in received if moment >= began + timedelta(seconds=3)]


@dataclass
class Busy:
    """One request as the platform saw it: when it arrived and when its answer left."""

    imei: str
    args: str
    began: datetime
    ended: datetime


def seen_by(simulator: Simulator) -> list[Busy]:
    """Return the requests in order of arrival; each command was cached just before its answer."""
    ended = {command.args: command.created_at for command in simulator.platform.commands}
    found = []
    for request in simulator.requests:
        args = json.loads(request["body"])["args"]
        began = datetime.fromisoformat(request["received_at"])
        found.append(Busy(request["query"]["imei"], args, began, ended[args]))
    return found


def by_device(simulator: Simulator) -> dict[str, list[Busy]]:
    found: dict[str, list[Busy]] = {}
    for busy in seen_by(simulator):
        found.setdefault(busy.imei, []).append(busy)
    return found


def are_one_at_a_time(requests: list[Busy]) -> bool:
    return all(one.ended <= other.began for one, other in itertools.pairwise(requests))


def are_side_by_side(requests: list[Busy]) -> bool:
    return any(other.began < one.ended for one, other in itertools.pairwise(requests))


def publish_for_few_devices(deployment: Deployment, devices: int, each: int) -> dict[str, list[str]]:
    """Publish commands for each device in turn; returns their ids, which are their args, in order."""
    ids: dict[str, list[str]] = {str(865820030000000 + number): [] for number in range(devices)}
    for number in range(each):
        for imei, own in ids.items():
            own.append(f"{imei}-{number}")
            deployment.upstream.publish(a_command(command_id=own[-1], args=own[-1], imei=imei))
    return ids


def test_commands_of_one_device_are_sent_in_order_and_devices_concurrently(
    deployment: Deployment,
) -> None:
    with onenet(latency_s=0.01) as simulator:
        deployment.simulator = simulator
        with deployment.worker():
            ids = publish_for_few_devices(deployment, devices=5, each=80)
            assert_each_accepted_once(deployment, [command_id for own in ids.values() for command_id in own])
        found = by_device(simulator)
        assert {imei: [busy.args for busy in own] for imei, own in found.items()} == ids
        assert all(map(are_one_at_a_time, found.values()))
        assert are_side_by_side(seen_by(simulator))


def test_ordering_none_sends_the_commands_of_one_device_concurrently(deployment: Deployment) -> None:
    with onenet(latency_s=0.05) as simulator:
        deployment.simulator = simulator
        with deployment.worker(WORKER_ORDERING="none"):
            ids = publish_for_few_devices(deployment, devices=1, each=60)
            assert_each_accepted_once(deployment, next(iter(ids.values())))
        [found] = by_device(simulator).values()
        assert are_side_by_side(found)


def test_a_slow_device_with_many_waiting_commands_delays_no_other_device(deployment: Deployment) -> None:
    """More commands wait than the prefetch, and than a worker holds for a busy device."""
    slow = "865820039000000"
    deployment.simulator.faults.replace([Fault(kind="late_caching", seconds=2 * PATIENCE_S, imei=slow)])
    patient = {"ONENET_READ_TIMEOUT": "300", "WORKER_RECONCILE_DELAY": "315", "WORKER_CONCURRENCY": "4"}
    with deployment.worker(**patient) as worker:
        for number in range(2_100):
            deployment.upstream.publish(a_command(command_id=f"slow-{number}", imei=slow))
        ids = publish_many(deployment, 100)
        missing = set(ids)
        while missing:
            missing.discard(deployment.upstream.reply().json["command_id"])
        sent_to_it = [request for request in deployment.simulator.requests if request["query"]["imei"] == slow]
        assert len(sent_to_it) == 1  # which has not been answered yet
        assert not [event for event in worker.events if event["level"] not in {"info", "debug"}]


def in_spans(moments: list[datetime], seconds: float) -> list[int]:
    """Return the number of moments in each span that begins at one of them and ends before the last."""
    span = timedelta(seconds=seconds)
    return [
        bisect_left(moments, moment + span) - number
        for number, moment in enumerate(moments)
        if moment + span < moments[-1]
    ]


@pytest.mark.parametrize(("store", "workers"), [("memory", 1), ("redis", 3)])
def test_the_rate_limit_holds_over_ten_seconds_for_one_worker_and_for_a_fleet(
    deployment: Deployment, store: str, workers: int, request: pytest.FixtureRequest
) -> None:
    """At 50 per second, no ten seconds have more than 5 % more requests.

    A machine that stalls for a moment hands over at once what was allowed before it, and no more than the deliveries
    that the workers hold: six each. How close a worker comes to the rate depends on the machine.
    """
    url = "memory://" if store == "memory" else request.getfixturevalue("redis_url")
    declare_on(deployment.upstream.channel, deployment.topology)
    deployment.upstream.bind_replies()
    ids = publish_many(deployment, 1_000)  # before a worker competes for the processor
    settings = {"ONENET_RATE_LIMIT": "50/second", "IDEMPOTENCY_URL": url, "WORKER_CONCURRENCY": "4"}
    with ExitStack() as stack:
        for _ in range(workers):
            stack.enter_context(deployment.start_worker(**settings))
        wait_until(lambda: len(deployment.simulator.platform.commands) == len(ids), 4 * PATIENCE_S, "all of them")
        assert_each_accepted_once(deployment, ids)
    moments = [command.created_at for command in deployment.simulator.platform.commands]
    held = 6 * workers
    assert max(in_spans(moments, 10)) <= 500 + 1 + held
    assert max(in_spans(moments, 1)) <= 50 + 1 + held


def test_commands_waiting_for_the_rate_limit_return_to_the_queue_on_shutdown(deployment: Deployment) -> None:
    with deployment.worker(ONENET_RATE_LIMIT="1/hour") as worker:
        ids = publish_many(deployment, 10)
        worker.wait_for("command_accepted")
        wait_until(
            lambda: deployment.upstream.count(deployment.topology.execute_queue) == 0, PATIENCE_S, "the prefetch"
        )
        worker.process.signal(signal.SIGTERM)
        assert worker.process.wait() == 0
        assert deployment.upstream.count(deployment.topology.execute_queue) == 9
    with deployment.worker() as worker:
        assert_each_accepted_once(deployment, ids)
        assert not [event for event in worker.events if event["event"] == "command_in_doubt"]


@pytest.fixture
def two_products(deployment: Deployment, tmp_path: Path) -> dict[str, str]:
    """The settings of a worker with the default product and another, which uses an access key."""
    products = tmp_path / "products.json"
    products.write_text(json.dumps({"heating": {"product_id": PRODUCT_ID, "access_key": ACCESS_KEY}}))
    return QUICK | {"ONENET_PRODUCTS_FILE": str(products), "WORKER_MAX_ATTEMPTS": "2"}


def test_the_outage_of_one_product_does_not_stop_commands_of_another(
    deployment: Deployment, two_products: dict[str, str]
) -> None:
    """Commands of the product that is down wait in a delay queue, which uses up no attempt."""
    devices = [str(865820035000000 + number) for number in range(10)]
    deployment.simulator.faults.replace([Fault(kind="too_many_requests", seconds=0, imei=imei) for imei in devices])
    with deployment.worker(**two_products) as worker:
        down = [f"heating-{number}" for number in range(40)]
        for number, command_id in enumerate(down):
            imei = devices[number % len(devices)]
            deployment.upstream.publish(a_command(command_id=command_id, args=command_id, imei=imei, product="heating"))
        assert worker.wait_for("product_paused")["product"] == "heating"
        up = publish_many(deployment, 100)
        assert_each_accepted_once(deployment, up)
        worker.wait_for("probe_failed", product="heating", count=2)
        assert not [event for event in worker.events if event["event"] == "consumption_paused"]
        deployment.simulator.faults.replace([])
        assert_each_accepted_once(deployment, down)
        assert worker.wait_for("product_resumed")["product"] == "heating"
    assert_no_dead_letters(deployment)


def test_consumption_pauses_when_all_products_are_down(deployment: Deployment, two_products: dict[str, Any]) -> None:
    deployment.simulator.faults.replace([Fault(kind="too_many_requests", seconds=0)])
    with deployment.worker(**two_products) as worker:
        ids = [f"command-{number}" for number in range(60)]
        for number, command_id in enumerate(ids):
            product = "heating" if number % 2 else None
            imei = str(865820030000000 + number)
            deployment.upstream.publish(a_command(command_id=command_id, args=command_id, imei=imei, product=product))
        worker.wait_for("consumption_paused")
        for product in (None, "heating"):
            worker.wait_for("probe_failed", product=product)
        deployment.simulator.faults.replace([])
        assert_each_accepted_once(deployment, ids)
    assert_no_dead_letters(deployment)
