"""Fixtures: a real broker and a real Redis for the whole run, a simulator and a namespace for each test.

With pytest-xdist each process has a broker and a Redis of its own, so that its tests may kill them.
"""

import fcntl
import logging
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, settings
from xdist.workermanage import NodeManager

from scripts import services
from tests.support.blocking import BlockedLoop, forbid_blocking_calls
from tests.support.certificates import Authority
from tests.support.deployment import Deployment
from tests.support.redis_servers import patient
from tests.support.simulator import onenet
from tests.support.startup_code import run_at_startup
from tests.support.waiting import PATIENCE_S
from worker.core.claims import IdempotencyStore
from worker.dev.services.broker import LocalBroker, start_local_broker
from worker.dev.services.redis import LocalRedis, start_local_redis
from worker.flow import rate_limiter
from worker.idempotency import open_store, redis, redis_server

os.environ |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}  # the tests' servers run on this machine


def _exit(number: int, _frame: object) -> None:
    pytest.exit(signal.Signals(number).name, 128 + number)  # runs the fixtures' teardown, which stops the servers


NodeManager.EXIT_TIMEOUT = 60  # seconds for the teardown in the processes of pytest-xdist before they are killed
for _number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(_number, _exit)
if "PYTEST_XDIST_WORKER" in os.environ:
    signal.signal(signal.SIGINT, _exit)  # pytest-xdist ends its processes so, even where ctrl-C is ignored


forbid_blocking_calls()

# Modules, and not their names: Python 3.11 may fail to load one while a finalizer that loads another one runs.
_LIMITS = ((redis, "TIMEOUT_S"), (redis, "PING_S"), (redis_server, "SENTINEL_S"), (rate_limiter, "_TIMEOUT_S"))

# How long an example takes depends on the machine.
settings.register_profile("untimed", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


@pytest.fixture(autouse=True)
def event_loop_guard() -> Iterator[None]:
    """Fail a test in which a callback of the worker held up the event loop."""
    found: list[str] = []
    logger, handler = logging.getLogger("asyncio"), BlockedLoop(found.append)
    former = logger.level
    logger.setLevel(logging.WARNING)
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)
    logger.setLevel(former)
    assert not found, "\n".join(found)


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Redis take its time, however slow the machine; a test of a time limit sets one."""
    for module, limit in _LIMITS:
        monkeypatch.setattr(module, limit, float(PATIENCE_S))


@contextmanager
def one_at_a_time(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep other processes from starting a server: they might install the same package or take the same port."""
    with (tmp_path_factory.getbasetemp().parent / "starting").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def authority() -> Authority:
    """The authority that signs the certificates of the private broker and of its clients."""
    return Authority()


@pytest.fixture(scope="session")
def own_broker(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalBroker]:
    """A private broker that tests may kill; never the one that AMQP_URL names."""
    certificate = authority.issue("127.0.0.1", tmp_path_factory.mktemp("broker") / "tls")
    with ExitStack() as stack:
        with one_at_a_time(tmp_path_factory):
            services.provide("rabbitmq")
            broker = start_local_broker(stack, certificate.folder)
        yield broker


@pytest.fixture(scope="session")
def broker_url(request: pytest.FixtureRequest) -> str:
    """The URL of the broker that all tests share; they delete what they declare, also where AMQP_URL names it."""
    named = os.environ.get("AMQP_URL")
    if named:
        return named
    own: LocalBroker = request.getfixturevalue("own_broker")
    return own.url


@pytest.fixture(scope="session")
def own_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalRedis]:
    """A private Redis that tests may kill; never the one that REDIS_URL names."""
    with ExitStack() as stack:
        with one_at_a_time(tmp_path_factory):
            services.provide("redis")
            server = start_local_redis(stack)
        yield server


@pytest.fixture(scope="session")
def redis_url(request: pytest.FixtureRequest) -> str:
    """The URL of the Redis that all tests share; the keys they leave expire, also where REDIS_URL names it."""
    named = os.environ.get("REDIS_URL")
    if named:
        return named
    own: LocalRedis = request.getfixturevalue("own_redis")
    return patient(own.url)


@pytest.fixture
def watched_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run workers in asyncio's debug mode; ``WorkerProcess`` fails if one held up its event loop."""
    for name, value in {"PYTHONASYNCIODEBUG": "1", **run_at_startup(tmp_path, "")}.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def deployment(broker_url: str, tmp_path: Path) -> Iterator[Deployment]:
    with onenet() as simulator, Deployment.set_up(broker_url, tmp_path, simulator) as found:
        yield found


@pytest.fixture(params=["memory", "redis"])
async def store(request: pytest.FixtureRequest) -> AsyncIterator[IdempotencyStore]:
    """Each kind of store, empty."""
    url = "memory://" if request.param == "memory" else request.getfixturevalue("redis_url")
    opened = open_store(url, uuid4().hex, ttl_s=600, lease_s=600, began_at=datetime.now(UTC))
    yield opened
    await opened.close()
