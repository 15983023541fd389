"""What the entries of a device's history say of a command, however they are written."""

from datetime import UTC, datetime
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from schemas.onenet import ResultPage
from worker.core.results import NO_STATE, EntryState
from worker.onenet.results import state_of

ZONE = ZoneInfo("Asia/Shanghai")
ENTRY: dict[str, Any] = {
    "cmd_uuid": "42742677-adc3-54ca-83a1-5aaaf71482f8",
    "type": "EXECUTE",
    "create_time": "2026-11-22 16:00:00",
    "valid_time": "2026-11-22 16:00:00",
    "expired_time": "2026-11-23 16:00:00",
    "send_time": "2026-11-22 17:14:02",
    "trigger_msg": 7,
    "send_status": 5,
    "confirm_time": "2026-11-22 17:14:05",
    "confirm_status": "SUCCESS",
}
SENT, CONFIRMED = datetime(2026, 11, 22, 9, 14, 2, tzinfo=UTC), datetime(2026, 11, 22, 9, 14, 5, tzinfo=UTC)


def state(*changes: dict[str, Any]) -> EntryState:
    page = ResultPage.model_validate({"total_count": len(changes), "items": [ENTRY | each for each in changes]})
    return state_of(page.items, ZONE)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"cmd_uuid": "42742677-adc3-54ca-83a1-5aaaf71482f8 "},
        {"send_status": "5"},
        {"send_status": 5.0},
        {"confirm_status": " SUCCESS"},
        {"confirm_status": 0},
        {"send_time": "2026-11-22T17:14:02", "confirm_time": "2026-11-22T17:14:05"},
        {"remain": "3", "feedback_time": "2026-11-22 17:14:05"},
    ],
)
def test_one_state_may_be_written_in_many_ways(changes: dict[str, Any]) -> None:
    assert state(changes) == EntryState(5, "SUCCESS", SENT, CONFIRMED)


def test_a_time_may_have_milliseconds() -> None:
    assert state({"confirm_time": "2026-11-22 17:14:05:250"}).confirmed_at == CONFIRMED.replace(microsecond=250_000)


@pytest.mark.parametrize("time", [None, "", "-", "1970-01-01 00:00:00", "tomorrow", 7, ["2026-11-22 17:14:02"]])
def test_a_time_that_cannot_be_read_is_unknown(time: object) -> None:
    found = state({"send_time": time, "confirm_time": time})
    assert (found.send_status, found.sent_at, found.confirmed_at) == (5, None, None)


@pytest.mark.parametrize(("written", "word"), [(5, "TIME_OUT"), (13, "ADDR_OCCUPIED"), (14, "14"), (-1, "-1")])
def test_a_number_is_shown_as_the_word_of_the_push(written: int, word: str) -> None:
    assert state({"confirm_status": written}).confirm_status == word


@pytest.mark.parametrize("written", [None, "", "\x1b[2J", {}, "x" * 1000])
def test_what_is_no_word_is_no_confirm_status(written: object) -> None:
    assert state({"confirm_status": written}).confirm_status is None


def test_an_entry_that_comes_twice_is_one() -> None:
    assert state({}, {}) == EntryState(5, "SUCCESS", SENT, CONFIRMED)


def test_entries_of_one_state_tell_the_same_in_any_order() -> None:
    entries = {"confirm_status": "TIME_OUT"}, {"confirm_time": None}, {"send_time": "2026-11-22 17:14:03"}
    assert state(*entries) == state(*reversed(entries))
    assert state(*entries).confirmed_at == CONFIRMED


def test_no_entry_says_nothing() -> None:
    assert state() == NO_STATE


def test_entries_that_contradict_each_other_say_nothing() -> None:
    assert state({"send_status": 5}, {"send_status": 4}).send_status is None


@pytest.mark.parametrize("status", [None, "five", True, [], {}, "5 5"])
def test_a_state_that_cannot_be_read_is_none(status: object) -> None:
    assert state({"send_status": status}).send_status is None
