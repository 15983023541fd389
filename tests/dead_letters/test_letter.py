"""One dead letter: its fields, its replay, and the filter."""

from datetime import timedelta
from typing import get_args

import pytest
from pika import BasicProperties

from schemas.command import MAX_BODY_BYTES
from schemas.reply import FailureCode
from tests.support.a_dead_letter import DEATH, FAILED_AT, NOW, ZONE, a_dead_letter
from worker.amqp.bodies import TruncatedBody
from worker.amqp.messages import MessageBuilder
from worker.amqp.topology import Topology
from worker.cli.dead_letters import Reason
from worker.core.doubt_window import DoubtWindow
from worker.dead_letters.letter import DeadLetter, Filter


def test_the_option_reason_offers_every_failure_code_and_broker() -> None:
    assert {str(reason) for reason in Reason} == {*get_args(FailureCode), "broker"}


@pytest.mark.parametrize("reason", get_args(FailureCode))
def test_a_dead_letter_that_may_have_been_cached_is_replayed_in_doubt(reason: str) -> None:
    may_have_been = {"outcome_unknown", "poison_message", "unknown_product"}
    replay = a_dead_letter(reason).replay(NOW)
    assert replay.failed_at == FAILED_AT
    assert replay.doubt == (DoubtWindow(None, FAILED_AT) if reason in may_have_been else None)


@pytest.mark.parametrize(
    "found",
    [
        a_dead_letter("expired", routing_key="execute", headers=DEATH),  # the reason was written by an upstream system
        a_dead_letter("expired", headers=DEATH),
        a_dead_letter("expired", routing_key="execute"),
        a_dead_letter("a_reason_of_tomorrow", headers={"x-onenet-failed-at": "soon"}),
    ],
)
def test_a_dead_letter_not_published_by_a_worker_is_replayed_in_doubt_until_now(found: DeadLetter) -> None:
    replay = found.replay(NOW)
    assert (replay.failed_at, replay.doubt) == (NOW, DoubtWindow(None, NOW))


def test_a_replay_resets_the_workers_headers_and_keeps_the_senders() -> None:
    own = {"x-onenet-attempt": 7, "x-onenet-crash-count": 3, "x-onenet-user-id": "u"}
    found = a_dead_letter(headers={**own, "colour": "red", "x-delivery-count": 4})
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
        "x-onenet-replay-code": "outcome_unknown",
    }
    assert publication.properties.app_id == "billing"


def test_a_filter_matches_only_if_every_condition_does() -> None:
    found = a_dead_letter(imei="865820030000001")
    hour = timedelta(hours=1)
    for fits in (
        Filter(),
        Filter(reasons=frozenset({"outcome_unknown"}), source="billing"),
        Filter(device="865820030000001", older_than=2 * hour, newer_than=4 * hour),
    ):
        assert fits.matches(found, NOW)
    for fails in (
        Filter(reasons=frozenset({"broker"})),
        Filter(device="865820030000002"),
        Filter(source="metering"),
        Filter(older_than=4 * hour),
        Filter(newer_than=2 * hour),
        Filter(source="billing", newer_than=2 * hour),
    ):
        assert not fails.matches(found, NOW)


def test_a_dead_letter_of_unknown_age_is_neither_older_nor_newer() -> None:
    found = a_dead_letter(headers={"x-onenet-failed-at": "soon"})
    assert not Filter(older_than=timedelta(0)).matches(found, NOW)
    assert not Filter(newer_than=timedelta(days=9999)).matches(found, NOW)


@pytest.mark.parametrize("body", [b"\xff", b"[]", b"[" * 50_000, b'{"imei": 1}', b""])
def test_a_dead_letter_with_an_invalid_body_has_no_command_fields(body: bytes) -> None:
    found = a_dead_letter(body=body or b" ")
    assert (found.command_id, found.imei, found.expires_at) == (None, None, None)


def test_the_fingerprint_of_a_dead_letter_does_not_depend_on_the_channel() -> None:
    body = a_dead_letter().body
    one, again = a_dead_letter(body=body), a_dead_letter(body=body, headers={"x-delivery-count": 3})
    assert one.fingerprint == again.fingerprint
    assert one.fingerprint != a_dead_letter(body=body + b" ").fingerprint
    assert one.fingerprint != a_dead_letter("expired", body=body).fingerprint


def test_the_digest_of_a_dead_letter_is_the_same_for_every_reader_and_in_every_process() -> None:
    """Also for one that cuts bodies over the limit of commands, at whatever frame."""
    one = a_dead_letter(body=b'{"command_id": "a"}')
    assert one.digest == a_dead_letter(body=one.body, headers={"x-delivery-count": 3, "x-acquired-count": 4}).digest
    assert one.digest == "36e410fe324502e8c615ea4440e56b47"
    assert one.digest != a_dead_letter(body=one.body + b" ").digest
    headers = {"x-onenet-failed-at": one.headers["x-onenet-failed-at"], "x-onenet-reason": "outcome_unknown"}
    again = DeadLetter(1, one.routing_key, BasicProperties(app_id="billing", headers=headers), one.body, ZONE)
    assert (again.digest, again.fingerprint) == (one.digest, one.fingerprint)  # the broker sorts headers
    whole = a_dead_letter(body=b"x" * 3 * MAX_BODY_BYTES)
    assert whole.digest == a_dead_letter(body=TruncatedBody(whole.body[: MAX_BODY_BYTES + 7])).digest


@pytest.mark.parametrize(
    ("reason", "expired_time", "cannot_succeed"),
    [
        ("retries_exhausted", "2026-08-05T12:00:00Z", True),
        ("retries_exhausted", "2026-08-05T12:00:01Z", False),
        ("expired", "2026-08-05T11:00:00Z", True),
        ("outcome_unknown", "2026-08-05T11:00:00Z", False),  # the history may contain it
        ("unknown_product", "2026-08-05T11:00:00Z", False),
    ],
)
def test_an_expired_command_that_was_certainly_not_sent_cannot_succeed(
    reason: str, expired_time: str, cannot_succeed: bool
) -> None:
    assert a_dead_letter(reason, expired_time=expired_time).cannot_succeed(NOW) is cannot_succeed
