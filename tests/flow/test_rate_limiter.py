"""The rate limit of each product, in one process and shared through Redis."""

import asyncio
from collections.abc import AsyncIterator, Callable
from uuid import uuid4

import pytest

from tests.support.proxies import raw_server
from worker.core.rate import Rate
from worker.core.redis_address import RedisAddress
from worker.dev.services.redis import LocalRedis
from worker.flow.rate_limiter import RateLimiter
from worker.idempotency.latest_address import LatestAddress

ONE_A_DAY = Rate(1, 86_400)  # so slow that no second request is allowed within a test

Make = Callable[..., RateLimiter]


@pytest.fixture
async def make() -> AsyncIterator[Make]:
    """Makes limiters, by default in a namespace of its own."""
    made: list[RateLimiter] = []

    def build(rate: Rate, url: str | None, namespace: str | None = None) -> RateLimiter:
        latest = LatestAddress(RedisAddress.parse(url)) if url else None
        made.append(RateLimiter(rate, namespace or f"test-{uuid4()}", latest))
        return made[-1]

    yield build
    for limiter in made:
        await limiter.close()


@pytest.fixture(params=["memory", "redis"])
def url(request: pytest.FixtureRequest) -> str | None:
    return None if request.param == "memory" else request.getfixturevalue("redis_url")


async def test_a_request_above_the_rate_must_wait(make: Make, url: str | None) -> None:
    limiter = make(ONE_A_DAY, url)
    assert await limiter.acquire(None) == 0
    assert 86_000 < await limiter.acquire(None) <= 86_400


async def test_each_product_has_its_own_limit(make: Make, url: str | None) -> None:
    limiter = make(ONE_A_DAY, url)
    assert [await limiter.acquire(product) for product in (None, "heating", "default")] == [0, 0, 0]
    assert await limiter.acquire("heating") > 0


@pytest.mark.parametrize(
    ("rate", "burst"),
    [
        pytest.param(Rate(500_000, 10_000), 1, id="50-a-second"),
        pytest.param(Rate(180_000_000, 360_000), 10, id="500-a-second"),
    ],
)
async def test_the_burst_is_a_fiftieth_of_a_seconds_worth_of_requests(
    make: Make, url: str | None, rate: Rate, burst: int
) -> None:
    limiter, loop = make(rate, url), asyncio.get_running_loop()
    began_at = loop.time()
    allowed = (await asyncio.gather(*(limiter.acquire(None) for _ in range(3 * burst)))).count(0)
    earned_meanwhile = rate.count / rate.period_s * (loop.time() - began_at)
    assert burst <= allowed <= burst + earned_meanwhile


async def test_no_period_has_more_requests_than_the_rate_allows(make: Make) -> None:
    """The burst at its beginning included: OneNET counts the calls of any second."""
    limiter, loop = make(Rate(200, 1), None), asyncio.get_running_loop()
    asked: list[float] = []  # when each request that was allowed was asked for; it was allowed between then
    allowed: list[float] = []  # and now, so that a delay between the two makes no period look fuller than it was
    while not allowed or allowed[-1] < asked[0] + 1.2:
        asked_at = loop.time()
        wait_s = await limiter.acquire(None)
        if wait_s:
            await asyncio.sleep(wait_s)
        else:
            asked.append(asked_at)
            allowed.append(loop.time())
    for first in asked:
        assert len([at for begun, at in zip(asked, allowed, strict=True) if first <= begun and at < first + 1]) <= 200


async def test_one_of_many_concurrent_requests_may_be_sent(make: Make, url: str | None) -> None:
    limiter = make(ONE_A_DAY, url)
    assert (await asyncio.gather(*(limiter.acquire(None) for _ in range(20)))).count(0) == 1


async def test_workers_with_the_same_redis_and_namespace_share_one_limit(make: Make, redis_url: str) -> None:
    namespace = f"test-{uuid4()}"
    one, other = (make(ONE_A_DAY, redis_url, namespace) for _ in range(2))
    assert await one.acquire(None) == 0
    assert await other.acquire(None) > 0


async def test_the_limiter_does_not_delay_requests_while_redis_is_unavailable(
    make: Make, own_redis: LocalRedis
) -> None:
    """The idempotency store then postpones the commands, and nothing is sent."""
    limiter = make(ONE_A_DAY, own_redis.url)
    own_redis.kill()
    try:
        assert [await limiter.acquire(None), await limiter.acquire(None)] == [0, 0]
    finally:
        own_redis.start()


async def test_the_limiter_asks_a_redis_that_does_not_answer_only_once_more(make: Make) -> None:
    """Not again and again: all commands of the product wait for it."""
    asked: list[object] = []
    with raw_server(asked.append) as url:
        assert await make(ONE_A_DAY, url.replace("http://", "redis://")).acquire(None) == 0
    assert len(asked) == 2
