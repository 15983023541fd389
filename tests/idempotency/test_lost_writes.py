"""A Redis that loses its last writes while a worker is killed or cut off: nothing is sent a second time.

Each test is the smallest case of one command. What Redis loses is taken back by hand, key by key, as a replica that is
promoted a second too early, or a file that was written a second before the loss of power, would have it.
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
    """The worker's process ended."""


class Rig(HandlerRig):
    """A handler whose store is in a real Redis, which can be set back to how it was."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._namespace = f"test-{uuid4().hex}"
        self._redis: Any = redis.Redis.from_url(url)
        self._stores: list[RedisStore] = []
        self._ahead = timedelta()
        super().__init__()

    def restart(self) -> None:
        """Begin a new process, which has nothing but what Redis has."""
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
        """Let the time of settling pass; returns the headers of the copy that was published last."""
        self._ahead += timedelta(seconds=SETTLE_S + 1)
        return self.last_headers()

    def state(self) -> dict[bytes, bytes]:
        return {name: self._redis.dump(name) for name in self._redis.keys(f"{{{self._namespace}}}:*")}

    def set_back(self, state: dict[bytes, bytes]) -> None:
        """Lose all that was written since."""
        for name in self._redis.keys(f"{{{self._namespace}}}:*"):
            self._redis.delete(name)
        for name, value in state.items():
            self._redis.restore(name, 60_000, value)

    def kill_while_asked(self, came: Delivery) -> None:
        """Handle a delivery in a worker that ends when its request has been sent."""

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
    """Let the message come again: it settles, and then its history has what was sent."""
    rig.history.clear()
    assert rig.handle(came) == SETTLE
    assert "look up" not in rig.history  # which may not show yet what was sent last
    rig.platform.entries = [likely("its own")]
    rig.handle(delivery(headers=rig.settle()))
    assert "look up" in rig.history
    assert "request" not in rig.history


def test_a_claim_that_was_lost_with_its_worker(rig: Rig) -> None:
    rig.handle(delivery(command_id="earlier", args="earlier"))
    before = rig.state()
    rig.kill_while_asked(delivery())
    rig.set_back(before)
    assert_sent_once(rig, delivery(redelivered=True))


def test_an_outcome_that_was_lost_with_the_connection_to_the_broker(rig: Rig) -> None:
    """Its reply was not confirmed, so that the command comes again."""
    rig.handle(delivery(command_id="earlier", args="earlier"))
    before = rig.state()
    assert rig.handle(delivery()) == REPLY
    rig.set_back(before)
    assert_sent_once(rig, delivery(redelivered=True))


def test_a_claim_that_was_lost_in_a_redis_that_another_worker_has_written_to_since(rig: Rig) -> None:
    rig.kill_while_asked(delivery())
    rig.set_back({})
    assert rig.handle(delivery(command_id="another", args="another")) == REPLY
    rig.restart()
    assert_sent_once(rig, delivery(redelivered=True))


def test_the_claim_of_a_second_attempt_whose_first_was_known_not_to_have_been_sent(rig: Rig) -> None:
    """What is left is the record of the first attempt, which says that nothing was sent."""
    rig.platform.answers = [NotSent("refused")]
    assert rig.handle(delivery()) == RETRY
    retry, before = rig.last_headers(), rig.state()
    rig.kill_while_asked(delivery(headers=retry))
    rig.set_back(before)
    assert_sent_once(rig, delivery(redelivered=True, headers=retry))


def test_a_second_attempt_of_which_no_record_is_left(rig: Rig) -> None:
    rig.platform.answers = [NotSent("refused")]
    assert rig.handle(delivery()) == RETRY
    retry = rig.last_headers()
    assert rig.handle(delivery(redelivered=True)) == SETTLE  # cut off behind the retry's confirm
    rig.set_back({})
    assert_sent_once(rig, delivery(headers=retry))


def test_the_claim_of_a_request_that_followed_a_doubt(rig: Rig) -> None:
    """What is left is the doubt of long before: what was sent since is not in its time."""
    rig.platform.answers = [InDoubt("read timeout")]
    assert rig.handle(delivery()) == SETTLE
    copy, before = rig.settle(), rig.state()
    rig.kill_while_asked(delivery(headers=copy))
    rig.settle()
    rig.set_back(before)
    assert_sent_once(rig, delivery(redelivered=True, headers=copy))


def test_the_claim_of_a_replay(rig: Rig) -> None:
    """What is left is the failure that it takes back."""
    assert rig.handle(delivery(expired_time=EXPIRED)) == FAILURE
    failed_at = str((rig.last[1].properties.headers or {})["x-onenet-failed-at"])
    before = rig.state()
    order = {"x-onenet-replay": failed_at, "x-onenet-uncounted": True}
    rig.handle(delivery(headers=order, expired_time=EXPIRED))
    rig.set_back(before)
    assert rig.handle(delivery(redelivered=True, headers=order, expired_time=EXPIRED)) == SETTLE


def test_a_first_delivery_is_still_sent_at_once(rig: Rig) -> None:
    assert rig.handle(delivery()) == REPLY
    assert rig.handle(delivery(command_id="b", headers={"x-onenet-attempt": 1})) == REPLY
    assert rig.passed_on == []


def test_what_a_worker_did_not_begin_is_in_doubt_all_the_same(rig: Rig) -> None:
    """A note of it could outlive the lost record of another delivery's later request, and deny that."""
    rig.handler.mark_not_sent(rig.handler.read(delivery(), 0))
    assert rig.handle(delivery(redelivered=True)) == SETTLE
