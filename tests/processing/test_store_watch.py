"""A store that cannot be used: noticed at once, said once, and asked until it can."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest
from structlog.testing import capture_logs

from tests.support.waiting import until
from worker.errors import StoreRefused, StoreUnavailable, StoreUnusable
from worker.processing.store_watch import StoreWatch


class Store:
    """A store that answers as the test says, and counts the probes."""

    def __init__(self) -> None:
        self.error: StoreUnavailable | None = None
        self.probes = 0
        self.on_unavailable: Any = None

    async def ping(self) -> None:
        self.probes += 1
        if self.error is not None:
            raise self.error


class Rig:
    """A watch that runs, and its events."""

    def __init__(self, events: list[Any]) -> None:
        self.store = Store()
        self.watch = StoreWatch(cast("Any", self.store), self.store.ping)
        self.changes = 0
        self.watch.on_change = self._count
        self.events = events
        self.running = asyncio.create_task(self.watch.run())

    def _count(self) -> None:
        self.changes += 1

    def said(self) -> list[tuple[str, str | None]]:
        return [(event["event"], event.get("reason")) for event in self.events]


@pytest.fixture
async def rig(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Rig]:
    monkeypatch.setattr("worker.processing.store_watch.PROBE_INTERVAL_S", 0.001)
    with capture_logs() as events:
        made = Rig(events)
        await until(lambda: made.store.probes == 1)
        yield made
        made.running.cancel()


async def test_a_refusal_stops_at_once_and_is_said_once_until_a_probe_succeeds(rig: Rig) -> None:
    rig.store.error = StoreRefused("Redis: OOM: out of memory")
    for _ in range(3):
        rig.store.on_unavailable(rig.store.error)
    assert not rig.watch.is_available
    await until(lambda: rig.store.probes >= 5)
    rig.store.error = None
    await until(lambda: rig.watch.is_available)
    assert rig.said() == [("store_unavailable", "Redis: OOM: out of memory"), ("store_available", None)]
    assert rig.changes == 2


@pytest.mark.parametrize(
    "error",
    [StoreUnavailable("Redis: ConnectionError"), StoreRefused("Redis: ResponseError", concerns_all=False)],
)
async def test_one_lost_connection_or_one_odd_record_stops_nothing(rig: Rig, error: StoreUnavailable) -> None:
    rig.store.on_unavailable(error)
    await until(lambda: rig.store.probes == 2)
    assert rig.watch.is_available
    assert rig.said() == []


async def test_a_store_that_does_not_answer_the_probe_either_is_unavailable(rig: Rig) -> None:
    rig.store.error = StoreUnavailable("Redis: TimeoutError")
    rig.store.on_unavailable(rig.store.error)
    await until(lambda: not rig.watch.is_available)
    rig.store.error = StoreUnavailable("Redis: ConnectionError")
    await until(lambda: rig.watch.reason == "Redis: ConnectionError")  # what /readyz and the log of a pause say
    assert rig.said() == [("store_unavailable", "Redis: TimeoutError")]


async def test_a_store_that_will_never_be_usable_ends_the_watch(rig: Rig) -> None:
    rig.store.error = StoreUnusable("Redis: CLUSTER: not supported")
    rig.store.on_unavailable(rig.store.error)
    with pytest.raises(StoreUnusable):
        await rig.running


async def test_an_outage_lasts_from_the_refusal_to_the_probe_that_succeeds(rig: Rig) -> None:
    assert rig.watch.outage_s == 0
    rig.store.error = StoreRefused("Redis: OOM: out of memory")
    rig.store.on_unavailable(rig.store.error)
    began = rig.watch.outage_s
    await until(lambda: rig.watch.outage_s > began)
    rig.store.error = None
    await until(lambda: rig.watch.is_available)
    assert rig.watch.outage_s == 0
