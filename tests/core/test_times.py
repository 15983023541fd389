"""Times of commands in every form, and in the platform's form."""

from datetime import UTC, datetime, timedelta, timezone
from zoneinfo import ZoneInfo

import pytest

from worker.core.times import after, parse_duration, parse_time, platform_time

CHINA = ZoneInfo("Asia/Shanghai")


@pytest.mark.parametrize(
    ("text", "in_china"),
    [
        ("2026-08-05T08:00:00", "2026-08-05T08:00:00"),
        ("2026-08-05T08:00:00Z", "2026-08-05T16:00:00"),
        ("2026-08-05T08:00:00+08:00", "2026-08-05T08:00:00"),
        ("2026-08-05T08:00:00+0800", "2026-08-05T08:00:00"),
        ("2026-08-05T08:00:00+08", "2026-08-05T08:00:00"),
        ("2026-08-05T08:00:00-00:00", "2026-08-05T16:00:00"),
        ("2026-08-05T08:00:00+05:45", "2026-08-05T10:15:00"),
        ("2026-12-31T23:00:00-03:30", "2027-01-01T10:30:00"),
        ("2028-02-29T00:00:00", "2028-02-29T00:00:00"),
    ],
)
def test_a_time_is_sent_in_the_platforms_local_time(text: str, in_china: str) -> None:
    assert platform_time(parse_time(text, CHINA), CHINA) == in_china


def test_a_time_without_an_offset_is_the_platforms_local_time() -> None:
    berlin = ZoneInfo("Europe/Berlin")
    assert parse_time("2026-08-05T08:00:00", berlin) == parse_time("2026-08-05T06:00:00Z", CHINA)


@pytest.mark.parametrize(
    "text",
    [
        "2026-08-05", "2026-8-5T08:00:00", "20260805T080000", "2026-08-05T08:00", "2026-08-05 08:00:00",
        "2026-08-05T08:00:00.000", "2026-08-05T08:00:60", "2026-08-05T25:00:00", "2026-13-05T08:00:00",
        "2026-02-29T08:00:00", "2026-08-05T08:00:00+8", "2026-08-05T08:00:00 Z", "2026-08-05T08:00:00\n",
        "٢٠٢٦-08-05T08:00:00", "2026-08-05T08:00:00+08:60", "0001-01-01T00:00:00+00:00", "9999-12-31T23:59:59",
    ],
)  # fmt: skip
def test_a_text_in_another_form_is_not_a_time(text: str) -> None:
    with pytest.raises(ValueError, match="time"):
        parse_time(text, CHINA)


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("15m", 900), ("2h", 7_200), ("7d", 604_800), ("0s", 0)])
def test_a_duration_is_a_number_and_a_unit(text: str, seconds: int) -> None:
    assert parse_duration(text) == timedelta(seconds=seconds)


@pytest.mark.parametrize("text", ["", "5", "h", "-1h", "1.5h", "1 h", "2h\n", "1w", "9999999d", "\u0665s"])
def test_a_text_in_another_form_is_not_a_duration(text: str) -> None:
    with pytest.raises(ValueError, match="such as 90s"):
        parse_duration(text)


@pytest.mark.parametrize("hours", [-12, 0, 8, 14])
def test_a_wait_ends_at_the_last_moment_that_there_is(hours: int) -> None:
    """A command may expire on the last day of the year 9999."""
    near_the_end = datetime(9999, 12, 30, 20, tzinfo=timezone(timedelta(hours=hours)))
    assert after(near_the_end, timedelta(days=7)) == datetime.max.replace(tzinfo=UTC)
    assert after(near_the_end, timedelta(hours=1)) - near_the_end == timedelta(hours=1)
