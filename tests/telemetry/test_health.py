"""Liveness judges what the worker itself can do, readiness what it needs; docs/operations.md has the same table."""

from dataclasses import replace
from typing import Any

import pytest

from worker.errors import StoreUnavailable
from worker.telemetry.health import GRACE_S, MAX_SILENCE_S, REFUSED_S, UNANSWERED_S, Condition, Health

STALL_S = 60.0
WORKING = Condition(is_connected=True, not_consuming_s=0)


class Clock:
    """The monotonic time, which a test advances."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def health(clock: Clock, **facts: Any) -> Health:
    """Return the health of a worker that works except for these facts; ``store``: why its store cannot be used."""
    error = facts.pop("store", None)

    def check_store() -> None:
        if error is not None:
            raise StoreUnavailable(error)

    found = Health(STALL_S, check_store, clock)
    found.report(replace(WORKING, **facts))
    return found


IDLE = {"not_consuming_s": 3600.0}
STATES: list[tuple[str, dict[str, Any], bool, bool]] = [
    ("it consumes", {}, True, True),
    ("commands wait for it, but not for long", {"ready_messages": 9, "none_taken_s": STALL_S}, True, True),
    ("it is a standby", {"ready_messages": 9, "none_taken_s": 3600.0, "is_standby": True}, True, True),
    ("it never consumed", {"not_consuming_s": float("inf")}, True, False),
    ("it reconnects", {"is_connected": False}, True, False),
    ("there is no broker", {"is_connected": False, **IDLE}, True, False),
    ("its password is being changed", {"is_connected": False, **IDLE, "refused_s": REFUSED_S}, True, False),
    ("its password was changed", {"is_connected": False, **IDLE, "refused_s": REFUSED_S + 1}, False, False),
    ("the broker is short of memory", {"is_blocked": True}, True, False),
    ("the broker is short of memory for long",
     {"is_blocked": True, **IDLE, "unanswered_s": 3600.0, "none_settled_s": 3600.0}, True, False),
    ("the broker confirms late", {"none_settled_s": GRACE_S, "unanswered_s": GRACE_S}, True, True),
    ("the broker rejects every publication", {"none_settled_s": 3600.0}, True, False),
    ("the broker does not answer a publication", {"unanswered_s": UNANSWERED_S, "none_settled_s": 60.0}, True, False),
    ("the broker never answers a publication", {"unanswered_s": UNANSWERED_S + 1}, False, False),
    ("its store cannot be used", {"store": "Redis: OOM"}, True, False),
    ("the platform throttles it", {"is_paused": True, "not_consuming_s": GRACE_S}, True, True),
    ("all products are paused", {"is_paused": True, **IDLE}, True, False),
    ("it stops", {"is_stopping": True, "not_consuming_s": 1.0}, True, False),
    ("it had no consumer for a moment", {"unexplained_s": STALL_S}, True, True),
    ("it has no consumer for no reason", {"unexplained_s": STALL_S + 1}, False, False),
    ("it takes nothing, alone with its queue", {"ready_messages": 9, "none_taken_s": STALL_S + 1}, False, False),
    ("a command takes long", {"longest_handling_s": STALL_S}, True, True),
    ("a command takes too long", {"longest_handling_s": STALL_S + 1}, False, False),
]  # fmt: skip


@pytest.mark.parametrize(
    ("facts", "live", "ready"), [state[1:] for state in STATES], ids=[state[0] for state in STATES]
)
def test_each_state_of_a_worker_has_its_answers(facts: dict[str, Any], live: bool, ready: bool, clock: Clock) -> None:
    found = health(clock, **facts)
    assert (found.liveness().ok, found.readiness().ok) == (live, ready)
    assert (found.liveness().details["live"], found.readiness().details["ready"]) == (live, ready)


def test_a_worker_whose_event_loop_is_blocked_is_neither_live_nor_ready(clock: Clock) -> None:
    found = health(clock)
    clock.now += MAX_SILENCE_S
    assert found.readiness().ok
    clock.now += 1
    assert not found.readiness().ok
    assert found.liveness().details == {"live": False, "event_loop_silent_s": MAX_SILENCE_S + 1}
    found.report(WORKING)
    assert found.readiness().ok


def test_a_worker_that_has_reported_nothing_yet_is_live_and_not_ready(clock: Clock) -> None:
    found = Health(STALL_S, lambda: None, clock)
    assert (found.liveness().ok, found.readiness().ok) == (True, False)


@pytest.mark.parametrize(
    ("facts", "details"),
    [
        ({"none_taken_s": 61.0, "ready_messages": 3}, {"ready_messages": 3, "none_taken_s": 61.0}),
        ({"longest_handling_s": 70.0}, {"longest_handling_s": 70.0}),
        ({"unanswered_s": 301.0}, {"publication_unanswered_s": 301.0}),
        ({"unexplained_s": 61.0}, {"without_consumer_s": 61.0}),
        ({"refused_s": 301.0}, {"refused_by_broker_s": 301.0}),
        ({"refused_s": 301.0, "longest_handling_s": 70.0}, {"refused_by_broker_s": 301.0, "longest_handling_s": 70.0}),
    ],
)
def test_a_worker_that_is_not_live_says_why(facts: dict[str, Any], details: dict[str, Any], clock: Clock) -> None:
    assert health(clock, **facts).liveness().details == {"live": False, **details}


@pytest.mark.parametrize(
    ("facts", "details"),
    [
        ({"is_connected": False}, {"broker_connected": False, "consuming": False}),
        ({"is_paused": True, "not_consuming_s": 16.0}, {"paused": True, "consuming": False}),
        ({"is_blocked": True}, {"publishing": False}),
        ({"none_settled_s": 16.0}, {"publishing": False}),
        ({"store": "Redis: OOM"}, {"store_reachable": False, "store_error": "Redis: OOM"}),
        ({"is_stopping": True}, {"stopping": True}),
        ({"unexplained_s": 61.0}, {"live": False}),
    ],
)
def test_a_worker_that_is_not_ready_says_what_it_lacks(
    facts: dict[str, Any], details: dict[str, Any], clock: Clock
) -> None:
    ready = {
        "ready": True, "live": True, "broker_connected": True, "consuming": True, "publishing": True, "paused": False,
        "store_reachable": True, "stopping": False,
    }  # fmt: skip
    assert health(clock).readiness().details == ready
    assert health(clock, **facts).readiness().details == ready | {"ready": False, **details}
