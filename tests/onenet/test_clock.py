"""The platform's clock, by the Date of its answers."""

import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from structlog.testing import capture_logs

from worker.onenet.clock import PlatformClock, least_offset_s
from worker.onenet.response import Response

SENT = datetime(2026, 8, 5, 8, 0, 0, 500_000, tzinfo=UTC)
RECEIVED = SENT + timedelta(seconds=2)


def dated(offset_s: float) -> Response:
    """Return an answer of a platform whose clock is ahead of ours by so many seconds."""
    date = format_datetime((SENT + timedelta(seconds=offset_s)).replace(microsecond=0), usegmt=True)
    return Response(200, {b"date": date.encode()}, b"")


def observe(clock: PlatformClock, *offsets_s: float) -> None:
    for offset_s in offsets_s:
        clock.observe(dated(offset_s), SENT, SENT)


@pytest.mark.parametrize(
    ("date_s", "offset_s"),
    [(-0.5, 0.0), (0.5, 0.0), (1.5, 0.0), (2.5, 0.5), (3600.5, 3598.5), (-1.5, -0.5), (-3600.5, -3599.5)],
)
def test_the_offset_is_the_least_that_the_date_allows(date_s: float, offset_s: float) -> None:
    """A Date is cut to the second, and was written at some moment between sending and receiving."""
    date = SENT + timedelta(seconds=date_s)
    assert date.microsecond == 0
    assert least_offset_s(date, SENT, RECEIVED) == offset_s


def test_a_platform_whose_clock_agrees_has_our_time() -> None:
    clock = PlatformClock("https://platform")
    observe(clock, 0.0, 0.0)
    assert clock.offset_s == 0
    assert abs(clock.now() - datetime.now(UTC)) < timedelta(seconds=60)


@pytest.mark.parametrize("offset_s", [8 * 3600, -8 * 3600])
def test_the_first_answer_tells_the_offset(offset_s: float) -> None:
    clock = PlatformClock("https://platform")
    observe(clock, offset_s)
    assert abs(clock.offset_s - offset_s) <= 1
    assert abs(clock.now() - datetime.now(UTC) - timedelta(seconds=offset_s)) < timedelta(seconds=60)


@pytest.mark.parametrize("odd_s", [86_400, -86_400])
def test_one_odd_date_changes_nothing(odd_s: float) -> None:
    """A gateway may answer with a page that it kept, with its date."""
    clock = PlatformClock("https://platform")
    observe(clock, 0, odd_s)
    assert clock.offset_s == 0
    observe(clock, 0, 0, odd_s, 0)
    assert clock.offset_s == 0


def test_a_clock_that_was_set_is_followed_after_a_few_answers() -> None:
    clock = PlatformClock("https://platform")
    observe(clock, 0, 0, 0, 0, 0, 600, 600, 600)
    assert abs(clock.offset_s - 600) <= 1


@pytest.mark.parametrize("headers", [{}, {b"date": b""}, {b"date": b"today"}])
def test_an_answer_without_a_date_tells_nothing(headers: dict[bytes, bytes]) -> None:
    clock = PlatformClock("https://platform")
    observe(clock, 600)
    assert clock.observe(Response(200, headers, b""), SENT, SENT) is None
    assert abs(clock.offset_s - 600) <= 1


def test_an_offset_of_more_than_five_seconds_is_logged_once_and_its_end_too() -> None:
    clock = PlatformClock("https://platform")
    with capture_logs() as logs:
        observe(clock, 4)
        assert logs == []
        observe(clock, 7, 7, 8, 7)
        observe(clock, 0, 0, 0, 0)
        assert len(logs) == 1  # one of the latest answers differs still: it may be another machine's
        observe(clock, 0)
    assert [(line["event"], line["log_level"], line["platform"]) for line in logs] == [
        ("platform_clock_differs", "warning", "https://platform"),
        ("platform_clock_agrees", "info", "https://platform"),
    ]
    assert abs(logs[0]["offset_s"] - 7) <= 1


def test_the_offset_is_certain_once_two_answers_agree() -> None:
    """One may have come from an odd node, and a command must not expire by it."""
    clock = PlatformClock("https://platform")
    assert not clock.is_certain
    observe(clock, 86_400)
    assert not clock.is_certain
    assert abs(clock.earliest_now() - datetime.now(UTC)) < timedelta(seconds=60)
    observe(clock, 0)
    assert not clock.is_certain
    assert clock.offset_s == 0
    observe(clock, 0)
    assert clock.is_certain


def test_machines_of_the_platform_whose_clocks_differ_are_logged_once() -> None:
    clock = PlatformClock("https://platform")
    with capture_logs() as logs:
        observe(clock, *[0, 600] * 20)
    assert len(logs) == 1


def test_what_was_known_is_forgotten_when_our_clock_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = PlatformClock("https://platform")
    observe(clock, 0, 0, 0, 0, 0)
    real = time.time
    monkeypatch.setattr("worker.onenet.clock.time.time", lambda: real() + 3600)
    assert not clock.is_agreed
    observe(clock, -3600)
    assert abs(clock.offset_s + 3600) <= 1


def test_an_offset_that_grows_is_logged_again() -> None:
    clock = PlatformClock("https://platform")
    with capture_logs() as logs:
        observe(clock, 10)
        observe(clock, 3600, 3600, 3600, 3600)
    assert [round(line["offset_s"], -1) for line in logs] == [10, 3600]


@pytest.mark.parametrize(
    "date",
    ["Fri, 31 Dec 9999 23:59:59 GMT", "Fri, 31 Dec 9999 23:59:59 -2359", "Thu, 01 Jan 1000 00:00:00 GMT"],
)
def test_a_date_that_no_clock_can_show_is_none(date: str) -> None:
    """The platform's time would be beyond the last one that can be computed with."""
    clock = PlatformClock("https://platform")
    assert clock.observe(Response(200, {b"date": date.encode()}, b""), SENT, SENT) is None
    assert clock.offset_s == 0
    assert clock.now() - datetime.now(UTC) < timedelta(minutes=1)
