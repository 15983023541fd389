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
    "onenet_rejected": "OneNET refused the command: `error.errno`, `error.message`",
    "http_rejected": "the HTTP request was refused without an answer from OneNET: a status without OneNET's JSON, or a "
    "redirect, which is never followed",
    "invalid_message": "the body is not one unambiguous JSON object in UTF-8 of at most 64 KiB",
    "invalid_command": "a field is invalid: `error.details` names it",
    "unknown_product": "no credentials are configured for the product",
    "expired": "`expired_time` has passed, or would pass before the next attempt",
    "retries_exhausted": "all attempts failed; none of them was cached",
    "outcome_unknown": "the answer was lost and the device's history could not decide: OneNET may or may not have "
    "cached the command",
    "poison_message": "each attempt crashed its worker",
    "command_id_conflict": "the id was already used for a command with other content",
}
_NULL = {"type": "null"}
# Which values may occur together; worker/core/outcome.py has a type for each.
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
_TOGETHER = """Which values occur together:
- accepted: uuid is set, and error is null
- rejected: error is set, with a code that ends in _rejected and without details; uuid is null, recovered is false
- failed: error is set, with one of the other codes and without errno; uuid is null, recovered is false"""
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
            "message": "retry: must be a whole number from 0 to 10",
            "errno": None,
            "details": [{"field": "retry", "message": "must be a whole number from 0 to 10"}],
        },
    },
}


def _complete(schema: dict[str, Any]) -> None:
    schema["description"] += f"\n\n{_TOGETHER}"
    # Not `oneOf` beside the properties: generators of code make a class of each alternative then. These they pass over.
    schema["dependentSchemas"] = {"status": {"oneOf": _OUTCOMES}}
    schema["examples"] = list(EXAMPLES.values())


class Detail(BaseModel):
    """The error of one field."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    field: str = Field(description="Name of the field; empty if the message as a whole is invalid.")
    message: str = Field(description="What is wrong, as text for people.")


class ReplyError(BaseModel):
    """Why the command was not accepted."""

    model_config = ConfigDict(frozen=True, extra="forbid", json_schema_serialization_defaults_required=True)

    code: Literal[FailureCode, RejectionCode] = Field(
        title="ErrorCode",
        description="What happened, as a code for programs."
        + "".join(f"\n- {code}: {meaning}" for code, meaning in MEANINGS.items()),
    )
    message: str = Field(description="What happened, as text for people; with onenet_rejected it is OneNET's own text.")
    errno: int | None = Field(None, description="Error number of OneNET, if it answered with one.")
    details: tuple[Detail, ...] | None = Field(None, description="The invalid fields.")


class Reply(BaseModel):
    """The outcome of one command. There is exactly one; its reply may arrive more than once."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        title="Execute reply",
        json_schema_serialization_defaults_required=True,
        json_schema_extra=_complete,
    )

    command_id: CommandId | None = Field(description="Id of the command; null if the message has none.")
    status: Status = Field(
        title="ReplyStatus",
        description="accepted: OneNET cached the command. rejected: OneNET, or something in front of it, refused the "
        "command. failed: it was not sent, or it is unknown whether it was cached; it is dead-lettered too.",
    )
    uuid: str | None = Field(None, description="Uuid of the cached command; null unless status is accepted.")
    imei: Imei | None = Field(None, description="Device of the command; null if the message names none.")
    error: ReplyError | None = Field(None, description="Why the command was not accepted; null if it was accepted.")
    attempts: int = Field(ge=1, description="Number of the attempt that led to the outcome; the first is 1.")
    recovered: bool = Field(
        False, description="Whether the uuid was found in the device's command history, because the answer was lost."
    )
    valid_time_omitted: bool = Field(
        False, description="Whether valid_time was omitted from the request, because it had passed."
    )
    completed_at: AwareDatetime = Field(description="When the outcome was reached (UTC).")
