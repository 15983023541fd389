"""What identifies a command in its device's history, and what does not."""

import json
from datetime import datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from schemas.onenet import HistoryDetail, HistoryItem, HistoryPage
from tests.support.builders import a_command
from worker.core.doubt_window import DoubtWindow
from worker.core.parsing import read_command
from worker.core.platform import Candidate
from worker.errors import HistoryUnreadable
from worker.onenet.history import (
    MAX_SKEW,
    PER_PAGE,
    USUAL_SKEW,
    HistoryPages,
    Window,
    candidates,
    match,
    read_detail,
    read_page,
)

CHINA = ZoneInfo("Asia/Shanghai")
TRIED_AT = datetime(2026, 8, 5, 12, 0, 0, tzinfo=CHINA)
DOUBT = DoubtWindow(TRIED_AT, TRIED_AT + timedelta(seconds=2))
WINDOW = Window(DOUBT.since, DOUBT.until)
COMMAND: dict[str, Any] = a_command(
    expired_time="2026-08-06T08:00:00", valid_time="2026-08-05T20:00:00", retry=1, timeout=5, trigger_msg=4, args="on"
)
SENT: dict[str, Any] = {
    "imei": COMMAND["imei"],
    "obj_id": "3311",
    "obj_inst_id": "0",
    "res_id": "5850",
    "expired_time": "2026-08-06T08:00:00",
    "valid_time": "2026-08-05T20:00:00",
    "retry": "1",
    "timeout": "5",
}
LISTED: dict[str, Any] = {
    "cmd_uuid": "u",
    "type": "EXECUTE",
    "create_time": "2026-08-05 12:00:01",
    "expired_time": "2026-08-06 08:00:00",
    "trigger_msg": 4,
}


ON = {"args": "on"}


def without(fields: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}


def find(
    command: dict[str, Any], listed: dict[str, Any], sent: dict[str, Any], content: object, doubt: DoubtWindow = DOUBT
) -> Candidate | None:
    """Look for a command in a history of one entry."""
    wanted = read_command(json.dumps(command).encode(), None, CHINA)
    window = Window(doubt.since, doubt.until)
    for item in candidates([HistoryItem.model_validate(listed)], wanted, window, CHINA):
        return match(item, HistoryDetail(args=sent, content=content), wanted, doubt, window, CHINA)
    return None


def unclear(command: dict[str, Any], listed: dict[str, Any], sent: dict[str, Any], content: object) -> tuple[str, ...]:
    """Return the fields of an entry of which nobody can tell whether they are the command's."""
    found = find(command, listed, sent, content)
    assert found is not None
    assert not found.is_within_clock_skew
    return found.unclear


def test_what_agrees_in_everything_is_the_command() -> None:
    assert find(COMMAND, LISTED, SENT, {"args": "on"}) == Candidate(
        "u", is_within_clock_skew=True, valid_time_omitted=False
    )


@pytest.mark.parametrize(
    ("listed", "sent", "content"),
    [
        ({"type": "WRITE"}, {}, {"args": "on"}),
        ({"type": "READ"}, {}, {"args": "on"}),
        ({}, {"obj_id": "3312"}, {"args": "on"}),
        ({}, {"obj_inst_id": "1"}, {"args": "on"}),
        ({}, {"res_id": "5851"}, {"args": "on"}),
        ({}, {"imei": "865820030000002"}, {"args": "on"}),
        ({}, {}, {"args": "off"}),
        ({"expired_time": "2026-08-06 08:00:01"}, {}, {"args": "on"}),
        ({}, {"expired_time": "2026-08-06T08:00:01"}, {"args": "on"}),
        ({}, {"valid_time": "2026-08-05T20:00:01"}, {"args": "on"}),
        ({"valid_time": "2026-08-05 12:00:01"}, {"valid_time": None}, {"args": "on"}),
        ({"trigger_msg": 7}, {}, {"args": "on"}),
        ({}, {"retry": "2"}, {"args": "on"}),
        ({}, {"retry": 2.0}, {"args": "on"}),
        ({}, {"timeout": "6"}, {"args": "on"}),
        ({"create_time": "2026-08-05 11:00:00"}, {}, {"args": "on"}),
        ({"create_time": "2026-08-05 13:00:00"}, {}, {"args": "on"}),
    ],
    ids=str,
)
def test_one_difference_makes_it_another_command(listed: dict[str, Any], sent: dict[str, Any], content: object) -> None:
    assert find(COMMAND, LISTED | listed, SENT | sent, content) is None


@pytest.mark.parametrize(
    ("listed", "sent", "content"),
    [
        ({"create_time": "2026-08-05 12:00:01:250", "trigger_msg": "4"}, {}, {"args": "on"}),
        ({"create_time": "2026-08-05T12:00:01.250", "type": "execute"}, {}, '{"args": "on"}'),
        ({"cmd_uuid": "u "}, {"obj_id": 3311, "retry": 1}, {"args": "on"}),
        ({}, {"expired_time": "2026-08-06 08:00:00:000", "valid_time": "2026-08-05 20:00:00"}, "on"),
        ({"expired_time": None}, {"imei": None}, {"args": "on"}),
    ],
    ids=str,
)
def test_the_platforms_oddities_make_no_difference(
    listed: dict[str, Any], sent: dict[str, Any], content: object
) -> None:
    found = find(COMMAND, LISTED | listed, SENT | sent, content)
    assert found is not None
    assert found.uuid == "u"


@pytest.mark.parametrize("shown", [{}, {"retry": "3", "timeout": 25, "valid_time": "2026-08-05 12:00:01"}])
def test_what_was_not_given_is_shown_as_absent_or_as_what_the_platform_took(shown: dict[str, Any]) -> None:
    command = without(COMMAND, "retry", "timeout", "trigger_msg", "valid_time", "args")
    sent = without(SENT, "retry", "timeout", "valid_time") | shown
    assert find(command, LISTED | {"trigger_msg": 7}, sent, None) is not None


def test_a_valid_time_is_left_out_only_if_it_had_passed() -> None:
    passed = COMMAND | {"valid_time": "2026-08-05T12:00:01"}
    found = find(passed, LISTED, without(SENT, "valid_time"), {"args": "on"})
    assert found is not None
    assert found.valid_time_omitted
    too_late = COMMAND | {"valid_time": "2026-08-05T12:00:03"}
    assert unclear(too_late, LISTED, without(SENT, "valid_time"), {"args": "on"}) == ("valid_time",)
    listed = LISTED | {"valid_time": "2026-08-05 12:00:01"}  # filled in, so that it was made without one
    assert find(too_late, listed, without(SENT, "valid_time"), {"args": "on"}) is None


@pytest.mark.parametrize(
    ("field", "listed", "sent", "content"),
    [
        ("obj_id", {}, {"obj_id": None}, ON), ("obj_inst_id", {}, {"obj_inst_id": " "}, ON),
        ("res_id", {}, {"res_id": -1}, ON),
        ("obj_id", {}, {"obj_id": [3311]}, ON), ("imei", {}, {"imei": "8658200****0001"}, ON),
        ("retry", {}, {"retry": None}, ON), ("retry", {}, {"retry": -1}, ON), ("timeout", {}, {"timeout": "5 s"}, ON),
        ("trigger_msg", {"trigger_msg": ["NOTIFY"]}, {}, ON), ("trigger_msg", {"trigger_msg": None}, {}, ON),
        ("type", {"type": "EXEC"}, {}, ON), ("type", {"type": None}, {}, ON),
        ("create_time", {"create_time": "soon"}, {}, ON),
        ("create_time", {"create_time": "2026-02-30 00:00:00"}, {}, ON),
        ("create_time", {"create_time": 1785902401}, {}, ON),
        ("create_time", {"create_time": "2026-08-05 12:00"}, {}, ON),
        ("create_time", {"create_time": None}, {}, ON),
        ("create_time", {"create_time": "2026-08-05 12:00:01:"}, {}, ON),
        ("expired_time", {}, {"expired_time": "2026-08-06 08:00"}, ON),
        ("expired_time", {}, {"expired_time": "never"}, ON),
        ("expired_time", {"expired_time": None}, {"expired_time": None}, ON),
        ("expired_time", {"expired_time": "never"}, {"expired_time": None}, ON),
        ("valid_time", {}, {"valid_time": None}, ON), ("valid_time", {}, {"valid_time": "now"}, ON),
        ("args", {}, {}, None), ("args", {}, {}, {}), ("args", {}, {}, {"args": "ON"}),
        ("args", {}, {}, {"args": "on\n"}),
        ("args", {}, {}, ["on"]), ("args", {}, {}, "[" * 100_000),
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
def test_an_entry_that_merely_looks_different_is_neither_the_command_nor_another(
    field: str, listed: dict[str, Any], sent: dict[str, Any], content: object
) -> None:
    """To pass over it could be to send the command twice, and to take it, to say so of one that was never cached."""
    found = find(COMMAND, LISTED | listed, SENT | sent, content)
    assert found == Candidate(
        "u", is_within_clock_skew=False, valid_time_omitted=field == "valid_time", unclear=(field,)
    )


@pytest.mark.parametrize(
    ("listed", "sent"),
    [
        ({"create_time": "2026-08-05 04:00:01"}, {}), ({"create_time": "2026-08-05T04:00:01.250"}, {}),
        ({"create_time": "2026-08-05 04:00"}, {}), ({"create_time": "2026-08-05 00:00:00"}, {}),
        ({"create_time": "2026-08-05 04:00:01", "expired_time": "2026-08-06 00:00:00"}, {}),
        *(({"create_time": shown}, {}) for shown in (
            "1970-01-01 08:00:00", "1970-01-01T00:00:00Z", "0001-01-01 00:00:00", "0000-00-00 00:00:00",
            "9999-12-31 23:59:59", 0,
        )),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize(
    "command", [COMMAND, without(COMMAND, "valid_time")], ids=["with a valid time", "without a valid time"]
)
def test_a_creation_without_a_value_or_in_utc_or_of_the_day_alone_decides_nothing(
    command: dict[str, Any], listed: dict[str, Any], sent: dict[str, Any]
) -> None:
    shown = SENT if "valid_time" in command else SENT | {"valid_time": "2026-08-05T12:00:01"}
    assert "create_time" in unclear(command, LISTED | listed, shown | sent, ON)


@pytest.mark.parametrize(
    "created",
    ["2026-08-05 03:00:00", "2026-08-05 20:00:01", "2026-08-06 00:00:00", "2026-08-04 00:00:00", "2026-08-05 11:30:00",
     "2026-08-05T04:00:01+08:00"],
)  # fmt: skip
def test_a_creation_at_another_time_is_another_command(created: str) -> None:
    assert find(COMMAND, LISTED | {"create_time": created}, SENT, ON) is None


@pytest.mark.parametrize("field", ["expired_time", "valid_time"])
@pytest.mark.parametrize(
    ("wanted", "shown"),
    [
        ("18:30:25", "18:30:00"), ("18:30:25", "00:00:00"), ("18:30:25", "10:30:25"), ("18:30:25", "10:30:00"),
        ("18:30:25", None),
    ],
)  # fmt: skip
def test_a_time_that_was_cut_or_is_in_utc_or_without_a_value_leaves_its_field_unclear(
    field: str, wanted: str, shown: str | None
) -> None:
    day = "2026-08-06" if field == "expired_time" else "2026-08-05"
    time = f"{day}T{shown}" if shown else "1970-01-01T08:00:00"
    command = COMMAND | {field: f"{day}T{wanted}"}
    assert unclear(
        command,
        without(LISTED, "expired_time"),
        SENT | {"expired_time": command["expired_time"], "valid_time": command["valid_time"], field: time},
        ON,
    ) == (field,)


@pytest.mark.parametrize(
    "shown", ["2026-08-06 18:30:00", "2026-08-06 00:00:00", "2026-08-06 10:30:25", "1970-01-01 08:00:00"]
)
def test_an_entry_whose_listed_time_was_cut_or_is_in_utc_is_not_passed_over(shown: str) -> None:
    command, sent = COMMAND | {"expired_time": "2026-08-06T18:30:25"}, SENT | {"expired_time": "2026-08-06T18:30:25"}
    assert find(command, LISTED | {"expired_time": shown}, sent, ON) is not None


def test_a_certain_difference_makes_another_command_of_the_oddest_entry() -> None:
    assert find(COMMAND, {"type": "WRITE"}, {}, None) is None
    assert find(COMMAND, {"create_time": "2026-08-05 11:00:00"}, {}, None) is None
    assert find(COMMAND, {"expired_time": "2026-08-06 08:00:01"}, {}, None) is None
    assert find(COMMAND, {}, {"res_id": 1}, None) is None


def test_a_time_with_an_offset_is_the_same_in_either_reading() -> None:
    for created in ("2026-08-05 12:00:01+08:00", "2026-08-05T12:00:01Z", "2026-08-05T04:00:01Z"):
        found = find(COMMAND, LISTED | {"create_time": created}, SENT, ON)
        assert found == Candidate("u", is_within_clock_skew=True, valid_time_omitted=False)


def test_clocks_may_differ_a_little_and_more_decides_nothing() -> None:
    second = timedelta(seconds=1)
    for bound, outwards in ((TRIED_AT, -1), (DOUBT.until, 1)):
        assert WINDOW.is_within(bound + outwards * USUAL_SKEW, USUAL_SKEW)
        assert not WINDOW.is_within(bound + outwards * (USUAL_SKEW + second), USUAL_SKEW)
        assert WINDOW.is_within(bound + outwards * MAX_SKEW, MAX_SKEW)
        assert not WINDOW.is_within(bound + outwards * (MAX_SKEW + second), MAX_SKEW)
    far = find(COMMAND, LISTED | {"create_time": "2026-08-05 12:00:30"}, SENT, {"args": "on"})
    assert far == Candidate("u", is_within_clock_skew=False, valid_time_omitted=False)


@pytest.mark.parametrize("skew_s", [-600, 600])
def test_a_clock_that_is_known_to_be_wrong_is_allowed_for(skew_s: float) -> None:
    window = Window(DOUBT.since, DOUBT.until, skew_s)
    assert window.is_within(TRIED_AT + timedelta(seconds=skew_s), USUAL_SKEW)
    assert window.is_within(TRIED_AT, USUAL_SKEW)  # it may be the clock of another machine than wrote the entry
    assert not window.is_within(TRIED_AT - timedelta(seconds=skew_s), USUAL_SKEW)


def test_where_nothing_tells_the_beginning_anything_before_may_be_it() -> None:
    assert find(
        COMMAND, LISTED | {"create_time": "2026-08-01 00:00:00"}, SENT, {"args": "on"}, DoubtWindow(None, TRIED_AT)
    )


def page(total: int, *uuids: str) -> HistoryPage:
    return HistoryPage.model_validate({"total_count": total, "items": [LISTED | {"cmd_uuid": uuid} for uuid in uuids]})


def test_a_history_is_all_of_its_pages() -> None:
    listing = HistoryPages()
    listing.add(page(3, "a", "b"))
    assert not listing.is_complete
    listing.add(page(4, "b", "c"))  # one more has come meanwhile
    assert not listing.is_complete
    listing.add(page(4, "d"))
    assert listing.is_complete
    assert [item.cmd_uuid for item in listing.items] == ["a", "b", "c", "d"]


@pytest.mark.parametrize("last", [(), ("a",)])
def test_a_page_that_brings_nothing_new_while_something_is_missing_is_an_error(last: tuple[str, ...]) -> None:
    listing = HistoryPages()
    listing.add(page(2, "a"))
    with pytest.raises(HistoryUnreadable):
        listing.add(page(2, *last))


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"errno": 7, "error": "busy"}', '{"errno": 0}', '{"errno": 0, "data": {"items": []}}',
     '{"errno": 0, "data": {"total_count": -1, "items": []}}'],
)  # fmt: skip
def test_an_answer_of_another_form_decides_nothing(text: str) -> None:
    for read in (read_page, read_detail):
        with pytest.raises(HistoryUnreadable):
            read(text.encode())


def test_numbers_may_be_text() -> None:
    assert read_page(b'{"errno": "0", "data": {"total_count": "0", "items": []}}').total_count == 0


PLAIN = without(COMMAND, "retry", "timeout", "trigger_msg", "valid_time")
PLAIN_LISTED = LISTED | {"trigger_msg": 7}
PLAIN_SENT = without(SENT, "retry", "timeout", "valid_time")


@pytest.mark.parametrize(
    ("listed", "sent"),
    [
        ({"cmd_uuid": " u\t"}, {}), ({"type": "EXECUTE "}, {}), ({"create_time": " 2026-08-05 12:00:01 "}, {}),
        ({"expired_time": ""}, {}), ({"expired_time": None}, {"expired_time": "2026-08-06 08:00:00:999"}),
        ({}, {"expired_time": None}), ({}, {"expired_time": ""}), ({"trigger_msg": None}, {}),
        ({"trigger_msg": ""}, {}), ({"trigger_msg": "7"}, {"trigger_msg": 7}),
        ({"of_tomorrow": [1]}, {"of_tomorrow": {}}),
        ({}, {"obj_id": " 3311 "}), ({}, {"imei": int(COMMAND["imei"])}), ({}, {"retry": None, "timeout": ""}),
        ({}, {"retry": 3, "timeout": "25", "trigger_msg": "7"}), ({}, {"valid_time": ""}),
        ({}, {"valid_time": "2026-08-05 12:00:00"}),
        ({"create_time": "2026-08-05 12:00:01:250"}, {"valid_time": "2026-08-05 12:00:01:250"}),
    ],
    ids=str,
)  # fmt: skip
def test_what_was_not_given_has_many_ways_of_being_absent(listed: dict[str, Any], sent: dict[str, Any]) -> None:
    found = find(PLAIN, PLAIN_LISTED | listed, PLAIN_SENT | sent, ON)
    assert found == Candidate("u", is_within_clock_skew=True, valid_time_omitted=False)


@pytest.mark.parametrize("valid_time", ["2026-08-05T20:00:00", "2026-08-05T12:00:07"])
def test_what_was_given_to_another_command_is_told_from_what_was_not(valid_time: str) -> None:
    assert find(PLAIN, PLAIN_LISTED, PLAIN_SENT | {"valid_time": valid_time}, ON) is None


@pytest.mark.parametrize(
    ("field", "listed", "sent"),
    [
        ("retry", {}, {"retry": 0}), ("timeout", {}, {"timeout": 24}), ("trigger_msg", {}, {"trigger_msg": 1}),
        ("trigger_msg", {"trigger_msg": 6}, {}), ("valid_time", {}, {"valid_time": "2026-08-05T12:00:02"}),
    ],
    ids=str,
)  # fmt: skip
def test_what_was_not_given_may_be_another_default_than_documented(
    field: str, listed: dict[str, Any], sent: dict[str, Any]
) -> None:
    assert unclear(PLAIN, PLAIN_LISTED | listed, PLAIN_SENT | sent, ON) == (field,)


@pytest.mark.parametrize("sent", [{}, {"retry": "3", "timeout": "25"}])
def test_a_default_that_was_given_is_the_same_as_one_that_was_not(sent: dict[str, Any]) -> None:
    command = PLAIN | {"retry": 3, "timeout": 25, "trigger_msg": 7}
    assert find(command, PLAIN_LISTED, PLAIN_SENT | sent, ON) is not None


@pytest.mark.parametrize(
    ("args", "content", "is_it"),
    [
        ("on", '{"args":"on"}', True), ("on", {"args": "on", "of_tomorrow": 1}, True), ("on", '"on"', True),
        ("5", {"args": 5}, True), ("\u5f00", '{"args":"\\u5f00"}', True),
        ('{"args":"x"}', {"args": '{"args":"x"}'}, True),
        (None, {}, True), (None, "", True), (None, "{}", True), (None, "null", True), (None, {"args": None}, True),
        ("", {"args": ""}, True), ("", '{"args":""}', True),
        ("on", '{"args": "off"}', False), (None, ON, False), ("", ON, False),
    ],
    ids=repr,
)  # fmt: skip
def test_the_body_may_be_text_or_an_object_and_the_args_are_compared_exactly(
    args: str | None, content: object, is_it: bool
) -> None:
    command = without(PLAIN, "args") | ({} if args is None else {"args": args})
    assert (find(command, PLAIN_LISTED, PLAIN_SENT, content) is not None) == is_it


@pytest.mark.parametrize(
    ("valid_time", "shown", "is_omitted"),
    [
        ("20:00:00", "20:00:00", False), ("20:00:00", "20:00:01", None),
        ("20:00:00", "12:00:01", None), ("12:00:02", "12:00:02", False), ("12:00:02", None, True),
        ("11:00:00", None, True), ("12:00:02", "12:00:01", True), ("11:00:00", "12:00:07", None),
    ],
)  # fmt: skip
def test_a_valid_time_is_absent_only_where_it_can_have_been_left_out(
    valid_time: str, shown: str | None, is_omitted: bool | None
) -> None:
    """The worker leaves out one that has passed, and the platform then takes the time at which it cached."""
    sent = PLAIN_SENT | {"valid_time": shown and f"2026-08-05T{shown}"}
    found = find(PLAIN | {"valid_time": f"2026-08-05T{valid_time}"}, PLAIN_LISTED, sent, ON)
    assert (found and found.valid_time_omitted) == is_omitted


@pytest.mark.parametrize(
    ("time", "is_within_clock_skew"),
    [("11:58:59", None), ("11:59:00", False), ("11:59:54", False), ("11:59:55", True), ("12:00:02", True),
     ("12:00:07", True), ("12:00:08", False), ("12:01:02", False), ("12:01:03", None)],
)  # fmt: skip
def test_what_only_clocks_far_apart_would_explain_is_told_from_what_is_likely(
    time: str, is_within_clock_skew: bool | None
) -> None:
    found = find(COMMAND, LISTED | {"create_time": f"2026-08-05 {time}"}, SENT, ON)
    assert (found and found.is_within_clock_skew) == is_within_clock_skew


@pytest.mark.parametrize(
    ("since", "order"), [(TRIED_AT, ["2", "1", "0"]), (None, ["0", "1", "2"])], ids=["beginning", "no-beginning"]
)
def test_the_best_come_first(since: datetime | None, order: list[str]) -> None:
    """A request is cached soon after it was sent; without a beginning the end is all there is to go by."""
    wanted = read_command(json.dumps(COMMAND).encode(), None, CHINA)
    times = ("12:00:12", "12:00:07", "12:00:02")
    items = [
        HistoryItem.model_validate(LISTED | {"cmd_uuid": str(number), "create_time": f"2026-08-05 {time}"})
        for number, time in enumerate(times)
    ]
    window = Window(since, TRIED_AT + timedelta(seconds=13))
    assert [item.cmd_uuid for item in candidates(items, wanted, window, CHINA)] == order


def test_another_kind_of_command_may_be_as_odd_as_it_likes() -> None:
    assert find(COMMAND, LISTED | {"type": "READ", "create_time": "yesterday"}, SENT, ON) is None


def test_what_one_page_shows_twice_does_not_hide_that_another_is_missing() -> None:
    listing = HistoryPages()
    listing.add(page(2, "a", "a"))
    assert not listing.is_complete


def test_a_total_that_shrinks_does_not_make_up_for_what_is_missing() -> None:
    listing = HistoryPages()
    listing.add(page(3, "a", "b"))
    with pytest.raises(HistoryUnreadable, match="only 2 of 3"):
        listing.add(page(2))


def test_an_empty_history_is_complete() -> None:
    listing = HistoryPages()
    listing.add(page(0))
    assert listing.is_complete


@pytest.mark.parametrize(
    "body",
    [
        b"null", b"{}", b"\0<html>not the platform", b"\xff\xfe", b'{"errno":0,"data":[]}', b"[" * 100_000,
        b'{"data":{"total_count":0,"items":[],"args":{}}}', b'{"errno":0,"data":{"total_count":0,"items":[],"args":{}}',
        b'{"errno":null,"data":{"total_count":0,"items":[],"args":{}}}',
        b'{"errno":1,"data":{"total_count":0,"items":[],"args":{}}}',
        b'{"errno":0,"data":{"total_count":0,"items":{},"args":"x"}',
    ],
    ids=lambda value: str(value[:60]),
)  # fmt: skip
def test_no_bytes_are_taken_for_an_empty_history(body: bytes) -> None:
    for read in (read_page, read_detail):
        with pytest.raises(HistoryUnreadable):
            read(body)


def answer(data: object) -> bytes:
    return json.dumps({"errno": 0, "data": data}).encode()


NO_NAMES: list[Any] = [None, "", " ", [], 1.5, "a\nb", "u" * 300]


@pytest.mark.parametrize("nameless", [{}, None, "x", 5, [], *({"cmd_uuid": name} for name in NO_NAMES)])
def test_an_entry_without_a_usable_name_is_kept_and_unclear(nameless: object) -> None:
    """It may be the one that is looked for, and no record can tell whose it is."""
    found = read_page(answer({"total_count": 3, "items": [nameless, nameless, LISTED]}))
    listing = HistoryPages()
    listing.add(found)
    assert listing.is_complete
    assert [item.cmd_uuid for item in listing.items] == ["", "", "u"]
    wanted = read_command(json.dumps(COMMAND).encode(), None, CHINA)
    assert len(candidates(listing.items, wanted, WINDOW, CHINA)) == 3


def test_a_nameless_entry_that_is_another_command_for_certain_is_passed_over() -> None:
    assert find(COMMAND, without(LISTED, "cmd_uuid") | {"type": "READ"}, {}, None) is None
    assert find(COMMAND, without(LISTED, "cmd_uuid") | {"create_time": "2026-08-04 12:00:00"}, {}, None) is None


def test_a_page_of_nameless_entries_that_comes_twice_brings_nothing_new() -> None:
    listing = HistoryPages()
    listing.add(read_page(answer({"total_count": 4, "items": [None, None]})))
    with pytest.raises(HistoryUnreadable, match="only 2 of 4"):
        listing.add(read_page(answer({"total_count": 4, "items": [None, None]})))


@pytest.mark.parametrize(
    "total", [{"total_count": n} for n in (3, "3", 3.0, "3.0", " 3 ")] + [{"count": 3}, {"count": "3"}]
)
def test_the_total_may_be_written_in_several_ways(total: dict[str, Any]) -> None:
    assert read_page(answer(total | {"items": []})).total_count == 3


@pytest.mark.parametrize("items", [{}, {"items": None}, {"items": []}])
def test_a_history_of_nothing_may_have_no_items(items: dict[str, Any]) -> None:
    listing = HistoryPages()
    listing.add(read_page(answer({"total_count": 0} | items)))
    assert listing.is_complete
    with pytest.raises(HistoryUnreadable, match="only 0 of 1"):
        HistoryPages().add(read_page(answer({"total_count": 1} | items)))


@pytest.mark.parametrize("total", [None, True, -1, "x", 1.5, [], {}, "NaN"], ids=repr)
def test_a_total_that_is_no_number_decides_nothing(total: object) -> None:
    with pytest.raises(HistoryUnreadable):
        read_page(answer({"total_count": total, "items": []}))


@pytest.mark.parametrize("args", [None, [], "imei=1", 5], ids=repr)
def test_a_detail_whose_args_are_no_object_shows_none(args: object) -> None:
    assert read_detail(answer({"args": args, "content": ON})).args == {}


def test_half_a_character_does_not_make_an_answer_unreadable() -> None:
    """A serializer that cuts a text in the middle of an emoji leaves one."""
    body = rb'{"errno":0,"data":{"args":{},"content":{"args":"on \ud83d","pair":"\ud83d\ude00","text":"\\ud83d"}}}'
    assert read_detail(body).content == {"args": "on \ufffd", "pair": "\U0001f600", "text": "\\ud83d"}


def test_one_that_was_cached_late_after_its_valid_time_is_still_the_command() -> None:
    """The platform may take its time: what it shows is what was sent, not what it filled in."""
    late = COMMAND | {"valid_time": "2026-08-05T12:00:03"}
    listed = LISTED | {"create_time": "2026-08-05 12:00:04"}
    assert find(late, listed, SENT | {"valid_time": "2026-08-05T12:00:03"}, {"args": "on"}) is not None


@pytest.mark.parametrize("nothing", [None, ""])
def test_a_trigger_that_the_detail_leaves_empty_is_the_lists(nothing: str | None) -> None:
    assert find(COMMAND, LISTED, SENT | {"trigger_msg": nothing}, {"args": "on"}) is not None
    assert find(COMMAND, LISTED | {"trigger_msg": 7}, SENT | {"trigger_msg": nothing}, {"args": "on"}) is None


def a_page(first: int, count: int, total: int) -> HistoryPage:
    items = [{"cmd_uuid": f"u{number}"} for number in range(first, first + count)]
    return HistoryPage.model_validate({"total_count": total, "items": items})


@pytest.mark.parametrize("total", [0, 1, 29])
def test_a_total_below_what_is_shown_makes_a_history_unreadable(total: int) -> None:
    """What contradicts itself may lack entries, and would prove a command absent that was cached."""
    with pytest.raises(HistoryUnreadable, match=f"30 of {total}"):
        HistoryPages().add(a_page(0, 30, total))


def test_behind_a_full_page_another_is_asked_for_whatever_the_total_says() -> None:
    """A platform may give the number of entries on the page for the total."""
    listing = HistoryPages()
    listing.add(a_page(0, PER_PAGE, PER_PAGE))
    assert not listing.is_complete
    listing.add(a_page(PER_PAGE, 50, 50))
    assert listing.is_complete
    assert len(listing.items) == PER_PAGE + 50


@pytest.mark.parametrize("second", [a_page(0, 0, PER_PAGE), a_page(0, PER_PAGE, PER_PAGE)], ids=["empty", "the same"])
def test_a_page_that_brings_nothing_new_is_the_end(second: HistoryPage) -> None:
    listing = HistoryPages()
    listing.add(a_page(0, PER_PAGE, PER_PAGE))
    listing.add(second)
    assert listing.is_complete
