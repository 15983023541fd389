"""The rules for poison messages."""

from datetime import UTC, datetime

import pytest

from worker.core.doubt_window import DoubtWindow
from worker.core.envelope import Envelope
from worker.core.poison import (
    MAX_CRASHES,
    MAX_HISTORY_READS,
    MAX_RETURNS,
    crash_count,
    crash_count_of_copy,
    is_poison,
    is_quarantined,
    may_read_history,
)

DOUBT = DoubtWindow(None, datetime(2026, 8, 5, tzinfo=UTC))


@pytest.mark.parametrize(
    ("announced", "times_returned", "expected"),
    [
        (None, 0, 0),
        (None, 7, 0),  # deliveries that were merely held by a worker that crashed do not count
        (1, 7, 1),
        (MAX_CRASHES - 1, 7, MAX_CRASHES - 1),
        (MAX_CRASHES, 0, MAX_CRASHES),
        (MAX_CRASHES, 2, MAX_CRASHES + 2),  # from here on nothing is announced, and the broker counts
    ],
)
def test_announced_attempts_are_crashes_until_the_broker_counts(
    announced: int | None, times_returned: int, expected: int
) -> None:
    assert crash_count(Envelope(crash_count=announced, times_returned=times_returned)) == expected


@pytest.mark.parametrize(
    ("announced", "holder_crashed", "expected"),
    [
        (MAX_CRASHES - 1, True, False),
        (MAX_CRASHES, True, True),
        (MAX_CRASHES, False, False),  # a record says that its last attempt ended well
        (None, True, False),
    ],
)
def test_a_command_is_poison_after_too_many_crashes(
    announced: int | None, holder_crashed: bool, expected: bool
) -> None:
    assert is_poison(Envelope(crash_count=announced), holder_crashed=holder_crashed) is expected


@pytest.mark.parametrize(
    ("times_returned", "doubt", "expected"),
    [
        (0, DOUBT, True),
        (MAX_HISTORY_READS - 1, DOUBT, True),
        (MAX_HISTORY_READS, DOUBT, False),
        (0, None, False),
    ],
)
def test_the_history_of_a_poison_command_is_read_a_few_times_only(
    times_returned: int, doubt: DoubtWindow | None, expected: bool
) -> None:
    envelope = Envelope(crash_count=MAX_CRASHES, times_returned=times_returned)
    assert may_read_history(envelope, doubt) is expected


@pytest.mark.parametrize(
    ("is_redelivered", "times_returned", "expected"),
    [(True, MAX_RETURNS - 1, False), (True, MAX_RETURNS, True), (False, MAX_RETURNS, False)],
)
def test_a_message_that_is_returned_again_and_again_is_not_parsed(
    is_redelivered: bool, times_returned: int, expected: bool
) -> None:
    """A sender may have written the count; only the broker marks a message as redelivered."""
    assert is_quarantined(Envelope(is_redelivered=is_redelivered, times_returned=times_returned)) is expected


@pytest.mark.parametrize(("holder_crashed", "expected"), [(True, 2), (False, None)])
def test_a_copy_notes_crashes_only_while_the_command_is_suspected(holder_crashed: bool, expected: int | None) -> None:
    assert crash_count_of_copy(Envelope(crash_count=2), holder_crashed=holder_crashed) == expected
