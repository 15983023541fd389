"""Upstream systems that do not trust each other: WORKER_TENANTS=isolated, with a real broker and a real worker."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.builders import a_command
from tests.support.command_line import TARGET_OPTIONS, run_cli
from tests.support.deployment import Deployment
from worker.simulator.faults import Fault

OWN = {"user_id": "guest", "app_id": "guest"}


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
