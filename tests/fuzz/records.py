"""Records of the store that anything may have written: each costs its own command certainty, and no other anything.

An input is JSON. ``state`` names the record that the store itself writes first: ``held``, ``free`` or ``done``. Then
``fields`` replaces fields of the record (null removes one), ``kind`` the whole record by a key of another type,
``epoch`` fields of the epoch, and ``owner`` the owner of a uuid. ``reply`` is a reply that must come back as it was
recorded. Texts stand for bytes: their characters are those of Latin-1.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import redis
from hypothesis import strategies as st
from pydantic import ValidationError

from schemas.onenet import usable_uuid
from schemas.reply import Reply
from tests.fuzz.mutation import encoded, json_texts, parsed
from tests.fuzz.target import Check, Servers, Target
from tests.support.stores import DOUBT, LONG_S, NOW, U1, U, assign, complete, held, key, reply
from worker.core.claims import (
    Claim,
    Completed,
    IdempotencyStore,
    InProgress,
    KeyReused,
    KnownNotSent,
    Unresolved,
    Unseen,
)
from worker.core.ownership import Assigned
from worker.core.times import milliseconds
from worker.errors import LeaseLost, UuidTaken
from worker.idempotency import open_store
from worker.idempotency.redis import RedisStore

_MANY_YEARS_MS = 100 * 365 * 24 * 3_600 * 1_000
_TIMES = ("lease", "claimed", "since", "until")


class _Rig:
    """The two stores, and direct access to Redis."""

    def __init__(self, url: str) -> None:
        self._redis: Any = redis.Redis.from_url(url)
        self._url = url
        self._memory: IdempotencyStore = open_store(
            "memory://", "m", ttl_s=60, lease_s=LONG_S, began_at=datetime.now(UTC)
        )

    def close(self) -> None:
        self._redis.close()

    async def check(self, data: bytes) -> None:
        given = parsed(data)
        if not isinstance(given, dict):
            return
        async with self._store() as (store, prefix):
            if isinstance(given.get("reply"), dict):
                await _check_reply(store, given["reply"])
                await _check_reply(self._memory, given["reply"] | {"command_id": uuid4().hex})
            await self._check_record(store, prefix, given)

    @asynccontextmanager
    async def _store(self) -> AsyncIterator[tuple[RedisStore, str]]:
        """Yield a store of its own, with the prefix of its keys."""
        namespace = uuid4().hex
        store = RedisStore(self._url, namespace, ttl_s=60, lease_s=LONG_S)
        try:
            yield store, f"{{{namespace}}}:"
        finally:
            await store.close()
            if names := self._redis.keys(f"{{{namespace}}}:*"):
                self._redis.delete(*names)

    async def _check_record(self, store: RedisStore, prefix: str, given: Mapping[str, Any]) -> None:
        await complete(store, held(await store.claim(key("b"), NOW)), reply("b", U1))
        others = set(self._redis.keys(f"{prefix}*"))
        await _write(store, given.get("state"))
        # Not by its name: the record is the one hash that the store has just written.
        names = [each for each in set(self._redis.keys(f"{prefix}*")) - others if self._redis.type(each) == b"hash"]
        for name in names:
            self._change(name, given.get("fields"), given.get("kind"))
        for name in names:
            written = self._redis.hgetall(name) if self._redis.type(name) == b"hash" else {b"kind": b""}
            break
        else:
            written = {}
        self._change(f"{prefix}epoch".encode(), given.get("epoch"), None)
        if isinstance(given.get("owner"), str):
            self._redis.set(f"{prefix}uuid:{U}", _bytes(given["owner"]))
        claim = await store.claim(key("a"), NOW)
        _check_claim(claim, written, may_have_lost="epoch" in given)
        assert await store.claim(key("b"), NOW) == Completed(reply("b", U1))
        if isinstance(claim, Unseen | KnownNotSent | Unresolved):
            await _go_on(store, claim)
        assert await store.claim(key("b"), NOW) == Completed(reply("b", U1))
        await complete(store, held(await store.claim(key("c"), NOW)), reply("c", str(uuid4())))

    def _change(self, name: bytes, fields: object, kind: object) -> None:
        for field, value in (fields if isinstance(fields, dict) else {}).items():
            if isinstance(value, str):
                self._redis.hset(name, _bytes(field), _bytes(value))
            else:
                self._redis.hdel(name, _bytes(field))
        if kind in ("string", "list", "set", "zset", "stream"):
            self._redis.delete(name)
            writes = {
                "string": lambda: self._redis.set(name, b"\xff"),
                "list": lambda: self._redis.rpush(name, "a"),
                "set": lambda: self._redis.sadd(name, "a"),
                "zset": lambda: self._redis.zadd(name, {"a": 1}),
                "stream": lambda: self._redis.xadd(name, {"a": "b"}),
            }
            writes[str(kind)]()


def _bytes(text: str) -> bytes:
    return text.encode("latin-1", "replace")


async def _write(store: RedisStore, state: object) -> None:
    """Have the store write the record of command "a" in a state; in any other none is written."""
    if state not in ("held", "free", "in doubt", "done"):
        return
    lease = held(await store.claim(key("a"), NOW))
    if state == "done":
        await complete(store, lease, reply("a", U))
    elif state != "held":
        await store.release(lease, DOUBT if state == "in doubt" else None)


def _check_claim(claim: Claim, record: Mapping[bytes, bytes], *, may_have_lost: bool) -> None:
    """What is certain about a command must be in its record, word for word."""
    state = record.get(b"state")
    match claim:
        case Unseen():
            assert not record
        case KnownNotSent():
            assert state == b"free"
            assert record[b"until"] == record[b"since"] == b""
            assert record[b"digest"].decode() == key("a").content_hash.hex()
        case Unresolved(doubt=doubt):
            assert doubt.until.timestamp() * 1000 < milliseconds(NOW) + _MANY_YEARS_MS
        case InProgress():
            assert state == b"held"
            assert int(record[b"lease"]) < milliseconds(datetime.now(UTC)) + 2 * 3_600_000 + LONG_S * 1000
        case Completed(recorded):
            assert state == b"done"
            found = json.loads(record[b"reply"].decode("utf-8", "replace"))
            assert (recorded.command_id, recorded.status, recorded.uuid) == ("a", found["status"], found.get("uuid"))
        case KeyReused():
            assert record[b"digest"].decode() != key("a").content_hash.hex()
            assert len(record[b"digest"]) == len(key("a").content_hash.hex())


async def _go_on(store: RedisStore, claim: Unseen | KnownNotSent | Unresolved) -> None:
    """Go on with a command that was claimed: its outcome is recorded, or its uuid has an owner."""
    assert isinstance(await store.claim(key("a"), NOW), InProgress)
    await store.owned_by_others(claim.lease.owner_id, [U, U1])
    assignment = await assign(store, claim.lease, [U])
    try:
        await complete(
            store, claim.lease, reply("a", U), is_guess=isinstance(assignment, Assigned) and assignment.is_guess
        )
    except UuidTaken:
        again = await store.claim(key("a"), NOW)
        assert isinstance(again, Unresolved)
        await store.release(again.lease, DOUBT)
    else:
        assert await store.claim(key("a"), NOW) == Completed(reply("a", U))


async def _check_reply(store: IdempotencyStore, fields: Mapping[str, Any]) -> None:
    """A reply comes back as it was recorded, packed or not."""
    try:
        recorded = Reply.model_validate_json(json.dumps(fields))
    except (ValidationError, ValueError):
        return
    if recorded.command_id is None or recorded.status != "accepted" or recorded.error is not None:
        return
    if not usable_uuid(recorded.uuid):
        return
    command_key = key(recorded.command_id, recorded.command_id.encode()[:16].ljust(16))
    claim = await store.claim(command_key, NOW)
    if not isinstance(claim, Unseen):
        return
    try:
        await store.complete(claim.lease, recorded, DOUBT)
    except (LeaseLost, UuidTaken):
        return
    assert await store.claim(command_key, NOW) == Completed(recorded)


@contextmanager
def _open(servers: Servers) -> Iterator[Check]:
    rig = _Rig(servers.redis())
    with asyncio.Runner() as runner:
        yield lambda data: runner.run(rig.check(data))
    rig.close()


_DIGEST = key("a").content_hash.hex()
_REPLY = reply("a", U).model_dump_json()
_VALUES = st.sampled_from(
    [
        "", "0", "1", "2", "-1", "1.5", "1e3", "nan", " 1", "0x10", "9" * 14, "9" * 16, "9" * 40, "\xff", "held",
        "free", "done", "gone", "HELD", _DIGEST, _DIGEST[:31], _DIGEST.upper(), "z" * 32, "0" * 32,
        str(milliseconds(NOW)), str(milliseconds(NOW) + 1), _REPLY, _REPLY.replace('"a"', '"b"'),
        _REPLY.replace("accepted", "failed"), "{}", "null",
    ]
) | st.text(st.characters(max_codepoint=255), max_size=20)  # fmt: skip
_RECORD_FIELDS = (
    "digest", "state", "lease", "claimed", "since", "until", "crashed", "reply", "token", "failed", "epoch", "fields",
    "new",
)  # fmt: skip
_EPOCH_FIELDS = ("id", "run", "replication", "since", "loss", "used", "claimed")
_json_replies = json_texts(names=tuple(json.loads(_REPLY))).map(
    lambda text: text.encode("utf-8", "replace").decode("latin-1")
)


def _changes(names: tuple[str, ...]) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(st.sampled_from(names), st.none() | _VALUES, max_size=3)


_REPLIES = st.fixed_dictionaries(
    {
        "command_id": st.sampled_from(["r", "x" * 128, "A.b:c-d_e"]),
        "status": st.just("accepted"),
        "uuid": st.uuids().map(str) | st.uuids().map(lambda each: str(each).upper()) | st.text(min_size=1, max_size=30),
        "imei": st.sampled_from(["865820030000001", "000000000000000", "0000", "0042", "9999", None]),
        "attempts": st.sampled_from([1, 255, 256, 2**40]),
        "recovered": st.booleans(),
        "valid_time_omitted": st.booleans(),
        "completed_at": st.datetimes(timezones=st.just(UTC)).map(lambda moment: moment.isoformat()),
    }
)


@st.composite
def _inputs(draw: st.DrawFn) -> bytes:
    given: dict[str, Any] = {"state": draw(st.sampled_from(["held", "free", "in doubt", "done", None]))}
    given["fields"] = draw(_changes(_RECORD_FIELDS))
    if draw(st.integers(0, 3)) == 0:
        given["fields"] = {"reply": draw(_json_replies)}
    if draw(st.integers(0, 7)) == 0:
        given["kind"] = draw(st.sampled_from(["string", "list", "set", "zset", "stream"]))
    if draw(st.integers(0, 3)) == 0:
        given["epoch"] = draw(_changes(_EPOCH_FIELDS))
    if draw(st.integers(0, 3)) == 0:
        given["owner"] = draw(_VALUES | st.sampled_from(["a", "?a", "b", "?b", "?"]))
    if draw(st.integers(0, 3)) == 0:
        given["reply"] = draw(_REPLIES)
    return encoded(json.dumps(given))


TARGET = Target("records", _inputs(), _open)
