"""What the monitor reports of a worker: which states explain that it takes no deliveries, and when it reconnects."""

from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from worker.monitor import HealthMonitor
from worker.telemetry.health import Condition, Health

STALL_S = 60.0
ABLE_TO_CONSUME: dict[str, Any] = {
    "is_connected": True,
    "is_publishing_impaired": False,
    "may_send": True,
    "is_available": True,
    "is_rate_limiting": False,
    "is_stopping": False,
}


@dataclass
class Parts:
    """The state of a worker's broker, consumer, breakers and store, on a clock that the test advances."""

    now: float = 1000.0
    is_connected: bool = True
    is_publishing_impaired: bool = False
    may_send: bool = True
    is_available: bool = True
    is_rate_limiting: bool = False
    is_stopping: bool = False
    is_blocked: bool = False
    is_consuming: bool = True
    unacknowledged: int = 0
    unanswered_s: float = 0
    refused_s: float = 0
    none_settled_s: float = 0
    longest_processing_s: float = 0
    consumers: int = 1
    is_changing_consumer: bool = False
    other_consumers: int = 0  # when the session began
    taken_at: float = 1000.0
    queue: tuple[int, int] | None = (0, 1)  # ready messages and consumers
    reconnections: list[str] = field(default_factory=list)
    monitor: HealthMonitor = field(init=False)

    def __post_init__(self) -> None:
        self.monitor = self.watched()

    def watched(self) -> HealthMonitor:
        parts, health = cast("Any", self), Health(STALL_S, lambda: None, lambda: self.now)
        return HealthMonitor(parts, parts, None, parts, parts, health, dict, clock=lambda: self.now)

    def allows_any(self) -> bool:
        return self.may_send

    async def look_at_queue(self) -> tuple[int, int] | None:
        return self.queue

    def reconnect(self, reason: str) -> None:
        self.reconnections.append(reason)

    async def pass_time(self, seconds: float = 0.0, **changes: Any) -> Condition:
        """Change the state, let time pass, and return what is reported after another poll of the queue."""
        self.monitor.condition()
        for name, value in changes.items():
            setattr(self, name, value)
        self.now += seconds
        await self.monitor.poll_queue()
        return self.monitor.condition()


@pytest.fixture
def parts() -> Parts:
    return Parts()


async def test_a_worker_that_takes_what_waits_reports_nothing_unusual(parts: Parts) -> None:
    await parts.pass_time(queue=(5, 1))
    for _ in range(5):
        report = await parts.pass_time(50, taken_at=parts.now + 45)
        assert report.none_taken_s == 0
    assert not parts.reconnections


async def test_a_worker_with_an_empty_queue_may_take_nothing(parts: Parts) -> None:
    report = await parts.pass_time(600)
    assert (report.none_taken_s, report.unexplained_s, report.not_consuming_s) == (0, 0, 0)


async def test_a_worker_that_gets_nothing_reconnects_once(parts: Parts) -> None:
    """A broker may have forgotten its consumer, for example after a partition."""
    await parts.pass_time(queue=(5, 1))
    report = await parts.pass_time(STALL_S)
    assert (report.none_taken_s, report.ready_messages, parts.reconnections) == (0, 5, [])
    report = await parts.pass_time(1)
    assert report.none_taken_s == 0
    assert parts.reconnections == ["no delivery arrives, though 5 messages wait"]
    report = await parts.pass_time(STALL_S + 1)
    assert (report.none_taken_s, report.is_standby) == (STALL_S + 1, False)
    assert len(parts.reconnections) == 1


async def test_a_worker_that_got_something_since_reconnects_again(parts: Parts) -> None:
    await parts.pass_time(queue=(5, 1))
    await parts.pass_time(STALL_S + 1)
    await parts.pass_time(1, taken_at=parts.now + 1)
    await parts.pass_time(STALL_S + 1)
    assert len(parts.reconnections) == 2


async def test_a_worker_that_holds_deliveries_does_not_give_them_back(parts: Parts) -> None:
    await parts.pass_time(queue=(5, 2), unacknowledged=1)
    report = await parts.pass_time(STALL_S + 1)
    assert (report.none_taken_s, report.is_standby, parts.reconnections) == (STALL_S + 1, False, [])


@pytest.mark.parametrize(
    ("own", "all_", "before", "is_standby"),
    [(1, 2, 0, True), (1, 1, 1, True), (1, 1, 0, False), (0, 1, 1, False), (0, 0, 0, False), (2, 2, 0, False)],
)
async def test_a_standby_has_a_consumer_beside_those_of_others(
    own: int, all_: int, before: int, is_standby: bool, parts: Parts
) -> None:
    """Of a queue with a single active consumer the broker counts that one only; it is seen before the own one."""
    report = await parts.pass_time(consumers=own, queue=(5, all_), other_consumers=before)
    assert report.is_standby == is_standby


@pytest.mark.parametrize("state", ABLE_TO_CONSUME)
async def test_a_known_reason_explains_that_nothing_is_taken(state: str, parts: Parts) -> None:
    await parts.pass_time(queue=(5, 1), consumers=0, **{state: not ABLE_TO_CONSUME[state]})
    report = await parts.pass_time(600)
    assert (report.none_taken_s, report.unexplained_s, parts.reconnections) == (0, 0, [])
    await parts.pass_time(**{state: ABLE_TO_CONSUME[state]})
    report = await parts.pass_time(STALL_S)
    assert (report.unexplained_s, parts.reconnections) == (STALL_S, [])  # counted from the end of the reason
    await parts.pass_time(1)
    assert len(parts.reconnections) == 1


async def test_a_worker_without_a_consumer_reports_for_how_long(parts: Parts) -> None:
    report = await parts.pass_time(30, consumers=0)
    assert report.unexplained_s == 30
    report = await parts.pass_time(consumers=1)
    assert report.unexplained_s == 0


@pytest.mark.parametrize("change", [{"is_connected": False}, {"is_consuming": False}])
async def test_a_worker_reports_how_long_it_has_consumed_nothing(change: dict[str, bool], parts: Parts) -> None:
    report = await parts.pass_time(30)
    assert report.not_consuming_s == 0
    report = await parts.pass_time(30, **change)
    assert report.not_consuming_s == 30


async def test_a_worker_that_never_consumed_is_not_said_to_have(parts: Parts) -> None:
    parts.is_connected = False
    assert parts.watched().condition().not_consuming_s == float("inf")


async def test_states_of_the_parts_are_reported_as_they_are(parts: Parts) -> None:
    report = await parts.pass_time(
        is_stopping=True, is_blocked=True, may_send=False, longest_processing_s=3, unanswered_s=4, none_settled_s=5,
        refused_s=6,
    )  # fmt: skip
    assert (report.is_stopping, report.is_blocked, report.is_paused) == (True, True, True)
    assert (report.longest_handling_s, report.unanswered_s, report.none_settled_s, report.refused_s) == (3, 4, 5, 6)
