"""The rate limit of each product, in one process and shared through Redis."""

from uuid import uuid4

import pytest

from worker.core.rate import Rate
from worker.dev.services.redis import LocalRedis
from worker.flow.rate_limiter import RateLimiter

ONE_A_DAY = Rate(1, 86_400)  # so slow that no second request is allowed within a test


@pytest.fixture(params=["memory", "redis"])
def url(request: pytest.FixtureRequest) -> str | None:
    return None if request.param == "memory" else str(request.getfixturevalue("redis_url"))


def test_a_request_above_the_rate_must_wait(url: str | None) -> None:
    limiter = RateLimiter(ONE_A_DAY, f"test-{uuid4()}", url)
    assert limiter.acquire(None) == 0
    assert 86_000 < limiter.acquire(None) <= 86_400


def test_each_product_has_its_own_limit(url: str | None) -> None:
    limiter = RateLimiter(ONE_A_DAY, f"test-{uuid4()}", url)
    assert [limiter.acquire(product) for product in (None, "heating", "default")] == [0, 0, 0]
    assert limiter.acquire("heating") > 0


def test_the_burst_is_a_tenth_of_a_seconds_worth_of_requests(url: str | None) -> None:
    limiter = RateLimiter(Rate(100_000, 10_000), f"test-{uuid4()}", url)  # 10 a second: a burst of 1
    assert limiter.acquire(None) == 0
    assert limiter.acquire(None) > 0
    limiter = RateLimiter(Rate(36_000_000, 360_000), f"test-{uuid4()}", url)  # 100 a second: a burst of 10
    assert [limiter.acquire(None) for _ in range(10)] == [0] * 10


def test_workers_with_the_same_redis_and_namespace_share_one_limit(redis_url: str) -> None:
    namespace = f"test-{uuid4()}"
    one, other = (RateLimiter(ONE_A_DAY, namespace, redis_url) for _ in range(2))
    assert one.acquire(None) == 0
    assert other.acquire(None) > 0


def test_the_limiter_does_not_delay_requests_while_redis_is_unavailable(own_redis: LocalRedis) -> None:
    """The idempotency store then postpones the commands, and nothing is sent."""
    limiter = RateLimiter(ONE_A_DAY, f"test-{uuid4()}", own_redis.url)
    own_redis.kill()
    try:
        assert [limiter.acquire(None), limiter.acquire(None)] == [0, 0]
    finally:
        own_redis.start()
