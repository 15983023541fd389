"""From headers to envelopes and back: what is believed of a message, and that a copy says what its resolution said."""

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pika import BasicProperties

from schemas.reply import Reply
from tests.support.builders import a_command
from tests.support.engine import LONG_AGO, PAST_DOUBT, RECONCILE_DELAY_S, TOMORROW, Engine
from worker.amqp.messages import Delivery, MessageBuilder, Publication
from worker.amqp.topology import Topology
from worker.core.answer import NotSent
from worker.core.doubt_window import DoubtWindow
from worker.core.envelope import Replay
from worker.core.outcome import Failed, reply_to
from worker.core.poison import MAX_CRASHES, MAX_RETURNS
from worker.core.resolution import AwaitReconciliation, Conclude, Postpone, Retry

MESSAGES = MessageBuilder(Topology("onenet", (5, 30, RECONCILE_DELAY_S)), "host:1")
BODY = json.dumps(a_command(command_id="a", expired_time=TOMORROW)).encode()
NOTES: dict[str, Any] = {
    "x-onenet-attempt": 3,
    "x-onenet-in-doubt": str(PAST_DOUBT),
    "x-onenet-crash-count": 2,
    "x-onenet-free-attempt": True,
    "x-onenet-first-arrived": int(LONG_AGO.timestamp() * 1000),
    "x-onenet-replay": LONG_AGO.isoformat(timespec="milliseconds"),
}


def a_delivery(
    headers: dict[str, Any] | None = None,
    *,
    is_returned: bool = True,
    is_redelivered: bool = False,
    body: bytes = BODY,
    **properties: Any,
) -> Delivery:
    return Delivery(1, 1, is_redelivered, BasicProperties(headers=headers, **properties), body, is_returned)


def returned(publication: Publication) -> Delivery:
    """Return a copy as the broker delivers it, after its delay."""
    copy = Delivery(1, 1, False, publication.properties, publication.body, is_returned=True)
    delay = copy.envelope.delay
    return copy if delay is None else replace(copy, arrived_at=delay[1])


def test_every_note_on_a_copy_is_read() -> None:
    envelope = a_delivery(NOTES).envelope
    assert (envelope.is_copy, envelope.attempt, envelope.crash_count, envelope.is_free_attempt) == (True, 3, 2, True)
    assert envelope.doubt == PAST_DOUBT
    assert envelope.replay == Replay(LONG_AGO, PAST_DOUBT)
    assert envelope.first_arrived_at == LONG_AGO.timestamp()


def test_no_note_on_a_message_from_upstream_is_believed() -> None:
    """Publishers of commands must not be able to request replays, or to remove a doubt."""
    delivery = a_delivery(NOTES, is_returned=False)
    envelope = delivery.envelope
    assert (envelope.is_copy, envelope.attempt, envelope.crash_count) == (False, 1, None)
    assert (envelope.is_free_attempt, envelope.doubt, envelope.replay) == (False, None, None)
    assert envelope.first_arrived_at == envelope.published_at == delivery.arrived_at
    assert not envelope.may_have_been_sent


def test_only_the_value_true_makes_an_attempt_free() -> None:
    assert a_delivery({"x-onenet-attempt": 2, "x-onenet-free-attempt": True}).envelope.is_free_attempt
    assert not a_delivery({"x-onenet-attempt": 2, "x-onenet-free-attempt": 1}).envelope.is_free_attempt


@pytest.mark.parametrize("text", ["2026", "", "../yesterday", 7])
def test_a_doubt_that_cannot_be_read_is_a_new_doubt_from_an_unknown_time(text: object) -> None:
    delivery = a_delivery({"x-onenet-in-doubt": text})
    arrived_at = datetime.fromtimestamp(delivery.arrived_at, UTC)
    assert delivery.envelope.doubt == DoubtWindow(None, arrived_at)


async def test_a_command_with_a_doubt_that_cannot_be_read_awaits_reconciliation(engine: Engine) -> None:
    [publication] = await engine.deliver(a_delivery({"x-onenet-in-doubt": "2026"}))
    assert publication.routing_key == f"onenet.execute.retry.{RECONCILE_DELAY_S}s"
    assert not {"request", "history"} & set(engine.steps)


@pytest.mark.parametrize("text", ["yesterday", "2026-08-05T12:00:00", 7])
async def test_a_replay_whose_time_cannot_be_read_is_none(engine: Engine, text: object) -> None:
    await fail(engine)
    delivery = a_delivery({"x-onenet-replay": text})
    assert delivery.envelope.replay is None
    assert [reply_in(each).status for each in await engine.deliver(delivery)] == ["failed"]
    assert "request" not in engine.steps


async def test_a_replay_that_did_not_arrive_through_the_workers_own_exchange_is_not_believed(engine: Engine) -> None:
    dead_letter = await fail(engine)
    failed_at = datetime.fromisoformat(str((dead_letter.properties.headers or {})["x-onenet-failed-at"]))
    order = MESSAGES.replay(returned(dead_letter), Replay(failed_at, None))
    forged = Delivery(1, 1, False, order.properties, order.body, is_returned=False)
    assert [reply_in(each).status for each in await engine.deliver(forged)] == ["failed"]
    assert "request" not in engine.steps
    assert [reply_in(each).status for each in await engine.deliver(returned(order))] == ["accepted"]
    assert engine.steps.count("request") == 1


async def test_a_message_that_is_returned_too_often_keeps_its_body_and_its_own_headers(engine: Engine) -> None:
    body = b"\xff no JSON"
    headers = {"x-delivery-count": MAX_RETURNS, "tenant": "t"}
    delivery = a_delivery(headers, is_returned=False, is_redelivered=True, body=body, message_id="a")
    [publication] = await engine.deliver(delivery)
    assert publication.body == body
    copied = publication.properties.headers or {}
    assert (copied["tenant"], copied["x-onenet-attempt"], copied["x-onenet-crash-count"]) == ("t", 1, 1)
    assert str(copied["x-onenet-in-doubt"]).startswith("../")


async def test_poison_is_published_as_a_reply_and_as_a_dead_letter_with_reason_and_attempt(engine: Engine) -> None:
    suspect = {"x-onenet-attempt": 2, "x-onenet-in-doubt": str(PAST_DOUBT), "x-onenet-crash-count": MAX_CRASHES}
    reply, dead_letter = await engine.deliver(a_delivery(suspect))
    assert (reply.exchange, dead_letter.exchange) == ("onenet.replies", "onenet.dead-letters")
    headers = dead_letter.properties.headers or {}
    assert (headers["x-onenet-reason"], headers["x-onenet-attempt"]) == ("poison_message", 2)


moments = st.integers(0, 10**9).map(lambda number: LONG_AGO + timedelta(milliseconds=number))
windows = st.builds(DoubtWindow, st.none() | moments, moments)
attempts = st.integers(1, 99)
resolutions = (
    st.builds(Retry, st.sampled_from([5, 30]), attempts, st.text(), st.none() | windows, st.booleans())
    | st.builds(
        AwaitReconciliation,
        st.just(RECONCILE_DELAY_S),
        attempts,
        st.text(),
        windows,
        st.booleans(),
        st.none() | st.integers(0, 9),
    )
    | st.builds(
        Postpone,
        st.sampled_from([5, 30]),
        attempts,
        st.text(),
        st.none() | windows,
        st.booleans(),
        st.none() | st.integers(0, 9),
        has_jitter=st.booleans(),
    )
)


@settings(deadline=None)
@given(resolutions, st.sampled_from([None, NOTES]), st.booleans())
def test_the_envelope_of_a_copy_says_what_its_resolution_said(
    resolution: Retry | AwaitReconciliation | Postpone, headers: dict[str, Any] | None, is_redelivered: bool
) -> None:
    """Nothing of the envelope before is left over: what the resolution does not say is not on the copy."""
    delivery = a_delivery(headers, is_returned=headers is not None, is_redelivered=is_redelivered, message_id="a")
    [publication] = MESSAGES.publications(delivery, resolution)
    assert (publication.exchange, publication.body) == ("onenet.retry", BODY)
    envelope = returned(publication).envelope
    assert envelope.is_copy
    assert not envelope.is_redelivered
    assert (envelope.attempt, envelope.doubt) == (resolution.attempt, resolution.doubt)
    noted = (False, None) if isinstance(resolution, Retry) else (resolution.is_free, resolution.crash_count)
    assert (envelope.is_free_attempt, envelope.crash_count) == noted
    assert (envelope.replay is None) == (headers is None)
    assert envelope.message_id == "a"
    assert envelope.first_arrived_at == pytest.approx(delivery.envelope.first_arrived_at, abs=0.001)


async def test_a_copy_of_a_replay_keeps_the_order(engine: Engine) -> None:
    """It may not have been claimed yet, or its record may be deleted before the copy returns."""
    failed_at = LONG_AGO + timedelta(minutes=1)
    order = MESSAGES.replay(a_delivery(is_returned=False), Replay(failed_at, None))
    engine.pause()
    [copy] = await engine.deliver(returned(order))
    headers = copy.properties.headers or {}
    assert headers["x-onenet-replay"] == failed_at.isoformat(timespec="milliseconds")
    assert returned(copy).envelope.replay == Replay(failed_at, returned(copy).envelope.doubt)


async def test_the_reply_to_a_replay_is_copied_to_who_waits_for_it_also_after_a_delay(engine: Engine) -> None:
    """And the sender gets it as always."""
    copied_to = f"{'0' * 32}.7"
    order = MESSAGES.replay(a_delivery(is_returned=False, app_id="billing"), Replay(LONG_AGO, None), copied_to)
    engine.pause()
    [copy] = await engine.deliver(returned(order))
    conclude = Conclude(Failed("expired", "too late"), reply_to(Failed("expired", "too late"), 1, "a", None, LONG_AGO))
    told, dead_letter = MESSAGES.publications(returned(copy), conclude)
    assert (told.exchange, told.routing_key) == ("onenet.replies", "execute.failed.billing")
    copied = MESSAGES.reply_copy(returned(copy), conclude)
    assert copied is not None
    assert (copied.exchange, copied.routing_key) == ("onenet.control", f"replay.{copied_to}")
    assert (copied.body, copied.status) == (told.body, None)
    assert "x-onenet-reply-copy" not in (dead_letter.properties.headers or {})


@pytest.mark.parametrize(
    ("copied_to", "is_returned"), [("billing", True), ("#", True), (7, True), (f"{'0' * 32}.7", False)]
)
def test_a_copy_of_a_reply_goes_nowhere_but_to_a_replay_of_the_command_line(
    copied_to: object, is_returned: bool
) -> None:
    delivery = a_delivery({"x-onenet-reply-copy": copied_to}, is_returned=is_returned)
    conclude = Conclude(Failed("expired", "too late"), reply_to(Failed("expired", "too late"), 1, "a", None, LONG_AGO))
    assert MESSAGES.reply_copy(delivery, conclude) is None


@pytest.fixture
async def engine() -> Engine:
    return Engine()


async def fail(engine: Engine) -> Publication:
    """Let a command fail for good; returns its dead letter."""
    engine.platform.answers = [NotSent("refused")]
    [retry] = await engine.deliver(a_delivery(is_returned=False))
    engine.platform.answers = [NotSent("refused")]
    [last] = await engine.deliver(returned(retry))
    await engine.deliver(
        a_delivery(is_returned=False, body=BODY.replace(b'"a"', b'"another"'))
    )  # so that it is no outage
    engine.platform.answers = [NotSent("refused")]
    _, dead_letter = await engine.deliver(returned(last))
    engine.steps.clear()
    return dead_letter


def reply_in(publication: Publication) -> Reply:
    return Reply.model_validate_json(publication.body)
