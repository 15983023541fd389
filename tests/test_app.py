"""Decisions of the composition root."""

import pytest

from tests.support.simulator import API_KEY
from worker.app import rate_limit_url
from worker.settings import Settings

REDIS_URL = "redis://localhost:6379/0"


@pytest.mark.parametrize(("idempotency_url", "shared"), [("memory://", None), (REDIS_URL, REDIS_URL)])
def test_workers_share_the_rate_limit_only_if_the_idempotency_store_is_redis(
    idempotency_url: str, shared: str | None
) -> None:
    settings = Settings.model_validate({"onenet_api_key": API_KEY, "idempotency_url": idempotency_url})
    assert rate_limit_url(settings) == shared
