"""The result that the worker publishes: what became of one accepted command."""

from typing import Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from schemas.command import CommandId, Imei

ResultKind = Literal["executed", "failed", "expired", "cancelled", "unknown"]
MEANINGS: dict[ResultKind, str] = {
    "executed": "the device executed the command and said so",
    "failed": "the command was sent to the device, which refused it or did not answer: `confirm_status`",
    "expired": "the command was not delivered before `expired_time`",
    "cancelled": "the command was cancelled at the platform",
    "unknown": "a day after `expired_time` the platform had no final state, or its history could not be read",
}
EXAMPLE: dict[str, Any] = {
    "command_id": "8f6c0a52-5d1e-4f5e-9a55-0d7c5f8b9f01",
    "uuid": "42742677-adc3-54ca-83a1-5aaaf71482f8",
    "imei": "865820030000001",
    "result": "executed",
    "confirm_status": "SUCCESS",
    "sent_at": "2026-11-22T09:14:02Z",
    "confirmed_at": "2026-11-22T09:14:05Z",
    "observed_at": "2026-11-22T09:15:00.123456Z",
}


class Result(BaseModel):
    """What became of one accepted command. There is exactly one; it may arrive more than once."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        title="Execute result",
        json_schema_serialization_defaults_required=True,
        json_schema_extra={"examples": [EXAMPLE]},
    )

    command_id: CommandId = Field(description="Id of the command.")
    uuid: str = Field(min_length=1, description="Uuid of the cached command, as in its reply.")
    imei: Imei = Field(description="Device of the command.")
    result: ResultKind = Field(
        title="ResultKind",
        description="What became of the command."
        + "".join(f"\n- {kind}: {meaning}" for kind, meaning in MEANINGS.items()),
    )
    confirm_status: str | None = Field(
        None, description="The platform's word for the device's answer, such as SUCCESS or TIME_OUT; null if none."
    )
    sent_at: AwareDatetime | None = Field(
        None, description="When the platform sent the command to the device (UTC); null if unknown."
    )
    confirmed_at: AwareDatetime | None = Field(
        None, description="When the device's answer arrived at the platform (UTC); null if unknown."
    )
    observed_at: AwareDatetime = Field(description="When the worker learned of it (UTC).")
