"""The platform's rules: authentication, parameters, answers and the command history. No HTTP."""

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

_WAIT, _CANCELLED, _EXPIRED = 1, 2, 4
_PER_PAGE, _MOST_PER_PAGE = 30, 100
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
    """The platform refuses a request and answers with ``errno`` and ``error``."""

    def __init__(self, errno: int, error: str) -> None:
        super().__init__(error)
        self.errno = errno
        self.error = error


@dataclass(slots=True)
class CachedCommand:
    """One cached command. ``query`` holds the parameters of its request, as text."""

    uuid: str
    query: dict[str, str]
    args: str | None
    created_at: datetime
    number: int
    is_cancelled: bool = False

    def send_status(self, now: datetime) -> int:
        """Return the send status. It is never "sent", since simulated devices never connect."""
        if self.is_cancelled:
            return _CANCELLED
        return _EXPIRED if _time(self.query, "expired_time") <= now else _WAIT


@dataclass(slots=True)
class Platform:
    """OneNET for one product.

    Args:
        api_key: the MasterKey of mode "common".
        product_id: the product of mode "safe".
        access_key: the key of that product, base64; None: every token is refused.
        offline: the IMEIs of devices that are not online (errno 2001).
        now: the platform's clock, timezone-aware; replaced in tests.
        commands: the cached commands, oldest first.
    """

    api_key: str
    product_id: str | None = None
    access_key: str | None = None
    offline: frozenset[str] = frozenset()
    now: Callable[[], datetime] = lambda: datetime.now(CHINA)
    commands: list[CachedCommand] = field(default_factory=list)

    def check_authentication(self, headers: Mapping[str, str]) -> None:
        """Accept the API key, or a token that was signed with the access key.

        Raises:
            PlatformError: the credentials are missing or wrong (errno 1).
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
            PlatformError: a parameter is missing or invalid, or the device is not online.
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
        command = CachedCommand(str(uuid.uuid4()), dict(query), args, self.now(), len(self.commands))
        self.commands.append(command)
        return command

    def history(self, query: Mapping[str, str]) -> dict[str, object]:
        """Return one page of a device's cached commands, with the deviations of the documented example.

        Raises:
            PlatformError: a parameter is missing or invalid.
        """
        for name in ("imei", "start"):
            if not query.get(name):
                raise PlatformError(PARAMETER_REQUIRED, f"parameter required: {name}")
        start = _time(query, "start")
        end = _time(query, "end") if "end" in query else None
        page = _count(query, "page", 1)
        per_page = min(_count(query, "per_page", _PER_PAGE), _MOST_PER_PAGE)
        found = [
            command
            for command in self.commands
            if command.query["imei"] == query["imei"]
            and start <= command.created_at
            and (end is None or command.created_at <= end)
        ]
        found.sort(key=lambda command: command.created_at, reverse=query.get("sort", "DESC") != "ASC")
        shown = found[(page - 1) * per_page : page * per_page]
        return {"total_count": len(found), "items": [self._item(command) for command in shown]}

    def detail(self, imei: str, command_uuid: str) -> dict[str, object]:
        """Return one cached command of a device with its parameters and its send status.

        Raises:
            PlatformError: the device has no such command.
        """
        command = self._find(imei, command_uuid)
        item = self._item(command)
        del item["cmd_uuid"], item["trigger_msg"]
        args = {name: value for name, value in command.query.items() if name != "trigger_msg"}
        content = None if command.args is None else {"args": command.args}
        return item | {"args": args, "content": content, "feedback_msg": []}

    def cancel(self, imei: str, command_uuid: str) -> None:
        """Cancel a command that is waiting for its valid_time.

        Raises:
            PlatformError: the device has no such command, or it can no longer be cancelled.
        """
        command = self._find(imei, command_uuid)
        now = self.now()
        valid_at = _time(command.query, "valid_time") if "valid_time" in command.query else command.created_at
        if command.send_status(now) != _WAIT or valid_at <= now:
            raise PlatformError(SYSTEM_LIMIT, "only a command that waits for its valid_time can be cancelled")
        command.is_cancelled = True

    def _find(self, imei: str, command_uuid: str) -> CachedCommand:
        for command in self.commands:
            if command.uuid == command_uuid.strip() and command.query["imei"] == imei:
                return command
        raise PlatformError(PARAMETER_REQUIRED, "no such command")

    def _item(self, command: CachedCommand) -> dict[str, object]:
        is_odd = bool(command.number % 2)
        created = command.created_at.astimezone(CHINA)
        shown = {name: command.query.get(name) for name in ("valid_time", "expired_time")}
        return {
            "cmd_uuid": command.uuid + (" " if command.number % 3 == 0 else ""),  # as in the documented example
            "type": "EXECUTE",
            # Only some have milliseconds, even within one answer, as in the documented example.
            "create_time": f"{created:%Y-%m-%d %H:%M:%S}" + (f":{created.microsecond // 1000:03}" if is_odd else ""),
            "valid_time": (shown["valid_time"] or f"{created:%Y-%m-%d %H:%M:%S}").replace("T", " "),
            "expired_time": str(shown["expired_time"]).replace("T", " "),
            "trigger_msg": int(command.query.get("trigger_msg", 7)),
            "send_status": command.send_status(self.now()),
            "imei": command.query["imei"],
            "remain": str(int(command.query.get("retry", 3))) if is_odd else int(command.query.get("retry", 3)),
        }

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
        pass  # no such date or time
    raise PlatformError(INVALID_PARAMETER, f"invalid parameter: {name}")


def _count(query: Mapping[str, str], name: str, default: int) -> int:
    text = query.get(name, str(default))
    if not re.fullmatch(r"[1-9][0-9]{0,5}", text):
        raise PlatformError(INVALID_PARAMETER, f"invalid parameter: {name}")
    return int(text)


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
