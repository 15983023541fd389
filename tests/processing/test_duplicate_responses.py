"""Commands whose response has the uuid of another command: what their replies say, on both stores."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4
from zoneinfo import ZoneInfo

import pytest

from tests.support.deliveries import a_delivery
from tests.support.duplicating_server import DuplicatingServer
from tests.support.onenet_client import onenet_client
from tests.support.proxies import raw_server
from tests.support.stores import NOW
from worker.amqp.messages import Delivery, MessageBuilder, Publication
from worker.amqp.topology import Topology
from worker.core.answer import Cached
from worker.core.claims import IdempotencyStore, Key, Unseen
from worker.core.clock import utc_now
from worker.core.command import Command
from worker.core.decide import InDoubtMode, RetryPolicy
from worker.core.doubt_window import DoubtWindow
from worker.core.parsing import read_command, read_task
from worker.core.platform import Candidate, OwnedByOthers, PlatformClient, Sent
from worker.core.resolution import Conclude
from worker.idempotency.memory import MemoryStore
from worker.idempotency.redis import RedisStore
from worker.processing.circuit_breaker import CircuitBreakers
from worker.processing.leases import Leases
from worker.processing.processor import Processor
from worker.processing.reporter import Reporter
from worker.processing.unstarted import Unstarted
from worker.telemetry.metrics import Metrics

COMMANDS = 200
UUID_FORMS = ["00000000-0000-4000-8000-000000000000", "42742677"]
UUID = UUID_FORMS[0]


@pytest.fixture(params=["memory", "redis"])
def store(request: pytest.FixtureRequest) -> Iterator[IdempotencyStore]:
    if request.param == "memory":
        yield MemoryStore(600, 600, began_at=NOW)
        return
    shared = RedisStore(request.getfixturevalue("redis_url"), uuid4().hex, ttl_s=600, lease_s=600, connections=2)
    yield shared
    shared.close()


class Engine:
    """A processor with a given client and store; returns the publications for a delivery."""

    def __init__(self, client: PlatformClient, store: IdempotencyStore, in_doubt: InDoubtMode = "reconcile") -> None:
        breakers = CircuitBreakers([None], 3, 5, clock=lambda: 0.0)
        policy = RetryPolicy((5, 30), 3, 60, in_doubt)
        unstarted = Unstarted(store, breakers, policy, utc_now)
        reporter = Reporter(Metrics("0", 1))
        self._messages = MessageBuilder(Topology("onenet", (5, 30, 60)), "host:1")
        self._leases = Leases(store, policy, utc_now)
        self._processor = Processor(client, store, self._leases, unstarted, breakers, breakers, policy, reporter)

    def handle(self, delivery: Delivery) -> list[Publication]:
        task = read_task(delivery.envelope, delivery.body, ZoneInfo("Asia/Shanghai"), 0)
        resolution = self._processor.process(task, lambda _: True)
        if isinstance(resolution, Conclude):
            return self._messages.publications(delivery, self._leases.record_and_wait(delivery.envelope, resolution))
        return self._messages.publications(delivery, resolution)

    def delay_queue(self, delivery: Delivery) -> str:
        """Handle a delivery that gets no reply; returns its delay queue, and checks that it is in doubt."""
        [copy] = self.handle(delivery)
        doubt = DoubtWindow.parse(str((copy.properties.headers or {})["x-onenet-in-doubt"]))
        assert doubt.since is not None
        assert doubt.since <= doubt.until <= datetime.now(UTC)
        return copy.routing_key


def test_every_reply_is_correct_when_the_platform_sends_each_response_twice(store: IdempotencyStore) -> None:
    server = DuplicatingServer()
    replies: dict[int, Any] = {}
    with raw_server(server.serve) as url, onenet_client(url) as client:
        engine = Engine(client, store)
        for number in range(COMMANDS):
            delivery = a_delivery(command_id=f"command-{number}", args=str(number))
            [publication] = engine.handle(delivery)
            if publication.exchange == "onenet.replies":
                replies[number] = json.loads(publication.body)
            else:
                assert publication.routing_key == "onenet.execute.retry.60s"
    assert len(server.received) == len(set(server.received))
    assert replies
    for number, reply in replies.items():
        assert (reply["status"], reply["uuid"]) == ("accepted", server.uuid(number))


@dataclass
class ScriptedPlatform:
    """A platform that accepts every command, under the uuids of a script, and has an empty history."""

    uuids: list[str]

    def knows(self, _product: str | None) -> bool:
        return True

    def execute(self, _command: Command, _not_after: float) -> Sent:
        return Sent(Cached(self.uuids.pop(0)), valid_time_omitted=False)

    def find_candidates(self, _command: Command, _doubt: DoubtWindow, _others: OwnedByOthers) -> list[Candidate]:
        return []


@pytest.mark.parametrize("uuid", UUID_FORMS, ids=["a standard uuid", "another form"])
@pytest.mark.parametrize("is_lookalike", [True, False])
def test_a_uuid_that_another_command_owns_is_never_in_a_reply(
    store: IdempotencyStore, uuid: str, is_lookalike: bool
) -> None:
    """The command is in doubt, as if its response had been lost."""
    engine = Engine(ScriptedPlatform([uuid, uuid, "its own"]), store)
    [reply] = engine.handle(a_delivery(command_id="a"))
    assert json.loads(reply.body)["uuid"] == uuid
    other = a_delivery(command_id="b", args="the same" if is_lookalike else "another")
    assert engine.delay_queue(other) == "onenet.execute.retry.60s"
    assert engine.delay_queue(other) == "onenet.execute.retry.60s"  # by its record this time
    [reply] = engine.handle(a_delivery(command_id="a"))
    assert json.loads(reply.body)["uuid"] == uuid


@pytest.mark.parametrize("in_doubt", ["dead-letter", "resend"])
def test_with_in_doubt_mode_dead_letter_or_resend_a_uuid_that_another_command_owns_is_never_in_a_reply(
    store: IdempotencyStore, in_doubt: InDoubtMode
) -> None:
    engine = Engine(ScriptedPlatform([UUID, UUID, "its own"]), store, in_doubt)
    engine.handle(a_delivery(command_id="a"))
    [copy] = engine.handle(a_delivery(command_id="b"))
    publication, *_ = engine.handle(a_delivery(command_id="b", headers=copy.properties.headers))
    reply = json.loads(publication.body)
    if in_doubt == "resend":
        assert (reply["status"], reply["uuid"]) == ("accepted", "its own")
    else:
        assert (reply["status"], reply["error"]["code"]) == ("failed", "outcome_unknown")


def test_resend_stops_at_max_attempts_when_every_response_has_the_uuid_of_another_command(
    store: IdempotencyStore,
) -> None:
    engine = Engine(platform := ScriptedPlatform([UUID] * 9), store, "resend")
    engine.handle(a_delivery(command_id="a"))
    published = engine.handle(a_delivery(command_id="b"))
    while published[0].exchange == "onenet.retry":
        published = engine.handle(a_delivery(command_id="b", headers=published[0].properties.headers))
    reply = json.loads(published[0].body)
    assert (reply["status"], reply["error"]["code"], reply["attempts"]) == ("failed", "outcome_unknown", 3)
    assert len(platform.uuids) == 9 - 1 - 3


def test_a_crash_suspect_that_gets_the_uuid_of_another_command_stays_in_doubt(store: IdempotencyStore) -> None:
    """Its copy, which was published before the attempt, carries the doubt on."""
    engine = Engine(ScriptedPlatform([UUID, UUID]), store)
    engine.handle(a_delivery(command_id="a"))
    long_ago = str(DoubtWindow(NOW, NOW))
    suspect = {"x-onenet-attempt": 1, "x-onenet-in-doubt": long_ago, "x-onenet-crash-count": 0}
    # The record that a crash leaves behind: in doubt, with the delay before the reconciliation over.
    claim = store.claim(_key(a_delivery(command_id="b")), NOW)
    assert isinstance(claim, Unseen)
    store.release(claim.lease, DoubtWindow(NOW, NOW), holder_crashed=True)
    assert engine.handle(a_delivery(command_id="b", headers=suspect)) == []
    assert engine.delay_queue(a_delivery(command_id="b")) == "onenet.execute.retry.60s"


def _key(delivery: Delivery) -> Key:
    read = read_command(delivery.body, None, ZoneInfo("Asia/Shanghai"))
    return Key(read.command_id, read.content_hash(), read.match_key())
