"""The endpoints of a worker: ``/livez``, ``/readyz`` and ``/metrics``."""

import json
import resource
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from tests.support.builders import a_command
from tests.support.deployment import Deployment
from tests.support.proxies import Proxy
from tests.support.simulator import onenet
from tests.support.startup_code import run_at_startup
from tests.support.waiting import PATIENCE_S
from worker.amqp.blocking import declare_on
from worker.dev.services.broker import LocalBroker
from worker.dev.services.ports import free_port, wait_until
from worker.errors import EXIT_CONFIG
from worker.simulator.faults import Fault

# Startup code of workers; the first shortens waits that are too long for a test.
SHORT_WAITS = """
import worker.monitor
from worker.telemetry.health import Health
replace(worker.monitor, "_POLL_INTERVAL_S", 0.1)
begin = Health.__init__
replace(Health, "__init__", lambda health, stall_s, *others: begin(health, 1, *others))
"""
NO_DELIVERIES = """
from worker.amqp.consumer import QueueConsumer
async def consume(consumer, prefetch):
    consumer._prefetch = prefetch
replace(QueueConsumer, "consume", consume)
"""
BLOCKED_EVENT_LOOP = """
import threading
import worker.telemetry.health
from worker.amqp.consumer import QueueConsumer
replace(worker.telemetry.health, "MAX_SILENCE_S", 2)
replace(QueueConsumer, "_on_message", lambda *_: threading.Event().wait())
"""


_FEWEST_PROBES = 10


@dataclass
class Response:
    """The response of an endpoint."""

    status: int
    text: str

    def value(self, name: str, **labels: str) -> float:
        """Return the value of one series."""
        found = [
            sample.value
            for family in text_string_to_metric_families(self.text)
            for sample in family.samples
            if sample.name == f"onenet_worker_{name}" and sample.labels == labels
        ]
        assert len(found) == 1, (name, labels)
        return found[0]


class Endpoints:
    """The endpoints of one worker, as a probe reads them."""

    def __init__(self) -> None:
        self.port = free_port()
        self.settings = {"HTTP_PORT": str(self.port)}

    def get(self, path: str) -> Response:
        response = requests.get(f"http://127.0.0.1:{self.port}{path}", timeout=PATIENCE_S)
        return Response(response.status_code, response.text)

    def wait_for_value(self, name: str, value: float) -> None:
        """Wait until a series without labels has a value."""
        wait_until(lambda: self.get("/metrics").value(name) == value, PATIENCE_S, f"{name} {value}")

    def wait_for_ready_messages(self) -> None:
        """Wait until the worker has observed ready messages in its queue."""
        wait_until(
            lambda: self.get("/metrics").value("queue_ready_messages") > 0, PATIENCE_S, "an observation of the queue"
        )

    def wait_until_it_stays_live(self, seconds: float = 3) -> None:
        """Wait until every probe of ``/livez`` succeeds for ``seconds``, much longer than the short waits.

        With so short waits a slow machine looks for a moment like a fault, which lasts.
        """

        def stays_live() -> bool:
            end, probes = time.monotonic() + seconds, 0
            while time.monotonic() < end or probes < _FEWEST_PROBES:
                if self.get("/livez").status != HTTPStatus.OK:
                    return False
                probes += 1
            return True

        wait_until(stays_live, PATIENCE_S, "a live worker")

    def wait_for(self, path: str, status: int, **facts: object) -> dict[str, Any]:
        """Wait until an endpoint answers with a status and with these facts; returns all facts."""
        found: dict[str, Any] = {}

        def is_there() -> bool:
            response = self.get(path)
            found.clear()
            found.update(json.loads(response.text))
            return response.status == status and facts.items() <= found.items()

        wait_until(is_there, PATIENCE_S, f"{status} at {path}")
        return found


def listening(pid: int) -> list[str]:
    """Return the sockets on which a process listens."""
    own = {str(entry.readlink()) for entry in Path(f"/proc/{pid}/fd").iterdir()}
    lines = [*Path("/proc/net/tcp").read_text().splitlines(), *Path("/proc/net/tcp6").read_text().splitlines()]
    fields = [line.split() for line in lines]
    return [socket for _, socket, _, state, *rest in fields if state == "0A" and f"socket:[{rest[5]}]" in own]


# No slow machine puts another command in doubt.
EXACT = {"ONENET_CONNECT_TIMEOUT": "5", "ONENET_READ_TIMEOUT": "15", "WORKER_RECONCILE_DELAY": "20"}


@pytest.fixture
def endpoints() -> Endpoints:
    return Endpoints()


@pytest.fixture
def breakable(own_broker: LocalBroker, tmp_path: Path) -> Iterator[Deployment]:
    with onenet() as simulator, Deployment.set_up(own_broker.url, tmp_path, simulator) as deployment:
        yield deployment


def test_the_metrics_count_the_outcomes_of_commands(deployment: Deployment, endpoints: Endpoints) -> None:
    with deployment.worker(**endpoints.settings) as worker:
        assert endpoints.get("/metrics").value("last_success_timestamp_seconds") == 0
        twice = a_command(command_id="a")
        deployment.upstream.publish(twice)
        assert deployment.upstream.reply().json["status"] == "accepted"
        deployment.upstream.publish(twice)
        deployment.upstream.publish(a_command(imei="865820039999999"))
        deployment.upstream.publish(a_command(imei="1"))
        assert {reply["status"] for reply in deployment.upstream.replies(3)} == {"accepted", "rejected", "failed"}
        endpoints.wait_for_value("unacknowledged", 0)
        response = endpoints.get("/metrics")
        assert response.value("commands_total", outcome="accepted", reason="answered") == 1
        assert response.value("commands_total", outcome="accepted", reason="recovered") == 0
        assert response.value("commands_total", outcome="rejected", reason="onenet_rejected") == 1
        assert response.value("commands_total", outcome="failed", reason="invalid_command") == 1
        assert response.value("dead_letters_total", reason="invalid_command") == 1
        assert response.value("duplicates_total") == 1
        assert response.value("request_duration_seconds_count", result="cached") == 1
        assert response.value("request_duration_seconds_count", result="refused") == 1
        # the repeated reply counts too
        assert response.value("command_duration_seconds_count", outcome="accepted") == 2
        assert response.value("command_duration_seconds_count", outcome="failed") == 1
        assert response.value("last_success_timestamp_seconds") > 1.7e9
        assert response.value("in_flight") == 0
        assert response.value("concurrency") == 32
        assert response.value("paused", product="") == 0
        assert response.value("broker_connected") == response.value("consuming") == 1
        assert response.value("broker_blocked") == 0
        assert str(worker.events[-1]["event"]).startswith("command_")  # the HTTP server has logged nothing


def test_the_metrics_count_retries_and_doubts_and_the_command_duration_includes_delays(
    tmp_path: Path, broker_url: str, endpoints: Endpoints
) -> None:
    busy = Fault(kind="too_many_requests", count=1, imei="865820030000001", seconds=0)
    lost = Fault(kind="drop_after_caching", count=1, imei="865820030000002")
    with (
        onenet(busy, lost) as simulator,
        Deployment.set_up(broker_url, tmp_path, simulator) as deployment,
        deployment.worker(**endpoints.settings, **EXACT),
    ):
        deployment.upstream.publish(a_command(imei="865820030000001"))
        deployment.upstream.reply()
        deployment.upstream.publish(a_command(imei="865820030000002"))
        assert deployment.upstream.reply().json["recovered"]
        endpoints.wait_for_value("unacknowledged", 0)
        response = endpoints.get("/metrics")
        assert response.value("retries_total") == 1
        assert response.value("in_doubt_total") == 1
        assert response.value("commands_total", outcome="accepted", reason="recovered") == 1
        assert response.value("request_duration_seconds_count", result="not_sent") == 1
        assert response.value("request_duration_seconds_count", result="in_doubt") == 1
        quick = response.value("command_duration_seconds_bucket", outcome="accepted", le="0.5")
        assert quick == 0  # both waited in a delay queue


def test_a_worker_is_live_but_not_ready_without_a_broker_and_ready_with_one(
    breakable: Deployment, own_broker: LocalBroker, endpoints: Endpoints
) -> None:
    with breakable.worker(**endpoints.settings) as worker:
        assert endpoints.wait_for("/readyz", 200)["ready"]
        own_broker.kill()
        endpoints.wait_for("/readyz", 503, broker_connected=False, live=True)
        assert endpoints.get("/livez").status == 200
        assert endpoints.get("/metrics").value("broker_connected") == 0
        own_broker.start()
        breakable.upstream.connect()
        worker.wait_for("consumer_started", count=2)
        endpoints.wait_for("/readyz", 200)


def test_commands_that_wait_for_their_result_are_counted_again_after_a_broker_kill(
    own_broker: LocalBroker, endpoints: Endpoints, tmp_path: Path
) -> None:
    with (
        onenet() as simulator,
        Deployment.set_up(own_broker.url, tmp_path, simulator, result_delays_s=(3600,)) as deployment,
        deployment.worker(**endpoints.settings) as worker,
    ):
        for number in range(3):
            deployment.upstream.publish(a_command(command_id=f"c{number}"))
        endpoints.wait_for_value("results_outstanding", 3)
        own_broker.kill()
        worker.wait_for("broker_connection_lost", count=2)
        own_broker.start()
        deployment.upstream.connect()
        deployment.upstream.publish(a_command(command_id="c3"))
        endpoints.wait_for_value("results_outstanding", 4)


def test_a_worker_without_its_store_is_not_ready(deployment: Deployment, endpoints: Endpoints) -> None:
    nowhere = f"redis://127.0.0.1:{free_port()}/0"
    with deployment.start_worker(**endpoints.settings, IDEMPOTENCY_URL=nowhere) as worker:
        worker.wait_for("broker_connected")
        endpoints.wait_for("/readyz", 503, store_reachable=False, broker_connected=True)


def test_a_worker_with_a_blocked_event_loop_is_not_live(
    deployment: Deployment, tmp_path: Path, endpoints: Endpoints
) -> None:
    with deployment.worker(**endpoints.settings, **run_at_startup(tmp_path, BLOCKED_EVENT_LOOP)):
        endpoints.wait_for("/livez", 200)
        deployment.upstream.publish(a_command())
        assert endpoints.wait_for("/livez", 503)["event_loop_silent_s"] >= 2
        assert endpoints.get("/metrics").status == 200


def test_a_worker_without_a_consumer_is_not_live(deployment: Deployment, tmp_path: Path, endpoints: Endpoints) -> None:
    with deployment.worker(**endpoints.settings, **run_at_startup(tmp_path, SHORT_WAITS + NO_DELIVERIES)):
        endpoints.wait_for("/livez", 200)
        deployment.upstream.publish(a_command())
        assert endpoints.wait_for("/livez", 503)["without_consumer_s"] >= 1
        assert endpoints.get("/metrics").value("queue_ready_messages") == 1


def test_a_standby_of_a_single_active_consumer_stays_live_and_ready(
    deployment: Deployment, tmp_path: Path, endpoints: Endpoints
) -> None:
    """The broker gives it nothing while another consumer is active, however many commands wait."""
    channel, queue = deployment.upstream.channel, deployment.topology.execute_queue
    declare_on(channel, deployment.topology)
    channel.queue_delete(queue)
    channel.queue_declare(queue, durable=True, arguments={"x-queue-type": "quorum", "x-single-active-consumer": True})
    channel.queue_bind(queue, deployment.topology.commands_exchange, "execute")
    channel.basic_qos(prefetch_count=1)
    channel.basic_consume(queue, lambda *_: None)  # takes one delivery and keeps it
    settings = endpoints.settings | run_at_startup(tmp_path, SHORT_WAITS)
    with (
        closing(Proxy(deployment.broker_url)) as proxy,
        deployment.worker(**settings, AMQP_DECLARE="false", AMQP_URL=proxy.url) as worker,
    ):
        for _ in range(3):
            deployment.upstream.publish(a_command())
        endpoints.wait_for_ready_messages()
        worker.wait_for("consumer_started", count=2)  # to be sure, it has reconnected once
        endpoints.wait_until_it_stays_live()
        proxy.cut()  # what it knows of the other consumer outlasts the connection
        worker.wait_for("consumer_started", count=3)
        endpoints.wait_until_it_stays_live()
        assert endpoints.wait_for("/readyz", 200)["ready"]
        assert len([event for event in worker.events if event["event"] == "consumer_started"]) == 3


def test_a_paused_worker_stays_live_and_is_not_ready(tmp_path: Path, broker_url: str, endpoints: Endpoints) -> None:
    with onenet(Fault(kind="error_503")) as simulator, Deployment.set_up(broker_url, tmp_path, simulator) as deployment:
        settings = endpoints.settings | run_at_startup(tmp_path, SHORT_WAITS) | {"WORKER_PAUSE_AFTER_FAILURES": "1"}
        with deployment.worker(**settings, WORKER_PROBE_INTERVAL="3600") as worker:
            deployment.upstream.publish(a_command())
            worker.wait_for("consumption_paused")
            deployment.upstream.publish(a_command())
            endpoints.wait_for_ready_messages()
            response = endpoints.get("/metrics")
            assert (response.value("paused", product=""), response.value("consuming")) == (1, 0)
            endpoints.wait_until_it_stays_live()
            endpoints.wait_for("/readyz", 503, paused=True, consuming=False, live=True)


def test_a_worker_that_may_not_publish_stays_live(
    own_broker: LocalBroker, tmp_path: Path, endpoints: Endpoints
) -> None:
    """A restart would not give it the right."""
    user, target = f"user-{uuid4().hex[:8]}", urlsplit(own_broker.url)
    own_broker.control("add_user", user, "password")
    own_broker.control("set_permissions", user, ".*", ".*", ".*")
    settings = endpoints.settings | run_at_startup(tmp_path, SHORT_WAITS) | {"WORKER_CONCURRENCY": "1"}
    settings |= {"AMQP_URL": f"amqp://{user}:password@{target.hostname}:{target.port}/"}
    with (
        onenet() as simulator,
        Deployment.set_up(own_broker.url, tmp_path, simulator) as deployment,
        deployment.worker(**settings) as worker,
    ):
        own_broker.control("set_permissions", user, ".*", "^$", ".*")
        for number in range(40):
            deployment.upstream.publish(a_command(command_id=f"c{number}", args=f"c{number}"))
        worker.wait_for("publication_refused", count=5)  # by then it waits for more than a second each time
        endpoints.wait_until_it_stays_live(5)
    own_broker.control("delete_user", user)


def test_a_worker_that_waits_for_its_rate_limit_stays_live(
    deployment: Deployment, tmp_path: Path, endpoints: Endpoints
) -> None:
    settings = endpoints.settings | run_at_startup(tmp_path, SHORT_WAITS) | {"WORKER_CONCURRENCY": "1"}
    with deployment.worker(**settings, ONENET_RATE_LIMIT="1/hour"):
        for _ in range(20):
            deployment.upstream.publish(a_command())
        deployment.upstream.reply()
        endpoints.wait_for_ready_messages()
        endpoints.wait_until_it_stays_live()


def test_an_unknown_path_is_answered_with_404_and_the_known_paths(deployment: Deployment, endpoints: Endpoints) -> None:
    with deployment.worker(**endpoints.settings):
        response = endpoints.get("/")
        assert (response.status, response.text) == (404, "there are /livez, /readyz, /metrics\n")


def test_http_port_0_turns_the_endpoints_off(deployment: Deployment) -> None:
    with deployment.worker(HTTP_PORT="0") as worker:
        deployment.upstream.publish(a_command())
        assert deployment.upstream.reply().json["status"] == "accepted"
        assert not listening(worker.process.pid)


def test_an_http_port_in_use_stops_the_start(deployment: Deployment, endpoints: Endpoints) -> None:
    with deployment.worker(**endpoints.settings):
        second = deployment.start_worker(**endpoints.settings)
        assert second.process.wait() == EXIT_CONFIG
        text = second.process.output.read_text()
        assert f"HTTP_HOST, HTTP_PORT: cannot listen on 127.0.0.1:{endpoints.port}: Address already in use" in text


def limited_to(open_files: int) -> str:
    """Return startup code of a worker that may open only so many files."""
    return f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, ({open_files}, {open_files}))
"""


def open_files(pid: int) -> int:
    return len([*Path(f"/proc/{pid}/fd").iterdir()])


def test_a_thousand_half_open_requests_hold_up_neither_probes_nor_commands(
    deployment: Deployment, tmp_path: Path, endpoints: Endpoints
) -> None:
    """They would take all descriptors of the worker, and with them its connections to the platform."""
    settings = endpoints.settings | run_at_startup(tmp_path, limited_to(256))
    with deployment.worker(**settings) as worker, ExitStack() as stack:
        for number in range(1000):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", endpoints.port), PATIENCE_S))
            client.sendall(b"GET /livez HTTP/1.1\r\nHost: "[: number % 30])
        assert endpoints.get("/livez").status == endpoints.get("/metrics").status == 200
        endpoints.wait_for("/readyz", 200)
        assert open_files(worker.process.pid) < 150
        for number in range(100):
            deployment.upstream.publish(a_command(imei=str(865820030000000 + number), args=f"c{number}"))
        assert {reply["status"] for reply in deployment.upstream.replies(100)} == {"accepted"}
        assert endpoints.get("/livez").status == 200


def test_a_worker_that_may_open_few_files_says_so_once_and_loses_no_command(
    deployment: Deployment, tmp_path: Path, endpoints: Endpoints
) -> None:
    """Requests for which there is no connection are repeated: they were not sent."""
    settings = endpoints.settings | run_at_startup(tmp_path, limited_to(40)) | {"WORKER_MAX_ATTEMPTS": "1000"}
    deployment.simulator.faults.replace([Fault(kind="hang", probability=0.2, seconds=0.5)])
    with deployment.worker(**settings) as worker:
        [warning] = [event for event in worker.events if event["event"] == "open_files_limited"]
        assert (warning["limit"], warning["needed"] > 100) == (40, True)
        for number in range(80):
            deployment.upstream.publish(a_command(imei=str(865820030000000 + number), args=f"c{number}"))
        replies = [deployment.upstream.reply(4 * PATIENCE_S).json for _ in range(80)]
    assert {reply["status"] for reply in replies} == {"accepted"}
    assert [deployment.cached(f"c{number}") for number in range(80)] == [1] * 80


def test_a_soft_limit_of_open_files_is_raised_to_what_the_worker_needs(deployment: Deployment, tmp_path: Path) -> None:
    startup = "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (64, 1024))\n"
    with deployment.worker(**run_at_startup(tmp_path, startup)) as worker:
        assert "open_files_limited" not in {event["event"] for event in worker.events}
        soft, hard = resource.prlimit(worker.process.pid, resource.RLIMIT_NOFILE)
        assert (soft > 100, hard) == (True, 1024)
