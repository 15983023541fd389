"""The platform's answers, as far as the worker reads them.

Source: the pages of ``POST /nbiot/execute/offline`` and of the command history next to it. Of an answer to a command
only ``errno`` decides, so only it must be what the page says; whatever else is odd counts as absent. Of the history
everything decides, so what cannot be read there is an error, within the oddities that the page itself shows.
"""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _text_or_nothing(value: object) -> object:
    return value.strip() if isinstance(value, str) else ""


def _object_or_nothing(value: object) -> object:
    return value if isinstance(value, dict) else {}


def _as_text(value: object) -> object:
    """Take a number for its text, since the platform writes some either way, and nothing for absence."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str):
        return value.strip() or None
    return value


Text = Annotated[str, BeforeValidator(_text_or_nothing)]
Scalar = Annotated[str | None, BeforeValidator(_as_text)]


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
    """One cached command in a device's history; times are the platform's local ones."""

    model_config = ConfigDict(frozen=True)

    cmd_uuid: Annotated[str, BeforeValidator(_as_text)]
    type: Annotated[str, BeforeValidator(_as_text)]
    create_time: Annotated[str, BeforeValidator(_as_text)]
    expired_time: Scalar = None
    trigger_msg: Scalar = None


class HistoryPage(BaseModel):
    """One page of a device's history."""

    model_config = ConfigDict(frozen=True)

    total_count: Annotated[int, Field(ge=0)]
    items: tuple[HistoryItem, ...]


class HistoryDetail(BaseModel):
    """One cached command: ``args`` are the query parameters and ``content`` is the body that it was made with."""

    model_config = ConfigDict(frozen=True)

    args: dict[str, Any]
    content: Any = None


class HistoryAnswer(BaseModel):
    """The answer of the history's endpoints."""

    model_config = ConfigDict(frozen=True)

    errno: int
    error: Text = ""
    data: Any = None
