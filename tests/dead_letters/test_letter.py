"""What a dead letter says, and which are meant."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any, get_args
from zoneinfo import ZoneInfo

import pytest
from pika import BasicProperties

from schemas.reply import FailureCode
from tests.support.builders import a_command
from worker.amqp.messages import MessageBuilder
from worker.amqp.topology import Topology
from worker.cli.dead_letters import Reason
from worker.core.doubt_window import DoubtWindow
from worker.dead_letters.letter import DeadLetter, Filter

NOW = datetime(2026, 8, 5, 12, tzinfo=UTC)
FAILED_AT = NOW - timedelta(hours=3)
DEATH: dict[str, Any] = {"x-death": [], "x-first-death-reason": "delivery_limit"}


def letter(reason: str = "outcome_unknown", routing_key: str | None = None, **changes: Any) -> DeadLetter:
    own = {"x-onenet-reason": reason, "x-onenet-failed-at": FAILED_AT.isoformat(timespec="milliseconds")}
    properties = BasicProperties(app_id="billing", headers=own | changes.pop("headers", {}))
    body = changes.pop("body", None) or json.dumps(a_command(**({"command_id": "a"} | changes))).encode()
    key = routing_key or f"execute.{reason}"
    return DeadLetter(1, "onenet.dead-letters", key, properties, body, ZoneInfo("Asia/Shanghai"))


def test_every_reason_can_be_selected() -> None:
    assert {str(reason) for reason in Reason} == {*get_args(FailureCode), "broker"}


@pytest.mark.parametrize("reason", get_args(FailureCode))
def test_what_may_have_been_cached_goes_back_in_doubt(reason: str) -> None:
    may_have_been = {"outcome_unknown", "poison_message", "unknown_product"}
    replay = letter(reason).replay(NOW)
    assert replay.failed_at == FAILED_AT
    assert replay.doubt == (DoubtWindow(None, FAILED_AT) if reason in may_have_been else None)


@pytest.mark.parametrize(
    "found",
    [
        letter("expired", routing_key="execute", headers=DEATH),  # an upstream system wrote the reason
        letter("expired", headers=DEATH),
        letter("expired", routing_key="execute"),
        letter("a_reason_of_tomorrow", headers={"x-onenet-failed-at": "soon"}),
    ],
)
def test_of_what_no_worker_vouches_for_everything_is_in_doubt_until_now(found: DeadLetter) -> None:
    replay = found.replay(NOW)
    assert (replay.failed_at, replay.doubt) == (NOW, DoubtWindow(None, NOW))


def test_a_replay_begins_anew_and_keeps_what_is_the_senders() -> None:
    own = {"x-onenet-attempt": 7, "x-onenet-crash-count": 3, "x-onenet-user-id": "u"}
    found = letter(headers={**own, "colour": "red", "x-delivery-count": 4})
    outgoing = MessageBuilder(Topology("onenet", (5,)), "host:1")
    publication = outgoing.replay(found.delivery(), found.replay(NOW))
    assert (publication.exchange, publication.routing_key, publication.body) == (
        "onenet.returns",
        "execute",
        found.body,
    )
    assert publication.properties.headers == {
        "colour": "red",
        "x-onenet-user-id": "u",
        "x-onenet-replay": "2026-08-05T09:00:00.000+00:00",
        "x-onenet-free-attempt": True,
        "x-onenet-in-doubt": "../2026-08-05T09:00:00.000+00:00",
    }
    assert publication.properties.app_id == "billing"


def test_a_selection_is_all_of_its_conditions() -> None:
    found = letter(imei="865820030000001")
    hour = timedelta(hours=1)
    for fits in (
        Filter(),
        Filter(ids=frozenset({"a", "b"}), reasons=frozenset({"outcome_unknown"}), source="billing"),
        Filter(device="865820030000001", older_than=2 * hour, newer_than=4 * hour),
    ):
        assert fits.takes(found, NOW)
    for fails in (
        Filter(ids=frozenset({"b"})),
        Filter(reasons=frozenset({"broker"})),
        Filter(device="865820030000002"),
        Filter(source="metering"),
        Filter(older_than=4 * hour),
        Filter(newer_than=2 * hour),
        Filter(source="billing", newer_than=2 * hour),
    ):
        assert not fails.takes(found, NOW)


def test_a_letter_of_unknown_age_is_neither_older_nor_newer() -> None:
    found = letter(headers={"x-onenet-failed-at": "soon"})
    assert not Filter(older_than=timedelta(0)).takes(found, NOW)
    assert not Filter(newer_than=timedelta(days=9999)).takes(found, NOW)


@pytest.mark.parametrize("body", [b"\xff", b"[]", b"[" * 50_000, b'{"imei": 1}', b""])
def test_a_body_that_is_no_command_is_a_letter_all_the_same(body: bytes) -> None:
    found = letter(body=body or b" ")
    assert (found.command_id, found.imei, found.expires_at) == (None, None, None)


def test_a_letter_is_known_again_whichever_channel_it_comes_by() -> None:
    body = letter().body
    one, again = letter(body=body), letter(body=body, headers={"x-delivery-count": 3})
    assert one.fingerprint == again.fingerprint
    assert one.fingerprint != letter(body=body + b" ").fingerprint
    assert one.fingerprint != letter("expired", body=body).fingerprint
