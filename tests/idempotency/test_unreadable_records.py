"""Records that another version or a person wrote into Redis: each puts its own command in doubt, and no other."""

import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.stores import DOUBT, LONG_S, NOW, U1, U2, U, assign, complete, failure, held, key, reply
from worker.core.claims import Completed, InProgress, KeyReused, KnownNotSent, Unresolved, Unseen
from worker.core.envelope import Replay
from worker.core.ownership import Ambiguous, Assigned, LookalikeInProgress, NoCandidate, Owner
from worker.core.rate import Rate
from worker.core.records import CommandRecord
from worker.core.redis_address import RedisAddress
from worker.core.times import milliseconds
from worker.errors import LeaseLost, UuidTaken
from worker.flow.rate_limiter import RateLimiter
from worker.idempotency.latest_address import LatestAddress
from worker.idempotency.records import RecordReader
from worker.idempotency.redis import RedisStore

NOW_MS = milliseconds(NOW)
DIGEST = key("a").content_hash.hex()
HUGE = "9" * 14  # a time far in the future
NO_NUMBERS = ["", "x", "1.5", "-1", "1e3", "nan", "inf", " 1", "9" * 40, b"\xff", "0x10"]
NO_TIMES = [*NO_NUMBERS, HUGE, "9" * 15]
ACCEPTED = json.loads(reply("a", U).model_dump_json())
FAILED = json.loads(failure("a").model_dump_json())


class Rig:
    """A store, and direct access to its Redis."""

    def __init__(self, url: str) -> None:
        self.namespace = uuid4().hex
        self.redis: Any = redis.Redis.from_url(url)
        self.url = url
        self.store = RedisStore(url, self.namespace, ttl_s=60, lease_s=LONG_S)

    def name(self, key_name: str) -> str:
        return f"{{{self.namespace}}}:{key_name}"

    def write(self, record: Mapping[str, Any], command_id: str = "a") -> None:
        """Write a record field by field, valid or not."""
        name = self.name(f"command:{command_id}")
        self.redis.delete(name)
        self.redis.hset(name, mapping=dict(record))

    async def close(self) -> None:
        await self.store.close()
        self.redis.close()


async def look(rig: Rig) -> list[CommandRecord]:
    """Return the records of the command, as a person reads them."""
    reader = RecordReader(RedisAddress.parse(rig.url), rig.namespace)
    try:
        return await reader.look("a", None, [])
    finally:
        await reader.close()


@pytest.fixture
async def rig(redis_url: str) -> AsyncIterator[Rig]:
    made = Rig(redis_url)
    yield made
    await made.close()


def record(state: str, /, **changes: Any) -> dict[str, Any]:
    """Return the fields of a valid record with some changed; None removes a field."""
    states: dict[str, dict[str, Any]] = {
        "held": {"lease": NOW_MS, "claimed": NOW_MS, "since": "", "until": "", "crashed": "0"},
        "free": {"since": "", "until": "", "crashed": "0"},
        "done": {"reply": json.dumps(ACCEPTED)},
    }
    fields = {"digest": DIGEST, "state": state, "token": 1, **states[state], **changes}
    return {name: value for name, value in fields.items() if value is not None}


def rows() -> Iterator[dict[str, Any]]:
    """Yield records that cannot be read."""
    for state in ("held", "free", "done"):
        for content_hash in (
            None,
            "",
            "z" * 32,
            DIGEST[:31],
            DIGEST + "0",
            DIGEST.upper().replace("3", "F"),
            b"\xff" * 32,
        ):
            yield record(state, digest=content_hash)
        for token in (None, *NO_NUMBERS):
            yield record(state, token=token)
    for unknown in (None, "", "gone", "HELD", b"\xff"):
        yield record("free", state=unknown)
    for time in (None, *NO_TIMES):
        yield record("held", lease=time)
        yield record("held", claimed=time)
    for time in NO_TIMES[1:]:  # without the empty text, which means no doubt
        yield record("held", until=time)
        yield record("free", until=time)
        yield record("free", since=time, until=NOW_MS)
    yield record("free", until=None)
    yield record("free", since=None)
    yield record("free", since=NOW_MS)
    yield record("free", since=NOW_MS + 1, until=NOW_MS)
    for crashed in (None, "", "2", "yes", b"\xff"):
        yield record("free", crashed=crashed)
    for text in (None, "", "garbage", "null", "[]", "{}", b"\xff", b'{"command_id": "\xff"}', '{"status": "accepted"}'):
        yield record("done", reply=text)
    for changes in (
        {"command_id": "b"}, {"command_id": None}, {"uuid": None}, {"uuid": ""}, {"uuid": 7}, {"status": "queued"},
        {"uuid": "u" * 65}, {"uuid": "\x1b[2J\u202e"}, {"uuid": "u v"}, {"uuid": "\u5f00"},
        {"attempts": 0}, {"attempts": "many"}, {"completed_at": "yesterday"}, {"completed_at": "2026-08-05T12:00:00"},
        {"status": "rejected"}, {"status": "failed"}, {"error": FAILED["error"]}, {"imei": "1"},
    ):  # fmt: skip
        yield record("done", reply=json.dumps(ACCEPTED | changes))
    for changes in ({"error": None}, {"error": {"code": "new", "message": ""}}, {"uuid": U}, {"status": "rejected"}):
        yield record("done", reply=json.dumps(FAILED | changes))


@pytest.mark.parametrize("unreadable", list(rows()))
async def test_an_unreadable_record_leaves_its_command_in_doubt(rig: Rig, unreadable: dict[str, Any]) -> None:
    """Whether it was sent is unknown, and since when. The claim replaces the record, which people are told before."""
    rig.write(unreadable)
    assert [found.state for found in await look(rig)] == ["unreadable"]
    claim = await rig.store.claim(key("a"), NOW)
    assert isinstance(claim, Unresolved)
    assert (claim.doubt.since, claim.holder_crashed) == (None, False)
    # A lease that was granted before this first epoch may last as long.
    assert NOW <= claim.doubt.until <= NOW + timedelta(seconds=LONG_S)
    assert await rig.store.claim(key("a"), NOW) == InProgress(None)
    await complete(rig.store, claim.lease, reply("a", U))
    assert await rig.store.claim(key("a"), NOW) == Completed(reply("a", U))


@pytest.mark.parametrize("field", ["id", "run", "replication", "since", "loss", "used", "claimed"])
async def test_an_unreadable_epoch_begins_another_one(rig: Rig, field: str) -> None:
    await rig.store.claim(key("a"), NOW)
    for value in (*NO_TIMES, "-1e18", b"\xff" * 16):
        rig.redis.hset(rig.name("epoch"), field, value)
        claim = await rig.store.claim(key(f"b{uuid4()}"), NOW)
        assert isinstance(claim, Unseen)
        assert claim.unrecorded_until >= NOW


@pytest.mark.parametrize("kind", ["string", "list", "set", "zset", "stream"])
async def test_a_record_of_another_redis_type_leaves_its_command_in_doubt(rig: Rig, kind: str) -> None:
    write(rig, "command:a", kind)
    assert [found.state for found in await look(rig)] == ["unreadable"]
    claim = await rig.store.claim(key("a"), NOW)
    assert isinstance(claim, Unresolved)
    await rig.store.release(claim.lease, DOUBT)
    claim = await rig.store.claim(key("a"), NOW)
    assert isinstance(claim, Unresolved)
    assert claim.doubt == DOUBT


def write(rig: Rig, key_name: str, kind: str) -> None:
    """Write a key of another type than the store does."""
    name = rig.name(key_name)
    rig.redis.delete(name)
    writes: dict[str, Callable[[], object]] = {
        "string": lambda: rig.redis.set(name, b"\xff"),
        "list": lambda: rig.redis.rpush(name, "a"),
        "set": lambda: rig.redis.sadd(name, "a"),
        "hash": lambda: rig.redis.hset(name, "a", "b"),
        "zset": lambda: rig.redis.zadd(name, {"a": 1}),
        "stream": lambda: rig.redis.xadd(name, {"a": "b"}),
    }
    writes[kind]()


@pytest.mark.parametrize("kind", ["string", "list", "hash", "stream"])
async def test_a_lease_is_lost_when_its_record_becomes_unreadable(rig: Rig, kind: str) -> None:
    lease = held(await rig.store.claim(key("a"), NOW))
    write(rig, "command:a", kind)
    for call in (
        lambda: rig.store.release(lease, None),
        lambda: rig.store.ownership(lease, [U]),
        lambda: complete(rig.store, lease, reply("a", U)),
    ):
        with pytest.raises(LeaseLost):
            await call()


async def test_a_former_lease_holder_is_refused_after_its_unreadable_record_was_replaced(rig: Rig) -> None:
    """If tokens were counted from 1 again, both holders would have the first token."""
    late = held(await rig.store.claim(key("a"), NOW))
    rig.redis.hdel(rig.name("command:a"), "state")
    claim = await rig.store.claim(key("a"), NOW)
    with pytest.raises(LeaseLost):
        await complete(rig.store, late, reply("a", U))
    await complete(rig.store, held(claim), reply("a", U1))


async def test_fields_of_a_newer_version_are_ignored(rig: Rig) -> None:
    newer = ACCEPTED | {"priority": 7, "trace": {"id": 1}}
    rig.write(record("done", reply=json.dumps(newer), checksum="1", version=b"\xff"))
    assert await rig.store.claim(key("a"), NOW) == Completed(reply("a", U))
    rejected = ACCEPTED | {"status": "rejected", "uuid": None, "extra": 1}
    details = [{"field": "retry", "message": "wrong", "line": 1}]
    rejected["error"] = {"code": "onenet_rejected", "message": "no", "errno": 1, "details": details, "hint": "none"}
    rig.write(record("done", reply=json.dumps(rejected)))
    claim = await rig.store.claim(key("a"), NOW)
    assert isinstance(claim, Completed)
    assert (claim.reply.status, claim.reply.error and claim.reply.error.errno) == ("rejected", 1)
    rig.write(record("free", colour="red"))
    assert isinstance(await rig.store.claim(key("a"), NOW), KnownNotSent)


async def test_records_of_the_former_version_are_read(rig: Rig) -> None:
    """A worker is updated while commands are held, in doubt and completed."""
    doubtful = {"since": milliseconds(DOUBT.since or NOW), "until": milliseconds(DOUBT.until), "crashed": 1}
    for former, expected in (
        ({"digest": DIGEST, "state": "held", "lease": 1, "claimed": NOW_MS, "token": 1}, Unresolved),
        ({"digest": DIGEST, "state": "held", "lease": 1, "claimed": NOW_MS, "token": 2, **doubtful}, Unresolved),
        ({"digest": DIGEST, "state": "free", "token": 3, **doubtful}, Unresolved),
        ({"digest": DIGEST, "state": "free", "token": 3, "since": "", "until": "", "crashed": "0"}, KnownNotSent),
        ({"digest": DIGEST, "state": "done", "token": 1, "reply": json.dumps(ACCEPTED)}, Completed),
        ({"digest": "0" * 32, "state": "done", "token": 1, "reply": json.dumps(ACCEPTED)}, KeyReused),
        *(
            (
                {"digest": "0" * 32, "state": "done", "token": 1, "reply": json.dumps(ACCEPTED), "fields": fields},
                KeyReused,
            )
            for fields in ("", "0", "G" * 44, "0" * 43, "\u0660" * 44, "0" * 100_000)
        ),
    ):
        rig.write(former)
        assert isinstance(await rig.store.claim(key("a"), NOW), expected)
        assert rig.redis.hget(rig.name("command:a"), "token") != b"1" or expected in {Completed, KeyReused}


async def test_a_replay_discards_an_unreadable_reply(rig: Rig) -> None:
    rig.write(record("done", reply="garbage", failed=NOW_MS))
    assert isinstance(await rig.store.claim(key("a"), NOW, Replay(NOW, None)), KnownNotSent)


@pytest.mark.parametrize("kind", ["string", "list", "hash"])
async def test_an_unreadable_set_of_lookalikes_stops_no_command(rig: Rig, kind: str) -> None:
    write(rig, f"alike:{key('a').match_key.hex()}", kind)
    lease = held(await rig.store.claim(key("a"), NOW))
    assert await assign(rig.store, lease, [U]) == Assigned(U, is_guess=False)
    write(rig, f"alike:{key('a').match_key.hex()}", kind)
    assert await assign(rig.store, lease, [U]) == Assigned(U, is_guess=False)
    await complete(rig.store, lease, reply("a", U))
    lease = held(await rig.store.claim(key("b"), NOW))
    write(rig, f"alike:{key('a').match_key.hex()}", kind)
    await rig.store.release(lease, None)


@pytest.mark.parametrize("kind", ["string", "list", "hash"])
async def test_a_lookalike_with_an_unreadable_record_may_have_caused_one_entry(rig: Rig, kind: str) -> None:
    held(await rig.store.claim(key("b"), NOW))
    lease = held(await rig.store.claim(key("a"), NOW))
    assert await assign(rig.store, lease, [U1, U2]) == LookalikeInProgress()
    write(rig, "command:b", kind)
    assert await assign(rig.store, lease, [U1, U2]) == Assigned(U1, is_guess=True)


@pytest.mark.parametrize("value", [b"", b"\xff", b"??", b"a b", b"?", b"x" * 130, None])
async def test_a_uuid_with_an_unreadable_owner_is_assigned_to_no_command(rig: Rig, value: bytes | None) -> None:
    """It may belong to this command or to another."""
    if value is None:
        write(rig, f"uuid:{U}", "list")
    else:
        rig.redis.set(rig.name(f"uuid:{U}"), value)
    lease = held(await rig.store.claim(key("a"), NOW))
    assert await rig.store.owned_by_others("a", [U, U1]) == set()
    assert (await rig.store.ownership(lease, [U, U1])).owners == {U: Owner(None, is_certain=False), U1: None}
    assert await assign(rig.store, lease, [U]) == Ambiguous()
    assert await assign(rig.store, lease, []) == NoCandidate()
    with pytest.raises(UuidTaken):
        await complete(rig.store, lease, reply("a", U))


async def test_unreadable_values_of_keys_that_are_never_read_are_ignored(rig: Rig) -> None:
    write(rig, "epoch", "list")
    assert isinstance(await rig.store.claim(key("a"), NOW), Unseen)
    write(rig, "ping", "list")
    await rig.store.ping()


@pytest.mark.parametrize("value", [b"garbage", b"\xff", b"1e300", b"inf", b"nan", None])
async def test_an_unreadable_rate_limit_starts_from_the_beginning(rig: Rig, value: bytes | None) -> None:
    """Otherwise the rate would no longer be limited, or nothing would ever be sent again."""
    limiter = RateLimiter(Rate(1, 600), rig.namespace, LatestAddress(RedisAddress.parse(rig.url)))
    assert await limiter.acquire(None) == 0
    [name] = rig.redis.keys(f"{{{rig.namespace}}}:rate*")
    if value is None:
        write(rig, name.decode().partition("}:")[2], "list")
    else:
        rig.redis.set(name, value)
    assert await limiter.acquire(None) == 0
    assert 0 < await limiter.acquire(None) <= 600
    await limiter.close()


FIELDS = [
    "digest",
    "state",
    "lease",
    "claimed",
    "since",
    "until",
    "crashed",
    "reply",
    "token",
    "failed",
    "fields",
    "new",
]
VALUES = st.one_of(
    st.binary(max_size=40),
    st.sampled_from([DIGEST, "held", "free", "done", "0", "1", "", str(NOW_MS), HUGE, json.dumps(ACCEPTED)]),
    st.integers().map(str),
    st.floats().map(str),
)


@given(
    fields=st.dictionaries(st.sampled_from(FIELDS), VALUES),
    whole=st.sampled_from(["held", "free", "done", None]),
    owner=st.none() | st.binary(max_size=10) | st.sampled_from(["a", "?a", "b", "?b"]),
)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_no_unreadable_record_stops_a_worker_or_its_own_command(
    rig: Rig, fields: dict[str, Any], whole: str | None, owner: str | bytes | None
) -> None:
    rig.redis.delete(*map(rig.name, ["command:a", f"uuid:{U}", f"uuid:{U1}", f"alike:{key('a').match_key.hex()}"]))
    mixed = (record(whole) if whole else {}) | fields
    if mixed:
        rig.write(mixed)
    if owner is not None:
        rig.redis.set(rig.name(f"uuid:{U}"), owner)
    claim = await rig.store.claim(key("a"), NOW, None)
    if isinstance(claim, Completed | KeyReused):
        return
    if isinstance(claim, InProgress):  # only while its lease may last, and no lease ends far in the future
        assert float(mixed["lease"]) < (NOW + timedelta(days=36_500)).timestamp() * 1000
        return
    assert claim.lease.token >= 1
    await rig.store.owned_by_others("a", [U, U1])
    assignment = await assign(rig.store, claim.lease, [U, U1])
    is_guess = isinstance(assignment, Assigned) and assignment.is_guess
    try:
        await complete(rig.store, claim.lease, reply("a", U), is_guess=is_guess)
    except UuidTaken:
        again = await rig.store.claim(key("a"), NOW)
        assert isinstance(again, Unresolved)
        assert again.doubt == DOUBT
    else:
        assert await rig.store.claim(key("a"), NOW) == Completed(reply("a", U))
