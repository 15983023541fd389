"""Shutdown: requests in flight are finished, confirmed and acknowledged; waiting commands return to the queue."""

import signal
import socket
import threading
from urllib.parse import urlsplit

import pytest

from tests.support.builders import a_command
from tests.support.deployment import Deployment
from tests.support.outcomes import assert_each_accepted_once, publish_many
from tests.support.proxies import Proxy, raw_server, with_local_port
from tests.support.simulator import onenet
from tests.support.waiting import PATIENCE_S
from worker.dev.services.ports import wait_until
from worker.simulator.faults import Fault

pytestmark = [pytest.mark.broker_version, pytest.mark.usefixtures("watched_workers")]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_restart_under_load_loses_no_command_and_sends_none_twice(
    deployment: Deployment, number: signal.Signals
) -> None:
    """Commands that were not sent are not redelivered but published again, so the next worker need not doubt them."""
    ids = []
    with onenet(latency_s=0.05) as slow:
        deployment.simulator = slow
        settings = {"WORKER_CONCURRENCY": "4"}
        with deployment.worker(**settings) as first:
            ids = publish_many(deployment, 300)
            first.wait_for("command_accepted", count=20)
            first.process.signal(number)
            assert first.process.wait() == 0
        assert first.wait_for("worker_stopping")["reason"] == number.name
        assert first.events[-1]["event"] == "worker_stopped"
        assert not [event for event in first.events if event["level"] in {"error", "critical"}]
        settings["WORKER_CONCURRENCY"] = "32"
        with deployment.worker(**settings):
            assert_each_accepted_once(deployment, ids)


def test_a_shutdown_while_upstream_publishes_loses_no_command_and_sends_none_twice(deployment: Deployment) -> None:
    """pika would requeue deliveries between basic.cancel and its answer, and they would look redelivered."""
    with deployment.worker(WORKER_CONCURRENCY="32") as first:
        ids: list[str] = []
        thread = threading.Thread(target=lambda: ids.extend(publish_many(deployment, 600)))
        thread.start()
        first.wait_for("command_accepted", count=20)
        first.process.signal(signal.SIGTERM)
        assert first.process.wait() == 0
        thread.join()
    with deployment.worker():
        assert_each_accepted_once(deployment, ids)


def test_a_request_in_flight_is_finished_on_shutdown(deployment: Deployment) -> None:
    with onenet(latency_s=1) as slow:
        deployment.simulator = slow
        with deployment.worker() as worker:
            deployment.upstream.publish(a_command(command_id="last", args="last"))
            deployment.wait_for_request(slow)
            worker.process.signal(signal.SIGTERM)
            assert worker.process.wait() == 0
        assert deployment.upstream.reply().json["status"] == "accepted"
        assert deployment.upstream.count(deployment.topology.execute_queue) == 0


def test_a_command_whose_request_outlasts_the_grace_period_stays_in_the_queue(deployment: Deployment) -> None:
    """Its command is not acknowledged, so the broker delivers it again."""
    deployment.simulator.faults.replace([Fault(kind="hang", seconds=60)])
    with deployment.worker(WORKER_SHUTDOWN_GRACE="2") as worker:
        deployment.upstream.publish(a_command(command_id="outlasting"))
        deployment.wait_for_request()
        worker.process.signal(signal.SIGTERM)
        assert worker.process.wait() == 0
        worker.wait_for("shutdown_grace_exceeded")
    assert deployment.upstream.get(deployment.topology.execute_queue).json["command_id"] == "outlasting"


def test_a_broker_connection_lost_during_shutdown_does_not_delay_it(deployment: Deployment) -> None:
    """The request in flight is finished, although its command can no longer be acknowledged."""
    proxy = Proxy(deployment.broker_url)
    with onenet(latency_s=2) as slow:
        deployment.simulator = slow
        with deployment.worker(AMQP_URL=proxy.url, WORKER_SHUTDOWN_GRACE="300") as worker:
            deployment.upstream.publish(a_command())
            deployment.wait_for_request(slow)
            worker.process.signal(signal.SIGTERM)
            worker.wait_for("worker_stopping")
            proxy.cut()
            assert worker.process.wait() == 0
            worker.wait_for("command_accepted")
    proxy.close()


def test_a_second_sigint_ends_the_worker_at_once(deployment: Deployment) -> None:
    deployment.simulator.faults.replace([Fault(kind="hang", seconds=60)])
    with deployment.worker() as worker:
        deployment.upstream.publish(a_command())
        deployment.wait_for_request()
        worker.process.signal(signal.SIGINT)
        worker.wait_for("worker_stopping")
        worker.process.signal(signal.SIGINT)
        assert worker.process.wait() == 130


def test_a_worker_without_a_broker_stops_on_sigterm(deployment: Deployment) -> None:
    with deployment.start_worker(AMQP_URL="amqp://guest:guest@127.0.0.1:1/") as worker:
        worker.wait_for("broker_unavailable")
        worker.process.signal(signal.SIGTERM)
        assert worker.process.wait() == 0


def test_a_worker_whose_broker_does_not_answer_stops_on_sigterm(deployment: Deployment) -> None:
    is_connected = threading.Event()

    def say_nothing(client: socket.socket) -> None:
        is_connected.set()
        while client.recv(4096):
            pass

    with (
        raw_server(say_nothing) as url,
        deployment.start_worker(AMQP_URL=with_local_port(deployment.broker_url, urlsplit(url).port or 0)) as worker,
    ):
        assert is_connected.wait(PATIENCE_S)
        worker.process.signal(signal.SIGTERM)
        assert worker.process.wait() == 0
        assert worker.events[-1]["event"] == "worker_stopped"


def test_a_worker_stops_on_sigterm_while_its_probe_is_answered(deployment: Deployment) -> None:
    """The probe is finished and acknowledged; commands that were not sent remain in the queue."""
    pause = {"WORKER_PAUSE_AFTER_FAILURES": "1", "WORKER_PROBE_INTERVAL": "0.1"}
    deployment.simulator.faults.replace([Fault(kind="too_many_requests", seconds=0)])
    with deployment.worker(**pause) as worker:
        deployment.upstream.publish(a_command(command_id="first", imei="865820030000001"))
        worker.wait_for("consumption_paused")
        deployment.simulator.faults.replace([Fault(kind="late_caching", seconds=2)])
        asked = len(deployment.simulator.requests)
        ids = publish_many(deployment, 20)
        wait_until(lambda: len(deployment.simulator.requests) > asked, PATIENCE_S, "the probe")
        worker.process.signal(signal.SIGTERM)
        assert worker.process.wait() == 0
        assert worker.wait_for("command_accepted")
    deployment.simulator.faults.replace([])
    with deployment.worker():
        replies = {reply["command_id"]: reply["status"] for reply in deployment.upstream.replies(len(ids) + 1)}
    assert replies == dict.fromkeys([*ids, "first"], "accepted")
