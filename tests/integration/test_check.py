"""``onenet-worker check``: what it says of a world that is well, and of each thing that is not."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from tests.support.rig import API_KEY, PATIENCE_S, Rig, raw_server
from worker.amqp.blocking import declare_on
from worker.dev.services.ports import free_port
from worker.simulator.faults import Fault


def check(rig: Rig, *arguments: str, **changes: str) -> tuple[int, dict[str, list[str]]]:
    """Return the exit code, and what it says of each thing that is not well; ``""`` is the raw output."""
    environment = {
        "AMQP_URL": rig.broker_url,
        "ONENET_URL": rig.simulator.url,
        "ONENET_API_KEY": API_KEY,
        "WORKER_NAMESPACE": rig.topology.namespace,
        "WORKER_RETRY_DELAYS": ",".join(str(delay_s) for delay_s in sorted(rig.topology.retry_delays_s)),
        "ONENET_CONNECT_TIMEOUT": "1",
        "ONENET_READ_TIMEOUT": "1",
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(Path.cwd()),
        "NO_PROXY": "127.0.0.1",
    }
    said = subprocess.run(
        [sys.executable, "-m", "worker", "check", "--json", *arguments],
        cwd=rig.folder,
        env=environment | changes,
        capture_output=True,
        text=True,
        timeout=3 * PATIENCE_S,
        check=False,
    )
    assert said.stderr == ""
    findings = [json.loads(line) for line in said.stdout.splitlines()]
    faults: dict[str, list[str]] = {"": [said.stdout]}
    for finding in findings:
        if not finding["ok"]:
            faults.setdefault(finding["check"], []).append(finding["detail"])
    return said.returncode, faults


def _swallow(sock: socket.socket) -> None:
    while sock.recv(65536):
        pass


def test_when_all_is_well_it_exits_0_and_has_sent_nothing(rig: Rig, redis_url: str) -> None:
    declare_on(rig.upstream.channel, rig.topology)
    code, faults = check(rig, IDEMPOTENCY_URL=redis_url)
    assert code == 0, faults
    assert rig.simulator.platform.commands == []


def test_a_topology_that_is_not_there_is_not_made(rig: Rig) -> None:
    for _ in range(2):
        code, faults = check(rig)
        assert code == 1
        [fault] = faults["topology"]
        assert rig.topology.execute_queue in fault
        assert "onenet-worker topology" in fault


def test_a_topology_that_differs_is_named(rig: Rig) -> None:
    queue = rig.topology.dead_letters_exchange
    rig.upstream.channel.queue_declare(queue, durable=True, arguments={"x-queue-type": "quorum"})
    for exchange in rig.topology.exchanges():
        rig.upstream.channel.exchange_declare(exchange.name, exchange.kind, durable=True, arguments=exchange.arguments)
    for wanted in rig.topology.queues():
        if wanted.name != queue:
            rig.upstream.channel.queue_declare(wanted.name, durable=True, arguments=wanted.arguments)
    code, faults = check(rig)
    assert code == 1
    [fault] = faults["topology"]
    assert "x-delivery-limit" in fault
    assert check(rig, AMQP_DECLARE="false")[0] == 0  # who may not declare cannot compare


def test_wrong_settings_are_one_line_each(rig: Rig) -> None:
    code, faults = check(rig, WORKER_CONCURRENCY="many", LOG_LEVEL="loud", ONENET_API_KEY="the key")
    assert code == 1
    assert [line.split(":")[0] for line in faults["settings"]] == ["ONENET_API_KEY", "WORKER_CONCURRENCY", "LOG_LEVEL"]
    assert "the key" not in faults[""][0]


def test_each_thing_that_cannot_be_reached_is_named_without_its_secrets(rig: Rig) -> None:
    port = free_port()
    code, faults = check(
        rig,
        AMQP_URL=f"amqp://me:aSecret@127.0.0.1:{port}/",
        IDEMPOTENCY_URL=f"redis://:aSecret@127.0.0.1:{port}/0",
        ONENET_URL=f"https://127.0.0.1:{port}",
        ONENET_API_KEY="aSecret",
    )
    assert code == 1
    assert faults.keys() == {"", "broker", "idempotency", "OneNET"}
    assert "aSecret" not in faults[""][0]


def test_what_never_answers_does_not_hold_it_up(rig: Rig) -> None:
    with raw_server(_swallow) as url:
        silent = url.removeprefix("http://")
        code, faults = check(
            rig, AMQP_URL=f"amqp://{silent}/", IDEMPOTENCY_URL=f"redis://{silent}/0", ONENET_URL=f"http://{silent}"
        )
    assert code == 1
    assert faults.keys() == {"", "broker", "idempotency", "OneNET"}


def test_every_product_is_tried_with_its_own_credentials(rig: Rig) -> None:
    declare_on(rig.upstream.channel, rig.topology)
    products = rig.folder / "products.json"
    products.write_text(json.dumps({"good": {"api_key": API_KEY}, "bad": {"api_key": "another"}}))
    code, faults = check(rig, ONENET_PRODUCTS_FILE=str(products))
    assert code == 1
    [fault] = faults["OneNET, product bad"]
    assert "credentials" in fault
    assert faults.keys() == {"", "OneNET, product bad"}


def test_credentials_that_are_refused_in_the_words_of_the_live_platform_fail_the_check(rig: Rig) -> None:
    """It answers errno 3, with HTTP 200."""
    declare_on(rig.upstream.channel, rig.topology)
    rig.simulator.faults.replace([Fault(kind="errno", errno=3, error="token鉴权失败", endpoint="history")])
    code, faults = check(rig, "--imei", "865820030000001")
    assert code == 1
    [fault] = faults["OneNET"]
    assert "refuses the credentials" in fault
    assert "device 865820030000001" in fault
    assert "--imei" in fault
    assert fault.endswith("errno 3: token鉴权失败")
    assert faults.keys() == {"", "OneNET"}
