"""What accepted commands came to, packed: almost every command ends so, and objects would take six times the room."""

import re
import struct
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from hashlib import blake2b

from schemas.reply import Reply
from worker.core.claims import Completed, Key, KeyReused

_UUID = re.compile(r"[0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
# Of the digest as much as tells two contents apart, the uuid, the device, when it was completed, when it is forgotten,
# the attempt, and the two flags in one byte: with one byte more the record would take 16 more.
_RECORD = struct.Struct("<8s16sqqIBB")
_RECOVERED, _OMITTED = 1, 2
_MAX_ATTEMPTS = 0xFF
_UUID_AT = slice(8, 24)


class PackedReplies:
    """The latest accepted commands. In two halves: when the newer one is full, the older one is forgotten.

    Args:
        ttl_s: seconds for which a record lasts.
        half: how many records make a half, so that as many are always there.
    """

    def __init__(self, ttl_s: float, half: int) -> None:
        self._ttl_s = ttl_s
        self._half = half
        self._newer: dict[bytes, bytes] = {}
        self._older: dict[bytes, bytes] = {}
        self._newer_uuids: set[int] = set()  # hashes, so that most questions of whose a uuid is need no search
        self._older_uuids: set[int] = set()
        self._newer_alike: dict[bytes, bytes] = {}  # likeness -> whose record it is, of the latest
        self._older_alike: dict[bytes, bytes] = {}

    def add(self, key: Key, reply: Reply, now: float) -> bool:
        """Record a reply at a monotonic time; False: it is of another form than nearly all."""
        is_usual = reply.status == "accepted" and reply.imei is not None and reply.attempts <= _MAX_ATTEMPTS
        if not is_usual or not _UUID.fullmatch(reply.uuid or ""):
            return False
        if len(self._newer) >= self._half:
            self._older, self._newer = self._newer, {}
            self._older_alike, self._newer_alike = self._newer_alike, {}
            self._older_uuids, self._newer_uuids = self._newer_uuids, set()
        name = _hash(key.command_id)
        self._newer_alike[key.match_key[:8]] = name
        uuid = _packed(str(reply.uuid))
        self._newer_uuids.add(hash(uuid))
        self._newer[name] = _RECORD.pack(
            key.content_hash[:8],
            uuid,
            int(str(reply.imei)),
            (reply.completed_at - _EPOCH) // _MICROSECOND,
            int(now + self._ttl_s),
            reply.attempts,
            _RECOVERED * reply.recovered | _OMITTED * reply.valid_time_omitted,
        )
        return True

    def find(self, key: Key, now: float) -> Completed | KeyReused | None:
        """Return what a command came to; None: nothing is known, or not any more."""
        name = _hash(key.command_id)
        record = self._newer.get(name) or self._older.get(name)
        if record is None:
            return None
        content_hash, uuid, imei, completed_us, expires_at, attempts, flags = _RECORD.unpack(record)
        if expires_at <= now:
            return None
        if content_hash != key.content_hash[:8]:
            return KeyReused()
        return Completed(
            Reply(
                command_id=key.command_id,
                status="accepted",
                uuid=_unpacked(uuid),
                imei=f"{imei:015}",
                attempts=attempts,
                recovered=bool(flags & _RECOVERED),
                valid_time_omitted=bool(flags & _OMITTED),
                completed_at=_EPOCH + completed_us * _MICROSECOND,
            )
        )

    def alike(self, match_key: bytes) -> str | None:
        """Return the uuid of the latest command that the platform's history cannot tell from another one."""
        name = self._newer_alike.get(match_key[:8]) or self._older_alike.get(match_key[:8])
        record = None if name is None else self._newer.get(name) or self._older.get(name)
        return None if record is None else _unpacked(record[_UUID_AT])

    def others(self, command_id: str, uuids: Iterable[str]) -> set[str]:
        """Return those uuids that belong to other commands than this. Looks through all if one may be there."""
        packed = ((_packed(uuid), uuid) for uuid in uuids if _UUID.fullmatch(uuid))
        wanted = {each: uuid for each, uuid in packed if self._may_have(hash(each))}
        name = _hash(command_id)
        records = (*self._older.items(), *self._newer.items()) if wanted else ()
        return {wanted[record[_UUID_AT]] for owner, record in records if record[_UUID_AT] in wanted and owner != name}

    def _may_have(self, uuid: int) -> bool:
        return uuid in self._newer_uuids or uuid in self._older_uuids


def _hash(command_id: str) -> bytes:
    return blake2b(command_id.encode(), digest_size=8).digest()


def _packed(uuid: str) -> bytes:
    return bytes.fromhex(uuid.replace("-", ""))


def _unpacked(uuid: bytes) -> str:
    text = uuid.hex()
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"
