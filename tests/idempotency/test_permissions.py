"""The rights that docs/security.md names are enough, and the probe notices each that is missing."""

import re
from collections.abc import AsyncIterator, Callable
from uuid import uuid4

import pytest
import redis

from tests.support.security import acl
from tests.support.stores import DOUBT, LONG_S, NOW, U, complete, held, key, reply
from worker.core.claims import Completed, Unresolved
from worker.core.rate import Rate
from worker.core.redis_address import RedisAddress
from worker.dev.services.redis import LocalRedis
from worker.errors import StoreRefused
from worker.flow.rate_limiter import RateLimiter
from worker.idempotency.latest_address import LatestAddress
from worker.idempotency.redis import RedisStore

NAMESPACE = f"test-{uuid4().hex}"
COMMANDS = [rule.removeprefix("+") for rule in acl("worker") if rule.startswith("+") and rule != "+wait"]
OF_THE_RATE_LIMIT = {"get", "script|load"}

Login = Callable[..., str]


@pytest.fixture
async def login(own_redis: LocalRedis) -> AsyncIterator[Login]:
    """Returns the URL of a user with some commands, and only the keys of the namespace."""
    with redis.Redis.from_url(own_redis.url) as raw:

        def create(commands: list[str]) -> str:
            rules = ["reset", "on", ">secret", f"~{{{NAMESPACE}}}:*", *(f"+{name}" for name in commands)]
            raw.execute_command("ACL", "SETUSER", "worker", *rules)
            return own_redis.url.replace("redis://", "redis://worker:secret@")

        yield create
        raw.execute_command("ACL", "DELUSER", "worker")


async def test_the_documented_commands_are_all_that_a_worker_needs(login: Login) -> None:
    url = login(COMMANDS)
    store = RedisStore(url, NAMESPACE, ttl_s=60, lease_s=LONG_S)
    await store.ping()
    await store.release(held(await store.claim(key("a"), NOW)), DOUBT)
    claim = await store.claim(key("a"), NOW)
    assert isinstance(claim, Unresolved)
    await store.owned_by_others("a", [U])
    await store.ownership(claim.lease, [U])
    await complete(store, claim.lease, reply("a", U))
    assert await store.claim(key("a"), NOW) == Completed(reply("a", U))
    await store.inspect()
    await store.close()
    limiter = RateLimiter(Rate(1, 600), NAMESPACE, LatestAddress(RedisAddress.parse(url)))
    await limiter.acquire("a")
    assert await limiter.acquire("a") > 0
    await limiter.close()


@pytest.mark.parametrize("missing", sorted({*COMMANDS} - OF_THE_RATE_LIMIT - {"info", "eval"}))
async def test_the_probe_notices_each_missing_command(login: Login, own_redis: LocalRedis, missing: str) -> None:
    """Also the first one, when Redis knows no script yet."""
    store = RedisStore(login([name for name in COMMANDS if name != missing]), NAMESPACE, ttl_s=60, lease_s=LONG_S)
    with redis.Redis.from_url(own_redis.url) as raw:
        raw.script_flush()
    try:
        # Of a command within a script Redis 7.0 does not say which one it is.
        named = rf"^Redis: NOPERM: the user may not run ({re.escape(missing)}|one of the commands that docs/\S+ names)$"
        with pytest.raises(StoreRefused, match=named):
            await store.ping()
    finally:
        await store.close()


@pytest.mark.parametrize("missing", ["get", "set", "script|load", "evalsha", "del"])
async def test_the_probe_of_the_rate_limit_notices_each_missing_command(
    login: Login, own_redis: LocalRedis, missing: str
) -> None:
    assert missing in COMMANDS
    address = RedisAddress.parse(login([name for name in COMMANDS if name != missing]))
    limiter = RateLimiter(Rate(1, 600), NAMESPACE, LatestAddress(address))
    with redis.Redis.from_url(own_redis.url) as raw:
        raw.script_flush()
    try:
        with pytest.raises(StoreRefused, match=r"^Redis: NOPERM: "):
            await limiter.ping()
    finally:
        await limiter.close()


async def test_a_limit_whose_keys_are_refused_allows_no_request_and_says_so(login: Login) -> None:
    """The store's keys may be permitted: then nothing else would keep the requests below the rate."""
    limiter = RateLimiter(Rate(1, 600), "other", LatestAddress(RedisAddress.parse(login(COMMANDS))))
    refusals: list[str] = []
    limiter.on_refused = lambda error: refusals.append(str(error))
    try:
        assert await limiter.acquire(None) > 0
    finally:
        await limiter.close()
    assert refusals == ["Redis: NOPERM: the user may not use the keys of WORKER_NAMESPACE"]


async def test_a_user_who_may_not_wait_for_replicas_is_told_so(login: Login) -> None:
    store = RedisStore(login(COMMANDS), NAMESPACE, ttl_s=60, lease_s=LONG_S, replicas=1)
    try:
        for call in (store.ping(), store.claim(key("w"), NOW)):
            with pytest.raises(StoreRefused, match=r"^Redis: NOPERM: the user may not run wait$"):
                await call
    finally:
        await store.close()


async def test_another_database_needs_one_more_command(login: Login) -> None:
    for commands, is_enough in ((COMMANDS, False), ([*COMMANDS, "select"], True)):
        store = RedisStore(login(commands).removesuffix("/0") + "/1", NAMESPACE, ttl_s=60, lease_s=LONG_S)
        try:
            if is_enough:
                await store.ping()
            else:
                with pytest.raises(StoreRefused, match=r"^Redis: NOPERM: the user may not run select$"):
                    await store.ping()
        finally:
            await store.close()


async def test_the_probe_notices_that_the_user_has_other_keys(login: Login) -> None:
    store = RedisStore(login(COMMANDS), "other", ttl_s=60, lease_s=LONG_S)
    try:
        with pytest.raises(StoreRefused, match=r"^Redis: NOPERM: the user may not use the keys of WORKER_NAMESPACE$"):
            await store.ping()
    finally:
        await store.close()


async def test_a_wrong_password_is_a_refusal_that_concerns_all(login: Login) -> None:
    store = RedisStore(login(COMMANDS).replace("secret", "wrong"), NAMESPACE, ttl_s=60, lease_s=LONG_S)
    try:
        with pytest.raises(StoreRefused, match=r"^Redis: WRONGPASS: ") as caught:
            await store.claim(key("a"), NOW)
        assert caught.value.concerns_all
        assert await store.is_known_not_sent(key("a")) is None  # nothing can be read for long
    finally:
        await store.close()
