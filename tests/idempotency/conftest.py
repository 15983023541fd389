"""Redis has time to answer in these tests, however slow the machine; a test of a time limit sets one."""

import pytest

from tests.support.waiting import PATIENCE_S


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in ("redis.TIMEOUT_S", "redis.PING_S", "redis_server.SENTINEL_S"):
        monkeypatch.setattr(f"worker.idempotency.{limit}", float(PATIENCE_S))
    monkeypatch.setattr("worker.flow.rate_limiter._TIMEOUT_S", float(PATIENCE_S))
