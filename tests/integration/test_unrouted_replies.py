"""What a worker says of replies that no queue is bound for."""

from typing import Any

from tests.support.builders import a_command
from tests.support.deployment import Deployment
from tests.support.waiting import PATIENCE_S
from worker.dev.services.ports import wait_until


def _lines(events: list[dict[str, Any]]) -> list[str]:
    return [line["routing_key"] for line in events if line["event"] == "reply_unrouted"]


def test_each_routing_key_that_nobody_has_bound_is_logged_once(deployment: Deployment) -> None:
    """An upstream system that names its own queue in reply_to waits in vain, and nothing else would say why."""
    with deployment.start_worker() as worker:
        worker.wait_for("consumer_started")
        deployment.upstream.bind_replies("execute.accepted.billing")
        for number in range(3):
            deployment.upstream.publish(a_command(command_id=f"lost-{number}"), reply_to="my.own.queue")
        worker.wait_for("reply_unrouted", routing_key="my.own.queue")
        deployment.upstream.publish(a_command(command_id="seen"), app_id="billing")
        deployment.upstream.publish(a_command(command_id="unseen"), app_id="shipping")
        worker.wait_for("reply_unrouted", routing_key="execute.accepted.shipping")
        assert _lines(worker.events) == ["my.own.queue", "execute.accepted.shipping"]


def test_of_thousands_of_unrouted_replies_only_samples_are_read(deployment: Deployment) -> None:
    with deployment.start_worker() as worker:
        worker.wait_for("consumer_started")
        for number in range(300):
            deployment.upstream.publish(b"{}", reply_to=f"unbound.{number}")
        worker.wait_for("command_failed", 300)
        worker.wait_for("reply_unrouted", 10)
        assert len(_lines(worker.events)) <= 50
        unrouted = deployment.topology.unrouted_exchange
        wait_until(lambda: deployment.upstream.count(unrouted) == 300, PATIENCE_S, "all replies, unrouted")
