"""What differs between the two generations of the platform: paths, envelopes, credentials and codes."""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Literal

Errors = Literal["service", "api"]


class Reason(Enum):
    """Why the platform refuses a request."""

    NO_CREDENTIALS = auto()
    WRONG_CREDENTIALS = auto()
    PARAMETER_MISSING = auto()
    PARAMETER_INVALID = auto()
    TIME_NOT_ALLOWED = auto()
    BODY_MISSING = auto()
    BODY_MALFORMED = auto()
    BODY_TOO_LARGE = auto()
    DEVICE_NOT_ONLINE = auto()
    QUEUE_FULL = auto()
    NO_SUCH_COMMAND = auto()
    NOT_CANCELLABLE = auto()
    TOO_MANY_CALLS = auto()


class PlatformError(Exception):
    """The platform refuses a request. The detail follows the text of the table in the answer."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(f"{reason.name}: {detail}")
        self.reason = reason
        self.detail = detail


Table = Mapping[Reason, tuple[int, str]]

_THROTTLED = (15, "api freq out of limit")
# The table of the NB-IoT service.
_SERVICE: Table = {
    Reason.NO_CREDENTIALS: (1, "auth failed"),
    Reason.WRONG_CREDENTIALS: (1, "auth failed"),
    Reason.PARAMETER_MISSING: (3, "parameter required"),
    Reason.PARAMETER_INVALID: (5108, "invalid parameter"),
    Reason.TIME_NOT_ALLOWED: (5006, "system logic limit"),
    Reason.BODY_MISSING: (3, "parameter required"),
    Reason.BODY_MALFORMED: (3, "parameter required"),
    Reason.BODY_TOO_LARGE: (5006, "system logic limit"),
    Reason.DEVICE_NOT_ONLINE: (2001, "device not online"),
    Reason.QUEUE_FULL: (5006, "system logic limit"),
    Reason.NO_SUCH_COMMAND: (5108, "invalid parameter"),
    Reason.NOT_CANCELLABLE: (5006, "system logic limit"),
    Reason.TOO_MANY_CALLS: _THROTTLED,
}
# The table of the API layer in front of all services of the platform.
_API: Table = {
    Reason.NO_CREDENTIALS: (2, "api-key required"),
    Reason.WRONG_CREDENTIALS: (3, "token鉴权失败"),  # as a live host answered
    Reason.PARAMETER_MISSING: (7, "parameter required"),
    Reason.PARAMETER_INVALID: (6, "invalid parameter"),
    Reason.TIME_NOT_ALLOWED: (6, "invalid parameter"),
    Reason.BODY_MISSING: (9, "entity data required"),
    Reason.BODY_MALFORMED: (4, "invalid JSON"),
    Reason.BODY_TOO_LARGE: (5, "request entity too large"),
    Reason.DEVICE_NOT_ONLINE: (10, "device not online"),
    Reason.QUEUE_FULL: (13, "system limit"),
    Reason.NO_SUCH_COMMAND: (8, "not found"),
    Reason.NOT_CANCELLABLE: (16, "unsuccess"),
    Reason.TOO_MANY_CALLS: _THROTTLED,
}
# Of the second generation only the codes are public. Which of them answers a full queue or too many calls is inferred.
_V2: Table = {
    Reason.NO_CREDENTIALS: (10403, "authentication failed"),
    Reason.WRONG_CREDENTIALS: (10403, "authentication failed"),
    Reason.PARAMETER_MISSING: (10001, "parameter error"),
    Reason.PARAMETER_INVALID: (10001, "parameter error"),
    Reason.TIME_NOT_ALLOWED: (10001, "parameter error"),
    Reason.BODY_MISSING: (10001, "parameter error"),
    Reason.BODY_MALFORMED: (10001, "parameter error"),
    Reason.BODY_TOO_LARGE: (10001, "parameter error"),
    Reason.DEVICE_NOT_ONLINE: (10421, "device not online"),
    Reason.QUEUE_FULL: (10407, "operation failed: system limit"),
    Reason.NO_SUCH_COMMAND: (10407, "operation failed: not found"),
    Reason.NOT_CANCELLABLE: (10407, "operation failed"),
    Reason.TOO_MANY_CALLS: (10407, "operation failed: api freq out of limit"),
}
_QUEUE_FULL = {5006: "system logic limit", 13: "system limit"}
_CHINESE = {1: "鉴权失败", 3: "token鉴权失败", 7: "服务内部错误", 15: "api调用频率超出限制", 2001: "设备不在线"}


@dataclass(frozen=True, slots=True)
class Dialect:
    """One generation of the platform."""

    prefix: str
    code: str
    text: str
    token_version: str
    resources: frozenset[str]  # what a token may be signed for
    takes_api_key: bool
    has_request_id: bool

    def success(self, data: object = None) -> dict[str, object]:
        """Return the answer to a request that was carried out."""
        found: dict[str, object] = {self.code: 0} | ({} if data is None else {"data": data}) | {self.text: "succ"}
        return found | self._request_id()

    def failure(self, code: int, text: str) -> dict[str, object]:
        """Return the answer with a code other than 0. Its HTTP status is 200, as of every answer."""
        return {self.code: code, self.text: text} | self._request_id()

    def refusal(self, error: PlatformError, errors: Errors, queue_errno: int | None) -> dict[str, object]:
        """Return the answer to a request that was refused.

        Args:
            error: why it was refused.
            errors: the table of codes of the first generation.
            queue_errno: the code of a full queue in the first generation: 5006, 13, or None for that of the table.
        """
        if self is V2:
            code, text = _V2[error.reason]
        else:
            code, text = (_SERVICE if errors == "service" else _API)[error.reason]
            if error.reason is Reason.QUEUE_FULL and queue_errno is not None:
                code, text = queue_errno, _QUEUE_FULL[queue_errno]
        return self.failure(code, f"{text}: {error.detail}" if error.detail else text)

    def _request_id(self) -> dict[str, object]:
        return {"request_id": uuid.uuid4().hex} if self.has_request_id else {}


V1 = Dialect(
    "/nbiot", "errno", "error", "2018-10-31", frozenset({"products"}), takes_api_key=True, has_request_id=False
)
V2 = Dialect(
    "/nb-iot",
    "code",
    "msg",
    "2022-05-01",
    frozenset({"products", "userid", "projects"}),
    takes_api_key=False,
    has_request_id=True,
)


def in_chinese(errno: int) -> str:
    """Return the Chinese text of a code, as some answers have it."""
    return _CHINESE.get(errno, "内部错误")
