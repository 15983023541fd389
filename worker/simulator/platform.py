"""The platform's rules: who may ask, which parameters it takes, what it answers and what it remembers."""

import base64
import hashlib
import hmac
import json
import re
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from urllib.parse import parse_qsl

CHINA = timezone(timedelta(hours=8), "CST")

AUTH_FAILED = 1
PARAMETER_REQUIRED = 3
INTERNAL_ERROR = 7
NOT_ONLINE = 2001
SYSTEM_LIMIT = 5006
INVALID_PARAMETER = 5108

_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d")
_MAX_ARGS_BYTES = 2048
_RANGES = {
    "obj_id": (0, 65535),
    "obj_inst_id": (0, 65535),
    "res_id": (0, 65535),
    "retry": (0, 10),
    "timeout": (5, 40),
    "trigger_msg": (1, 7),
}
_REQUIRED = ("imei", "obj_id", "obj_inst_id", "res_id", "expired_time")


class PlatformError(Exception):
    """The platform says no: ``errno`` and ``error`` are what it answers with."""

    def __init__(self, errno: int, error: str) -> None:
        super().__init__(error)
        self.errno = errno
        self.error = error


@dataclass(frozen=True, slots=True)
class CachedCommand:
    """One command as the platform keeps it. ``query`` holds the parameters that were given, as text."""

    uuid: str
    query: dict[str, str]
    args: str | None
    created_at: datetime


@dataclass(slots=True)
class Platform:
    """One product's share of OneNET.

    Args:
        api_key: the MasterKey of mode "common".
        product_id: the product of mode "safe".
        access_key: its key, base64; without it nobody gets in by token.
        offline: the IMEIs that the platform does not know.
        now: the platform's clock, aware; replaced in tests.
    """

    api_key: str
    product_id: str | None = None
    access_key: str | None = None
    offline: frozenset[str] = frozenset()
    now: Callable[[], datetime] = lambda: datetime.now(CHINA)
    commands: list[CachedCommand] = field(default_factory=list)

    def check_authentication(self, headers: Mapping[str, str]) -> None:
        """Let in whoever has the key, or a token that it signed.

        Raises:
            PlatformError: errno 1.
        """
        key = headers.get("api-key")
        token = headers.get("authorization")
        if key is not None and hmac.compare_digest(key.encode(), self.api_key.encode()):
            return
        if key is None and token is not None and self._is_signed(token):
            return
        raise PlatformError(AUTH_FAILED, "auth failed")

    def execute(self, query: Mapping[str, str], body: bytes) -> CachedCommand:
        """Cache one command.

        Raises:
            PlatformError: a parameter breaks its rule, or the device is not there.
        """
        for name in _REQUIRED:
            if not query.get(name):
                raise PlatformError(PARAMETER_REQUIRED, f"parameter required: {name}")
        if not re.fullmatch(r"[0-9]{15}", query["imei"]):
            raise PlatformError(INVALID_PARAMETER, "invalid parameter: imei")
        for name, (least, most) in _RANGES.items():
            text = query.get(name)
            if text is not None and not (re.fullmatch(r"[0-9]{1,5}", text) and least <= int(text) <= most):
                raise PlatformError(INVALID_PARAMETER, f"invalid parameter: {name}")
        self._check_times(query)
        args = _args(body)
        if query["imei"] in self.offline:
            raise PlatformError(NOT_ONLINE, "device not online")
        command = CachedCommand(str(uuid.uuid4()), dict(query), args, self.now())
        self.commands.append(command)
        return command

    def _check_times(self, query: Mapping[str, str]) -> None:
        now = self.now()
        valid_from = now
        if "valid_time" in query:
            valid_from = _time(query, "valid_time")
            if valid_from <= now:
                raise PlatformError(SYSTEM_LIMIT, "valid_time must be later than the current time")
        if _time(query, "expired_time") <= valid_from:
            raise PlatformError(SYSTEM_LIMIT, "expired_time must be later than valid_time")

    def _is_signed(self, token: str) -> bool:
        fields = dict(parse_qsl(token))
        if self.access_key is None or fields.get("res") != f"products/{self.product_id}":
            return False
        if fields.get("method") not in {"md5", "sha1", "sha256"} or not fields.get("et", "").isdecimal():
            return False
        if int(fields["et"]) <= self.now().timestamp():
            return False
        text = "\n".join(fields.get(name, "") for name in ("et", "method", "res", "version"))
        key = base64.b64decode(self.access_key)
        wanted = base64.b64encode(hmac.new(key, text.encode(), getattr(hashlib, fields["method"])).digest())
        return hmac.compare_digest(fields.get("sign", "").encode(), wanted)


def _time(query: Mapping[str, str], name: str) -> datetime:
    try:
        if _TIME.fullmatch(query[name]):
            return datetime.fromisoformat(query[name]).replace(tzinfo=CHINA)
    except ValueError:
        pass  # no such day
    raise PlatformError(INVALID_PARAMETER, f"invalid parameter: {name}")


def _args(body: bytes) -> str | None:
    if not body:
        return None
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not isinstance(found.get("args", ""), str):
        raise PlatformError(PARAMETER_REQUIRED, "parameter required: the body is malformed")
    args: str | None = found.get("args")
    if args is not None and len(args.encode()) > _MAX_ARGS_BYTES:
        raise PlatformError(SYSTEM_LIMIT, "args is limited to 2k")
    return args
