"""When a circuit breaker opens, probes and closes; on a clock that the tests advance."""

import math
from datetime import UTC, datetime

import pytest
from structlog.testing import capture_logs

from worker.core.pauses import Kind, Order, Pauses
from worker.processing.circuit_breaker import MAX_PROBE_INTERVAL_S, CircuitBreakers, Permit

PAUSE_AFTER, PROBE_INTERVAL_S = 3, 5
ONE_IMEI, OTHER_IMEI = "865820030000001", "865820030000002"


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breakers(clock: Clock) -> CircuitBreakers:
    return CircuitBreakers([None, "heating"], PAUSE_AFTER, PROBE_INTERVAL_S, clock)


def acquire(breakers: CircuitBreakers, product: str | None = None) -> Permit:
    permit = breakers.try_acquire(product)
    assert permit is not None
    return permit


def fail(
    breakers: CircuitBreakers, count: int = 1, product: str | None = None, retry_after_s: float | None = None
) -> None:
    """Send requests together and let all of them fail."""
    for permit in [acquire(breakers, product) for _ in range(count)]:
        permit.record_failure("HTTP 503", retry_after_s)
        permit.release()


def refuse(breakers: CircuitBreakers, count: int, device: str) -> None:
    """Send requests for a device together and let all of them be refused."""
    for permit in [acquire(breakers) for _ in range(count)]:
        permit.record_failure("refused", device=device)
        permit.release()


def throttle(breakers: CircuitBreakers, count: int = 1, retry_after_s: float | None = None) -> None:
    """Send requests together and let all of them be throttled."""
    for permit in [acquire(breakers) for _ in range(count)]:
        permit.record_throttling("too fast", retry_after_s)
        permit.release()


def test_the_configured_number_of_failures_in_a_row_pauses_a_product(breakers: CircuitBreakers) -> None:
    fail(breakers, PAUSE_AFTER - 1)
    assert breakers.allows(None)
    with capture_logs() as logs:
        fail(breakers)
    assert not breakers.allows(None)
    assert breakers.try_acquire(None) is None
    [line] = logs
    assert line == {
        "event": "product_paused",
        "log_level": "warning",
        "product": None,
        "reason": "3 failures in a row, the latest: HTTP 503",
        "next_try_in_s": 5.0,
    }


def test_a_clear_answer_resets_the_count_of_failures(breakers: CircuitBreakers) -> None:
    fail(breakers, PAUSE_AFTER - 1)
    acquire(breakers).record_success()
    fail(breakers, PAUSE_AFTER - 1)
    assert breakers.allows(None)


def test_failures_of_one_product_do_not_pause_another(breakers: CircuitBreakers) -> None:
    fail(breakers, PAUSE_AFTER)
    assert breakers.allows_any()
    assert breakers.try_acquire("heating") is not None
    fail(breakers, PAUSE_AFTER, "heating")
    assert not breakers.allows_any()


def test_requests_that_fail_once_the_product_is_paused_use_up_no_attempt(breakers: CircuitBreakers) -> None:
    in_flight = [acquire(breakers) for _ in range(PAUSE_AFTER + 1)]
    found = []
    for permit in in_flight:
        permit.record_failure("timeout")
        found.append(permit.is_paused)
    assert found == [False, False, True, True]


def test_a_half_open_breaker_lets_one_probe_pass_at_a_time(breakers: CircuitBreakers, clock: Clock) -> None:
    fail(breakers, PAUSE_AFTER)
    clock.now += PROBE_INTERVAL_S - 0.1
    assert breakers.try_acquire(None) is None
    clock.now += 0.1
    probe = acquire(breakers)
    assert breakers.try_acquire(None) is None
    probe.release()
    assert breakers.try_acquire(None) is not None  # the first one recorded nothing, so the next may follow at once


@pytest.mark.parametrize(
    ("probe_interval_s", "intervals_s"),
    [(5, [5, 10, 20, 40, 60, 60]), (0.5, [0.5, 1, 2, 4, 8, 16]), (90, [90, 90])],
)
def test_each_failed_probe_doubles_the_interval_up_to_a_minute(
    clock: Clock, probe_interval_s: float, intervals_s: list[float]
) -> None:
    breakers = CircuitBreakers([None], 1, probe_interval_s, clock)
    fail(breakers)
    found = []
    for _ in intervals_s:
        found.append(breakers.retry_in_s())
        clock.now += found[-1]
        probe = acquire(breakers)
        assert breakers.try_acquire(None) is None
        probe.record_failure("timeout")
        probe.release()
    assert found == intervals_s


def test_a_late_failure_of_a_request_sent_before_the_pause_does_not_delay_the_probe(
    breakers: CircuitBreakers, clock: Clock
) -> None:
    late = acquire(breakers)
    fail(breakers, PAUSE_AFTER)
    clock.now += PROBE_INTERVAL_S
    late.record_failure("timeout")
    acquire(breakers)


def test_a_clear_answer_to_the_probe_closes_the_breaker(breakers: CircuitBreakers, clock: Clock) -> None:
    fail(breakers, PAUSE_AFTER)
    clock.now += PROBE_INTERVAL_S
    changes: list[bool] = []
    breakers.on_change = lambda: changes.append(breakers.allows(None))
    with capture_logs() as logs:
        acquire(breakers).record_success()
    assert logs == [{"event": "product_resumed", "log_level": "info", "product": None}]
    assert changes == [True]
    fail(breakers, PAUSE_AFTER - 1)
    assert breakers.allows(None)  # the count of failures began again at 0


def test_a_retry_after_stops_all_requests_of_the_product_and_ends_without_a_probe(
    breakers: CircuitBreakers, clock: Clock
) -> None:
    changes: list[bool] = []
    breakers.on_change = lambda: changes.append(breakers.allows(None))
    permit = acquire(breakers)
    permit.record_failure("HTTP 429", 30)
    assert changes == [False]
    assert not permit.is_paused  # the failed request uses up an attempt of its command
    assert breakers.try_acquire(None) is None
    assert breakers.try_acquire("heating") is not None
    assert breakers.reason().startswith("HTTP 429, which asked for a wait of 30 s")
    clock.now += 30
    assert [breakers.try_acquire(None), breakers.try_acquire(None)].count(None) == 0


def test_a_clear_answer_does_not_shorten_a_retry_after(breakers: CircuitBreakers) -> None:
    late = acquire(breakers)
    fail(breakers, retry_after_s=30)
    late.record_success()
    assert breakers.try_acquire(None) is None


def test_the_later_end_of_two_retry_afters_applies(breakers: CircuitBreakers) -> None:
    one, other = acquire(breakers), acquire(breakers)
    one.record_failure("HTTP 429", 30)
    other.record_failure("HTTP 429", 10)
    assert breakers.suggested_delay_s(None) == 30


def test_a_long_retry_after_is_probed_once_a_minute(breakers: CircuitBreakers, clock: Clock) -> None:
    """It may be a mistake, or the date of a wrong clock."""
    fail(breakers, retry_after_s=8 * 3600)
    clock.now += MAX_PROBE_INTERVAL_S - 1
    assert breakers.try_acquire(None) is None
    clock.now += 1
    assert not breakers.allows(None)
    probe = acquire(breakers)
    assert breakers.try_acquire(None) is None
    probe.record_failure("HTTP 503")
    probe.release()
    clock.now += MAX_PROBE_INTERVAL_S - 1
    assert breakers.try_acquire(None) is None
    clock.now += 1
    acquire(breakers)


def test_a_successful_probe_ends_a_retry_after(breakers: CircuitBreakers, clock: Clock) -> None:
    fail(breakers, retry_after_s=8 * 3600)
    clock.now += MAX_PROBE_INTERVAL_S
    with capture_logs() as logs:
        probe = acquire(breakers)
        probe.record_success()
        probe.release()
    assert breakers.allows(None)
    assert [line["event"] for line in logs] == ["product_resumed"]


def test_a_probe_that_is_asked_to_wait_again_holds_again(breakers: CircuitBreakers, clock: Clock) -> None:
    throttle(breakers, retry_after_s=3600)
    clock.now += MAX_PROBE_INTERVAL_S
    probe = acquire(breakers)
    probe.record_throttling("too fast", 3600)
    probe.release()
    clock.now += MAX_PROBE_INTERVAL_S - 1
    assert breakers.try_acquire(None) is None
    clock.now += 1
    acquire(breakers)


def test_a_probe_waits_for_the_end_of_a_retry_after(breakers: CircuitBreakers, clock: Clock) -> None:
    in_flight = [acquire(breakers) for _ in range(PAUSE_AFTER)]
    for permit in in_flight:
        permit.record_failure("HTTP 429", 30)
    clock.now += 29
    assert breakers.try_acquire(None) is None
    clock.now += 1
    assert breakers.try_acquire(None) is not None
    assert breakers.try_acquire(None) is None


def test_the_suggested_delay_grows_with_the_length_of_the_outage(breakers: CircuitBreakers, clock: Clock) -> None:
    """A full queue does not cycle through the delay queues, and no command waits much longer than needed."""
    assert breakers.suggested_delay_s(None) == 0
    fail(breakers, PAUSE_AFTER)
    assert breakers.suggested_delay_s(None) == PROBE_INTERVAL_S
    clock.now += 300
    fail(breakers)  # the probe
    assert breakers.suggested_delay_s(None) == 300


def test_changed_credentials_are_probed_at_once(breakers: CircuitBreakers) -> None:
    """Only by a probe: the new credentials may be wrong too."""
    fail(breakers, PAUSE_AFTER)
    fail(breakers, PAUSE_AFTER, "heating")
    breakers.replace({None, "heating"}, {"heating"})
    assert breakers.try_acquire(None) is None
    assert breakers.try_acquire("heating") is not None
    assert breakers.try_acquire("heating") is None


def test_products_can_be_added_and_removed_while_commands_are_processed(breakers: CircuitBreakers) -> None:
    fail(breakers, PAUSE_AFTER, "heating")
    breakers.replace({None, "cooling"}, {"cooling"})
    assert breakers.allows("cooling")
    permit = acquire(breakers, "heating")  # its remaining commands fail because the product is not configured
    permit.record_failure("timeout")
    permit.release()
    assert not breakers.allows("heating")  # so its commands do not wait for a rate limit
    acquire(breakers, "heating")


def test_refusals_pause_a_product_only_if_several_devices_are_refused(breakers: CircuitBreakers) -> None:
    refuse(breakers, 50, ONE_IMEI)
    assert breakers.allows(None)
    refuse(breakers, 1, OTHER_IMEI)
    assert not breakers.allows(None)


def test_a_clear_answer_resets_the_set_of_refused_devices(breakers: CircuitBreakers) -> None:
    refuse(breakers, PAUSE_AFTER - 1, ONE_IMEI)
    acquire(breakers).record_success()
    refuse(breakers, 50, OTHER_IMEI)
    assert breakers.allows(None)


def test_the_refusals_of_one_device_count_as_one_failure_beside_other_failures(breakers: CircuitBreakers) -> None:
    """A platform that is failing may refuse some requests and not answer others."""
    refuse(breakers, 50, ONE_IMEI)
    fail(breakers)
    assert breakers.allows(None)
    fail(breakers)
    assert not breakers.allows(None)


def test_refusals_of_one_device_pause_nothing_even_if_one_failure_pauses(clock: Clock) -> None:
    breakers = CircuitBreakers([None], 1, PROBE_INTERVAL_S, clock)
    refuse(breakers, 5, ONE_IMEI)
    assert breakers.allows(None)


def test_throttled_requests_stop_a_product_with_exponential_backoff(breakers: CircuitBreakers, clock: Clock) -> None:
    """Up to a minute; requests that are throttled together count once."""
    found = []
    for _ in range(8):
        throttle(breakers, 30)
        assert breakers.try_acquire(None) is None
        found.append(breakers.suggested_delay_s(None))
        clock.now += found[-1]
    assert found == [1, 2, 4, 8, 16, 32, 60, 60]
    permit = acquire(breakers)
    assert not permit.is_paused
    permit.record_success()
    throttle(breakers)
    assert breakers.suggested_delay_s(None) == 1


def test_a_late_throttled_answer_to_an_earlier_request_starts_no_new_backoff(
    breakers: CircuitBreakers, clock: Clock
) -> None:
    late = acquire(breakers)
    throttle(breakers)
    clock.now += 5
    late.record_throttling("too fast")
    assert breakers.allows(None)


def test_throttled_requests_do_not_count_as_failures(breakers: CircuitBreakers, clock: Clock) -> None:
    for _ in range(2 * PAUSE_AFTER):
        throttle(breakers)
        clock.now += 60
    fail(breakers, PAUSE_AFTER - 1)
    assert breakers.allows(None)


def test_the_retry_after_of_a_throttled_request_is_obeyed(breakers: CircuitBreakers) -> None:
    throttle(breakers, retry_after_s=30)
    assert breakers.suggested_delay_s(None) == 30
    assert breakers.try_acquire("heating") is not None


def test_a_throttled_probe_leaves_the_product_paused(breakers: CircuitBreakers, clock: Clock) -> None:
    fail(breakers, PAUSE_AFTER)
    clock.now += PROBE_INTERVAL_S
    throttle(breakers)
    clock.now += 1
    acquire(breakers)
    assert breakers.try_acquire(None) is None


def test_hold_stops_a_product_for_a_retry_after_and_does_nothing_without_one(
    breakers: CircuitBreakers, clock: Clock
) -> None:
    breakers.hold(None, "HTTP 503", None)
    assert breakers.allows(None)
    breakers.hold(None, "HTTP 503", 30)
    assert breakers.suggested_delay_s(None) == 30
    clock.now += 30
    assert breakers.allows(None)


def test_the_breakers_of_history_reads_have_their_own_log_events(clock: Clock) -> None:
    breakers = CircuitBreakers([None], PAUSE_AFTER, PROBE_INTERVAL_S, clock, subject="history")
    with capture_logs() as logs:
        fail(breakers, PAUSE_AFTER)
        clock.now += PROBE_INTERVAL_S
        probe = acquire(breakers)
        probe.record_failure("HTTP 503")
        probe.record_success()
    assert [line["event"] for line in logs] == ["history_paused", "history_probe_failed", "history_resumed"]


def test_releasing_a_probe_twice_does_not_release_the_next_probe(breakers: CircuitBreakers, clock: Clock) -> None:
    fail(breakers, PAUSE_AFTER)
    clock.now += PROBE_INTERVAL_S
    released = acquire(breakers)
    released.release()
    probe = acquire(breakers)
    released.release()
    assert breakers.try_acquire(None) is None
    probe.record_success()


def _order(kind: Kind, scope: str | None = None) -> Order:
    return Order(id="1", kind=kind, scope=scope, by="alice", at=datetime.now(UTC), reason="maintenance")


def test_a_product_that_is_paused_by_hand_lets_nothing_pass_and_no_probe() -> None:
    breakers = CircuitBreakers([None, "heating"], 2, 5)
    breakers.pause_by_hand(Pauses.after([_order("pause", "heating")]))
    assert breakers.try_acquire("heating") is None
    assert breakers.try_acquire(None) is not None
    assert breakers.paused() == {None: False, "heating": True}
    assert breakers.reason_of("heating") == "paused by hand by alice: maintenance"
    breakers.probe_at_once(_order("probe"))
    assert breakers.try_acquire("heating") is None
    assert breakers.allows_reading("heating")
    breakers.pause_by_hand(Pauses())
    assert breakers.try_acquire("heating") is not None


def test_while_all_products_are_paused_by_hand_no_probe_is_ever_due() -> None:
    breakers = CircuitBreakers([None, "heating"], 2, 5)
    breakers.pause_by_hand(Pauses.after([_order("pause")]))
    assert not breakers.allows_any()
    assert breakers.retry_in_s() == math.inf
    assert [state.next_try_in_s for state in breakers.states()] == [None, None]


def test_a_product_that_is_configured_later_is_paused_too() -> None:
    breakers = CircuitBreakers([None], 2, 5)
    breakers.pause_by_hand(Pauses.after([_order("pause")]))
    breakers.replace([None, "heating"], ["heating"])
    assert not breakers.allows("heating")


def test_the_delay_of_a_command_grows_with_a_pause_by_hand() -> None:
    now = 1000.0
    breakers = CircuitBreakers([None], 2, 5, lambda: now)
    breakers.pause_by_hand(Pauses.after([_order("pause")]))
    assert breakers.suggested_delay_s(None) == 5
    now += 100
    assert breakers.suggested_delay_s(None) == 100


def test_the_end_of_a_pause_by_hand_does_not_end_that_for_failures() -> None:
    now = 1000.0
    breakers = CircuitBreakers([None], 1, 5, lambda: now)
    permit = breakers.try_acquire(None)
    assert permit is not None
    permit.record_failure("HTTP 500")
    breakers.pause_by_hand(Pauses.after([_order("pause")]))
    breakers.pause_by_hand(Pauses())
    assert not breakers.allows(None)
    assert breakers.try_acquire(None) is None
    breakers.probe_at_once(_order("probe"))
    assert breakers.try_acquire(None) is not None


def test_a_probe_by_hand_is_one_of_the_named_product_only() -> None:
    now = 1000.0
    breakers = CircuitBreakers([None, "heating", "cooling"], 1, 5, lambda: now)
    for product in (None, "heating", "cooling"):
        permit = breakers.try_acquire(product)
        assert permit is not None
        permit.record_failure("HTTP 500")
        permit.release()
    breakers.probe_at_once(_order("probe", "heating"))
    assert breakers.try_acquire("heating") is not None
    assert breakers.try_acquire("cooling") is None
    assert breakers.try_acquire(None) is None
    breakers.probe_at_once(_order("resume", ""))
    assert breakers.try_acquire("cooling") is None
    assert breakers.try_acquire(None) is not None


def test_a_probe_by_hand_during_a_retry_after_is_one_request_only() -> None:
    """The platform asked for the wait: if the probe fails, it goes on."""
    now = 1000.0
    breakers = CircuitBreakers([None], 1, 5, lambda: now)
    permit = breakers.try_acquire(None)
    assert permit is not None
    permit.record_throttling("HTTP 429", 600)
    breakers.probe_at_once(_order("probe"))
    assert breakers.try_acquire(None) is not None
    assert breakers.try_acquire(None) is None
    assert not breakers.allows(None)


def test_a_pause_for_failures_that_begins_during_a_pause_by_hand_is_logged() -> None:
    breakers = CircuitBreakers([None], 1, 5)
    permit = breakers.try_acquire(None)
    assert permit is not None
    breakers.pause_by_hand(Pauses.after([_order("pause")]))
    with capture_logs() as logs:
        permit.record_failure("HTTP 500")
    assert [line["event"] for line in logs] == ["product_paused"]
