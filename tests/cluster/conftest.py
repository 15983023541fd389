"""Fixtures: private clusters, which tests may damage; those that share one leave it whole."""

from collections.abc import Iterator

import pytest

from scripts import services
from tests.conftest import one_at_a_time
from tests.support.rabbitmq_cluster import RabbitCluster
from tests.support.redis_sentinel import RedisWithSentinels


@pytest.fixture(scope="package")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitCluster]:
    with one_at_a_time(tmp_path_factory):
        services.provide_installed("rabbitmq")
        started = RabbitCluster()
        started.start()
    yield started
    started.stop()


@pytest.fixture
def sentinels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisWithSentinels]:
    with one_at_a_time(tmp_path_factory):
        services.provide_installed("redis")
    with RedisWithSentinels() as started:
        yield started
