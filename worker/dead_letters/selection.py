"""Which dead letters are meant: by conditions, by command ids, by digests, and by the beginnings of both. Pure."""

from collections import deque
from dataclasses import dataclass, field
from datetime import datetime
from typing import Generic, TypeVar

from worker.dead_letters.letter import SHORT_DIGEST, DeadLetter, Filter, Listing
from worker.errors import WorkerError

Kept = TypeVar("Kept")
SHORTEST_BEGINNING = 4  # characters; an id may be shorter if it is given whole
_MAX_MATCHES = 5  # that an error names


@dataclass(frozen=True)
class Choice:
    """The dead letters that a person asks for.

    Args:
        names: command ids, digests, or beginnings of either that no other one has; none: all.
        conditions: that each of them meets.
    """

    names: frozenset[str] = frozenset()
    conditions: Filter = field(default_factory=Filter)

    @property
    def is_empty(self) -> bool:
        return not self.names and self.conditions.is_empty


class Selection(Generic[Kept]):
    """Selects from the dead letters that are offered, the oldest first, and holds only what may be selected.

    Args:
        choice: what to select.
        now: the present time.
        limit: how many to select at most; None: all.
        is_newest_first: select the newest, and return these first.
        leaves_hopeless: leave out what fails again at once if it is replayed; it does not count towards the limit.
    """

    def __init__(
        self,
        choice: Choice,
        now: datetime,
        limit: int | None = None,
        *,
        is_newest_first: bool = False,
        leaves_hopeless: bool = False,
    ) -> None:
        self._choice = choice
        self._now = now
        self._limit = limit
        self._is_newest_first = is_newest_first
        self._leaves_hopeless = leaves_hopeless
        self._hopeless: dict[int, Listing] = {}
        self._named = {name: _Named(name) for name in choice.names}
        self._held: dict[int, Kept] = {}
        self._newest = deque[Kept](maxlen=limit)
        self._matching = 0
        self._read = 0

    def wants(self, dead_letter: DeadLetter) -> bool:
        """Tell whether a dead letter may be selected; asked once for each."""
        self._read += 1
        if not self._choice.conditions.matches(dead_letter, self._now):
            return False
        offered = [named.offer(self._read, dead_letter) for named in self._named.values()]  # each takes note of it
        if self._named and not any(offered):
            return False
        if self._leaves_hopeless and (listing := dead_letter.listing(self._now)).cannot_succeed:
            self._hopeless[self._read] = listing
            return False
        if self._named:
            return True
        self._matching += 1
        return self._is_newest_first or self._limit is None or self._matching <= self._limit

    def hold(self, kept: Kept) -> None:
        """Hold what is to be kept of the dead letter that was asked about last."""
        if self._named:
            self._held[self._read] = kept
        else:
            self._newest.append(kept)

    def result(self) -> "Selected[Kept]":
        """Return what is selected of all that was offered.

        Raises:
            WorkerError: a name is the beginning of several ids or digests.
        """
        found = list(self._newest)
        matching, hopeless = self._matching, [*self._hopeless.values()]
        if self._named:
            named_ones = {position for named in self._named.values() for position in named.positions()}
            hopeless = [listing for position, listing in self._hopeless.items() if position in named_ones]
            positions = sorted(named_ones - self._hopeless.keys())
            matching = len(positions)
            if self._limit is not None:
                positions = positions[-self._limit :] if self._is_newest_first else positions[: self._limit]
            found = [self._held[position] for position in positions]
        kept = tuple(reversed(found) if self._is_newest_first else found)
        missing = tuple(sorted(name for name, named in self._named.items() if not named.positions()))
        return Selected(kept, matching, missing, tuple(hopeless))


@dataclass(frozen=True)
class Selected(Generic[Kept]):
    """What was selected.

    Attributes:
        kept: of each dead letter within the limit.
        matching: how many there are without the limit.
        missing: the names of which there is no dead letter.
        hopeless: what was left out because it fails again at once if it is replayed.
    """

    kept: tuple[Kept, ...]
    matching: int
    missing: tuple[str, ...]
    hopeless: tuple[Listing, ...] = ()


def names_that_begin(dead_letter: DeadLetter, text: str) -> list[str]:
    """Return which of its command id and its digest begin with a text."""
    return [each for each in (dead_letter.command_id, dead_letter.digest) if each and each.startswith(text)]


class _Named:
    """What was found for one name. A whole id or digest counts before the beginning of another."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._exact: list[int] = []
        self._begun: dict[str, list[int]] = {}  # by the id or digest whose beginning it is; of a few of them
        self._more = 0

    def offer(self, position: int, dead_letter: DeadLetter) -> bool:
        """Note a dead letter that it may mean; tells whether it may."""
        found = names_that_begin(dead_letter, self._name)
        if self._name in found:
            self._exact.append(position)
            return True
        if len(self._name) < SHORTEST_BEGINNING:
            return False
        for each in found:
            if each not in self._begun and len(self._begun) >= _MAX_MATCHES:
                self._more += 1
            else:
                self._begun.setdefault(each, []).append(position)
        return bool(found) and len(self._begun) == 1

    def positions(self) -> list[int]:
        """Return the positions of the dead letters that it means.

        Raises:
            WorkerError: there are several ids or digests with this beginning.
        """
        if self._exact or not self._begun:
            return self._exact
        if len(self._begun) > 1:
            more = f" and {self._more:,} more dead letters" if self._more else ""
            raise WorkerError(f"{self._name} is the beginning of {', '.join(self._begun)}{more}: give more of it")
        return next(iter(self._begun.values()))


class ShortDigests:
    """The shortest beginnings of digests that tell dead letters apart, of at least ``SHORT_DIGEST`` digits."""

    def __init__(self) -> None:
        self._known: dict[str, str] = {}  # by beginning
        self._alike: dict[str, set[str]] = {}  # by a beginning that several have

    def add(self, digest: str) -> None:
        """Take note of a dead letter."""
        beginning = digest[:SHORT_DIGEST]
        other = self._known.setdefault(beginning, digest)
        if other != digest:
            self._alike.setdefault(beginning, {other}).add(digest)

    def __call__(self, digest: str) -> str:
        """Return the beginning of a digest that no other one of those added has."""
        alike = self._alike.get(digest[:SHORT_DIGEST], set()) - {digest}
        length = SHORT_DIGEST
        while any(each.startswith(digest[:length]) for each in alike):
            length += 1
        return digest[:length]
