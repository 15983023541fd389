"""The headers of the contract: those that upstream systems may set, and those of a dead letter.

These models document headers and validate none: a command must not fail because of a header of a wrong type.
"""

from typing import Any

from pydantic import AwareDatetime, BaseModel, Field, Json
from pydantic.json_schema import SkipJsonSchema

from schemas.reply import Detail, FailureCode

# A header is present or absent, never null.
OptionalText = str | SkipJsonSchema[None]

EXAMPLE = {
    "x-onenet-reason": "invalid_command",
    "x-onenet-error": "retry: Input should be less than or equal to 10",
    "x-onenet-details": '[{"field": "retry", "message": "Input should be less than or equal to 10"}]',
    "x-onenet-attempt": 1,
    "x-onenet-failed-at": "2026-11-22T08:00:00.123+00:00",
    "x-onenet-worker": "worker-1:42",
}


class TraceHeaders(BaseModel):
    """The trace that a message belongs to (W3C Trace Context). Other headers are allowed."""

    traceparent: OptionalText = Field(None, description="Trace and parent span of the message.")
    tracestate: OptionalText = Field(None, description="State that tracing systems add.")


class DeadLetterHeaders(TraceHeaders):
    """Why a command was dead-lettered, besides the headers it arrived with."""

    reason: FailureCode = Field(
        alias="x-onenet-reason", title="FailureCode", description="The error code; it also ends the routing key."
    )
    error: str = Field(alias="x-onenet-error", description="What happened, as text for people.")
    details: Json[tuple[Detail, ...]] = Field(
        alias="x-onenet-details", description="The invalid fields, as JSON; as many as fit into a header."
    )
    attempt: int = Field(alias="x-onenet-attempt", ge=1, description="The attempt that failed; the first is 1.")
    failed_at: AwareDatetime = Field(alias="x-onenet-failed-at", description="When it failed, UTC.")
    worker: str = Field(alias="x-onenet-worker", description="The worker that dead-lettered it.")
    expiration: OptionalText = Field(
        None, alias="x-onenet-expiration", description="AMQP property expiration of the original message."
    )
    user_id: OptionalText = Field(
        None, alias="x-onenet-user-id", description="AMQP property user_id of the original message."
    )
    cc: Any = Field(None, alias="x-onenet-cc", description="Header CC of the original message.")
    headers_dropped: OptionalText = Field(
        None,
        alias="x-onenet-headers-dropped",
        description="Present only if headers of the original message were left out, and says which.",
    )
