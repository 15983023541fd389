"""Dead letters for operators: find them, count them by their errors, show, replay and discard them."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self, TypeVar
from zoneinfo import ZoneInfo

from worker.admin.obstacles import Obstacle, find_obstacles
from worker.admin.spool import Spool
from worker.amqp.address import BrokerAddress
from worker.amqp.topology import Topology
from worker.dead_letters.advice import Advice, advise
from worker.dead_letters.groups import Group, Groups
from worker.dead_letters.letter import DeadLetter, Listing
from worker.dead_letters.outcomes import OutcomeWatcher
from worker.dead_letters.reader import DeadLetterReader
from worker.dead_letters.selection import Choice, Selected, Selection, ShortDigests
from worker.dead_letters.view import details, text_of
from worker.errors import BrokerUnavailable, WorkerError
from worker.printable import printable_json

Kept = TypeVar("Kept")
MAX_HELD_S = 20 * 60  # of a replay: the broker's consumer timeout is 30 minutes
_POLL_S = 0.25
_WAIT_SLICE_S = 0.5  # of a wait between two replays, shorter than any heartbeat
_LOOK_S = 10.0  # between looks at why no outcome comes


@dataclass(frozen=True)
class Count:
    """How many dead letters there are.

    Args:
        matching: that match what was asked for, whatever the limit.
        read: that were read.
        waiting: in the queue; more than were read if one reader cannot hold them all.
    """

    matching: int
    read: int
    waiting: int


@dataclass(frozen=True)
class Found:
    """Dead letters as a list shows them.

    Args:
        letters: of those that match, as many as were asked for.
        count: of all.
        missing: names of which there is no dead letter.
        short: returns the shortest beginning of a digest that commands take.
        hopeless: what was left out, since it fails again at once if it is replayed; only where that was asked for.
    """

    letters: tuple[Listing, ...]
    count: Count
    missing: tuple[str, ...]
    short: Callable[[str], str]
    hopeless: tuple[Listing, ...] = ()


@dataclass(frozen=True)
class Documents:
    """Dead letters as JSON, whole, in a spool that must stay open as long as they are read."""

    places: tuple[int, ...]
    count: Count
    missing: tuple[str, ...]
    spool: Spool
    hopeless: tuple[Listing, ...] = ()

    def __iter__(self) -> Iterator[str]:
        return map(self.spool.line, self.places)


@dataclass(frozen=True)
class Shown:
    """One dead letter in full.

    Args:
        listing: what a list shows.
        short: the shortest beginning of its digest that commands take.
        document: the whole message, ready for JSON.
        text: its body for people.
        advice: what to do next.
    """

    listing: Listing
    short: str
    document: dict[str, Any]
    text: str
    advice: Advice


@dataclass(frozen=True)
class Summary:
    """Dead letters by reason and error, the most frequent first."""

    groups: tuple[Group, ...]
    count: Count
    missing: tuple[str, ...]
    short: Callable[[str], str]


@dataclass(frozen=True)
class Outcome:
    """What became of a replayed dead letter.

    Args:
        letter: the dead letter.
        reply: as the upstream system got it.
    """

    letter: Listing
    reply: dict[str, Any]

    @property
    def status(self) -> str:
        return str(self.reply["status"])

    @property
    def error(self) -> dict[str, Any]:
        """The reply's error; empty if the command was accepted."""
        found = self.reply.get("error")
        return found if isinstance(found, dict) else {}


class DeadLetters:
    """What an operator asks for and does. Each call reads the queue, and leaves it as it was but for what it is to do.

    Each raises WorkerError if another reader is open, the queue is missing or a name is ambiguous, and
    BrokerUnavailable if no broker answers.

    Args:
        broker: where to connect.
        topology: names the queue.
        zone: time zone of the commands' times without an offset.
    """

    def __init__(self, broker: BrokerAddress, topology: Topology, zone: ZoneInfo) -> None:
        self._broker = broker
        self._topology = topology
        self._zone = zone

    def find(
        self,
        choice: Choice,
        *,
        limit: int | None = None,
        is_newest_first: bool = False,
        leaves_hopeless: bool = False,
    ) -> Found:
        """Return what a list shows of dead letters; for the parameters see ``Selection``."""
        now, short = datetime.now(UTC), ShortDigests()
        selection = Selection[Listing](
            choice, now, limit, is_newest_first=is_newest_first, leaves_hopeless=leaves_hopeless
        )

        def on_letter(dead_letter: DeadLetter) -> None:
            short.add(dead_letter.digest)
            if selection.wants(dead_letter):
                selection.hold(dead_letter.listing(now))

        selected, count = self._read(selection, on_letter)
        return Found(selected.kept, count, selected.missing, short, selected.hopeless)

    def find_documents(
        self,
        choice: Choice,
        spool: Spool,
        *,
        limit: int | None = None,
        is_newest_first: bool = False,
        leaves_hopeless: bool = False,
    ) -> Documents:
        """Return whole dead letters as JSON, in little memory; a body is cut at the limit of commands.

        Args:
            choice: which.
            spool: keeps them.
            limit: how many at most; None: all.
            is_newest_first: the newest, and these first.
            leaves_hopeless: leave out what fails again at once if it is replayed.
        """
        now = datetime.now(UTC)
        selection = Selection[int](choice, now, limit, is_newest_first=is_newest_first, leaves_hopeless=leaves_hopeless)

        def on_letter(dead_letter: DeadLetter) -> None:
            if selection.wants(dead_letter):
                selection.hold(spool.append(printable_json(details(dead_letter, now))))

        selected, count = self._read(selection, on_letter)
        return Documents(selected.kept, count, selected.missing, spool, selected.hopeless)

    def show(self, name: str) -> tuple[Shown, ...]:
        """Return the dead letters with a command id, a digest, or the beginning of either; none if there is none."""
        now, short = datetime.now(UTC), ShortDigests()
        selection = Selection[DeadLetter](Choice(frozenset({name})), now)

        def on_letter(dead_letter: DeadLetter) -> None:
            short.add(dead_letter.digest)
            if selection.wants(dead_letter):
                selection.hold(dead_letter)

        selected, _ = self._read(selection, on_letter, cuts_bodies=False)
        return tuple(self._shown(each, short(each.digest), now) for each in selected.kept)

    def summarize(self, choice: Choice) -> Summary:
        """Return how many dead letters there are of each reason and error."""
        now, short = datetime.now(UTC), ShortDigests()
        selection, groups = Selection[Listing](choice, now), Groups()

        def on_letter(dead_letter: DeadLetter) -> None:
            short.add(dead_letter.digest)
            if not selection.wants(dead_letter):
                return
            if choice.names:  # which are meant is known only at the end
                selection.hold(dead_letter.listing(now))
            else:
                groups.add(dead_letter.listing(now))

        selected, count = self._read(selection, on_letter)
        for listing in selected.kept:
            groups.add(listing)
        return Summary(groups.largest_first(), count, selected.missing, short)

    def replay(
        self, choice: Choice, *, limit: int | None, interval_s: float | None, leaves_hopeless: bool, is_watched: bool
    ) -> "Replay":
        """Return a replay, which begins when it is entered.

        Args:
            choice: which.
            limit: how many at most, the oldest first; None: all.
            interval_s: from one to the next, in seconds; None: none.
            leaves_hopeless: leave out what fails again at once, since it has expired.
            is_watched: whether the outcomes are to be read.
        """
        return Replay(self._broker, self._topology, self._zone, choice, limit, interval_s, leaves_hopeless, is_watched)

    def discard(self, choice: Choice, *, limit: int | None, plan: "Plan | None" = None) -> "Discard":
        """Return a deletion, which begins when it is entered.

        Args:
            choice: which.
            limit: how many at most, the oldest first; None: all.
            plan: what was confirmed to be deleted: nothing else is; None: whatever is chosen.
        """
        return Discard(self._open(), choice, limit, plan)

    def plan_to_discard(self, choice: Choice, *, limit: int | None) -> "Plan":
        """Return what a deletion would delete, for its confirmation. No dead letter is held after that."""
        now, short = datetime.now(UTC), ShortDigests()
        selection = Selection[tuple[Listing, bytes]](choice, now, limit)

        def on_letter(dead_letter: DeadLetter) -> None:
            short.add(dead_letter.digest)
            if selection.wants(dead_letter):
                selection.hold((dead_letter.listing(now), dead_letter.fingerprint))

        selected, count = self._read(selection, on_letter, cuts_bodies=False)
        letters = tuple(listing for listing, _ in selected.kept)
        fingerprints = frozenset(fingerprint for _, fingerprint in selected.kept)
        return Plan(Found(letters, count, selected.missing, short), fingerprints)

    def _open(self) -> DeadLetterReader:
        return DeadLetterReader(self._broker, self._topology, self._zone)

    def _read(
        self, selection: Selection[Kept], on_letter: Callable[[DeadLetter], None], *, cuts_bodies: bool = True
    ) -> tuple[Selected[Kept], Count]:
        with self._open() as reader:
            read = reader.read(on_letter, cuts_bodies=cuts_bodies)
        selected = selection.result()
        return selected, Count(selected.matching, read, max(read, reader.waiting))

    @staticmethod
    def _shown(dead_letter: DeadLetter, short: str, now: datetime) -> Shown:
        listing = dead_letter.listing(now)
        advice = advise(listing, short, is_valid=dead_letter.is_valid)
        return Shown(listing, short, details(dead_letter, now), text_of(dead_letter), advice)


class Replay:
    """Dead letters on their way back to the workers: a context manager, which holds the queue until ``run`` has ended.

    Attributes:
        letters: what is to be replayed, the oldest first.
        hopeless: what was chosen too, and stays in the queue: it has expired, and would fail again at once.
        missing: names of which there is no dead letter.
        count: of all dead letters.
        short: returns the shortest beginning of a digest that commands take.
        is_watched: whether the outcomes are read.
        replayed: how many of ``letters``, from the first one on, the broker has confirmed.
        is_unsure: whether the next one may have been replayed as well: it was interrupted in the middle of it.
    """

    def __init__(
        self,
        broker: BrokerAddress,
        topology: Topology,
        zone: ZoneInfo,
        choice: Choice,
        limit: int | None,
        interval_s: float | None,
        leaves_hopeless: bool,
        is_watched: bool,
    ) -> None:
        self._broker = broker
        self._topology = topology
        self._zone = zone
        self._choice = choice
        self._limit = limit
        self._interval_s = interval_s
        self._leaves_hopeless = leaves_hopeless
        self.is_watched = is_watched
        self._stack = ExitStack()
        self._reading = ExitStack()
        self._held: list[DeadLetter] = []
        self._watcher: OutcomeWatcher | None = None
        self._outcomes: dict[int, Outcome] = {}
        self._untold: list[Outcome] = []
        self.letters: list[Listing] = []
        self.hopeless: tuple[Listing, ...] = ()
        self.missing: tuple[str, ...] = ()
        self.count = Count(0, 0, 0)
        self.short = ShortDigests()
        self.replayed = 0
        self.is_unsure = False

    def __enter__(self) -> Self:
        """Read the queue.

        Raises:
            WorkerError: at the wanted rate the broker would not let the dead letters be held so long.
        """
        with ExitStack() as stack:
            stack.push(self._close)
            self._reader = self._reading.enter_context(DeadLetterReader(self._broker, self._topology, self._zone))
            self._select()
            if self.is_watched and self.letters:
                self._watcher = self._stack.enter_context(OutcomeWatcher(self._broker, self._topology))
            stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close(kind, error, traceback)

    def _close(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, traceback)
        self._reading.__exit__(kind, error, traceback)

    def _select(self) -> None:
        now = datetime.now(UTC)
        selection = Selection[DeadLetter](self._choice, now, self._limit, leaves_hopeless=self._leaves_hopeless)

        def on_letter(dead_letter: DeadLetter) -> None:
            self.short.add(dead_letter.digest)
            if selection.wants(dead_letter):
                selection.hold(dead_letter)

        read = self._reader.read(on_letter)
        selected = selection.result()
        self.missing = selected.missing
        self.count = Count(selected.matching, read, max(read, self._reader.waiting))
        self.hopeless = selected.hopeless
        self._held = [*selected.kept]
        self.letters = [dead_letter.listing(now) for dead_letter in selected.kept]
        refuse_too_many(len(self.letters), self._interval_s)

    def run(self) -> Iterator[Listing]:
        """Replay one dead letter after the other; yields each once the broker has confirmed it.

        At the end the queue is free for others, and has all that was not replayed.

        Raises:
            WorkerError: the broker did not take one; ``replayed`` tells which.
        """
        due = 0.0
        for number, dead_letter in enumerate(self._held):
            if self._interval_s is not None:
                self._wait_until(due)
                due = time.monotonic() + self._interval_s
            address = None if self._watcher is None else self._watcher.address(number)
            self.is_unsure = True
            self._reader.replay(dead_letter, datetime.now(UTC), address)
            self.is_unsure = False
            self.replayed += 1
            self._receive(0)
            yield self.letters[number]
        self._held = []
        self._reading.close()

    def _wait_until(self, due: float) -> None:
        """Wait, and keep both connections alive: each has its heartbeats."""
        while (left_s := due - time.monotonic()) > 0:
            self._reader.wait(min(left_s, _WAIT_SLICE_S))
            self._receive(0)

    def outcomes(self, timeout_s: float, on_obstacle: Callable[[Obstacle], object]) -> Iterator[Outcome]:
        """Yield the outcome of each replayed dead letter once, as they arrive.

        Args:
            timeout_s: how long to wait for all of them, in seconds.
            on_obstacle: called once with each reason that is found why none comes.

        Raises:
            BrokerUnavailable: the connection was lost.
        """
        end = time.monotonic() + timeout_s
        look_at = time.monotonic() + _LOOK_S
        told: set[tuple[str, str | None]] = set()
        while True:
            yield from self._untold
            self._untold = []
            now = time.monotonic()
            if not self.without_outcome or now >= end:
                return
            if now >= look_at:
                for obstacle in self.find_obstacles():
                    if (obstacle.kind, obstacle.scope) not in told:
                        told.add((obstacle.kind, obstacle.scope))
                        on_obstacle(obstacle)
                look_at = now + _LOOK_S
            self._receive(min(_POLL_S, end - now))

    @property
    def without_outcome(self) -> list[Listing]:
        """What was replayed, and has no outcome yet."""
        return [self.letters[number] for number in range(self.replayed) if number not in self._outcomes]

    def count_outcomes(self) -> dict[str, int]:
        """Return how often each outcome came: a status, with the error code of what was not accepted."""
        counts: dict[str, int] = {}
        for outcome in self._outcomes.values():
            code = outcome.error.get("code")
            kind = f"{outcome.status} ({code})" if code else outcome.status
            counts[kind] = counts.get(kind, 0) + 1
        return dict(sorted(counts.items(), key=lambda item: -item[1]))

    def find_obstacles(self) -> list[Obstacle]:
        """Return why the replayed commands are not sent soon, as far as it is known."""
        products = {listing.product for listing in self.letters}
        with suppress(BrokerUnavailable):  # what was replayed is replayed
            return find_obstacles(self._broker, self._topology, products)
        return []

    def _receive(self, wait_s: float) -> None:
        if self._watcher is None:
            return
        for number, reply in self._watcher.receive(wait_s):
            if number < self.replayed and number not in self._outcomes:
                self._outcomes[number] = Outcome(self.letters[number], reply)
                self._untold.append(self._outcomes[number])


@dataclass(frozen=True)
class Plan:
    """What a deletion is to delete, and nothing else.

    Args:
        found: the dead letters.
        fingerprints: hashes of their messages.
    """

    found: Found
    fingerprints: frozenset[bytes]


class Discard:
    """Dead letters that are being deleted: a context manager, which holds the queue.

    Attributes:
        letters: what is to be deleted, the oldest first.
        missing: names of which there is no dead letter.
        deleted: how many of ``letters``, from the first one on.
    """

    def __init__(self, reader: DeadLetterReader, choice: Choice, limit: int | None, plan: Plan | None) -> None:
        self._reader = reader
        self._choice = choice
        self._limit = limit
        self._plan = plan
        self._tags: list[int] = []
        self.letters: Sequence[Listing] = ()
        self.missing: tuple[str, ...] = ()
        self.deleted = 0

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.push(self._reader.__exit__)
            found = self._find_chosen() if self._plan is None else self._find_planned(self._plan)
            self.letters = tuple(listing for _, listing in found)
            self._tags = [tag for tag, _ in found]
            stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._reader.__exit__(kind, error, traceback)

    def run(self) -> Iterator[Listing]:
        """Delete one after the other; yields each.

        Raises:
            BrokerUnavailable: the connection was lost; ``deleted`` tells how far it came.
        """
        for tag, listing in zip(self._tags, self.letters, strict=True):
            self._reader.remove(tag)
            self.deleted += 1
            yield listing

    def _find_chosen(self) -> Sequence[tuple[int, Listing]]:
        now = datetime.now(UTC)
        selection = Selection[tuple[int, Listing]](self._choice, now, self._limit)

        def on_letter(dead_letter: DeadLetter) -> None:
            if selection.wants(dead_letter):
                selection.hold((dead_letter.tag, dead_letter.listing(now)))

        self._reader.read(on_letter, cuts_bodies=True)
        selected = selection.result()
        self.missing = selected.missing
        return selected.kept

    def _find_planned(self, plan: Plan) -> Sequence[tuple[int, Listing]]:
        now = datetime.now(UTC)
        found: list[tuple[int, Listing]] = []

        def on_letter(dead_letter: DeadLetter) -> None:
            if dead_letter.fingerprint in plan.fingerprints:
                found.append((dead_letter.tag, dead_letter.listing(now)))

        self._reader.read(on_letter, expected=plan.found.count.waiting)
        return found


def refuse_too_many(count: int, interval_s: float | None) -> None:
    """Refuse a replay that would hold dead letters longer than the broker lets a consumer hold a message.

    Raises:
        WorkerError: it would; the error says how many can be replayed.
    """
    if interval_s is not None and (count - 1) * interval_s > MAX_HELD_S:
        largest = int(MAX_HELD_S / interval_s) + 1
        raise WorkerError(f"{count:,} dead letters take too long at that rate: use --limit {largest} or less")
