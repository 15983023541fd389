"""The reply that the worker publishes: the outcome of one command."""

from typing import Any, Literal, get_args

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from schemas.command import CommandId, Imei

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
MEANINGS: dict[str, str] = {
    "onenet_rejected": "OneNET said no: `error.errno`, `error.message`",
    "http_rejected": "something else said no: an HTTP status without OneNET's JSON, or a redirect (never followed)",
    "invalid_message": "the body is not a JSON object in UTF-8 of at most 64 KiB, or is ambiguous",
    "invalid_command": "a field breaks its rule: `error.details` names it",
    "unknown_product": "no credentials are configured for the product",
    "expired": "`expired_time` has passed, or would have before the next attempt",
    "retries_exhausted": "OneNET took none of its requests, as often as it was tried",
    "outcome_unknown": "the answer was lost, and the history could not decide: OneNET may have cached the command, or "
    "may not",
    "poison_message": "the worker ended each time it tried this command",
    "command_id_conflict": "the id belongs to a command with another content",
}
_NULL = {"type": "null"}
# What goes together; the worker has a type of its own for each (worker/core/outcome.py).
_OUTCOMES: list[Any] = [
    {"properties": {"status": {"const": "accepted"}, "uuid": {"type": "string", "minLength": 1}, "error": _NULL}},
    {
        "properties": {
            "status": {"const": "rejected"},
            "uuid": _NULL,
            "recovered": {"const": False},
            "error": {
                "type": "object",
                "properties": {"code": {"enum": list(get_args(RejectionCode))}, "details": _NULL},
            },
        }
    },
    {
        "properties": {
            "status": {"const": "failed"},
            "uuid": _NULL,
            "recovered": {"const": False},
            "error": {"type": "object", "properties": {"code": {"enum": list(get_args(FailureCode))}, "errno": _NULL}},
        }
    },
]
_ACCEPTED: dict[str, Any] = {
    "command_id": "8f6c0a52-5d1e-4f5e-9a55-0d7c5f8b9f01",
    "status": "accepted",
    "uuid": "42742677-adc3-54ca-83a1-5aaaf71482f8",
    "imei": "865820030000001",
    "error": None,
    "attempts": 1,
    "recovered": False,
    "valid_time_omitted": False,
    "completed_at": "2026-11-22T08:00:00.123456Z",
}
EXAMPLES = {
    "accepted": _ACCEPTED,
    "rejected": _ACCEPTED
    | {
        "status": "rejected",
        "uuid": None,
        "error": {"code": "onenet_rejected", "message": "auth failed", "errno": 1, "details": None},
    },
    "failed": _ACCEPTED
    | {
        "status": "failed",
        "uuid": None,
        "error": {
            "code": "invalid_command",
            "message": "retry: Input should be less than or equal to 10",
            "errno": None,
            "details": [{"field": "retry", "message": "Input should be less than or equal to 10"}],
        },
    },
}


class Detail(BaseModel):
    """What is wrong with one field."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    field: str = Field(description="The field's name; empty where the message as a whole is meant.")
    message: str = Field(description="What is wrong with it, for a person to read.")


class ReplyError(BaseModel):
    """Why the command was not accepted."""

    model_config = ConfigDict(frozen=True, extra="forbid", json_schema_serialization_defaults_required=True)

    code: Literal[FailureCode, RejectionCode] = Field(
        description="What happened, for a program to read."
        + "".join(f"\n- {code}: {meaning}" for code, meaning in MEANINGS.items())
    )
    message: str = Field(description="What happened, for a person to read; of onenet_rejected it is OneNET's own text.")
    errno: int | None = Field(None, description="OneNET's error number, where it answered with one.")
    details: tuple[Detail, ...] | None = Field(None, description="The fields that are at fault.")


class Reply(BaseModel):
    """The one outcome of one command; it may arrive more than once, always the same."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        title="Execute reply",
        json_schema_serialization_defaults_required=True,
        json_schema_extra={"oneOf": _OUTCOMES, "examples": list(EXAMPLES.values())},
    )

    command_id: CommandId | None = Field(description="Null if the message had none.")
    status: Status = Field(
        description="accepted: OneNET cached the command. rejected: OneNET answered no. failed: it could not be sent, "
        "or nobody can tell whether it was; it is dead-lettered too."
    )
    uuid: str | None = Field(None, description="The cached command's uuid, where OneNET accepted it.")
    imei: Imei | None = Field(None, description="The command's device; null if the message names none.")
    error: ReplyError | None = Field(None, description="Why the command was not accepted; null if it was.")
    attempts: int = Field(ge=1, description="The attempt on which the outcome was reached; the first is 1.")
    recovered: bool = Field(
        False, description="The uuid was found in the device's command history instead of read from the answer."
    )
    valid_time_omitted: bool = Field(
        False, description="valid_time had passed when the request was sent, so it was left out."
    )
    completed_at: AwareDatetime = Field(description="When the outcome was reached, UTC.")
