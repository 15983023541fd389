"""Values are compared, not spellings: a value in another spelling or in an unknown form is unclear."""

import base64
import html
import json
import time
import unicodedata
from collections.abc import Callable
from datetime import datetime
from typing import Any
from urllib.parse import quote, quote_plus
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.onenet import whole_number
from worker.onenet.comparison import (
    DIFFERENT,
    EQUAL,
    LWM2M_IDS,
    UNCLEAR,
    Verdict,
    compare_args,
    compare_content,
    compare_imei,
    compare_number,
    compare_parameter,
    compare_time,
    compare_type,
    compare_valid_time,
    overall,
    read_time,
)

CHINA = ZoneInfo("Asia/Shanghai")
IMEI = "865820030000001"
NAN, INFINITY = float("nan"), float("inf")
UNKNOWN: list[Any] = ["x", True, False, [], [3], {}, {"value": 3}, NAN, INFINITY, "1" * 5_000, "9e999999999", 10**4_000]


def in_order(verdicts: dict[Verdict, list[Any]]) -> list[tuple[Any, Verdict]]:
    return [(value, verdict) for verdict, values in verdicts.items() for value in values]


def test_one_certain_difference_makes_an_entry_another_command() -> None:
    assert overall([EQUAL, EQUAL]) is EQUAL
    assert overall([EQUAL, UNCLEAR]) is UNCLEAR
    assert overall([UNCLEAR, DIFFERENT, EQUAL]) is DIFFERENT


@pytest.mark.parametrize(
    ("shown", "verdict"),
    in_order({
        EQUAL: [3311, "3311", 3311.0, "3311.0", " 3311 ", "03311", "3.311E3", "3.311e+3", "+3311", 3.311e3],
        DIFFERENT: [3312, "3312", 3312.0, "3312.00", 0, "0", 65535],
        UNCLEAR: [*UNKNOWN, None, "", " ", -1, "-1", 65536, 3311.5, "3,311", "0xCEF", "3311x", "3311;", "\u4e09"],
    }),
    ids=lambda value: repr(value)[:40],
)  # fmt: skip
def test_a_number_is_compared_by_value(shown: object, verdict: Verdict) -> None:
    assert compare_number(3311, shown, LWM2M_IDS) is verdict


PARAMETERS: dict[int | None, dict[Verdict, list[Any]]] = {
    4: {EQUAL: [4, "4", 4.0, " 4"], DIFFERENT: [3, "5", 0, 10.0], UNCLEAR: [*UNKNOWN, None, "", -1, "-1", 11]},
    3: {EQUAL: [3, "3.0", None, "", " "], DIFFERENT: [4], UNCLEAR: [*UNKNOWN, -1]},
    None: {EQUAL: [3, "3", 3.0, None, ""], DIFFERENT: [], UNCLEAR: [*UNKNOWN, 0, 1, 10, -1]},
}


@pytest.mark.parametrize(
    ("sent", "shown", "verdict"),
    [(sent, shown, verdict) for sent, rows in PARAMETERS.items() for shown, verdict in in_order(rows)],
    ids=lambda value: repr(value)[:40],
)  # fmt: skip
def test_a_parameter_that_was_not_sent_equals_absence_and_the_default(
    sent: int | None, shown: object, verdict: Verdict
) -> None:
    """The platform's default may differ from the documented one, so another default proves nothing."""
    assert compare_parameter(sent, shown, range(11), 3) is verdict


@pytest.mark.parametrize(
    ("shown", "verdict"),
    in_order({
        EQUAL: [IMEI, int(IMEI), float(IMEI), f" {IMEI} ", f"0{IMEI}", f"{IMEI}.0", None, "", " "],
        DIFFERENT: ["865820030000002", 865820030000002, "1234", 1234],
        UNCLEAR: [*UNKNOWN, "86582003000000", "8658200****0001", 8.6582003e14, "8.6582003E14", -1, 0, "IMEI:" + IMEI],
    }),
    ids=lambda value: repr(value)[:40],
)  # fmt: skip
def test_an_imei_is_different_only_if_it_is_complete(shown: object, verdict: Verdict) -> None:
    assert compare_imei(IMEI, shown) is verdict


@pytest.mark.parametrize(
    ("shown", "verdict"),
    in_order({
        EQUAL: ["EXECUTE", "execute", " Execute\n", 2, "2", 2.0, "2.0"],
        DIFFERENT: ["READ", "write", 0, 1, "0", "1", 1.0],
        UNCLEAR: [*UNKNOWN, None, "", "EXEC", "3", 3, "EXECUTE_OFFLINE", -1],
    }),
    ids=lambda value: repr(value)[:40],
)  # fmt: skip
def test_a_type_is_compared_as_a_word_or_a_number(shown: object, verdict: Verdict) -> None:
    assert compare_type(shown) is verdict


@pytest.mark.parametrize(
    ("shown", "verdict"),
    in_order({
        EQUAL: [
            "2026-08-06T08:00:00", "2026-08-06 08:00:00", " 2026-08-06 08:00:00 ", "2026-08-06 08:00:00:999",
            "2026-08-06 08:00:00.000", "2026-08-06T08:00:00.000000000", "2026-08-06T08:00:00Z", "2026-08-06T00:00:00Z",
            "2026-08-06T08:00:00+08:00", "2026-08-06T00:00:00+0000", "2026-08-06 09:00:00 +09:00",
        ],
        DIFFERENT: [
            "2026-08-06T08:00:01", "2026-08-06 07:59:59.999", "2026-08-07 08:00:00", "2026-08-06 08:01",
            "2026-08-06T07:59", "2026-08-06T08:00:01Z", "2026-08-06T08:00:01+08:00",
        ],
        UNCLEAR: [
            *UNKNOWN, None, "", "2026-08-06 08:00", "2026-08-06T08:00", "2026-08-06T00:00Z", 1786176000, "1786176000",
            1786176000000, "2026-08-06", "2026/08/06 08:00:01", "20260806080001", "06.08.2026 08:00:01",
            "Thu Aug 06 08:00:01 CST 2026", "2026-02-30 00:00:00", "2026-08-06 25:00:00", "0001-01-01 00:00:00+23:00",
            "9999-12-31 23:59:59-23:00", "2026-08-06 08:00:01:", "soon",
        ],
    }),
    ids=lambda value: repr(value)[:40],
)  # fmt: skip
def test_a_time_is_compared_by_value_in_every_known_form(shown: object, verdict: Verdict) -> None:
    """The platform may have added an offset to local time, so a time with an offset has two readings."""
    assert compare_time(datetime.fromisoformat("2026-08-06T08:00:00"), shown, CHINA) is verdict


@pytest.mark.parametrize(
    ("sent", "may_be_omitted", "shown", "verdict"),
    [
        (None, False, None, EQUAL), (None, False, "", EQUAL), (None, False, "12:00:00", EQUAL),
        (None, False, "12:00:01:999", EQUAL), (None, False, "11:00:00", EQUAL), (None, False, "12:00:02", UNCLEAR),
        (None, False, "12:00:06", UNCLEAR), (None, False, "12:00:07", DIFFERENT), (None, False, "20:00:00", DIFFERENT),
        (None, False, "12:00", UNCLEAR), (None, False, "12:01", DIFFERENT), (None, False, "now", UNCLEAR),
        (None, False, "12:00:01Z", EQUAL), (None, False, 1786176000, UNCLEAR),
        ("20:00:00", False, "20:00:00", EQUAL), ("20:00:00", False, "20:00:01", DIFFERENT),
        ("20:00:00", False, "12:00:01", DIFFERENT), ("20:00:00", False, None, UNCLEAR),
        ("20:00:00", False, "20:00", UNCLEAR), ("20:00:00", False, "soon", UNCLEAR), ("20:00:00", False, [], UNCLEAR),
        ("12:00:01", True, "12:00:01", EQUAL), ("12:00:01", True, None, EQUAL), ("11:00:00", True, "12:00:01", EQUAL),
        ("11:00:00", True, "12:00:05", UNCLEAR), ("11:00:00", True, "20:00:00", DIFFERENT),
    ],
)  # fmt: skip
def test_a_valid_time_is_the_one_that_was_sent_or_one_that_the_platform_filled_in(
    sent: str | None, may_be_omitted: bool, shown: object, verdict: Verdict
) -> None:
    """One a few seconds after the creation may be either; the worker omits one in the past."""
    own = None if sent is None else datetime.fromisoformat(f"2026-08-05T{sent}")
    written = f"2026-08-05 {shown}" if isinstance(shown, str) and shown[:1].isdigit() else shown
    created = read_time("2026-08-05 12:00:01", CHINA)
    assert compare_valid_time(own, written, created, CHINA, may_be_omitted=may_be_omitted) is verdict


def test_a_valid_time_cannot_be_recognized_as_filled_in_without_a_creation_time() -> None:
    own = datetime.fromisoformat("2026-08-05T20:00:00")
    shown = "2026-08-05 12:00:01"
    assert compare_valid_time(None, shown, None, CHINA, may_be_omitted=False) is UNCLEAR
    assert compare_valid_time(own, shown, None, CHINA, may_be_omitted=True) is UNCLEAR
    assert compare_valid_time(own, shown, None, CHINA, may_be_omitted=False) is DIFFERENT


OPEN = '{"cmd": "open", "to": 1.50, "now": true, "by": null}'
LONG = "command " + "x" * 50 + " tail"


@pytest.mark.parametrize(
    ("sent", "shown"),
    [
        ("on", "on"), ("5", 5), ("", ""), (None, None), ("\U0001f600", "\U0001f600"), (OPEN, OPEN), ("null", "null"),
        (" on\r\n", " on\r\n"), ("a\x00b", "a\x00b"),
    ],
    ids=repr,
)  # fmt: skip
def test_identical_args_are_equal(sent: str | None, shown: object) -> None:
    assert compare_args(sent, shown) is EQUAL


@pytest.mark.parametrize(
    ("sent", "shown"),
    [
        ("on", "off"), ("on", "on1"), ("on", "on off"), ("1", "2"), ("12", "21"), ("-5", "5"), ("1.5", "15"),
        ("0100", "0101"),
        ("4", 5), ("4", 5.0), ("4", "5.0"), ("true", "false"), ("100%", "10%"), ("+", "on"), (None, "on"), ("", "on"),
        ("open-valve-12", "open-valve-1"), ("68AA00FF16", "68AA01FF17"),
        (LONG + "1", LONG + "2"),
        ("\u5f00\u706f", "\u5173\u706f"), ("\u6e29\u5ea625", "\u6e29\u5ea626"), ("\u5f00 1", "\u5173 2"),
        ('{"cmd":"open"}', '{"cmd":"close"}'), ('{"cmd":"open"}', {"cmd": "close"}), ("[1,2]", [1, 3]),
        ('{"1":0,"2":1}', '{"1":1,"2":0}'), ('{"1":0,"2":1}', {"1": 1, "2": 0}), ('{"a":true}', {"a": False}),
        ('{"cmd":"set","of":"living-room","to":10}', '{"cmd":"set","of":"living-room","to":1}'),
        ('{"cmd":"set","of":"living-room","to":10}', "{&quot;cmd&quot;:&quot;set&quot;}"),
    ],
    ids=repr,
)  # fmt: skip
def test_other_args_are_certainly_different(sent: str | None, shown: object) -> None:
    """Otherwise the history of a device with several commands could never decide."""
    assert compare_args(sent, shown) is DIFFERENT
    assert compare_content(sent, {"args": shown}) is DIFFERENT
    assert compare_content(sent, json.dumps({"args": shown})) is DIFFERENT


def garbled(written: str, read: str, errors: str = "replace") -> Callable[[str], str]:
    return lambda text: text.encode(written, errors).decode(read, errors)


def without(is_lost: Callable[[str], bool], instead: str = "") -> Callable[[str], str]:
    return lambda text: "".join(instead if is_lost(character) else character for character in text)


SPELLINGS: dict[str, Callable[[str], Any]] = {
    "trimmed": str.strip,
    "trimmed at the end": str.rstrip,
    "blanks collapsed": lambda text: " ".join(text.split()),
    "blanks removed": lambda text: "".join(text.split()),
    "line ends of Windows": lambda text: text.replace("\n", "\r\n"),
    "upper case": str.upper,
    "lower case": str.lower,
    "title case": str.title,
    "escaped for HTML": html.escape,
    "escaped for HTML twice": lambda text: html.escape(html.escape(text)),
    "escaped for JSON": lambda text: json.dumps(text)[1:-1],
    "escaped for JSON twice": lambda text: json.dumps(json.dumps(text)[1:-1])[1:-1],
    "escaped for JSON, then HTML": lambda text: html.escape(json.dumps(text)[1:-1]),
    "escaped for URLs": lambda text: quote(text, safe=""),
    "escaped for forms": quote_plus,
    "escaped for URLs twice": lambda text: quote(quote(text)),
    "numeric references": lambda text: text.encode("ascii", "xmlcharrefreplace").decode(),
    "backslash escapes": lambda text: text.encode("ascii", "backslashreplace").decode(),
    "quoted": lambda text: f'"{text}"',
    "other quotes": lambda text: text.replace('"', "'"),
    "as Python": repr,
    "decomposed": lambda text: unicodedata.normalize("NFD", text),
    "composed": lambda text: unicodedata.normalize("NFKC", text),
    "ASCII with ?": lambda text: text.encode("ascii", "replace").decode(),
    "only ASCII": lambda text: text.encode("ascii", "ignore").decode(),
    "replacement characters": without(lambda character: not character.isascii(), "\ufffd"),
    "BMP with ????": without(lambda character: character > "\uffff", "????"),
    "only BMP": without(lambda character: character > "\uffff"),
    "truncated at the first beyond the BMP": lambda text: text.split("\U0001f600")[0],
    "only printable": without(lambda character: not character.isprintable()),
    "UTF-8 as Latin-1": garbled("utf-8", "latin-1"),
    "UTF-8 as Latin-1 twice": lambda text: garbled("utf-8", "latin-1")(garbled("utf-8", "latin-1")(text)),
    "UTF-8 as Windows": garbled("utf-8", "cp1252"),
    "UTF-8 as GBK": garbled("utf-8", "gbk"),
    "UTF-8 as GBK, errors ignored": garbled("utf-8", "gbk", "ignore"),
    "GBK as UTF-8": garbled("gbk", "utf-8"),
    "GBK as Latin-1": garbled("gbk", "latin-1"),
    "UTF-8 as Big5": garbled("utf-8", "big5"),
    "truncated": lambda text: text[:40] if len(text) > 40 else text,
    "truncated with dots": lambda text: text[:20] + "..." if len(text) > 20 else text,
    "truncated with an ellipsis": lambda text: text[:5] + "\u2026",
    "only the end": lambda text: "..." + text[-5:],
    "base64": lambda text: base64.b64encode(text.encode()).decode(),
    "hexadecimal": lambda text: text.encode().hex().upper(),
    "JSON serialized again": lambda text: json.dumps(json.loads(text), separators=(",", ":")),
    "JSON with sorted keys": lambda text: json.dumps(json.loads(text), sort_keys=True, indent=1),
    "JSON as its value": json.loads,
    "as a Python object": lambda text: repr(json.loads(text)),
    "a number": float,
    "a number in full": lambda text: repr(float(text)),
    "a whole number": int,
    "a whole number's text": lambda text: str(int(text)),
    "nothing": lambda _: None,
    "empty": lambda _: "",
    "null": lambda _: "null",
    "an empty object": lambda _: {},
    "in a list": lambda text: [text],
    "true": lambda _: True,
    "masked": lambda _: "***",
}
TEXTS = [
    "on", "0", "4", "4.0", "-5", "007", "1e3", "12345678901234567890", '{"cmd":"open"}', OPEN, LONG, "68 AA 00 FF 16",
    "a \"quoted\" <b>&'text\" & 100%", "line 1\nline 2\r\n", "  trimmed  ", "tab\there", "a\x00b", "zero\u200bwidth",
    "C:\\new\\table", '{"b": [true, null, "x  y"], "a": {"k": "v<&>\\"q\\""}}', '{"a":"&quot;"}', "key=value&k2=v2",
    "100%25", "\\u5f00", "[1, 2.0, 3]", "true", "12:30", "a+b c", "caf\u00e9", "\u00c4\u00d6 \u00e5\u00e4",
    "\uff26\uff35",
    "\u5f00\u706f", "\u6e29\u5ea625", '{"cmd":"\u5f00","n":1}', "emoji \U0001f600 here", "\U0001f600", "on\U0001f600",
    "\u5f00\U0001f600\u706f", '{"text":"' + "\u4eca\u5929" * 20 + '"}', "\U00020bb7\u91ce",
]  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_args_in_another_spelling_are_unclear(spelling: str) -> None:
    compared = 0
    for sent in TEXTS:
        try:
            shown = SPELLINGS[spelling](sent)
        except ValueError:
            continue  # not a number, or not JSON
        compared += 1
        for found in (compare_args(sent, shown), compare_content(sent, {"args": shown})):
            assert found is (EQUAL if shown == sent or (type(shown) is int and str(shown) == sent) else UNCLEAR), sent
        assert compare_content(sent, json.dumps({"args": shown})) is not DIFFERENT
    assert compared > 0


LOST_IN_PART = [
    ("na\u00efve\u6e29\u5ea6", "na?ve\u6e29\u5ea6"), ("\ud55c\uad6d \u6e29\u5ea6on", "?? \u6e29\u5ea6on"),
    ("\u91cd\u5e86\u9555on", "\u91cd\u5e86?on"), ("\u91cd\u5e86\u9555on", "\u91cd\u5e86on"),
    ("\u91cd\u5e86\u9555on", "\u91cd\u5e86\ufffdon"), ("\u91cd\u5e86\u9555on", "\u91cd\u5e86\u00bfon"),
    ("\u91cd\u5e86\u9555on", "\u91cd\u5e86\u95c0on"), ("on \u2103 \u6e29\u5ea6", "on ? \u6e29\u5ea6"),
    ('{"n":1,"cmd":"\u9555\u5f00"}', '{"cmd": "?\u5f00", "n": 1}'), ("caf\u00e9 \u00fc", "caf\u00e9 ?"),
    ("caf\u00e9 \u6e29\u5ea6", "caf\u00e9 ??"), ("caf\u00e9 \u6e29\u5ea6", "caf\u00c3\u00a9 \u6e29\u5ea6"),
    ("\u6e29\u5ea6\u5f00\u706f", "\u6e29\ufffd"), ("<b>\u9555\u5f00</b>", "?\u5f00"), ("C:\\new\u9555\u5f00",
    "C:new?\u5f00"),
]  # fmt: skip


@pytest.mark.parametrize(("sent", "shown"), LOST_IN_PART)
def test_args_that_lost_some_characters_are_unclear(sent: str, shown: str) -> None:
    """A store with another character set keeps only the characters that it has."""
    assert compare_args(sent, shown) is UNCLEAR


@pytest.mark.parametrize(
    "sent", ["na\u00efve\u6e29\u5ea6", "\ud55c\uad6d \u6e29\u5ea6on", "\u91cd\u5e86\u9555on", "\u00fc\u6e29\U0001f6001"]
)
@pytest.mark.parametrize("charset", ["gbk", "gb2312", "big5", "latin-1", "ascii", "cp1252", "shift_jis", "euc_kr"])
@pytest.mark.parametrize("errors", ["replace", "ignore"])
def test_args_after_a_wrong_character_set_are_never_different(sent: str, charset: str, errors: str) -> None:
    assert compare_args(sent, garbled(charset, charset, errors)(sent)) is not DIFFERENT
    assert compare_args(sent, garbled("utf-8", charset, errors)(sent)) is not DIFFERENT
    assert compare_args(sent, garbled(charset, "utf-8", errors)(sent)) is not DIFFERENT


@pytest.mark.parametrize(
    ("sent", "shown"),
    [
        ("\u5f00\u706f", "\u5173\u706f"), ("\u5f00", "\u5173"), ('{"cmd":"\u5f00"}', '{"cmd":"\u5173"}'),
        ('{"cmd":"\u5f00\u706f"}', '{"cmd":"\u5173\u706f"}'), ("\u5f00\u706f?", "\u5173\u706f?"),
        ("\u5f00\u5173\u706f", "\u706f\u5f00\u5173"),
        ("\u6e29\u5ea625\u3002", "\u6e29\u5ea626"), ("\u6e29\u5ea625", "??26"), ("\u6e29\u5ea6\u9555 on",
        "\u6e29\u5ea6? off"),
        ("\u5f00 1\u53f7", "\u5f00 2\u53f7"), ("\u5f00", "\u5f00" + "?" * 5 + "y" * 100), ("open?", "close?"),
        ("\u958b\u71c8", "\u95dc\u71c8"), ("\u958b", "\u95dc"), ("\u6253\u5f00\uff0c1", "\u5173\u95ed\uff0c1"),
    ],
)  # fmt: skip
def test_other_undamaged_chinese_args_are_certainly_different(sent: str, shown: str) -> None:
    assert compare_args(sent, shown) is DIFFERENT


def test_a_time_may_be_rounded_up_to_the_minute() -> None:
    assert compare_time(datetime.fromisoformat("2026-08-06T18:30:35"), "2026-08-06 18:31", CHINA) is UNCLEAR


@pytest.mark.parametrize("shown", ["2026-08-06 12:30:25", "2026-08-06 00:30:25", "2026-08-06T12:30:25.000"])
def test_midnight_may_be_shown_as_twelve(shown: str) -> None:
    assert compare_time(datetime.fromisoformat("2026-08-06T00:30:25"), shown, CHINA) is not DIFFERENT


@pytest.mark.parametrize(
    ("sent", "shown", "verdict"),
    [(5, 4, UNCLEAR), (5, 0, UNCLEAR), (5, 6, DIFFERENT), (5, 5, EQUAL), (5, "4", UNCLEAR)],
)
def test_a_number_of_which_the_rest_is_shown_is_unclear(sent: int, shown: object, verdict: Verdict) -> None:
    assert compare_parameter(sent, shown, range(11), 3, may_show_rest=True) is verdict


HIDDEN = [
    "[REDACTED]", "N/A", "n/a", "(hidden)", "<binary>", "<12 bytes>", "[hidden content]", "{secret}", "masked",
    "unknown", "\u5df2\u9690\u85cf", "\u3010\u5df2\u52a0\u5bc6\u3011", "\u65e0",
    "d41d8cd98f00b204e9800998ecf8427e", "k9Qm2bXc7RZw==",
]  # fmt: skip


@pytest.mark.parametrize("shown", HIDDEN)
def test_what_stands_for_args_that_are_not_shown_is_unclear(shown: str) -> None:
    assert compare_args("on", shown) is UNCLEAR


@pytest.mark.parametrize(
    ("sent", "shown"),
    [
        ("<on>", "<off>"),
        ("[1]", "[2]"),
        ("68AA00FF1668AA00", "68AA01FF1768AA00"),
        ("hidden", "unknown"),
        ("on", "[1, 2]"),
    ],
)
def test_what_has_the_form_of_the_args_that_were_sent_stands_for_nothing(sent: str, shown: str) -> None:
    assert compare_args(sent, shown) is DIFFERENT


@pytest.mark.parametrize(
    "shown",
    ["[111, 110]", "111 110", "0x6f,0x6e", "6f 6e", "b24=", '{"args":"on"}', "args=on", "<![CDATA[on]]>", "o*", "*n"],
)
def test_args_that_are_shown_encoded_or_masked_are_unclear(shown: str) -> None:
    assert compare_args("on", shown) is UNCLEAR


@pytest.mark.parametrize(
    ("sent", "shown"),
    [
        ("C:\\new", "C:new"), ("a\\b", "ab"), ("C:\\temp\\new", "C:tempnew"), ("C:\\new", "C:/new"), ("\\u5f00",
        "u5f00"),
        ("C:\\\\new", "C:\\new"), ('{"path":"C:\\\\new"}', '{"path":"C:new"}'), ("ab", "a\\b"), ('say \\"hi\\"',
        'say "hi"'),
        ("<b>on</b>", "on"), ("<b>on</b>", "&lt;b&gt;on&lt;/b&gt;"), ("<script>x</script>on", "on"),
        ("<script>x</script><b>on</b>", "<b>on</b>"), ("<script>x</script>on", "xon"),
        ('<b class="x">on</b>', "<b>on</b>"),
        ("x<5 on", "x"), ("1<2>3", "13"), ("&lt;b&gt;on&lt;/b&gt;", "on"), ("<i>a</i> <b>on</b>", "a <b>on</b>"),
        ("<!-- x -->on", "on"), ('<a href="/x">on</a>\n<br/>', "on"), ("<open/>", ""),
        ("switch=on;level=12", "switch=on;leve"[:14] + "..."), ("switch=on", "sw\u2026"), ("switch=on", "sw.."),
        ("switch=on", "switch (truncated)"), ("switch=on;level=12", "switch=on;level="),
        ("\u6e29\u5ea6" * 10, "\u6e29\u5ea6" * 4), ("pw=secret123", "pw=******"), ("secret123", "s*******3"),
    ],
)  # fmt: skip
def test_args_that_a_filter_or_a_store_altered_are_unclear(sent: str, shown: str) -> None:
    assert compare_args(sent, shown) is UNCLEAR


@pytest.mark.parametrize(
    ("sent", "shown"),
    [
        ("1", "10"), ("10", "1"), ("on", "one"), ("one", "on"), ("cmd-1", "cmd-10"), ("cmd-10", "cmd-1"), ("on off",
        "on"),
        ("a\\b", "ac"), ("C:\\new", "C:old"), ("C:\\new", "C:ne"),
        ("<b>on</b>", "off"), ("<open/>", "<close/>"), ("<on>1</on>", "<on>2</on>"), ("<on>1</on>", "<off>1</off>"),
        ("1<2>3", "1<4>3"), ("<b>on</b>", "<b></b>on1"),
        ("switch=on", "off..."), ("switch=on", "su\u2026"), ("pw=secret123", "key=******"), ("a*b", "a*c"), ("xx",
        "yy"),
    ],
)  # fmt: skip
def test_args_that_no_filter_would_produce_are_certainly_different(sent: str, shown: str) -> None:
    assert compare_args(sent, shown) is DIFFERENT


NO_VALUES = [
    "1970-01-01 08:00:00", "1970-01-01T00:00:00", "1970-01-01T00:00:00Z", "1970-01-01 08:00", "0001-01-01 00:00:00",
    "0001-01-01T00:00:00Z", "0000-00-00 00:00:00", "1900-01-01 00:00:00", "1899-12-30 00:00:00", "9999-12-31 23:59:59",
    "9999-12-31T23:59:59.999Z", "1969-12-31 23:59:59", 0, "0",
]  # fmt: skip


@pytest.mark.parametrize("shown", NO_VALUES)
def test_a_time_that_means_no_value_is_never_different(shown: object) -> None:
    own = datetime.fromisoformat("2026-08-06T08:00:05")
    created = read_time("2026-08-05 12:00:01", CHINA)
    assert compare_time(own, shown, CHINA) is UNCLEAR
    assert compare_valid_time(own, shown, created, CHINA, may_be_omitted=False) is UNCLEAR
    assert compare_valid_time(None, shown, created, CHINA, may_be_omitted=False) is not DIFFERENT
    assert read_time(shown, CHINA) is None


@pytest.mark.parametrize(
    ("shown", "verdict"),
    in_order({
        EQUAL: ["2026-08-06 18:30:25"],
        UNCLEAR: [
            "2026-08-06 18:30:00", "2026-08-06T18:30:00.000", "2026-08-06 18:30", "2026-08-06 00:00:00",
            "2026-08-06T00:00:00Z", "2026-08-06 10:30:25", "2026-08-06T10:30:25.000", "2026-08-06 10:30:00",
            "2026-08-06 10:30", "2026-08-06 10:30:25.300", "2026-08-06 06:30:25", "2026-08-07 02:30:25",
            "2026-08-07 02:30", "2026-08-07 00:00:00",
        ],
        DIFFERENT: [
            "2026-08-06 18:30:24", "2026-08-06 18:30:01", "2026-08-06 18:31:00", "2026-08-06 18:29:00",
            "2026-08-06 18:00:00", "2026-08-05 00:00:00", "2026-08-06 10:30:24",
            "2026-08-07 06:30:25", "2026-08-06 11:30:25", "2026-08-06T02:30:25Z", "2026-08-06 10:31:00",
        ],
    }),
)  # fmt: skip
def test_a_rounded_time_or_one_of_another_zone_or_of_twelve_hours_is_unclear(shown: str, verdict: Verdict) -> None:
    own = datetime.fromisoformat("2026-08-06T18:30:25")
    created = read_time("2026-08-05 12:00:01", CHINA)
    assert compare_time(own, shown, CHINA) is verdict
    assert compare_valid_time(own, shown, created, CHINA, may_be_omitted=False) is verdict


@given(
    st.text(max_size=200), st.lists(st.sampled_from(["escaped for HTML", "escaped for JSON", "trimmed"]), max_size=3)
)
def test_args_with_nested_escapes_are_never_different(sent: str, spellings: list[str]) -> None:
    shown = sent
    for spelling in spellings:
        shown = SPELLINGS[spelling](shown)
    assert compare_args(sent, shown) is not DIFFERENT


@pytest.mark.parametrize(
    ("sent", "content", "verdict"),
    [
        ("on", {"args": "on"}, EQUAL), ("on", '{"args": "on"}', EQUAL), ("on", "on", EQUAL), ("on", '"on"', EQUAL),
        ("on", {"args": "on", "of_tomorrow": 1}, EQUAL), ("5", 5, EQUAL), ("5", "5", EQUAL),
        (None, {}, EQUAL), (None, None, EQUAL), (None, "", EQUAL), (None, " ", EQUAL), (None, "{}", EQUAL),
        (None, "null", EQUAL), (None, {"args": None}, EQUAL),
        (None, {"args": ""}, UNCLEAR), (None, {"args": {}}, UNCLEAR), (None, {"args": "null"}, UNCLEAR),
        (None, {"of_tomorrow": 1}, UNCLEAR), (None, [], UNCLEAR), (None, "on", UNCLEAR),
        ("", None, UNCLEAR), ("", {}, UNCLEAR), ("", {"args": None}, UNCLEAR), ("", "null", UNCLEAR), ("", "", UNCLEAR),
        ("on", None, UNCLEAR), ("on", {}, UNCLEAR), ("on", "", UNCLEAR), ("on", {"args": None}, UNCLEAR),
        ("on", {"Args": "on"}, UNCLEAR), ("on", ["on"], UNCLEAR), ("on", [{"args": "on"}], UNCLEAR),
        ("on", True, UNCLEAR),
        ("on", 5, UNCLEAR), ("on", 5.5, UNCLEAR), ("on", {"args": {"args": "on"}}, UNCLEAR),
        ("on", {"args": 5}, UNCLEAR),
        ("on", "off", UNCLEAR), ("on", '{"args":"of', UNCLEAR), ("on", "{&quot;args&quot;:&quot;on&quot;}", UNCLEAR),
        ("on", "{args=on}", UNCLEAR), ("on", '"{\\"args\\":\\"on\\"}"', UNCLEAR),
        ("on", "eyJhcmdzIjoib24ifQ==", UNCLEAR),
        ('{"args":"x"}', '{"args":"x"}', UNCLEAR), ('{"cmd":1}', '{"cmd":1}', UNCLEAR),
        ('{"args":"x"}', {"args": '{"args":"x"}'}, EQUAL), ('{"args":"x"}', {"args": "x"}, DIFFERENT),
    ],
    ids=repr,
)  # fmt: skip
def test_a_body_is_compared_only_in_its_documented_forms(sent: str | None, content: object, verdict: Verdict) -> None:
    assert compare_content(sent, content) is verdict


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
    lambda values: st.lists(values, max_size=3)
    | st.dictionaries(st.text(max_size=5) | st.just("args"), values, max_size=3),
    max_leaves=8,
)  # fmt: skip


@given(JSON, st.none() | st.text(max_size=30))
@settings(max_examples=500)
def test_every_json_value_gets_a_verdict(shown: object, sent: str | None) -> None:
    created = read_time("2026-08-05 12:00:01", CHINA)
    local = datetime.fromisoformat("2026-08-05T12:00:00")
    verdicts = [
        compare_number(1, shown, LWM2M_IDS), compare_parameter(None, shown, range(11), 3), compare_imei(IMEI, shown),
        compare_type(shown), compare_time(local, shown, CHINA), compare_content(sent, shown), compare_args(sent, shown),
        compare_valid_time(local, shown, created, CHINA, may_be_omitted=True),
    ]  # fmt: skip
    assert set(verdicts) <= set(Verdict)


@pytest.mark.parametrize(
    "shown",
    ["[" * 500_000, '{"a":' * 3_000, "1" * 1_000_000, "&#" + "1" * 16_000 + ";", "\\u" * 8_000, "\ufdfa" * 16_000,
     "-1" * 8_000, "&amp;" * 3_000, "?a" * 8_000, "<a>" * 5_000, "<" * 16_000, "**a" * 5_000, "." * 16_000,
     "a\n" * 8_000, "%" * 16_000, '{"args":' + "1" * 5_000 + "}"],
    ids=lambda shown: shown[:10],
)  # fmt: skip
@pytest.mark.parametrize(
    "sent",
    ["on", "a\n" * 1_024, "\u5f00a" * 500, "<a" * 1_000, "<a>" * 600, '{"a":' * 400 + "1" + "}" * 400, "\\" * 2_048],
)
def test_comparing_any_value_is_fast(sent: str, shown: str) -> None:
    """The bound is far above the usual time of the processor: it catches quadratic growth."""
    began = time.process_time()
    assert compare_args(sent, shown) is not EQUAL
    assert compare_content(sent, shown) is UNCLEAR
    assert whole_number(shown) is None
    assert time.process_time() - began < 10


def test_a_too_deeply_nested_object_is_unclear() -> None:
    shown: object = "on"
    for _ in range(5_000):
        shown = {"a": shown}
    assert compare_args('{"a":1}', shown) is UNCLEAR
    assert compare_content("on", {"args": shown}) is UNCLEAR


@pytest.mark.parametrize("writing", ["\ufdfa", "\\ufdfa", "&#65018;"])
def test_a_text_that_unfolds_to_more_than_args_can_have_is_unclear(writing: str) -> None:
    """One character of it stands for eighteen: comparing them would take seconds."""
    most = {"args": writing * 682}  # as many as args have room for
    assert compare_content("on", most) is Verdict.DIFFERENT
    assert compare_content("on", {"args": writing * 1_000}) is Verdict.UNCLEAR
