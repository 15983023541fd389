"""The records of one process: enough for one worker, and gone when it ends.

Whatever the texts of senders and of the platform are, a record takes about a kilobyte: one wide character makes each
character of a Python string take four bytes, so ids are kept as digests and replies in UTF-8.
"""

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Self

from schemas.reply import Reply
from schemas.result import Result
from worker.core.claims import (
    Claim,
    Completed,
    InProgress,
    Inspection,
    Key,
    KeyReused,
    KnownNotSent,
    Lease,
    Unresolved,
    Unseen,
    failed_ms,
)
from worker.core.command import differing_fields
from worker.core.doubt_window import DoubtWindow
from worker.core.envelope import Replay
from worker.core.ownership import Owner, OwnershipFacts
from worker.core.times import milliseconds
from worker.core.uuids import canonical_uuid, folded_uuid
from worker.errors import LeaseLost, StoreUnavailable, UuidTaken
from worker.idempotency.packed_replies import PackedReplies

MAX_ACCEPTED = 8_000  # at least this many accepted commands are kept, at most twice as many
MAX_OTHERS = 10_000
MAX_LONG_BYTES = 4 * 1024 * 1024  # of the replies of these with long texts; then the texts of the oldest are cut
_LONG_BYTES = 600  # more than a reply takes that has a text of OneNET's documents
_MAX_CUT_CHARS = 50  # 200 bytes at most


@dataclass(slots=True)
class _Record:
    id: str
    content_hash: bytes
    match_key: bytes
    field_digests: bytes = b""
    expires_at: float = 0
    token: int = 0
    lease_ends_at: float | None = None  # None: no lease is held
    claimed_at: datetime | None = None
    doubt: DoubtWindow | None = None
    holder_crashed: bool = False
    uuid: tuple[str, str] | None = None  # its value, and folded
    reply: bytes | None = None  # as JSON, without the command id: a third of the size of the object


class MemoryStore:
    """Keeps at least the latest 8,000 accepted commands and 10,000 others, each until its time to live ends.

    No call suspends, so each is atomic on the event loop.

    Args:
        ttl_s: lifetime of a record after its last write, in seconds.
        lease_s: duration of a lease, in seconds.
        clock: monotonic time in seconds; replaced in tests.
        began_at: when this process started, or later. Commands that were sent before may be missing here.
        max_accepted: at least this many accepted commands are kept, at most twice as many.
        max_others: limit of the commands that are held, in doubt, rejected or failed. The oldest go first, but none
            with a lease.
    """

    is_shared = False

    def __init__(
        self,
        ttl_s: float,
        lease_s: float,
        *,
        began_at: datetime,
        clock: Callable[[], float] = time.monotonic,
        max_accepted: int = MAX_ACCEPTED,
        max_others: int = MAX_OTHERS,
    ) -> None:
        self._ttl_s = ttl_s
        self._lease_s = lease_s
        self._clock = clock
        self._max_others = max_others
        self.on_unavailable: Callable[[StoreUnavailable], object] = lambda _error: None  # never called
        self._accepted = PackedReplies(ttl_s, max_accepted)
        self._records: OrderedDict[str, _Record] = OrderedDict()  # by id, of all commands that are not in _accepted
        self._long: OrderedDict[str, int] = OrderedDict()  # id of a record with a long reply -> bytes of the reply
        self._long_bytes = 0
        self._owners: dict[str, str] = {}  # value of a uuid -> id of its command's record
        self._guesses: set[str] = set()  # values of the uuids whose owner is a guess
        self._values: dict[str, str] = {}  # folded uuid -> value of the first such uuid with an owner
        self._now = began_at
        self._unrecorded_until = began_at  # attempts before may have been recorded by another process
        self._lookalikes: dict[bytes, set[str]] = {}  # match key -> ids of the records held or in doubt

    @property
    def local(self) -> Self:
        """The records of this process."""
        return self

    @property
    def forgotten_before(self) -> datetime:
        """When the records begin."""
        return self._unrecorded_until

    async def claim(
        self,
        key: Key,
        now: datetime,
        replay: Replay | None = None,
        *,
        is_first: bool = True,  # noqa: ARG002 - whatever the delivery says: its records end with the process
    ) -> Claim:
        self._now = now
        record_id = _digest(key.scoped_id)
        record = self._records.get(record_id)
        if record is not None and self._is_stale(record):
            self._remove(record)
            record = None
        if record is None and (found := self._accepted.find(record_id, key, self._clock())) is not None:
            return found
        if record is None:
            self._keep_owner_of_lookalike(key.match_key)
            return Unseen(self._grant(_new(key, record_id), key, now), self._unrecorded_until, self._unrecorded_until)
        if record.content_hash != key.content_hash:
            return KeyReused(differing_fields(record.field_digests, key.field_digests))
        if record.reply is not None:
            reply = _unpacked(record.reply, key.command_id)
            if replay is None or failed_ms(reply) != milliseconds(replay.failed_at):
                return Completed(reply)
            self._set_reply(record, None)
            record.doubt, record.holder_crashed = replay.doubt, False
        if record.lease_ends_at is not None:
            assert record.claimed_at is not None  # written with the lease
            if self._clock() < record.lease_ends_at:
                return InProgress(DoubtWindow(record.claimed_at, record.claimed_at).union(record.doubt).since)
            lease_time = DoubtWindow(record.claimed_at, record.claimed_at + timedelta(seconds=self._lease_s))
            record.doubt, record.holder_crashed = lease_time.union(record.doubt), True
        lease = self._grant(record, key, now)
        if record.doubt is None:
            return KnownNotSent(lease)
        return Unresolved(lease, record.doubt, record.holder_crashed)

    def mark_not_sent(self, key: Key) -> None:
        record_id = _digest(key.scoped_id)
        if record_id not in self._records and self._accepted.find(record_id, key, self._clock()) is None:
            self._write(_new(key, record_id))

    def was_claimed(self, key: Key) -> bool:
        record_id = _digest(key.scoped_id)
        record = self._records.get(record_id)
        if record is None:
            return self._accepted.find(record_id, key, self._clock()) is not None
        return any((record.reply, record.doubt, record.lease_ends_at))

    @property
    def wants_arrivals(self) -> bool:
        return False  # the consumer marks what it did not start

    async def note_arrival(self, key: Key, arrived_at: datetime) -> None:
        """Do nothing: records end with the process that a redelivery may come from."""

    async def is_known_not_sent(self, key: Key) -> bool | None:
        record_id = _digest(key.scoped_id)
        record = self._records.get(record_id)
        if record is None:
            return None if self._accepted.find(record_id, key, self._clock()) is None else False
        return not any((record.reply, record.doubt, record.lease_ends_at))

    async def release(self, lease: Lease, doubt: DoubtWindow | None, *, holder_crashed: bool = False) -> None:
        record = self._leased(lease)
        record.doubt, record.holder_crashed = doubt, holder_crashed
        if doubt is None:
            self._remove_lookalike(record)
        self._end_lease(record)

    async def owned_by_others(self, owner_id: str, uuids: Sequence[str]) -> set[str]:
        return {uuid for uuid in self._others(owner_id, uuids) if not self._is_guess(uuid)}

    async def ownership(self, lease: Lease, uuids: Sequence[str]) -> OwnershipFacts:
        self._leased(lease)
        others = self._others(lease.owner_id, uuids)
        lookalikes = self._lookalikes[lease.key.match_key] - {lease.owner_id}
        return OwnershipFacts(
            {uuid: self._owner(uuid, is_other=uuid in others) for uuid in uuids},
            len(lookalikes),
            any(self._has_lease(self._records[lookalike]) for lookalike in lookalikes),
        )

    async def complete(self, lease: Lease, reply: Reply, doubt: DoubtWindow | None, *, is_guess: bool = False) -> None:
        record = self._leased(lease)
        if reply.uuid is not None and self._others(lease.owner_id, [reply.uuid]):
            record.doubt, record.holder_crashed = doubt, False
            self._end_lease(record)
            raise UuidTaken(lease.key.command_id)
        value = None if reply.uuid is None else _value(reply.uuid)
        if value is not None and is_guess and value not in self._owners:
            self._guesses.add(value)
        has_lookalikes = len(self._lookalikes[lease.key.match_key]) > 1  # they may ask for the uuid's owner later
        is_plain = not has_lookalikes and value not in self._guesses
        if is_plain and self._accepted.add(record.id, lease.key, reply, self._clock()):
            self._delete(record)
            return
        self._set_reply(record, _packed(reply))
        if reply.uuid is not None:
            self._set_owner(record, reply.uuid)
        self._remove_lookalike(record)
        self._end_lease(record)

    async def first_results(self, found: Sequence[tuple[str, Result]]) -> list[Result]:
        return [result for _, result in found]

    async def ping(self) -> None:
        """Do nothing: memory is always available."""

    async def inspect(self) -> Inspection:
        return Inspection(("in memory: for a single worker, and until it ends",))

    async def close(self) -> None:
        """Do nothing: there is no connection."""

    def _grant(self, record: _Record, key: Key, now: datetime) -> Lease:
        record.token += 1
        record.claimed_at = now
        record.lease_ends_at = self._clock() + self._lease_s
        self._lookalikes.setdefault(record.match_key, set()).add(record.id)
        self._write(record)
        return Lease(key, record.token, record.lease_ends_at, record.id)

    def _leased(self, lease: Lease) -> _Record:
        record = self._records.get(lease.owner_id)
        if record is None or record.token != lease.token or record.lease_ends_at is None:
            raise LeaseLost(lease.key.command_id)
        return record

    def _has_lease(self, record: _Record) -> bool:
        return record.lease_ends_at is not None and self._clock() < record.lease_ends_at

    def _end_lease(self, record: _Record) -> None:
        record.lease_ends_at = None
        self._write(record)

    def _keep_owner_of_lookalike(self, match_key: bytes) -> None:
        """Keep the uuid of an accepted lookalike while this command may come in doubt.

        The packed replies may be replaced before then.
        """
        uuid = self._accepted.uuid_of_lookalike(match_key)
        if uuid is not None and uuid not in self._owners:
            lookalike = _Record(_digest(f"#{uuid}"), b"", match_key, reply=b"")  # no command id contains a #
            self._set_owner(lookalike, uuid)
            self._write(lookalike)

    def _others(self, owner_id: str, uuids: Sequence[str]) -> set[str]:
        """Return which uuids belong to other commands, for certain or as a guess."""
        others = {uuid for uuid in uuids if self._owner_id(uuid) not in {None, owner_id}}
        accepted = self._accepted.owned_by_others(owner_id, map(canonical_uuid, uuids))
        return others | {uuid for uuid in uuids if canonical_uuid(uuid) in accepted} if accepted else others

    def _owner(self, uuid: str, *, is_other: bool) -> Owner | None:
        """Return a uuid's owner. The packed replies do not have its id, only that it is another command."""
        owner = self._owner_id(uuid)
        return Owner(owner, not self._is_guess(uuid)) if is_other or owner is not None else None

    def _owner_id(self, uuid: str) -> str | None:
        return self._owners.get(_value(uuid)) or self._owners.get(self._values.get(_folded(uuid), ""))

    def _is_guess(self, uuid: str) -> bool:
        """Return whether a uuid's owner is a guess; a uuid that only resembles one with an owner may be another."""
        value = _value(uuid)
        return value in self._guesses or (value not in self._owners and _folded(uuid) in self._values)

    def _set_owner(self, record: _Record, uuid: str) -> None:
        value, folded = record.uuid = _value(uuid), _folded(uuid)
        self._owners.setdefault(value, record.id)
        self._values.setdefault(folded, value)

    def _set_reply(self, record: _Record, reply: bytes | None) -> None:
        self._long_bytes -= self._long.pop(record.id, 0)
        record.reply = reply
        if reply is not None and len(reply) > _LONG_BYTES:
            self._long[record.id] = len(reply)
            self._long_bytes += len(reply)
        while self._long_bytes > MAX_LONG_BYTES:
            oldest_id, size = self._long.popitem(last=False)
            self._long_bytes -= size
            oldest = self._records[oldest_id]
            assert oldest.reply is not None  # it is long
            oldest.reply = _cut(oldest.reply)

    def _remove_lookalike(self, record: _Record) -> None:
        lookalikes = self._lookalikes.get(record.match_key, set())
        lookalikes.discard(record.id)
        if not lookalikes:
            self._lookalikes.pop(record.match_key, None)

    def _write(self, record: _Record) -> None:
        record.expires_at = self._clock() + self._ttl_s
        self._records[record.id] = record
        self._records.move_to_end(record.id)
        while len(self._records) > self._max_others or self._is_stale(next(iter(self._records.values()))):
            oldest = next(iter(self._records.values()))
            if oldest.lease_ends_at is not None:
                break  # at most one per delivery that is being processed
            self._remove(oldest)

    def _remove(self, record: _Record) -> None:
        if record.reply is None:
            self._unrecorded_until = self._now
        self._delete(record)

    def _delete(self, record: _Record) -> None:
        del self._records[record.id]
        self._long_bytes -= self._long.pop(record.id, 0)
        self._remove_lookalike(record)
        if record.uuid is not None:
            value, folded = record.uuid
            self._owners.pop(value, None)
            self._guesses.discard(value)
            if self._values.get(folded) == value:
                del self._values[folded]

    def _is_stale(self, record: _Record) -> bool:
        return record.lease_ends_at is None and record.expires_at <= self._clock()


def _new(key: Key, record_id: str) -> _Record:
    return _Record(record_id, key.content_hash, key.match_key, key.field_digests)


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _value(uuid: str) -> str:
    return _short(canonical_uuid(uuid))


def _folded(uuid: str) -> str:
    return _short(folded_uuid(uuid))


def _short(uuid: str) -> str:
    """Return a canonical or folded uuid, or a digest if it has wide characters: none is written like a digest."""
    return uuid if uuid.isascii() else _digest(uuid)


def _packed(reply: Reply) -> bytes:
    return reply.model_copy(update={"command_id": None}).model_dump_json(exclude_defaults=True).encode()


def _unpacked(data: bytes, command_id: str) -> Reply:
    return Reply.model_validate_json(data).model_copy(update={"command_id": command_id})


def _cut(data: bytes) -> bytes:
    """Return a recorded reply with no more than the beginning of its error's text."""
    reply = Reply.model_validate_json(data)
    if reply.error is None:
        return data
    error = reply.error.model_copy(update={"message": f"{reply.error.message[:_MAX_CUT_CHARS]}\u2026"})
    return _packed(reply.model_copy(update={"error": error}))
