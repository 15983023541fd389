"""The reply that the worker publishes: the outcome of one command."""

from typing import Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

Status = Literal["accepted", "rejected", "failed"]
FailureCode = Literal[
    "invalid_message",
    "invalid_command",
    "unknown_product",
    "expired",
    "retries_exhausted",
    "outcome_unknown",
    "poison_message",
    "command_id_conflict",
]
RejectionCode = Literal["onenet_rejected", "http_rejected"]


class Detail(BaseModel):
    """What is wrong with one field."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    field: str = Field(description="The field's name; empty where the message as a whole is meant.")
    message: str


class ReplyError(BaseModel):
    """Why the command was not accepted."""

    model_config = ConfigDict(frozen=True, extra="forbid", json_schema_serialization_defaults_required=True)

    code: FailureCode | RejectionCode
    message: str
    errno: int | None = Field(None, description="OneNET's error number, where it answered with one.")
    details: tuple[Detail, ...] | None = Field(None, description="The fields that are at fault.")


class Reply(BaseModel):
    """The one outcome of one command; it may arrive more than once, always the same."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", title="Execute reply", json_schema_serialization_defaults_required=True
    )

    command_id: str | None = Field(description="Null if the message had none.")
    status: Status
    uuid: str | None = Field(None, description="The cached command's uuid, where OneNET accepted it.")
    imei: str | None = None
    error: ReplyError | None = None
    attempts: int = Field(ge=1, description="The attempt on which the outcome was reached; the first is 1.")
    recovered: bool = Field(
        False, description="The uuid was found in the device's command history instead of read from the answer."
    )
    valid_time_omitted: bool = Field(
        False, description="valid_time had passed when the request was sent, so it was left out."
    )
    completed_at: AwareDatetime = Field(description="UTC.")
