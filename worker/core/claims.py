"""What is remembered of a command, so that one id is one command and one request.

A claim is one atomic step. Whoever is granted it holds the command for the time of a lease, and nothing may be sent
after that. Every grant has a token of its own (a fencing token), so that what a former holder writes late is refused.
Source: https://martin.kleppmann.com/2016/02/08/how-to-do-distributed-locking.html
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from schemas.reply import Reply
from worker.core.doubt_window import DoubtWindow
from worker.core.envelope import Replay
from worker.core.times import milliseconds
from worker.errors import StoreError


@dataclass(frozen=True, slots=True)
class Key:
    """What a record is found by.

    ``digest`` is the same for the same content, ``likeness`` for whatever the platform's history cannot tell apart.
    """

    command_id: str
    content_hash: bytes
    match_key: bytes


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to handle a command. ``ends_at``: when the lease ends, on this process's monotonic clock."""

    key: Key
    token: int
    ends_at: float


@dataclass(frozen=True, slots=True)
class Unseen:
    """Nothing is known of this command.

    ``unrecorded_until``: a try of which no record is left may have been under way until then. ``forgotten_before``: of
    commands that first arrived before this time the record may be gone; None: records outlive the workers.
    """

    hold: Lease
    unrecorded_until: datetime
    forgotten_before: datetime | None = None


@dataclass(frozen=True, slots=True)
class KnownNotSent:
    """Every former try is known not to have been sent.

    ``unrecorded_until``: a later try, whose record was lost, may have been under way until then; None: there was none.
    """

    hold: Lease
    unrecorded_until: datetime | None = None


@dataclass(frozen=True, slots=True)
class Unresolved:
    """A former try ended without an outcome.

    ``has_crashed``: its holder did not even say so, and may have been killed by it. ``unrecorded_until``: a later try,
    whose record was lost, may have been under way until then; None: there was none.
    """

    hold: Lease
    doubt: DoubtWindow
    holder_crashed: bool
    unrecorded_until: datetime | None = None


@dataclass(frozen=True, slots=True)
class InProgress:
    """Somebody holds the command; ``since``: the earliest time at which it may have been sent."""

    since: datetime | None


@dataclass(frozen=True, slots=True)
class Completed:
    """The command has had its outcome: this was the reply."""

    reply: Reply


@dataclass(frozen=True, slots=True)
class KeyReused:
    """The id belongs to a command with another content."""


Claim = Unseen | KnownNotSent | Unresolved | InProgress | Completed | KeyReused


@dataclass(frozen=True, slots=True)
class Assigned:
    """This uuid is the command's own, and from now on no other's."""

    uuid: str


@dataclass(frozen=True, slots=True)
class NoCandidate:
    """Every uuid belongs to another command."""


@dataclass(frozen=True, slots=True)
class LookalikeInProgress:
    """A command just like this one is being handled, and one of the uuids may be about to become its own."""


@dataclass(frozen=True, slots=True)
class Ambiguous:
    """There are more uuids than commands like this one that may have caused them."""


Assignment = Assigned | NoCandidate | LookalikeInProgress | Ambiguous


OnRecorded = Callable[[StoreError | None], object]
"""Learns that an outcome is recorded, or why not."""


class IdempotencyStore(Protocol):
    """Remembers commands. Every call is atomic and may come from any thread.

    All raise ``StoreUnavailable``; what takes a hold raises ``LeaseLost``.
    """

    def claim(self, key: Key, now: datetime, replay: Replay | None = None) -> Claim:
        """Take hold of a command, or learn why not.

        Args:
            key: the command.
            now: on the clock that times of history are compared with.
            replay: takes back the failure that it means, if that is the recorded outcome; never any other outcome.
        """

    def mark_not_sent(self, key: Key) -> None:
        """Record that a command which nobody has claimed was taken from the queue and not sent; does not wait."""

    def is_claimed_here(self, key: Key, /) -> bool:
        """Tell whether a command may have been sent, by a record that goes with this process."""

    def release(self, hold: Lease, doubt: DoubtWindow | None, *, holder_crashed: bool = False) -> None:
        """Let go of a command: without a doubt it is known not to have been sent."""

    def owned_by_others(self, key: Key, uuids: Sequence[str]) -> set[str]:
        """Return those uuids that are known, and not only guessed, to belong to other commands."""

    def own(self, hold: Lease, uuids: Sequence[str], unlikely: Sequence[str]) -> Assignment:
        """Give a command in doubt one of the uuids that its device's history has for it.

        Where a command just like it may as well have caused the one that it is given, that is a guess; a command for
        which nothing but guessed ones are left is not known to be absent, and gets none.

        Args:
            hold: the command.
            uuids: those that fit in every respect, the best first.
            unlikely: those that fit but for their time; the command is given none of them, but each that nobody owns
                must be explained by another command.
        """

    def complete(self, hold: Lease, reply: Reply, doubt: DoubtWindow | None, on_end: OnRecorded) -> None:
        """Record the outcome of a command, and whose its uuid is; raises nothing.

        Where the uuid belongs to another command nothing is recorded, the command is released with its doubt in the
        same step, and ``on_end`` is told ``UuidTaken``.

        Args:
            hold: the command.
            reply: its outcome.
            doubt: when it may have been sent; not None where the reply has a uuid.
            on_end: is told once how that ended, by any thread, perhaps after this has returned; it must not call the
                store itself.
        """

    def ping(self) -> None:
        """Have the store answer."""

    def close(self) -> None:
        """Let go of what the store itself holds."""


def failed_ms(reply: Reply) -> int | None:
    """Return what a replay knows a failure by, None for an outcome that is none."""
    return milliseconds(reply.completed_at) if reply.status == "failed" else None
