"""The platform's command history, as far as the worker reads it: the ``data`` of its answers.

Source: the platform's pages on the command history. A history is decided by all of its fields: a malformed answer is
an error. The fields of an entry are kept as they are written, because another notation of a value does not make it
another value.
"""

import re
from decimal import Decimal
from typing import Annotated, Any

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field

_MAX_UUID_CHARS = 200
_MAX_UUID_NUMBER = 10**40
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


def _object_or_nothing(value: object) -> object:
    return value if isinstance(value, dict) else {}


def _name(value: object) -> str:
    """Return the name of an entry, a number as text; empty if the name is not usable."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < _MAX_UUID_NUMBER:
        return str(value)
    text = value.strip() if isinstance(value, str) else ""
    return text if len(text) <= _MAX_UUID_CHARS and text.isprintable() else ""


def _number_or_same(value: object) -> object:
    number = whole_number(value)
    return value if number is None else number


def _nothing_as_empty(value: object) -> object:
    return () if value is None else value


class HistoryItem(BaseModel):
    """One entry of a device's history, its fields as they are written. Times are the platform's local time.

    ``cmd_uuid`` is empty if the entry has no usable name.
    """

    model_config = ConfigDict(frozen=True)

    cmd_uuid: Annotated[str, BeforeValidator(_name)] = ""
    type: Any = None
    create_time: Any = None
    valid_time: Any = None
    expired_time: Any = None
    trigger_msg: Any = None
    send_status: Any = None


class HistoryPage(BaseModel):
    """One page of a device's history. An entry that is not an object counts as one without fields."""

    model_config = ConfigDict(frozen=True)

    total_count: Annotated[
        int,
        BeforeValidator(_number_or_same),
        Field(ge=0, strict=True, validation_alias=AliasChoices("total_count", "count")),
    ]
    items: Annotated[
        tuple[Annotated[HistoryItem, BeforeValidator(_object_or_nothing)], ...],
        BeforeValidator(_nothing_as_empty),
        Field(max_length=1000),  # a page has at most 100; hundreds of thousands would hold up the worker
    ] = ()


class HistoryDetail(BaseModel):
    """One entry in full: ``args`` are the query parameters of its request and ``content`` is the request's body."""

    model_config = ConfigDict(frozen=True)

    args: Annotated[dict[str, Any], BeforeValidator(_object_or_nothing)]
    content: Any = None
