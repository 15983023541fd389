"""What one process remembers: enough for one worker, and forgotten with it."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from schemas.reply import Reply
from worker.idempotency import Again, Busy, Claim, Conflict, Done, First

MAX_RECORDS = 100_000


@dataclass(slots=True)
class _Record:
    digest: bytes
    expires_at: float
    is_held: bool
    reply: bytes | None = None  # as JSON, a third of the size of the object


class MemoryStore:
    """Remembers the latest 100,000 commands, each for a time to live.

    Args:
        ttl_s: seconds for which a record lasts after it was last written.
        clock: monotonic time in seconds; replaced in tests.
        max_records: the oldest that nobody holds go first.
    """

    def __init__(
        self, ttl_s: float, clock: Callable[[], float] = time.monotonic, max_records: int = MAX_RECORDS
    ) -> None:
        self._ttl_s = ttl_s
        self._clock = clock
        self._max_records = max_records
        self._lock = threading.Lock()
        self._records: OrderedDict[str, _Record] = OrderedDict()

    def claim(self, command_id: str, digest: bytes) -> Claim:
        with self._lock:
            record = self._records.get(command_id)
            if record is None or (not record.is_held and record.expires_at <= self._clock()):
                self._write(command_id, _Record(digest, 0, is_held=True))
                return First()
            if record.digest != digest:
                return Conflict()
            if record.reply is not None:
                return Done(Reply.model_validate_json(record.reply))
            if record.is_held:
                return Busy()
            record.is_held = True
            self._write(command_id, record)
            return Again()

    def complete(self, command_id: str, reply: Reply) -> None:
        with self._lock:
            record = self._records[command_id]
            record.reply = reply.model_dump_json().encode()
            record.is_held = False
            self._write(command_id, record)

    def release(self, command_id: str) -> None:
        with self._lock:
            record = self._records[command_id]
            record.is_held = False
            self._write(command_id, record)

    def note_unsent(self, command_id: str, digest: bytes) -> None:
        with self._lock:
            if command_id not in self._records:
                self._write(command_id, _Record(digest, 0, is_held=False))

    def _write(self, command_id: str, record: _Record) -> None:
        record.expires_at = self._clock() + self._ttl_s
        self._records[command_id] = record
        self._records.move_to_end(command_id)
        while len(self._records) > self._max_records or self._is_stale(next(iter(self._records.values()))):
            oldest, _ = next(iter(self._records.items()))
            if self._records[oldest].is_held:
                break  # the few that are held are under way right now
            del self._records[oldest]

    def _is_stale(self, record: _Record) -> bool:
        return not record.is_held and record.expires_at <= self._clock()
