"""Which entries of a device's history may be a command, and when a history is complete."""

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
from worker.onenet import history
from worker.onenet.history import (
    MAX_SKEW,
    PER_PAGE,
    USUAL_SKEW,
    HistoryPages,
    Window,
    candidates,
    is_waiting,
    match,
)
from worker.onenet.response import Response
from worker.onenet.v1 import V1
from worker.onenet.v2 import V2

CHINA = ZoneInfo("Asia/Shanghai")
TRIED_AT = datetime(2026, 8, 5, 12, 0, 0, tzinfo=CHINA)
DOUBT = DoubtWindow(TRIED_AT, TRIED_AT + timedelta(seconds=2))
WINDOW = Window(DOUBT.since, DOUBT.until, read_at=DOUBT.until)
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


def read_page(body: bytes) -> HistoryPage:
    return history.read_page(Response(200, {}, body), V1)


def read_detail(body: bytes) -> HistoryDetail:
    return history.read_detail(Response(200, {}, body), V1)


def without(fields: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}


def find(
    command: dict[str, Any], listed: dict[str, Any], sent: dict[str, Any], content: object, doubt: DoubtWindow = DOUBT
) -> Candidate | None:
    """Look for a command in a history of one entry."""
    wanted = read_command(json.dumps(command).encode(), None, CHINA)
    window = Window(doubt.since, doubt.until, read_at=doubt.until + timedelta(hours=12))
    for item in candidates([HistoryItem(**listed)], wanted, window, CHINA):
        detail = HistoryDetail(args=sent, content=content)
        return match(item, detail, wanted, window, CHINA, omitted_until=doubt.until)
    return None


def unclear(command: dict[str, Any], listed: dict[str, Any], sent: dict[str, Any], content: object) -> tuple[str, ...]:
    """Return the unclear fields of an entry, which must be a candidate outside the usual clock skew."""
    found = find(command, listed, sent, content)
    assert found is not None
    assert not found.is_within_clock_skew
    return found.unclear


def test_an_entry_that_matches_in_every_field_is_the_command() -> None:
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
def test_an_entry_that_differs_in_one_field_is_another_command(
    listed: dict[str, Any], sent: dict[str, Any], content: object
) -> None:
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
def test_an_entry_in_another_known_spelling_is_the_command(
    listed: dict[str, Any], sent: dict[str, Any], content: object
) -> None:
    found = find(COMMAND, LISTED | listed, SENT | sent, content)
    assert found is not None
    assert found.uuid == "u"


@pytest.mark.parametrize("shown", [{}, {"retry": "3", "timeout": 25, "valid_time": "2026-08-05 12:00:01"}])
def test_an_optional_field_that_was_not_sent_matches_absence_and_the_default(shown: dict[str, Any]) -> None:
    command = without(COMMAND, "retry", "timeout", "trigger_msg", "valid_time", "args")
    sent = without(SENT, "retry", "timeout", "valid_time") | shown
    assert find(command, LISTED | {"trigger_msg": 7}, sent, None) is not None


def test_a_valid_time_may_be_omitted_only_if_it_was_in_the_past() -> None:
    passed = COMMAND | {"valid_time": "2026-08-05T12:00:01"}
    found = find(passed, LISTED, without(SENT, "valid_time"), {"args": "on"})
    assert found is not None
    assert found.valid_time_omitted
    too_late = COMMAND | {"valid_time": "2026-08-05T12:00:03"}
    assert unclear(too_late, LISTED, without(SENT, "valid_time"), {"args": "on"}) == ("valid_time",)
    listed = LISTED | {"valid_time": "2026-08-05 12:00:01"}  # filled in by the platform: the command had none
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
def test_an_entry_with_an_unclear_field_is_a_candidate_that_names_the_field(
    field: str, listed: dict[str, Any], sent: dict[str, Any], content: object
) -> None:
    """Skipping it could send the command twice; taking it could report a command as cached that never was."""
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
def test_a_creation_time_without_a_value_or_in_utc_or_without_a_time_of_day_is_unclear(
    command: dict[str, Any], listed: dict[str, Any], sent: dict[str, Any]
) -> None:
    shown = SENT if "valid_time" in command else SENT | {"valid_time": "2026-08-05T12:00:01"}
    assert "create_time" in unclear(command, LISTED | listed, shown | sent, ON)


@pytest.mark.parametrize(
    "created",
    ["2026-08-05 03:00:00", "2026-08-05 20:00:01", "2026-08-06 00:00:00", "2026-08-04 00:00:00", "2026-08-05 11:30:00",
     "2026-08-05T04:00:01+08:00"],
)  # fmt: skip
def test_an_entry_created_outside_the_window_is_another_command(created: str) -> None:
    assert find(COMMAND, LISTED | {"create_time": created}, SENT, ON) is None


def test_an_entry_created_after_it_was_read_is_unclear() -> None:
    """Its time must be in another zone, or have the zone's offset added twice."""
    assert unclear(COMMAND, LISTED | {"create_time": "2026-08-06 20:00:01"}, SENT, ON) == ("create_time",)


def test_an_entry_may_be_created_in_the_afternoon_by_a_clock_of_twelve_hours() -> None:
    doubt = DoubtWindow(TRIED_AT + timedelta(hours=3), DOUBT.until + timedelta(hours=3))
    found = find(COMMAND, LISTED | {"create_time": "2026-08-05 03:00:01"}, SENT, ON, doubt)
    assert found is not None
    assert found.unclear == ("create_time",)


@pytest.mark.parametrize("field", ["expired_time", "valid_time"])
@pytest.mark.parametrize(
    ("wanted", "shown"),
    [
        ("18:30:25", "18:30:00"), ("18:30:25", "00:00:00"), ("18:30:25", "10:30:25"), ("18:30:25", "10:30:00"),
        ("18:30:25", None),
    ],
)  # fmt: skip
def test_a_time_that_was_truncated_or_is_in_utc_or_has_no_value_is_an_unclear_field(
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
def test_an_entry_whose_listed_time_was_truncated_or_is_in_utc_is_a_candidate(shown: str) -> None:
    command, sent = COMMAND | {"expired_time": "2026-08-06T18:30:25"}, SENT | {"expired_time": "2026-08-06T18:30:25"}
    assert find(command, LISTED | {"expired_time": shown}, sent, ON) is not None


def test_one_certain_difference_outweighs_every_unclear_field() -> None:
    assert find(COMMAND, {"type": "WRITE"}, {}, None) is None
    assert find(COMMAND, {"create_time": "2026-08-05 11:00:00"}, {}, None) is None
    assert find(COMMAND, {"expired_time": "2026-08-06 08:00:01"}, {}, None) is None
    assert find(COMMAND, {}, {"res_id": 1}, None) is None


def test_a_creation_time_with_an_offset_matches_in_either_reading() -> None:
    for created in ("2026-08-05 12:00:01+08:00", "2026-08-05T12:00:01Z", "2026-08-05T04:00:01Z"):
        found = find(COMMAND, LISTED | {"create_time": created}, SENT, ON)
        assert found == Candidate("u", is_within_clock_skew=True, valid_time_omitted=False)


def test_a_match_that_needs_a_large_clock_skew_is_marked() -> None:
    second = timedelta(seconds=1)
    for bound, outwards in ((TRIED_AT, -1), (DOUBT.until, 1)):
        assert WINDOW.is_within(bound + outwards * USUAL_SKEW, USUAL_SKEW)
        assert not WINDOW.is_within(bound + outwards * (USUAL_SKEW + second), USUAL_SKEW)
        assert WINDOW.is_within(bound + outwards * MAX_SKEW, MAX_SKEW)
        assert not WINDOW.is_within(bound + outwards * (MAX_SKEW + second), MAX_SKEW)
    far = find(COMMAND, LISTED | {"create_time": "2026-08-05 12:00:30"}, SENT, {"args": "on"})
    assert far == Candidate("u", is_within_clock_skew=False, valid_time_omitted=False)


@pytest.mark.parametrize(("ahead_s", "behind_s"), [(600, 0), (0, 600), (600, 600)])
def test_a_known_clock_skew_widens_the_window(ahead_s: float, behind_s: float) -> None:
    window = Window(DOUBT.since, DOUBT.until, DOUBT.until, ahead_s, behind_s)
    assert window.is_within(TRIED_AT, USUAL_SKEW)  # the entry may have been written by a machine with another clock
    assert window.is_within(TRIED_AT + timedelta(seconds=600), USUAL_SKEW) == bool(ahead_s)
    assert window.is_within(TRIED_AT - timedelta(seconds=600), USUAL_SKEW) == bool(behind_s)


def test_a_window_without_a_beginning_contains_any_earlier_time() -> None:
    assert find(
        COMMAND, LISTED | {"create_time": "2026-08-01 00:00:00"}, SENT, {"args": "on"}, DoubtWindow(None, TRIED_AT)
    )


def page(total: int, *uuids: str) -> HistoryPage:
    return HistoryPage.model_validate({"total_count": total, "items": [LISTED | {"cmd_uuid": uuid} for uuid in uuids]})


def test_a_history_is_complete_when_all_pages_were_added() -> None:
    pages = HistoryPages()
    found = pages.add(page(3, "a", "b"))
    assert not pages.is_complete
    found += pages.add(page(4, "b", "c"))  # one more entry was cached meanwhile
    assert not pages.is_complete
    found += pages.add(page(4, "d"))
    assert pages.is_complete
    assert [item.cmd_uuid for item in found] == ["a", "b", "c", "d"]


@pytest.mark.parametrize("last", [(), ("a",)])
def test_a_page_without_a_new_entry_while_some_are_missing_makes_the_history_unreadable(last: tuple[str, ...]) -> None:
    pages = HistoryPages()
    pages.add(page(2, "a"))
    with pytest.raises(HistoryUnreadable):
        pages.add(page(2, *last))


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"errno": 7, "error": "busy"}', '{"errno": 0}', '{"errno": 0, "data": {"items": []}}',
     '{"errno": 0, "data": {"total_count": -1, "items": []}}'],
)  # fmt: skip
def test_a_response_of_another_form_makes_the_history_unreadable(text: str) -> None:
    for read in (read_page, read_detail):
        with pytest.raises(HistoryUnreadable):
            read(text.encode())


@pytest.mark.parametrize(
    "data",
    ['"data":{"total_count":1,"items":[{ENTRY}],"total_count":0,"items":[]}',
     '"data":{NOTHING},"data":{"total_count":1,"items":[{ENTRY}]}', '"data":{ENTRY},"data":{NOTHING}',
     '"data":{NOTHING},"Data":{"total_count":1,"items":[{ENTRY}]}', '"data":{NOTHING,"Items":[{ENTRY}]}',
     '"data":{NOTHING},"errno":0', '"data":{"total_count":1,"items":[{ENTRY,"type":"READ"}]}',
     '"data":{"total_count":1,"items":[{ENTRY,"create_time":"2026-08-01 00:00:00"}]}',
     '"data":{"total_count":1,"items":[{ENTRY,"more":[{"a":1,"A":1}]}]}'],
)  # fmt: skip
def test_a_page_with_a_name_twice_is_unreadable(data: str) -> None:
    """One parser reads the entry, and another none, or one that is another command's."""
    data = data.replace("ENTRY", json.dumps(LISTED)[1:-1]).replace("NOTHING", '"total_count":0,"items":[]')
    with pytest.raises(HistoryUnreadable, match="a name twice") as caught:
        read_page(f'{{"errno":0,{data}}}'.encode())
    assert not caught.value.is_outage  # other devices' histories can be read


@pytest.mark.parametrize(
    "text",
    ['{"args":{"res_id":"5850","res_id":"1"},"content":{}}', '{"args":{"res_id":"5850"},"content":{},"args":{}}',
     '{"args":{},"content":{"args":"on"},"content":{"args":"off"}}',
     '{"args":{},"content":{"args":"on","args":"off"}}'],
)  # fmt: skip
def test_details_with_a_name_twice_are_unreadable(text: str) -> None:
    with pytest.raises(HistoryUnreadable, match="a name twice"):
        read_detail(b'{"errno":0,"data":%b}' % text.encode())


@pytest.mark.parametrize(
    "more",
    [{"list": [LISTED]}, {"entries": {"list": [LISTED]}}, {"rows": {"0": {"of": [7]}}}, {"item": LISTED},
     {"item": without(LISTED, "cmd_uuid")}, {"last": {"cmd_uuid": "u"}}, {"list": json.dumps([LISTED])},
     {"list": [None]}],
    ids=str,
)  # fmt: skip
def test_a_page_that_may_have_entries_in_an_unknown_field_is_unreadable(more: dict[str, Any]) -> None:
    empty = {"total_count": 0, "items": []}
    with pytest.raises(HistoryUnreadable):
        read_page(response(empty | more))
    with pytest.raises(HistoryUnreadable, match="beside its content"):
        read_page(json.dumps({"errno": 0, "error": "succ", "data": empty} | more).encode())


def test_an_unknown_field_of_a_page_that_can_have_no_entries_is_ignored() -> None:
    """Platforms add fields."""
    more = {"page": 1, "per_page": 100, "trace": "t", "list": [], "paging": {"next": None, "sort": "ASC"}, "more": None}
    body = json.dumps({"errno": 0, "data": {"total_count": 0, "items": []} | more, "request_id": "r"} | more)
    assert read_page(body.encode()) == HistoryPage(total_count=0)


@pytest.mark.parametrize("count", [1, "1", "x", [], False], ids=repr)
def test_a_page_with_two_totals_is_unreadable(count: object) -> None:
    with pytest.raises(HistoryUnreadable):
        read_page(response({"total_count": 0, "count": count, "items": []}))
    assert read_page(response({"total_count": 2, "count": "2", "items": []})).total_count == 2
    assert read_page(response({"total_count": 2, "count": None, "items": []})).total_count == 2


@pytest.mark.parametrize(
    ("args", "content"),
    [("on", '{"args":"on","args":"off"}'), ("on", '{"args":"off","args":"on"}'),
     ("on", {"args": '{"args":"on","args":"off"}'}), ('{"a":1}', {"args": '{"a":1,"a":2}'}),
     ('{"a":1,"a":2}', {"args": {"a": 1}}), ('{"a":1,"a":2}', {"args": '{"a":2}'})],
    ids=repr,
)  # fmt: skip
def test_args_with_a_name_twice_are_unclear(args: str, content: object) -> None:
    assert unclear(COMMAND | {"args": args}, LISTED, SENT, content) == ("args",)


def test_numbers_in_a_page_may_be_strings() -> None:
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
def test_every_spelling_of_absence_matches_a_field_that_was_not_sent(
    listed: dict[str, Any], sent: dict[str, Any]
) -> None:
    found = find(PLAIN, PLAIN_LISTED | listed, PLAIN_SENT | sent, ON)
    assert found == Candidate("u", is_within_clock_skew=True, valid_time_omitted=False)


@pytest.mark.parametrize("valid_time", ["2026-08-05T20:00:00", "2026-08-05T12:00:07"])
def test_a_valid_time_that_the_platform_cannot_have_filled_in_is_another_command(valid_time: str) -> None:
    assert find(PLAIN, PLAIN_LISTED, PLAIN_SENT | {"valid_time": valid_time}, ON) is None


@pytest.mark.parametrize(
    ("field", "listed", "sent"),
    [
        ("retry", {}, {"retry": 0}), ("timeout", {}, {"timeout": 24}), ("trigger_msg", {}, {"trigger_msg": 1}),
        ("trigger_msg", {"trigger_msg": 6}, {}), ("valid_time", {}, {"valid_time": "2026-08-05T12:00:02"}),
    ],
    ids=str,
)  # fmt: skip
def test_an_undocumented_default_is_an_unclear_field(field: str, listed: dict[str, Any], sent: dict[str, Any]) -> None:
    assert unclear(PLAIN, PLAIN_LISTED | listed, PLAIN_SENT | sent, ON) == (field,)


@pytest.mark.parametrize("sent", [{}, {"retry": "3", "timeout": "25"}])
def test_a_default_that_was_sent_matches_absence_and_the_default(sent: dict[str, Any]) -> None:
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
def test_the_args_in_the_content_are_compared_as_text_or_object(args: str | None, content: object, is_it: bool) -> None:
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
def test_a_valid_time_is_reported_as_omitted_only_if_it_can_have_been_in_the_past(
    valid_time: str, shown: str | None, is_omitted: bool | None
) -> None:
    """The worker omits a valid_time in the past, and the platform then fills in the time of caching."""
    sent = PLAIN_SENT | {"valid_time": shown and f"2026-08-05T{shown}"}
    found = find(PLAIN | {"valid_time": f"2026-08-05T{valid_time}"}, PLAIN_LISTED, sent, ON)
    assert (found and found.valid_time_omitted) == is_omitted


@pytest.mark.parametrize(
    ("time", "is_within_clock_skew"),
    [("11:58:59", None), ("11:59:00", False), ("11:59:54", False), ("11:59:55", True), ("12:00:02", True),
     ("12:00:07", True), ("12:00:08", False), ("12:01:02", False), ("12:01:03", None)],
)  # fmt: skip
def test_an_entry_is_within_clock_skew_only_close_to_the_window(time: str, is_within_clock_skew: bool | None) -> None:
    found = find(COMMAND, LISTED | {"create_time": f"2026-08-05 {time}"}, SENT, ON)
    assert (found and found.is_within_clock_skew) == is_within_clock_skew


@pytest.mark.parametrize(
    ("since", "order"), [(TRIED_AT, ["2", "1", "0"]), (None, ["0", "1", "2"])], ids=["beginning", "no-beginning"]
)
def test_candidates_are_sorted_by_distance_from_the_window(since: datetime | None, order: list[str]) -> None:
    """A request is cached soon after it was sent; without a beginning only the end of the window is known."""
    wanted = read_command(json.dumps(COMMAND).encode(), None, CHINA)
    times = ("12:00:12", "12:00:07", "12:00:02")
    items = [
        HistoryItem(**LISTED | {"cmd_uuid": str(number), "create_time": f"2026-08-05 {time}"})
        for number, time in enumerate(times)
    ]
    window = Window(since, TRIED_AT + timedelta(seconds=13), read_at=TRIED_AT)
    assert [item.cmd_uuid for item in candidates(items, wanted, window, CHINA)] == order


def test_an_entry_of_another_type_is_never_a_candidate() -> None:
    assert find(COMMAND, LISTED | {"type": "READ", "create_time": "yesterday"}, SENT, ON) is None


def test_an_entry_that_is_twice_on_a_page_counts_once() -> None:
    pages = HistoryPages()
    pages.add(page(2, "a", "a"))
    assert not pages.is_complete


def test_a_shrinking_total_does_not_hide_a_missing_entry() -> None:
    pages = HistoryPages()
    pages.add(page(3, "a", "b"))
    with pytest.raises(HistoryUnreadable, match="only 2 of 3"):
        pages.add(page(2))


def test_an_empty_history_is_complete() -> None:
    pages = HistoryPages()
    pages.add(page(0))
    assert pages.is_complete


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
def test_a_malformed_body_is_never_an_empty_history(body: bytes) -> None:
    for read in (read_page, read_detail):
        with pytest.raises(HistoryUnreadable):
            read(body)


def response(data: object) -> bytes:
    return json.dumps({"errno": 0, "data": data}).encode()


UNUSABLE_UUIDS: list[Any] = [None, "", " ", [], 1.5, "a\nb", "a b", "\u5f00", "u" * 65]


@pytest.mark.parametrize("entry", [{}, None, "x", 5, [], *({"cmd_uuid": uuid} for uuid in UNUSABLE_UUIDS)])
def test_an_entry_without_a_usable_uuid_is_a_candidate(entry: object) -> None:
    """It may be the command, and no record can tell its owner."""
    pages = HistoryPages()
    found = pages.add(read_page(response({"total_count": 3, "items": [entry, entry, LISTED]})))
    assert pages.is_complete
    assert [item.cmd_uuid for item in found] == ["", "", "u"]
    wanted = read_command(json.dumps(COMMAND).encode(), None, CHINA)
    assert len(candidates(found, wanted, WINDOW, CHINA)) == 3


def test_an_entry_without_a_uuid_that_certainly_differs_is_no_candidate() -> None:
    assert find(COMMAND, without(LISTED, "cmd_uuid") | {"type": "READ"}, {}, None) is None
    assert find(COMMAND, without(LISTED, "cmd_uuid") | {"create_time": "2026-08-04 12:00:00"}, {}, None) is None


def test_a_repeated_page_of_entries_without_uuids_has_no_new_entry() -> None:
    pages = HistoryPages()
    pages.add(read_page(response({"total_count": 4, "items": [None, None]})))
    with pytest.raises(HistoryUnreadable, match="only 2 of 4"):
        pages.add(read_page(response({"total_count": 4, "items": [None, None]})))


@pytest.mark.parametrize(
    "total", [{"total_count": n} for n in (3, "3", 3.0, "3.0", " 3 ")] + [{"count": 3}, {"count": "3"}]
)
def test_the_total_is_read_in_several_spellings(total: dict[str, Any]) -> None:
    assert read_page(response(total | {"items": []})).total_count == 3


@pytest.mark.parametrize("items", [{}, {"items": None}, {"items": []}])
def test_an_empty_history_may_lack_the_field_items(items: dict[str, Any]) -> None:
    pages = HistoryPages()
    pages.add(read_page(response({"total_count": 0} | items)))
    assert pages.is_complete
    with pytest.raises(HistoryUnreadable, match="only 0 of 1"):
        HistoryPages().add(read_page(response({"total_count": 1} | items)))


@pytest.mark.parametrize("total", [None, True, -1, "x", 1.5, [], {}, "NaN"], ids=repr)
def test_a_total_that_is_not_a_number_makes_the_history_unreadable(total: object) -> None:
    with pytest.raises(HistoryUnreadable):
        read_page(response({"total_count": total, "items": []}))


@pytest.mark.parametrize("args", [None, [], "imei=1", 5], ids=repr)
def test_details_whose_args_are_not_an_object_have_no_args(args: object) -> None:
    assert read_detail(response({"args": args, "content": ON})).args == {}


def test_a_lone_surrogate_does_not_make_a_response_unreadable() -> None:
    """A serializer leaves one when it truncates a text within an emoji."""
    body = rb'{"errno":0,"data":{"args":{},"content":{"args":"on \ud83d","pair":"\ud83d\ude00","text":"\\ud83d"}}}'
    assert read_detail(body).content == {"args": "on \ufffd", "pair": "\U0001f600", "text": "\\ud83d"}


def test_an_entry_cached_after_its_valid_time_is_still_the_command() -> None:
    """The platform may be slow: the valid_time in the history is the one that was sent."""
    late = COMMAND | {"valid_time": "2026-08-05T12:00:03"}
    listed = LISTED | {"create_time": "2026-08-05 12:00:04"}
    assert find(late, listed, SENT | {"valid_time": "2026-08-05T12:00:03"}, {"args": "on"}) is not None


@pytest.mark.parametrize("nothing", [None, ""])
def test_a_trigger_msg_missing_in_the_details_is_taken_from_the_list(nothing: str | None) -> None:
    assert find(COMMAND, LISTED, SENT | {"trigger_msg": nothing}, {"args": "on"}) is not None
    assert find(COMMAND, LISTED | {"trigger_msg": 7}, SENT | {"trigger_msg": nothing}, {"args": "on"}) is None


def a_page(first: int, count: int, total: int) -> HistoryPage:
    items = [{"cmd_uuid": f"u{number}"} for number in range(first, first + count)]
    return HistoryPage.model_validate({"total_count": total, "items": items})


@pytest.mark.parametrize("total", [0, 1, 29])
def test_a_page_with_more_entries_than_the_total_makes_the_history_unreadable(total: int) -> None:
    """An inconsistent page may lack entries, and would prove a cached command absent."""
    with pytest.raises(HistoryUnreadable, match=f"30 of {total}"):
        HistoryPages().add(a_page(0, 30, total))


def test_a_history_is_not_complete_after_a_full_page_whatever_the_total() -> None:
    """A platform may report the number of entries on the page as the total."""
    pages = HistoryPages()
    found = pages.add(a_page(0, PER_PAGE, PER_PAGE))
    assert not pages.is_complete
    found += pages.add(a_page(PER_PAGE, 50, 50))
    assert pages.is_complete
    assert len(found) == PER_PAGE + 50


@pytest.mark.parametrize("second", [a_page(0, 0, PER_PAGE), a_page(0, PER_PAGE, PER_PAGE)], ids=["empty", "the same"])
def test_a_page_without_a_new_entry_completes_the_history(second: HistoryPage) -> None:
    pages = HistoryPages()
    pages.add(a_page(0, PER_PAGE, PER_PAGE))
    pages.add(second)
    assert pages.is_complete


def test_a_page_of_v2_has_code_and_msg() -> None:
    body = json.dumps({"code": 0, "msg": "succ", "data": {"total_count": 1, "items": [LISTED]}, "request_id": "r"})
    assert len(history.read_page(Response(200, {}, body.encode()), V2).items) == 1


@pytest.mark.parametrize("code", [0, 10403])
def test_a_history_of_the_other_generation_names_the_setting(code: int) -> None:
    """If that happens to several devices in a row, the product's history is paused."""
    body = json.dumps({"code": code, "msg": "succ", "data": {"total_count": 0, "items": []}}).encode()
    with pytest.raises(HistoryUnreadable, match=r"^ONENET_API: the platform answers as v2") as caught:
        read_page(body)
    assert caught.value.is_refused


def test_an_unreadable_history_says_what_came() -> None:
    with pytest.raises(HistoryUnreadable, match=r"HTTP 200, text/html: <html>$"):
        history.read_page(Response(200, {b"content-type": b"text/html"}, b"<html>"), V1)


SOON, PAST = TRIED_AT + timedelta(minutes=5), TRIED_AT - timedelta(minutes=5)


@pytest.mark.parametrize(
    ("send_status", "expires_at", "waits"),
    [(1, SOON, True), ("1", SOON, True), (1.0, SOON, True), (3, SOON, True), (7, SOON, True), (8, SOON, True),
     (None, SOON, True), ("?", SOON, True), (2, SOON, False), ("4", SOON, False), (5, SOON, False), (6.0, SOON, False),
     (1, PAST, True), (3, PAST, False), ("?", PAST, False), (1, None, True)],
)  # fmt: skip
def test_an_entry_may_wait_for_its_device_until_its_state_is_final_or_it_has_expired(
    send_status: object, expires_at: datetime | None, waits: bool
) -> None:
    """A state of an unknown form is not final: the command rests rather than that it is rejected."""
    expired_time = None if expires_at is None else f"{expires_at.astimezone(CHINA):%Y-%m-%d %H:%M:%S}"
    assert is_waiting(HistoryItem(send_status=send_status, expired_time=expired_time), TRIED_AT, CHINA) is waits
