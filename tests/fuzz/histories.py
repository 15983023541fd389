"""Command histories: an entry that could be the command never proves that it was not cached, however it is written.

An input is JSON: ``sent`` has the args of the command, ``page`` and ``detail`` are the ``data`` of the platform's two
answers, or the JSON texts of them, and ``could_be`` says whether the entry named "u" could be the command.
"""

import html
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any, get_args
from zoneinfo import ZoneInfo

from hypothesis import strategies as st

from tests.fuzz.mutation import encoded, json_texts, parsed
from tests.fuzz.target import Check, Servers, Target
from tests.support.builders import a_command
from worker.core.parsing import read_command
from worker.errors import HistoryUnreadable
from worker.onenet.dialect import Dialect
from worker.onenet.history import HistoryPages, Window, candidates, is_waiting, match, read_detail, read_page
from worker.onenet.response import Response
from worker.onenet.v1 import V1
from worker.onenet.v2 import V2
from worker.simulator.writings import Writing, rewrite

CHINA = ZoneInfo("Asia/Shanghai")
TRIED_AT = datetime(2026, 8, 5, 12, 0, 0, tzinfo=CHINA)
WINDOW = Window(TRIED_AT, TRIED_AT + timedelta(seconds=2), read_at=TRIED_AT + timedelta(hours=12))
MOST_ARGS = 200
_FIELDS: dict[str, Any] = {
    "command_id": "a",
    "expired_time": "2026-08-06T08:00:00",
    "valid_time": "2026-08-05T20:00:00",
    "retry": 1,
    "timeout": 5,
    "trigger_msg": 4,
}


def _answer(dialect: Dialect, data: Any) -> Response:
    content = data if isinstance(data, str) else json.dumps(data)
    head = json.dumps({dialect.code_name: 0, dialect.text_name: "succ", "request_id": "r"})
    return Response(200, {}, encoded(f'{head[:-1]}, "data": {content}}}'))


@contextmanager
def _open(_servers: Servers) -> Iterator[Check]:
    yield _check


def _check(data: bytes) -> None:
    given = parsed(data)
    if not isinstance(given, dict):
        given = {"page": given}
    dialect = V1 if zlib.crc32(data) & 1 else V2
    sent = given.get("sent") if isinstance(given.get("sent"), str) else None
    command = read_command(json.dumps(a_command(**_FIELDS, args=sent)).encode(), None, CHINA)
    pages = HistoryPages()
    try:
        items = pages.add(read_page(_answer(dialect, given.get("page")), dialect))
        detail = read_detail(_answer(dialect, given.get("detail")), dialect)
    except HistoryUnreadable:
        return
    found = []
    for item in candidates(items, command, WINDOW, CHINA):
        is_waiting(item, WINDOW.read_at, CHINA)
        one = match(item, detail, command, WINDOW, CHINA, omitted_until=WINDOW.until)
        if one is not None and item.cmd_uuid.strip() in {"u", ""}:
            found.append(one)
    if given.get("could_be") is True and pages.is_complete:
        assert found, "an entry that could be the command was taken for another"


# Values that no version of the platform is known to show: such a field may be anything.
_UNKNOWN_FORMS: tuple[Any, ...] = (None, "", " ", [], {}, [1], {"value": 1}, True, "???", "\ufffd", 1e300, -7, "1" * 40)
_NUMBERS: tuple[Callable[[int], Any], ...] = (
    int,
    str,
    float,
    lambda n: f" {n} ",
    lambda n: f"{n}.0",
    lambda n: f"{n}e0",
)
_TIMES: tuple[Callable[[str], Any], ...] = (
    str,
    lambda text: text.replace("T", " "),
    lambda text: text[:16],
    lambda text: f"{text}.999",
    lambda text: f"{text}:000",
    lambda text: f"{text}+08:00",
    lambda text: f"{text}Z",
    lambda text: f" {text} ",
    lambda text: (datetime.fromisoformat(text) - timedelta(hours=8)).isoformat(),
    lambda text: int(datetime.fromisoformat(text).replace(tzinfo=CHINA).timestamp()),
    lambda text: text[:10],
    lambda text: text.replace("-", "/").replace("T", " "),
)
_TEXTS: tuple[Callable[[str], Any], ...] = (
    str,
    html.escape,
    str.strip,
    str.upper,
    lambda text: f"{text} ",
    lambda text: json.dumps(text)[1:-1],
    json.dumps,
    lambda text: text.encode("ascii", "replace").decode(),
    lambda text: text.encode("ascii", "xmlcharrefreplace").decode(),
    lambda text: "".join(text.split()),
    lambda _: None,
    lambda _: {},
    lambda text: 5 if text == "5" else 7.5,  # a number that is shown as another one is another value
    lambda _: True,
)
_CONTENTS: tuple[Callable[[Any], Any], ...] = (
    lambda args: {"args": args},
    lambda args: json.dumps({"args": args}),
    lambda args: json.dumps({"args": args}, ensure_ascii=False, indent=1),
    lambda args: {"args": args, "more": 1},
    lambda _: None,
    lambda _: "",
    lambda _: {},
)
_args = st.sampled_from(
    ["on", "5", "", "{}", '{"cmd":"open","to":1.50}', "null", "é", "\U0001f600", "<b>on</b>", "a\0b"]
)
_args_or_any = _args | st.text(max_size=MOST_ARGS)


@st.composite
def _numbers(draw: st.DrawFn, number: int) -> Any:
    return draw(st.sampled_from(_NUMBERS))(number) if draw(st.booleans()) else draw(st.sampled_from(_UNKNOWN_FORMS))


@st.composite
def _times(draw: st.DrawFn, text: str) -> Any:
    return draw(st.sampled_from(_TIMES))(text) if draw(st.booleans()) else draw(st.sampled_from(_UNKNOWN_FORMS))


@st.composite
def _entries_of_the_command(draw: st.DrawFn) -> bytes:
    """Return a history in which one entry is the command, each of its fields written in one of many ways."""
    sent = draw(st.none() | _args_or_any)
    command = a_command(**_FIELDS)
    item = {
        "cmd_uuid": draw(st.sampled_from(["u", " u ", "u\n"])),
        "type": draw(
            st.sampled_from(["EXECUTE", "execute", " Execute ", 2, "2", 2.0]) | st.sampled_from(_UNKNOWN_FORMS)
        ),
        "create_time": draw(_times("2026-08-05T12:00:01")),
        "expired_time": draw(_times(command["expired_time"])),
        "valid_time": draw(_times(command["valid_time"])),
        "trigger_msg": draw(_numbers(4)),
        "send_status": draw(_numbers(1)),
    }
    item = {name: item[name] for name in item if name == "cmd_uuid" or draw(st.integers(0, 9))}
    args: dict[str, Any] = {
        name: draw(_numbers(command[name])) for name in ("obj_id", "obj_inst_id", "res_id", "retry")
    }
    args |= {"imei": command["imei"], "timeout": draw(_numbers(5)), "valid_time": draw(_times(command["valid_time"]))}
    args |= {"expired_time": draw(_times(command["expired_time"]))}
    args = {name: args[name] for name in args if draw(st.integers(0, 9))}
    text = sent if sent is None else draw(st.sampled_from(_TEXTS))(sent)
    content = (
        draw(st.sampled_from(_CONTENTS))(text) if text is not None else draw(st.sampled_from([None, {}, "", "{}"]))
    )
    others = draw(st.lists(st.sampled_from(_OTHERS), max_size=3))
    items = [*others, item]
    page: Any = {"total_count": draw(_totals(len(items))), "items": items}
    detail: Any = {"args": args, "content": content}
    if draw(st.integers(0, 9)) == 0:
        page = _with_more(page, draw(st.sampled_from(_MORE_OF_A_PAGE)))
    if draw(st.integers(0, 9)) == 0:
        page = {"total_count": 0, "items": [], draw(st.sampled_from(["list", "Items", "records"])): items}
    if draw(st.integers(0, 9)) == 0:
        detail = _with_more(detail, draw(st.sampled_from(_MORE_OF_A_DETAIL)))
    return _packed(sent, page, detail, could_be=True)


def _with_more(value: dict[str, Any], fields: str) -> str:
    """Return the JSON text of an object that has more fields, whose names it may have already."""
    return f"{json.dumps(value)[:-1]},{fields}}}"


@st.composite
def _written_entries(draw: st.DrawFn) -> bytes:
    """Return a history in which the simulator has written the command in several of its ways."""
    sent = draw(st.none() | _args)
    command = a_command(**_FIELDS)
    item = {
        "cmd_uuid": "u",
        "type": "EXECUTE",
        "create_time": "2026-08-05 12:00:01",
        "expired_time": "2026-08-06 08:00:00",
        "trigger_msg": 4,
        "send_status": 1,
    }
    page: Any = {"total_count": 1, "items": [item]}
    names = ("imei", "obj_id", "obj_inst_id", "res_id", "expired_time", "valid_time", "retry", "timeout")
    args = {name: str(command[name]) for name in names}
    detail: Any = item | {"args": args, "content": {} if sent is None else {"args": sent}}
    for writing in draw(st.lists(st.sampled_from(_HARMLESS), max_size=4, unique=True)):
        page, detail = rewrite(writing, page), rewrite(writing, detail)
    return _packed(sent, page, detail, could_be=True)


_MORE_OF_A_PAGE = ('"total_count":0,"items":[]', '"items":[],"count":0', '"Items":[]', '"page":1')
_MORE_OF_A_DETAIL = ('"args":{"res_id":"1"}', '"content":{"args":"another"}', '"Args":{}', '"remain":3')
_OTHERS: tuple[Any, ...] = (
    None,
    7,
    "x",
    [],
    {},
    {"cmd_uuid": "v", "type": "READ"},
    {"cmd_uuid": 3, "create_time": "soon"},
)
# Not those that leave entries out, nor those that can be applied to only one form of a field.
_HARMLESS = tuple(
    each
    for each in get_args(Writing)
    if each not in {"items_absent", "short_page", "nested_log", "type_number", "ids_number", "times_utc"}
)


def _totals(number: int) -> st.SearchStrategy[Any]:
    return st.sampled_from([number, str(number), float(number), number + 1])


def _packed(sent: str | None, page: Any, detail: Any, *, could_be: bool) -> bytes:
    return encoded(json.dumps({"sent": sent, "page": page, "detail": detail, "could_be": could_be}))


@st.composite
def _any_history(draw: st.DrawFn) -> bytes:
    """Return a history of any form; only what it raises is of interest."""
    names = (
        "total_count",
        "count",
        "items",
        "cmd_uuid",
        "type",
        "create_time",
        "expired_time",
        "args",
        "content",
        "imei",
    )
    odd = json_texts(names=names)
    return encoded(f'{{"sent":{json.dumps(draw(st.none() | _args))},"page":{draw(odd)},"detail":{draw(odd)}}}')


INPUTS = _entries_of_the_command() | _written_entries() | _any_history()
TARGET = Target("histories", INPUTS, _open)
