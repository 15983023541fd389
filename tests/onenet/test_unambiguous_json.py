"""JSON of the platform: what has more values than any answer is refused before it takes memory as objects."""

from collections.abc import Iterable

import pytest

from tests.support.memory import peak_of
from tests.support.onenet_client import command
from worker.core.answer import InDoubt
from worker.errors import HistoryUnreadable
from worker.onenet.answers import interpret
from worker.onenet.comparison import Verdict, compare_content
from worker.onenet.history import read_detail, read_page
from worker.onenet.history_memory import MAX_BODY_BYTES
from worker.onenet.response import Response
from worker.onenet.unambiguous_json import MAX_VALUES, TooManyValues, may_repeat_names, read_json
from worker.onenet.v1 import V1

MIB = 1024 * 1024
WIDE = "\U0001f600"  # a text with it takes four bytes for each of its characters
DEEP = '{"":' * 60 + "0" + "}" * 60


def list_of(value: str, count: int) -> str:
    return f"[{','.join([value] * count)}]"


def table_of(names: Iterable[str]) -> str:
    return "{" + ",".join(f'"{name}":0' for name in names) + "}"


MANY_VALUES = {
    "tables in tables": list_of(DEEP, 1_000),
    "lists in lists": list_of("[" * 60 + "]" * 60, 1_000),
    "empty tables": list_of("{}", MAX_VALUES),
    "empty lists": list_of("[]", MAX_VALUES),
    "numbers": list_of("1000", MAX_VALUES + 1),
    "texts": list_of('"ab"', MAX_VALUES + 1),
    "a table": table_of(map(str, range(MAX_VALUES + 1))),
    "behind a text": '["\\"\\\\",' + list_of("{}", MAX_VALUES) + "]",
    "before a text without an end": "[" * (MAX_VALUES + 1) + '"[',
}
AS_MANY_AS_ALLOWED = {
    "tables in tables": list_of(DEEP, MAX_VALUES // 61 - 3),
    "tables": list_of('{"":0}', MAX_VALUES // 2 - 1),
    "a table": table_of(f"{number:06}{WIDE}" for number in range(MAX_VALUES - 1)),
    "numbers": list_of("1.55", MAX_VALUES - 1),
    "texts": list_of(f'"{WIDE}{"a" * 18}"', MAX_VALUES - 1),
    "one text": f'["{WIDE}{"a" * (MAX_BODY_BYTES - 10)}"]',
}


@pytest.mark.parametrize("text", MANY_VALUES.values(), ids=MANY_VALUES)
def test_a_text_with_too_many_values_is_refused_without_making_them(text: str) -> None:
    def read() -> None:
        with pytest.raises(TooManyValues):
            read_json(text)

    assert peak_of(read) < MIB // 16
    assert may_repeat_names(text)


@pytest.mark.parametrize("text", AS_MANY_AS_ALLOWED.values(), ids=AS_MANY_AS_ALLOWED)
def test_what_is_read_takes_little_memory_in_whichever_form(text: str) -> None:
    assert peak_of(lambda: read_json(text)) < 4 * MIB


def test_what_stands_in_a_text_is_no_value() -> None:
    """Neither a command's args nor what the platform says about one makes its answer unreadable."""
    args = '{[,\\\\\\"' * MAX_VALUES
    assert len(read_json('{"args":"' + args + '","more":[[],{}]}')["args"]) == 5 * MAX_VALUES


MANY = MANY_VALUES["tables in tables"]
BODIES = {
    "success": '{"errno":0,"error":"succ","data":{"uuid":"u","x":%s}}',
    "success without a uuid": '{"errno":0,"error":"succ","data":%s}',
    "refusal": '{"errno":3,"error":"no","data":%s}',
    "wait": '{"errno":15,"error":"no","data":%s}',
    "no answer of OneNET's": '{"foo":%s}',
    "list": "%s",
}


@pytest.mark.parametrize("status", [200, 404, 429, 500])
@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_an_answer_with_too_many_values_leaves_the_command_in_doubt(body: str, status: int) -> None:
    response = Response(status, {}, (body % MANY).encode())

    def read() -> None:
        assert isinstance(interpret(response, V1, command().expires_at, is_proven=False), InDoubt)

    assert peak_of(read) < MIB


@pytest.mark.parametrize(
    "body",
    [
        '{"errno":0,"error":"succ","data":{"total_count":0,"items":[]},"more":%s}',
        '{"errno":0,"error":"succ","data":{"total_count":0,"items":[],"more":%s}}',
        '{"errno":0,"error":"succ","data":{"total_count":1,"items":%s}}',
        '{"errno":0,"error":"succ","data":{"args":{},"content":%s}}',
    ],
    ids=["beside the page", "in the page", "as entries", "as content"],
)
def test_a_history_with_too_many_values_decides_nothing_and_says_nothing_about_other_devices(body: str) -> None:
    response = Response(200, {}, (body % MANY).encode())

    def read() -> None:
        for read_one in (read_page, read_detail):
            with pytest.raises(HistoryUnreadable, match="too many values") as caught:
                read_one(response, V1)
            assert (caught.value.is_outage, caught.value.is_refused) == (False, False)

    assert peak_of(read) < MIB


def test_a_body_within_a_text_with_too_many_values_is_unclear() -> None:
    """They are not looked through for a name that stands twice."""
    few, many = ('{"args":"on","more":' + list_of("0", count) + "}" for count in (100, MAX_VALUES))
    assert compare_content("on", few) is Verdict.EQUAL
    assert compare_content("on", many) is Verdict.UNCLEAR
