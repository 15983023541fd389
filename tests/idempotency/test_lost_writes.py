"""Redis loses its last writes while a worker is killed or disconnected: no command is sent twice.

Each test is the smallest case of one command. It restores an earlier state of Redis key by key: the state of a replica
that is promoted a second too early, or of a file that was written a second before a power failure.
"""

from collections.abc import AsyncIterator
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
from tests.support.stores import LONG_S
from worker.core.answer import InDoubt, NotSent
from worker.core.envelope import Envelope, Replay, Task
from worker.core.resolution import Conclude
from worker.idempotency.redis import RedisStore

EXPIRED = "2026-01-01T00:00:00"


class EngineOnRedis(Engine):
    """An engine whose store is a real Redis that can be set back to an earlier state."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._namespace = f"test-{uuid4().hex}"
        self._redis: Any = redis.Redis.from_url(url)
        self._stores: list[RedisStore] = []
        super().__init__(store=self._new_store())

    def restart_on_redis(self) -> None:
        """Start a new process, whose only records are those in Redis."""
        self.restart(self._new_store())

    def wait(self) -> None:
        """Let the reconcile delay pass."""
        self.ahead_s += RECONCILE_DELAY_S + 1

    def state(self) -> dict[bytes, bytes]:
        return {name: self._redis.dump(name) for name in self._redis.keys(f"{{{self._namespace}}}:*")}

    def set_back(self, state: dict[bytes, bytes]) -> None:
        """Lose all writes since a state."""
        for name in self._redis.keys(f"{{{self._namespace}}}:*"):
            self._redis.delete(name)
        for name, value in state.items():
            self._redis.restore(name, 60_000, value)

    async def kill_during_request(self, task: Task) -> None:
        """Process a delivery in a worker that is killed after its request was sent; the next process starts."""
        await super().kill_during_request(task)
        self.restart_on_redis()

    async def close(self) -> None:
        for store in self._stores:
            await store.close()
        self._redis.close()

    def _new_store(self) -> RedisStore:
        store = RedisStore(self._url, self._namespace, ttl_s=60, lease_s=LONG_S)
        self._stores.append(store)
        return store


@pytest.fixture
async def engine(redis_url: str) -> AsyncIterator[EngineOnRedis]:
    made = EngineOnRedis(redis_url)
    yield made
    await made.close()


async def assert_sent_once(engine: EngineOnRedis, envelope: Envelope) -> None:
    """Deliver the message again: it waits for the reconcile delay, and then its history has the command."""
    engine.steps.clear()
    waiting = expect_reconciliation(await engine.process(a_task(envelope)))
    assert "history" not in engine.steps  # which may not have the last request yet
    engine.platform.candidates = [a_likely("its own")]
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
    expect_reconciliation(await engine.process(a_task(redelivered())))
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


async def test_a_redelivered_command_that_was_not_sent_is_in_doubt_with_a_shared_store(engine: EngineOnRedis) -> None:
    """A record that it was not sent could outlive the lost record of another delivery's later request, and deny it."""
    engine.unstarted.mark_not_sent(a_task())
    expect_reconciliation(await engine.process(a_task(redelivered())))
