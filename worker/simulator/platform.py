"""The platform's rules: authentication, parameters, answers and the command history. No HTTP."""

import base64
import hashlib
import hmac
import itertools
import json
import re
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from typing import Any
from urllib.parse import parse_qsl

from schemas.onenet import CONFIRM_STATUSES
from worker.simulator.devices import CANCELLED, Behaviour, CachedCommand, Device
from worker.simulator.dialects import V1, Dialect, Errors, PlatformError, Reason

CHINA = timezone(timedelta(hours=8), "CST")
EVERY_DEVICE = "*"  # names the behaviour of devices that have none of their own

_MAX_COMMANDS = 100_000  # the oldest are dropped, so that the memory of a long run is bounded
_PER_PAGE, _MOST_PER_PAGE = 30, 100
_HISTORY = timedelta(days=180)
_IMEI = re.compile(r"[1-9][0-9]{14}|[0-9]{4}")  # test devices have 4 digits
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d")
_MAX_ARGS_BYTES = 2048
_IDS = ("obj_id", "obj_inst_id", "res_id")
_RANGES = {**dict.fromkeys(_IDS, (0, 65535)), "retry": (0, 10), "timeout": (5, 40), "trigger_msg": (1, 7)}
_REQUIRED = ("imei", *_IDS, "expired_time")
_SECOND_S = 1.0
_RESULT = {"errno": 0, "error": "success"}


@dataclass(slots=True)
class Platform:
    """OneNET for one product.

    Args:
        api_key: the MasterKey, which only the first generation accepts.
        keys: access keys, base64, by the resource that tokens are signed for: ``products/1``, ``userid/1``,
            ``projects/1``.
        devices: behaviours by IMEI; ``*`` is that of all others, ``down`` if it is not given.
        errors: the table of codes in the first generation: of the NB-IoT service, or of the API layer in front of it.
        queue_limit: most commands that wait for one device; None: no limit.
        queue_errno: the code of a full queue in the first generation, 5006 or 13; None: that of the table.
        rate: most calls in one second; None: no limit.
        needs_body: refuse an Execute without a body; False: take it as one without args.
        cancels_valid: cancel commands as long as they wait; False: only before their valid_time.
        clock_offset_s: the platform's clock minus that of this machine, in seconds.
        now: the clock of this machine, timezone-aware; replaced in tests.
        new_uuid: chooses the uuid of a cached command; replaced in tests.
    """

    api_key: str = field(repr=False)
    keys: Mapping[str, str] = field(default_factory=dict, repr=False)
    devices: Mapping[str, str] = field(default_factory=dict)
    errors: Errors = "service"
    queue_limit: int | None = 10
    queue_errno: int | None = None
    rate: int | None = 300
    needs_body: bool = True
    cancels_valid: bool = False
    clock_offset_s: float = 0
    now: Callable[[], datetime] = lambda: datetime.now(CHINA)
    new_uuid: Callable[[], str] = lambda: str(uuid.uuid4())
    _behaviours: dict[str, Behaviour] = field(init=False)
    _devices: dict[str, Device] = field(init=False, default_factory=dict)
    _commands: dict[str, CachedCommand] = field(init=False, default_factory=dict)
    _numbers: Iterator[int] = field(init=False, default_factory=itertools.count)
    _calls: deque[float] = field(init=False, default_factory=deque)

    def __post_init__(self) -> None:
        self.replace_devices(self.devices)

    @property
    def commands(self) -> list[CachedCommand]:
        """The cached commands, oldest first, each in the state in which it was last read."""
        return list(self._commands.values())

    def clock(self) -> datetime:
        """Return the platform's time, which decides what is valid, expired or signed too long ago."""
        return self.now() + timedelta(seconds=self.clock_offset_s)

    def clear(self) -> None:
        """Forget all commands."""
        self._devices.clear()
        self._commands.clear()

    def advance(self) -> None:
        """Bring the states of all commands up to date."""
        now = self.clock()
        for device in self._devices.values():
            device.advance(now)

    def replace_devices(self, devices: Mapping[str, str]) -> None:
        """Let devices behave as given from now on, and all others as ``*``, or be down.

        Raises:
            ValueError: there is no such behaviour.
        """
        self._behaviours = {imei: Behaviour(text) for imei, text in devices.items()}
        self.devices = dict(devices)
        now = self.clock()
        for imei, device in self._devices.items():
            device.change(self._behaviour(imei), now)

    def check_rate(self) -> None:
        """Count one call.

        Raises:
            PlatformError: there were too many in the last second.
        """
        if self.rate is None:
            return
        now = time.monotonic()
        while self._calls and self._calls[0] <= now - _SECOND_S:
            self._calls.popleft()
        if len(self._calls) >= self.rate:
            raise PlatformError(Reason.TOO_MANY_CALLS)
        self._calls.append(now)

    def check_authentication(self, headers: Mapping[str, str], dialect: Dialect = V1) -> None:
        """Accept the API key, or a token that was signed with the access key of its resource.

        Raises:
            PlatformError: the credentials are missing or wrong.
        """
        key = headers.get("api-key")
        token = headers.get("authorization")
        if key is None and token is None:
            raise PlatformError(Reason.NO_CREDENTIALS)
        if key is not None:
            is_right = dialect.takes_api_key and hmac.compare_digest(key.encode(), self.api_key.encode())
        else:
            is_right = token is not None and self._is_signed(token, dialect)
        if not is_right:
            raise PlatformError(Reason.WRONG_CREDENTIALS)

    def execute(
        self, query: Mapping[str, str], body: bytes, content_type: str | None = "application/json"
    ) -> CachedCommand:
        """Cache one command. Parameters that are not documented are ignored, as the clients show that send some.

        Raises:
            PlatformError: a parameter or the body breaks a rule, the device is not online, or its queue is full.
        """
        for name in _REQUIRED:
            if not query.get(name):
                raise PlatformError(Reason.PARAMETER_MISSING, name)
        imei = query["imei"]
        if not _IMEI.fullmatch(imei):
            raise PlatformError(Reason.PARAMETER_INVALID, "imei")
        for name, (least, most) in _RANGES.items():
            text = query.get(name)
            if text is not None and not (re.fullmatch(r"[0-9]{1,5}", text) and least <= int(text) <= most):
                raise PlatformError(Reason.PARAMETER_INVALID, name)
        now = self.clock()
        valid_at, expires_at = _times(query, now)
        content = self._body(body, content_type)
        if self._behaviour(imei).is_offline:
            raise PlatformError(Reason.DEVICE_NOT_ONLINE)
        device = self._devices.get(imei) or Device(self._behaviour(imei))
        if self.queue_limit is not None and len(device.waiting(now)) >= self.queue_limit:
            raise PlatformError(Reason.QUEUE_FULL, f"{self.queue_limit} commands wait for the device")
        name = self.new_uuid()
        command = CachedCommand(name, dict(query), content, now, valid_at, expires_at, next(self._numbers))
        self._devices[imei] = device
        self._commands[name] = command
        device.add(command)
        if len(self._commands) > _MAX_COMMANDS:
            self._forget_oldest()
        return command

    def history(self, query: Mapping[str, str]) -> dict[str, object]:
        """Return one page of a device's cached commands, with the deviations of the documented example.

        Raises:
            PlatformError: a parameter is missing or invalid.
        """
        for name in ("imei", "start"):
            if not query.get(name):
                raise PlatformError(Reason.PARAMETER_MISSING, name)
        device = self._devices.get(query["imei"])  # one that it does not know has no commands
        now = self.clock()
        start = _time(query, "start")
        if start < now - _HISTORY:
            raise PlatformError(Reason.PARAMETER_INVALID, "start is more than 180 days ago")
        end = _time(query, "end") if "end" in query else None
        page = _count(query, "page", 1, 999_999)
        per_page = _count(query, "per_page", _PER_PAGE, _MOST_PER_PAGE)
        sort = query.get("sort", "DESC")
        if sort not in {"ASC", "DESC"}:
            raise PlatformError(Reason.PARAMETER_INVALID, "sort")
        found: list[CachedCommand] = []
        if device is not None:
            device.advance(now)
            found = [
                command
                for command in device.commands
                if start <= command.created_at and (end is None or command.created_at <= end)
            ]
        found.sort(key=lambda command: command.created_at, reverse=sort == "DESC")
        shown = found[(page - 1) * per_page : page * per_page]
        return {"total_count": len(found), "items": [_item(command) for command in shown]}

    def detail(self, imei: str, command_uuid: str) -> dict[str, object]:
        """Return one cached command of a device with its parameters and its state.

        Raises:
            PlatformError: the device has no such command.
        """
        return _detail(self._find(imei, command_uuid))

    def log(self, imei: str, command_uuid: str) -> list[dict[str, str]]:
        """Return what happened to a command: one line for each stage.

        Raises:
            PlatformError: the device has no such command.
        """
        command = self._find(imei, command_uuid)
        made = f"type: [2], args: [{json.dumps(_args(command))}], content: [{json.dumps(command.body or {})}]"
        lines = [_line(f"received command {made}", command.created_at)]
        if command.sent_at is not None:
            lines.append(_line(f"send command {made}", command.sent_at))
        if command.is_confirmed and command.confirmed_at is not None and command.confirm_status is not None:
            status = CONFIRM_STATUSES.index(command.confirm_status)
            states = f"command send status: [{command.send_status}], confirm status: [{status}]"
            result = f", result: [{json.dumps(_RESULT)}]" if command.confirm_status == "SUCCESS" else ""
            lines.append(_line(f"received confirm message, type: [2], {states}{result}", command.confirmed_at))
        return lines

    def cancel(self, imei: str, command_uuid: str) -> None:
        """Cancel a command that is waiting for its valid_time, or for its device if ``cancels_valid``.

        Raises:
            PlatformError: the device has no such command, or it can no longer be cancelled.
        """
        if not self._cancel(self._find(imei, command_uuid)):
            raise PlatformError(Reason.NOT_CANCELLABLE, "the command does not wait any more")

    def cancel_all(self, imei: str) -> dict[str, object]:
        """Cancel the waiting commands of a device; returns the uuids of those that were, and of those that were not.

        Raises:
            PlatformError: the IMEI is missing.
        """
        if not imei:
            raise PlatformError(Reason.PARAMETER_MISSING, "imei")
        device = self._devices.get(imei)
        waiting = [] if device is None else device.waiting(self.clock())
        cancelled = [command.uuid for command in waiting if self._cancel(command)]
        failed = [command.uuid for command in waiting if command.send_status != CANCELLED]
        return {"succ": cancelled, "failed": failed, "total": len(waiting)}

    def _cancel(self, command: CachedCommand) -> bool:
        now = self.clock()
        is_waiting = command in self._devices[command.query["imei"]].waiting(now)
        if not is_waiting or (command.valid_at <= now and not self.cancels_valid):
            return False
        command.send_status = CANCELLED
        return True

    def _find(self, imei: str, command_uuid: str) -> CachedCommand:
        if not imei:
            raise PlatformError(Reason.PARAMETER_MISSING, "imei")
        command = self._commands.get(command_uuid.strip())
        if command is None or command.query["imei"] != imei:
            raise PlatformError(Reason.NO_SUCH_COMMAND, "uuid")
        self._devices[imei].advance(self.clock())
        return command

    def _behaviour(self, imei: str) -> Behaviour:
        return self._behaviours.get(imei) or self._behaviours.get(EVERY_DEVICE) or Behaviour("down")

    def _forget_oldest(self) -> None:
        name = next(iter(self._commands))
        imei = self._commands.pop(name).query["imei"]
        self._devices[imei].forget_oldest()
        if not self._devices[imei].commands:
            del self._devices[imei]

    def _body(self, body: bytes, content_type: str | None) -> dict[str, object] | None:
        if not body:
            if self.needs_body:
                raise PlatformError(Reason.BODY_MISSING, "the body is missing")
            return None
        if (content_type or "").partition(";")[0].strip().lower() != "application/json":
            raise PlatformError(Reason.BODY_MALFORMED, "Content-Type must be application/json")
        try:
            found = json.loads(body)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict) or not isinstance(found.get("args", ""), str):
            raise PlatformError(Reason.BODY_MALFORMED, "the body is malformed")
        if len(found.get("args", "").encode("utf-8", "surrogatepass")) > _MAX_ARGS_BYTES:
            raise PlatformError(Reason.BODY_TOO_LARGE, "args is limited to 2k")
        return found

    def _is_signed(self, token: str, dialect: Dialect) -> bool:
        fields = dict(parse_qsl(token))
        resource = fields.get("res", "")
        key = self.keys.get(resource)
        if key is None or resource.partition("/")[0] not in dialect.resources:
            return False
        if fields.get("version") != dialect.token_version:
            return False
        if fields.get("method") not in {"md5", "sha1", "sha256"} or not re.fullmatch(
            r"[0-9]{1,12}", fields.get("et", "")
        ):
            return False
        if int(fields["et"]) <= self.clock().timestamp():
            return False
        text = "\n".join(fields[name] for name in ("et", "method", "res", "version"))
        digest = hmac.new(base64.b64decode(key), text.encode(), getattr(hashlib, fields["method"])).digest()
        return hmac.compare_digest(fields.get("sign", "").encode(), base64.b64encode(digest))


def _is_odd(command: CachedCommand) -> bool:
    """Tell whether a command is written in the second of the two documented ways, which both occur in one answer."""
    return bool(command.number % 2)


def _item(command: CachedCommand) -> dict[str, object]:
    is_odd = _is_odd(command)
    return {
        "cmd_uuid": command.uuid + (" " if command.number % 3 == 0 else ""),  # as in the documented example
        **_states(command),
        **({"feedback_time": _shown(command.confirmed_at, is_odd)} if command.is_confirmed else {}),
    }


def _detail(command: CachedCommand) -> dict[str, object]:
    found = _states(command)
    is_odd = _is_odd(command)
    if command.is_confirmed:
        found["feedback_msg"] = [{"feedback_time": _shown(command.confirmed_at, is_odd), "feedback_status": 0}]
        if command.confirm_status == "SUCCESS":
            found["cmd_result"] = _RESULT
    else:
        found["feedback_msg"] = []
    content = None if is_odd and not command.body else command.body
    return found | {"args": _args(command), "content": content}


def _states(command: CachedCommand) -> dict[str, object]:
    """Return the fields that list and detail have in common."""
    is_odd = _is_odd(command)
    times: dict[str, datetime | None] = {
        "create_time": command.created_at,
        "valid_time": command.valid_at,
        "expired_time": command.expires_at,
        "send_time": command.sent_at,
        "confirm_time": command.confirmed_at if command.is_confirmed else None,
    }
    return {
        "type": "EXECUTE",
        **{name: _shown(at, is_odd) for name, at in times.items() if at is not None},
        "trigger_msg": int(command.query.get("trigger_msg", 7)),
        "send_status": command.send_status,
        **({"confirm_status": command.confirm_status} if command.is_confirmed else {}),
        "imei": command.query["imei"],
        "remain": str(command.remain) if is_odd else command.remain,
    }


def _args(command: CachedCommand) -> dict[str, Any]:
    """Return the parameters of a command's request: as they were given, or as numbers with the defaults filled in."""
    given: dict[str, Any] = {name: value for name, value in command.query.items() if name != "trigger_msg"}
    if not _is_odd(command):
        return given
    numbers = {name: int(given.get(name, default)) for name, default in (("retry", 3), ("timeout", 25))}
    times = {name: given[name].replace("T", " ") for name in ("valid_time", "expired_time") if name in given}
    return given | {name: int(given[name]) for name in _IDS} | numbers | times


def _shown(at: datetime | None, with_milliseconds: bool) -> str:
    """Return a time as histories have it; only some have milliseconds, behind a third colon."""
    assert at is not None  # the caller shows a time that has come
    found = at.astimezone(CHINA)
    return f"{found:%Y-%m-%d %H:%M:%S}" + (f":{found.microsecond // 1000:03}" if with_milliseconds else "")


def _line(text: str, at: datetime) -> dict[str, str]:
    return {"log": text, "time": f"{at.astimezone(CHINA):%a %b %d %H:%M:%S CST %Y}"}


def _times(query: Mapping[str, str], now: datetime) -> tuple[datetime, datetime]:
    valid_at = now
    if "valid_time" in query:
        valid_at = _time(query, "valid_time")
        if valid_at <= now:
            raise PlatformError(Reason.TIME_NOT_ALLOWED, "valid_time must be later than the current time")
    expires_at = _time(query, "expired_time")
    if expires_at <= valid_at:
        raise PlatformError(Reason.TIME_NOT_ALLOWED, "expired_time must be later than valid_time")
    return valid_at, expires_at


def _time(query: Mapping[str, str], name: str) -> datetime:
    try:
        if _TIME.fullmatch(query[name]):
            return datetime.fromisoformat(query[name]).replace(tzinfo=CHINA)
    except ValueError:
        pass  # no such date or time
    raise PlatformError(Reason.PARAMETER_INVALID, name)


def _count(query: Mapping[str, str], name: str, default: int, most: int) -> int:
    text = query.get(name, str(default))
    if not re.fullmatch(r"[1-9][0-9]{0,5}", text) or int(text) > most:
        raise PlatformError(Reason.PARAMETER_INVALID, name)
    return int(text)
