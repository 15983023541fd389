"""The platform's answers, as far as the worker reads them. Source: the page of ``POST /nbiot/execute/offline``.

Only ``errno`` decides, so only it must be what the page says; whatever else is odd counts as absent.
"""

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict


def _text_or_nothing(value: object) -> object:
    return value.strip() if isinstance(value, str) else ""


def _object_or_nothing(value: object) -> object:
    return value if isinstance(value, dict) else {}


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
