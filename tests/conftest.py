"""Fixtures: a real broker for the whole run, a simulator and a namespace for each test.

Where several processes share the tests (pytest-xdist), each has a broker and a Redis of its own, so that it may kill
them.
"""

import fcntl
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from xdist.workermanage import NodeManager

from scripts import services
from tests.support.certificates import Authority
from tests.support.rig import Rig, onenet
from worker.dev.services.broker import LocalBroker, start_local_broker
from worker.dev.services.redis import LocalRedis, start_local_redis

os.environ |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}  # the servers of the tests are on this machine


def _end(number: int, _frame: object) -> None:
    pytest.exit(signal.Signals(number).name, 128 + number)  # with the fixtures' ends, which stop what was started


NodeManager.EXIT_TIMEOUT = 60  # for those ends in the processes of pytest-xdist, before they are killed
for _number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(_number, _end)
if "PYTEST_XDIST_WORKER" in os.environ:
    signal.signal(signal.SIGINT, _end)  # the end of the run is said so here, even where ctrl-C is ignored


@contextmanager
def one_at_a_time(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let no other process start a server meanwhile: it would install the same package, or take our port."""
    with (tmp_path_factory.getbasetemp().parent / "starting").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def authority() -> Authority:
    """Signed the certificate of our own broker, and those of whoever may connect to it with TLS."""
    return Authority()


@pytest.fixture(scope="session")
def own_broker(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalBroker]:
    """A broker that may be killed: never one that AMQP_URL names."""
    certificate = authority.issue("127.0.0.1", tmp_path_factory.mktemp("broker") / "tls")
    with one_at_a_time(tmp_path_factory):
        services.provide("rabbitmq")
        broker = start_local_broker(certificate.folder)
    yield broker
    broker.stop()


@pytest.fixture(scope="session")
def broker_url(request: pytest.FixtureRequest) -> str:
    """The broker that all tests share; on one that AMQP_URL names they leave nothing behind."""
    named = os.environ.get("AMQP_URL")
    if named:
        return named
    own: LocalBroker = request.getfixturevalue("own_broker")
    return own.url


@pytest.fixture(scope="session")
def own_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalRedis]:
    """A Redis that may be killed: never one that REDIS_URL names."""
    with one_at_a_time(tmp_path_factory):
        services.provide("redis")
        server = start_local_redis()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def redis_url(request: pytest.FixtureRequest) -> str:
    """The Redis that all tests share; what they leave behind on one that REDIS_URL names expires."""
    named = os.environ.get("REDIS_URL")
    if named:
        return named
    own: LocalRedis = request.getfixturevalue("own_redis")
    return own.url


@pytest.fixture
def rig(broker_url: str, tmp_path: Path) -> Iterator[Rig]:
    with onenet() as simulator, Rig.set_up(broker_url, tmp_path, simulator) as found:
        yield found
