"""How a command ends: the closed set of outcomes that an upstream system can be told."""

from dataclasses import dataclass
from datetime import datetime
from typing import ClassVar

from schemas.reply import Detail, FailureCode, RejectionCode, Reply, ReplyError, Status


@dataclass(frozen=True, slots=True)
class Accepted:
    """OneNET cached the command. ``recovered``: the uuid was found in the device's command history."""

    status: ClassVar[Status] = "accepted"
    uuid: str
    recovered: bool = False


@dataclass(frozen=True, slots=True)
class Rejected:
    """OneNET refused the command."""

    status: ClassVar[Status] = "rejected"
    code: RejectionCode
    message: str
    errno: int | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """The command could not be sent, or it is unknown whether it was; it is dead-lettered as well."""

    status: ClassVar[Status] = "failed"
    code: FailureCode
    message: str
    details: tuple[Detail, ...] = ()


Outcome = Accepted | Rejected | Failed


def reply_to(
    outcome: Outcome,
    attempts: int,
    command_id: str | None,
    imei: str | None,
    now: datetime,
    *,
    valid_time_omitted: bool = False,
) -> Reply:
    """Return the reply that tells an outcome.

    Args:
        outcome: how the command ended.
        attempts: how many attempts were made.
        command_id: the command's id, None where none could be read.
        imei: the device, None where none could be read.
        now: when the command ended, aware.
        valid_time_omitted: ``valid_time`` had passed and was left out of the request.
    """
    error = None
    match outcome:
        case Rejected(code, message, errno):
            error = ReplyError(code=code, message=message, errno=errno)
        case Failed(failure, message, details):
            error = ReplyError(code=failure, message=message, details=details or None)
    return Reply(
        command_id=command_id,
        status=outcome.status,
        uuid=outcome.uuid if isinstance(outcome, Accepted) else None,
        imei=imei,
        error=error,
        attempts=attempts,
        recovered=isinstance(outcome, Accepted) and outcome.recovered,
        valid_time_omitted=valid_time_omitted,
        completed_at=now,
    )


def outcome_unknown(reason: str) -> Failed:
    """Return the outcome of a command that may or may not have been cached."""
    return Failed("outcome_unknown", f"OneNET may or may not have cached the command: {reason}")
