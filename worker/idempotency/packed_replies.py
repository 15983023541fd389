"""Replies of accepted commands, packed: almost every command is accepted, and objects need six times the memory."""

import re
import struct
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

from schemas.reply import Reply
from worker.core.claims import Completed, Key, KeyReused
from worker.core.command import FIELD_DIGESTS_BYTES, differing_fields

_UUID = re.compile(r"[0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
# The first bytes of the content hash, the uuid, the digests of the fields, the IMEI, the time of completion, the time
# of expiry, the attempts, and the two flags in one byte.
_RECORD = struct.Struct(f"<8s16s{FIELD_DIGESTS_BYTES}sqqIBB")
_RECOVERED, _OMITTED = 1, 2
_MAX_ATTEMPTS = 0xFF
_UUID_AT = slice(8, 24)
_TEST_IMEI_CHARS = 4


class PackedReplies:
    """The latest accepted commands, in two generations: when the newer one is full, it replaces the older one.

    Args:
        ttl_s: lifetime of a record, in seconds.
        generation_size: records per generation: at least this many are kept, at most twice as many.
    """

    def __init__(self, ttl_s: float, generation_size: int) -> None:
        self._ttl_s = ttl_s
        self._generation_size = generation_size
        self._newer: dict[int, bytes] = {}  # by hash of the owner id
        self._older: dict[int, bytes] = {}
        self._newer_uuids: set[int] = set()  # hashes of the uuids: most look-ups of an owner need no search
        self._older_uuids: set[int] = set()
        self._newer_matches: dict[bytes, int] = {}  # start of a match key -> hash of the latest command's owner id
        self._older_matches: dict[bytes, int] = {}

    def add(self, owner_id: str, key: Key, reply: Reply, now: float) -> bool:
        """Record a reply at a monotonic time; returns False if its form cannot be packed."""
        is_usual = reply.status == "accepted" and reply.imei is not None and reply.attempts <= _MAX_ATTEMPTS
        if not is_usual or not _UUID.fullmatch(reply.uuid or ""):
            return False
        if len(self._newer) >= self._generation_size:
            self._older, self._newer = self._newer, {}
            self._older_matches, self._newer_matches = self._newer_matches, {}
            self._older_uuids, self._newer_uuids = self._newer_uuids, set()
        command_hash = hash(owner_id)
        self._newer_matches[key.match_key[:8]] = command_hash
        uuid = _packed(str(reply.uuid))
        self._newer_uuids.add(hash(uuid))
        self._newer[command_hash] = _RECORD.pack(
            key.content_hash[:8],
            uuid,
            key.field_digests,
            _packed_imei(str(reply.imei)),
            (reply.completed_at - _EPOCH) // _MICROSECOND,
            int(now + self._ttl_s),
            reply.attempts,
            _RECOVERED * reply.recovered | _OMITTED * reply.valid_time_omitted,
        )
        return True

    def find(self, owner_id: str, key: Key, now: float) -> Completed | KeyReused | None:
        """Return the recorded reply to a command; None if there is none, or it has expired."""
        command_hash = hash(owner_id)
        record = self._newer.get(command_hash) or self._older.get(command_hash)
        if record is None:
            return None
        content_hash, uuid, field_digests, imei, completed_us, expires_at, attempts, flags = _RECORD.unpack(record)
        if expires_at <= now:
            return None
        if content_hash != key.content_hash[:8]:
            return KeyReused(differing_fields(field_digests, key.field_digests))
        return Completed(
            Reply(
                command_id=key.command_id,
                status="accepted",
                uuid=_unpacked(uuid),
                imei=_unpacked_imei(imei),
                attempts=attempts,
                recovered=bool(flags & _RECOVERED),
                valid_time_omitted=bool(flags & _OMITTED),
                completed_at=_EPOCH + completed_us * _MICROSECOND,
            )
        )

    def uuid_of_lookalike(self, match_key: bytes) -> str | None:
        """Return the uuid of the latest accepted command with a match key."""
        command_hash = self._newer_matches.get(match_key[:8]) or self._older_matches.get(match_key[:8])
        record = None if command_hash is None else self._newer.get(command_hash) or self._older.get(command_hash)
        return None if record is None else _unpacked(record[_UUID_AT])

    def owned_by_others(self, owner_id: str, uuids: Iterable[str]) -> set[str]:
        """Return the uuids that belong to other commands. Searches all records if one of them may be there."""
        packed = ((_packed(uuid), uuid) for uuid in uuids if _UUID.fullmatch(uuid))
        wanted = {each: uuid for each, uuid in packed if self._may_have(hash(each))}
        if not wanted:
            return set()
        own_hash = hash(owner_id)
        records = (*self._older.items(), *self._newer.items())
        return {
            wanted[record[_UUID_AT]] for owner, record in records if record[_UUID_AT] in wanted and owner != own_hash
        }

    def _may_have(self, uuid: int) -> bool:
        return uuid in self._newer_uuids or uuid in self._older_uuids


def _packed_imei(imei: str) -> int:
    """Return an IMEI as a number: that of a test device, which has 4 digits, below 0."""
    return -1 - int(imei) if len(imei) == _TEST_IMEI_CHARS else int(imei)


def _unpacked_imei(number: int) -> str:
    return f"{-1 - number:04}" if number < 0 else f"{number:015}"


def _packed(uuid: str) -> bytes:
    return bytes.fromhex(uuid.replace("-", ""))


def _unpacked(uuid: bytes) -> str:
    text = uuid.hex()
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"
