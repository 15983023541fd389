"""When a worker counts as living, and when as ready."""

from dataclasses import dataclass, field

import pytest

from worker.errors import StoreUnavailable
from worker.telemetry.health import MAX_SILENCE_S, Health

STALL_S = 60.0


@dataclass
class Worker:
    """A worker's health on a clock that goes on by hand."""

    now: float = 1000.0
    is_store_there: bool = True
    health: Health = field(init=False)

    def __post_init__(self) -> None:
        self.health = Health(STALL_S, self.ping_store, lambda: self.now)
        self.beat()

    def ping_store(self) -> None:
        if not self.is_store_there:
            raise StoreUnavailable

    def beat(self, *, is_connected: bool = True, is_stopping: bool = False) -> None:
        self.health.beat(is_connected=is_connected, is_stopping=is_stopping)

    def live_through(
        self, seconds: int, *, ready: int, is_excused: bool = False, taken_at: float = 0, longest_s: float = 0
    ) -> None:
        """Beat each second, and look at the queue every ten."""
        for second in range(1, seconds + 1):
            self.now += 1
            self.beat()
            if second % 10 == 0:
                self.health.look(ready, taken_at, longest_s, is_excused=is_excused)

    @property
    def is_live(self) -> bool:
        return self.health.liveness().is_good

    @property
    def is_ready(self) -> bool:
        return self.health.readiness().is_good


@pytest.fixture
def worker() -> Worker:
    return Worker()


def test_an_event_loop_that_hangs_is_not_live(worker: Worker) -> None:
    worker.now += MAX_SILENCE_S
    assert worker.is_live
    worker.now += 1
    assert not worker.is_live
    assert worker.health.liveness().facts == {"live": False, "event_loop_silent_s": MAX_SILENCE_S + 1}


def test_a_worker_that_takes_nothing_while_commands_wait_is_not_live(worker: Worker) -> None:
    """It is up, connected and idle: what probes usually miss."""
    worker.live_through(60, ready=3)
    assert worker.is_live
    worker.live_through(1, ready=3)
    assert not worker.is_live
    assert worker.health.liveness().facts == {"live": False, "ready_messages": 3, "none_taken_s": 61.0}


def test_one_command_a_minute_is_life(worker: Worker) -> None:
    for _ in range(5):
        worker.live_through(50, ready=3, taken_at=worker.now)
        assert worker.is_live


def test_it_lives_again_as_soon_as_it_takes_a_command(worker: Worker) -> None:
    worker.live_through(100, ready=3)
    assert not worker.is_live
    worker.live_through(10, ready=3, taken_at=worker.now)
    assert worker.is_live


def test_an_empty_queue_is_no_stall(worker: Worker) -> None:
    worker.live_through(600, ready=0)
    assert worker.is_live


def test_a_reason_for_taking_nothing_is_no_stall_and_the_minute_begins_when_it_ends(worker: Worker) -> None:
    worker.live_through(600, ready=3, is_excused=True)
    worker.live_through(60, ready=3)
    assert worker.is_live
    worker.live_through(1, ready=3)
    assert not worker.is_live


def test_a_thread_that_hangs_is_found_beside_an_empty_queue(worker: Worker) -> None:
    """The look-up of a name has no time limit of its own, and what a thread holds is not in the queue."""
    worker.live_through(10, ready=0, longest_s=STALL_S)
    assert worker.is_live
    worker.live_through(10, ready=0, longest_s=STALL_S + 10)
    assert worker.health.liveness().facts == {"live": False, "longest_handling_s": STALL_S + 10}


@pytest.mark.parametrize("missing", ["broker", "store", "life", "will"])
def test_ready_needs_a_broker_a_store_life_and_the_will_to_go_on(worker: Worker, missing: str) -> None:
    assert worker.is_ready
    worker.beat(is_connected=missing != "broker", is_stopping=missing == "will")
    worker.is_store_there = missing != "store"
    worker.now += MAX_SILENCE_S + 1 if missing == "life" else 0
    assert not worker.is_ready
