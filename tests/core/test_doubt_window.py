"""The doubt window: its text form and its union."""

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.core.doubt_window import DoubtWindow

NOON = datetime(2026, 8, 5, 12, tzinfo=UTC)
MOMENTS = st.integers(-(10**12), 10**12).map(lambda ms: NOON + timedelta(milliseconds=ms))  # 31 years both ways


@given(st.none() | MOMENTS, MOMENTS)
def test_parse_reads_what_str_wrote(since: datetime | None, until: datetime) -> None:
    doubt = DoubtWindow(since, until)
    assert DoubtWindow.parse(str(doubt)) == doubt


def test_a_doubt_window_is_written_as_an_iso_8601_interval() -> None:
    assert str(DoubtWindow(NOON, NOON + timedelta(seconds=2.5))) == (
        "2026-08-05T12:00:00.000+00:00/2026-08-05T12:00:02.500+00:00"
    )
    assert str(DoubtWindow(None, NOON)) == "../2026-08-05T12:00:00.000+00:00"


@pytest.mark.parametrize("text", ["", "/", "2026", "..", "2026-08-05T12:00:00/2026-08-05T12:00:00", "../soon"])
def test_text_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r".*"):
        DoubtWindow.parse(text)


def test_the_union_covers_both_windows() -> None:
    later = NOON + timedelta(hours=1)
    assert DoubtWindow(NOON, NOON).union(DoubtWindow(later, later)) == DoubtWindow(NOON, later)
    assert DoubtWindow(later, later).union(DoubtWindow(None, NOON)) == DoubtWindow(None, later)
    assert DoubtWindow(NOON, later).union(None) == DoubtWindow(NOON, later)


@pytest.mark.parametrize(
    "text",
    [
        "../",
        "../..",
        "2026-08-05T12:00:00+00:00",
        "2026-08-05T12:00:00+00:00/..",
        "/2026-08-05T12:00:00+00:00",
        "since then/2026-08-05T12:00:00+00:00",
        "2026-08-05T12:00:00/2026-08-05T12:00:00+00:00",
        "../2026-08-05T12:00:00",
        "../2026-02-30T12:00:00+00:00",
        "0001-01-01T00:00:00+23:00/2026-08-05T12:00:00+00:00",
        "../9999-12-31T23:59:59+00:00",
        "../2026-08-05T12:00:00+00:00/2026-08-05T12:00:00+00:00",
    ],
)
def test_half_an_interval_or_a_time_without_offset_is_refused(text: str) -> None:
    """A time without an offset could be meant in any zone, and a window that is too short hides a request.

    So is a time at the limits of the calendar, with which nothing can be computed.
    """
    with pytest.raises(ValueError, match=r".*"):
        DoubtWindow.parse(text)


@given(st.text())
def test_unreadable_text_raises_only_value_error(text: str) -> None:
    """The header is parsed before anything else is known of a message: another error would crash every worker."""
    try:
        doubt = DoubtWindow.parse(text)
    except ValueError:
        return
    assert doubt.until.tzinfo is not None


def test_a_doubt_window_is_written_in_utc_to_the_millisecond() -> None:
    china = timezone(timedelta(hours=8))
    until = datetime(2026, 8, 5, 20, 0, 1, 999_999, tzinfo=china)
    assert str(DoubtWindow(None, until)) == "../2026-08-05T12:00:01.999+00:00"


@given(st.none() | MOMENTS, MOMENTS, st.none() | MOMENTS, MOMENTS)
def test_the_union_loses_no_moment_of_either_window(
    since: datetime | None, until: datetime, other_since: datetime | None, other_until: datetime
) -> None:
    """A request that was sent in a lost moment would never be searched for."""
    one, other = DoubtWindow(since, until), DoubtWindow(other_since, other_until)
    both = one.union(other)
    assert both == other.union(one) == both.union(one) == both.union(other)
    assert both.until == max(until, other_until)
    for each in (one, other):
        assert both.since is None or (each.since is not None and both.since <= each.since)
