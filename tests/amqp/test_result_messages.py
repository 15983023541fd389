"""The messages of accepted commands: how they wait, and where their results go."""

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pika import BasicProperties

from schemas.reply import Reply
from schemas.result import Result
from tests.support.builders import a_command
from tests.support.onenet_client import CHINA
from worker.amqp.messages import USER_ID, Delivery, MessageBuilder, Publication
from worker.amqp.result_messages import ResultMessages
from worker.amqp.topology import Topology
from worker.core.command import Command
from worker.core.outcome import Accepted
from worker.core.parsing import read_command
from worker.core.resolution import Conclude, Duplicate
from worker.core.results import Awaited

NOW = datetime(2026, 11, 22, 8, 0, tzinfo=UTC)
DELAYS_S = (60, 300, 3600)
TOPOLOGY = Topology("onenet", (5,), DELAYS_S)


def messages(*, is_isolated: bool = False, ahead: timedelta = timedelta(0)) -> ResultMessages:
    return ResultMessages(TOPOLOGY, DELAYS_S, lambda _product: ahead, is_isolated=is_isolated)


def command(**changes: Any) -> Command:
    return read_command(json.dumps(a_command(**changes)).encode(), None, CHINA)


def delivery(body: bytes = b"", *, is_returned: bool = False, **properties: Any) -> Delivery:
    return Delivery(
        1, 1, is_redelivered=False, properties=BasicProperties(**properties), body=body, is_returned=is_returned
    )


def reply_of(accepted: Command) -> Reply:
    return Reply(
        command_id=accepted.command_id, status="accepted", uuid="u", imei=accepted.imei, attempts=1, completed_at=NOW
    )


def returned(publication: Publication) -> Delivery:
    """Return the delivery that a publication becomes after its delay."""
    properties = {
        name: getattr(publication.properties, name) for name in ("correlation_id", "reply_to", "app_id", "headers")
    }
    return delivery(publication.body, is_returned=True, **properties)


def result_of(awaited: Awaited) -> Result:
    about = {"command_id": awaited.command_id, "uuid": awaited.uuid, "imei": awaited.imei}
    return Result(**about, result="executed", observed_at=NOW)


def told(sent: ResultMessages, **properties: Any) -> tuple[str, str | None]:
    """Return the routing key and the correlation id of the result of a command with these AMQP properties."""
    accepted = command(command_id="the-one")
    waiting = sent.first(delivery(**properties), accepted, reply_of(accepted))
    awaited = sent.read(returned(waiting))
    assert awaited is not None
    again = returned(sent.later(returned(waiting), awaited, NOW))
    result = sent.result(again, result_of(awaited))
    assert (result.exchange, result.properties.type) == ("onenet.replies", "execute.result")
    return result.routing_key, result.properties.correlation_id


@pytest.mark.parametrize(
    ("properties", "routing_key", "correlation_id"),
    [
        ({}, "result.executed.unknown", "the-one"),
        ({"app_id": "billing"}, "result.executed.billing", "the-one"),
        ({"app_id": "billing", "correlation_id": "42"}, "result.executed.billing", "42"),
        ({"app_id": "billing", "reply_to": "anywhere.else"}, "anywhere.else", "the-one"),
        ({"app_id": "b" * 255}, f"result.executed.{'b' * 239}", "the-one"),
    ],
)
def test_a_result_is_addressed_as_the_reply_was(
    properties: dict[str, Any], routing_key: str, correlation_id: str
) -> None:
    assert told(messages(), **properties) == (routing_key, correlation_id)


@pytest.mark.parametrize(
    ("properties", "routing_key"),
    [
        ({"user_id": "billing", "app_id": "billing"}, "result.executed.billing"),
        ({"user_id": "billing", "app_id": "billing", "reply_to": "billing.mine"}, "billing.mine"),
        # They were accepted before ``isolated`` was turned on.
        ({"user_id": "billing", "app_id": "billing", "reply_to": "metering"}, "result.executed.billing"),
        ({"user_id": "billing", "app_id": "metering"}, "result.executed.billing"),
        ({"app_id": "metering", "reply_to": "metering"}, "result.executed.unknown"),
        ({"app_id": "metering", "headers": {USER_ID: "metering"}}, "result.executed.unknown"),
    ],
    ids=str,
)
def test_with_isolated_systems_a_result_goes_only_to_its_own_sender(
    properties: dict[str, Any], routing_key: str
) -> None:
    assert told(messages(is_isolated=True), **properties)[0] == routing_key


@pytest.mark.parametrize(
    ("wait_s", "queue_s", "expiration"),
    [
        (86_400, 3600, None),
        (3600, 3600, None),
        (3599.9, 3600, None),  # some time passes before it is published: not 300, …, 60, …
        (3419, 3600, "3419000"),  # a slow broker: still one delay instead of many
        (3418, 300, None),
        (1400, 300, None),
        (59.5, 60, None),
        (12.5, 60, "12500"),
        (0, 60, "0"),
        (-5, 60, "0"),
    ],
)
def test_a_wait_is_the_longest_delay_that_is_not_too_long(wait_s: float, queue_s: int, expiration: str | None) -> None:
    """A longer wait is several delays, one after the other."""
    accepted = command()
    sent = messages()
    awaited = sent.read(returned(sent.first(delivery(), accepted, reply_of(accepted))))
    assert awaited is not None
    publication = sent.later(delivery(), awaited.later(NOW, wait_s), NOW)
    assert (publication.exchange, publication.routing_key) == ("onenet.retry", f"onenet.results.{queue_s}s")
    assert publication.properties.expiration == expiration
    assert publication.properties.delivery_mode == 2


@pytest.mark.parametrize("ahead", [timedelta(hours=-3), timedelta(0), timedelta(hours=3)])
def test_the_first_look_is_a_delay_away_however_far_the_platforms_clock_is(ahead: timedelta) -> None:
    accepted = command()
    sent = messages(ahead=ahead)
    awaited = sent.read(returned(sent.first(delivery(), accepted, reply_of(accepted))))
    assert awaited is not None
    assert awaited.due_at == NOW + timedelta(seconds=60)


@pytest.mark.parametrize("body", [b"", b"{}", b"[1]", b"\xff"])
def test_what_is_no_accepted_command_is_not_read(body: bytes) -> None:
    assert messages().read(delivery(body, is_returned=True)) is None


def test_an_upstream_system_cannot_make_an_accepted_command() -> None:
    accepted = command()
    sent = messages()
    waiting = sent.first(delivery(), accepted, reply_of(accepted))
    assert sent.read(delivery(waiting.body)) is None


def test_a_command_that_an_operator_moved_still_waits_for_its_result() -> None:
    """Its header with the user is not believed any more."""
    accepted = command()
    sent = messages(is_isolated=True)
    waiting = sent.first(delivery(user_id="billing", app_id="billing"), accepted, reply_of(accepted))
    moved = replace(returned(waiting), is_returned=False, is_moved=True)
    awaited = sent.read(moved)
    assert awaited is not None
    assert awaited.command_id == accepted.command_id
    assert sent.result(moved, result_of(awaited)).routing_key == "result.executed.unknown"


def test_only_what_may_have_been_lost_waits_for_its_result_again() -> None:
    builder, accepted = MessageBuilder(TOPOLOGY, "host:1", await_result=messages().first), command()
    reply = reply_of(accepted)

    def types(resolution: Conclude | Duplicate) -> list[str | None]:
        return [each.properties.type for each in builder.publications(delivery(), resolution, accepted)]

    assert types(Conclude(Accepted("u"), reply)) == ["execute.reply", "execute.accepted"]
    assert types(Duplicate(reply)) == ["execute.reply"]
    assert types(Duplicate(reply, repeats_all=True)) == ["execute.reply", "execute.accepted"]
