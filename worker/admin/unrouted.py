"""Replies and results that no queue was bound for: listed, published again, discarded."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cached_property
from typing import Any

from schemas.command import MAX_BODY_BYTES
from worker.amqp.address import BrokerAddress
from worker.amqp.bodies import body_document
from worker.amqp.queue_reader import QueueMessage
from worker.amqp.topology import EXECUTE, RESULT, Topology
from worker.amqp.unrouted import UnroutedReader
from worker.core.times import parse_instant
from worker.printable import utc

_TIMES = ("completed_at", "observed_at")  # of a reply, of a result


@dataclass(frozen=True)
class UnroutedReply:
    """One reply or result that no queue was bound for."""

    message: QueueMessage

    @property
    def routing_key(self) -> str:
        return self.message.routing_key

    @property
    def source(self) -> str | None:
        """The upstream system whom it is for; None: its routing key is a ``reply_to``, which names no system."""
        first, _, rest = self.routing_key.partition(".")
        source = rest.partition(".")[2]
        return source if first in {EXECUTE, RESULT} and source else None

    @property
    def command_id(self) -> str | None:
        found = self._fields.get("command_id")
        return found if isinstance(found, str) else None

    @cached_property
    def occurred_at(self) -> datetime | None:
        """When it became true what it tells, in UTC; None if it does not say."""
        for name in _TIMES:
            try:
                return parse_instant(str(self._fields[name]))
            except (KeyError, ValueError):
                continue
        return None

    @property
    def digest(self) -> bytes:
        """A hash that identifies it across deliveries."""
        identity = (self.routing_key, self.message.properties.correlation_id, self.message.body[:MAX_BODY_BYTES])
        return hashlib.blake2b(repr(identity).encode(), digest_size=16).digest()

    @cached_property
    def _fields(self) -> dict[str, Any]:
        try:
            found = json.loads(self.message.body)
        except (ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}


def unrouted_document(reply: UnroutedReply) -> dict[str, Any]:
    """Return an unrouted reply or result as a JSON object, with its body."""
    return {
        "routing_key": reply.routing_key,
        "source": reply.source,
        "command_id": reply.command_id,
        "occurred_at": utc(reply.occurred_at),
        "type": reply.message.properties.type,
        "correlation_id": reply.message.properties.correlation_id,
        **body_document(reply.message.body),
    }


@dataclass(frozen=True, slots=True)
class UnroutedFilter:
    """Selects the unrouted replies that meet every given condition."""

    keys: frozenset[str] = frozenset()
    source: str | None = None
    older_than: timedelta | None = None

    @property
    def is_empty(self) -> bool:
        return self == UnroutedFilter()

    def matches(self, reply: UnroutedReply, now: datetime) -> bool:
        """Tell whether a reply is selected. One of unknown age is not older; a system's own keys are its name too."""
        is_of_source = self.source is None or reply.source == self.source or self._is_reply_to_source(reply)
        is_old = self.older_than is None or (
            reply.occurred_at is not None and now - reply.occurred_at > self.older_than
        )
        return (not self.keys or reply.routing_key in self.keys) and is_of_source and is_old

    def _is_reply_to_source(self, reply: UnroutedReply) -> bool:
        key, source = reply.routing_key, self.source
        return reply.source is None and (key == source or key.startswith(f"{source}."))


@dataclass(slots=True)
class UnroutedGroup:
    """The unrouted replies of one routing key; ``command_id`` is that of its oldest one that has any."""

    routing_key: str
    source: str | None
    count: int = 0
    oldest_at: datetime | None = None
    newest_at: datetime | None = None
    command_id: str | None = None

    def add(self, reply: UnroutedReply) -> None:
        """Count one more."""
        self.count += 1
        self.command_id = self.command_id or reply.command_id
        if reply.occurred_at is not None:
            self.oldest_at = min(self.oldest_at or reply.occurred_at, reply.occurred_at)
            self.newest_at = max(self.newest_at or reply.occurred_at, reply.occurred_at)


@dataclass(slots=True)
class Unrouted:
    """What was found of the unrouted replies.

    Attributes:
        groups: of those that match, the most frequent routing key first.
        matching: how many match.
        read: how many were read.
        waiting: how many there were; more than were read only if they are more than one reader can hold.
        digests: of those that match, the oldest first.
    """

    groups: list[UnroutedGroup]
    matching: int
    read: int
    waiting: int
    digests: list[bytes]


@dataclass(slots=True)
class Discarded:
    """How many replies were selected, how many of them are deleted, and how many waited before."""

    selected: int = 0
    count: int = 0
    waiting: int = 0


@dataclass(slots=True)
class Published:
    """What became of replies that were published again.

    Attributes:
        selected: how many were to be published.
        count: how many a queue has received.
        waiting: how many waited before.
        unbound: how many there are still of each routing key that no queue is bound for.
    """

    selected: int = 0
    count: int = 0
    waiting: int = 0
    unbound: Counter[str] = field(default_factory=Counter)


def list_unrouted(
    broker: BrokerAddress,
    topology: Topology,
    chosen: UnroutedFilter,
    now: datetime,
    *,
    limit: int | None = None,
    on_reply: Callable[[UnroutedReply], object] = lambda _reply: None,
) -> Unrouted:
    """Look at the unrouted replies, which all stay where they are.

    Args:
        broker: where to connect.
        topology: names the queue.
        chosen: which of them.
        now: the time, aware.
        limit: how many of them at most, the oldest first.
        on_reply: called with each of them.

    Raises:
        WorkerError: another command is reading them, or the queue is missing.
        BrokerUnavailable: no broker answers, or the connection was lost.
    """
    groups: dict[str, UnroutedGroup] = {}
    digests: list[bytes] = []
    matching = 0

    def on_message(message: QueueMessage) -> None:
        nonlocal matching
        reply = UnroutedReply(message)
        if not chosen.matches(reply, now):
            return
        matching += 1
        if limit is not None and matching > limit:
            return
        digests.append(reply.digest)
        groups.setdefault(reply.routing_key, UnroutedGroup(reply.routing_key, reply.source)).add(reply)
        on_reply(reply)

    with UnroutedReader(broker, topology) as reader:
        read = reader.read_messages(on_message, cuts_bodies=True)
        waiting = reader.waiting
    ordered = sorted(groups.values(), key=lambda group: -group.count)
    return Unrouted(ordered, matching, read, waiting, digests)


def publish_unrouted(
    broker: BrokerAddress,
    topology: Topology,
    chosen: UnroutedFilter,
    now: datetime,
    *,
    limit: int | None,
    done: Published,
    on_selected: Callable[[int], Callable[[], object]],
) -> None:
    """Publish unrouted replies again, each under its own routing key, the oldest first.

    Each leaves the queue only after the broker has confirmed its copy, so that none is lost whatever happens, and one
    may arrive twice. After the first of a routing key that no queue is bound for, the others of that key are left
    alone.

    Args:
        broker: where to connect.
        topology: names the queue and the exchange of replies.
        chosen: which of them.
        now: the time, aware.
        limit: how many of them at most.
        done: what was done is added to it, also if an error or an interrupt ends it.
        on_selected: called with the number of those that are selected; returns what is called after each of them.

    Raises:
        WorkerError: another command is reading them, the queue is missing, or the broker refused one.
        BrokerUnavailable: no broker answers, or the connection was lost.
    """
    with UnroutedReader(broker, topology) as reader:
        replies: list[UnroutedReply] = []
        _select(reader, chosen, now, limit, replies.append)
        done.selected, done.waiting = len(replies), reader.waiting
        on_each = on_selected(len(replies))
        for reply in replies:
            if reply.routing_key in done.unbound or not reader.publish(reply.message):
                done.unbound[reply.routing_key] += 1
            else:
                done.count += 1
            on_each()


def discard_unrouted(
    broker: BrokerAddress,
    topology: Topology,
    chosen: UnroutedFilter,
    now: datetime,
    *,
    limit: int | None,
    agreed: Unrouted | None,
    done: Discarded,
) -> None:
    """Delete unrouted replies; the others keep their order.

    Args:
        broker: where to connect.
        topology: names the queue.
        chosen: which of them.
        now: the time, aware.
        limit: how many of them at most, the oldest first.
        agreed: those that a person has seen and agreed to; None: all.
        done: what was done is added to it, also if an error or an interrupt ends it.

    Raises:
        WorkerError: another command is reading them, or the queue is missing.
        BrokerUnavailable: no broker answers, or the connection was lost.
    """
    digests = None if agreed is None else frozenset(agreed.digests)
    with UnroutedReader(broker, topology) as reader:
        tags: list[int] = []

        def on_reply(reply: UnroutedReply) -> None:
            if digests is None or reply.digest in digests:
                tags.append(reply.message.tag)

        expected = 0 if agreed is None else agreed.waiting
        _select(reader, chosen, now, limit, on_reply, cuts_bodies=True, expected=expected)
        done.selected, done.waiting = len(tags), reader.waiting
        for tag in tags:
            reader.remove(tag)
            done.count += 1


def _select(
    reader: UnroutedReader,
    chosen: UnroutedFilter,
    now: datetime,
    limit: int | None,
    on_reply: Callable[[UnroutedReply], object],
    *,
    cuts_bodies: bool = False,
    expected: int = 0,
) -> None:
    """Call ``on_reply`` with each reply that is chosen, the oldest first."""
    count = 0

    def on_message(message: QueueMessage) -> None:
        nonlocal count
        reply = UnroutedReply(message)
        if (limit is None or count < limit) and chosen.matches(reply, now):
            count += 1
            on_reply(reply)

    reader.read_messages(on_message, cuts_bodies=cuts_bodies, expected=expected)
