"""What another version or a person wrote into Redis: it costs its own command a doubt, and nothing else."""

import json
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.idempotency.test_stores import DOUBT, LONG_S, NOW, U1, U2, U, complete, failure, held, key, reply
from worker.core.claims import (
    Ambiguous,
    Assigned,
    Completed,
    InProgress,
    KeyReused,
    KnownNotSent,
    LookalikeInProgress,
    NoCandidate,
    Unresolved,
    Unseen,
)
from worker.core.doubt import DoubtWindow
from worker.core.rate import Rate
from worker.core.replay import Replay
from worker.core.times import milliseconds
from worker.errors import LeaseLost, UuidTaken
from worker.flow.rate_limiter import RateLimiter
from worker.idempotency.redis import RedisStore

NOW_MS = milliseconds(NOW)
DIGEST = key("a").content_hash.hex()
HUGE = "9" * 14  # a time far in the future
NO_NUMBERS = ["", "x", "1.5", "-1", "1e3", "nan", "inf", " 1", "9" * 40, b"\xff", "0x10"]
NO_TIMES = [*NO_NUMBERS, HUGE, "9" * 15]
ACCEPTED = json.loads(reply("a", U).model_dump_json())
FAILED = json.loads(failure("a").model_dump_json())


class Rig:
    """A store, and what is in its Redis."""

    def __init__(self, url: str) -> None:
        self.namespace = uuid4().hex
        self.redis: Any = redis.Redis.from_url(url)
        self.url = url
        self.store = RedisStore(url, self.namespace, ttl_s=60, lease_s=LONG_S, connections=2)

    def name(self, key_name: str) -> str:
        return f"{{{self.namespace}}}:{key_name}"

    def write(self, record: Mapping[str, Any], command_id: str = "a") -> None:
        """Write a record field by field, whatever it is."""
        name = self.name(f"command:{command_id}")
        self.redis.delete(name)
        self.redis.hset(name, mapping=dict(record))

    def close(self) -> None:
        self.store.close()
        self.redis.close()


@pytest.fixture
def rig(redis_url: str) -> Iterator[Rig]:
    made = Rig(redis_url)
    yield made
    made.close()


def record(state: str, /, **changes: Any) -> dict[str, Any]:
    """Return a record as it is written; a change to None takes the field away."""
    states: dict[str, dict[str, Any]] = {
        "held": {"lease": NOW_MS, "claimed": NOW_MS, "since": "", "until": "", "crashed": "0"},
        "free": {"since": "", "until": "", "crashed": "0"},
        "done": {"reply": json.dumps(ACCEPTED)},
    }
    fields = {"digest": DIGEST, "state": state, "token": 1, **states[state], **changes}
    return {name: value for name, value in fields.items() if value is not None}


def rows() -> Iterator[dict[str, Any]]:
    """Yield records none of which can be read."""
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
    for time in NO_TIMES[1:]:  # without the empty text, which says that there is no doubt
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
        {"attempts": 0}, {"attempts": "many"}, {"completed_at": "yesterday"}, {"completed_at": "2026-08-05T12:00:00"},
        {"status": "rejected"}, {"status": "failed"}, {"error": FAILED["error"]}, {"imei": "1"},
    ):  # fmt: skip
        yield record("done", reply=json.dumps(ACCEPTED | changes))
    for changes in ({"error": None}, {"error": {"code": "new", "message": ""}}, {"uuid": U}, {"status": "rejected"}):
        yield record("done", reply=json.dumps(FAILED | changes))


@pytest.mark.parametrize("unreadable", list(rows()))
def test_a_record_that_cannot_be_read_leaves_its_command_in_doubt(rig: Rig, unreadable: dict[str, Any]) -> None:
    """Nothing tells whether it was sent, nor since when; and its next claim must not meet the same record again."""
    rig.write(unreadable)
    claim = rig.store.claim(key("a"), NOW)
    assert isinstance(claim, Unresolved)
    assert (claim.doubt, claim.holder_crashed) == (DoubtWindow(None, NOW), False)
    assert rig.store.claim(key("a"), NOW) == InProgress(None)
    complete(rig.store, claim.hold, reply("a", U))
    assert rig.store.claim(key("a"), NOW) == Completed(reply("a", U))


@pytest.mark.parametrize("kind", ["string", "list", "set", "zset", "stream"])
def test_a_record_of_another_type_leaves_its_command_in_doubt(rig: Rig, kind: str) -> None:
    write(rig, "command:a", kind)
    claim = rig.store.claim(key("a"), NOW)
    assert isinstance(claim, Unresolved)
    rig.store.release(claim.hold, DOUBT)
    claim = rig.store.claim(key("a"), NOW)
    assert isinstance(claim, Unresolved)
    assert claim.doubt == DOUBT


def write(rig: Rig, key_name: str, kind: str) -> None:
    """Write a key of another type than it should have."""
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
def test_whoever_holds_a_record_that_cannot_be_read_any_more_has_lost_it(rig: Rig, kind: str) -> None:
    hold = held(rig.store.claim(key("a"), NOW))
    write(rig, "command:a", kind)
    for change in (
        lambda: rig.store.release(hold, None),
        lambda: rig.store.own(hold, [U], []),
        lambda: complete(rig.store, hold, reply("a", U)),
    ):
        with pytest.raises(LeaseLost):
            change()


def test_a_former_holder_is_refused_after_its_unreadable_record_was_replaced(rig: Rig) -> None:
    """Both would have the first token, if they were counted from the beginning again."""
    late = held(rig.store.claim(key("a"), NOW))
    rig.redis.hdel(rig.name("command:a"), "state")
    claim = rig.store.claim(key("a"), NOW)
    with pytest.raises(LeaseLost):
        complete(rig.store, late, reply("a", U))
    complete(rig.store, held(claim), reply("a", U1))


def test_fields_of_a_newer_version_are_ignored(rig: Rig) -> None:
    newer = ACCEPTED | {"priority": 7, "trace": {"id": 1}}
    rig.write(record("done", reply=json.dumps(newer), checksum="1", version=b"\xff"))
    assert rig.store.claim(key("a"), NOW) == Completed(reply("a", U))
    rejected = ACCEPTED | {"status": "rejected", "uuid": None, "extra": 1}
    details = [{"field": "retry", "message": "wrong", "line": 1}]
    rejected["error"] = {"code": "onenet_rejected", "message": "no", "errno": 1, "details": details, "hint": "none"}
    rig.write(record("done", reply=json.dumps(rejected)))
    claim = rig.store.claim(key("a"), NOW)
    assert isinstance(claim, Completed)
    assert (claim.reply.status, claim.reply.error and claim.reply.error.errno) == ("rejected", 1)
    rig.write(record("free", colour="red"))
    assert isinstance(rig.store.claim(key("a"), NOW), KnownNotSent)


def test_records_of_the_former_version_are_read(rig: Rig) -> None:
    """A worker is replaced while commands are held, in doubt and done."""
    doubtful = {"since": milliseconds(DOUBT.since or NOW), "until": milliseconds(DOUBT.until), "crashed": 1}
    for former, expected in (
        ({"digest": DIGEST, "state": "held", "lease": 1, "claimed": NOW_MS, "token": 1}, Unresolved),
        ({"digest": DIGEST, "state": "held", "lease": 1, "claimed": NOW_MS, "token": 2, **doubtful}, Unresolved),
        ({"digest": DIGEST, "state": "free", "token": 3, **doubtful}, Unresolved),
        ({"digest": DIGEST, "state": "free", "token": 3, "since": "", "until": "", "crashed": "0"}, KnownNotSent),
        ({"digest": DIGEST, "state": "done", "token": 1, "reply": json.dumps(ACCEPTED)}, Completed),
        ({"digest": "0" * 32, "state": "done", "token": 1, "reply": json.dumps(ACCEPTED)}, KeyReused),
    ):
        rig.write(former)
        assert isinstance(rig.store.claim(key("a"), NOW), expected)
        assert rig.redis.hget(rig.name("command:a"), "token") != b"1" or expected in {Completed, KeyReused}


def test_a_reply_that_cannot_be_read_is_taken_back_by_a_replay(rig: Rig) -> None:
    rig.write(record("done", reply="garbage", failed=NOW_MS))
    assert isinstance(rig.store.claim(key("a"), NOW, Replay(NOW, None)), KnownNotSent)


@pytest.mark.parametrize("kind", ["string", "list", "hash"])
def test_likes_that_cannot_be_read_cost_no_command_anything(rig: Rig, kind: str) -> None:
    write(rig, f"alike:{key('a').match_key.hex()}", kind)
    hold = held(rig.store.claim(key("a"), NOW))
    assert rig.store.own(hold, [U], []) == Assigned(U)
    write(rig, f"alike:{key('a').match_key.hex()}", kind)
    assert rig.store.own(hold, [U], []) == Assigned(U)
    complete(rig.store, hold, reply("a", U))
    hold = held(rig.store.claim(key("b"), NOW))
    write(rig, f"alike:{key('a').match_key.hex()}", kind)
    rig.store.release(hold, None)


@pytest.mark.parametrize("kind", ["string", "list", "hash"])
def test_a_twin_whose_record_cannot_be_read_may_have_caused_one_entry(rig: Rig, kind: str) -> None:
    held(rig.store.claim(key("b"), NOW))
    hold = held(rig.store.claim(key("a"), NOW))
    assert rig.store.own(hold, [U1, U2], []) == LookalikeInProgress()
    write(rig, "command:b", kind)
    assert rig.store.own(hold, [U1, U2], []) == Assigned(U1)


@pytest.mark.parametrize("value", [b"", b"\xff", b"??", b"a b", b"?", b"x" * 130, None])
def test_a_uuid_whose_owner_cannot_be_read_is_given_to_nobody(rig: Rig, value: bytes | None) -> None:
    """It may be this command's, or another's: neither is known."""
    if value is None:
        write(rig, f"uuid:{U}", "list")
    else:
        rig.redis.set(rig.name(f"uuid:{U}"), value)
    hold = held(rig.store.claim(key("a"), NOW))
    assert rig.store.owned_by_others(key("a"), [U, U1]) == set()
    assert rig.store.own(hold, [U], []) == Ambiguous()
    assert rig.store.own(hold, [], []) == NoCandidate()
    with pytest.raises(UuidTaken):
        complete(rig.store, hold, reply("a", U))


def test_whatever_is_in_the_key_of_the_former_version_matters_no_more(rig: Rig) -> None:
    write(rig, "epoch", "list")
    assert isinstance(rig.store.claim(key("a"), NOW), Unseen)
    write(rig, "ping", "list")
    rig.store.ping()


@pytest.mark.parametrize("value", [b"garbage", b"\xff", b"1e300", b"inf", b"nan", None])
def test_slots_that_cannot_be_read_begin_anew(rig: Rig, value: bytes | None) -> None:
    """Else the rate would not be kept any more, or nothing would ever be sent again."""
    slots = RateLimiter(Rate(1, 600), rig.namespace, rig.url)
    assert slots.acquire(None) == 0
    [name] = rig.redis.keys(f"{{{rig.namespace}}}:rate*")
    if value is None:
        write(rig, name.decode().partition("}:")[2], "list")
    else:
        rig.redis.set(name, value)
    assert slots.acquire(None) == 0
    assert 0 < slots.acquire(None) <= 600


FIELDS = ["digest", "state", "lease", "claimed", "since", "until", "crashed", "reply", "token", "failed", "new"]
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
def test_no_record_stops_a_worker_or_its_own_command(
    rig: Rig, fields: dict[str, Any], whole: str | None, owner: str | bytes | None
) -> None:
    rig.redis.delete(*map(rig.name, ["command:a", f"uuid:{U}", f"uuid:{U1}", f"alike:{key('a').match_key.hex()}"]))
    mixed = (record(whole) if whole else {}) | fields
    if mixed:
        rig.write(mixed)
    if owner is not None:
        rig.redis.set(rig.name(f"uuid:{U}"), owner)
    claim = rig.store.claim(key("a"), NOW, None)
    if isinstance(claim, Completed | KeyReused):
        return
    if isinstance(claim, InProgress):  # only while a lease may last, which is checked to be near
        assert float(mixed["lease"]) < (NOW + timedelta(days=36_500)).timestamp() * 1000
        return
    assert claim.hold.token >= 1
    rig.store.owned_by_others(key("a"), [U, U1])
    rig.store.own(claim.hold, [U, U1], [])
    try:
        complete(rig.store, claim.hold, reply("a", U))
    except UuidTaken:
        again = rig.store.claim(key("a"), NOW)
        assert isinstance(again, Unresolved)
        assert again.doubt == DOUBT
    else:
        assert rig.store.claim(key("a"), NOW) == Completed(reply("a", U))
