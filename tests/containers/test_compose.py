"""The compose file: three workers, one of which is killed, with broker, store, simulator and Prometheus."""

import json
import os
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import pika
import pytest
import requests
from pika.exceptions import ChannelClosedByBroker

from scripts.documents import alerts
from tests.support.builders import a_command
from tests.support.docker_engine import docker, inspect, named_image
from tests.support.monitoring import expressions, selectors
from tests.support.waiting import PATIENCE_S
from worker.dev.services.ports import wait_until

WORKERS = 3
USERS = ("worker", "upstream")
TARGET_OPTIONS = ("--imei", "865820030000001", "--obj-id", "3311", "--obj-inst-id", "0", "--res-id", "5850")


class Stack:
    """One project of docker/compose.yaml on free ports."""

    def __init__(self, image: str) -> None:
        self._project = f"onenet-test-{uuid4().hex[:8]}"
        ports = ("AMQP_PORT", "MANAGEMENT_PORT", "SIMULATOR_PORT", "PROMETHEUS_PORT")
        images = {
            name: named_image(name) for name in ("PYTHON_IMAGE", "RABBITMQ_IMAGE", "REDIS_IMAGE", "PROMETHEUS_IMAGE")
        }
        self._environment = dict.fromkeys(ports, "0") | images | {"WORKER_IMAGE": image}

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

    def url_of(self, user: str) -> str:
        """Return the URL with the password of a user of the broker."""
        return self.compose("exec", "-T", "worker", "cat", f"/run/broker-access/{user}-url").strip()

    def address(self, service: str, port: int) -> str:
        """Return the address on this machine at which a service publishes a port."""
        found = self.compose("port", service, str(port)).strip()
        assert found.startswith("127.0.0.1:")
        return found

    def get(self, service: str, port: int, path: str, **query: str) -> Any:
        """Send a GET request to the port that a service publishes on this machine; returns the JSON."""
        address = self.address(service, port)
        answer = requests.get(f"http://{address}{path}", params=query, timeout=PATIENCE_S)
        answer.raise_for_status()
        return answer.json()

    def cached(self) -> list[dict[str, Any]]:
        """Return the commands that the platform has cached."""
        found: list[dict[str, Any]] = self.get("simulator", 8580, "/control/commands")
        return found


@pytest.fixture(scope="module")
def stack(image: str, simulator_image: str) -> Iterator[Stack]:
    found = Stack(image)
    try:
        found.compose("up", "--wait", "--scale", f"worker={WORKERS}")
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


def test_the_broker_has_two_users_without_guest_and_their_passwords_are_in_no_environment(stack: Stack) -> None:
    passwords = [urlsplit(stack.url_of(user)).password for user in USERS]
    assert len(set(passwords)) == len(USERS)
    for service in ("worker", "rabbitmq", "simulator", "redis"):
        for identity in stack.ids(service):
            description = json.dumps(inspect(identity))
            assert not [password for password in passwords if password is None or password in description]
    users = stack.compose("exec", "-T", "rabbitmq", "rabbitmqctl", "--quiet", "list_users", "--formatter", "json")
    assert {user["user"] for user in json.loads(users)} == set(USERS)


def test_the_worker_has_all_rights_that_it_needs(stack: Stack) -> None:
    output = stack.compose("run", "--rm", "-T", "worker", "check", "--json")
    assert {line["check"] for line in map(json.loads, output.splitlines())} >= {"topology", "permissions"}


@pytest.fixture
def upstream(stack: Stack) -> Iterator[pika.BlockingConnection]:
    """Return a connection from this machine, as the user for upstream systems."""
    parameters = pika.URLParameters(stack.url_of("upstream"))
    parameters.host, port = stack.address("rabbitmq", 5672).split(":")
    parameters.port = int(port)
    with pika.BlockingConnection(parameters) as connection:
        yield connection


def test_upstream_sends_a_command_and_reads_its_reply(stack: Stack, upstream: pika.BlockingConnection) -> None:
    channel = upstream.channel()
    channel.confirm_delivery()
    channel.queue_declare("upstream.replies", durable=True)
    channel.queue_bind("upstream.replies", "onenet.replies", "execute.*.upstream")
    body = json.dumps(a_command(command_id="from-upstream"))
    channel.basic_publish(
        "onenet.commands", "execute", body.encode(), pika.BasicProperties(app_id="upstream"), mandatory=True
    )
    for _method, properties, reply in channel.consume("upstream.replies", auto_ack=True, inactivity_timeout=PATIENCE_S):
        assert properties is not None
        assert reply is not None
        assert properties.correlation_id == "from-upstream"
        assert json.loads(reply)["status"] == "accepted"
        break
    channel.close()


BODY = b"{}"


@pytest.mark.parametrize(
    "attempt",
    [
        pytest.param(lambda channel: channel.basic_get("onenet.execute"), id="take commands"),
        pytest.param(lambda channel: channel.basic_get("onenet.execute.retry.60s"), id="take delayed commands"),
        pytest.param(lambda channel: channel.basic_get("onenet.dead-letters"), id="take dead letters"),
        pytest.param(lambda channel: channel.basic_get("onenet.replies.unrouted"), id="take unrouted replies"),
        pytest.param(lambda channel: channel.basic_get("billing.replies"), id="take the replies to another system"),
        pytest.param(lambda channel: channel.queue_declare("billing.replies"), id="declare a queue of another system"),
        pytest.param(lambda channel: channel.queue_delete("onenet.execute"), id="delete the queue of commands"),
        pytest.param(lambda channel: channel.queue_purge("onenet.execute"), id="purge the queue of commands"),
        pytest.param(lambda channel: channel.exchange_delete("onenet.commands"), id="delete an exchange"),
        pytest.param(lambda channel: channel.basic_publish("onenet.returns", "execute", BODY), id="forge a retry"),
        pytest.param(
            lambda channel: channel.basic_publish("onenet.replies", "execute.accepted.billing", BODY),
            id="forge a reply",
        ),
        pytest.param(
            lambda channel: channel.basic_publish("onenet.dead-letters", "execute.expired", BODY),
            id="forge a dead letter",
        ),
        pytest.param(
            lambda channel: channel.basic_publish("onenet.retry", "onenet.execute.retry.60s", BODY),
            id="delay a message",
        ),
        pytest.param(lambda channel: channel.basic_publish("", "onenet.execute", BODY), id="use the default exchange"),
        pytest.param(
            lambda channel: channel.queue_bind("upstream.all", "onenet.replies", "#"), id="listen to all replies"
        ),
        pytest.param(
            lambda channel: channel.queue_bind("upstream.all", "onenet.replies", "execute.*.billing"),
            id="listen to the replies to another system",
        ),
        pytest.param(
            lambda channel: channel.queue_bind("upstream.all", "onenet.dead-letters", "#"), id="listen to dead letters"
        ),
        pytest.param(
            lambda channel: channel.queue_bind("upstream.all", "onenet.commands", "execute"), id="listen to commands"
        ),
        pytest.param(
            lambda channel: channel.queue_declare(
                "upstream.forward", arguments={"x-dead-letter-exchange": "onenet.returns"}
            ),
            id="let the broker forge a retry, as a dead letter",
        ),
        pytest.param(
            lambda channel: channel.exchange_declare(
                "upstream.forward", arguments={"alternate-exchange": "onenet.returns"}
            ),
            id="let the broker forge a retry, as an unrouted message",
        ),
        pytest.param(
            lambda channel: channel.exchange_bind("onenet.returns", "upstream.own", "#"),
            id="let the broker forge a retry, by a binding",
        ),
    ],
)
def test_upstream_may_do_nothing_else(upstream: pika.BlockingConnection, attempt: Callable[[Any], object]) -> None:
    own = upstream.channel()
    own.queue_declare("upstream.all", durable=True)
    own.exchange_declare("upstream.own", "topic")
    channel = upstream.channel()
    channel.confirm_delivery()
    with pytest.raises(ChannelClosedByBroker, match="403"):
        attempt(channel)


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
