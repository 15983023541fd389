"""The time of a doubt, and how it travels."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.doubt import Doubt

NOON = datetime(2026, 8, 5, 12, tzinfo=UTC)
MOMENTS = st.datetimes(datetime(2000, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC)).map(  # noqa: DTZ001 - the zone comes with it
    lambda moment: moment.replace(microsecond=moment.microsecond // 1000 * 1000)
)


@given(st.none() | MOMENTS, MOMENTS)
def test_what_is_written_is_read_again(since: datetime | None, until: datetime) -> None:
    doubt = Doubt(since, until)
    assert Doubt.parse(str(doubt)) == doubt


def test_it_is_an_iso_8601_interval() -> None:
    assert str(Doubt(NOON, NOON + timedelta(seconds=2.5))) == (
        "2026-08-05T12:00:00.000+00:00/2026-08-05T12:00:02.500+00:00"
    )
    assert str(Doubt(None, NOON)) == "../2026-08-05T12:00:00.000+00:00"


@pytest.mark.parametrize("text", ["", "/", "2026", "..", "2026-08-05T12:00:00/2026-08-05T12:00:00", "../soon"])
def test_anything_else_is_not_read(text: str) -> None:
    with pytest.raises(ValueError, match=r".*"):
        Doubt.parse(text)


def test_two_are_one_that_covers_both() -> None:
    later = NOON + timedelta(hours=1)
    assert Doubt(NOON, NOON).united(Doubt(later, later)) == Doubt(NOON, later)
    assert Doubt(later, later).united(Doubt(None, NOON)) == Doubt(None, later)
    assert Doubt(NOON, later).united(None) == Doubt(NOON, later)
