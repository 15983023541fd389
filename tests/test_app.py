"""Decisions of the composition root."""

import pytest

from tests.support.simulator import API_KEY
from worker.app import rate_limit_address
from worker.core.redis_address import RedisAddress
from worker.settings import Settings

REDIS_URLS = ["redis://localhost:6379/0", "rediss://localhost/0", "redis+sentinel://localhost/records/0"]


@pytest.mark.parametrize(("idempotency_url", "shared"), [("memory://", None), *((url, url) for url in REDIS_URLS)])
def test_workers_share_the_rate_limit_only_if_the_idempotency_store_is_redis(
    idempotency_url: str, shared: str | None
) -> None:
    settings = Settings.model_validate({"onenet_api_key": API_KEY, "idempotency_url": idempotency_url})
    assert rate_limit_address(settings) == (shared and RedisAddress.parse(shared))
