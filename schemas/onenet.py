"""The platform's answers, as far as the worker reads them. Source: the page of ``POST /nbiot/execute/offline``."""

from pydantic import BaseModel, ConfigDict


class ExecuteData(BaseModel):
    """The part of an accepting answer that identifies the cached command."""

    model_config = ConfigDict(frozen=True, str_strip_whitespace=True)

    uuid: str | None = None


class ExecuteAnswer(BaseModel):
    """What every endpoint answers with: ``errno`` 0 means accepted."""

    model_config = ConfigDict(frozen=True, strict=True)

    errno: int
    error: str = ""
    data: ExecuteData | None = None
