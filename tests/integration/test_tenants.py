"""Upstream systems that do not trust each other: WORKER_TENANTS=isolated, with a real broker and a real worker."""

import json
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support.builders import a_command
from tests.support.command_line import TARGET_OPTIONS, run_cli
from tests.support.deployment import RETRY_DELAYS_S, SOON_CERTAIN, SOON_S, Deployment
from tests.support.simulator import onenet
from tests.support.waiting import PATIENCE_S
from worker.amqp.blocking import declare_on
from worker.dev.services.ports import wait_until
from worker.simulator.faults import Fault

pytestmark = pytest.mark.broker_version

OWN = {"user_id": "guest", "app_id": "guest"}
UNVOUCHED = {"app_id": "guest", "reply_to": "guest.mine"}


@pytest.fixture
def deployment(broker_url: str, tmp_path: Path) -> Iterator[Deployment]:
    with onenet() as simulator, Deployment.set_up(broker_url, tmp_path, simulator, SOON_S) as found:
        declare_on(found.upstream.channel, found.topology)
        yield found


def test_a_vouched_command_is_answered_at_its_own_address_through_retries(deployment: Deployment) -> None:
    """The broker takes no user_id from a worker, so that the copy in a delay queue has it in a header."""
    deployment.simulator.faults.replace([Fault(kind="too_many_requests", seconds=0, count=1)])
    with deployment.worker(WORKER_TENANTS="isolated"):
        deployment.upstream.publish(a_command(), **OWN, reply_to="guest.mine")
        reply = deployment.upstream.reply()
    assert (reply.routing_key, reply.json["status"], reply.json["attempts"]) == ("guest.mine", "accepted", 2)


@pytest.mark.parametrize(
    ("properties", "field", "routing_key"),
    [
        ({"app_id": "guest"}, "user_id", "execute.failed.unknown"),
        ({"app_id": "metering", "reply_to": "metering.mine"}, "user_id", "execute.failed.unknown"),
        ({"user_id": "guest", "app_id": "metering", "reply_to": "metering.mine"}, "app_id", "execute.failed.guest"),
        ({**OWN, "reply_to": "metering.mine"}, "reply_to", "execute.failed.guest"),
        ({"app_id": "guest", "headers": {"x-onenet-user-id": "guest"}}, "user_id", "execute.failed.unknown"),
    ],
    ids=str,
)
def test_a_false_sender_is_refused_and_no_other_system_gets_the_reply(
    deployment: Deployment, properties: dict[str, Any], field: str, routing_key: str
) -> None:
    with deployment.worker(WORKER_TENANTS="isolated"):
        deployment.upstream.publish(a_command(), **properties)
        deployment.upstream.publish(b"no command", **properties)
        replies = [deployment.upstream.reply() for _ in range(2)]
    assert [reply.routing_key for reply in replies] == [routing_key] * 2
    errors = [reply.json["error"] for reply in replies]
    assert {error["code"] for error in errors} == {"invalid_command", "invalid_message"}
    [invalid] = [error for error in errors if error["code"] == "invalid_command"]
    assert [detail["field"] for detail in invalid["details"]] == [field]
    assert not deployment.simulator.requests


def run_trusting(deployment: Deployment, fault: Fault, command: dict[str, Any], **settings: str) -> None:
    """Let a worker that trusts all systems take a command, and leave a copy of it in a delay queue."""
    deployment.simulator.faults.replace([fault])
    with deployment.worker(**SOON_CERTAIN, **settings) as worker:
        deployment.upstream.publish(command, **UNVOUCHED)
        deployment.wait_for_request()
        worker.process.signal(signal.SIGTERM)
        assert worker.process.wait() == 0
    deployment.simulator.faults.replace([])
    topology = deployment.topology
    waiting = [topology.execute_queue, *map(topology.retry_queue, (*RETRY_DELAYS_S, SOON_S))]
    wait_until(lambda: sum(map(deployment.upstream.count, waiting)) == 1, PATIENCE_S, "the copy")


def cache_and_lose_the_answer(deployment: Deployment, command: dict[str, Any]) -> None:
    run_trusting(deployment, Fault(kind="drop_after_caching"), command)


def throttle(deployment: Deployment, command: dict[str, Any]) -> None:
    """It was not sent. The message that this copy was made of may have come back, and been sent: nobody can tell."""
    run_trusting(deployment, Fault(kind="too_many_requests", seconds=0), command)


def deliver_and_crash(deployment: Deployment, command: dict[str, Any]) -> None:
    deployment.upstream.publish(command, **UNVOUCHED)
    deployment.upstream.take_and_return(deployment.topology.execute_queue)


@pytest.mark.parametrize("before", [cache_and_lose_the_answer, throttle, deliver_and_crash])
def test_an_unvouched_command_that_may_have_been_sent_is_neither_sent_nor_said_not_to_be(
    deployment: Deployment, before: Any
) -> None:
    """It was taken before ``isolated`` was turned on."""
    command = a_command()
    before(deployment, command)
    asked = len(deployment.simulator.requests)
    with deployment.worker(WORKER_TENANTS="isolated", **SOON_CERTAIN):
        reply = deployment.upstream.reply()
    letter = deployment.upstream.dead_letter()
    error = reply.json["error"]
    assert (reply.routing_key, reply.json["command_id"]) == ("execute.failed.unknown", command["command_id"])
    assert (error["code"], [detail["field"] for detail in error["details"]]) == ("outcome_unknown", ["user_id"])
    assert letter.headers["x-onenet-reason"] == "outcome_unknown"
    assert len(deployment.simulator.requests) == asked


def test_a_refused_command_has_its_outcome_when_its_sender_publishes_it_again(
    deployment: Deployment, redis_url: str
) -> None:
    """The record of the former attempt says that it may have been cached, so that its history is read first."""
    command = a_command()
    shared = {"IDEMPOTENCY_URL": redis_url}
    run_trusting(deployment, Fault(kind="drop_after_caching"), command, **shared)
    with deployment.worker(WORKER_TENANTS="isolated", **SOON_CERTAIN, **shared):
        assert deployment.upstream.reply().json["error"]["code"] == "outcome_unknown"
        deployment.upstream.publish(command, **OWN)
        reply = deployment.upstream.reply()
    assert (reply.routing_key, reply.json["status"]) == ("execute.accepted.guest", "accepted")
    assert [kept.uuid for kept in deployment.simulator.platform.commands] == [reply.json["uuid"]]


def replay_broker_dead_letter(deployment: Deployment, folder: Path) -> None:
    dead = partial(deployment.upstream.count, deployment.topology.dead_letters_exchange)
    wait_until(lambda: dead() == 1, PATIENCE_S, "the broker's own dead letter")
    result = run_cli(
        "dead-letters", "replay", "--reason", "broker", folder=folder,
        AMQP_URL=deployment.broker_url, WORKER_NAMESPACE=deployment.topology.namespace,
    )  # fmt: skip
    assert result.stdout == "replayed 1 dead letter\n", result.stderr


def test_a_first_delivery_that_the_broker_dead_lettered_is_replayed_as_its_senders(
    deployment: Deployment, tmp_path: Path
) -> None:
    deployment.upstream.publish(a_command(), **OWN, reply_to="guest.mine", expiration="1")
    replay_broker_dead_letter(deployment, tmp_path)
    with deployment.worker(WORKER_TENANTS="isolated", **SOON_CERTAIN):
        reply = deployment.upstream.reply()
    assert (reply.routing_key, reply.json["status"]) == ("guest.mine", "accepted")


def test_a_copy_that_the_broker_dead_lettered_is_refused_when_it_is_replayed(
    deployment: Deployment, tmp_path: Path
) -> None:
    """Its sender is in a header, and of a dead letter of the broker's nothing tells who wrote that."""
    command = a_command()
    deployment.simulator.faults.replace([Fault(kind="too_many_requests", seconds=0)])
    with deployment.worker(WORKER_TENANTS="isolated") as worker:
        deployment.upstream.publish(command, **OWN)
        deployment.wait_for_request()
        worker.process.signal(signal.SIGTERM)
        assert worker.process.wait() == 0
    deployment.simulator.faults.replace([])
    execute, asked = deployment.topology.execute_queue, len(deployment.simulator.requests)
    wait_until(lambda: deployment.upstream.count(execute) == 1, PATIENCE_S, "the copy")
    deployment.upstream.take_and_return(execute, is_requeued=False)
    replay_broker_dead_letter(deployment, tmp_path)
    with deployment.worker(WORKER_TENANTS="isolated"):
        reply = deployment.upstream.reply()
        assert (reply.routing_key, reply.json["error"]["code"]) == ("execute.failed.unknown", "outcome_unknown")
        assert len(deployment.simulator.requests) == asked
        deployment.upstream.publish(command, **OWN)
        assert deployment.upstream.reply().json["status"] == "accepted"


def test_two_systems_with_the_same_id_each_get_their_own_reply(deployment: Deployment) -> None:
    with deployment.worker():
        replies = []
        commands = {app_id: a_command(command_id="1", args=app_id) for app_id in ("billing", "metering")}
        for app_id in ("billing", "metering", "billing"):
            deployment.upstream.publish(commands[app_id], app_id=app_id)
            replies.append(deployment.upstream.reply())
    assert [reply.json["status"] for reply in replies] == ["accepted"] * 3
    first, second, again = (reply.json["uuid"] for reply in replies)
    assert first == again != second


def test_send_names_the_brokers_user_as_its_sender(deployment: Deployment, tmp_path: Path) -> None:
    environment = {
        "AMQP_URL": deployment.broker_url,
        "WORKER_NAMESPACE": deployment.topology.namespace,
        "WORKER_TENANTS": "isolated",
    }
    with deployment.worker(WORKER_TENANTS="isolated"):
        sent = run_cli("send", *TARGET_OPTIONS, "--wait", folder=tmp_path, **environment)
        other = run_cli("send", *TARGET_OPTIONS, "--app-id", "metering", "--wait", folder=tmp_path, **environment)
    assert json.loads(sent.stdout)["status"] == "accepted", sent.stderr
    assert other.returncode == 1
