"""What the platform's responses mean for a command and for a read of the history. Pure.

Source: the platform's page of ``POST /nbiot/execute/offline``; its error tables are in ``errno``.
"""

from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus

from pydantic import ValidationError

from schemas.onenet import ExecuteAnswer
from worker.core.answer import Answer, Cached, InDoubt, NotSent, Refused
from worker.errors import HistoryUnreadable
from worker.onenet.errno import SUCCESS, Kind, kind_of

_MAX_MESSAGE_CHARS = 500
_MAX_REASON_CHARS = 200


def interpret(status: int, body: bytes, retry_after: str | None, now: datetime) -> Answer:
    """Return what one HTTP response means for the command.

    Args:
        status: the HTTP status.
        body: the complete body.
        retry_after: the Retry-After header.
        now: when the response arrived, timezone-aware.
    """
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return InDoubt(f"HTTP {status}")
    is_success = status < HTTPStatus.MULTIPLE_CHOICES
    answer = read_answer(body)
    if answer is None:
        if status == HTTPStatus.TOO_MANY_REQUESTS:
            return _too_many_requests(retry_after, now)
        if is_success:
            return InDoubt(f"HTTP {status} with an unreadable body")
        # Includes redirects, which are never followed.
        return Refused("http_rejected", f"HTTP {status}", may_concern_all_devices=True)
    if answer.data.uuid:  # the command was cached, whatever errno says
        return Cached(answer.data.uuid) if is_success else InDoubt(f"HTTP {status} with a uuid")
    if answer.errno == SUCCESS:
        return InDoubt(f"HTTP {status} with errno 0, but without a uuid")
    text = answer.error[:_MAX_MESSAGE_CHARS]
    match kind_of(answer.errno, answer.error):
        case Kind.OUTAGE:
            return InDoubt(f"errno {answer.errno}: {text}")
        case Kind.DEVICE_TROUBLE:
            return InDoubt(f"errno {answer.errno}: {text}", is_outage=False)
        case Kind.THROTTLED:
            return NotSent(f"errno {answer.errno}: {text}", retry_after_s(retry_after, now), is_throttled=True)
        case _ if status == HTTPStatus.TOO_MANY_REQUESTS:
            return _too_many_requests(retry_after, now)
        case kind:
            is_credentials = kind is Kind.CREDENTIALS
            return Refused("onenet_rejected", text, answer.errno, may_concern_all_devices=is_credentials)


def _too_many_requests(retry_after: str | None, now: datetime) -> NotSent:
    return NotSent("HTTP 429: too many requests", retry_after_s(retry_after, now))


def read_answer(body: bytes) -> ExecuteAnswer | None:
    """Read the platform's JSON; None: the body is something else."""
    try:
        return ExecuteAnswer.model_validate_json(body.decode("utf-8", "replace"))
    except ValidationError:
        return None


def history_error(errno: int, text: str, asked_s: float | None = None) -> HistoryUnreadable:
    """Return what an error of the platform means for a read of the history.

    Args:
        errno: the error number, not 0.
        text: the platform's error text.
        asked_s: the wait in seconds that the platform asked for, if any.
    """
    reason = f"errno {errno}: {text[:_MAX_REASON_CHARS]}"
    match kind_of(errno, text):
        case Kind.OUTAGE:
            return HistoryUnreadable(reason, is_outage=True)
        case Kind.CREDENTIALS:
            return HistoryUnreadable(reason, is_refused=True)
        case Kind.THROTTLED:
            return HistoryUnreadable(reason, is_throttled=True, retry_after_s=asked_s or 0.0)
        case _:
            return HistoryUnreadable(reason)


def http_history_error(status: int, body: bytes, asked_s: float | None) -> HistoryUnreadable:
    """Return what an HTTP status other than 200 means for a read of the history.

    Args:
        status: the HTTP status.
        body: the complete body.
        asked_s: the wait in seconds that the Retry-After header asks for, if any.
    """
    reason = f"HTTP {status}"
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        return HistoryUnreadable(f"{reason}: too many requests", is_throttled=True, retry_after_s=asked_s or 0.0)
    answer = read_answer(body)
    if status < HTTPStatus.MULTIPLE_CHOICES or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return HistoryUnreadable(reason, is_outage=True)
    if answer is None:
        return HistoryUnreadable(reason, is_refused=True)
    if answer.errno == SUCCESS:
        return HistoryUnreadable(f"{reason} with errno 0")
    return history_error(answer.errno, answer.error, asked_s)


def answered_at(date: str | None, now: datetime) -> datetime:
    """Return when a response was made, by its own Date header; ``now``, our time, if it has none that can be used.

    A Retry-After in the form of a date is on the same clock, which may be far from ours.
    """
    try:
        moment = parsedate_to_datetime(date or "")
    except (ValueError, OverflowError):
        return now
    return moment if moment.tzinfo is not None else now


def retry_after_s(value: str | None, now: datetime) -> float | None:
    """Return the seconds that a Retry-After header asks for, in either of its forms; None for anything else.

    Source: https://www.rfc-editor.org/rfc/rfc9110#field.retry-after
    """
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        moment = parsedate_to_datetime(value)
    except (ValueError, OverflowError):
        return None
    return max(0.0, (moment.replace(tzinfo=moment.tzinfo or UTC) - now).total_seconds())
