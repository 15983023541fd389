"""A short chaos run on each store; ``make chaos`` has the long ones."""

from pathlib import Path

import pytest

from tests.support.chaos import Plan, run, storm
from worker.dev.services.broker import LocalBroker

SEED = 20261122


@pytest.mark.parametrize(("store", "workers", "commands"), [("memory", 1, 300), ("redis", 3, 400)])
def test_random_faults_lose_no_result_and_change_none(
    store: str, workers: int, commands: int, own_broker: LocalBroker, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    url = None if store == "memory" else request.getfixturevalue("redis_url")
    plan = Plan("storm with results", SEED, 12, commands, workers, url, result_delays_s=(1, 2, 5))
    report = run(plan, own_broker.url, tmp_path, storm(own_broker, broker_kills=1))
    print(report)
    assert not report.violations, str(report)


@pytest.mark.parametrize(("store", "workers"), [("memory", 1), ("redis", 3)])
def test_random_faults_lose_no_command_and_cache_none_twice(
    store: str, workers: int, own_broker: LocalBroker, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    url = None if store == "memory" else request.getfixturevalue("redis_url")
    plan = Plan("storm", SEED, 12, 300, workers, url)
    report = run(plan, own_broker.url, tmp_path, storm(own_broker, broker_kills=1))
    print(report)
    assert not report.violations, str(report)
