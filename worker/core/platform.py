"""What the worker needs of the platform: the port that ``worker/onenet`` implements, and the types that cross it."""

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from worker.core.answer import Answer
from worker.core.command import Command
from worker.core.doubt_window import DoubtWindow
from worker.core.results import EntryState
from worker.errors import HistoryUnreadable

DEVICE_QUEUE = 10
"""How many commands wait for one device at most; the platform refuses further ones."""

OwnedByOthers = Callable[[Sequence[str]], Awaitable[Collection[str]]]
"""Given the uuids of history entries, returns those that are known to belong to other commands."""


@dataclass(frozen=True, slots=True)
class Sent:
    """The answer to one request. ``valid_time_omitted``: the command's ``valid_time`` was not part of the request."""

    answer: Answer
    valid_time_omitted: bool


@dataclass(frozen=True, slots=True)
class Candidate:
    """An entry of the device's command history that may be the command in doubt.

    Attributes:
        uuid: empty if the history does not show one.
        is_within_clock_skew: every field matches, and the entry's time lies in the doubt window if the two clocks
            differ as little as synchronized clocks do; otherwise only a large clock difference could explain the entry.
        valid_time_omitted: the command has a ``valid_time``, and the entry was cached without it.
        unclear: the fields that neither match nor differ for certain, because they are missing, written in another
            way, or of an unknown form.
    """

    uuid: str
    is_within_clock_skew: bool
    valid_time_omitted: bool
    unclear: tuple[str, ...] = ()


class PlatformClient(Protocol):
    """Sends commands to OneNET and reads its command history."""

    def knows(self, product: str | None) -> bool:
        """Tell whether there are credentials for a product."""

    async def execute(self, command: Command, not_after: float) -> Sent:
        """Ask the platform to cache one command; nothing is sent after ``not_after``, a monotonic time."""

    def now(self, product: str | None) -> datetime:
        """Return the time on the clock of a product's platform, aware: the platform decides by it what has passed."""

    async def time_for(self, command: Command) -> datetime:
        """Return that time, for which the platform is asked where too little is known to decide about a command."""

    async def count_waiting(self, command: Command, most: int) -> int:
        """Return how many commands wait at the platform for a command's device; counts no further than ``most``.

        Raises:
            HistoryUnreadable: the history could not be read far enough.
        """

    async def find_candidates(
        self, command: Command, doubt: DoubtWindow, owned_by_others: OwnedByOthers
    ) -> list[Candidate]:
        """Return the entries of the device's history that may be the command, the best first.

        Raises:
            HistoryUnreadable: the history could not be read in full.
        """


@dataclass(frozen=True, slots=True)
class FoundStates:
    """What a device's history says of cached commands.

    Attributes:
        states: by canonical uuid, as far as it was read and has them; those of others on the way, too.
        error: why it could not be read any further; None: it was read as far as needed.
    """

    states: Mapping[str, EntryState]
    error: HistoryUnreadable | None = None


@dataclass(frozen=True, slots=True)
class CachedCommand:
    """One entry of a device's command history.

    Attributes:
        uuid: empty if the history does not show one that is usable.
        kind: the platform's word, such as ``EXECUTE``; None: unknown.
        created_at: when it was cached, aware; None: unknown.
        valid_at: before this time it is not sent; None: unknown.
        expires_at: after this time it is not sent; None: unknown.
        state: what became of it.
    """

    uuid: str
    kind: str | None
    created_at: datetime | None
    valid_at: datetime | None
    expires_at: datetime | None
    state: EntryState


@dataclass(frozen=True, slots=True)
class DeviceHistory:
    """The cached commands of a device.

    Attributes:
        commands: in the order that was asked for, and no more than that.
        total: how many the platform has.
        is_whole: whether all of them were read.
    """

    commands: tuple[CachedCommand, ...]
    total: int
    is_whole: bool


class ResultHistories(Protocol):
    """Tells what became of accepted commands."""

    def knows(self, product: str | None) -> bool:
        """Tell whether there are credentials for a product."""

    def now(self, product: str | None) -> datetime:
        """Return the time on the clock of a product's platform, aware."""

    async def find_states(
        self,
        product: str | None,
        imei: str,
        since: datetime | None,
        uuids: Collection[str],
        acquire: Callable[[], Awaitable[None]] | None,
    ) -> FoundStates:
        """Return what a device's history says of cached commands.

        Args:
            product: whose device it is.
            imei: the device.
            since: when the first of the commands was cached, on our clock, aware; None: unknown.
            uuids: of the commands.
            acquire: takes one request from the rate limit for each read, and waits until that is allowed; None: there
                is no limit.
        """
