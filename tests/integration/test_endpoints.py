"""What a worker says of itself over HTTP: ``/livez``, ``/readyz`` and ``/metrics``."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from tests.support.builders import a_command
from tests.support.deployment import Deployment
from tests.support.simulator import onenet
from tests.support.startup_code import run_at_startup
from tests.support.waiting import PATIENCE_S
from worker.dev.services.broker import LocalBroker
from worker.dev.services.ports import free_port, wait_until
from worker.errors import EXIT_CONFIG
from worker.simulator.faults import Fault

# A minute is long for a test: what these change is how long a worker waits, not what it does.
HASTY = """
import worker.monitor
from worker.telemetry.health import Health
worker.monitor._POLL_INTERVAL_S = 0.1
begin = Health.__init__
Health.__init__ = lambda health, stall_s, *rest: begin(health, 1, *rest)
"""
DEAF = """
from worker.amqp.consumer import QueueConsumer
async def consume(consumer, prefetch):
    consumer._prefetch = prefetch
QueueConsumer.consume = consume
"""
WEDGED = """
import threading
import worker.telemetry.health
from worker.amqp.consumer import QueueConsumer
worker.telemetry.health.MAX_SILENCE_S = 2
QueueConsumer._on_message = lambda *_: threading.Event().wait()
"""


@dataclass
class Page:
    """An answer over HTTP."""

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


class Watched:
    """A worker's HTTP server, as a probe sees it."""

    def __init__(self) -> None:
        self.port = free_port()
        self.settings = {"HTTP_PORT": str(self.port)}

    def get(self, path: str) -> Page:
        answer = requests.get(f"http://127.0.0.1:{self.port}{path}", timeout=PATIENCE_S)
        return Page(answer.status_code, answer.text)

    def wait_for_ready_messages(self) -> None:
        """Wait until it has seen commands in its queue."""
        wait_until(lambda: self.get("/metrics").value("queue_ready_messages") > 0, PATIENCE_S, "a look at the queue")

    def stays_live(self, seconds: float) -> bool:
        """Tell whether it is live, however often it is asked, for so long."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.get("/livez").status != HTTPStatus.OK:
                return False
        return True

    def wait_for(self, path: str, status: int, **facts: object) -> dict[str, Any]:
        """Wait until a probe has an answer with these facts; returns all that it says."""
        found: dict[str, Any] = {}

        def is_there() -> bool:
            page = self.get(path)
            found.clear()
            found.update(json.loads(page.text))
            return page.status == status and facts.items() <= found.items()

        wait_until(is_there, PATIENCE_S, f"{status} at {path}")
        return found


def listening(pid: int) -> list[str]:
    """Return the sockets on which a process listens."""
    own = {str(entry.readlink()) for entry in Path(f"/proc/{pid}/fd").iterdir()}
    lines = [*Path("/proc/net/tcp").read_text().splitlines(), *Path("/proc/net/tcp6").read_text().splitlines()]
    fields = [line.split() for line in lines]
    return [socket for _, socket, _, state, *rest in fields if state == "0A" and f"socket:[{rest[5]}]" in own]


@pytest.fixture
def watched() -> Watched:
    return Watched()


@pytest.fixture
def breakable(own_broker: LocalBroker, tmp_path: Path) -> Iterator[Deployment]:
    with onenet() as simulator, Deployment.set_up(own_broker.url, tmp_path, simulator) as deployment:
        yield deployment


def test_a_worker_counts_what_becomes_of_commands(deployment: Deployment, watched: Watched) -> None:
    with deployment.worker(**watched.settings) as worker:
        assert watched.get("/metrics").value("last_success_timestamp_seconds") == 0
        twice = a_command(command_id="a")
        deployment.upstream.publish(twice)
        assert deployment.upstream.reply().json["status"] == "accepted"
        deployment.upstream.publish(twice)
        deployment.upstream.publish(a_command(imei="865820039999999"))
        deployment.upstream.publish(a_command(imei="1"))
        assert {reply["status"] for reply in deployment.upstream.replies(3)} == {"accepted", "rejected", "failed"}
        wait_until(lambda: watched.get("/metrics").value("unacknowledged") == 0, PATIENCE_S, "the acknowledgements")
        page = watched.get("/metrics")
        assert page.value("commands_total", outcome="accepted", reason="answered") == 1
        assert page.value("commands_total", outcome="accepted", reason="recovered") == 0
        assert page.value("commands_total", outcome="rejected", reason="onenet_rejected") == 1
        assert page.value("commands_total", outcome="failed", reason="invalid_command") == 1
        assert page.value("dead_letters_total", reason="invalid_command") == 1
        assert page.value("duplicates_total") == 1
        assert page.value("request_duration_seconds_count", result="cached") == 1
        assert page.value("request_duration_seconds_count", result="refused") == 1
        assert page.value("command_duration_seconds_count", outcome="accepted") == 2  # the repeated reply is one too
        assert page.value("command_duration_seconds_count", outcome="failed") == 1
        assert page.value("last_success_timestamp_seconds") > 1.7e9
        assert page.value("in_flight") == 0
        assert page.value("concurrency") == 32
        assert page.value("paused", product="") == 0
        assert page.value("broker_connected") == page.value("consuming") == 1
        assert page.value("broker_blocked") == 0
        assert worker.events[-1]["level"] == "warning"  # and the server has said nothing


def test_retries_and_doubts_are_counted_and_the_time_of_a_command_has_all_its_rests_in_it(
    tmp_path: Path, broker_url: str, watched: Watched
) -> None:
    busy = Fault(kind="too_many_requests", count=1, imei="865820030000001", seconds=0)
    lost = Fault(kind="drop_after_caching", count=1, imei="865820030000002")
    with (
        onenet(busy, lost) as simulator,
        Deployment.set_up(broker_url, tmp_path, simulator) as deployment,
        deployment.worker(**watched.settings),
    ):
        deployment.upstream.publish(a_command(imei="865820030000001"))
        deployment.upstream.reply()
        deployment.upstream.publish(a_command(imei="865820030000002"))
        assert deployment.upstream.reply().json["recovered"]
        page = watched.get("/metrics")
        assert page.value("retries_total") == 1
        assert page.value("in_doubt_total") == 1
        assert page.value("commands_total", outcome="accepted", reason="recovered") == 1
        assert page.value("request_duration_seconds_count", result="not_sent") == 1
        assert page.value("request_duration_seconds_count", result="in_doubt") == 1
        assert page.value("command_duration_seconds_bucket", outcome="accepted", le="0.5") == 0  # both rested


def test_a_worker_is_live_but_not_ready_without_a_broker_and_ready_with_one(
    breakable: Deployment, own_broker: LocalBroker, watched: Watched
) -> None:
    with breakable.worker(**watched.settings) as worker:
        assert watched.wait_for("/readyz", 200)["ready"]
        own_broker.kill()
        watched.wait_for("/readyz", 503, broker_connected=False, live=True)
        assert watched.get("/livez").status == 200
        assert watched.get("/metrics").value("broker_connected") == 0
        own_broker.start()
        breakable.upstream.connect()
        worker.wait_for("consumer_started", count=2)
        watched.wait_for("/readyz", 200)


def test_a_worker_without_its_store_is_not_ready(deployment: Deployment, watched: Watched) -> None:
    nowhere = f"redis://127.0.0.1:{free_port()}/0"
    with deployment.worker(**watched.settings, IDEMPOTENCY_URL=nowhere):
        watched.wait_for("/readyz", 503, store_reachable=False, broker_connected=True)


def test_a_wedged_amqp_thread_is_not_live(deployment: Deployment, tmp_path: Path, watched: Watched) -> None:
    with deployment.worker(**watched.settings, **run_at_startup(tmp_path, WEDGED)):
        watched.wait_for("/livez", 200)
        deployment.upstream.publish(a_command())
        assert watched.wait_for("/livez", 503)["event_loop_silent_s"] >= 2
        assert watched.get("/metrics").status == 200


def test_a_worker_that_takes_nothing_from_its_queue_is_not_live(
    deployment: Deployment, tmp_path: Path, watched: Watched
) -> None:
    with deployment.worker(**watched.settings, **run_at_startup(tmp_path, HASTY + DEAF)):
        watched.wait_for("/livez", 200)
        deployment.upstream.publish(a_command())
        assert watched.wait_for("/livez", 503)["ready_messages"] == 1
        assert watched.get("/metrics").value("queue_ready_messages") == 1


def test_a_worker_that_is_paused_stays_live_and_says_so(tmp_path: Path, broker_url: str, watched: Watched) -> None:
    with onenet(Fault(kind="error_503")) as simulator, Deployment.set_up(broker_url, tmp_path, simulator) as deployment:
        settings = watched.settings | run_at_startup(tmp_path, HASTY) | {"WORKER_PAUSE_AFTER_FAILURES": "1"}
        with deployment.worker(**settings, WORKER_PROBE_INTERVAL="3600") as worker:
            deployment.upstream.publish(a_command())
            worker.wait_for("consumption_paused")
            deployment.upstream.publish(a_command())
            watched.wait_for_ready_messages()
            page = watched.get("/metrics")
            assert (page.value("paused", product=""), page.value("consuming")) == (1, 0)
            assert watched.stays_live(3)
            assert watched.get("/readyz").status == 200


def test_a_worker_whose_rate_is_used_up_stays_live(deployment: Deployment, tmp_path: Path, watched: Watched) -> None:
    settings = watched.settings | run_at_startup(tmp_path, HASTY) | {"WORKER_CONCURRENCY": "1"}
    with deployment.worker(**settings, ONENET_RATE_LIMIT="1/hour"):
        for _ in range(20):
            deployment.upstream.publish(a_command())
        deployment.upstream.reply()
        watched.wait_for_ready_messages()
        assert watched.stays_live(3)


def test_what_is_not_there_is_said(deployment: Deployment, watched: Watched) -> None:
    with deployment.worker(**watched.settings):
        page = watched.get("/")
        assert (page.status, page.text) == (404, "there are /livez, /readyz, /metrics\n")


def test_port_0_turns_it_off(deployment: Deployment) -> None:
    with deployment.worker(HTTP_PORT="0") as worker:
        deployment.upstream.publish(a_command())
        assert deployment.upstream.reply().json["status"] == "accepted"
        assert not listening(worker.process.pid)


def test_a_port_that_is_taken_stops_the_start(deployment: Deployment, watched: Watched) -> None:
    with deployment.worker(**watched.settings):
        second = deployment.start_worker(**watched.settings)
        assert second.process.wait() == EXIT_CONFIG
        text = second.process.output.read_text()
        assert f"HTTP_HOST, HTTP_PORT: cannot listen on 127.0.0.1:{watched.port}: Address already in use" in text
