"""When a product is paused, probed, and goes on; on a clock that the tests move."""

import pytest
from structlog.testing import capture_logs

from worker.processing.circuit_breaker import MAX_HOLD_S, CircuitBreaker, CircuitBreakers, Permit

PAUSE_AFTER, PROBE_S = 3, 5


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def gates(clock: Clock) -> CircuitBreakers:
    return CircuitBreakers([None, "heating"], PAUSE_AFTER, PROBE_S, clock)


def enter(gates: CircuitBreakers, product: str | None = None) -> Permit:
    passage = gates.enter(product)
    assert passage is not None
    return passage


def fail(gates: CircuitBreakers, count: int = 1, product: str | None = None, asked_s: float | None = None) -> None:
    for passage in [enter(gates, product) for _ in range(count)]:
        passage.failed("HTTP 503", asked_s)
        passage.end()


def test_so_many_failures_in_a_row_pause_a_product(gates: CircuitBreakers) -> None:
    fail(gates, PAUSE_AFTER - 1)
    assert gates.is_open(None)
    with capture_logs() as logs:
        fail(gates)
    assert not gates.is_open(None)
    assert gates.enter(None) is None
    [line] = logs
    assert line == {
        "event": "product_paused",
        "log_level": "warning",
        "product": None,
        "reason": "3 failures in a row, the latest: HTTP 503",
        "next_try_in_s": 5.0,
    }


def test_a_clear_answer_in_between_begins_a_new_row(gates: CircuitBreakers) -> None:
    fail(gates, PAUSE_AFTER - 1)
    enter(gates).answered()
    fail(gates, PAUSE_AFTER - 1)
    assert gates.is_open(None)


def test_one_products_outage_is_not_anothers(gates: CircuitBreakers) -> None:
    fail(gates, PAUSE_AFTER)
    assert gates.is_any_open()
    assert gates.enter("heating") is not None
    fail(gates, PAUSE_AFTER, "heating")
    assert not gates.is_any_open()


def test_what_fails_from_the_pause_on_uses_up_no_attempt(gates: CircuitBreakers) -> None:
    under_way = [enter(gates) for _ in range(PAUSE_AFTER + 1)]
    found = []
    for passage in under_way:
        passage.failed("timeout")
        found.append(passage.is_paused)
    assert found == [False, False, True, True]


def test_one_probe_at_a_time_and_none_before_it_is_due(gates: CircuitBreakers, clock: Clock) -> None:
    fail(gates, PAUSE_AFTER)
    clock.now += PROBE_S - 0.1
    assert gates.enter(None) is None
    clock.now += 0.1
    probe = enter(gates)
    assert gates.enter(None) is None
    probe.end()
    assert gates.enter(None) is not None  # it told nothing, so the next may follow at once


@pytest.mark.parametrize(
    ("probe_s", "waits_s"),
    [(5, [5, 10, 20, 40, 60, 60]), (0.5, [0.5, 1, 2, 4, 8, 16]), (90, [90, 90])],
)
def test_the_waits_between_probes_grow_to_a_minute(probe_s: float, waits_s: list[float]) -> None:
    gate = CircuitBreaker(None, 1, probe_s)
    gate.failed("timeout", 0)
    now, found = 0.0, []
    for _ in waits_s:
        found.append(gate.due_at() - now)
        now = gate.due_at()
        assert gate.admit(now) == "probe"
        gate.failed("timeout", now, is_probe=True)
        gate.end_probe()
    assert found == waits_s


def test_what_was_under_way_before_the_pause_puts_no_probe_off(gates: CircuitBreakers, clock: Clock) -> None:
    late = enter(gates)
    fail(gates, PAUSE_AFTER)
    clock.now += PROBE_S
    late.failed("timeout")
    enter(gates)


def test_a_clear_answer_ends_the_pause(gates: CircuitBreakers, clock: Clock) -> None:
    fail(gates, PAUSE_AFTER)
    clock.now += PROBE_S
    changes: list[bool] = []
    gates.on_change = lambda: changes.append(gates.is_open(None))
    with capture_logs() as logs:
        enter(gates).answered()
    assert logs == [{"event": "product_resumed", "log_level": "info", "product": None}]
    assert changes == [True]
    fail(gates, PAUSE_AFTER - 1)
    assert gates.is_open(None)  # the row begins anew


def test_a_wait_that_the_platform_asks_for_is_obeyed_by_all_and_needs_no_probe(
    gates: CircuitBreakers, clock: Clock
) -> None:
    changes: list[bool] = []
    gates.on_change = lambda: changes.append(gates.is_open(None))
    passage = enter(gates)
    passage.failed("HTTP 429", 30)
    assert changes == [False]
    assert not passage.is_paused  # it was this command's own attempt
    assert gates.enter(None) is None
    assert gates.enter("heating") is not None
    assert gates.reason().startswith("HTTP 429, which asked for a wait of 30 s")
    clock.now += 30
    assert [gates.enter(None), gates.enter(None)].count(None) == 0


def test_a_clear_answer_does_not_shorten_that_wait(gates: CircuitBreakers, clock: Clock) -> None:
    late = enter(gates)
    fail(gates, asked_s=30)
    late.answered()
    assert gates.enter(None) is None


def test_of_two_such_waits_the_later_end_holds(gates: CircuitBreakers, clock: Clock) -> None:
    one, other = enter(gates), enter(gates)
    one.failed("HTTP 429", 30)
    other.failed("HTTP 429", 10)
    assert gates.rest_s(None) == 30


def test_a_wait_of_years_is_cut(gates: CircuitBreakers, clock: Clock) -> None:
    fail(gates, asked_s=float("inf"))
    assert gates.rest_s(None) == MAX_HOLD_S


def test_a_probe_waits_for_what_the_platform_asked_for(gates: CircuitBreakers, clock: Clock) -> None:
    under_way = [enter(gates) for _ in range(PAUSE_AFTER)]
    for passage in under_way:
        passage.failed("HTTP 429", 30)
    clock.now += 29
    assert gates.enter(None) is None
    clock.now += 1
    assert gates.enter(None) is not None
    assert gates.enter(None) is None


def test_a_command_rests_about_as_long_as_the_outage_has_lasted(gates: CircuitBreakers, clock: Clock) -> None:
    """So that a full queue does not run in circles, and nothing waits for much longer than it had to."""
    assert gates.rest_s(None) == 0
    fail(gates, PAUSE_AFTER)
    assert gates.rest_s(None) == PROBE_S
    clock.now += 300
    fail(gates)  # the probe
    assert gates.rest_s(None) == 300


def test_new_credentials_are_tried_at_once(gates: CircuitBreakers, clock: Clock) -> None:
    """By a probe: they may be wrong too."""
    fail(gates, PAUSE_AFTER)
    fail(gates, PAUSE_AFTER, "heating")
    gates.replace({None, "heating"}, {"heating"})
    assert gates.enter(None) is None
    assert gates.enter("heating") is not None
    assert gates.enter("heating") is None


def test_products_come_and_go(gates: CircuitBreakers) -> None:
    fail(gates, PAUSE_AFTER, "heating")
    gates.replace({None, "cooling"}, {"cooling"})
    assert gates.is_open("cooling")
    passage = enter(gates, "heating")  # its last commands find out for themselves that it is not configured
    passage.failed("timeout")
    passage.end()
    assert not gates.is_open("heating")  # which only means that none of its commands needs a slot
    enter(gates, "heating")


DEVICES = ["865820030000001", "865820030000002"]


def refuse(gates: CircuitBreakers, count: int, device: str) -> None:
    for passage in [enter(gates) for _ in range(count)]:
        passage.refused("refused", device)
        passage.end()


def test_refusals_pause_a_product_only_if_several_devices_get_them(gates: CircuitBreakers) -> None:
    refuse(gates, 50, DEVICES[0])
    assert gates.is_open(None)
    refuse(gates, 1, DEVICES[1])
    assert not gates.is_open(None)


def test_a_clear_answer_in_between_forgets_which_devices_were_refused(gates: CircuitBreakers) -> None:
    refuse(gates, PAUSE_AFTER - 1, DEVICES[0])
    enter(gates).answered()
    refuse(gates, 50, DEVICES[1])
    assert gates.is_open(None)


def test_beside_other_failures_the_refusals_of_one_device_count_as_one(gates: CircuitBreakers) -> None:
    """A platform that is going down may refuse some and not answer others."""
    refuse(gates, 50, DEVICES[0])
    fail(gates)
    assert gates.is_open(None)
    fail(gates)
    assert not gates.is_open(None)


def test_one_refusal_pauses_nothing_even_where_one_failure_does(clock: Clock) -> None:
    gates = CircuitBreakers([None], 1, PROBE_S, clock)
    refuse(gates, 5, DEVICES[0])
    assert gates.is_open(None)


def throttle(gates: CircuitBreakers, count: int = 1, asked_s: float | None = None) -> None:
    """Let so many requests, which are under way together, be throttled."""
    for passage in [enter(gates) for _ in range(count)]:
        gates.throttle(None, "too fast", passage.entered_at, asked_s)
        passage.end()


def test_throttled_requests_hold_a_product_for_longer_and_longer(gates: CircuitBreakers, clock: Clock) -> None:
    """Up to a minute; those that were under way together count once."""
    found = []
    for _ in range(8):
        throttle(gates, 30)
        assert gates.enter(None) is None
        found.append(gates.rest_s(None))
        clock.now += found[-1]
    assert found == [1, 2, 4, 8, 16, 32, 60, 60]
    passage = enter(gates)
    assert not passage.is_paused
    passage.answered()
    throttle(gates)
    assert gates.rest_s(None) == 1


def test_a_throttled_answer_that_comes_late_belongs_to_the_wait_that_its_like_began(
    gates: CircuitBreakers, clock: Clock
) -> None:
    late = enter(gates)
    throttle(gates)
    clock.now += 5
    gates.throttle(None, "too fast", late.entered_at)
    assert gates.is_open(None)


def test_throttled_requests_are_no_failures_in_a_row(gates: CircuitBreakers, clock: Clock) -> None:
    for _ in range(2 * PAUSE_AFTER):
        throttle(gates)
        clock.now += 60
    fail(gates, PAUSE_AFTER - 1)
    assert gates.is_open(None)


def test_a_throttled_request_may_ask_for_a_longer_wait(gates: CircuitBreakers, clock: Clock) -> None:
    throttle(gates, asked_s=30)
    assert gates.rest_s(None) == 30
    assert gates.enter("heating") is not None


def test_a_probe_that_is_throttled_leaves_the_product_paused(gates: CircuitBreakers, clock: Clock) -> None:
    fail(gates, PAUSE_AFTER)
    clock.now += PROBE_S
    throttle(gates)
    clock.now += 1
    enter(gates)
    assert gates.enter(None) is None


def test_what_histories_are_told_is_said_of_histories(clock: Clock) -> None:
    gates = CircuitBreakers([None], PAUSE_AFTER, PROBE_S, clock, subject="history")
    with capture_logs() as logs:
        fail(gates, PAUSE_AFTER)
        clock.now += PROBE_S
        probe = enter(gates)
        probe.failed("HTTP 503")
        probe.answered()
    assert [line["event"] for line in logs] == ["history_paused", "history_probe_failed", "history_resumed"]


def test_a_probe_that_was_given_back_is_followed_by_another_at_once(gates: CircuitBreakers, clock: Clock) -> None:
    fail(gates, PAUSE_AFTER)
    clock.now += PROBE_S
    given_back = enter(gates)
    given_back.end()
    probe = enter(gates)
    given_back.end()  # however often it is said
    assert gates.enter(None) is None
    probe.answered()
