"""One delivery's way through, with a scripted platform and one history for order."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from pika import BasicProperties

from schemas.reply import Reply
from tests.support.builders import a_command, in_hours
from worker.amqp.messages import FIRST_ARRIVED, Delivery, MessageBuilder, Publication
from worker.amqp.topology import Topology
from worker.core.answer import Answer, Cached, InDoubt, NotSent, Refused
from worker.core.claims import Claim, Key, Lease, OnRecorded
from worker.core.command import Command
from worker.core.decide import InDoubtMode, RetryPolicy
from worker.core.doubt_window import DoubtWindow
from worker.core.envelope import Replay
from worker.core.platform import Candidate, OwnedByOthers, Sent
from worker.errors import HistoryUnreadable, StoreUnavailable
from worker.idempotency.memory import MemoryStore
from worker.processing.circuit_breaker import CircuitBreakers
from worker.processing.processor import MAX_UNFINISHED, MAX_UNREAD, Processor
from worker.telemetry.metrics import Metrics

CHINA = ZoneInfo("Asia/Shanghai")
SETTLE_S = 60
PAUSE_AFTER, PROBE_S = 3, 5
DEVICES = [str(865820030000001 + number) for number in range(3)]
LONG_AGO = datetime.now(UTC) - timedelta(hours=1)
TOMORROW = in_hours(24)  # the same for every delivery: another time would be another command
RESTED = str(DoubtWindow(LONG_AGO, LONG_AGO + timedelta(seconds=2)))


@dataclass
class Platform:
    """Answers as it is told, and writes down that it was asked."""

    history: list[str]
    answers: list[Answer] = field(default_factory=list)
    entries: list[Candidate] | None = field(default_factory=list)  # None: the history cannot be read
    history_error: HistoryUnreadable | None = None
    while_looked_up: Callable[[], object] = lambda: None
    while_asked: Callable[[], object] = lambda: None

    def knows(self, product: str | None) -> bool:
        return product is None

    def execute(self, command: Command, not_after: float) -> Sent:
        self.history.append("request")
        self.while_asked()
        usual = Cached("u" if self.history.count("request") == 1 else f"u{self.history.count('request')}")
        return Sent(self.answers.pop(0) if self.answers else usual, valid_time_omitted=False)

    def find_candidates(self, command: Command, doubt: DoubtWindow, others: OwnedByOthers) -> list[Candidate]:
        self.history.append("look up")
        self.while_looked_up()
        if self.history_error is not None:
            raise self.history_error
        if self.entries is None:
            raise HistoryUnreadable("HTTP 500", is_outage=True)
        return self.entries


class Store(MemoryStore):
    """A real store that writes down when it was written to, and may be away."""

    def __init__(self, history: list[str]) -> None:
        super().__init__(ttl_s=600, lease_s=600, began_at=LONG_AGO)
        self.history = history
        self.is_away_for: set[str] = set()

    def claim(self, key: Key, now: datetime, replay: Replay | None = None) -> Claim:
        self._come("claim")
        return super().claim(key, now, replay)

    def complete(
        self, lease: Lease, reply: Reply, doubt: DoubtWindow | None, on_recorded: OnRecorded, *, is_guess: bool = False
    ) -> None:
        if "complete" in self.is_away_for:
            on_recorded(StoreUnavailable("Redis: ConnectionError"))
            return
        self.history.append("complete")
        super().complete(lease, reply, doubt, on_recorded, is_guess=is_guess)

    def release(self, lease: Lease, doubt: DoubtWindow | None, *, holder_crashed: bool = False) -> None:
        if "release" in self.is_away_for:
            raise StoreUnavailable("Redis: ConnectionError")
        super().release(lease, doubt, holder_crashed=holder_crashed)

    def _come(self, call: str) -> None:
        if call in self.is_away_for:
            raise StoreUnavailable("Redis: ConnectionError")
        self.history.append(call)


class Rig:
    def __init__(self, in_doubt: InDoubtMode = "reconcile") -> None:
        self.history: list[str] = []
        self.platform = Platform(self.history)
        self.policy = RetryPolicy((5, 30), 3, SETTLE_S, in_doubt)
        self.passed_on: list[Publication] = []
        self.is_confirmed = True
        self.seconds = 0.0  # on the gates' clock
        self.now_s = 0.0  # by how much the handler's clock is ahead
        self.restart()

    def restart(self) -> None:
        """Forget everything, as a new process on ``memory://``."""
        self.store = Store(self.history)
        outgoing = MessageBuilder(Topology("onenet", (5, 30, SETTLE_S)), "host:1")
        self.gates = CircuitBreakers([None], PAUSE_AFTER, PROBE_S, clock=lambda: self.seconds)
        self.history_gates = CircuitBreakers(
            [None], PAUSE_AFTER, PROBE_S, clock=lambda: self.seconds, subject="history"
        )
        self.handler = Processor(
            self.platform, self.store, outgoing, self.gates, self.history_gates, self.policy, CHINA, Metrics("0", 1),
            lambda: datetime.now(UTC) + timedelta(seconds=self.now_s),
        )  # fmt: skip

    def handle(self, delivery: Delivery) -> list[str]:
        """Handle a delivery; returns where its messages go."""
        task = self.handler.read(delivery, 0)
        ends: list[Sequence[Publication] | None] = []
        self.handler.handle(task, self.pass_on, ends.append)
        [found] = ends
        self.last: Sequence[Publication] = [self.handler.rest(task)] if found is None else found
        return [_place(publication) for publication in self.last]

    def pass_on(self, publications: Sequence[Publication]) -> bool:
        self.history.append("pass on")
        self.passed_on += publications
        return self.is_confirmed

    def pause(self) -> None:
        """Let the platform fail so often that it counts as down."""
        while (passage := self.gates.try_acquire(None)) is not None:
            passage.record_failure("HTTP 503")

    def pause_histories(self) -> None:
        """Let reads of the history fail so often that they count as down."""
        while (passage := self.history_gates.try_acquire(None)) is not None:
            passage.record_failure("the command history: HTTP 503")

    def come_to_its_last_attempt(self) -> dict[str, Any]:
        """Let a command's first two attempts fail; returns the headers with which it comes for its third."""
        self.platform.answers = [NotSent("refused")] * 2
        self.handle(delivery())
        self.handle(delivery(headers=self.last_headers()))
        return self.last_headers()

    def probe(self, delivery: Delivery) -> list[str]:
        """Handle a delivery as soon as the next probe is due."""
        self.seconds += self.gates.retry_in_s()
        return self.handle(delivery)

    def probe_histories(self, delivery: Delivery) -> list[str]:
        """Handle a delivery as soon as the next probe of histories is due."""
        self.seconds += self.history_gates.retry_in_s()
        return self.handle(delivery)

    def last_reply(self) -> Any:
        return json.loads(self.last[0].body)

    def last_headers(self) -> dict[str, Any]:
        """Return the headers of the last copy, without the time of arrival that each has."""
        headers = self.last[0].properties.headers or {}
        return {name: value for name, value in headers.items() if name != FIRST_ARRIVED}

    def marked_headers(self) -> dict[str, Any]:
        """Return the headers of the one copy that was passed on before a try."""
        [marked] = self.passed_on
        assert _place(marked) == RETRY[0]
        return dict(marked.properties.headers or {})


def _place(publication: Publication) -> str:
    return publication.routing_key if publication.exchange == "onenet.retry" else publication.exchange


@pytest.fixture
def rig() -> Rig:
    return Rig()


def delivery(*, redelivered: bool = False, headers: Mapping[str, Any] | None = None, **changes: Any) -> Delivery:
    body = json.dumps(a_command(**({"command_id": "a", "expired_time": TOMORROW} | changes))).encode()
    return Delivery(
        1, 1, "", redelivered, BasicProperties(headers=headers and dict(headers)), body, headers is not None
    )


def rested(attempt: int = 1, **headers: Any) -> Delivery:
    """A command in doubt whose time to settle is over."""
    own = {"x-onenet-attempt": attempt, "x-onenet-in-doubt": RESTED}
    return delivery(headers=own | {f"x-onenet-{name}": value for name, value in headers.items()})


def likely(uuid: str) -> Candidate:
    return Candidate(uuid, is_within_clock_skew=True, valid_time_omitted=False)


REPLY = ["onenet.replies"]
FAILURE = ["onenet.replies", "onenet.dead-letters"]
RETRY = ["onenet.execute.retry.5s"]
SETTLE = ["onenet.execute.retry.60s"]


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
    assert rig.handle(delivery(expired_time="2026-01-01T00:00:00")) == FAILURE
    assert rig.handle(delivery(redelivered=True, expired_time="2026-01-01T00:00:00")) == FAILURE
    # Another message with the id: its dead letter is there already.
    assert rig.handle(delivery(expired_time="2026-01-01T00:00:00")) == REPLY


def test_a_lost_answer_rests_with_the_time_of_its_doubt(rig: Rig) -> None:
    rig.platform.answers = [InDoubt("read timeout")]
    assert rig.handle(delivery()) == SETTLE
    doubt = DoubtWindow.parse(rig.last_headers()["x-onenet-in-doubt"])
    assert doubt.since is not None
    assert doubt.since <= doubt.until <= datetime.now(UTC)
    assert rig.last_headers()["x-onenet-attempt"] == 1


def test_another_copy_of_it_rests_too_and_nothing_is_asked(rig: Rig) -> None:
    """A retry that was known not sent and a copy in doubt may both be on their way: the later one must not send."""
    rig.platform.answers = [InDoubt("read timeout")]
    rig.handle(delivery())
    assert rig.handle(delivery(headers={"x-onenet-attempt": 2})) == SETTLE
    assert rig.history.count("request") == 1
    assert "look up" not in rig.history


def test_what_its_history_has_is_accepted_without_a_request(rig: Rig) -> None:
    rig.platform.entries = [likely("found")]
    assert rig.handle(rested()) == REPLY
    found = rig.last_reply()
    assert (found["status"], found["uuid"], found["recovered"], found["attempts"]) == ("accepted", "found", True, 1)
    assert "request" not in rig.history


def test_what_its_history_does_not_have_is_sent_as_the_next_attempt(rig: Rig) -> None:
    assert rig.handle(rested(2)) == REPLY
    assert rig.history == ["claim", "look up", "request", "complete"]
    assert (rig.last_reply()["attempts"], rig.last_reply()["recovered"]) == (3, False)


def test_only_what_was_not_cached_can_expire(rig: Rig) -> None:
    late = delivery(headers={"x-onenet-in-doubt": RESTED}, expired_time=in_hours(-1))
    rig.platform.entries = [likely("found")]
    assert rig.handle(late) == REPLY
    rig.restart()
    rig.platform.entries = []
    assert rig.handle(late) == FAILURE
    assert rig.last_reply()["error"]["code"] == "expired"
    assert "request" not in rig.history


def test_after_the_last_attempt_the_history_is_still_read(rig: Rig) -> None:
    rig.platform.entries = [likely("found")]
    assert rig.handle(rested(3)) == REPLY
    rig.restart()
    rig.platform.entries = []
    assert rig.handle(rested(3)) == FAILURE
    assert rig.last_reply()["error"]["code"] == "retries_exhausted"


def test_a_history_that_cannot_be_read_uses_up_attempts_and_ends_as_unknown(rig: Rig) -> None:
    rig.platform.entries = None
    assert rig.handle(rested()) == SETTLE
    assert rig.last_headers()["x-onenet-attempt"] == 2
    assert rig.last_headers()["x-onenet-in-doubt"] == RESTED  # no new doubt has come
    rig.restart()
    assert rig.handle(rested(3)) == FAILURE
    assert rig.last_reply()["error"]["code"] == "outcome_unknown"
    assert "request" not in rig.history


def test_several_entries_for_one_command_are_unknown(rig: Rig) -> None:
    rig.platform.entries = [likely("one"), likely("other")]
    assert rig.handle(rested()) == FAILURE
    assert rig.last_reply()["error"]["code"] == "outcome_unknown"


def test_a_uuid_that_was_given_to_a_twin_is_not_given_again(rig: Rig) -> None:
    expired_time = in_hours(24)
    rig.handle(delivery(command_id="twin", expired_time=expired_time))
    rig.platform.entries = [likely("u")]
    rig.platform.answers = [Cached("another")]
    assert rig.handle(delivery(headers={"x-onenet-in-doubt": RESTED}, expired_time=expired_time)) == REPLY
    assert rig.last_reply()["uuid"] == "another"


def test_nothing_is_decided_while_a_twin_is_under_way(rig: Rig) -> None:
    expired_time = in_hours(24)
    rig.platform.entries = [likely("u")]
    found: list[list[str]] = []
    rig.platform.while_asked = lambda: found.append(
        rig.handle(delivery(headers={"x-onenet-in-doubt": RESTED}, expired_time=expired_time))
    )
    rig.handle(delivery(command_id="twin", expired_time=expired_time))
    assert found == [RETRY]


def test_in_mode_dead_letter_a_doubt_is_an_outcome() -> None:
    rig = Rig("dead-letter")
    rig.platform.answers = [InDoubt("read timeout")]
    assert rig.handle(delivery()) == FAILURE
    assert rig.last_reply()["error"]["code"] == "outcome_unknown"
    assert rig.handle(delivery(redelivered=True, command_id="b")) == FAILURE
    assert rig.history.count("request") == 1


def test_in_mode_resend_a_doubt_is_sent_again() -> None:
    rig = Rig("resend")
    rig.platform.answers = [InDoubt("read timeout")]
    assert rig.handle(delivery()) == RETRY
    assert rig.handle(delivery(headers=rig.last_headers())) == REPLY
    assert rig.history.count("request") == 2
    assert "look up" not in rig.history


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


def test_a_redelivery_that_no_record_explains_rests_first(rig: Rig) -> None:
    assert rig.handle(delivery(redelivered=True)) == SETTLE
    assert rig.last_headers()["x-onenet-in-doubt"].startswith("../")
    assert rig.last_headers()["x-onenet-unfinished"] == 0
    assert not {"request", "look up"} & set(rig.history)


def test_and_is_then_not_tried_before_its_message_says_so(rig: Rig) -> None:
    """It may be what ended the worker: should it do so again, the copy that was passed on before counts it."""
    assert rig.handle(rested(unfinished=0)) == []
    assert rig.history == ["claim", "pass on", "look up", "request", "complete"]
    [marked] = rig.passed_on
    headers = dict(marked.properties.headers or {})
    assert (_place(marked), headers["x-onenet-unfinished"], headers["x-onenet-attempt"]) == (RETRY[0], 1, 1)
    assert rig.handle(delivery(headers=headers)) == REPLY  # which it comes back for
    assert rig.last_reply()["uuid"] == "u"
    assert rig.history.count("request") == 1


def test_a_mark_outlasts_the_lease_of_the_try_that_it_counts(rig: Rig) -> None:
    """While somebody may still hold the command its copy is put off, and must not forget how often it was tried."""
    found: list[dict[str, Any]] = []

    def copy_comes() -> None:
        assert rig.handle(delivery(headers=dict(rig.passed_on[0].properties.headers or {}))) == RETRY
        found.append(rig.last_headers())

    rig.platform.while_asked = copy_comes
    rig.handle(rested(unfinished=2))
    assert [headers["x-onenet-unfinished"] for headers in found] == [3]


def test_without_the_mark_it_is_not_tried(rig: Rig) -> None:
    rig.is_confirmed = False
    assert rig.handle(rested(unfinished=0)) == []
    assert not {"request", "look up"} & set(rig.history)


def test_what_never_lives_through_its_try_is_poison_unless_it_was_cached(rig: Rig) -> None:
    """One that was accepted, and told so, looks the same where its record went with the worker."""
    assert rig.handle(rested(unfinished=MAX_UNFINISHED)) == FAILURE
    assert rig.last_reply()["error"]["code"] == "poison_message"
    assert "request" not in rig.history
    rig.restart()
    rig.platform.entries = [likely("u")]
    assert rig.handle(rested(unfinished=MAX_UNFINISHED)) == REPLY
    assert (rig.last_reply()["status"], rig.last_reply()["uuid"]) == ("accepted", "u")


def test_what_may_end_the_worker_even_when_its_history_is_read_is_poison_at_last(rig: Rig) -> None:
    returned = {**rested(unfinished=MAX_UNFINISHED).headers, "x-delivery-count": MAX_UNREAD}
    assert rig.handle(delivery(headers=returned)) == FAILURE
    assert rig.last_reply()["error"]["code"] == "poison_message"
    assert not {"request", "look up"} & set(rig.history)


def test_how_often_a_poison_message_returned_while_its_history_was_read_is_kept_on_a_copy(rig: Rig) -> None:
    """The broker counts anew for each copy, so that it would go round for ever."""
    now = datetime.now(UTC)
    headers = {
        "x-onenet-unfinished": MAX_UNFINISHED,
        "x-delivery-count": 1,
        "x-onenet-in-doubt": str(DoubtWindow(now, now)),
    }
    assert rig.handle(delivery(redelivered=True, headers=headers)) == SETTLE
    assert rig.last_headers()["x-onenet-unfinished"] == MAX_UNFINISHED + 1


def test_what_comes_back_again_and_again_is_put_off_before_the_broker_sets_it_aside(rig: Rig) -> None:
    assert rig.handle(delivery(redelivered=True, headers={"x-delivery-count": 10})) == RETRY
    assert rig.last_headers()["x-onenet-unfinished"] == 1
    assert rig.history == []
    worse = {"x-delivery-count": 10, "x-onenet-unfinished": MAX_UNFINISHED}
    assert rig.handle(delivery(redelivered=True, headers=worse)) == FAILURE
    assert rig.last_reply()["error"]["code"] == "poison_message"


def test_after_a_restart_a_later_attempt_is_looked_up_before_it_is_sent(rig: Rig) -> None:
    rig.handle(delivery(headers={"x-onenet-attempt": 2}))
    assert rig.history == ["claim", "look up", "request", "complete"]


def test_a_doubt_that_cannot_be_read_is_a_new_one(rig: Rig) -> None:
    assert rig.handle(delivery(headers={"x-onenet-in-doubt": "2026"})) == SETTLE


def test_what_was_taken_and_not_started_raises_no_doubt_when_it_comes_back(rig: Rig) -> None:
    rig.handler.mark_not_sent(rig.handler.read(delivery(), 0))
    assert rig.handle(delivery(redelivered=True)) == REPLY
    assert rig.last_reply()["status"] == "accepted"


def test_but_not_if_it_was_doubtful_when_it_was_taken(rig: Rig) -> None:
    rig.handler.mark_not_sent(rig.handler.read(delivery(redelivered=True), 0))
    assert rig.handle(delivery(redelivered=True)) == SETTLE
    assert "request" not in rig.history


def test_a_copy_that_comes_while_the_first_is_under_way_is_put_off(rig: Rig) -> None:
    copies: list[list[str]] = []
    rig.platform.while_asked = lambda: copies.append(rig.handle(delivery(redelivered=True)))
    assert rig.handle(delivery()) == REPLY
    assert copies == [RETRY]
    assert rig.history.count("request") == 1


def test_without_the_store_nothing_is_sent(rig: Rig) -> None:
    rig.store.is_away_for = {"claim"}
    assert rig.handle(delivery()) == RETRY
    assert rig.last_headers() == {"x-onenet-attempt": 1}
    assert rig.handle(delivery(redelivered=True)) == RETRY
    assert rig.last_headers()["x-onenet-in-doubt"].startswith("../")  # a copy does not look redelivered
    assert "request" not in rig.history


def test_what_cannot_be_recorded_is_in_doubt(rig: Rig) -> None:
    rig.store.is_away_for = {"complete"}
    assert rig.handle(delivery()) == RETRY
    assert not rig.last_headers()["x-onenet-in-doubt"].startswith("../")


def test_a_product_that_is_gone_is_unknown_unless_its_command_may_have_been_sent(rig: Rig) -> None:
    assert rig.handle(delivery(product="gone")) == FAILURE
    assert rig.last_reply()["error"]["code"] == "unknown_product"
    rig.platform.entries = None
    assert rig.handle(delivery(headers={"x-onenet-in-doubt": RESTED}, product="gone")) == SETTLE


def test_expired_time_is_looked_at_before_each_request(rig: Rig) -> None:
    assert rig.handle(delivery(expired_time=in_hours(-1))) == FAILURE
    assert rig.last_reply()["error"]["code"] == "expired"
    assert "request" not in rig.history


def test_a_message_that_can_never_succeed_is_not_remembered(rig: Rig) -> None:
    assert rig.handle(delivery(retry=11)) == FAILURE
    assert rig.handle(delivery(redelivered=True, retry=11)) == FAILURE
    assert rig.history == []


def test_a_doubt_that_has_not_rested_rests_again_without_its_history_being_read(rig: Rig) -> None:
    """The platform may still be at it, so that what the history does not show yet is no answer."""
    doubt = str(DoubtWindow(LONG_AGO, datetime.now(UTC)))
    rig.platform.entries = [likely("found")]
    came = delivery(headers={"x-onenet-attempt": 2, "x-onenet-in-doubt": doubt})
    assert rig.handle(came) == SETTLE
    assert rig.last_headers() == {"x-onenet-attempt": 2, "x-onenet-in-doubt": doubt}  # no attempt is used up
    assert rig.history == ["claim"]


def test_a_doubt_that_only_the_record_knows_counts_as_much(rig: Rig) -> None:
    """The retry of an attempt that was not sent says nothing of the copy whose answer was lost meanwhile."""
    rig.platform.answers = [NotSent("refused"), InDoubt("read timeout")]
    rig.handle(delivery())
    retry = rig.last_headers()
    assert rig.handle(delivery(redelivered=True)) == SETTLE
    assert "x-onenet-in-doubt" not in retry
    assert rig.handle(delivery(headers=retry)) == SETTLE
    assert "x-onenet-in-doubt" in rig.last_headers()
    assert rig.history.count("request") == 2


def test_what_is_found_after_the_last_attempt_and_its_expiry_is_accepted_all_the_same(rig: Rig) -> None:
    rig.platform.entries = [likely("found")]
    own = {"x-onenet-attempt": 3, "x-onenet-in-doubt": RESTED}
    assert rig.handle(delivery(headers=own, expired_time=in_hours(-1))) == REPLY
    assert (rig.last_reply()["uuid"], rig.last_reply()["attempts"]) == ("found", 3)
    assert rig.history == ["claim", "look up", "complete"]


def test_a_recovered_reply_is_recorded_and_repeated_as_it_was(rig: Rig) -> None:
    rig.platform.entries = [Candidate("found", is_within_clock_skew=True, valid_time_omitted=True)]
    rig.handle(rested())
    first = rig.last_reply()
    assert (first["recovered"], first["valid_time_omitted"]) == (True, True)
    assert rig.handle(rested()) == REPLY
    assert rig.last_reply() == first
    assert rig.history.count("look up") == 1


def test_what_fits_but_for_its_time_is_neither_taken_nor_sent_again(rig: Rig) -> None:
    """Either would be a guess about two clocks."""
    rig.platform.entries = [Candidate("u", is_within_clock_skew=False, valid_time_omitted=False)]
    assert rig.handle(rested()) == FAILURE
    assert rig.last_reply()["error"]["code"] == "outcome_unknown"
    assert "request" not in rig.history


def an_unclear(uuid: str, *fields: str) -> Candidate:
    return Candidate(uuid, is_within_clock_skew=False, valid_time_omitted=False, unclear=fields)


def test_what_may_be_the_command_and_nobody_can_tell_is_unknown_and_never_sent(rig: Rig) -> None:
    """The platform cached something that merely looks different; the message says where to look."""
    rig.platform.entries = [an_unclear("odd", "obj_id", "args"), an_unclear("", "cmd_uuid")]
    assert rig.handle(rested()) == FAILURE
    error = rig.last_reply()["error"]
    assert error["code"] == "outcome_unknown"
    assert "odd (obj_id, args)" in error["message"]
    assert "without a cmd_uuid" in error["message"]
    assert "request" not in rig.history


def test_an_equal_entry_is_taken_whatever_else_is_unclear(rig: Rig) -> None:
    """A platform writes one value in one way, so that the one written in another way is another's."""
    rig.platform.entries = [an_unclear("odd", "args"), likely("found")]
    assert rig.handle(rested()) == REPLY
    assert (rig.last_reply()["uuid"], rig.last_reply()["recovered"]) == ("found", True)


def test_an_unclear_entry_of_another_command_on_record_holds_nothing_up(rig: Rig) -> None:
    rig.platform.answers = [Cached("odd"), Cached("own")]
    rig.handle(delivery(command_id="other", args="ON"))
    rig.platform.entries = [an_unclear("odd", "args")]
    assert rig.handle(rested()) == REPLY
    assert rig.last_reply()["uuid"] == "own"


def test_an_equal_entry_of_a_twin_does_not_hide_that_another_is_unclear(rig: Rig) -> None:
    rig.platform.answers = [Cached("twins")]
    rig.handle(delivery(command_id="twin"))
    rig.platform.entries = [likely("twins"), an_unclear("odd", "args")]
    assert rig.handle(rested()) == FAILURE
    assert rig.last_reply()["error"]["code"] == "outcome_unknown"


def test_a_command_that_waits_for_its_twin_keeps_its_doubt_and_its_attempt(rig: Rig) -> None:
    expired_time = in_hours(24)
    own = {"x-onenet-attempt": 2, "x-onenet-in-doubt": RESTED}
    rig.platform.entries = [likely("u")]
    found: list[dict[str, Any]] = []

    def twin_comes() -> None:
        rig.handle(delivery(headers=own, expired_time=expired_time))
        found.append(rig.last_headers())

    rig.platform.while_asked = twin_comes
    rig.handle(delivery(command_id="twin", expired_time=expired_time))
    assert found == [own]
    rig.platform.while_asked = lambda: None
    rig.platform.answers = [Cached("its own")]
    assert rig.handle(delivery(headers=own, expired_time=expired_time)) == REPLY
    assert rig.last_reply()["uuid"] == "its own"  # the other one has turned out to be the twin's


def test_another_command_of_the_same_id_is_a_conflict_and_leaves_the_first_alone(rig: Rig) -> None:
    """Its reply must not be taken for the first one's, and its own is not recorded over it."""
    rig.handle(delivery())
    first = rig.last_reply()
    assert rig.handle(delivery(res_id=1)) == FAILURE
    assert rig.last_reply()["error"]["code"] == "command_id_conflict"
    assert rig.history.count("request") == 1
    assert rig.handle(delivery()) == REPLY
    assert rig.last_reply() == first


def test_what_is_found_for_a_suspect_is_what_its_marked_copy_repeats(rig: Rig) -> None:
    rig.platform.entries = [likely("found")]
    assert rig.handle(rested(2, unfinished=0)) == []
    assert rig.history == ["claim", "pass on", "look up", "complete"]
    headers = rig.marked_headers()
    assert (headers["x-onenet-unfinished"], headers["x-onenet-attempt"]) == (1, 2)
    assert rig.handle(delivery(headers=headers)) == REPLY
    found = rig.last_reply()
    assert (found["uuid"], found["recovered"], found["attempts"]) == ("found", True, 2)


def test_a_suspects_failure_comes_with_its_dead_letter_when_its_marked_copy_returns(rig: Rig) -> None:
    """The delivery that failed was acknowledged with the mark, so that nothing else would set it aside."""
    rig.platform.entries = [likely("one"), likely("other")]
    assert rig.handle(rested(unfinished=0)) == []
    assert rig.handle(delivery(headers=rig.marked_headers())) == FAILURE
    assert rig.last_reply()["error"]["code"] == "outcome_unknown"


def test_a_suspect_that_lived_through_its_try_is_none_any_more(rig: Rig) -> None:
    rig.platform.answers = [InDoubt("read timeout")]
    assert rig.handle(rested(unfinished=2)) == []
    marked = rig.marked_headers()
    assert marked["x-onenet-unfinished"] == 3
    assert rig.handle(delivery(headers=marked)) == SETTLE  # its request has just been made
    assert "x-onenet-unfinished" not in rig.last_headers()
    assert rig.history.count("request") == 1


def test_the_mark_of_a_suspect_covers_the_try_that_follows_it(rig: Rig) -> None:
    """Should that try end the worker, its request is in doubt, and this copy is all that tells."""
    before = datetime.now(UTC)
    rig.handle(rested(unfinished=0))
    doubt = DoubtWindow.parse(rig.marked_headers()["x-onenet-in-doubt"])
    old = DoubtWindow.parse(RESTED)
    assert doubt.since == old.since
    assert doubt.until >= before - timedelta(milliseconds=1)


def test_a_marked_copy_without_a_record_rests_before_it_is_tried_again(rig: Rig) -> None:
    """The try ended with its worker: what it sent may still be on its way."""
    rig.handle(rested(unfinished=0))
    marked = rig.marked_headers()
    rig.restart()
    rig.history.clear()
    assert rig.handle(delivery(headers=marked)) == SETTLE
    assert rig.last_headers()["x-onenet-unfinished"] == 1
    assert rig.history == ["claim"]


def test_without_its_mark_a_suspect_stays_one_and_loses_no_try(rig: Rig) -> None:
    """The mark may still be confirmed too late, or never: nothing else may take its place here."""
    rig.is_confirmed = False
    assert rig.handle(rested(unfinished=3)) == []
    assert rig.history == ["claim", "pass on"]
    rig.is_confirmed = True
    rig.passed_on.clear()
    assert rig.handle(rested(unfinished=3)) == []
    assert rig.marked_headers()["x-onenet-unfinished"] == 4
    assert rig.history == ["claim", "pass on", "claim", "pass on", "look up", "request", "complete"]


def test_a_suspect_whose_outcome_cannot_be_recorded_leaves_everything_to_its_marked_copy(rig: Rig) -> None:
    """Its delivery is acknowledged, so that one more publication would be a second copy."""
    rig.store.is_away_for = {"complete"}
    assert rig.handle(rested(unfinished=0)) == []
    assert rig.handle(delivery(headers=rig.marked_headers())) == RETRY  # the lease has not ended
    assert rig.history.count("request") == 1


def test_poison_is_told_with_a_reply_and_a_dead_letter_and_recorded(rig: Rig) -> None:
    assert rig.handle(rested(2, unfinished=MAX_UNFINISHED)) == FAILURE
    first = rig.last_reply()
    assert (first["error"]["code"], first["command_id"], first["attempts"]) == ("poison_message", "a", 2)
    letter = dict(rig.last[1].properties.headers or {})
    assert (letter["x-onenet-reason"], letter["x-onenet-attempt"]) == ("poison_message", 2)
    assert rig.history == ["claim", "look up", "complete"]
    assert rig.handle(delivery()) == REPLY
    assert rig.last_reply() == first


def test_what_ended_well_is_never_poison_however_often_it_was_tried(rig: Rig) -> None:
    """The count on a message has the tries that ended well in it: the record comes first."""
    rig.handle(delivery())
    first = rig.last_reply()
    assert rig.handle(rested(unfinished=MAX_UNFINISHED)) == REPLY
    assert rig.last_reply() == first


def test_what_comes_back_again_and_again_is_not_even_read(rig: Rig) -> None:
    """Reading it may be what ends the worker; and what is said of it must not depend on what it holds."""
    back = BasicProperties(headers={"x-delivery-count": 10, "tenant": "t"}, message_id="a")
    came = Delivery(1, 1, "", True, back, b"\xff no JSON", False)
    assert rig.handle(came) == RETRY
    assert rig.last[0].body == came.body
    headers = rig.last_headers()
    assert (headers["x-onenet-attempt"], headers["x-onenet-unfinished"], headers["tenant"]) == (1, 1, "t")
    assert headers["x-onenet-in-doubt"].startswith("../")
    worse = headers | {"x-delivery-count": 10, "x-onenet-unfinished": MAX_UNFINISHED}
    properties = BasicProperties(headers=worse, message_id="a")
    assert rig.handle(Delivery(1, 1, "", True, properties, came.body, True)) == FAILURE
    assert rig.last_reply()["error"]["code"] == "poison_message"
    assert rig.last_reply()["command_id"] == "a"  # as far as it can be told without reading
    assert rig.history == []


def test_an_unread_message_whose_id_cannot_be_one_has_none(rig: Rig) -> None:
    """A reply with it would break the reply's own rule, and the error end the worker: poison again."""
    headers = {"x-delivery-count": 10, "x-onenet-unfinished": MAX_UNFINISHED}
    properties = BasicProperties(headers=headers, message_id="no id: it has blanks")
    assert rig.handle(Delivery(1, 1, "", True, properties, b"", True)) == FAILURE
    assert rig.last_reply()["command_id"] is None


@pytest.mark.parametrize(("redelivered", "count"), [(True, 9), (False, 10)])
def test_what_came_back_less_often_or_is_a_new_copy_is_read(rig: Rig, redelivered: bool, count: int) -> None:
    rig.handle(delivery(redelivered=redelivered, headers={"x-delivery-count": count}))
    assert rig.history[0] == "claim"


def test_a_command_that_is_set_back_keeps_the_doubt_that_it_had(rig: Rig) -> None:
    before = datetime.now(UTC)
    own = {"x-delivery-count": 10, "x-onenet-in-doubt": RESTED}
    rig.handle(delivery(redelivered=True, headers=own))
    doubt = DoubtWindow.parse(rig.last_headers()["x-onenet-in-doubt"])
    assert doubt.since == DoubtWindow.parse(RESTED).since
    assert doubt.until >= before - timedelta(milliseconds=1)


def test_what_was_not_sent_and_cannot_be_recorded_is_not_in_doubt(rig: Rig) -> None:
    """A doubt where there is none would have each command rest whenever the store is away."""
    rig.store.is_away_for = {"complete", "release"}
    assert rig.handle(delivery(expired_time=in_hours(-1))) == RETRY
    assert rig.last_headers() == {"x-onenet-attempt": 1}
    rig.platform.answers = [NotSent("refused")]
    assert rig.handle(delivery(command_id="b")) == RETRY
    assert rig.last_headers() == {"x-onenet-attempt": 1}


def test_what_was_accepted_and_not_recorded_is_found_again_and_not_sent(rig: Rig) -> None:
    rig.store.is_away_for = {"complete"}
    rig.handle(delivery())
    noted = DoubtWindow.parse(rig.last_headers()["x-onenet-in-doubt"])
    assert noted.since is not None
    rig.restart()  # which ends the lease, as far as this process knows
    rig.platform.entries = [likely("u")]
    long_since = str(DoubtWindow(noted.since - timedelta(hours=1), noted.until - timedelta(hours=1)))
    assert rig.handle(delivery(headers={"x-onenet-attempt": 1, "x-onenet-in-doubt": long_since})) == REPLY
    assert (rig.last_reply()["uuid"], rig.last_reply()["recovered"]) == ("u", True)
    assert rig.history.count("request") == 1


def test_without_the_store_the_doubt_and_the_count_on_a_message_stay_there(rig: Rig) -> None:
    rig.store.is_away_for = {"claim"}
    came = rested(2, unfinished=3)
    assert rig.handle(came) == RETRY
    assert rig.last_headers() == came.headers
    assert rig.history == []


def test_a_command_whose_product_is_gone_ends_as_unknown_when_its_history_stays_unreadable(rig: Rig) -> None:
    """That its product is unknown would say that it was not sent."""
    rig.platform.entries = None
    own = {"x-onenet-attempt": 3, "x-onenet-in-doubt": RESTED}
    assert rig.handle(delivery(headers=own, product="gone")) == FAILURE
    assert rig.last_reply()["error"]["code"] == "outcome_unknown"
    assert rig.history == ["claim", "look up", "complete"]


def test_in_mode_dead_letter_a_redelivery_without_a_record_is_an_outcome_too() -> None:
    rig = Rig("dead-letter")
    assert rig.handle(delivery(redelivered=True)) == FAILURE
    assert rig.last_reply()["error"]["code"] == "outcome_unknown"
    assert rig.history == ["claim", "complete"]
    assert rig.handle(delivery(redelivered=True)) == FAILURE  # again, for its dead letter's sake
    assert rig.history == ["claim", "complete", "claim"]


def test_in_mode_resend_a_redelivery_without_a_record_is_tried_with_care_but_at_once() -> None:
    """What may have ended the worker is marked in every mode."""
    rig = Rig("resend")
    assert rig.handle(delivery(redelivered=True)) == []
    assert rig.history == ["claim", "pass on", "request", "complete"]
    assert rig.marked_headers()["x-onenet-unfinished"] == 1
    assert rig.handle(delivery(headers=rig.marked_headers())) == REPLY


def test_in_mode_resend_what_was_in_doubt_once_is_never_said_not_to_have_been_cached() -> None:
    rig = Rig("resend")
    late = delivery(headers={"x-onenet-attempt": 2, "x-onenet-in-doubt": RESTED}, expired_time=in_hours(-1))
    assert rig.handle(late) == FAILURE
    assert rig.last_reply()["error"]["code"] == "outcome_unknown"
    assert "request" not in rig.history


def test_a_doubt_that_was_settled_is_not_carried_on(rig: Rig) -> None:
    """The history has said that it was not cached, so what is not sent now is only that."""
    rig.platform.answers = [NotSent("refused")]
    assert rig.handle(rested()) == ["onenet.execute.retry.30s"]
    assert rig.last_headers() == {"x-onenet-attempt": 3}


def test_a_suspect_that_was_not_cached_uses_up_no_attempt(rig: Rig) -> None:
    """Nobody knows whether that attempt was begun; what ends workers is bounded by the count of unfinished tries."""
    assert rig.handle(rested(3, unfinished=0)) == []  # the last attempt
    assert rig.handle(delivery(headers=rig.marked_headers())) == REPLY
    assert (rig.last_reply()["status"], rig.last_reply()["attempts"]) == ("accepted", 3)
    assert rig.history.count("request") == 1


def test_the_last_of_its_tries_is_granted_to_what_comes_back_unread(rig: Rig) -> None:
    before = {"x-delivery-count": 10, "x-onenet-unfinished": MAX_UNFINISHED - 1}
    assert rig.handle(delivery(redelivered=True, headers=before)) == RETRY
    assert rig.last_headers()["x-onenet-unfinished"] == MAX_UNFINISHED


def test_while_the_platform_is_down_a_command_is_put_off_without_being_claimed(rig: Rig) -> None:
    rig.pause()
    assert rig.handle(delivery(headers={"x-onenet-attempt": 2})) == RETRY
    assert rig.last_headers() == {"x-onenet-attempt": 2}
    assert rig.history == []


def test_what_was_in_doubt_stays_so_while_the_platform_is_down(rig: Rig) -> None:
    """The copy does not look redelivered: it has to say what the message itself would say."""
    rig.pause()
    before = datetime.now(UTC)
    came = delivery(redelivered=True, headers={"x-onenet-in-doubt": RESTED, "x-onenet-unfinished": 1})
    assert rig.handle(came) == SETTLE
    doubt = DoubtWindow.parse(rig.last_headers()["x-onenet-in-doubt"])
    assert (doubt.since, rig.last_headers()["x-onenet-unfinished"]) == (DoubtWindow.parse(RESTED).since, 1)
    assert doubt.until >= before - timedelta(milliseconds=1)
    assert "request" not in rig.history


def test_what_can_never_be_sent_is_told_even_then(rig: Rig) -> None:
    rig.pause()
    assert rig.handle(delivery(retry=11)) == FAILURE


def test_the_longer_an_outage_lasts_the_longer_a_command_rests(rig: Rig) -> None:
    rig.pause()
    assert rig.probe(delivery(command_id="the probe", expired_time=in_hours(-1))) == FAILURE
    rig.seconds += 30
    rig.platform.answers = [NotSent("refused")]
    rig.handle(delivery())
    assert rig.handle(delivery(command_id="b")) == ["onenet.execute.retry.30s"]


@pytest.mark.parametrize(
    "answer",
    [NotSent("refused"), Refused("onenet_rejected", "auth failed", 1, may_concern_all_devices=True)],
    ids=["not there", "lets nobody in"],
)
def test_a_probe_that_was_not_taken_uses_up_no_attempt(rig: Rig, answer: Answer) -> None:
    headers = rig.come_to_its_last_attempt()
    rig.pause()
    rig.platform.answers = [answer] * 9
    for _ in range(9):
        assert rig.probe(delivery(headers=headers)) == RETRY
        headers = rig.last_headers()
        assert headers == {"x-onenet-attempt": 3}
    assert rig.probe(delivery(headers=headers)) == REPLY
    assert (rig.last_reply()["status"], rig.last_reply()["attempts"]) == ("accepted", 3)


def test_a_probe_whose_answer_was_lost_settles_and_uses_up_no_attempt(rig: Rig) -> None:
    """Neither its request nor the history that could not be read, however often, nor the request after that."""
    headers = rig.come_to_its_last_attempt()
    rig.pause()
    rig.platform.answers = [InDoubt("HTTP 503")]
    assert rig.probe(delivery(headers=headers)) == SETTLE
    headers = rig.last_headers()
    assert (headers["x-onenet-attempt"], headers["x-onenet-uncounted"]) == (3, True)
    rig.restart()  # so that its record, by which it has not rested yet, is gone
    rig.pause()
    rig.pause_histories()
    rig.platform.entries = None
    for _ in range(5):
        assert rig.probe_histories(rested(3, uncounted=True)) == SETTLE
        assert (rig.last_headers()["x-onenet-attempt"], rig.last_headers()["x-onenet-uncounted"]) == (3, True)
    rig.platform.entries = []
    assert rig.probe_histories(rested(3, uncounted=True)) == REPLY
    assert (rig.last_reply()["status"], rig.last_reply()["attempts"]) == ("accepted", 3)


def test_a_doubt_from_before_the_outage_has_used_up_its_attempt(rig: Rig) -> None:
    rig.pause_histories()
    rig.platform.entries = None
    assert rig.probe_histories(rested(2)) == SETTLE
    headers = rig.last_headers()
    assert headers["x-onenet-attempt"] == 2
    assert "x-onenet-uncounted" not in headers
    rig.platform.entries = []
    rig.probe_histories(rested(2))
    assert rig.last_reply()["attempts"] == 3


def test_after_the_outage_an_unreadable_history_uses_up_the_attempt_that_was_spared(rig: Rig) -> None:
    rig.platform.entries = None
    assert rig.handle(rested(2, uncounted=True)) == SETTLE
    assert rig.last_headers()["x-onenet-attempt"] == 2
    assert "x-onenet-uncounted" not in rig.last_headers()


def test_the_mark_of_a_spared_attempt_stays_on_a_message_that_only_waits(rig: Rig) -> None:
    resting = rested(2, uncounted=True)
    rig.pause_histories()
    assert rig.handle(resting) == SETTLE
    assert rig.last_headers() == resting.headers
    forged = Delivery(1, 1, "", False, BasicProperties(headers={"x-onenet-uncounted": True}), b"", False)
    assert forged.consumes_attempt  # whoever else says so is not believed


def test_what_is_rejected_before_a_wrong_key_is_known_for_one_and_what_is_not(rig: Rig) -> None:
    """One device's key may not match its product; a row of such answers is everybody's key."""
    no = Refused("onenet_rejected", "auth failed", 1, may_concern_all_devices=True)
    rig.platform.answers = [no] * PAUSE_AFTER
    found = [
        rig.handle(delivery(command_id=f"command-{number}", imei=device)) for number, device in enumerate(DEVICES[:3])
    ]
    assert found == [REPLY, REPLY, RETRY]


@pytest.mark.parametrize(
    "no",
    [
        Refused("onenet_rejected", "auth failed", 1, may_concern_all_devices=True),
        Refused("http_rejected", "HTTP 404", may_concern_all_devices=True),
    ],
    ids=lambda no: no.code,
)
def test_the_refusals_of_one_device_pause_nothing_and_are_rejections(rig: Rig, no: Refused) -> None:
    """Its key does not match, or its gateway is wrong: one sender must not stop the others."""
    rig.platform.answers = [no] * 50
    assert [rig.handle(delivery(command_id=f"command-{number}")) for number in range(50)] == [REPLY] * 50
    assert rig.last_reply()["status"] == "rejected"
    assert rig.gates.allows(None)
    assert rig.handle(delivery(command_id="another", imei=DEVICES[1])) == REPLY
    assert rig.last_reply()["status"] == "accepted"


def test_a_throttled_command_is_tried_again_as_the_same_attempt_and_slows_down_the_product(rig: Rig) -> None:
    """However often; and the waits grow while it goes on."""
    rig.platform.answers = [NotSent("errno 15: api freq out of limit", is_throttled=True)] * 9
    headers: dict[str, Any] = {"x-onenet-attempt": 3}
    waits_s: list[float] = []
    for _ in range(9):
        came = delivery() if not waits_s else delivery(headers=headers)
        assert rig.handle(came) == RETRY
        waits_s.append(rig.gates.retry_in_s())
        assert rig.history_gates.allows(None)  # nothing would end its waits but a history that is read
        rig.seconds += waits_s[-1]
        headers = rig.last_headers()
        assert headers == {"x-onenet-attempt": 1}
    assert waits_s == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert rig.handle(delivery(headers=headers)) == REPLY
    assert (rig.last_reply()["status"], rig.last_reply()["attempts"]) == ("accepted", 1)


@pytest.mark.parametrize("asked_s", [0, 7])
def test_a_throttled_history_uses_up_no_attempt_and_slows_down_histories(rig: Rig, asked_s: float) -> None:
    rig.platform.history_error = HistoryUnreadable("errno 15", is_throttled=True, retry_after_s=asked_s)
    for _ in range(9):
        assert rig.handle(rested(3)) == SETTLE
        assert rig.last_headers()["x-onenet-attempt"] == 3
        assert rig.gates.allows(None) == (asked_s == 0)  # a wait that is asked for holds for all requests
        assert rig.gates.retry_in_s() == asked_s
        assert rig.history_gates.retry_in_s() >= max(1, asked_s)
        rig.seconds += rig.history_gates.retry_in_s()
    rig.platform.history_error = None
    rig.platform.entries = [likely("found")]
    assert rig.handle(rested(3)) == REPLY


def test_histories_that_fail_pause_no_executions(rig: Rig) -> None:
    rig.platform.entries = None
    for number in range(3 * PAUSE_AFTER):
        assert rig.handle(delivery(headers=rested().headers, command_id=f"command-{number}")) == SETTLE
    assert not rig.history_gates.allows(None)
    assert rig.history.count("look up") == PAUSE_AFTER  # from there on only probes
    assert rig.gates.allows(None)
    assert rig.handle(delivery(command_id="new")) == REPLY


@pytest.mark.parametrize(
    "error",
    [HistoryUnreadable("errno 3: auth failed", is_refused=True), HistoryUnreadable("HTTP 404", is_refused=True)],
    ids=str,
)
def test_histories_that_are_refused_are_paused_where_it_is_more_than_one_device(
    rig: Rig, error: HistoryUnreadable
) -> None:
    rig.platform.history_error = error
    for number in range(3 * PAUSE_AFTER):
        rig.handle(delivery(headers=rested().headers, command_id=f"command-{number}"))
    assert rig.history_gates.allows(None)
    rig.handle(delivery(headers=rested().headers, command_id="another", imei=DEVICES[1]))
    assert not rig.history_gates.allows(None)


def test_a_history_that_is_read_again_ends_the_pause_of_histories(rig: Rig) -> None:
    rig.pause_histories()
    assert rig.handle(rested()) == SETTLE
    assert "look up" not in rig.history
    assert rig.probe_histories(rested()) == REPLY
    assert rig.history_gates.allows(None)


def test_while_histories_are_paused_a_doubt_rests_on_and_uses_up_no_attempt(rig: Rig) -> None:
    rig.pause_histories()
    for _ in range(9):
        assert rig.handle(rested(2)) == SETTLE
        assert rig.last_headers() == {"x-onenet-attempt": 2, "x-onenet-in-doubt": RESTED}
    assert not {"request", "look up"} & set(rig.history)


def test_while_executions_are_paused_what_was_cached_is_found(rig: Rig) -> None:
    rig.pause()
    rig.platform.entries = [likely("found")]
    assert rig.handle(rested()) == REPLY
    assert (rig.last_reply()["uuid"], rig.last_reply()["recovered"]) == ("found", True)
    assert not rig.gates.allows(None)  # a history says nothing of executions


def test_while_executions_are_paused_what_was_not_cached_waits_without_a_doubt_or_a_lost_attempt(rig: Rig) -> None:
    rig.pause()
    assert rig.handle(rested()) == RETRY
    assert rig.last_headers() == {"x-onenet-attempt": 2}
    headers = rig.last_headers()
    for _ in range(5):
        assert rig.handle(delivery(headers=headers)) == RETRY
        assert rig.last_headers() == headers
    assert "request" not in rig.history
    assert rig.probe(delivery(headers=headers)) == REPLY
    assert (rig.last_reply()["status"], rig.last_reply()["attempts"]) == ("accepted", 2)


@pytest.mark.parametrize("came", ["noted", "redelivered", "recorded"])
def test_a_command_in_doubt_takes_no_probe_of_executions(rig: Rig, came: str) -> None:
    """The next new command is the probe, although a history is being read, or cannot be."""
    rig.handle(delivery(command_id="before"))
    if came == "recorded":
        rig.platform.answers = [InDoubt("read timeout")]
        rig.handle(delivery())
        rig.now_s = SETTLE_S + 1
    rig.pause()
    rig.seconds += rig.gates.retry_in_s()
    rig.platform.answers = []
    found: list[list[str]] = []
    told: list[Delivery] = []
    rig.handler.on_history_first = told.append
    rig.platform.while_looked_up = lambda: found.append(rig.handle(delivery(command_id="new")))
    rig.platform.entries = None
    doubtful = rested() if came == "noted" else delivery(redelivered=came == "redelivered")
    assert rig.handle(doubtful) == SETTLE
    if came == "redelivered":  # no record explains it: it rests before its history is read
        found.append(rig.handle(delivery(command_id="new")))
    assert found == [REPLY]
    assert rig.gates.allows(None)
    assert told == ([doubtful] if came == "recorded" else [])


@pytest.mark.parametrize(
    ("answer", "is_failure"),
    [
        (NotSent("refused"), True),
        (InDoubt("HTTP 503"), True),
        (Refused("http_rejected", "HTTP 401", may_concern_all_devices=True), True),
        (InDoubt("errno 5108: rpc response error", is_outage=False), False),
        (Refused("onenet_rejected", "device not online", 2001), False),
        (Cached("u"), False),
    ],
    ids=lambda each: each.reason if isinstance(each, InDoubt | NotSent) else None,
)
def test_what_counts_as_a_failure_of_the_platform(rig: Rig, answer: Answer, is_failure: bool) -> None:
    """A clear answer shows that it is there, be it a no, or trouble with one device."""
    for number in range(PAUSE_AFTER - 1):
        rig.platform.answers = [NotSent("refused")]
        rig.handle(delivery(command_id=f"before-{number}"))
    rig.platform.answers = [answer]
    rig.handle(delivery(command_id="it"))
    assert rig.gates.allows(None) is not is_failure


def test_a_probe_that_asked_nothing_is_followed_by_another_at_once(rig: Rig) -> None:
    """An hour's expired commands must not keep the first good one waiting."""
    rig.pause()
    rig.probe(delivery(expired_time=in_hours(-1)))
    assert rig.gates.retry_in_s() == 0


def test_a_wait_that_the_platform_asked_for_holds_up_all_but_uses_up_one_attempt(rig: Rig) -> None:
    rig.platform.answers = [NotSent("HTTP 429", 20)]
    assert rig.handle(delivery()) == ["onenet.execute.retry.30s"]
    assert rig.last_headers() == {"x-onenet-attempt": 2}
    assert rig.handle(delivery(command_id="b")) == RETRY
    assert rig.last_headers() == {"x-onenet-attempt": 1}
    rig.seconds += 20
    assert rig.handle(delivery(command_id="b")) == REPLY


def test_a_doubled_message_that_is_handed_back_is_in_doubt_once_its_twin_was_claimed(rig: Rig) -> None:
    """Found by a storm: the twin was accepted, the worker killed, and the copy that had only waited was sent too."""
    doubled = rig.handler.read(delivery(), 0)
    assert "x-onenet-in-doubt" not in (rig.handler.hand_back(doubled).properties.headers or {})
    rig.handler.mark_not_sent(doubled)
    assert "x-onenet-in-doubt" not in (rig.handler.hand_back(doubled).properties.headers or {})
    rig.handle(delivery())
    for copy in (rig.handler.hand_back(doubled), rig.handler.rest(doubled)):
        rig.restart()
        assert rig.handle(delivery(headers=copy.properties.headers)) == SETTLE
    assert rig.history.count("request") == 1


def test_what_is_known_not_to_have_been_sent_rests_without_a_doubt(rig: Rig) -> None:
    """Its own record is not its twin's: a doubt would use up an attempt that the outage has to spare."""
    rig.platform.answers = [NotSent("refused")]
    rig.handle(delivery())
    retry = rig.last_headers()
    rig.pause()
    assert rig.handle(delivery(headers=retry)) == RETRY
    assert rig.last_headers() == retry


FAILED_AT = LONG_AGO + timedelta(minutes=1)


def replayed(failed_at: datetime, doubt: DoubtWindow | None = None) -> Delivery:
    """Return a command that a person has replayed."""
    marks = {} if doubt is None else {"x-onenet-in-doubt": str(doubt)}
    text = failed_at.isoformat(timespec="milliseconds")
    return delivery(headers={"x-onenet-replay": text, "x-onenet-uncounted": True, **marks})


def fail(rig: Rig) -> datetime:
    """Let a command fail for good; returns what its dead letter says of when."""
    headers = rig.come_to_its_last_attempt()
    rig.handle(delivery(command_id="another"))  # so that it is no outage
    rig.platform.answers = [NotSent("refused")]
    assert rig.handle(delivery(headers=headers)) == FAILURE
    letter = dict(rig.last[1].properties.headers or {})
    rig.history.clear()
    return datetime.fromisoformat(str(letter["x-onenet-failed-at"]))


def test_a_replay_sends_what_failed_and_no_other_message_does(rig: Rig) -> None:
    failed_at = fail(rig)
    assert rig.handle(delivery()) == REPLY
    assert rig.last_reply()["status"] == "failed"
    assert rig.handle(replayed(failed_at)) == REPLY
    assert (rig.last_reply()["status"], rig.last_reply()["attempts"]) == ("accepted", 1)
    assert rig.history.count("request") == 1
    assert rig.handle(replayed(failed_at)) == REPLY  # the order may come twice
    assert rig.history.count("request") == 1


def test_an_order_that_did_not_come_in_by_the_workers_own_way_is_not_believed(rig: Rig) -> None:
    failed_at = fail(rig)
    assert rig.handle(replace(replayed(failed_at), is_returned=False)) == REPLY
    assert rig.last_reply()["status"] == "failed"
    assert "request" not in rig.history


def test_a_replay_whose_failure_is_not_on_record_is_looked_up_first(rig: Rig) -> None:
    """It may be the second of two, and the record of the first have gone."""
    assert rig.handle(replayed(FAILED_AT)) == SETTLE
    doubt = DoubtWindow.parse(rig.last_headers()["x-onenet-in-doubt"])
    assert doubt.since == datetime.fromisoformat(FAILED_AT.isoformat(timespec="milliseconds"))
    assert "request" not in rig.history


@pytest.mark.parametrize("in_doubt", ["reconcile", "dead-letter", "resend"])
def test_in_every_mode_a_replay_in_doubt_has_its_history_read(in_doubt: InDoubtMode) -> None:
    rig = Rig(in_doubt)
    failed_at = fail(rig)
    rested = DoubtWindow(None, LONG_AGO)
    assert rig.handle(replayed(failed_at, rested)) == REPLY
    assert rig.history == ["claim", "look up", "request", "complete"]
    assert (rig.last_reply()["status"], rig.last_reply()["attempts"]) == ("accepted", 1)


def test_a_replay_that_waits_is_still_one_when_it_comes_again(rig: Rig) -> None:
    failed_at = fail(rig)
    rig.pause()
    rig.handle(replayed(failed_at))
    assert rig.last_headers()["x-onenet-replay"] == failed_at.isoformat(timespec="milliseconds")


@pytest.mark.parametrize("text", ["yesterday", "2026-08-05T12:00:00", 7])
def test_an_order_that_cannot_be_read_is_none(rig: Rig, text: object) -> None:
    fail(rig)
    assert rig.handle(delivery(headers={"x-onenet-replay": text})) == REPLY
    assert rig.last_reply()["status"] == "failed"
