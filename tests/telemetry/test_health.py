"""Liveness and readiness of a worker."""

from dataclasses import dataclass, field

import pytest

from worker.errors import StoreUnavailable
from worker.telemetry.health import MAX_SILENCE_S, Health

STALL_S = 60.0


@dataclass
class Worker:
    """A worker's health, on a clock that the test advances."""

    now: float = 1000.0
    is_store_reachable: bool = True
    health: Health = field(init=False)

    def __post_init__(self) -> None:
        self.health = Health(STALL_S, self.ping_store, lambda: self.now)
        self.heartbeat()

    def ping_store(self) -> None:
        if not self.is_store_reachable:
            raise StoreUnavailable

    def heartbeat(self, *, is_connected: bool = True, is_stopping: bool = False) -> None:
        self.health.heartbeat(is_connected=is_connected, is_stopping=is_stopping)

    def run_for(
        self, seconds: int, *, ready: int, idle_is_expected: bool = False, taken_at: float = 0, longest_s: float = 0
    ) -> None:
        """Send a heartbeat every second, and observe the queue every ten seconds."""
        for second in range(1, seconds + 1):
            self.now += 1
            self.heartbeat()
            if second % 10 == 0:
                self.health.observe_queue(ready, taken_at, longest_s, idle_is_expected=idle_is_expected)

    @property
    def is_live(self) -> bool:
        return self.health.liveness().ok

    @property
    def is_ready(self) -> bool:
        return self.health.readiness().ok


@pytest.fixture
def worker() -> Worker:
    return Worker()


def test_a_worker_whose_event_loop_is_blocked_is_not_live(worker: Worker) -> None:
    worker.now += MAX_SILENCE_S
    assert worker.is_live
    worker.now += 1
    assert not worker.is_live
    assert worker.health.liveness().details == {"live": False, "event_loop_silent_s": MAX_SILENCE_S + 1}


def test_a_worker_that_takes_no_deliveries_while_commands_wait_is_not_live(worker: Worker) -> None:
    """It is running, connected and idle, which most probes accept."""
    worker.run_for(60, ready=3)
    assert worker.is_live
    worker.run_for(1, ready=3)
    assert not worker.is_live
    assert worker.health.liveness().details == {"live": False, "ready_messages": 3, "none_taken_s": 61.0}


def test_a_worker_that_takes_one_delivery_a_minute_is_live(worker: Worker) -> None:
    for _ in range(5):
        worker.run_for(50, ready=3, taken_at=worker.now)
        assert worker.is_live


def test_a_stalled_worker_is_live_again_after_it_takes_a_delivery(worker: Worker) -> None:
    worker.run_for(100, ready=3)
    assert not worker.is_live
    worker.run_for(10, ready=3, taken_at=worker.now)
    assert worker.is_live


def test_a_worker_with_an_empty_queue_is_live(worker: Worker) -> None:
    worker.run_for(600, ready=0)
    assert worker.is_live


def test_the_stall_timeout_starts_when_the_reason_for_being_idle_ends(worker: Worker) -> None:
    worker.run_for(600, ready=3, idle_is_expected=True)
    worker.run_for(60, ready=3)
    assert worker.is_live
    worker.run_for(1, ready=3)
    assert not worker.is_live


def test_a_worker_with_a_stuck_delivery_is_not_live_even_if_its_queue_is_empty(worker: Worker) -> None:
    """Name resolution has no timeout of its own, and an unacknowledged delivery is not ready in the queue."""
    worker.run_for(10, ready=0, longest_s=STALL_S)
    assert worker.is_live
    worker.run_for(10, ready=0, longest_s=STALL_S + 10)
    assert worker.health.liveness().details == {"live": False, "longest_handling_s": STALL_S + 10}


@pytest.mark.parametrize("failing", ["broker", "store", "liveness", "stopping"])
def test_a_ready_worker_is_live_not_stopping_and_reaches_broker_and_store(worker: Worker, failing: str) -> None:
    assert worker.is_ready
    worker.heartbeat(is_connected=failing != "broker", is_stopping=failing == "stopping")
    worker.is_store_reachable = failing != "store"
    worker.now += MAX_SILENCE_S + 1 if failing == "liveness" else 0
    assert not worker.is_ready
