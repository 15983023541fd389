"""Text from outside, made safe to show."""

import json
from datetime import datetime, timedelta, timezone

import pytest

from worker.printable import counted, printable, printable_json, utc

# Each could move a cursor, forge a line, hide a part of the text or show it in another order.
HARMFUL = [*map(chr, [*range(0x20), *range(0x7F, 0xA0), 0xAD, 0x200B, 0x200E, 0x2028, 0x2029, *range(0x202A, 0x202F),
                      *range(0x2066, 0x206A), 0xFEFF, 0xD800, 0xE0041])]  # fmt: skip
HARMLESS = 'plain, "quoted", \\ [red]markup[/red] é 中文 😀'


@pytest.mark.parametrize("char", HARMFUL, ids=ascii)
def test_a_character_that_could_do_harm_is_escaped(char: str) -> None:
    shown = printable(f"a{char}b")
    assert shown.isprintable()
    assert shown.startswith("a\\")
    assert shown.endswith("b")


@pytest.mark.parametrize("char", HARMFUL, ids=ascii)
def test_json_is_printable_and_means_the_same(char: str) -> None:
    value = {f"a{char}": [f"b{char}c"]}
    assert printable_json(value).isprintable()
    assert json.loads(printable_json(value)) == value


def test_what_does_no_harm_stays_as_it_is() -> None:
    assert printable(HARMLESS) == HARMLESS
    assert json.loads(printable_json(HARMLESS)) == HARMLESS
    assert "中文 😀" in printable_json(HARMLESS)


def test_line_breaks_are_kept_where_they_are_wanted() -> None:
    assert printable("\x1b[31mred\x07\nnext\r", keep="\n") == "\\x1b[31mred\\x07\nnext\\r"


def test_a_moment_is_written_in_utc_as_in_replies() -> None:
    moment = datetime(2026, 8, 5, 20, tzinfo=timezone(timedelta(hours=8)))
    assert (utc(None), utc(moment)) == (None, "2026-08-05T12:00:00Z")
    assert utc(moment.replace(microsecond=1200)) == "2026-08-05T12:00:00.001200Z"


def test_a_number_has_its_noun() -> None:
    assert [counted(number, "reply") for number in (0, 1, 7083)] == ["0 replies", "1 reply", "7,083 replies"]
