"""What became of one request to OneNET: the closed set of answers that are decided upon."""

from dataclasses import dataclass

from schemas.reply import RejectionCode


@dataclass(frozen=True, slots=True)
class Cached:
    """OneNET cached the command under this uuid."""

    uuid: str


@dataclass(frozen=True, slots=True)
class Refused:
    """OneNET, or a proxy in front of it, refused the command: nothing was cached, and a retry would be refused too.

    ``may_concern_all_devices``: the credentials were refused, or the answer is not OneNET's; if several devices in a
    row get such an answer, a single command is not the cause. ``is_misconfigured``: the message names the setting that
    is wrong. ``is_limit``: a limit of the platform is reached, perhaps that of the commands that wait for the device.
    """

    code: RejectionCode
    message: str
    errno: int | None = None
    may_concern_all_devices: bool = False
    is_misconfigured: bool = False
    is_limit: bool = False

    @property
    def cause(self) -> str:
        """What was refused, and the answer: for a refusal that may concern all devices."""
        if self.is_misconfigured:
            return self.message
        what = "authentication refused" if self.code == "onenet_rejected" else "refused by something in front of OneNET"
        return f"{what}: {self.message}"


@dataclass(frozen=True, slots=True)
class NotSent:
    """The request is known not to have been taken: repeating it is safe.

    ``retry_after_s`` is the wait in seconds that the platform asked for, if it did. ``is_throttled``: OneNET said that
    it gets too many requests, which is no failure of this command.
    """

    reason: str
    retry_after_s: float | None = None
    is_throttled: bool = False


@dataclass(frozen=True, slots=True)
class InDoubt:
    """The platform may have cached the command, or may not: the worker cannot tell.

    ``is_outage``: the platform itself failed; otherwise it answered, but had trouble with this device.
    """

    reason: str
    is_outage: bool = True


Answer = Cached | Refused | NotSent | InDoubt
