"""One delivery's way through, with a scripted platform and one history for order."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from pika import BasicProperties

from schemas.reply import Reply
from tests.rig import a_command, in_hours
from worker.amqp.messages import Delivery, Outgoing, Publication
from worker.amqp.topology import Topology
from worker.answer import Answer, Cached, InDoubt, NotSent
from worker.commands import ExecuteCommand
from worker.decide import RetryPolicy
from worker.handler import Handler
from worker.idempotency import Claim
from worker.idempotency.memory import MemoryStore
from worker.onenet.client import Sent

CHINA = ZoneInfo("Asia/Shanghai")


@dataclass
class Platform:
    """Answers as it is told, and writes down that it was asked."""

    history: list[str]
    answers: list[Answer] = field(default_factory=list)
    while_asked: Callable[[], object] = lambda: None

    def knows(self, product: str | None) -> bool:
        return product is None

    def execute(self, command: ExecuteCommand) -> Sent:
        self.history.append("request")
        self.while_asked()
        return Sent(self.answers.pop(0) if self.answers else Cached("u"), valid_time_omitted=False)


@dataclass
class Store(MemoryStore):
    """A real store that writes down when it was written to."""

    history: list[str]

    def __post_init__(self) -> None:
        super().__init__(ttl_s=60)

    def claim(self, command_id: str, digest: bytes) -> Claim:
        self.history.append("claim")
        return super().claim(command_id, digest)

    def complete(self, command_id: str, reply: Reply) -> None:
        self.history.append("complete")
        super().complete(command_id, reply)


class Rig:
    def __init__(self) -> None:
        self.history: list[str] = []
        self.platform = Platform(self.history)
        self.store = Store(self.history)
        self.restart()

    def restart(self) -> None:
        """Forget everything, as a new process on ``memory://``."""
        self.store = Store(self.history)
        outgoing = Outgoing(Topology("onenet", (5, 30)), "host:1")
        self.handler = Handler(self.platform, self.store, outgoing, RetryPolicy((5, 30), 3), CHINA)

    def handle(self, delivery: Delivery) -> list[str]:
        """Handle a delivery; returns where its messages go."""
        self.last: Sequence[Publication] = self.handler.handle(delivery)
        return [publication.exchange for publication in self.last]

    def last_reply(self) -> Any:
        return json.loads(self.last[0].body)


@pytest.fixture
def rig() -> Rig:
    return Rig()


def delivery(*, redelivered: bool = False, headers: dict[str, Any] | None = None, **changes: Any) -> Delivery:
    body = json.dumps(a_command(**({"command_id": "a"} | changes))).encode()
    returned = headers is not None
    return Delivery(1, 1, "", redelivered, BasicProperties(headers=headers), body, returned)


REPLY = ["onenet.replies"]
FAILURE = ["onenet.replies", "onenet.dead-letters"]
RETRY = ["onenet.retry"]


def test_the_outcome_is_recorded_before_anything_is_published(rig: Rig) -> None:
    """So that whatever fails from there on repeats the reply and never the request."""
    assert rig.handle(delivery()) == REPLY
    assert rig.history == ["claim", "request", "complete"]


def test_a_redelivery_after_that_gets_the_recorded_reply(rig: Rig) -> None:
    rig.handle(delivery())
    first = rig.last_reply()
    assert rig.handle(delivery(redelivered=True)) == REPLY
    assert rig.last_reply() == first
    assert rig.history.count("request") == 1


def test_a_failure_that_is_redelivered_is_set_aside_again(rig: Rig) -> None:
    """Perhaps its dead letter is the one that was not confirmed."""
    rig.platform.answers = [InDoubt("read timeout")]
    assert rig.handle(delivery()) == FAILURE
    assert rig.handle(delivery(redelivered=True)) == FAILURE
    assert rig.handle(delivery()) == REPLY  # another message with the id: its dead letter is there already


def test_what_was_known_not_to_have_been_sent_may_be_sent_when_it_comes_back(rig: Rig) -> None:
    rig.platform.answers = [NotSent("refused")]
    assert rig.handle(delivery()) == RETRY
    assert rig.handle(delivery(headers={"x-onenet-attempt": 2})) == REPLY
    assert rig.last_reply()["attempts"] == 2
    assert rig.history.count("request") == 2


def test_the_original_of_a_confirmed_retry_and_the_retry_make_one_request(rig: Rig) -> None:
    """The process was cut off between the retry's confirm and the acknowledgement, so both are delivered."""
    rig.platform.answers = [NotSent("refused")]
    rig.handle(delivery())
    assert rig.handle(delivery(redelivered=True)) == REPLY
    assert rig.handle(delivery(headers={"x-onenet-attempt": 2})) == REPLY
    assert rig.history.count("request") == 2  # the refused one, and one that got through


@pytest.mark.parametrize("headers", [None, {"x-onenet-attempt": 2}, {"x-onenet-in-doubt": "2026"}])
def test_after_a_restart_nothing_is_sent_that_may_have_been_sent(rig: Rig, headers: dict[str, Any] | None) -> None:
    assert rig.handle(delivery(redelivered=headers is None, headers=headers)) == FAILURE
    assert rig.last_reply()["error"]["code"] == "outcome_unknown"
    assert "request" not in rig.history


def test_what_was_taken_and_not_started_raises_no_doubt_when_it_comes_back(rig: Rig) -> None:
    rig.handler.note_unsent(delivery())
    assert rig.handle(delivery(redelivered=True)) == REPLY
    assert rig.last_reply()["status"] == "accepted"


def test_but_not_if_it_was_doubtful_when_it_was_taken(rig: Rig) -> None:
    rig.handler.note_unsent(delivery(redelivered=True))
    assert rig.handle(delivery(redelivered=True)) == FAILURE
    assert "request" not in rig.history


def test_a_copy_that_comes_while_the_first_is_under_way_is_put_off(rig: Rig) -> None:
    copies: list[list[str]] = []
    rig.platform.while_asked = lambda: copies.append(
        [publication.exchange for publication in rig.handler.handle(delivery(redelivered=True))]
    )
    assert rig.handle(delivery()) == REPLY
    assert copies == [RETRY]
    assert rig.history.count("request") == 1


def test_expired_time_is_looked_at_before_each_request(rig: Rig) -> None:
    assert rig.handle(delivery(expired_time=in_hours(-1))) == FAILURE
    assert rig.last_reply()["error"]["code"] == "expired"
    assert "request" not in rig.history


def test_a_message_that_can_never_succeed_is_not_remembered(rig: Rig) -> None:
    assert rig.handle(delivery(retry=11)) == FAILURE
    assert rig.handle(delivery(redelivered=True, retry=11)) == FAILURE
    assert rig.history == []
