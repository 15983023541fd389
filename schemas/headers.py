"""The headers that the contract names: what others may set, and what a dead letter says of itself.

They describe and do not check: a header of a wrong type must never be what a command fails for.
"""

from typing import Any

from pydantic import AwareDatetime, BaseModel, Field, Json
from pydantic.json_schema import SkipJsonSchema

from schemas.reply import Detail, FailureCode

# A header is there or it is not: none is ever null.
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
    """The trace that a message belongs to, as the W3C's Trace Context has it; other headers are free."""

    traceparent: OptionalText = Field(None, description="The trace and the span that the message comes from.")
    tracestate: OptionalText = Field(None, description="What the tracing systems add to it.")


class DeadLetterHeaders(TraceHeaders):
    """Why a command was set aside, next to the headers that it came with."""

    reason: FailureCode = Field(alias="x-onenet-reason", description="The error code; the routing key ends in it.")
    error: str = Field(alias="x-onenet-error", description="What happened, for a person to read.")
    details: Json[tuple[Detail, ...]] = Field(
        alias="x-onenet-details", description="The fields that are at fault, as JSON: as many as a header can carry."
    )
    attempt: int = Field(alias="x-onenet-attempt", ge=1, description="The attempt on which it failed; the first is 1.")
    failed_at: AwareDatetime = Field(alias="x-onenet-failed-at", description="When it failed, UTC.")
    worker: str = Field(alias="x-onenet-worker", description="Which worker set it aside.")
    expiration: OptionalText = Field(
        None, alias="x-onenet-expiration", description="The message's own property expiration."
    )
    user_id: OptionalText = Field(None, alias="x-onenet-user-id", description="The message's own property user_id.")
    cc: Any = Field(None, alias="x-onenet-cc", description="The message's own header CC.")
    headers_dropped: OptionalText = Field(
        None,
        alias="x-onenet-headers-dropped",
        description="There only if the message's own headers could not be published.",
    )
