"""Redis loses its last writes while a worker is killed or disconnected: no command is sent twice.

Each test is the smallest case of one command. It restores an earlier state of Redis key by key: the state of a replica
that is promoted a second too early, or of a file that was written a second before a power failure.
"""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
import redis

from tests.processing.test_processor import CHINA, FAILURE, REPLY, RETRY, SETTLE, SETTLE_S, delivery, likely
from tests.processing.test_processor import Rig as HandlerRig
from tests.support.stores import LONG_S
from worker.amqp.messages import Delivery, MessageBuilder
from worker.amqp.topology import Topology
from worker.core.answer import InDoubt, NotSent
from worker.idempotency.redis import RedisStore
from worker.processing.processor import Processor
from worker.telemetry.metrics import Metrics

EXPIRED = "2026-01-01T00:00:00"


class Killed(BaseException):
    """The worker's process was killed."""


class Rig(HandlerRig):
    """A processor whose store is a real Redis that can be set back to an earlier state."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._namespace = f"test-{uuid4().hex}"
        self._redis: Any = redis.Redis.from_url(url)
        self._stores: list[RedisStore] = []
        self._ahead = timedelta()
        super().__init__()

    def restart(self) -> None:
        """Start a new process, whose only records are those in Redis."""
        super().restart()
        store = RedisStore(self._url, self._namespace, ttl_s=60, lease_s=LONG_S, connections=2)
        self._stores.append(store)
        self.handler = Processor(
            self.platform,
            store,
            MessageBuilder(Topology("onenet", (5, 30, SETTLE_S)), "host:1"),
            self.gates,
            self.history_gates,
            self.policy,
            CHINA,
            Metrics("0", 1),
            lambda: datetime.now(UTC) + self._ahead,
        )

    def settle(self) -> dict[str, Any]:
        """Let the reconcile delay pass; returns the headers of the copy that was published last."""
        self._ahead += timedelta(seconds=SETTLE_S + 1)
        return self.last_headers()

    def state(self) -> dict[bytes, bytes]:
        return {name: self._redis.dump(name) for name in self._redis.keys(f"{{{self._namespace}}}:*")}

    def set_back(self, state: dict[bytes, bytes]) -> None:
        """Lose all writes since a state."""
        for name in self._redis.keys(f"{{{self._namespace}}}:*"):
            self._redis.delete(name)
        for name, value in state.items():
            self._redis.restore(name, 60_000, value)

    def kill_during_request(self, came: Delivery) -> None:
        """Process a delivery in a worker that is killed after its request was sent."""

        def end() -> None:
            raise Killed

        self.platform.while_asked = end
        with pytest.raises(Killed):
            self.handle(came)
        self.platform.while_asked = lambda: None
        self.restart()

    def close(self) -> None:
        for store in self._stores:
            store.close()
        self._redis.close()


@pytest.fixture
def rig(redis_url: str) -> Iterator[Rig]:
    made = Rig(redis_url)
    yield made
    made.close()


def assert_sent_once(rig: Rig, came: Delivery) -> None:
    """Deliver the message again: it waits for the reconcile delay, and then its history has the command."""
    rig.history.clear()
    assert rig.handle(came) == SETTLE
    assert "look up" not in rig.history  # which may not have the last request yet
    rig.platform.entries = [likely("its own")]
    rig.handle(delivery(headers=rig.settle()))
    assert "look up" in rig.history
    assert "request" not in rig.history


def test_a_command_is_not_sent_twice_after_its_claim_was_lost_with_its_worker(rig: Rig) -> None:
    rig.handle(delivery(command_id="earlier", args="earlier"))
    before = rig.state()
    rig.kill_during_request(delivery())
    rig.set_back(before)
    assert_sent_once(rig, delivery(redelivered=True))


def test_a_command_is_not_sent_twice_after_its_outcome_was_lost_with_the_broker_connection(rig: Rig) -> None:
    """Its reply was not confirmed, so the broker redelivers it."""
    rig.handle(delivery(command_id="earlier", args="earlier"))
    before = rig.state()
    assert rig.handle(delivery()) == REPLY
    rig.set_back(before)
    assert_sent_once(rig, delivery(redelivered=True))


def test_a_command_is_not_sent_twice_after_its_claim_was_lost_and_redis_was_written_to_since(rig: Rig) -> None:
    rig.kill_during_request(delivery())
    rig.set_back({})
    assert rig.handle(delivery(command_id="another", args="another")) == REPLY
    rig.restart()
    assert_sent_once(rig, delivery(redelivered=True))


def test_a_second_attempt_is_not_repeated_after_its_claim_was_lost(rig: Rig) -> None:
    """The record that is left is the first attempt's, which was not sent."""
    rig.platform.answers = [NotSent("refused")]
    assert rig.handle(delivery()) == RETRY
    retry, before = rig.last_headers(), rig.state()
    rig.kill_during_request(delivery(headers=retry))
    rig.set_back(before)
    assert_sent_once(rig, delivery(redelivered=True, headers=retry))


def test_a_second_attempt_is_not_repeated_after_every_record_was_lost(rig: Rig) -> None:
    rig.platform.answers = [NotSent("refused")]
    assert rig.handle(delivery()) == RETRY
    retry = rig.last_headers()
    assert rig.handle(delivery(redelivered=True)) == SETTLE  # the connection was lost after the retry was confirmed
    rig.set_back({})
    assert_sent_once(rig, delivery(headers=retry))


def test_a_request_after_a_doubt_is_not_repeated_after_its_claim_was_lost(rig: Rig) -> None:
    """The record that is left is an old doubt, whose window does not include the last request."""
    rig.platform.answers = [InDoubt("read timeout")]
    assert rig.handle(delivery()) == SETTLE
    copy, before = rig.settle(), rig.state()
    rig.kill_during_request(delivery(headers=copy))
    rig.settle()
    rig.set_back(before)
    assert_sent_once(rig, delivery(redelivered=True, headers=copy))


def test_a_replay_is_in_doubt_after_its_claim_was_lost(rig: Rig) -> None:
    """The record that is left is the failure that the replay discards."""
    assert rig.handle(delivery(expired_time=EXPIRED)) == FAILURE
    failed_at = str((rig.last[1].properties.headers or {})["x-onenet-failed-at"])
    before = rig.state()
    order = {"x-onenet-replay": failed_at, "x-onenet-uncounted": True}
    rig.handle(delivery(headers=order, expired_time=EXPIRED))
    rig.set_back(before)
    assert rig.handle(delivery(redelivered=True, headers=order, expired_time=EXPIRED)) == SETTLE


def test_a_first_delivery_is_sent_at_once(rig: Rig) -> None:
    assert rig.handle(delivery()) == REPLY
    assert rig.handle(delivery(command_id="b", headers={"x-onenet-attempt": 1})) == REPLY
    assert rig.passed_on == []


def test_a_redelivered_command_that_was_not_sent_is_in_doubt_with_a_shared_store(rig: Rig) -> None:
    """A record that it was not sent could outlive the lost record of another delivery's later request, and deny it."""
    rig.handler.mark_not_sent(rig.handler.read(delivery(), 0))
    assert rig.handle(delivery(redelivered=True)) == SETTLE
