"""The compose file: three workers, one of which is killed, with broker, store, simulator and Prometheus."""

import json
import os
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import pytest
import requests

from scripts.documents import alerts
from tests.support.builders import a_command
from tests.support.docker_engine import docker, inspect
from tests.support.monitoring import expressions, selectors
from tests.support.waiting import PATIENCE_S
from worker.dev.services.ports import wait_until

WORKERS = 3
TARGET_OPTIONS = ("--imei", "865820030000001", "--obj-id", "3311", "--obj-inst-id", "0", "--res-id", "5850")


class Stack:
    """One project of docker/compose.yaml on free ports."""

    def __init__(self, image: str) -> None:
        self._project = f"onenet-test-{uuid4().hex[:8]}"
        ports = ("AMQP_PORT", "MANAGEMENT_PORT", "SIMULATOR_PORT", "PROMETHEUS_PORT")
        self._environment = dict.fromkeys(ports, "0") | {"WORKER_IMAGE": image}

    def command(self, *arguments: str) -> list[str]:
        files = ("--file", "docker/compose.yaml", "--file", "tests/containers/faster.yaml")
        return ["compose", "--project-name", self._project, *files, *arguments]

    def compose(self, *arguments: str) -> str:
        """Run ``docker compose``; returns its stdout."""
        return docker(*self.command(*arguments), environment=self._environment)

    def popen(self, *arguments: str) -> "subprocess.Popen[str]":
        """Start ``docker compose`` and return at once."""
        return subprocess.Popen(
            ["docker", *self.command(*arguments)],
            env=os.environ | self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def ids(self, service: str, *options: str) -> list[str]:
        """Return the ids of a service's containers."""
        return self.compose("ps", "--quiet", *options, service).split()

    def get(self, service: str, port: int, path: str, **query: str) -> Any:
        """Send a GET request to the port that a service publishes on this machine; returns the JSON."""
        address = self.compose("port", service, str(port)).strip()
        assert address.startswith("127.0.0.1:")
        answer = requests.get(f"http://{address}{path}", params=query, timeout=PATIENCE_S)
        answer.raise_for_status()
        return answer.json()

    def cached(self) -> list[dict[str, Any]]:
        """Return the commands that the platform has cached."""
        found: list[dict[str, Any]] = self.get("simulator", 8580, "/control/commands")
        return found


@pytest.fixture(scope="module")
def stack(image: str) -> Iterator[Stack]:
    found = Stack(image)
    try:
        found.compose("up", "--build", "--wait", "--scale", f"worker={WORKERS}")
        yield found
    finally:
        found.compose("--profile", "monitoring", "down", "--volumes", "--timeout", "5")


@pytest.fixture(scope="module")
def prometheus(stack: Stack) -> Stack:
    """Return the stack with Prometheus, after all its targets have been scraped."""
    stack.compose("up", "--wait", "--no-deps", "prometheus")

    def all_scraped() -> bool:
        targets = stack.get("prometheus", 9090, "/api/v1/targets")["data"]["activeTargets"]
        up = Counter(target["labels"]["job"] for target in targets if target["health"] == "up")
        return up == {"onenet-worker": WORKERS, "rabbitmq": 1, "rabbitmq-queues": 1}

    wait_until(all_scraped, PATIENCE_S, "three workers and the broker as targets")
    return stack


def test_send_in_the_composed_worker_gets_a_reply(stack: Stack) -> None:
    output = stack.compose("run", "--rm", "-T", "worker", "send", *TARGET_OPTIONS, "--args", "on", "--wait")
    assert json.loads(output)["status"] == "accepted"


def test_the_broker_has_no_guest_and_its_password_is_in_no_environment(stack: Stack) -> None:
    url = stack.compose("exec", "-T", "worker", "cat", "/run/broker-access/amqp-url").strip()
    password = urlsplit(url).password
    assert password
    for service in ("worker", "rabbitmq", "simulator", "redis"):
        for identity in stack.ids(service):
            assert password not in json.dumps(inspect(identity))
    users = stack.compose("exec", "-T", "rabbitmq", "rabbitmqctl", "--quiet", "list_users", "--formatter", "json")
    assert [user["user"] for user in json.loads(users)] == ["onenet"]


def test_prometheus_loads_all_alert_rules_without_an_error(prometheus: Stack) -> None:
    groups = prometheus.get("prometheus", 9090, "/api/v1/rules")["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert [rule["name"] for rule in rules] == [rule["alert"] for rule in alerts()]
    assert not [rule["lastError"] for rule in rules if rule.get("lastError")]


def test_prometheus_scrapes_every_metric_that_dashboard_and_alerts_query(prometheus: Stack) -> None:
    shown = set(prometheus.get("prometheus", 9090, "/api/v1/label/__name__/values")["data"])
    assert {selector.name for selector in selectors()} <= shown


def test_prometheus_evaluates_every_expression_of_dashboard_and_alerts(prometheus: Stack) -> None:
    for expression in set(expressions()):
        assert prometheus.get("prometheus", 9090, "/api/v1/query", query=expression)["status"] == "success"


def test_a_killed_worker_container_loses_no_command_and_sends_none_twice(stack: Stack, tmp_path: Path) -> None:
    ids = [f"killed-{number}" for number in range(300)]
    commands = tmp_path / "commands.jsonl"
    lines = [
        json.dumps(a_command(command_id=name, args=name, imei=str(865820030000000 + number % 50)))
        for number, name in enumerate(ids)
    ]
    commands.write_text("\n".join(lines))
    commands.chmod(0o644)
    mount = f"{commands}:/commands.jsonl:ro"
    sending = stack.popen(
        "run", "--rm", "-T", "--volume", mount, "worker", "send", "--file", "/commands.jsonl", "--wait"
    )

    def cached() -> Counter[str]:
        return Counter(command["args"] for command in stack.cached() if command["args"] in ids)

    wait_until(lambda: cached().total() >= 60, PATIENCE_S, "the first commands")
    docker("kill", stack.ids("worker")[0])
    assert cached().total() < len(ids)  # the kill came before the last command
    output, _ = sending.communicate()
    assert sending.returncode == 0
    replies = [json.loads(line) for line in output.splitlines()]
    assert {reply["command_id"]: reply["status"] for reply in replies} == dict.fromkeys(ids, "accepted")
    assert len(replies) == len(ids)
    assert cached() == Counter(ids)


def test_the_worker_containers_stop_gracefully(stack: Stack) -> None:
    running = stack.ids("worker")
    stack.compose("stop", "worker")
    assert [inspect(identity)["State"]["ExitCode"] for identity in running] == [0] * (WORKERS - 1)
