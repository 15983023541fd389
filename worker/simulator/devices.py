"""The simulated devices: which of their cached commands they execute, and when."""

from collections import deque
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from schemas.onenet import CONFIRM_STATUSES

WAIT, CANCELLED, SENT, EXPIRED, SUCCESS, FAILED = range(1, 7)
_INTERVAL = timedelta(seconds=1)  # the platform sends the commands of one device 1 s apart
_CONFIRMED_AFTER = timedelta(seconds=1)


@dataclass(frozen=True, slots=True)
class Behaviour:
    """What a device does.

    Args:
        text: ``down``: never connects, and its commands wait until they expire. ``up``: executes each command as
            soon as it is valid and confirms it with SUCCESS. ``up:STATUS``: the same, with another confirm status.
            ``offline``: the platform refuses its commands, since the device is not online.

    Raises:
        ValueError: none of these.
    """

    text: str

    def __post_init__(self) -> None:
        known = {"down", "up", "offline", *(f"up:{status}" for status in CONFIRM_STATUSES)}
        if self.text not in known:
            raise ValueError(
                f"{self.text!r} is not down, up, offline or up:STATUS, STATUS one of {', '.join(CONFIRM_STATUSES)}"
            )

    @property
    def is_up(self) -> bool:
        return self.text.startswith("up")

    @property
    def is_offline(self) -> bool:
        return self.text == "offline"

    @property
    def confirm_status(self) -> str:
        return self.text.partition(":")[2] or "SUCCESS"


@dataclass(slots=True, eq=False)
class CachedCommand:
    """One cached command and its state. ``query`` holds the parameters of its request, as text."""

    uuid: str
    query: dict[str, str]
    body: dict[str, object] | None
    created_at: datetime
    valid_at: datetime
    expires_at: datetime
    number: int
    send_status: int = WAIT
    sent_at: datetime | None = None
    confirmed_at: datetime | None = None  # of a sent command, the time at which it will be confirmed
    confirm_status: str | None = None

    @property
    def args(self) -> str | None:
        args = (self.body or {}).get("args")
        return args if isinstance(args, str) else None

    @property
    def is_confirmed(self) -> bool:
        return self.send_status in {SUCCESS, FAILED}

    @property
    def remain(self) -> int:
        """The retries that are left: none after the device did not answer any."""
        return 0 if self.is_confirmed and self.confirm_status == "TIME_OUT" else int(self.query.get("retry", 3))


@dataclass(slots=True)
class Device:
    """One device and its commands, oldest first. Its state is computed when it is read; nothing runs meanwhile."""

    behaviour: Behaviour
    commands: deque[CachedCommand] = field(default_factory=deque)
    _pending: list[CachedCommand] = field(default_factory=list)
    _free_at: datetime = datetime(1970, 1, 1, tzinfo=UTC)  # when the next command can be sent to it

    def add(self, command: CachedCommand) -> None:
        """Append a new command."""
        self.commands.append(command)
        self._pending.append(command)
        self._pending.sort(key=lambda waiting: waiting.valid_at)

    def forget_oldest(self) -> None:
        """Drop the oldest command."""
        command = self.commands.popleft()
        if command in self._pending:
            self._pending.remove(command)

    def waiting(self, now: datetime) -> list[CachedCommand]:
        """Return the commands that have not been sent, cancelled or expired, the first valid one first."""
        self.advance(now)
        return [command for command in self._pending if command.send_status == WAIT]

    def change(self, behaviour: Behaviour, now: datetime) -> None:
        """Behave otherwise from now on. Commands that have been sent are confirmed as before."""
        self.advance(now)
        self.behaviour = behaviour
        self._free_at = max(self._free_at, now)

    def advance(self, now: datetime) -> None:
        """Send, confirm and expire commands as it happened until now."""
        for command in self._pending:
            if command.send_status == WAIT and self.behaviour.is_up:
                self._send(command, max(command.valid_at, self._free_at), now)
            if command.send_status == WAIT and command.expires_at <= now:
                command.send_status = EXPIRED
            if command.send_status == SENT and command.confirmed_at is not None and command.confirmed_at <= now:
                command.send_status = SUCCESS if command.confirm_status == "SUCCESS" else FAILED
        self._pending = [command for command in self._pending if command.send_status in {WAIT, SENT}]

    def _send(self, command: CachedCommand, at: datetime, now: datetime) -> None:
        if at > now or at >= command.expires_at:
            return
        command.send_status, command.sent_at = SENT, at
        command.confirm_status = self.behaviour.confirm_status
        is_silent = command.confirm_status == "TIME_OUT"
        wait = timedelta(seconds=int(command.query.get("timeout", 25))) if is_silent else _CONFIRMED_AFTER
        command.confirmed_at = at + wait
        self._free_at = at + _INTERVAL
