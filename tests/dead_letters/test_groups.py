"""Dead letters with like errors are one group."""

from datetime import UTC, datetime, timedelta

import pytest

from worker.dead_letters.groups import Groups
from worker.dead_letters.letter import Listing

FIRST = datetime(2026, 8, 5, 12, tzinfo=UTC)


def a_listing(error: str | None, number: int = 0, reason: str = "retries_exhausted") -> Listing:
    return Listing(f"{number:032x}", f"c-{number}", reason, error, FIRST + timedelta(minutes=number), None, None, None)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("503 after 10 attempts", "504 after 9 attempts"),
        ("42742677-adc3-54ca-83a1-5aaaf71482f8 is taken", "AAAAAAAA-adc3-54ca-83a1-5aaaf71482f8 is taken"),
        ("not before 2026-08-05T12:00:00.000Z", "not before 2026-08-06T12:00:00+08:00"),
        ("device 865820030000001: 设备不在线", "device 865820030000002: 设备不在线"),
        ("wait 1,200.5 s", "wait 3 s"),
        ("request 9f86d081884c7d65 failed", "request a3c024f1b2e49d01 failed"),
    ],
)
def test_errors_that_differ_in_numbers_ids_and_times_only_are_one_group(one: str, other: str) -> None:
    groups = Groups()
    groups.add(a_listing(one, 1))
    groups.add(a_listing(other, 2))
    [found] = groups.largest_first()
    assert (found.count, found.error, found.example) == (2, other, f"{2:032x}")
    assert (found.oldest, found.newest) == (FIRST + timedelta(minutes=1), FIRST + timedelta(minutes=2))


def test_other_words_and_other_reasons_are_other_groups_the_largest_first() -> None:
    groups = Groups()
    for listing in (a_listing("refused"), a_listing("timed out"), a_listing("refused", reason="outcome_unknown"),
                    a_listing("timed out", 3), a_listing(None)):  # fmt: skip
        groups.add(listing)
    assert [(group.reason, group.error, group.count) for group in groups.largest_first()] == [
        ("retries_exhausted", "timed out", 2),
        ("retries_exhausted", "refused", 1),
        ("outcome_unknown", "refused", 1),
        ("retries_exhausted", None, 1),
    ]


def test_thousands_of_errors_that_have_nothing_in_common_make_a_bounded_number_of_groups() -> None:
    groups = Groups()
    for number in range(3_000):
        word = "".join(chr(ord("a") + int(digit)) for digit in str(number))
        groups.add(a_listing(f"{word} failed", number))
    assert len(groups.largest_first()) == 1_001
    assert groups.largest_first()[0].count == 2_000
