"""A store that refuses: said once, everywhere; commands wait, and those that expire end."""

import json
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.support.builders import a_command, in_hours
from tests.support.checks import check
from tests.support.deployment import SOON_CERTAIN, Deployment
from tests.support.redis_servers import Server, patient, replicated, sentinel_url, watched
from tests.support.startup_code import run_at_startup
from tests.support.waiting import PATIENCE_S
from tests.support.worker_process import WorkerProcess
from worker.dev.services.ports import free_port, wait_until
from worker.errors import EXIT_CONFIG

MANY = 10


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


def fill_memory(client: Any) -> None:
    client.config_set("maxmemory", 1)


def want_replicas(client: Any) -> None:
    client.config_set("min-replicas-to-write", 1)


def demote(client: Any) -> None:
    client.replicaof("127.0.0.1", free_port())


def forbid_scripts(client: Any) -> None:
    client.execute_command("ACL", "SETUSER", "default", "-eval", "-evalsha")


def forbid_the_keys(client: Any) -> None:
    client.execute_command("ACL", "SETUSER", "default", "resetkeys", "~other:*")


def fail_to_save(client: Any) -> None:
    """A snapshot fails, as on a full disk: its file is a folder."""
    Path(client.config_get("dir")["dir"], client.config_get("dbfilename")["dbfilename"]).mkdir()
    client.config_set("save", "3600 1")
    client.bgsave()
    wait_until(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err", PATIENCE_S, "a failed snapshot")


def repair(client: Any) -> None:
    client.config_set("save", "")
    client.execute_command("ACL", "SETUSER", "default", "+@all", "~*")
    client.replicaof("NO", "ONE")
    client.config_set("min-replicas-to-write", 0)
    client.config_set("maxmemory", 0)


REFUSALS = [
    (fill_memory, "OOM"),
    (want_replicas, "NOREPLICAS"),
    (demote, "READONLY"),
    (forbid_scripts, "NOPERM"),
    (forbid_the_keys, "NOPERM"),
    (fail_to_save, "MISCONF"),
]


# A worker that asks the server whether it is well gives it time, however slow the machine.
PATIENT = "import worker.idempotency.redis\nreplace(worker.idempotency.redis, 'PING_S', 60.0)\n"


def events(worker: WorkerProcess, name: str) -> list[dict[str, Any]]:
    return [event for event in worker.events if event["event"] == name]


def in_seconds(seconds: float) -> str:
    return (datetime.now(UTC) + timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")


@pytest.mark.parametrize(("refuse", "code"), REFUSALS)
def test_a_store_that_refuses_is_said_once_and_nothing_is_lost(
    deployment: Deployment, server: Server, refuse: Any, code: str
) -> None:
    port = free_port()
    ids = [f"c{number}" for number in range(MANY)]
    with (
        server.client() as client,
        deployment.worker(
            **SOON_CERTAIN,
            IDEMPOTENCY_URL=patient(server.url),
            HTTP_PORT=str(port),
            **run_at_startup(deployment.folder, PATIENT),
        ) as worker,
    ):
        refuse(client)
        for command_id in ids:
            deployment.upstream.publish(a_command(command_id=command_id, args=command_id, expired_time=in_hours(1)))
        assert worker.wait_for("store_unavailable")["reason"].startswith(f"Redis: {code}: ")

        def is_named_by_the_probe() -> bool:
            response = requests.get(f"http://127.0.0.1:{port}/readyz", timeout=PATIENCE_S)
            assert response.status_code == 503
            return f"Redis: {code}: " in response.json()["store_error"]

        wait_until(is_named_by_the_probe, PATIENCE_S, "the reason")  # a slow machine exceeds the time of one probe
        assert (
            "onenet_worker_store_available 0.0"
            in requests.get(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE_S).text
        )
        deployment.upstream.publish(a_command(command_id="brief", args="brief", expired_time=in_seconds(3)))
        brief = deployment.upstream.reply(3 * PATIENCE_S).json
        assert (brief["command_id"], brief["error"]["code"]) == ("brief", "expired")
        assert deployment.simulator.platform.commands == []
        repair(client)
        worker.wait_for("store_available")
        replies = [deployment.upstream.reply(3 * PATIENCE_S).json for _ in ids]
        assert {reply["command_id"] for reply in replies} == set(ids)
        assert all(reply["status"] == "accepted" for reply in replies)
        assert len(events(worker, "store_unavailable")) == len(events(worker, "store_available")) == 1
    assert [deployment.cached(command_id) for command_id in ids] == [1] * MANY


def test_a_rate_limit_that_is_refused_is_said_once_and_nothing_is_sent_above_it(
    deployment: Deployment, server: Server
) -> None:
    """Redis may permit the keys of the records, and not those of the limit."""
    ids = [f"c{number}" for number in range(MANY)]
    with (
        server.client() as client,
        deployment.worker(IDEMPOTENCY_URL=server.url, ONENET_RATE_LIMIT="300/second") as worker,
    ):
        keys = ("~*:command:*", "~*:alike:*", "~*:uuid:*", "~*:epoch")
        client.execute_command("ACL", "SETUSER", "default", "resetkeys", *keys)
        for command_id in ids:
            deployment.upstream.publish(a_command(command_id=command_id, args=command_id, expired_time=in_hours(1)))
        assert worker.wait_for("store_unavailable")["reason"].startswith("Redis: NOPERM: ")
        worker.wait_for("consumption_paused")
        _, faults = check(deployment, IDEMPOTENCY_URL=server.url)
        [fault] = faults["idempotency"]
        assert fault.startswith("Redis: NOPERM: ")
        _, faults = check(deployment, IDEMPOTENCY_URL=server.url, ONENET_RATE_LIMIT="off")
        assert "idempotency" not in faults
        assert deployment.simulator.platform.commands == []
        repair(client)
        worker.wait_for("store_available")
        replies = [deployment.upstream.reply(3 * PATIENCE_S).json for _ in ids]
        assert {(reply["command_id"], reply["status"]) for reply in replies} == {(each, "accepted") for each in ids}
        assert len(events(worker, "store_unavailable")) == 1
    assert [deployment.cached(command_id) for command_id in ids] == [1] * MANY


def test_a_refusal_is_not_logged_for_every_command(deployment: Deployment, server: Server) -> None:
    """The worker takes one command a second, in case it has expired."""
    with server.client() as client, deployment.worker(IDEMPOTENCY_URL=server.url) as worker:
        fill_memory(client)
        deployment.upstream.publish(a_command(command_id="first", expired_time=in_hours(1)))
        worker.wait_for("store_unavailable")
        worker.wait_for("consumption_paused")
        for number in range(500):
            deployment.upstream.publish(a_command(command_id=f"c{number}", expired_time=in_hours(1)))
        before, began = len(worker.events), time.monotonic()
        worker.wait_for("command_postponed", 4)
        assert len(worker.events) - before <= 10 + 5 * (time.monotonic() - began)


@pytest.mark.parametrize(("refuse", "code"), REFUSALS)
def test_check_does_what_the_work_does(deployment: Deployment, server: Server, refuse: Any, code: str) -> None:
    with server.client() as client:
        refuse(client)
    _, faults = check(deployment, IDEMPOTENCY_URL=server.url)
    [fault] = faults["idempotency"]
    assert fault.startswith(f"Redis: {code}: ")


def test_check_names_what_may_cost_records(deployment: Deployment, server: Server) -> None:
    with server.client() as client:
        client.config_set("maxmemory", "100mb")
        client.config_set("maxmemory-policy", "allkeys-lru")
        keys = client.keys()
        _, faults = check(deployment, IDEMPOTENCY_URL=server.url)
        left = set(client.keys()) - set(keys)
    lines = [json.loads(line) for line in faults[""][0].splitlines()]
    [detail] = [line["detail"] for line in lines if line["check"] == "idempotency" and line["ok"]]
    assert f"Redis at 127.0.0.1:{server.port}; version " in detail
    assert "warning: maxmemory-policy allkeys-lru removes records" in detail
    assert "warning: a restart of Redis loses records" in detail
    assert left == {f"{{{deployment.topology.namespace}}}:epoch"}


def test_a_store_that_hangs_costs_no_command(deployment: Deployment, server: Server) -> None:
    """A stopped process keeps its connections open, and accepts new ones."""
    port = free_port()
    ids = [f"c{number}" for number in range(MANY)]
    with deployment.worker(**SOON_CERTAIN, IDEMPOTENCY_URL=server.url, HTTP_PORT=str(port)) as worker:
        server.signal(signal.SIGSTOP)
        for command_id in ids:
            deployment.upstream.publish(a_command(command_id=command_id, args=command_id, expired_time=in_hours(1)))
        worker.wait_for("store_unavailable")
        assert requests.get(f"http://127.0.0.1:{port}/livez", timeout=PATIENCE_S).status_code == 200
        assert requests.get(f"http://127.0.0.1:{port}/readyz", timeout=PATIENCE_S).status_code == 503
        assert deployment.simulator.platform.commands == []
        server.signal(signal.SIGCONT)
        worker.wait_for("store_available")
        replies = [deployment.upstream.reply(3 * PATIENCE_S).json for _ in ids]
        assert {(reply["command_id"], reply["status"]) for reply in replies} == {(each, "accepted") for each in ids}
    assert [deployment.cached(command_id) for command_id in ids] == [1] * MANY


def test_a_password_that_changes_on_disk_is_used_by_the_next_connection(
    deployment: Deployment, server: Server, tmp_path: Path
) -> None:
    """By the store and by the rate limit; and a file that cannot be read for a while costs nothing."""
    secret = tmp_path / "idempotency-url"

    def set_password(password: str) -> None:
        client.execute_command("ACL", "SETUSER", "worker", "resetpass", f">{password}", "on", "~*", "+@all")
        secret.write_text(server.url.replace("redis://", f"redis://worker:{password}@"))

    def cut() -> None:
        for each in client.client_list():
            if each["user"] == "worker":
                client.client_kill_filter(each["id"])

    def send(command_id: str) -> None:
        deployment.upstream.publish(a_command(command_id=command_id, args=command_id))
        assert deployment.upstream.reply(3 * PATIENCE_S).json["status"] == "accepted"

    settings = {
        "IDEMPOTENCY_URL": "",
        "IDEMPOTENCY_URL_FILE": str(secret),
        "ONENET_RATE_LIMIT": "1000/second",
    }
    with server.client() as client:
        set_password("first")
        with deployment.worker(**SOON_CERTAIN, **settings) as worker:
            send("a")
            set_password("second")
            send("b")  # over the connections that there are
            cut()
            send("c")
            wait_until(lambda: len(client.client_list()) > 2, PATIENCE_S, "the connections of store and rate limit")
            text = secret.read_text()
            secret.unlink()
            cut()
            send("d")
            assert "IDEMPOTENCY_URL_FILE" in worker.wait_for("store_settings_unusable")["reason"]
            secret.write_text(text)
            assert "second" not in worker.process.output.read_text()
    assert [deployment.cached(command_id) for command_id in "abcd"] == [1] * 4


def test_a_cluster_ends_the_worker_with_one_line(deployment: Deployment) -> None:
    node = Server("--cluster-enabled", "yes")
    with ExitStack() as stack:
        stack.callback(node.close)
        _, faults = check(deployment, IDEMPOTENCY_URL=node.url)
        assert faults["idempotency"][0].startswith("Redis: CLUSTER: Redis Cluster is not supported")
        worker = stack.enter_context(deployment.start_worker(IDEMPOTENCY_URL=node.url))
        assert worker.wait_for("store_unusable")["reason"].startswith("Redis: CLUSTER: ")
        wait_until(lambda: not worker.process.is_running, PATIENCE_S, "the end of the worker")
        assert worker.events[-1]["exit_code"] == EXIT_CONFIG


def test_a_fleet_goes_on_when_the_sentinels_fail_over(deployment: Deployment) -> None:
    with (
        replicated() as pair,
        watched(pair[0]) as sentinels,
        deployment.worker(**SOON_CERTAIN, IDEMPOTENCY_URL=sentinel_url(sentinels)) as worker,
    ):
        deployment.upstream.publish(a_command(command_id="a", args="a", expired_time=in_hours(1)))
        assert deployment.upstream.reply().json["status"] == "accepted"
        pair[0].kill()
        deployment.upstream.publish(a_command(command_id="b", args="b", expired_time=in_hours(1)))
        assert deployment.upstream.reply(4 * PATIENCE_S).json["status"] == "accepted"
        assert len(events(worker, "worker_started")) == 1
    assert [deployment.cached(command_id) for command_id in "ab"] == [1, 1]
