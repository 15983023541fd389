"""Redis loses its last writes while a worker is killed or disconnected: no command is sent twice.

Each test is the smallest case of one command. It restores an earlier state of Redis key by key, and promotes the
server: the state of a replica that is promoted a second too early.
"""

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
import redis

from tests.support.engine import (
    RECONCILE_DELAY_S,
    Engine,
    a_copy,
    a_likely,
    a_task,
    expect,
    expect_reconciliation,
    expect_retry,
    failure_of,
    redelivered,
    reply_of,
)
from tests.support.stores import held, key
from tests.support.waiting import PATIENCE_S
from worker.core.answer import InDoubt, NotSent
from worker.core.claims import Key, Unresolved, Unseen
from worker.core.envelope import Envelope, Replay, Task
from worker.core.epoch import REDELIVERED_S
from worker.core.resolution import Conclude
from worker.dev.services.ports import free_port
from worker.dev.services.redis import LocalRedis
from worker.errors import LeaseLost, StoreRefused
from worker.idempotency.redis import RedisStore
from worker.processing.unstarted import key_of

LEASE_S = 30
WEEK_S = 7 * 24 * 3600
EXPIRED = "2026-01-01T00:00:00"


class EngineOnRedis(Engine):
    """An engine whose store is a real Redis that can be set back to an earlier state."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._namespace = f"test-{uuid4().hex}"
        self._redis: Any = redis.Redis.from_url(url)
        self._stores: list[RedisStore] = []
        super().__init__(store=self.new_store())

    def restart_on_redis(self) -> None:
        """Start a new process, whose only records are those in Redis."""
        self.restart(self.new_store())

    def wait(self) -> None:
        """Let the reconcile delay pass, after the last lease that may have been lost."""
        self.ahead_s += LEASE_S + RECONCILE_DELAY_S + 1

    def state(self) -> dict[bytes, bytes]:
        return {name: self._redis.dump(name) for name in self._redis.keys(f"{{{self._namespace}}}:*")}

    def fields(self) -> dict[bytes, dict[bytes, bytes]]:
        """Return the fields of all records, which a server may keep in any order."""
        names = self._redis.keys(f"{{{self._namespace}}}:*")
        return {name: self._redis.hgetall(name) for name in names if self._redis.type(name) == b"hash"}

    def set_back(self, state: dict[bytes, bytes]) -> None:
        """Lose all writes since a state."""
        self.restore(state)
        self.promote()

    def restore(self, state: dict[bytes, bytes]) -> None:
        """Have the records of an earlier state, on the same server."""
        for name in self._redis.keys(f"{{{self._namespace}}}:*"):
            self._redis.delete(name)
        for name, value in state.items():
            self._redis.restore(name, 60_000, value)

    def let_another_server_have_written(self) -> None:
        """Let the epoch be one of another server, as after its data was copied to this one."""
        self._redis.hset(f"{{{self._namespace}}}:epoch", "run", "0" * 40)

    def promote(self) -> None:
        """Make the server a replica of nothing, and the primary again, with a new history."""
        self._redis.replicaof("127.0.0.1", free_port())
        self._redis.replicaof("NO", "ONE")

    def settle(self) -> None:
        """Let the time pass for which first deliveries are in doubt after a loss."""
        self.age(LEASE_S + RECONCILE_DELAY_S + 1)

    def age(self, seconds: float) -> None:
        """Let the epoch have begun earlier."""
        name = f"{{{self._namespace}}}:epoch"
        self._redis.hset(name, "since", int(self._redis.hget(name, "since")) - round(seconds * 1000))

    async def kill_during_request(self, task: Task) -> None:
        """Process a delivery in a worker that is killed after its request was sent; the next process starts."""
        await super().kill_during_request(task)
        self.restart_on_redis()

    async def close(self) -> None:
        for store in self._stores:
            await store.close()
        self.empty()
        self._redis.close()

    def empty(self) -> None:
        """Delete all records."""
        for name in self.state():
            self._redis.delete(name)

    def rest_for(self, seconds: float) -> None:
        """Let no command have been claimed for some time."""
        name = f"{{{self._namespace}}}:epoch"
        self._redis.hset(name, "used", int(self._redis.hget(name, "used")) - round(seconds * 1000))

    @contextmanager
    def forbidding(self, *rules: str) -> Iterator[None]:
        """Forbid the user of the stores some commands."""
        self._redis.acl_setuser("default", enabled=True, nopass=True, commands=list(rules))
        try:
            yield
        finally:
            self._redis.execute_command("ACL", "SETUSER", "default", "on", "nopass", "+@all", "~*")

    def end_leases(self) -> None:
        """Let the time of all leases pass."""
        for name in self._redis.keys(f"{{{self._namespace}}}:command:*"):
            self._redis.hset(name, "lease", 1)

    def new_store(self, ttl_s: int = WEEK_S, replicas: int = 0) -> RedisStore:
        """Return a store of another process."""
        store = RedisStore(self._url, self._namespace, ttl_s=ttl_s, lease_s=LEASE_S, replicas=replicas)
        self._stores.append(store)
        return store


@pytest.fixture
async def engine(own_redis: LocalRedis) -> AsyncIterator[EngineOnRedis]:
    made = EngineOnRedis(own_redis.url)
    yield made
    await made.close()


async def assert_sent_once(engine: EngineOnRedis, envelope: Envelope) -> None:
    """Deliver the message again: it waits for the reconcile delay, and then its history has the command."""
    engine.steps.clear()
    waiting = expect_reconciliation(await engine.process(a_task(envelope)))
    assert "history" not in engine.steps  # which may not have the last request yet
    engine.platform.candidates = [a_likely("its-own")]
    engine.wait()
    await engine.process(a_task(engine.copy_of(waiting)))
    assert "history" in engine.steps
    assert "request" not in engine.steps


async def test_a_command_is_not_sent_twice_after_its_claim_was_lost_with_its_worker(engine: EngineOnRedis) -> None:
    await engine.process(a_task(command_id="earlier", args="earlier"))
    before = engine.state()
    await engine.kill_during_request(a_task())
    engine.set_back(before)
    await assert_sent_once(engine, redelivered())


async def test_a_command_is_not_sent_twice_after_its_outcome_was_lost_with_the_broker_connection(
    engine: EngineOnRedis,
) -> None:
    """Its reply was not confirmed, so the broker redelivers it."""
    await engine.process(a_task(command_id="earlier", args="earlier"))
    before = engine.state()
    assert reply_of(await engine.process(a_task())).status == "accepted"
    engine.set_back(before)
    await assert_sent_once(engine, redelivered())


async def test_a_command_is_not_sent_twice_after_its_claim_was_lost_and_redis_was_written_to_since(
    engine: EngineOnRedis,
) -> None:
    await engine.kill_during_request(a_task())
    engine.set_back({})
    assert reply_of(await engine.process(a_task(command_id="another", args="another"))).status == "accepted"
    engine.restart_on_redis()
    await assert_sent_once(engine, redelivered())


async def test_a_second_attempt_is_not_repeated_after_its_claim_was_lost(engine: EngineOnRedis) -> None:
    """The record that is left is the first attempt's, which was not sent."""
    engine.platform.answers = [NotSent("refused")]
    retry = engine.copy_of(expect_retry(await engine.process(a_task())))
    before = engine.state()
    await engine.kill_during_request(a_task(retry))
    engine.set_back(before)
    await assert_sent_once(engine, redelivered(retry))


async def test_a_second_attempt_is_not_repeated_after_every_record_was_lost(engine: EngineOnRedis) -> None:
    engine.platform.answers = [NotSent("refused")]
    retry = engine.copy_of(expect_retry(await engine.process(a_task())))
    # The connection was lost after the retry was confirmed.
    assert reply_of(await engine.process(a_task(redelivered()))).status == "accepted"
    engine.set_back({})
    await assert_sent_once(engine, retry)


async def test_a_request_after_a_doubt_is_not_repeated_after_its_claim_was_lost(engine: EngineOnRedis) -> None:
    """The record that is left is an old doubt, whose window does not include the last request."""
    engine.platform.answers = [InDoubt("read timeout")]
    copy = engine.copy_of(expect_reconciliation(await engine.process(a_task())))
    engine.wait()
    before = engine.state()
    await engine.kill_during_request(a_task(copy))
    engine.wait()
    engine.set_back(before)
    await assert_sent_once(engine, redelivered(copy))


async def test_a_replay_is_in_doubt_after_its_claim_was_lost(engine: EngineOnRedis) -> None:
    """The record that is left is the failure that the replay discards."""
    failed = expect(Conclude, await engine.process(a_task(expired_time=EXPIRED)))
    assert failure_of(failed).code == "expired"
    before = engine.state()
    order = a_copy(replay=Replay(failed.reply.completed_at, None), is_free_attempt=True)
    assert failure_of(await engine.process(a_task(order, expired_time=EXPIRED))).code == "expired"
    engine.set_back(before)
    expect_reconciliation(await engine.process(a_task(redelivered(order), expired_time=EXPIRED)))


async def test_a_first_delivery_is_sent_at_once(engine: EngineOnRedis) -> None:
    assert reply_of(await engine.process(a_task())).status == "accepted"
    assert reply_of(await engine.process(a_task(a_copy(), command_id="b"))).status == "accepted"
    assert engine.announced == []


async def begin_long_ago(engine: EngineOnRedis) -> None:
    """Let the store have records for longer than any delivery stays unacknowledged."""
    await engine.process(a_task(command_id="first", args="first"))
    engine.age(REDELIVERED_S)


async def test_what_was_never_claimed_is_sent_at_once_after_a_kill(engine: EngineOnRedis) -> None:
    await begin_long_ago(engine)
    engine.restart_on_redis()
    assert reply_of(await engine.process(a_task(redelivered()))).status == "accepted"
    assert engine.announced == []


async def test_a_store_that_is_new_to_the_workers_proves_nothing_about_redeliveries(engine: EngineOnRedis) -> None:
    """It may have been emptied while no worker ran, or the workers may have used another store."""
    assert reply_of(await engine.process(a_task(command_id="b", args="b"))).status == "accepted"
    engine.age(REDELIVERED_S - 10)
    expect_reconciliation(await engine.process(a_task(redelivered())))
    engine.age(11)
    assert reply_of(await engine.process(a_task(redelivered(), command_id="c", args="c"))).status == "accepted"


async def test_an_epoch_does_not_age_before_the_first_claim(engine: EngineOnRedis) -> None:
    """The workers probe an emptied store long before the broker is back, which then redelivers."""
    store = engine.new_store()
    await store.ping()
    engine.age(REDELIVERED_S)
    await store.ping()
    engine.age(REDELIVERED_S)
    expect_reconciliation(await engine.process(a_task(redelivered())))


async def test_what_has_arrived_in_this_epoch_is_sent_at_once_after_a_kill(engine: EngineOnRedis) -> None:
    """Also on a new store: the record of the arrival shows that there was no earlier attempt."""
    await engine.unstarted.note_arrival(a_task())
    engine.restart_on_redis()
    assert reply_of(await engine.process(a_task(redelivered()))).status == "accepted"
    assert engine.announced == []


async def test_an_arrival_proves_nothing_after_a_loss(engine: EngineOnRedis) -> None:
    await engine.unstarted.note_arrival(a_task())
    before = engine.state()
    assert reply_of(await engine.process(a_task())).status == "accepted"
    engine.set_back(before)
    await assert_sent_once(engine, redelivered())


async def test_an_arrival_soon_after_a_loss_proves_nothing(engine: EngineOnRedis) -> None:
    """Upstream may have published the command again, and the record of the first attempt may be lost."""
    await begin_long_ago(engine)
    engine.promote()
    task = a_task(Envelope(arrived_at=engine.now().timestamp() - 20))
    await engine.unstarted.note_arrival(task)
    engine.settle()
    await engine.unstarted.note_arrival(task)  # from a worker that hung for a while
    expect_reconciliation(await engine.process(a_task(redelivered())))


async def test_an_arrival_changes_no_record(engine: EngineOnRedis) -> None:
    task = a_task()
    assert reply_of(await engine.process(task)).status == "accepted"
    before = engine.fields()
    await engine.unstarted.note_arrival(task)
    assert engine.fields() == before


async def test_arrivals_are_noted_only_where_a_redelivery_would_be_in_doubt(engine: EngineOnRedis) -> None:
    store, shortly = engine.new_store(), engine.new_store(ttl_s=60)
    assert store.wants_arrivals
    await begin_long_ago(engine)
    for each in (store, shortly):
        await each.claim(key("x"), engine.now())
    assert (store.wants_arrivals, shortly.wants_arrivals) == (False, True)


@pytest.mark.parametrize("is_claimed", [False, True])
async def test_what_a_newcomer_recorded_before_the_loss_was_recognised_proves_nothing(
    engine: EngineOnRedis, is_claimed: bool
) -> None:
    """It took the emptied store for a new one, until a worker that knew records of before spoke."""
    await begin_long_ago(engine)
    assert reply_of(await engine.process(a_task())).status == "accepted"
    engine.empty()
    newcomer, task = engine.new_store(), a_task()
    assert task.command is not None
    if is_claimed:
        await newcomer.release(held(await newcomer.claim(key_of(task.command), engine.now())), None)
    else:
        await newcomer.note_arrival(key_of(task.command), engine.now())
    await engine.process(a_task(command_id="b", args="b"))
    engine.restart(newcomer)
    await assert_sent_once(engine, task.envelope)


@pytest.mark.parametrize("follows_loss", [False, True])
async def test_a_return_to_records_of_before_is_a_loss(engine: EngineOnRedis, follows_loss: bool) -> None:
    """A name or a virtual address leads to another server and back, or the keys are restored from a copy."""
    await begin_long_ago(engine)
    if follows_loss:
        engine.promote()
        await engine.process(a_task(command_id="b", args="b"))
        engine.age(2 * REDELIVERED_S)
    before = engine.state()
    engine.let_another_server_have_written()
    await engine.process(a_task(command_id="c", args="c"))
    engine.settle()
    assert reply_of(await engine.process(a_task())).status == "accepted"
    engine.restore(before)
    await assert_sent_once(engine, redelivered())


async def test_a_record_from_before_a_return_to_former_records_proves_nothing(engine: EngineOnRedis) -> None:
    """It says that the command was not sent, and a later attempt is recorded on the other server."""
    await begin_long_ago(engine)
    engine.platform.answers = [NotSent("refused")]
    retry = engine.copy_of(expect_retry(await engine.process(a_task())))
    before = engine.state()
    engine.let_another_server_have_written()
    await engine.process(a_task(command_id="c", args="c"))
    engine.settle()
    await engine.process(a_task(a_copy(), command_id="d", args="d"))
    engine.restore(before)
    expect_reconciliation(await engine.process(a_task(redelivered(retry))))


async def test_a_record_that_says_not_sent_counts_for_a_redelivery_unless_writes_were_lost(
    engine: EngineOnRedis,
) -> None:
    await begin_long_ago(engine)
    engine.platform.answers = [NotSent("refused")]
    retry = engine.copy_of(expect_retry(await engine.process(a_task())))
    assert reply_of(await engine.process(a_task(redelivered(retry)))).status == "accepted"


async def test_a_command_that_upstream_publishes_again_after_a_loss_is_in_doubt(engine: EngineOnRedis) -> None:
    await begin_long_ago(engine)
    before = engine.state()
    assert reply_of(await engine.process(a_task())).status == "accepted"
    engine.set_back(before)
    await assert_sent_once(engine, a_task().envelope)


async def test_a_worker_that_starts_later_recognises_the_loss(engine: EngineOnRedis) -> None:
    await begin_long_ago(engine)
    before = engine.state()
    assert reply_of(await engine.process(a_task())).status == "accepted"
    engine.set_back(before)
    engine.restart_on_redis()
    await assert_sent_once(engine, a_task().envelope)


async def lose_an_accepted_command(engine: EngineOnRedis) -> Key:
    """Let a command be accepted, and its record be lost; returns its key."""
    await begin_long_ago(engine)
    before, task = engine.state(), a_task()
    assert reply_of(await engine.process(task)).status == "accepted"
    engine.set_back(before)
    assert task.command is not None
    return key_of(task.command)


async def test_a_claim_whose_worker_was_killed_after_a_loss_says_nothing_of_the_time_before(
    engine: EngineOnRedis,
) -> None:
    """The request was sent before that claim, at an unknown time."""
    lost = await lose_an_accepted_command(engine)
    await engine.new_store().claim(lost, datetime.now(UTC))
    engine.end_leases()
    claim = await engine.new_store().claim(lost, datetime.now(UTC))
    assert isinstance(claim, Unresolved)
    assert claim.doubt.since is None


async def test_a_claim_that_too_few_replicas_have_leaves_the_doubt_of_a_loss(
    engine: EngineOnRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.idempotency.redis._WAIT_SHARE", 0.4 / PATIENCE_S)
    lost = await lose_an_accepted_command(engine)
    before = datetime.now(UTC)
    with pytest.raises(StoreRefused, match="NOWAIT"):
        await engine.new_store(replicas=1).claim(lost, datetime.now(UTC))
    claim = await engine.new_store().claim(lost, datetime.now(UTC))
    assert isinstance(claim, Unresolved)
    assert claim.doubt.since is None
    assert claim.doubt.until > before + timedelta(seconds=LEASE_S - 10)  # a worker that hangs may send it


async def test_a_store_that_seems_new_leaves_time_for_a_worker_that_hangs(engine: EngineOnRedis) -> None:
    """It may still send what it claimed before the store was emptied."""
    before = datetime.now(UTC)
    claim = await engine.new_store().claim(Key("a", b"", b""), before)
    assert isinstance(claim, Unseen)
    assert claim.unrecorded_until is not None
    assert claim.unrecorded_until > before + timedelta(seconds=LEASE_S - 10)


async def test_a_worker_that_knew_records_recognises_a_store_that_was_emptied(engine: EngineOnRedis) -> None:
    """Also if another worker, which never knew them, comes first."""
    await begin_long_ago(engine)
    assert reply_of(await engine.process(a_task())).status == "accepted"
    engine.empty()
    newcomer = engine.new_store()
    await newcomer.ping()
    await assert_sent_once(engine, a_task().envelope)


async def test_a_first_delivery_is_sent_at_once_when_the_loss_has_settled(engine: EngineOnRedis) -> None:
    await begin_long_ago(engine)
    engine.promote()
    expect_reconciliation(await engine.process(a_task()))
    engine.settle()
    assert reply_of(await engine.process(a_task(command_id="b", args="b"))).status == "accepted"
    expect_reconciliation(await engine.process(a_task(redelivered(), command_id="c", args="c")))
    engine.age(REDELIVERED_S)
    assert reply_of(await engine.process(a_task(redelivered(), command_id="d", args="d"))).status == "accepted"


async def test_a_command_in_doubt_after_a_loss_waits_once(engine: EngineOnRedis) -> None:
    """Its record is of the new epoch by then, in which nothing was lost."""
    await begin_long_ago(engine)
    engine.promote()
    copy = engine.copy_of(expect_reconciliation(await engine.process(a_task())))
    engine.wait()
    assert reply_of(await engine.process(a_task(copy))).status == "accepted"


async def test_a_copy_from_before_the_loss_is_in_doubt_however_late_it_comes(engine: EngineOnRedis) -> None:
    """Its worker was killed after the copy was confirmed, and the original was sent: that record is lost."""
    await begin_long_ago(engine)
    copy = a_copy()
    before = engine.state()
    assert reply_of(await engine.process(a_task(redelivered()))).status == "accepted"
    engine.set_back(before)
    await engine.process(a_task(command_id="b", args="b"))
    engine.settle()
    engine.age(REDELIVERED_S)
    engine.ahead_s += LEASE_S + RECONCILE_DELAY_S + REDELIVERED_S + 1
    await assert_sent_once(engine, copy)


async def test_a_retry_from_before_the_loss_is_in_doubt_however_late_it_comes(engine: EngineOnRedis) -> None:
    await begin_long_ago(engine)
    engine.platform.answers = [NotSent("refused")]
    retry = engine.copy_of(expect_retry(await engine.process(a_task())))
    before = engine.state()
    assert reply_of(await engine.process(a_task(redelivered()))).status == "accepted"
    engine.set_back(before)
    await engine.process(a_task(command_id="b", args="b"))
    engine.settle()
    engine.age(REDELIVERED_S)
    await assert_sent_once(engine, retry)


async def test_a_record_that_lives_shortly_proves_nothing_about_redeliveries(engine: EngineOnRedis) -> None:
    """It may have expired between the kill and the redelivery."""
    engine.restart(engine.new_store(ttl_s=3600))
    await begin_long_ago(engine)
    await assert_sent_once(engine, redelivered())


async def test_records_may_be_gone_after_a_time_without_any_claim(engine: EngineOnRedis) -> None:
    """For as long as a record lives nobody has claimed anything, and so no record of before is left."""
    await begin_long_ago(engine)
    engine.rest_for(WEEK_S + 1)
    await assert_sent_once(engine, redelivered())


async def test_a_time_without_any_claim_is_no_loss_to_the_other_workers(engine: EngineOnRedis) -> None:
    await begin_long_ago(engine)
    engine.rest_for(WEEK_S + 1)
    await engine.new_store().ping()
    assert reply_of(await engine.process(a_task())).status == "accepted"


async def test_a_server_that_does_not_tell_who_it_is_proves_nothing_about_redeliveries(
    engine: EngineOnRedis,
) -> None:
    with engine.forbidding("-info"):
        await begin_long_ago_without_epoch(engine)
        await assert_sent_once(engine, redelivered())


async def begin_long_ago_without_epoch(engine: EngineOnRedis) -> None:
    assert reply_of(await engine.process(a_task(command_id="first", args="first"))).status == "accepted"


async def test_a_late_write_of_a_lease_that_was_lost_is_refused_to_its_former_holder(engine: EngineOnRedis) -> None:
    """Leases are told apart even where the count of their record was set back."""
    store, other = engine.new_store(), engine.new_store()
    now = engine.now()
    first = held(await store.claim(key("x"), now))
    engine.set_back({})
    second = held(await other.claim(key("x"), now))
    assert first.token != second.token
    with pytest.raises(LeaseLost):
        await store.release(first, None)
