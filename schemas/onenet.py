"""The platform's answers, as far as the worker reads them.

Source: the pages of ``POST /nbiot/execute/offline`` and of the command history next to it. Of an answer to a command
only ``errno`` decides, so only it must be what the page says; whatever else is odd counts as absent. Of the history
everything decides: an answer that is not one is an error, and the fields of its entries are kept as they are, since
how a field is written proves nothing.
"""

import re
from decimal import Decimal
from typing import Annotated, Any

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field

_MAX_UUID_CHARS = 200
_MAX_UUID_NUMBER = 10**40
_NUMBER = re.compile(r"[+-]?[0-9]{1,20}(?:\.[0-9]{1,20})?(?:[eE][+-]?[0-9]{1,2})?\Z")


def whole_number(value: object) -> int | None:
    """Return the whole number that a JSON value stands for, as 3, 3.0, "3" or "3e0"; None if there is none."""
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


def _text_or_nothing(value: object) -> object:
    return value.strip() if isinstance(value, str) else ""


def _object_or_nothing(value: object) -> object:
    return value if isinstance(value, dict) else {}


def _name(value: object) -> str:
    """Return what an entry is named by, empty if it has no usable name: a number is taken for its text."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < _MAX_UUID_NUMBER:
        return str(value)
    text = value.strip() if isinstance(value, str) else ""
    return text if len(text) <= _MAX_UUID_CHARS and text.isprintable() else ""


def _number_or_same(value: object) -> object:
    number = whole_number(value)
    return value if number is None else number


def _nothing_as_empty(value: object) -> object:
    return () if value is None else value


Text = Annotated[str, BeforeValidator(_text_or_nothing)]


class ExecuteData(BaseModel):
    """The part of an accepting answer that identifies the cached command."""

    model_config = ConfigDict(frozen=True)

    uuid: Text = ""


class ExecuteAnswer(BaseModel):
    """What every endpoint answers with: ``errno`` 0 means accepted."""

    model_config = ConfigDict(frozen=True, strict=True)

    errno: int
    error: Text = ""
    data: Annotated[ExecuteData, BeforeValidator(_object_or_nothing)] = ExecuteData()


class HistoryItem(BaseModel):
    """One cached command in a device's history, with the fields as they are written; times are the platform's local.

    ``cmd_uuid`` is empty where the entry is not named.
    """

    model_config = ConfigDict(frozen=True)

    cmd_uuid: Annotated[str, BeforeValidator(_name)] = ""
    type: Any = None
    create_time: Any = None
    valid_time: Any = None
    expired_time: Any = None
    trigger_msg: Any = None


class HistoryPage(BaseModel):
    """One page of a device's history. An entry that is no object has no fields."""

    model_config = ConfigDict(frozen=True)

    total_count: Annotated[
        int,
        BeforeValidator(_number_or_same),
        Field(ge=0, strict=True, validation_alias=AliasChoices("total_count", "count")),
    ]
    items: Annotated[
        tuple[Annotated[HistoryItem, BeforeValidator(_object_or_nothing)], ...], BeforeValidator(_nothing_as_empty)
    ] = ()


class HistoryDetail(BaseModel):
    """One cached command: ``args`` are the query parameters and ``content`` is the body that it was made with."""

    model_config = ConfigDict(frozen=True)

    args: Annotated[dict[str, Any], BeforeValidator(_object_or_nothing)]
    content: Any = None


class HistoryAnswer(BaseModel):
    """The answer of the history's endpoints."""

    model_config = ConfigDict(frozen=True)

    errno: int
    error: Text = ""
    data: Any = None
