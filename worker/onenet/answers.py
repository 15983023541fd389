"""What the platform's answer to a cached Execute command means. Pure.

Source: the platform's page of ``POST /nbiot/execute/offline`` and its table of errno.
"""

from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus

from pydantic import ValidationError

from schemas.onenet import ExecuteAnswer
from worker.answer import Answer, Cached, InDoubt, NotSent, Refused

SUCCESS = 0
AUTH_FAILED = 1  # the key and the device do not match, or the key is wrong
INTERNAL_ERROR = 7  # internal backlog
RPC_RESPONSE_ERROR = 5108  # this number is also used for an invalid parameter: the text tells
RPC_ERROR = 5117
OUTAGES = frozenset({INTERNAL_ERROR, RPC_ERROR})
UNAUTHORIZED = frozenset({HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.PROXY_AUTHENTICATION_REQUIRED})
_MAX_MESSAGE_CHARS = 500


def interpret(status: int, body: bytes, retry_after: str | None, now: datetime) -> Answer:
    """Return what one HTTP answer means for the command.

    Args:
        status: the HTTP status.
        body: the whole body.
        retry_after: the header of that name.
        now: when the answer came, aware.
    """
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        return NotSent("HTTP 429: too many requests", retry_after_s(retry_after, now))
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return InDoubt(f"HTTP {status}")
    try:
        answer = ExecuteAnswer.model_validate_json(body.decode("utf-8", "replace"))
    except ValidationError:
        if status < HTTPStatus.MULTIPLE_CHOICES:
            return InDoubt(f"HTTP {status} with an answer that cannot be read")
        # A redirect too: it is never followed.
        return Refused("http_rejected", f"HTTP {status}", is_unauthorized=status in UNAUTHORIZED)
    if answer.errno != SUCCESS:
        return _refusal(answer)
    if status < HTTPStatus.MULTIPLE_CHOICES and answer.data.uuid:
        return Cached(answer.data.uuid)
    return InDoubt(f"HTTP {status} with errno 0, but without a uuid")


def _refusal(answer: ExecuteAnswer) -> Answer:
    text = answer.error[:_MAX_MESSAGE_CHARS]
    says_invalid = "invalid parameter" in text.lower() and "rpc response error" not in text.lower()
    if answer.errno in OUTAGES or (answer.errno == RPC_RESPONSE_ERROR and not says_invalid):
        return InDoubt(f"errno {answer.errno}: {text}", is_outage=answer.errno in OUTAGES)
    return Refused("onenet_rejected", text, answer.errno, is_unauthorized=answer.errno == AUTH_FAILED)


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
