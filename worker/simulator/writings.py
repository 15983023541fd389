"""The ways in which histories are written: each changes how a field looks, not what happened."""

import html
import json
import re
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any, Literal

Writing = Literal[
    "ids_decimal",
    "ids_text",
    "ids_number",
    "defaults_filled",
    "empty_as_null",
    "emoji_as_question_marks",
    "quotes_escaped",
    "blank_cut",
    "blank_added",
    "seconds_dropped",
    "milliseconds_added",
    "times_utc",
    "time_placeholder",
    "count_for_total",
    "items_absent",
    "short_page",
    "type_number",
    "content_object",
    "content_empty_object",
    "content_text",
    "content_empty",
    "content_null",
    "remain_text",
    "uuid_blank",
    "nested_log",
]

_Entry = dict[str, Any]
_TIME = re.compile(r"(\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d)(:\d{3})?")
_IDS = ("obj_id", "obj_inst_id", "res_id")
_BEYOND_BMP = re.compile("[\U00010000-\U0010ffff]")
_TYPES = {"READ": 0, "WRITE": 1, "EXECUTE": 2}


def rewrite(writing: Writing, data: Any) -> Any:
    """Return the ``data`` of a history answer in one of the ways: a page of the list, a detail or a log."""
    if isinstance(data, list):
        return [data] if writing == "nested_log" else data
    if writing in _OF_PAGES:
        return _OF_PAGES[writing](data) if "items" in data else data
    if writing not in _OF_ENTRIES:
        return data
    if "items" in data:
        return data | {"items": [_OF_ENTRIES[writing](entry) for entry in data["items"]]}
    return _OF_ENTRIES[writing](data)


def _on_ids(change: Callable[[Any], object]) -> Callable[[_Entry], _Entry]:
    def written(entry: _Entry) -> _Entry:
        if "args" not in entry:
            return entry
        return entry | {"args": entry["args"] | {name: change(entry["args"][name]) for name in _IDS}}

    return written


def _on_texts(change: Callable[[str], object]) -> Callable[[Any], Any]:
    """Change all texts of an entry, however deep."""

    def written(value: Any) -> Any:
        if isinstance(value, str):
            return change(value)
        if isinstance(value, dict):
            return {name: written(each) for name, each in value.items()}
        return [written(each) for each in value] if isinstance(value, list) else value

    return written


def _on_times(change: Callable[[str, str], str]) -> Callable[[Any], Any]:
    def of_text(text: str) -> str:
        found = _TIME.fullmatch(text)
        return text if found is None else change(found[1], found[2] or "")

    return _on_texts(of_text)


def _on_content(change: Callable[[Any], object]) -> Callable[[_Entry], _Entry]:
    def written(entry: _Entry) -> _Entry:
        return entry | {"content": change(entry["content"])} if "content" in entry else entry

    return written


def _on_args_text(change: Callable[[str], str]) -> Callable[[_Entry], _Entry]:
    def of_content(content: Any) -> Any:
        if isinstance(content, dict) and isinstance(content.get("args"), str):
            return content | {"args": change(content["args"])}
        return content

    return _on_content(of_content)


def _in_utc(time: str, milliseconds: str) -> str:
    shifted = datetime.fromisoformat(time) - timedelta(hours=8)
    return f"{shifted:%Y-%m-%d}{time[10]}{shifted:%H:%M:%S}{milliseconds}"


def _filled(entry: _Entry) -> _Entry:
    return entry | {"args": {"retry": 3, "timeout": 25} | entry["args"]} if "args" in entry else entry


def _on_field(name: str, change: Callable[[Any], object]) -> Callable[[_Entry], _Entry]:
    return lambda entry: entry | {name: change(entry[name])} if name in entry else entry


_OF_ENTRIES: dict[str, Callable[[_Entry], _Entry]] = {
    "ids_decimal": _on_ids(float),
    "ids_text": _on_ids(str),
    "ids_number": _on_ids(int),
    "defaults_filled": _filled,
    "empty_as_null": _on_texts(lambda text: text or None),
    "emoji_as_question_marks": _on_texts(lambda text: _BEYOND_BMP.sub("????", text)),
    "quotes_escaped": _on_args_text(html.escape),
    "blank_cut": _on_args_text(str.rstrip),
    "blank_added": _on_args_text(lambda text: f"{text} "),
    "seconds_dropped": _on_times(lambda time, _: time[:16]),
    "milliseconds_added": _on_times(lambda time, milliseconds: time + (milliseconds or ":000")),
    "times_utc": _on_times(_in_utc),
    "time_placeholder": _on_field("create_time", lambda _: "1970-01-01 08:00:00"),
    "type_number": _on_field("type", lambda name: _TYPES[name]),
    "content_object": _on_content(lambda content: content or {}),
    "content_empty_object": _on_content(lambda _: {}),
    "content_text": _on_content(lambda content: json.dumps(content or {}, ensure_ascii=False)),
    "content_empty": _on_content(lambda _: ""),
    "content_null": _on_content(lambda _: None),
    "remain_text": _on_field("remain", str),
    "uuid_blank": _on_field("cmd_uuid", lambda uuid: f"{uuid.strip()} "),
}
_OF_PAGES: dict[str, Callable[[_Entry], _Entry]] = {
    "count_for_total": lambda page: {"count": page["total_count"], "items": page["items"]},
    "items_absent": lambda page: page if page["items"] else {"total_count": page["total_count"]},
    "short_page": lambda page: page | {"items": page["items"][:-1]},
}
