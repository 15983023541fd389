"""Times of commands in every form, and in the platform's form."""

from datetime import UTC, datetime, timedelta, timezone
from zoneinfo import ZoneInfo

import pytest

from worker.core.times import after, as_understood, parse_duration, parse_time, platform_time, why_expired

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
        # Of toISOString(), isoformat(), and Java's Instant and LocalDateTime. A fraction is cut off, never rounded.
        ("2026-11-30T08:00:00.123Z", "2026-11-30T16:00:00"),
        ("2026-11-30T08:00:00.999999+08:00", "2026-11-30T08:00:00"),
        ("2026-11-30T08:00:00.999999999Z", "2026-11-30T16:00:00"),
        ("2026-11-30T08:00:00.5", "2026-11-30T08:00:00"),
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
        "2026-08-05T08:00:00.", "2026-08-05T08:00:00,5", "2026-08-05T08:00:00.1234567890", "2026-08-05T08:00.5",
        "2026-08-05T08:00:60", "2026-08-05T25:00:00", "2026-13-05T08:00:00",
        "2026-02-29T08:00:00", "2026-08-05T08:00:00+8", "2026-08-05T08:00:00 Z", "2026-08-05T08:00:00\n",
        "٢٠٢٦-08-05T08:00:00", "2026-08-05T08:00:00+08:60", "0001-01-01T00:00:00+00:00", "9999-12-31T23:59:59",
    ],
)  # fmt: skip
def test_a_text_in_another_form_is_not_a_time(text: str) -> None:
    with pytest.raises(ValueError, match="time"):
        parse_time(text, CHINA)


@pytest.mark.parametrize(
    ("text", "understood"),
    [
        ("2026-11-30T08:00:00", "2026-11-30 08:00:00 +08:00 (ONENET_TIMEZONE Asia/Shanghai)"),
        ("2026-11-30T08:00:00.7Z", "2026-11-30 08:00:00 +00:00"),
        ("2026-11-30T08:00:00-0330", "2026-11-30 08:00:00 -03:30"),
        ("0999-11-30T08:00:00+00:00", "0999-11-30 08:00:00 +00:00"),
    ],
)
def test_a_time_is_shown_as_it_was_understood(text: str, understood: str) -> None:
    assert as_understood(parse_time(text, CHINA)) == understood


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "2026-11-30T08:00:00",
            (
                "has passed: 2026-11-30T08:00:00 was read as 2026-11-30 08:00:00 +08:00 (ONENET_TIMEZONE "
                "Asia/Shanghai); it was 2026-11-30 09:12:44 +08:00 by the platform's clock"
            ),
        ),
        ("2026-11-30T01:00:00Z",
         "has passed: 2026-11-30 01:00:00 +00:00; it was 2026-11-30 01:12:44 +00:00 by the platform's clock"),
    ],
)  # fmt: skip
def test_what_has_passed_is_said_with_both_times_in_one_zone(text: str, reason: str) -> None:
    """Most such times were meant in another zone."""
    assert why_expired(parse_time(text, CHINA), datetime(2026, 11, 30, 1, 12, 44, tzinfo=UTC)) == reason


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
