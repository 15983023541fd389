"""Parsing of commands: which values are valid, and which error each invalid one causes."""

import json
import sys
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, cast
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.builders import a_command
from worker.cli.contracts import command_schema
from worker.core.command import CONTENT_FIELDS, MAX_PRODUCT_CHARS, Command, differing_fields
from worker.core.parsing import read_command
from worker.errors import InvalidCommand, InvalidMessage, UnusableCommand

CHINA = ZoneInfo("Asia/Shanghai")

NO_VALUE = "a value is expected: text in double quotes, a number, an object or a list"
TRAILING_COMMA = (
    "column 11: a comma is too much before a closing bracket"
    if sys.version_info >= (3, 13)
    else 'column 12: a name in double quotes, or }, is expected: "name": …'
)


def read(message_id: object = None, **changes: Any) -> Any:
    return read_command(json.dumps(a_command(**changes)).encode(), message_id, CHINA)


@pytest.mark.parametrize(
    "changes",
    [
        {"command_id": "a"},
        {"command_id": "A0._:-" * 21 + "zz"},
        {"obj_id": 0, "obj_inst_id": 65535, "res_id": 65535},
        {"retry": 0},
        {"retry": 10},
        {"timeout": 5},
        {"timeout": 40},
        {"trigger_msg": 1},
        {"trigger_msg": 7},
        {"args": ""},
        {"args": "x" * 2048},
        {"args": "开" * 682},
        {"product": "heating"},
    ],
    ids=str,
)
def test_valid_values_are_parsed_unchanged(changes: dict[str, Any]) -> None:
    command = read(**changes)
    assert {name: getattr(command, name) for name in changes} == changes


@pytest.mark.parametrize(
    ("names", "bits"),
    [
        (["REGISTER"], 1),
        (["UPDATE"], 2),
        (["NOTIFY"], 4),
        (["NOTIFY", "REGISTER"], 5),
        (["REGISTER", "UPDATE", "NOTIFY"], 7),
    ],
)
def test_trigger_names_are_summed(names: list[str], bits: int) -> None:
    assert read(trigger_msg=names).trigger_msg == bits


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("command_id", value) for value in ("", "a b", "é", "x" * 129, "a\n", 7)),
        *(("imei", value) for value in ("042", "00042", "4a42", "0042\n", 4242)),
        *(("imei", value) for value in ("86582003000000", "8658200300000001", "86582003000000a", 865820030000001, "")),
        *((name, value) for name in ("obj_id", "obj_inst_id", "res_id") for value in (-1, 65536, "1", True, 1.0, 1.5)),
        *(("expired_time", value) for value in ("", "2099-01-01", "2099-01-01 00:00:00", "2099-02-30T00:00:00", 1)),
        *(("expired_time", value) for value in ("2099-01-01T00:00:00,5", "2099-01-01T24:00:00")),
        *(("expired_time", value) for value in ("2099-01-01T00:00:00z", "2099-01-01T00:00:00+24:00")),
        *(("expired_time", value) for value in ("0001-01-01T00:00:00Z", "9999-12-31T23:59:59-12:00")),
        ("valid_time", "soon"),
        ("valid_time", []),
        *(("retry", value) for value in (-1, 11, "3", False, 10**30)),
        *(("timeout", value) for value in (4, 41, "25", 25.0)),
        *(("trigger_msg", value) for value in (0, 8, "UPDATE", [], ["OTHER"], ["UPDATE", "UPDATE"], [1], [["UPDATE"]])),
        *(("args", value) for value in ("x" * 2049, "开" * 683, 1, ["on"], "\ud800")),
        *(("product", value) for value in (1, "\udfff")),
        ("colour", "red"),
    ],
    ids=lambda value: repr(value)[:30],
)  # fmt: skip
def test_an_invalid_value_is_reported_with_its_field(field: str, value: object) -> None:
    with pytest.raises(InvalidCommand) as caught:
        read(**{field: value})
    assert [detail.field for detail in caught.value.details] == [field]
    assert field in caught.value.message


FROM_0_TO_65535 = "must be a whole number from 0 to 65535"
TRIGGER = "must be a whole number from 1 to 7, or a list of REGISTER, UPDATE and NOTIFY, each at most once"
A_TIME = "must be a time such as 2026-11-30T08:00:00, 2026-11-30T08:00:00Z or 2026-11-30T08:00:00+08:00"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("imei", 865820030000001, "must be a string of 15 digits, or 4, not a number"),
        ("imei", "86582003", "must be a string of 15 digits, or 4"),
        ("obj_id", -1, FROM_0_TO_65535),
        ("obj_inst_id", "0", f"{FROM_0_TO_65535}, not a string"),
        ("res_id", 1.0, f"{FROM_0_TO_65535}, not a number with a fraction or an exponent"),
        ("retry", 11, "must be a whole number from 0 to 10"),
        ("retry", True, "must be a whole number from 0 to 10, not true or false"),
        ("retry", None, "must be a whole number from 0 to 10, not null"),
        ("timeout", 41, "must be a whole number from 5 to 40 (seconds)"),
        ("trigger_msg", 8, TRIGGER),
        ("trigger_msg", {}, f"{TRIGGER}, not an object"),
        ("trigger_msg", [], TRIGGER),
        ("trigger_msg", ["OTHER", 1, ["UPDATE"]], TRIGGER),
        ("trigger_msg", ["UPDATE"] * 4, TRIGGER),
        ("trigger_msg", ["UPDATE"] * 2, "must not name a message twice"),
        ("args", ["on"], "must be a string of at most 2048 bytes in UTF-8, not a list"),
        ("args", "x" * 2049, "must be a string of at most 2048 bytes in UTF-8"),
        ("args", "\ud800", "must not contain a lone surrogate: UTF-8 cannot encode it"),
        ("product", 1, "must be a string, not a number"),
        ("command_id", "a b", "must be a string of 1-128 of A-Za-z0-9._:-"),
        ("expired_time", "soon", f"{A_TIME}, not 'soon'"),
        ("expired_time", "\u202e\n\ud800" + "x" * 99, f"{A_TIME}, not '\\u202e\\n\\ud800{'x' * 37}'"),
        ("expired_time", 1, A_TIME),
        ("expired_time", "2099-02-30T00:00:00", "there is no such time: 2099-02-30T00:00:00"),
        ("colour", "red", "is not a field of a command"),
    ],
    ids=lambda value: repr(value)[:30],
)  # fmt: skip
def test_an_error_says_what_a_field_must_be(field: str, value: object, message: str) -> None:
    """In words of this project: those of the libraries are for programmers, and change with their versions."""
    with pytest.raises(InvalidCommand) as caught:
        read_command(json.dumps({**a_command(), field: value}).encode(), None, CHINA)
    assert [(detail.field, detail.message) for detail in caught.value.details] == [(field, message)]


def test_the_limits_in_errors_are_those_of_the_schema() -> None:
    fields = command_schema()["properties"]
    for name in ("obj_id", "obj_inst_id", "res_id", "retry", "timeout"):
        with pytest.raises(InvalidCommand) as caught:
            read(**{name: -1})
        assert f"from {fields[name]['minimum']} to {fields[name]['maximum']}" in caught.value.message


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body is empty"),
        (b" \n", "the body is empty"),
        (b"\xef\xbb\xbf{}", "the body is not JSON: it begins with a byte order mark"),
        (b"{'imei': 1}", 'the body is not JSON: column 2: a name in double quotes, or }, is expected: "name": …'),
        (b'{"imei": 1,}', f"the body is not JSON: {TRAILING_COMMA}"),
        (b'{"imei" 1}', "the body is not JSON: column 9: a colon is missing between a name and its value"),
        (b'{"imei": 1 "args": 2}', "the body is not JSON: column 12: a comma or a closing bracket is missing"),
        (b'{"imei": "1', "the body is not JSON: column 10: the text that begins here does not end"),
        (b'{"args": "\\q"}', "the body is not JSON: column 11: a backslash that begins nothing: write \\\\"),
        (b'{"args": "\\u12"}', "the body is not JSON: column 12: a backslash that begins nothing: write \\\\"),
        (b'{"args": "\t"}', "the body is not JSON: column 11: a line break or control character in a text: write \\n"),
        (b"{} {}", "the body is not JSON: column 4: something follows after the end"),
        (b'{\n  "imei": None\n}', f"the body is not JSON: line 2, column 11: {NO_VALUE}"),
        (b"\xff", "the body is not UTF-8: byte 1"),
        (b"[]", "the body is not a JSON object"),
    ],
    ids=repr,
)  # fmt: skip
def test_a_body_that_is_not_json_is_reported_with_the_place_and_no_class_name(body: bytes, message: str) -> None:
    with pytest.raises(InvalidMessage) as caught:
        read_command(body, None, CHINA)
    assert caught.value.message == message


def test_times_in_the_wrong_order_are_shown_as_they_were_understood() -> None:
    with pytest.raises(InvalidCommand) as caught:
        read(valid_time="2099-01-01T00:00:00.5Z", expired_time="2099-01-01T08:00:00.9")
    assert caught.value.message == (
        "expired_time: must be later than valid_time: it was read as 2099-01-01 08:00:00 +08:00 (ONENET_TIMEZONE "
        "Asia/Shanghai), and valid_time as 2099-01-01 00:00:00 +00:00"
    )


@pytest.mark.parametrize(
    "field", sorted(a_command(args="", product="", retry=1, timeout=5, trigger_msg=1, valid_time="x"))
)
def test_null_is_invalid_in_every_field(field: str) -> None:
    with pytest.raises(InvalidCommand) as caught:
        read_command(json.dumps({**a_command(), field: None}).encode(), None, CHINA)
    assert field in [detail.field for detail in caught.value.details]


def test_all_invalid_fields_are_reported_at_once() -> None:
    with pytest.raises(InvalidCommand) as caught:
        read_command(b'{"retry": 11, "colour": 1}', None, CHINA)
    assert {detail.field for detail in caught.value.details} == {
        "command_id", "imei", "obj_id", "obj_inst_id", "res_id", "expired_time", "retry", "colour",
    }  # fmt: skip


def test_expired_time_must_be_later_than_valid_time() -> None:
    """They are compared as instants: 08:00 in China is midnight UTC."""
    with pytest.raises(InvalidCommand) as caught:
        read(valid_time="2099-01-01T00:00:00Z", expired_time="2099-01-01T08:00:00")
    assert caught.value.details[0].field == "expired_time"
    assert read(valid_time="2099-01-01T00:00:00Z", expired_time="2099-01-01T08:00:01").valid_at == datetime(
        2099, 1, 1, tzinfo=UTC
    )


class TestCommandId:
    def test_command_id_is_read_from_the_body_or_the_message_id_property(self) -> None:
        assert read(command_id="a").command_id == "a"
        assert read("b", command_id=None).command_id == "b"
        assert read("c", command_id="c").command_id == "c"

    @pytest.mark.parametrize(
        ("in_body", "in_property", "known"),
        [("a", "b", "a"), (None, None, None), (None, "not an id", None), ("a", "not an id", "a"), ("a", b"\xff", "a")],
    )
    def test_a_missing_invalid_or_contradictory_command_id_is_an_invalid_command(
        self, in_body: str | None, in_property: object, known: str | None
    ) -> None:
        with pytest.raises(InvalidCommand) as caught:
            read(in_property, command_id=in_body)
        assert [detail.field for detail in caught.value.details] == ["command_id"]
        assert caught.value.command_id == known

    def test_every_parsing_error_carries_the_command_id_if_it_is_known(self) -> None:
        with pytest.raises(UnusableCommand) as caught:
            read(command_id="a", retry=11)
        assert caught.value.command_id == "a"
        with pytest.raises(UnusableCommand) as caught:
            read_command(b"no json", "b", CHINA)
        assert caught.value.command_id == "b"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b"", ""),
        (b"\xff", ""),
        (b"null", ""),
        (b"[]", ""),
        (b"{" * 40_000, ""),
        (b"[" * 60_000, ""),
        (b"1" * 6_000, ""),
        (b'{"a": 1} {"b": 2}', ""),
        (b'\xef\xbb\xbf{"a": 1}', ""),
        (b'{"imei": 1, "imei": 1}', "imei"),
        (b'{"args": {"deep": 1, "deep": 2}}', "deep"),
        (b'{"retry": NaN}', "retry"),
        (b'{"retry": -Infinity}', "retry"),
        (b'{"trigger_msg": [1, Infinity]}', "trigger_msg"),
        (b'"' + b"x" * 65_535 + b'"', ""),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_body_that_is_not_a_strict_json_object_is_an_invalid_message(body: bytes, field: str) -> None:
    with pytest.raises(InvalidMessage) as caught:
        read_command(body, None, CHINA)
    assert [detail.field for detail in caught.value.details] == [field]


def test_a_body_of_up_to_64_kib_is_parsed() -> None:
    body = json.dumps(a_command()).encode()
    assert read_command(body + b" " * (65_536 - len(body)), None, CHINA)
    with pytest.raises(InvalidMessage):
        read_command(body + b" " * (65_537 - len(body)), None, CHINA)


@given(st.binary(max_size=200), st.none() | st.text() | st.binary() | st.integers())
def test_arbitrary_bytes_raise_only_unusable_command(body: bytes, message_id: object) -> None:
    with pytest.raises(UnusableCommand):
        read_command(body, message_id, CHINA)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


names = st.sampled_from([*a_command(), "valid_time", "args", "retry", "trigger_msg"]) | st.text()


@given(st.dictionaries(names, anything))
def test_arbitrary_fields_raise_only_unusable_command(changes: dict[str, Any]) -> None:
    """The error fits into a reply: it can be encoded as UTF-8, and its size is bounded."""
    try:
        read_command(json.dumps({**a_command(), **changes}).encode(), None, CHINA)
    except UnusableCommand as exc:
        said = exc.message + "".join(detail.field + detail.message for detail in exc.details)
        assert len(said.encode()) < 20_000


def test_the_content_hash_does_not_depend_on_the_notation_of_the_command() -> None:
    form = a_command(command_id="a", expired_time="2099-01-01T08:00:00", trigger_msg=["UPDATE", "REGISTER"])
    same = dict(reversed((form | {"expired_time": "2099-01-01T00:00:00Z", "trigger_msg": 3}).items()))
    content_hash = read_command(json.dumps(form).encode(), None, CHINA).content_hash()
    with_fraction = form | {"expired_time": "2099-01-01T08:00:00.999"}
    assert read_command(json.dumps(with_fraction).encode(), None, CHINA).content_hash() == content_hash
    assert read_command(json.dumps(same, indent=1).encode(), "a", CHINA).content_hash() == content_hash
    others: list[dict[str, Any]] = [
        {"args": ""},
        {"res_id": 1},
        {"retry": 3},
        {"expired_time": "2099-01-01T00:00:01Z"},
        {"product": "x"},
    ]
    assert content_hash not in [
        read_command(json.dumps(form | other).encode(), None, CHINA).content_hash() for other in others
    ]


DIFFERENT: dict[str, Any] = {
    "imei": "865820030000002", "obj_id": 1, "obj_inst_id": 1, "res_id": 1, "expired_time": "2099-01-01T08:00:01",
    "valid_time": "2098-01-01T00:00:00", "retry": 3, "timeout": 25, "trigger_msg": 7, "args": "off", "product": "other",
}  # fmt: skip


def test_the_digests_tell_which_fields_differ() -> None:
    def command(**changes: Any) -> Command:
        return cast("Command", read(command_id="a", **{"expired_time": "2099-01-01T08:00:00", "args": "on", **changes}))

    assert set(DIFFERENT) == set(CONTENT_FIELDS)
    digests = command().field_digests()
    for name, value in DIFFERENT.items():
        assert differing_fields(digests, command(**{name: value}).field_digests()) == (name,)
    others = command(**DIFFERENT).field_digests()
    assert differing_fields(digests, others) == CONTENT_FIELDS
    assert differing_fields(digests, command(args=None).field_digests()) == ("args",)
    assert differing_fields(digests, command(expired_time="2099-01-01T00:00:00.25Z").field_digests()) == ()
    assert differing_fields(b"", digests) == differing_fields(digests, b"") == ()
    assert replace(command(), command_id="b").field_digests() != digests  # the same values under another id


@pytest.mark.parametrize("imei", ["0042", "9999"])
def test_test_devices_of_the_platform_have_four_digits(imei: str) -> None:
    assert read_command(json.dumps(a_command(imei=imei)).encode(), None, CHINA).imei == imei


def test_a_product_that_cannot_be_configured_is_not_kept() -> None:
    """It may be as long as a body, and take five times its bytes while the command waits for its device."""
    longest = "p" * MAX_PRODUCT_CHARS
    assert read(product=longest).product == longest
    one, other = (read(command_id="a", product="\U0001f600" * 5_000 + end) for end in "xy")
    for each in (one, other):
        assert MAX_PRODUCT_CHARS < len(each.product) < 200  # no product is called so
    assert one.content_hash() != other.content_hash()
    assert one.product == read(product="\U0001f600" * 5_000 + "x").product
