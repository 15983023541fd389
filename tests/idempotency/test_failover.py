"""A failover of Redis: the name leads to a new primary while the former one still answers."""

import asyncio
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import pytest
import redis
from redis.connection import DefaultParser

from tests.support.proxies import Proxy, raw_server
from tests.support.redis_servers import Server, servers
from tests.support.stores import LONG_S, NOW, U, complete, held, key, reply
from tests.support.waiting import PATIENCE_S
from worker.core.claims import Unseen
from worker.core.rate import Rate
from worker.core.redis_address import RedisAddress
from worker.dev.services.ports import free_port
from worker.dev.services.redis import LocalRedis, start_local_redis
from worker.errors import StoreError, StoreRefused, StoreUnavailable
from worker.flow.rate_limiter import RateLimiter
from worker.idempotency.latest_address import LatestAddress
from worker.idempotency.redis import RedisStore
from worker.idempotency.redis_errors import Unreachable, code_of, is_other_server, reason_of
from worker.idempotency.redis_server import primary_of
from worker.telemetry.health import Condition, Health

FEW = 3  # the store must work again within this many calls


class Name(Proxy):
    """A host name that can be pointed to another server; existing connections stay."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.redis_url = f"redis://127.0.0.1:{self.port}/0"

    def lead_to(self, url: str) -> None:
        target = urlsplit(url)
        self._target = (str(target.hostname), target.port or 6379)


class Failover:
    """Two servers, and a store that knows the name of the primary."""

    def __init__(self, former: str, new: str) -> None:
        self.namespace = f"test-{uuid4().hex}"
        self._new_url = new
        self.former = redis.Redis.from_url(former)
        self.new = redis.Redis.from_url(new)
        self.name = Name(former)
        self.store = RedisStore(self.name.redis_url, self.namespace, ttl_s=60, lease_s=LONG_S)

    def fail_over(self, *, serves_stale_data: bool = True) -> None:
        self.former.config_set("replica-serve-stale-data", "yes" if serves_stale_data else "no")
        self.former.replicaof("127.0.0.1", free_port())  # no server listens there: it keeps its data
        self.name.lead_to(self._new_url)

    async def close(self) -> None:
        await self.store.close()
        self.name.close()
        self.former.replicaof("NO", "ONE")
        for client in (self.former, self.new):
            client.close()


@pytest.fixture(scope="module")
def second_redis() -> Iterator[LocalRedis]:
    with ExitStack() as stack:
        yield start_local_redis(stack)


@pytest.fixture
async def failover(own_redis: LocalRedis, second_redis: LocalRedis) -> AsyncIterator[Failover]:
    found = Failover(own_redis.url, second_redis.url)
    yield found
    await found.close()


async def until_it_works(call: Callable[[], Awaitable[object]]) -> list[str]:
    """Call a few times until it works; returns the errors before that."""
    errors = []
    for _ in range(FEW):
        try:
            await call()
        except StoreError as exc:
            errors.append(str(exc))
        else:
            return errors
    raise AssertionError(errors)


@pytest.mark.parametrize(
    ("serves_stale_data", "words"),
    [(True, "Redis: READONLY: not a primary any more"), (False, "Redis: MASTERDOWN: a replica without its primary")],
)
async def test_the_store_works_again_after_a_failover_without_a_restart(
    failover: Failover, serves_stale_data: bool, words: str
) -> None:
    store = failover.store
    first = held(await store.claim(key("a"), NOW))
    await store.ping()
    failover.fail_over(serves_stale_data=serves_stale_data)
    with pytest.raises(StoreUnavailable, match=words):
        await store.release(first, None)
    assert await until_it_works(lambda: store.claim(key("b"), NOW)) == []
    assert await until_it_works(store.ping) == []
    await complete(store, held(await store.claim(key("c"), NOW)), reply("c", U))
    assert failover.new.exists(f"{{{failover.namespace}}}:command:c")


async def test_one_refused_call_replaces_the_connections_of_all_calls(failover: Failover) -> None:
    """Calls that only read would otherwise read the former primary forever."""
    store = failover.store
    await store.claim(key("b"), NOW)
    assert await store.owned_by_others("a", [U]) == set()
    failover.fail_over()
    failover.new.set(f"{{{failover.namespace}}}:uuid:{U}", "b")
    assert await store.owned_by_others("a", [U]) == set()
    with pytest.raises(StoreUnavailable):
        await store.claim(key("a"), NOW)
    assert await store.owned_by_others("a", [U]) == {U}


async def test_a_refused_ping_replaces_the_connections_of_all_calls(failover: Failover) -> None:
    store = failover.store
    await store.ping()
    await store.claim(key("a"), NOW)
    failover.fail_over()
    with pytest.raises(StoreUnavailable):
        await store.ping()
    assert isinstance(await store.claim(key("a"), NOW), Unseen)


async def test_a_worker_is_not_ready_while_its_redis_accepts_no_writes(failover: Failover) -> None:
    """PING succeeds on a demoted primary, on a full one, and on one with too few replicas."""
    loop = asyncio.get_running_loop()
    health = Health(60, lambda: asyncio.run_coroutine_threadsafe(failover.store.ping(), loop).result())
    health.report(Condition(is_connected=True, not_consuming_s=0))

    async def is_ready() -> bool:
        return (await asyncio.to_thread(health.readiness)).ok  # probes are answered by other threads

    assert await is_ready()
    failover.former.config_set("min-replicas-to-write", 1)
    try:
        assert not await is_ready()
        with pytest.raises(StoreUnavailable, match="Redis: NOREPLICAS: too few replicas to accept writes"):
            await failover.store.ping()
    finally:
        failover.former.config_set("min-replicas-to-write", 0)
    assert await is_ready()
    failover.former.replicaof("127.0.0.1", free_port())
    for _ in range(FEW):
        assert not await is_ready()  # until the name leads to the new primary
    failover.fail_over()
    await until_it_works(failover.store.ping)
    assert await is_ready()


async def test_the_rate_limit_holds_after_a_failover(failover: Failover) -> None:
    limiter = RateLimiter(Rate(1, 600), failover.namespace, LatestAddress(RedisAddress.parse(failover.name.redis_url)))
    assert await limiter.acquire(None) == 0
    assert await limiter.acquire("heating") == 0
    failover.fail_over()
    assert await limiter.acquire("cooling") == 0
    assert await limiter.acquire("cooling") > 0
    assert failover.new.keys(f"{{{failover.namespace}}}:rate*")
    await limiter.close()


ANSWERS = [
    ("READONLY You can't write against a read only replica.", "READONLY", True),
    ("READONLY You can't write against a read only replica. script: 4ca2, on @user_script:37.", "READONLY", True),
    ("ERR Error running script (call to f_4ca2): @user_script:37: -READONLY You can't write.", "READONLY", True),
    (
        "ERR Error running script (call to f_4ca2): @user_script:37: @user_script: 37: -OOM command not allowed",
        "OOM",
        False,
    ),
    ("MOVED 3999 127.0.0.1:6381", "MOVED", True),
    ("ASK 3999 127.0.0.1:6381", "ASK", True),
    ("LOADING Redis is loading the dataset in memory", "LOADING", True),
    ("MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.", "MASTERDOWN", True),
    ("CLUSTERDOWN The cluster is down", "CLUSTERDOWN", True),
    ("CLUSTERDOWN Hash slot not served", "CLUSTERDOWN", True),
    ("NOREPLICAS Not enough good replicas to write.", "NOREPLICAS", False),
    ("OOM command not allowed when used memory > 'maxmemory'.", "OOM", False),
    ("MISCONF Redis is configured to save RDB snapshots, but it is unable to persist to disk.", "MISCONF", False),
    ("NOPERM this user has no permissions to run the 'evalsha' command", "NOPERM", False),
    (
        "ERR The user executing the script can't run this command or subcommand script: 4ca2, on @user_script:1.",
        "NOPERM",
        False,
    ),
    (
        "ERR ACL failure in script: User worker has no permissions to run the 'hdel' command script: 4ca2",
        "NOPERM",
        False,
    ),
    ("WRONGTYPE Operation against a key holding the wrong kind of value", None, False),
    ("ERR unknown command", None, False),
]


@pytest.mark.parametrize(("text", "code", "is_other"), ANSWERS)
def test_the_code_of_an_error_tells_whether_another_server_must_be_asked(
    text: str, code: str | None, is_other: bool
) -> None:
    parser: Any = DefaultParser
    error = parser.parse_error(text)
    assert (code_of(error), is_other_server(error)) == (code, is_other)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("ERR unknown command 'HELLO', with args beginning with: '3' 'AUTH' 'u' 'hunter2'", "unknown command 'HELLO'"),
        ("ERR unknown command `AUTH`, with args beginning with: `u`, `hunter2`,", "unknown command `AUTH`"),
        ("NOAUTH Authentication required.", "NOAUTH: it asks for a password"),
        ("WRONGPASS invalid username-password pair", "WRONGPASS: the user name or the password is wrong"),
        ("ERR max number of clients reached", "max number of clients reached"),
        ("NOPERM this user has no permissions to run the 'evalsha' command", "NOPERM: the user may not run evalsha"),
        ("ERR " + "x" * 1000, "x" * 100),
    ],
)
def test_the_reason_of_a_refusal_is_said_without_secrets(text: str, reason: str) -> None:
    parser: Any = DefaultParser
    assert reason_of(parser.parse_error(text)) == reason


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("redis://127.0.0.1:{free}", "127.0.0.1:{free}: the connection was refused: nothing listens there"),
        ("redis://localhost:{free}", "localhost:{free}: the connection was refused: nothing listens there"),
        ("redis://name.invalid:1", "name.invalid:1: the name name.invalid cannot be resolved"),
        (
            "redis+sentinel://127.0.0.1:{free}/main",
            "no Sentinel names a primary: 127.0.0.1:{free}: the connection was refused: nothing listens there",
        ),
        ("redis+sentinel://127.0.0.1:{redis}/main", "no Sentinel names a primary: 127.0.0.1:{redis}: unknown command"),
        ("rediss://127.0.0.1:{redis}", "127.0.0.1:{redis}: no connection with TLS in time"),
    ],
)
async def test_the_reason_of_a_missing_connection_is_said(
    redis_url: str, url: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.idempotency.redis_server._CONNECT_SHARE", 0.5 / PATIENCE_S)
    places = {"free": free_port(), "redis": urlsplit(redis_url).port}
    store = RedisStore(url.format_map(places), "test", ttl_s=60, lease_s=60)
    with pytest.raises(StoreUnavailable) as caught:
        await store.ping()
    await store.close()
    assert str(caught.value).startswith(f"Redis: {reason.format_map(places)}")


async def test_sentinels_that_disagree_name_no_primary(monkeypatch: pytest.MonkeyPatch) -> None:
    """One is cut off from the others, and the third hangs."""
    answers = iter([("a", 1), ("b", 1), "no answer in time"])

    async def ask(*_: object) -> object:
        return next(answers)

    monkeypatch.setattr("worker.idempotency.redis_server._ask", ask)
    with pytest.raises(Unreachable, match="disagree"):
        await primary_of(RedisAddress.parse("redis+sentinel://x,y,z/main"))


def test_an_error_of_the_operating_system_has_no_redis_code() -> None:
    assert code_of(redis.ConnectionError("Error 111 connecting to LOADING-host:6379.")) is None


@pytest.mark.parametrize("text", [text for text, _, is_other in ANSWERS if is_other])
async def test_an_error_that_names_another_server_ends_its_connection(text: str, redis_url: str) -> None:
    """The store would otherwise never reach the new primary."""

    def refuse(sock: socket.socket) -> None:
        while data := sock.recv(65536):
            if b"SETINFO" in data:
                sock.sendall(b"+OK\r\n" * data.count(b"SETINFO"))
            else:
                sock.sendall(f"-{text}\r\n".encode() * len(re.findall(rb"\*\d+\r\n\$", data)))

    with raw_server(refuse) as url, closing(Name(url.replace("http", "redis"))) as name:
        store = RedisStore(name.redis_url, f"test-{uuid4().hex}", ttl_s=60, lease_s=LONG_S)
        for call in (lambda: store.claim(key("a"), NOW), store.ping, lambda: store.owned_by_others("a", [U])):
            with pytest.raises(StoreUnavailable):
                await call()
        name.lead_to(redis_url)
        assert isinstance(await store.claim(key("a"), NOW), Unseen)
        assert await store.owned_by_others("a", [U]) == set()
        await store.ping()
        await store.close()


async def test_a_refusal_to_be_read_that_passes_tells_nothing_of_a_record() -> None:
    server = Server("--replica-serve-stale-data", "no")
    with servers(server), server.client() as client:
        store = RedisStore(server.url, "n", ttl_s=60, lease_s=LONG_S)
        await complete(store, held(await store.claim(key("a"), NOW)), reply("a", U))
        client.replicaof("127.0.0.1", free_port())
        with pytest.raises(StoreRefused, match="MASTERDOWN"):
            await store.is_known_not_sent(key("a"))
        await store.close()
