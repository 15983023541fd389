"""What became of one request to OneNET: the closed set of answers that are decided upon."""

from dataclasses import dataclass

from schemas.reply import RejectionCode


@dataclass(frozen=True, slots=True)
class Cached:
    """OneNET cached the command under this uuid."""

    uuid: str


@dataclass(frozen=True, slots=True)
class Refused:
    """OneNET, or something in front of it, said no: nothing was cached, and another try would hear the same.

    ``is_unauthorized``: it was the credentials that were refused, with this device or with any.
    """

    code: RejectionCode
    message: str
    errno: int | None = None
    is_unauthorized: bool = False


@dataclass(frozen=True, slots=True)
class NotSent:
    """The request is known not to have been taken: repeating it is safe.

    ``retry_after_s`` is the wait in seconds that the platform asked for, if it did.
    """

    reason: str
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class InDoubt:
    """The platform may have cached the command, or may not: nobody on this side can tell.

    ``is_outage``: the platform itself failed; otherwise it answered, but had trouble with this device.
    """

    reason: str
    is_outage: bool = True


Answer = Cached | Refused | NotSent | InDoubt
