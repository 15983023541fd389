"""What one process remembers: enough for one worker, and forgotten with it."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from schemas.reply import Reply
from worker.core.claims import (
    Ambiguous,
    Assigned,
    Assignment,
    Claim,
    Completed,
    InProgress,
    Key,
    KeyReused,
    KnownNotSent,
    Lease,
    LookalikeInProgress,
    NoCandidate,
    OnRecorded,
    Unresolved,
    Unseen,
    failed_ms,
)
from worker.core.doubt import DoubtWindow
from worker.core.replay import Replay
from worker.core.times import milliseconds
from worker.core.uuids import canonical_uuid, folded_uuid
from worker.errors import LeaseLost, UuidTaken
from worker.idempotency.packed_replies import PackedReplies

MAX_ACCEPTED = 8_000  # half of what is remembered at most
MAX_OTHERS = 10_000


@dataclass(slots=True)
class _Record:
    key: Key
    expires_at: float = 0
    token: int = 0
    lease_ends_at: float | None = None  # while it is held
    claimed_at: datetime | None = None
    doubt: DoubtWindow | None = None
    holder_crashed: bool = False
    uuid: str | None = None  # its value
    reply: bytes | None = None  # as JSON, a third of the size of the object


class MemoryStore:
    """Remembers the latest 8,000 accepted commands or more, and 10,000 others, each for a time to live.

    Args:
        ttl_s: seconds for which a record lasts after it was last written.
        lease_s: seconds for which a claim is good.
        clock: monotonic time in seconds; replaced in tests.
        began_at: when this process began, or later: until then others may have sent what is not recorded here.
        max_accepted: so many of the latest that were accepted are remembered, and up to as many again.
        max_others: of what is held, in doubt, rejected or failed; the oldest that nobody holds go first.
    """

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
        self._lock = threading.Lock()
        self._accepted = PackedReplies(ttl_s, max_accepted)
        self._records: OrderedDict[str, _Record] = OrderedDict()  # of all others
        self._owners: dict[str, str] = {}  # value of a uuid -> command id
        self._guessed: set[str] = set()  # of those that may as well belong to another command just like their owner
        self._values: dict[str, str] = {}  # likeness of a uuid -> value of the first that has an owner
        self._now = began_at
        self._unrecorded_until = began_at  # by processes before this one
        self._alike: dict[bytes, set[str]] = {}  # likeness -> ids of commands that are held or in doubt

    def claim(self, key: Key, now: datetime, replay: Replay | None = None) -> Claim:
        with self._lock:
            self._now = now
            record = self._records.get(key.command_id)
            if record is not None and self._is_stale(record):
                self._remove(record)
                record = None
            if record is None and (found := self._accepted.find(key, self._clock())) is not None:
                return found
            if record is None:
                self._remember_twin(key.match_key)
                return Unseen(self._grant(_Record(key), now), self._unrecorded_until, self._unrecorded_until)
            if record.key.content_hash != key.content_hash:
                return KeyReused()
            if record.reply is not None:
                reply = Reply.model_validate_json(record.reply)
                if replay is None or failed_ms(reply) != milliseconds(replay.failed_at):
                    return Completed(reply)
                record.reply, record.doubt, record.holder_crashed = None, replay.doubt, False
            if record.lease_ends_at is not None:
                assert record.claimed_at is not None  # written with the lease
                if self._clock() < record.lease_ends_at:
                    return InProgress(DoubtWindow(record.claimed_at, record.claimed_at).union(record.doubt).since)
                lease = DoubtWindow(record.claimed_at, record.claimed_at + timedelta(seconds=self._lease_s))
                record.doubt, record.holder_crashed = lease.union(record.doubt), True
            hold = self._grant(record, now)
            return KnownNotSent(hold) if record.doubt is None else Unresolved(hold, record.doubt, record.holder_crashed)

    def mark_not_sent(self, key: Key) -> None:
        with self._lock:
            if key.command_id not in self._records and self._accepted.find(key, self._clock()) is None:
                self._write(_Record(key))

    def is_claimed_here(self, key: Key) -> bool:
        with self._lock:
            record = self._records.get(key.command_id)
            if record is None:
                return self._accepted.find(key, self._clock()) is not None
            return any((record.reply, record.doubt, record.lease_ends_at))

    def release(self, hold: Lease, doubt: DoubtWindow | None, *, holder_crashed: bool = False) -> None:
        with self._lock:
            record = self._held(hold)
            record.doubt, record.holder_crashed = doubt, holder_crashed
            if doubt is None:
                self._forget_likeness(record)
            self._let_go(record)

    def owned_by_others(self, key: Key, uuids: Sequence[str]) -> set[str]:
        with self._lock:
            return {uuid for uuid in self._others(key.command_id, uuids) if not self._is_guessed(uuid)}

    def own(self, hold: Lease, uuids: Sequence[str], unlikely: Sequence[str]) -> Assignment:
        with self._lock:
            record = self._held(hold)
            me = hold.key.command_id
            others = self._others(me, [*uuids, *unlikely])
            free = [uuid for uuid in uuids if uuid not in others]
            free_unlikely = [uuid for uuid in unlikely if uuid not in others]
            if not free and not free_unlikely:
                return Ambiguous() if any(map(self._is_guessed, [*uuids, *unlikely])) else NoCandidate()
            twins = self._alike[hold.key.match_key] - {me}
            if any(self._is_held(self._records[twin]) for twin in twins):
                return LookalikeInProgress()
            if not free or len(free) + len(free_unlikely) > len(twins) + 1:
                return Ambiguous()
            uuid = next((uuid for uuid in free if self._owner(uuid) is not None), free[0])
            if self._owner(uuid) is None and len(free) + len(free_unlikely) > 1:
                self._guessed.add(canonical_uuid(uuid))
            self._set_owner(record, uuid)
            return Assigned(uuid)

    def complete(self, hold: Lease, reply: Reply, doubt: DoubtWindow | None, on_end: OnRecorded) -> None:
        try:
            self._record(hold, reply, doubt)
        except (LeaseLost, UuidTaken) as exc:
            on_end(exc)
        else:
            on_end(None)

    def ping(self) -> None:
        """Do nothing: it is always there."""

    def close(self) -> None:
        """Do nothing: what is here goes with the process."""

    def _record(self, hold: Lease, reply: Reply, doubt: DoubtWindow | None) -> None:
        with self._lock:
            record = self._held(hold)
            if reply.uuid is not None and self._others(hold.key.command_id, [reply.uuid]):
                record.doubt, record.holder_crashed = doubt, False
                self._let_go(record)
                raise UuidTaken(hold.key.command_id)
            has_twins = len(self._alike[hold.key.match_key]) > 1  # which may yet ask whose the uuid is
            is_plain = not has_twins and (reply.uuid is None or canonical_uuid(reply.uuid) not in self._guessed)
            if is_plain and self._accepted.add(record.key, reply, self._clock()):
                self._forget(record)
                return
            record.reply = reply.model_dump_json().encode()
            if reply.uuid is not None:
                self._set_owner(record, reply.uuid)
            self._forget_likeness(record)
            self._let_go(record)

    def _grant(self, record: _Record, now: datetime) -> Lease:
        record.token += 1
        record.claimed_at = now
        record.lease_ends_at = self._clock() + self._lease_s
        self._alike.setdefault(record.key.match_key, set()).add(record.key.command_id)
        self._write(record)
        return Lease(record.key, record.token, record.lease_ends_at)

    def _held(self, hold: Lease) -> _Record:
        record = self._records.get(hold.key.command_id)
        if record is None or record.token != hold.token or record.lease_ends_at is None:
            raise LeaseLost(hold.key.command_id)
        return record

    def _is_held(self, record: _Record) -> bool:
        return record.lease_ends_at is not None and self._clock() < record.lease_ends_at

    def _let_go(self, record: _Record) -> None:
        record.lease_ends_at = None
        self._write(record)

    def _remember_twin(self, match_key: bytes) -> None:
        """Keep the uuid of an accepted command while one just like it may come in doubt: the ledger may be short."""
        uuid = self._accepted.alike(match_key)
        if uuid is not None and uuid not in self._owners:
            twin = _Record(Key(f"#{uuid}", b"", match_key), reply=b"")  # no command's id has a #
            self._set_owner(twin, uuid)
            self._write(twin)

    def _others(self, command_id: str, uuids: Sequence[str]) -> set[str]:
        """Return which uuids belong to other commands, for certain or as a guess."""
        others = {uuid for uuid in uuids if self._owner(uuid) not in {None, command_id}}
        accepted = self._accepted.others(command_id, map(canonical_uuid, uuids))
        return others | {uuid for uuid in uuids if canonical_uuid(uuid) in accepted}

    def _owner(self, uuid: str) -> str | None:
        """Return which command owns a uuid, for certain or as a guess."""
        return self._owners.get(canonical_uuid(uuid)) or self._owners.get(self._values.get(folded_uuid(uuid), ""))

    def _is_guessed(self, uuid: str) -> bool:
        """Tell whether the owner of a uuid is a guess; one that is merely written like an owned one may be another."""
        value = canonical_uuid(uuid)
        return value in self._guessed or (value not in self._owners and folded_uuid(uuid) in self._values)

    def _set_owner(self, record: _Record, uuid: str) -> None:
        record.uuid = canonical_uuid(uuid)
        self._owners.setdefault(record.uuid, record.key.command_id)
        self._values.setdefault(folded_uuid(uuid), record.uuid)

    def _forget_likeness(self, record: _Record) -> None:
        alike = self._alike.get(record.key.match_key, set())
        alike.discard(record.key.command_id)
        if not alike:
            self._alike.pop(record.key.match_key, None)

    def _write(self, record: _Record) -> None:
        record.expires_at = self._clock() + self._ttl_s
        self._records[record.key.command_id] = record
        self._records.move_to_end(record.key.command_id)
        while len(self._records) > self._max_others or self._is_stale(next(iter(self._records.values()))):
            oldest = next(iter(self._records.values()))
            if oldest.lease_ends_at is not None:
                break  # the few that are held are under way right now
            self._remove(oldest)

    def _remove(self, record: _Record) -> None:
        if record.reply is None:
            self._unrecorded_until = self._now
        self._forget(record)

    def _forget(self, record: _Record) -> None:
        del self._records[record.key.command_id]
        self._forget_likeness(record)
        if record.uuid is not None:
            self._owners.pop(record.uuid, None)
            self._guessed.discard(record.uuid)
            if self._values.get(folded_uuid(record.uuid)) == record.uuid:
                del self._values[folded_uuid(record.uuid)]

    def _is_stale(self, record: _Record) -> bool:
        return record.lease_ends_at is None and record.expires_at <= self._clock()
