"""``make chaos``: long chaos runs, with a report of each; a failed run is repeated with its seed.

Storms of faults on both stores; a cluster of three brokers whose nodes are killed, hang, restart or lose each other; a
Redis with Sentinels that fails over; workers of two versions side by side; and a soak of 20 minutes.
"""

import argparse
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from scripts import services
from tests.support import other_version, scenarios
from tests.support.chaos import Plan, Report, Scenario, run, storm
from tests.support.rabbitmq_cluster import RabbitCluster
from tests.support.redis_sentinel import RedisWithSentinels
from worker.dev.services.broker import LocalBroker, start_local_broker
from worker.dev.services.redis import LocalRedis, start_local_redis

_STEADY_LOAD = 0.85  # share of a run after which a platform of the chosen latency has answered all commands


@dataclass
class _Servers:
    """Servers that several runs share, started for the first of them."""

    stack: ExitStack

    @cached_property
    def broker(self) -> LocalBroker:
        services.provide("rabbitmq")
        return start_local_broker(self.stack)

    @cached_property
    def redis(self) -> LocalRedis:
        services.provide("redis")
        return start_local_redis(self.stack)

    @cached_property
    def cluster(self) -> RabbitCluster:
        services.provide_installed("rabbitmq")
        return self.stack.enter_context(RabbitCluster())

    def sentinels(self, *, is_sure: bool) -> RedisWithSentinels:
        services.provide_installed("redis")
        return self.stack.enter_context(RedisWithSentinels(is_sure=is_sure))


class _Runs:
    """One method for each run; its name is what ``--runs`` takes."""

    def __init__(self, chosen: argparse.Namespace, servers: _Servers) -> None:
        self._chosen = chosen
        self._servers = servers

    def storm(self) -> Iterator[Report]:
        chosen = self._chosen
        for fleet in chosen.fleets.split(","):
            url = self._servers.redis.url if fleet.endswith("r") else None
            plan = Plan("storm", chosen.seed, chosen.seconds, chosen.commands, int(fleet[:-1]), url)
            yield self._run(plan, self._servers.broker.url, storm(self._servers.broker))

    def leader(self) -> Iterator[Report]:
        yield self._on_cluster("leader killed and away", 120, scenarios.leader_away(self._servers.cluster, 30, times=2))

    def hang(self) -> Iterator[Report]:
        yield self._on_cluster("hung node", 120, scenarios.hung_node(self._servers.cluster, 90))

    def restart(self) -> Iterator[Report]:
        yield self._on_cluster("rolling restart", 120, scenarios.rolling_restart(self._servers.cluster))

    def partition(self) -> Iterator[Report]:
        yield self._on_cluster("partition", 150, scenarios.partition(self._servers.cluster, 100))

    def sentinel(self) -> Iterator[Report]:
        for name, settings in (("asynchronous", {}), ("waited for", {"IDEMPOTENCY_WAIT_REPLICAS": "1"})):
            store = self._servers.sentinels(is_sure=False)
            plan = self._steady(f"Sentinel failovers, replicas {name}", 180, store.url, settings)
            plan = replace(plan, keeps_records=bool(settings))
            yield self._run(plan, self._servers.broker.url, scenarios.redis_failovers(store))

    def versions(self) -> Iterator[Report]:
        version = self._chosen.other_version or other_version.default_version()
        with tempfile.TemporaryDirectory(prefix="onenet-other-version-") as folder:
            other = other_version.install(version, Path(folder))
            name = f"rolled from {other_version.describe(version)} and back"
            settings = {"ONENET_RATE_LIMIT": "1000/second"}  # an older version may not know `off`
            plan = self._steady(name, 90, self._servers.redis.url, settings)
            rolling = scenarios.two_versions(sys.executable, other)
            yield self._run(plan, self._servers.broker.url, rolling, other)

    def soak(self) -> Iterator[Report]:
        seconds = self._chosen.soak_minutes * 60
        url = self._servers.redis.url
        # Each command leaves a record for the time to live, which is longer than any command waits, and so short that
        # the number of records is level before the first measurement. With so short a one each redelivery is in doubt.
        plan = self._steady("soak", seconds, url, {"IDEMPOTENCY_TTL": str(round(seconds / 4))})
        # Published until the end, and so slowly that none waits: histories take their share of the platform's time.
        plan = replace(plan, publishing=1.0, commands=round(0.75 * plan.commands))
        yield self._run(plan, ",".join(self._servers.cluster.urls), scenarios.soak(url))

    def _on_cluster(self, name: str, seconds: float, scenario: Scenario) -> Report:
        plan = self._steady(name, seconds, self._servers.redis.url)
        cluster = self._servers.cluster
        return self._run(plan, ",".join(cluster.urls), scenario, describe=cluster.describe_queues)

    def _steady(self, name: str, seconds: float, store_url: str, settings: dict[str, str] | None = None) -> Plan:
        """Return a plan in which commands wait from beginning to end, so that only a stall makes a gap."""
        # So fast that a search of a history, of several reads, ends within the second that a read may take.
        workers, concurrency, rate = 3, 2, 20
        latency_s = workers * concurrency * _STEADY_LOAD / rate
        return Plan(
            name,
            self._chosen.seed,
            seconds,
            round(rate * seconds),
            workers,
            store_url,
            concurrency,
            latency_s,
            devices=round(rate * seconds / 10),
            fault_probability=0.02,
            publishing=0.6,
            settings=settings or {},
        )

    def _run(
        self,
        plan: Plan,
        broker_url: str,
        scenario: Scenario,
        python: Path | str = sys.executable,
        describe: Callable[[], str] = str,
    ) -> Report:
        folder = Path(tempfile.mkdtemp(prefix=f"onenet-chaos-{plan.name.split()[0]}-"))
        report = run(plan, broker_url, folder, scenario, python, describe)
        print(report, flush=True)
        for name, found in report.violations.items():
            print(f"  {name}: {'; '.join(found[:10])}\n  the workers' logs: {folder}", flush=True)
        return report


_NAMES = ("storm", "leader", "hang", "restart", "partition", "sentinel", "versions", "soak")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000))
    parser.add_argument("--runs", default=",".join(_NAMES), help="comma-separated: which of them")
    parser.add_argument("--seconds", type=float, default=120, help="seconds of faults in each storm")
    parser.add_argument("--commands", type=int, default=3000, help="commands published in each storm")
    parser.add_argument(
        "--fleets", default="1m,3r,4r", help="comma-separated storms: number of workers, on memory (m) or Redis (r)"
    )
    parser.add_argument("--soak-minutes", type=float, default=20)
    parser.add_argument(
        "--other-version", help="tag, branch or commit; by default the last release, else the main branch"
    )
    chosen = parser.parse_args()
    has_failed = False
    with ExitStack() as stack:
        runs = _Runs(chosen, _Servers(stack))
        for name in chosen.runs.split(","):
            reports: Callable[[], Iterator[Report]] = getattr(runs, name)
            for report in reports():
                has_failed = has_failed or bool(report.violations)
    return int(has_failed)


if __name__ == "__main__":
    sys.exit(main())
