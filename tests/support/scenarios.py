"""What may happen to a cluster of brokers, to a Redis with Sentinels, and to the versions of the workers.

Each function returns a scenario for ``tests.support.chaos.run``.
"""

from pathlib import Path

from tests.support.chaos import Scenario, Scene
from tests.support.rabbitmq_cluster import ClusterNode, RabbitCluster
from tests.support.redis_sentinel import RedisWithSentinels
from tests.support.soak import Soak
from tests.support.waiting import PATIENCE_S
from worker.dev.services.ports import wait_until

_WARM_UP_S = 5
_BETWEEN_FAILOVERS_S = 30  # what was delivered after one is in doubt for a lease and WORKER_RECONCILE_DELAY


def leader_away(cluster: RabbitCluster, away_s: float, times: int = 1) -> Scenario:
    """Kill the node that leads the command queue, and start it again after a while."""

    def cause(scene: Scene) -> None:
        for _ in range(times):
            scene.wait(_WARM_UP_S)
            leader = _leader(cluster, scene)
            scene.note("leader kills")
            leader.kill()
            scene.wait(away_s)
            leader.start()
            cluster.wait_until_whole()

    return cause


def hung_node(cluster: RabbitCluster, hangs_s: float) -> Scenario:
    """Stop the processes of a node with SIGSTOP; its connections stay open."""

    def cause(scene: Scene) -> None:
        scene.wait(_WARM_UP_S)
        node = _leader_but_first(cluster, scene)
        scene.note(f"hang of {hangs_s:g} s")
        node.hang()
        try:
            scene.wait(hangs_s)
        finally:
            node.resume()
        if not cluster.heals():  # on 3.10 it may stay partitioned from the others until it is restarted
            scene.note("restarts of a node")
            node.kill()
            node.start()
        cluster.wait_until_whole()

    return cause


def rolling_restart(cluster: RabbitCluster) -> Scenario:
    """Stop and start the nodes one after the other, as an upgrade does."""

    def cause(scene: Scene) -> None:
        for node in cluster.nodes:
            scene.wait(_WARM_UP_S)
            scene.note("restarts of a node")
            node.stop_gracefully()
            node.start()
            cluster.wait_until_whole()

    return cause


def partition(cluster: RabbitCluster, lasts_s: float) -> Scenario:
    """Interrupt the connections between one node and the others; workers reach all three."""

    def cause(scene: Scene) -> None:
        scene.wait(_WARM_UP_S)
        node = _leader_but_first(cluster, scene)
        scene.note(f"partition of {lasts_s:g} s")
        cluster.isolate(node)
        try:
            scene.wait(lasts_s)
        finally:
            cluster.heal(node)
        cluster.wait_until_whole()

    return cause


def redis_failovers(store: RedisWithSentinels) -> Scenario:
    """Replace the primary again and again, by a kill, a hang or a command, and kill workers meanwhile."""

    def cause(scene: Scene) -> None:
        ways = (
            ("kills of the primary", store.kill_primary),
            ("hangs of the primary", store.hang_primary),
            ("failovers by command", store.fail_over),
        )
        turn = 0
        while scene.elapsed_s < scene.plan.seconds:
            scene.wait(_BETWEEN_FAILOVERS_S)
            name, fail_over = ways[turn % len(ways)]
            scene.note(name)
            fail_over()
            scene.note("worker kills")
            scene.fleet.kill(turn % scene.plan.workers)
            wait_until(store.is_whole, PATIENCE_S, "the replica", every_s=0.5)
            turn += 1

    return cause


def two_versions(this: Path | str, other: Path | str) -> Scenario:
    """Replace workers of another version by those of this one, one by one, and back; kill one of each in between."""

    def cause(scene: Scene) -> None:
        numbers = range(scene.plan.workers)
        for name, python, former in (("forward", this, other), ("back", other, this)):
            for number in numbers:
                scene.wait(_WARM_UP_S)
                scene.fleet.replace(number, python)
                scene.note(f"rolled {name}")
                if number == 0:
                    scene.note("worker kills")
                    scene.fleet.kill(0, python)
                    scene.fleet.kill(scene.plan.workers - 1, former)

    return cause


def soak(store_url: str) -> Scenario:
    """Run under load with cut connections, and compare what the workers hold near the beginning and at the end."""

    def cause(scene: Scene) -> None:
        watch = Soak(scene, store_url)
        scene.wait(scene.plan.seconds / 3)
        watch.begin()
        while scene.elapsed_s < scene.plan.seconds - 20:
            scene.wait(20)
            scene.note("cuts")
            scene.fleet.cut(scene.randomness.randrange(scene.plan.workers))
        watch.end()

    return cause


def _leader(cluster: RabbitCluster, scene: Scene) -> ClusterNode:
    return cluster.leader_of(scene.deployment.topology.execute_queue)


def _leader_but_first(cluster: RabbitCluster, scene: Scene) -> ClusterNode:
    """Return the leader, or another node if that is the first, which the upstream system of the run is connected to."""
    leader = _leader(cluster, scene)
    return cluster.nodes[1] if leader is cluster.nodes[0] else leader
