"""What a store records about commands, so that one command id is one command and one request.

A claim is atomic. It grants a lease: the exclusive right to process the command until the lease ends. Nothing may be
sent after that. Every lease has its own fencing token, so that a late write of a former holder is refused.
Source: https://martin.kleppmann.com/2016/02/08/how-to-do-distributed-locking.html
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import Enum, auto
from typing import Protocol

from schemas.reply import Reply
from schemas.result import Result
from worker.core.command import scoped_id
from worker.core.doubt_window import DoubtWindow
from worker.core.envelope import Replay
from worker.core.ownership import OwnershipFacts
from worker.core.times import milliseconds
from worker.errors import StoreUnavailable


@dataclass(frozen=True, slots=True)
class Key:
    """Identifies a command's record.

    ``content_hash``: equal for equal content. ``match_key``: equal for commands that the platform's history cannot tell
    apart; two commands with different ids and the same match key are lookalikes. ``app_id``: the upstream system to
    which the command id belongs; empty where it is not known. ``field_digests``: tell in which fields two contents
    differ; empty where they are not known.
    """

    command_id: str
    content_hash: bytes
    match_key: bytes
    app_id: str = ""
    field_digests: bytes = b""

    @property
    def scoped_id(self) -> str:
        """The id with its upstream system."""
        return scoped_id(self.command_id, self.app_id)


@dataclass(frozen=True, slots=True)
class Lease:
    """The exclusive right to process a command.

    ``ends_at``: its end on this process's monotonic clock. ``owner_id``: the name under which the store records what
    belongs to the command; no other command on record has it.
    """

    key: Key
    token: int
    ends_at: float
    owner_id: str


class Loss(Enum):
    """Of which deliveries the store may have lost the record of an attempt, so that its answer proves nothing."""

    NONE = auto()
    OF_REDELIVERIES = auto()
    ANY = auto()


@dataclass(frozen=True, slots=True)
class Unseen:
    """The store has no record of the command.

    ``unrecorded_until``: an attempt whose record is lost may have been in progress until then. ``forgotten_before``:
    records of commands that first arrived before this time may be gone; None: no record is.
    """

    lease: Lease
    unrecorded_until: datetime
    forgotten_before: datetime | None = None
    loss: Loss = Loss.OF_REDELIVERIES


@dataclass(frozen=True, slots=True)
class KnownNotSent:
    """Every recorded attempt is known not to have been sent.

    ``unrecorded_until``: if a record is lost, its attempt may have been in progress until then; None: until now.
    """

    lease: Lease
    loss: Loss = Loss.NONE
    unrecorded_until: datetime | None = None


@dataclass(frozen=True, slots=True)
class Unresolved:
    """An earlier attempt ended without an outcome.

    ``holder_crashed``: the holder of its lease did not release it, so the command may have crashed its worker.
    ``unrecorded_until``: if a record is lost, its attempt may have been in progress until then; None: until now.
    """

    lease: Lease
    doubt: DoubtWindow
    holder_crashed: bool
    loss: Loss = Loss.NONE
    unrecorded_until: datetime | None = None


@dataclass(frozen=True, slots=True)
class InProgress:
    """Another delivery holds the lease. ``since``: the earliest time at which the command may have been sent."""

    since: datetime | None


@dataclass(frozen=True, slots=True)
class Completed:
    """The command's outcome is recorded, with this reply."""

    reply: Reply


@dataclass(frozen=True, slots=True)
class KeyReused:
    """The command id belongs to a command with other content.

    ``fields``: names of those that differ; none where the record does not tell.
    """

    fields: tuple[str, ...] = ()


Claim = Unseen | KnownNotSent | Unresolved | InProgress | Completed | KeyReused


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a store's server says of itself. ``warnings``: what may cost records."""

    facts: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


class LocalRecords(Protocol):
    """Records that end with this process, so that no other worker can have written since."""

    @property
    def forgotten_before(self) -> datetime:
        """When the records begin: of commands that first arrived before this time the record may be gone."""

    def mark_not_sent(self, key: Key) -> None:
        """Record that a command without a record was delivered and not sent."""

    def was_claimed(self, key: Key, /) -> bool:
        """Return whether the command was claimed in this process and is not known to be unsent."""


class IdempotencyStore(Protocol):
    """Records commands. Every call is atomic.

    Raises:
        StoreUnavailable: from any call.
        LeaseLost: from the calls that take a lease.
        UuidTaken: from ``complete``.
    """

    @property
    def is_shared(self) -> bool:
        """Whether several workers share the records."""

    on_unavailable: Callable[[StoreUnavailable], object]
    """Called when a call for a command has failed."""

    @property
    def local(self) -> LocalRecords | None:
        """The records of this process; None where they outlive it.

        A shared store has none: if it lost the later claim of another delivery, a record that the command was not sent
        would deny that delivery's request.
        """

    async def claim(self, key: Key, now: datetime, replay: Replay | None = None, *, is_first: bool = True) -> Claim:
        """Claim a command.

        Args:
            key: the command.
            now: the time of the claim, on the clock that history times are compared with.
            replay: discards the recorded failure that it names; never any other outcome.
            is_first: as far as the delivery says, there was none before it.
        """

    @property
    def wants_arrivals(self) -> bool:
        """Whether a redelivery without a record would be in doubt, so that first arrivals are worth a record."""

    async def note_arrival(self, key: Key, arrived_at: datetime) -> None:
        """Record that a command has arrived for the first time, so that until it is claimed it is known not sent.

        Args:
            key: the command.
            arrived_at: when it did, aware.
        """

    async def is_known_not_sent(self, key: Key) -> bool | None:
        """Return whether a record says that a command is known not to have been sent, without claiming it.

        None: there is no record, or the store refuses to be read.
        """

    async def release(self, lease: Lease, doubt: DoubtWindow | None, *, holder_crashed: bool = False) -> None:
        """Release a command without an outcome. ``doubt``: None where the command is known not to have been sent."""

    async def owned_by_others(self, owner_id: str, uuids: Sequence[str]) -> set[str]:
        """Return the uuids that belong for certain to other commands than the one with a lease's ``owner_id``."""

    async def ownership(self, lease: Lease, uuids: Sequence[str]) -> OwnershipFacts:
        """Return who owns each of the uuids, and which lookalikes compete for them; records nothing."""

    async def complete(self, lease: Lease, reply: Reply, doubt: DoubtWindow | None, *, is_guess: bool = False) -> None:
        """Record a command's outcome and, if its reply has a uuid, that the command owns the uuid.

        Args:
            lease: of the command.
            reply: the outcome.
            doubt: when the command may have been sent; not None if the reply has a uuid.
            is_guess: a lookalike could equally own the uuid. A recorded owner stays as certain as it is.

        Raises:
            UuidTaken: the uuid belongs to another command. Nothing is recorded: the same atomic step has released the
                command with its doubt.
        """

    async def first_results(self, found: Sequence[tuple[str, Result]]) -> list[Result]:
        """Record results; returns those on record, should other deliveries have found some of them first.

        A store that ends with this process records none: what the platform calls final stays the same.

        Args:
            found: the system that sent each command, and the result.
        """

    async def ping(self) -> None:
        """Do what the work does, on a record of its own, so that whatever refuses the work refuses this."""

    async def inspect(self) -> Inspection:
        """Return what an operator should know of the store's server."""

    async def close(self) -> None:
        """Close the store's connections."""


def failed_ms(reply: Reply) -> int | None:
    """Return the time by which a replay names a failure, in milliseconds; None if the reply is not a failure."""
    return milliseconds(reply.completed_at) if reply.status == "failed" else None
