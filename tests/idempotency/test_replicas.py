"""Replicas and Sentinels: real ones, killed, stopped and promoted."""

import asyncio
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any
from uuid import uuid4

import pytest

from tests.support.redis_servers import Server, is_replicated, replicated, sentinel_url, servers, watched
from tests.support.stores import LONG_S, NOW, U, complete, held, key, reply
from tests.support.waiting import PATIENCE_S
from worker.core.claims import Completed, InProgress, KnownNotSent, Loss, Unresolved, Unseen
from worker.core.rate import Rate
from worker.core.redis_address import RedisAddress
from worker.dev.services.ports import wait_until
from worker.errors import StoreRefused, StoreUnavailable, StoreUnusable
from worker.flow.rate_limiter import RateLimiter
from worker.idempotency.latest_address import LatestAddress
from worker.idempotency.redis import RedisStore

Open = Callable[..., RedisStore]


@pytest.fixture
async def open_store() -> AsyncIterator[Open]:
    """Opens stores, all in one namespace."""
    made: list[RedisStore] = []
    namespace = f"test-{uuid4().hex}"

    def open_(url: str, **options: Any) -> RedisStore:
        made.append(RedisStore(url, namespace, **{"ttl_s": 60, "lease_s": LONG_S} | options))
        return made[-1]

    yield open_
    for store in made:
        await store.close()


@pytest.fixture
def pair() -> Iterator[list[Server]]:
    """A primary and its replica."""
    with replicated() as made:
        yield made


async def until_it_works(call: Callable[[], Awaitable[Any]]) -> Any:
    """Repeat a call until the store is available; returns its result."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                return await call()
            except StoreUnavailable:
                await asyncio.sleep(0.1)  # only Sentinels and replicas can end this


async def until_it_limits(limiter: RateLimiter) -> None:
    """Ask a limiter whose rate is used up until it says so."""

    async def limits() -> None:
        if not await limiter.acquire(None):  # always 0 while Redis does not answer
            raise StoreUnavailable("no limit")

    await until_it_works(limits)


async def test_a_claim_counts_when_the_replicas_have_it(open_store: Open, pair: list[Server]) -> None:
    store = open_store(pair[0].url, replicas=1)
    lease = held(await store.claim(key("a"), NOW))
    pair[0].kill()
    with pair[1].client() as client:
        client.replicaof("NO", "ONE")
    promoted = open_store(pair[1].url)
    assert isinstance(await promoted.claim(key("a"), NOW), InProgress)
    await complete(promoted, lease, reply("a", U))


@pytest.fixture
def short_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let stores wait for replicas for less than half a second."""
    monkeypatch.setattr("worker.idempotency.redis._WAIT_SHARE", 0.4 / PATIENCE_S)


@pytest.mark.usefixtures("short_wait")
async def test_a_claim_that_no_replica_has_is_given_back(open_store: Open, pair: list[Server]) -> None:
    """It was not sent, and the next claim knows."""
    store = open_store(pair[0].url, replicas=1)
    pair[1].signal(signal.SIGSTOP)
    with pytest.raises(StoreRefused, match=r"^Redis: NOWAIT: too few replicas confirmed in time what was written$"):
        await store.claim(key("a"), NOW)
    pair[1].signal(signal.SIGCONT)
    assert isinstance(await until_it_works(lambda: store.claim(key("a"), NOW)), KnownNotSent)


@pytest.mark.usefixtures("short_wait")
async def test_an_outcome_that_no_replica_has_is_recorded_and_not_told(open_store: Open, pair: list[Server]) -> None:
    store = open_store(pair[0].url, replicas=1)
    lease = held(await until_it_works(lambda: store.claim(key("a"), NOW)))
    pair[1].signal(signal.SIGSTOP)
    with pytest.raises(StoreRefused, match="NOWAIT"):
        await complete(store, lease, reply("a", U))
    with pytest.raises(StoreRefused, match="NOWAIT"):
        await store.claim(key("a"), NOW)  # nor is the recorded reply, before a replica has it
    with pytest.raises(StoreRefused, match="NOWAIT"):
        await store.ping()
    pair[1].signal(signal.SIGCONT)
    assert await until_it_works(lambda: store.claim(key("a"), NOW)) == Completed(reply("a", U))


async def test_one_wait_covers_all_claims_of_a_round_trip(open_store: Open, pair: list[Server]) -> None:
    store = open_store(pair[0].url, replicas=1)
    await store.claim(key("first"), NOW)
    with pair[0].client() as client:
        client.config_resetstat()
        await asyncio.gather(*(store.claim(key(str(number)), NOW) for number in range(50)))
        stats = client.info("commandstats")
    assert stats["cmdstat_evalsha"]["calls"] == 50
    assert stats["cmdstat_wait"]["calls"] == 1


async def test_a_promotion_is_recognised_by_a_worker_that_starts_after_it(open_store: Open, pair: list[Server]) -> None:
    await open_store(pair[0].url, replicas=1).claim(key("a"), NOW)
    pair[0].kill()
    with pair[1].client() as client:
        client.replicaof("NO", "ONE")
    newcomer = open_store(pair[1].url)
    claim = await newcomer.claim(key("b"), NOW)
    assert isinstance(claim, Unseen)
    assert claim.loss is Loss.ANY


async def test_a_replica_that_joins_is_no_loss(open_store: Open) -> None:
    """The primary takes a new history then, though nothing is lost."""
    primary = Server("--repl-diskless-sync-delay", "0")
    with servers(primary):
        store = open_store(primary.url)
        await store.claim(key("a"), NOW)
        replica = Server("--replicaof", "127.0.0.1", str(primary.port))
        with servers(replica), primary.client() as client:
            await asyncio.to_thread(wait_until, lambda: is_replicated(client, 1), PATIENCE_S, "the replica")
            claim = await store.claim(key("b"), NOW)
    assert isinstance(claim, Unseen)
    assert claim.loss is Loss.OF_REDELIVERIES


async def test_a_restart_is_recognised_by_a_worker_that_starts_after_it(open_store: Open) -> None:
    """Its append-only file may lack the last second."""
    server = Server("--appendonly", "yes", "--appendfsync", "always")
    with servers(server):
        store = open_store(server.url, lease_s=0.2)
        await store.claim(key("a"), NOW)
        server.kill()
        server.start()
        newcomer = open_store(server.url, lease_s=0.2)
        claim = await newcomer.claim(key("b"), NOW)
        assert isinstance(claim, Unseen)
        assert claim.loss is Loss.ANY
        again = await newcomer.claim(key("a"), NOW)
        assert isinstance(again, Unresolved | InProgress)


async def test_the_rate_limit_leaves_a_primary_that_hangs(pair: list[Server], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.flow.rate_limiter._TIMEOUT_S", 1.0)
    with watched(pair[0]) as sentinels:
        latest = LatestAddress(RedisAddress.parse(sentinel_url(sentinels)))
        limiter = RateLimiter(Rate(1, 600), f"test-{uuid4().hex}", latest)
        assert await limiter.acquire(None) == 0
        pair[0].signal(signal.SIGSTOP)

        await until_it_limits(limiter)
        await limiter.close()


async def test_both_connections_of_a_store_lead_to_the_same_server(open_store: Open, pair: list[Server]) -> None:
    """Each server knows other epochs: connections to two of them would find a loss at each claim."""
    addresses = [RedisAddress.parse(server.url) for server in pair]
    with pair[1].client() as client:
        client.replicaof("NO", "ONE")
    store = open_store(pair[0].url, read_address=lambda: addresses[0])
    await store.claim(key("a"), NOW)
    addresses.reverse()
    await store.ping()  # over a connection of its own, which is new
    await store.claim(key("b"), NOW)
    with pair[1].client() as client:
        assert len([name for name in client.keys("*") if "command:b" in name]) == 1


async def test_the_sentinels_lead_to_the_new_primary(
    open_store: Open, pair: list[Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.idempotency.redis_server.SENTINEL_S", 1.0)
    with watched(pair[0]) as sentinels:
        store = open_store(sentinel_url(sentinels))
        latest = LatestAddress(RedisAddress.parse(sentinel_url(sentinels)))
        limiter = RateLimiter(Rate(1, 600), f"test-{uuid4().hex}", latest)
        await until_it_works(store.ping)
        lease = held(await until_it_works(lambda: store.claim(key("a"), NOW)))
        assert await limiter.acquire(None) == 0
        await until_it_limits(limiter)
        pair[0].kill()
        sentinels[0].signal(signal.SIGSTOP)  # one that hangs does not hold up the others
        await until_it_works(store.ping)
        await until_it_works(lambda: complete(store, lease, reply("a", U)))
        assert await until_it_works(lambda: store.claim(key("a"), NOW)) == Completed(reply("a", U))
        claim = await until_it_works(lambda: store.claim(key("b"), NOW))
        assert isinstance(claim, Unseen)
        assert claim.loss is Loss.ANY
        await limiter.close()
        with pair[1].client() as client:
            assert client.info("replication")["role"] == "master"


async def test_sentinels_that_do_not_know_the_primary_are_an_unavailable_store(
    open_store: Open, pair: list[Server]
) -> None:
    with watched(pair[0], count=1) as sentinels:
        store = open_store(sentinel_url(sentinels).replace("records", "unknown"))
        with pytest.raises(StoreUnavailable):
            await store.ping()


async def test_redis_cluster_is_refused(open_store: Open) -> None:
    node = Server("--cluster-enabled", "yes")
    with (
        servers(node),
        pytest.raises(StoreUnusable, match=r"^Redis: CLUSTER: Redis Cluster is not supported: use one server, or"),
    ):
        await open_store(node.url).ping()
