"""Delays before attempts, postponements, and connection tries."""

import pytest

from worker.core.backoff import backoff_s, postponement_s, retry_delay_s, spread_ms


@pytest.mark.parametrize(("attempt", "delay_s"), [(1, 5), (2, 30), (3, 120), (4, 120), (1000, 120)])
def test_the_last_retry_delay_repeats(attempt: int, delay_s: int) -> None:
    assert retry_delay_s(attempt, (5, 30, 120)) == delay_s


def test_a_retry_delay_may_be_configured_twice() -> None:
    assert [retry_delay_s(attempt, (5, 5, 30)) for attempt in (1, 2, 3)] == [5, 5, 30]


@pytest.mark.parametrize(("attempt", "ceiling_s"), [(1, 0.5), (2, 1), (3, 2), (6, 15), (10_000, 15)])
def test_the_backoff_is_exponential_with_full_jitter(attempt: int, ceiling_s: float) -> None:
    assert backoff_s(attempt, 0.5, 15, draw=lambda _low, high: high) == ceiling_s
    assert backoff_s(attempt, 0.5, 15, draw=lambda low, _high: low) == 0


def test_an_attempt_below_1_is_an_error() -> None:
    for wait in (lambda: retry_delay_s(0, (5,)), lambda: backoff_s(0, 1, 2)):
        with pytest.raises(ValueError, match="from 1"):
            wait()


def test_a_message_expires_at_most_a_tenth_before_its_delay_queue() -> None:
    assert spread_ms(600, draw=lambda low, _high: low) == 540_000
    assert spread_ms(600, draw=lambda _low, high: high) == 600_000
    assert spread_ms(5) is None  # too short for jitter


@pytest.mark.parametrize(
    ("suggested_s", "delay_s"),
    [(0, 5), (4.9, 5), (5, 5), (29.9, 5), (30, 30), (119, 30), (600, 600), (86_400, 600)],
)
def test_a_postponement_is_the_longest_delay_that_does_not_exceed_the_suggestion(
    suggested_s: float, delay_s: int
) -> None:
    assert postponement_s((5, 30, 120, 600), suggested_s) == delay_s
