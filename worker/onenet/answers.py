"""What the platform's responses mean for a command and for a read of the history. Pure.

Source: the platform's page of ``POST /nbiot/execute/offline``; its error texts are in ``errno``. A generation of the
platform is told by the field of the error number, so an answer of the generation that is not configured is recognized.
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus

from schemas.onenet import has_uuid, whole_number
from worker.core.answer import Answer, Cached, InDoubt, NotSent, Refused
from worker.errors import HistoryUnreadable
from worker.onenet.dialect import Dialect, Envelope
from worker.onenet.errno import SUCCESS, Kind
from worker.onenet.response import Response
from worker.onenet.unambiguous_json import read_json
from worker.onenet.v1 import V1
from worker.onenet.v2 import V2

DIALECTS = {dialect.generation: dialect for dialect in (V1, V2)}
_MAX_MESSAGE_CHARS = 500
_MAX_REASON_CHARS = 200
_YEARS = range(1970, 3000)
_MAX_CODE = 2**31 - 1
_MAX_WAIT_S = 24 * 3600.0  # a longer one is a mistake


def interpret(response: Response, dialect: Dialect, now: datetime, *, is_proven: bool) -> Answer:
    """Return what one HTTP response means for the command.

    Args:
        response: the response.
        dialect: the generation of the platform that is configured.
        now: when the response arrived, timezone-aware.
        is_proven: the platform has accepted a command in the configured generation. An answer of the other one is then
            no sign of wrong settings.
    """
    status = response.status
    is_success = status < HTTPStatus.MULTIPLE_CHOICES
    answer = read_answer(response.body, dialect)
    if answer is not None and answer.dialect is not dialect and not is_proven and not answer.has_uuid:
        return _misconfigured(response, answer, dialect, now)
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return InDoubt(response.description)
    if answer is None:
        is_unclear = is_success or _may_say_cached(response.body)
        if status == HTTPStatus.TOO_MANY_REQUESTS and not is_unclear:
            return _too_many_requests(response, now)
        if is_unclear:
            return InDoubt(f"the response is not OneNET's JSON: {response.description}")
        # Includes redirects, which are never followed.
        return Refused("http_rejected", response.description, may_concern_all_devices=True)
    if answer.uuid:  # the command was cached, whatever the code and the generation of the platform
        return Cached(answer.uuid) if is_success else InDoubt(f"HTTP {status} with a uuid")
    is_foreign = answer.dialect is not dialect
    if answer.code != SUCCESS and answer.has_uuid:
        return InDoubt(f"{answer.dialect.code_name} {answer.code}, with a uuid in an unknown form")
    if answer.code != SUCCESS and _says_success(answer.others):
        return InDoubt(f"{answer.dialect.code_name} {answer.code}, with success in the form of another generation")
    if answer.code == SUCCESS:
        hint = f"{foreign_answer(answer.dialect, dialect)}; " if is_foreign else ""
        return InDoubt(f"{hint}HTTP {status} with {answer.dialect.code_name} 0, but without a usable uuid")
    text = response.redacted(answer.text, _MAX_MESSAGE_CHARS)
    error = answer.dialect.error(answer.code, text)
    if is_foreign:
        error = f"{foreign_answer(answer.dialect, dialect)}; {error}"
    match answer.kind:
        case Kind.OUTAGE:
            return InDoubt(error)
        case Kind.DEVICE_TROUBLE:
            return InDoubt(error, is_outage=False)
        case Kind.THROTTLED if not is_foreign:
            return NotSent(error, asked_wait_s(response, now), is_throttled=True)
        case _ if status == HTTPStatus.TOO_MANY_REQUESTS:
            return _too_many_requests(response, now)
        case _ if is_foreign:
            return _misconfigured(response, answer, dialect, now)
        case kind:
            return Refused(
                "onenet_rejected",
                text,
                answer.code,
                may_concern_all_devices=kind is Kind.CREDENTIALS,
                is_limit=kind is Kind.LIMIT,
            )


def _misconfigured(response: Response, answer: Envelope, dialect: Dialect, now: datetime) -> Answer:
    """Return the error that ``ONENET_API`` is wrong: the platform has no command, for it does not know the path."""
    if response.status == HTTPStatus.TOO_MANY_REQUESTS and answer.code != SUCCESS:
        return _too_many_requests(response, now)
    text = answer.dialect.error(answer.code, response.redacted(answer.text, _MAX_MESSAGE_CHARS))
    # Only what the platform refused for certain may be sent again while the product is paused.
    is_refused = (
        response.status < HTTPStatus.INTERNAL_SERVER_ERROR
        and answer.code != SUCCESS
        and answer.kind not in {Kind.OUTAGE, Kind.DEVICE_TROUBLE}
    )
    return Refused(
        "onenet_rejected",
        f"{foreign_answer(answer.dialect, dialect)}; {text}",
        answer.code,
        may_concern_all_devices=is_refused,
        is_misconfigured=True,
    )


def _may_say_cached(body: bytes) -> bool:
    """Tell whether a body that is no answer of OneNET's has a uuid, or success as a number in another notation.

    Another parser may read what begins as JSON but cannot be read here: it may say anything.
    """
    text = body.decode("utf-8", "replace")
    try:
        value = read_json(text)
    except ValueError:
        if text.lstrip("\ufeff \t\r\n").startswith(("{", "[")):
            return True
        value = text
    if isinstance(value, dict) and (_says_success(value) or has_uuid(value.get("data"), or_bare=True)):
        return True
    return has_uuid(value)


def _says_success(fields: Mapping[str, object]) -> bool:
    return any(whole_number(fields.get(each.code_name)) == SUCCESS for each in DIALECTS.values())


def _too_many_requests(response: Response, now: datetime) -> NotSent:
    return NotSent("HTTP 429: too many requests", asked_wait_s(response, now))


def is_json(response: Response) -> bool:
    """Tell whether a response says that it is JSON, as OneNET's answers are; error pages are not."""
    return (response.header("content-type") or "").lower().startswith("application/json")


def is_written_in(dialect: Dialect, response: Response) -> bool:
    """Tell whether a response is an answer of a generation of the platform."""
    answer = read_answer(response.body, dialect)
    return answer is not None and answer.dialect is dialect


def foreign_answer(found: Dialect, configured: Dialect) -> str:
    """Say that the platform answers like the generation that is not configured."""
    return f"ONENET_API: the platform answers as {found.generation}, but {configured.generation} is configured for it"


def read_answer(body: bytes | str, dialect: Dialect, *, is_strict: bool = True) -> Envelope | None:
    """Read the platform's JSON; None: the body is something else, has a name twice, or too many values.

    Args:
        body: the complete body.
        dialect: the generation of the platform that is configured; an answer of the other one is recognized too.
        is_strict: an error number must be a number; otherwise it may be written as text.
    """
    try:
        value = read_json(body.decode("utf-8", "replace") if isinstance(body, bytes) else body)
    except ValueError:
        return None
    if not isinstance(value, dict):
        return None
    if dialect.code_name not in value:
        dialect = next((each for each in DIALECTS.values() if _is_written_in(each, value)), dialect)
    if not _is_marked(dialect, value):
        return None
    code, text = value.get(dialect.code_name), value.get(dialect.text_name)
    if is_strict and (not isinstance(code, int) or isinstance(code, bool)):
        return None
    number = whole_number(code)
    if number is None or abs(number) > _MAX_CODE:
        return None
    known = (dialect.code_name, dialect.text_name, "data")
    others = {name: each for name, each in value.items() if name not in known}
    return Envelope(dialect, number, text.strip() if isinstance(text, str) else "", value.get("data"), others)


def _is_written_in(dialect: Dialect, answer: Mapping[str, object]) -> bool:
    """Tell whether an answer is one of a generation, and not the similar JSON of a gateway."""
    return dialect.code_name in answer and dialect.text_name in answer and _is_marked(dialect, answer)


def _is_marked(dialect: Dialect, answer: Mapping[str, object]) -> bool:
    code, data = answer.get(dialect.code_name), answer.get("data")
    is_own = code == SUCCESS or code in dialect.own_codes or dialect.mark in answer
    return is_own or (isinstance(data, dict) and "uuid" in data)


def history_error(response: Response, answer: Envelope, dialect: Dialect, asked_s: float | None) -> HistoryUnreadable:
    """Return what an error of the platform means for a read of the history.

    Args:
        response: the response.
        answer: its content; its error number is not 0, or it is of another generation than the configured one.
        dialect: the generation of the platform that is configured.
        asked_s: the wait in seconds that the platform asked for, if any.
    """
    reason = answer.dialect.error(answer.code, response.redacted(answer.text, _MAX_REASON_CHARS))
    if answer.dialect is not dialect:
        return HistoryUnreadable(f"{foreign_answer(answer.dialect, dialect)}; {reason}", is_refused=True)
    match answer.kind:
        case Kind.OUTAGE:
            return HistoryUnreadable(reason, is_outage=True)
        case Kind.CREDENTIALS:
            return HistoryUnreadable(reason, is_refused=True)
        case Kind.THROTTLED:
            return HistoryUnreadable(reason, is_throttled=True, retry_after_s=asked_s or 0.0)
        case _:
            return HistoryUnreadable(reason)


def http_history_error(response: Response, dialect: Dialect, asked_s: float | None) -> HistoryUnreadable:
    """Return what an HTTP status other than 200 means for a read of the history.

    Args:
        response: the response.
        dialect: the generation of the platform that is configured.
        asked_s: the wait in seconds that the Retry-After header asks for, if any.
    """
    status = response.status
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        reason = f"HTTP {status}: too many requests"
        return HistoryUnreadable(reason, is_throttled=True, retry_after_s=asked_s or 0.0)
    answer = read_answer(response.body, dialect)
    if status < HTTPStatus.MULTIPLE_CHOICES or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return HistoryUnreadable(response.description, is_outage=True)
    if answer is None:
        return HistoryUnreadable(response.description, is_refused=True)
    if answer.code == SUCCESS and answer.dialect is dialect:
        return HistoryUnreadable(f"HTTP {status} with {dialect.code_name} 0")
    return history_error(response, answer, dialect, asked_s)


def asked_wait_s(response: Response, now: datetime) -> float | None:
    """Return the seconds that a response's Retry-After asks for, in either of its forms; None for anything else.

    A wait of more than a day is none. A date is measured against the Date of the same response: its clock may be far
    from ours.
    Source: https://www.rfc-editor.org/rfc/rfc9110#field.retry-after

    Args:
        response: the response.
        now: when it arrived, timezone-aware.
    """
    value = response.header("retry-after") or ""
    if value.strip().isdecimal():
        wait_s = float(value)  # infinite for hundreds of digits
    elif (until := http_date(value)) is not None:
        wait_s = max(0.0, (until - (http_date(response.header("date") or "") or now)).total_seconds())
    else:
        return None
    return wait_s if wait_s <= _MAX_WAIT_S else None


def http_date(value: str) -> datetime | None:
    """Return the moment that a date of HTTP stands for; None if the text is none, or no clock can show it.

    Sums with a date at the end of what a datetime can hold would overflow.
    """
    try:
        moment = parsedate_to_datetime(value)
    except (ValueError, OverflowError):
        return None
    return moment.replace(tzinfo=moment.tzinfo or UTC) if moment.year in _YEARS else None
