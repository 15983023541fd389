"""When the result of an accepted command is looked up, and what it is by the platform's state."""

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from pydantic import ValidationError

from schemas.reply import Reply
from worker.core.command import Command
from worker.core.results import NO_STATE, Awaited, EntryState, await_result, decide_result
from worker.core.times import parse_time

NOW = datetime(2026, 11, 22, 8, 0, tzinfo=UTC)
DELAYS_S = (60, 300, 900)
HOUR, DAY = timedelta(hours=1), timedelta(days=1)
REPLY = Reply(command_id="c", status="accepted", uuid="u", attempts=1, completed_at=NOW)


def awaited(
    *,
    expires_in: timedelta = DAY,
    valid_in: timedelta | None = None,
    retry: int | None = None,
    timeout: int | None = None,
    ahead: timedelta = timedelta(0),
    reply: Reply = REPLY,
) -> Awaited:
    """Return a command that was accepted at NOW."""
    valid_at = None if valid_in is None else NOW + valid_in
    command = Command(
        "c", "865820030000001", 3311, 0, 5850, NOW + expires_in, valid_at, retry, timeout, None, None, None
    )
    return await_result(command, "billing", reply, ahead, DELAYS_S)


def looks(command: Awaited, count: int, ahead: timedelta = timedelta(0)) -> list[float]:
    """Return when the next looks come that find nothing final, in seconds after NOW."""
    found = []
    for _ in range(count):
        found.append((command.due_at - NOW).total_seconds())
        command = command.after_look(command.due_at, command.due_at + ahead, DELAYS_S)
    return found


def test_the_gaps_grow_and_the_last_one_repeats() -> None:
    assert looks(awaited(), 5) == [60, 360, 1260, 2160, 3060]


def test_nothing_is_looked_up_before_valid_time() -> None:
    assert looks(awaited(valid_in=HOUR), 2) == [3660, 3960]


@pytest.mark.parametrize("ahead", [-HOUR, HOUR])
def test_gaps_do_not_depend_on_the_platforms_clock_and_its_times_do(ahead: timedelta) -> None:
    """``valid_time`` and ``expired_time`` are on the platform's clock."""
    assert looks(awaited(ahead=ahead), 3, ahead) == [60, 360, 1260]
    begins_s = (2 * HOUR - ahead).total_seconds()
    assert looks(awaited(valid_in=2 * HOUR, ahead=ahead), 2, ahead) == [begins_s + 60, begins_s + 360]
    end_s = (2 * HOUR - ahead).total_seconds() + 4 * 25 + 10
    found = looks(awaited(expires_in=2 * HOUR, ahead=ahead), 15, ahead)
    assert end_s in found


def test_only_a_recovered_command_may_have_been_cached_long_before_its_reply() -> None:
    recovered = REPLY.model_copy(update={"recovered": True})
    assert awaited().cached_since == NOW
    assert awaited(reply=recovered).cached_since is None


@pytest.mark.parametrize(("retry", "timeout", "answers_s"), [(None, None, 4 * 25), (0, 5, 5), (10, 40, 11 * 40)])
def test_one_look_comes_shortly_after_the_last_possible_answer(
    retry: int | None, timeout: int | None, answers_s: int
) -> None:
    end_s = 600 + answers_s + 10
    assert looks(awaited(expires_in=timedelta(minutes=10), retry=retry, timeout=timeout), 4) == [
        60,
        360,
        end_s,
        end_s + 900,
    ]


def test_the_last_look_comes_a_day_after_expired_time() -> None:
    command = awaited(expires_in=HOUR)
    while command.due_at < command.unknown_at:
        command = command.after_look(command.due_at, command.due_at, DELAYS_S)
    assert command.due_at == NOW + HOUR + DAY


def test_a_look_that_could_not_be_made_uses_up_none() -> None:
    command = awaited()
    later = command.later(command.due_at, 60)
    assert (later.looks, later.due_at) == (command.looks, command.due_at + timedelta(minutes=1))


@pytest.mark.parametrize(
    ("read_after_s", "is_served"),
    [(0, False), (53, False), (54, True), (60, True), (80, True)],  # due after 60 s
)
def test_a_read_from_when_a_command_was_due_does_for_its_look(read_after_s: int, is_served: bool) -> None:
    """One from a tenth of the delay before does too: commands that were sent seconds apart share their looks."""
    now = NOW + timedelta(minutes=2)
    read_at = NOW + timedelta(seconds=read_after_s)
    assert awaited().is_served_by(read_at, read_at, now, DELAYS_S) == is_served


@pytest.mark.parametrize("mark", ["last_answer_at", "unknown_at"])
def test_no_read_from_before_the_last_answer_or_the_end_does_for_the_look_after_it(mark: str) -> None:
    command = awaited()
    at: datetime = getattr(command, mark)
    command = command.model_copy(update={"due_at": at})
    second = timedelta(seconds=1)
    assert not command.is_served_by(at - second, at - second, at, DELAYS_S)
    assert command.is_served_by(at, at, at + second, DELAYS_S)


@pytest.mark.parametrize(("send_status", "result"), [(2, "cancelled"), (4, "expired"), (5, "executed"), (6, "failed")])
def test_a_final_state_is_the_result_at_once(send_status: int, result: str) -> None:
    state = EntryState(send_status, "SUCCESS", NOW, NOW)
    found = decide_result(awaited(), state, NOW, NOW)
    assert found is not None
    assert (found.result, found.confirm_status, found.sent_at, found.confirmed_at) == (result, "SUCCESS", NOW, NOW)
    assert (found.command_id, found.uuid, found.imei) == ("c", "u", "865820030000001")


@pytest.mark.parametrize("send_status", [1, 3, 7, 8, 0, 99, None])
def test_any_other_state_is_looked_up_again(send_status: int | None) -> None:
    assert decide_result(awaited(), EntryState(send_status), NOW + DAY, NOW) is None


def test_a_missing_answer_is_a_failure_once_none_can_come() -> None:
    """A repetition may still be answered before."""
    command, state = awaited(), EntryState(7, "TIME_OUT")
    assert decide_result(command, state, command.last_answer_at - timedelta(seconds=1), NOW) is None
    found = decide_result(command, state, command.last_answer_at, NOW)
    assert found is not None
    assert (found.result, found.confirm_status) == ("failed", "TIME_OUT")


def test_an_entry_that_disappears_and_comes_back_decides() -> None:
    command = awaited()
    assert decide_result(command, NO_STATE, NOW, NOW) is None
    found = decide_result(command.after_look(NOW, NOW, DELAYS_S), EntryState(5, "SUCCESS"), NOW, NOW)
    assert found is not None
    assert found.result == "executed"


@pytest.mark.parametrize("confirm_status", [None, "SUCCESS", "METHOD_NOT_ALLOWED"])
def test_the_state_decides_and_the_confirm_status_is_passed_on(confirm_status: str | None) -> None:
    for send_status, result in ((5, "executed"), (6, "failed")):
        found = decide_result(awaited(), EntryState(send_status, confirm_status), NOW, NOW)
        assert found is not None
        assert (found.result, found.confirm_status) == (result, confirm_status)


@pytest.mark.parametrize("state", [NO_STATE, EntryState(1), EntryState(3), EntryState(8), EntryState(99)])
def test_a_day_after_expired_time_it_is_unknown(state: EntryState) -> None:
    command = awaited()
    assert decide_result(command, state, command.unknown_at - timedelta(seconds=1), NOW) is None
    found = decide_result(command, state, command.unknown_at, NOW)
    assert found is not None
    assert found.result == "unknown"


def test_it_survives_the_broker_unchanged() -> None:
    command = awaited(valid_in=HOUR)
    assert Awaited.model_validate_json(command.model_dump_json()) == command


@pytest.mark.parametrize("zone", ["Z", "", "-12:00", "+14:00"])
def test_a_command_for_all_time_is_looked_up_as_any_other(zone: str) -> None:
    """``9999-12-31`` is how some say never."""
    texts = [f"9999-12-{day}T{hour:02}:00:00{zone}" for day in (30, 31) for hour in range(24)]
    moments = [moment for text in texts if (moment := _time(text)) is not None]
    assert moments
    for moment in moments:
        for valid_at in (None, moment):
            command = Command("c", "865820030000001", 3311, 0, 5850, moment, valid_at, 10, 40, None, None, None)
            found = await_result(command, "billing", REPLY, timedelta(hours=-8), (60, 30 * 86_400))
            assert decide_result(found, EntryState(7), NOW, NOW) is None
            assert found.after_look(NOW, NOW, DELAYS_S).due_at <= NOW + timedelta(seconds=900)
            assert NOW < found.last_answer_at <= found.unknown_at
            assert Awaited.model_validate_json(found.model_dump_json()) == found


def test_a_history_that_cannot_be_read_counts_from_the_first_read_that_fails_when_the_time_is_over() -> None:
    command = awaited(expires_in=HOUR)
    assert command.unread(NOW, command.unknown_at - HOUR, may_be_over_soon=True) == command
    failed = command.unread(NOW, command.unknown_at, may_be_over_soon=True)
    assert failed.unread(NOW + HOUR, command.unknown_at + HOUR, may_be_over_soon=True) == failed
    assert not failed.is_given_up(NOW + HOUR, DELAYS_S)
    assert failed.is_given_up(NOW + DAY, DELAYS_S)


def test_a_refusal_counts_from_the_first_that_follows_no_outage() -> None:
    """A platform that comes back may answer nonsense for a moment."""
    command = awaited(expires_in=HOUR)
    at = command.unknown_at
    failed = command.unread(NOW, at, may_be_over_soon=True).unread(NOW + HOUR, at, may_be_over_soon=False)
    assert not failed.is_given_up(NOW + HOUR, DELAYS_S)
    again = failed.unread(NOW + 2 * HOUR, at, may_be_over_soon=True)
    assert not again.is_given_up(NOW + 2 * HOUR, DELAYS_S)
    refused = failed.unread(NOW + 2 * HOUR, at, may_be_over_soon=False)
    assert refused.is_given_up(NOW + HOUR + timedelta(seconds=2 * DELAYS_S[-1]), DELAYS_S)


@pytest.mark.parametrize("valid_time", ["1970-01-01T00:00:00", "2000-01-01T00:00:00", "2026-11-22T08:00:00Z"])
def test_a_valid_time_that_has_passed_is_as_none(valid_time: str) -> None:
    """It may be any time: the request was sent without it."""
    moment = _time(valid_time)
    assert moment is not None
    command = Command("c", "865820030000001", 3311, 0, 5850, NOW + DAY, moment, None, None, None, None, None)
    found = await_result(command, "billing", REPLY, timedelta(0), DELAYS_S)
    assert found == awaited()
    assert Awaited.model_validate_json(found.model_dump_json()) == found


TIMES = ("accepted_at", "valid_at", "expires_at", "last_answer_at", "due_at", "unreadable_since", "refused_since")


@pytest.mark.parametrize("name", TIMES)
@pytest.mark.parametrize(
    "time", ["0001-01-01T00:00:00Z", "0001-01-01T00:00:00+14:00", "1999-12-31T23:59:59Z", "2000-01-01T13:00:00+14:00"]
)
def test_no_time_of_a_message_is_from_before_there_were_any(name: str, time: str) -> None:
    """Such a message must not crash the workers that receive it."""
    with pytest.raises(ValidationError):
        Awaited.model_validate(awaited().model_dump() | {name: time})


@pytest.mark.parametrize("name", TIMES)
@pytest.mark.parametrize("time", ["9999-12-31T23:59:59Z", "9999-12-31T23:59:59-14:00", "2000-01-01T00:00:00+00:00"])
def test_any_time_of_a_message_can_be_calculated_with(name: str, time: str) -> None:
    command = Awaited.model_validate(awaited().model_dump() | {name: time})
    for delays_s in ((1,), (30 * 86_400,)):
        command.is_served_by(NOW, NOW, NOW, delays_s)
        decide_result(command.unread(NOW, NOW, may_be_over_soon=False), EntryState(7), NOW, NOW)
        command.after_look(NOW, NOW, delays_s)
        command.is_given_up(NOW, delays_s)
    assert Awaited.model_validate_json(command.model_dump_json()) == command


def _time(text: str) -> datetime | None:
    try:
        return parse_time(text, ZoneInfo("Asia/Shanghai"))
    except ValueError:
        return None
