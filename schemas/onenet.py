"""The platform's command history, as far as the worker reads it: the ``data`` of its answers.

Source: the platform's pages on the command history. A history is decided by all of its fields: a malformed answer is
an error. The fields of an entry are kept as they are written, because another notation of a value does not make it
another value; what is longer than any notation of a value is not kept.
"""

import re
from decimal import Decimal
from typing import Annotated, Any

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import to_json

UUID_PATTERN = "^[!-~]{1,64}$"  # visible ASCII
_UUID = re.compile(UUID_PATTERN.removesuffix("$") + r"\Z")
_UUID_NAME = r"uuid|(?:cmd|command)[ _-]?id"  # the platform's push names it cmd_id
_NAMED_UUID = re.compile(_UUID_NAME, re.IGNORECASE)
# With its value, in a text: JSON, also within JSON, XML, and what other languages print.
_WRITTEN_UUID = re.compile(
    rf"(?:{_UUID_NAME})[\"'\s\\]*[:=>](?!\s*(?:null\b|none\b|\\*\"\\*\"|''|[,;&<)\]}}]|\Z))", re.IGNORECASE
)
_BARE_UUID = re.compile(r"\b[0-9a-f]{8}-?(?:[0-9a-f]{4}-?){3}[0-9a-f]{12}\b", re.IGNORECASE)
_BLANKS = " \t\r\n"
_MAX_NUMBER = 10**40
_MAX_FIELD_CHARS = 48  # no known form of a field is longer
_MAX_CONTENT_BYTES = 64 * 1024  # as JSON; args have at most 2 KB
_MAX_TOTAL = 10**9
_MAX_PAGE_ITEMS = 1000  # a page has at most 100; hundreds of thousands would hold up the worker
# What became of a command that was sent to its device: a word in the history, its place here in a push.
CONFIRM_STATUSES = (
    "SUCCESS",
    "METHOD_NOT_ALLOWED",
    "FORBIDDEN",
    "NOT_FOUND",
    "INTERNAL_SERVER_ERROR",
    "TIME_OUT",
    "REQ_PARAM_ERROR",
    "RESP_ERROR",
    "UNAUTHORIZED",
    "BAD_REQUEST",
    "NOT_ACCEPTABLE",
    "UNSUPPORTED_CONTENT_FORMAT",
    "OFFLINE",
    "ADDR_OCCUPIED",
)
UNKNOWN_FORM = "?"
_UNKNOWN_CONTENT: tuple[()] = ()
_PARAMETERS = (
    "imei",
    "obj_id",
    "obj_inst_id",
    "res_id",
    "expired_time",
    "valid_time",
    "retry",
    "timeout",
    "trigger_msg",
)
_TOTALS = ("total_count", "count")
_ENTRY_NAMES = {"create_time", "valid_time", "expired_time", "trigger_msg", "send_status"}  # not type: anything has one
_NUMBER = re.compile(r"[+-]?[0-9]{1,20}(?:\.[0-9]{1,20})?(?:[eE][+-]?[0-9]{1,2})?\Z")


def whole_number(value: object) -> int | None:
    """Return the integer that a JSON value such as 3, 3.0, "3" or "3e0" stands for; None for any other value."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    if not isinstance(value, str) or not _NUMBER.match(value.strip()):
        return None
    number = Decimal(value.strip())
    return int(number) if int(number) == number else None


def usable_uuid(value: object) -> str:
    """Return a uuid without the blanks around it; empty if it is none, which has 1 to 64 visible ASCII characters."""
    text = value.strip(_BLANKS) if isinstance(value, str) else ""
    return text if _UUID.match(text) else ""


def has_uuid(value: object, *, or_bare: bool = False) -> bool:
    """Tell whether a JSON value has a uuid anywhere, in whichever form, a usable one or not.

    Args:
        value: the value.
        or_bare: a text in the usual form of a uuid is one, also if nothing says so.
    """
    match value:
        case dict():
            return any(
                (each and _NAMED_UUID.search(name)) or has_uuid(each, or_bare=or_bare) for name, each in value.items()
            )
        case list():
            return any(has_uuid(each, or_bare=or_bare) for each in value)
        case str():
            return bool(_WRITTEN_UUID.search(value) or (or_bare and _BARE_UUID.search(value)))
        case _:
            return False


def may_have_entries(value: object) -> bool:
    """Tell whether a value of unknown meaning, in the answer with a page of a history, may have entries of it."""
    match value:
        case dict():
            return bool(value.keys() & _ENTRY_NAMES) or has_uuid(value) or any(map(may_have_entries, value.values()))
        case list():
            return bool(value)
        case _:
            return has_uuid(value)


def _object_or_nothing(value: object) -> object:
    return value if isinstance(value, dict) else {}


def _name(value: object) -> str:
    """Return the uuid of an entry, a number as text; empty if it is not usable."""
    return usable_uuid(str(value) if _is_number(value) else value)


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < _MAX_NUMBER


def _field(value: object) -> object:
    """Return a field without the blanks around it; one that is longer than any known form is of an unknown form."""
    if value is None or isinstance(value, bool | float) or _is_number(value):
        return value
    text = value.strip() if isinstance(value, str) else UNKNOWN_FORM
    return text if len(text) <= _MAX_FIELD_CHARS and text.isascii() else UNKNOWN_FORM


def _parameters(value: object) -> object:
    """Return those parameters of a request that a command has."""
    return {name: _field(value[name]) for name in _PARAMETERS if name in value} if isinstance(value, dict) else {}


def _content(value: object) -> object:
    """Return the body of a request; one that is too long for a command's is replaced by one of an unknown form."""
    return value if len(to_json(value)) <= _MAX_CONTENT_BYTES else _UNKNOWN_CONTENT


def _number_or_same(value: object) -> object:
    number = whole_number(value)
    return value if number is None else number


def _nothing_as_empty(value: object) -> object:
    return () if value is None else value


Shown = Annotated[Any, BeforeValidator(_field)]


@dataclass(frozen=True, slots=True)
class HistoryItem:
    """One entry of a device's history, its fields as they are written. Times are the platform's local time.

    ``cmd_uuid`` is empty if the entry has no usable uuid. A history may have thousands of entries, so each is small.
    """

    cmd_uuid: Annotated[str, BeforeValidator(_name)] = ""
    type: Shown = None
    create_time: Shown = None
    valid_time: Shown = None
    expired_time: Shown = None
    trigger_msg: Shown = None
    send_status: Shown = None


@dataclass(frozen=True, slots=True)
class ResultItem(HistoryItem):
    """An entry with what became of its command."""

    send_time: Shown = None
    confirm_time: Shown = None
    confirm_status: Shown = None


class HistoryPage(BaseModel):
    """One page of a device's history. An entry that is not an object counts as one without fields.

    A page that may have more entries than those of ``items`` is an error.
    """

    model_config = ConfigDict(frozen=True)

    total_count: Annotated[
        int,
        BeforeValidator(_number_or_same),
        Field(ge=0, le=_MAX_TOTAL, strict=True, validation_alias=AliasChoices(*_TOTALS)),
    ]
    items: Annotated[
        tuple[Annotated[HistoryItem, BeforeValidator(_object_or_nothing)], ...],
        BeforeValidator(_nothing_as_empty),
        Field(max_length=_MAX_PAGE_ITEMS),
    ] = ()

    @model_validator(mode="before")
    @classmethod
    def _is_whole(cls, value: object) -> object:
        if isinstance(value, dict):
            totals = {whole_number(value[name]) for name in _TOTALS if value.get(name) is not None}
            if len(totals) > 1:
                raise ValueError("it has two totals")
            if any(may_have_entries(each) for name, each in value.items() if name not in {"items", *_TOTALS}):
                raise ValueError("it may have entries in a field that is not known")
        return value


class ResultPage(HistoryPage):
    """One page of a device's history, with what became of its commands."""

    items: Annotated[
        tuple[Annotated[ResultItem, BeforeValidator(_object_or_nothing)], ...],
        BeforeValidator(_nothing_as_empty),
        Field(max_length=_MAX_PAGE_ITEMS),
    ] = ()


class HistoryDetail(BaseModel):
    """One entry in full: ``args`` are the query parameters of its request and ``content`` is the request's body."""

    model_config = ConfigDict(frozen=True)

    args: Annotated[dict[str, Any], BeforeValidator(_parameters)]
    content: Annotated[Any, BeforeValidator(_content)] = None
