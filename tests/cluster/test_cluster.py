"""Short runs on a cluster of three brokers; ``make chaos`` has the long ones."""

import json
from pathlib import Path

import pytest

from tests.support.builders import a_command
from tests.support.chaos import Plan, run
from tests.support.deployment import Deployment
from tests.support.rabbitmq_cluster import RabbitCluster
from tests.support.scenarios import leader_away
from tests.support.simulator import onenet
from tests.support.waiting import PATIENCE_S
from worker.amqp.blocking import declare_on
from worker.dev.services.ports import wait_until

SEED = 20261129
pytestmark = pytest.mark.xdist_group("cluster")  # one process of pytest-xdist runs all of them, on one cluster


def test_a_killed_leader_costs_no_command(cluster: RabbitCluster, redis_url: str, tmp_path: Path) -> None:
    """The other two nodes elect a leader while it is away."""
    plan = Plan("leader killed", SEED, 20, 400, 3, redis_url, concurrency=4, latency_s=0.5, publishing=0.5)
    report = run(
        plan, ",".join(cluster.urls), tmp_path, leader_away(cluster, away_s=10), describe=cluster.describe_queues
    )
    print(report)
    assert not report.violations, str(report)


def test_workers_and_brokers_start_in_any_order(cluster: RabbitCluster, tmp_path: Path) -> None:
    """After a loss of power all of them start at once: the worker waits for the brokers, and they for each other."""
    with onenet() as simulator, Deployment.set_up(",".join(cluster.urls), tmp_path, simulator) as deployment:
        declare_on(deployment.upstream.channel, deployment.topology)
        deployment.upstream.publish(a_command(command_id="before"))
        for node in cluster.nodes:
            node.kill()
        with deployment.start_worker() as worker:
            worker.wait_for("broker_unavailable")
            cluster.start()
            worker.wait_for("command_accepted")
            deployment.upstream.connect()
            # Among the unrouted replies, whose queue the worker binds: killed nodes may lose a binding that was made a
            # moment before. Not read earlier: a basic.get that fails for want of a leader may keep the message.
            unrouted = deployment.topology.unrouted_exchange
            wait_until(lambda: deployment.upstream.count(unrouted) == 1, PATIENCE_S, "the reply")
            _, _, body = deployment.upstream.channel.basic_get(unrouted, auto_ack=True)
            assert json.loads(body or b"")["command_id"] == "before"
