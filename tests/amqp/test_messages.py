"""What comes in and goes out, property by property."""

import json
import struct
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pika import BasicProperties
from pika.frame import Header

from schemas.reply import Detail, Reply, ReplyError
from worker.amqp.messages import FIRST_ARRIVED, Delivery, MessageBuilder, Publication, fitted, plain
from worker.amqp.topology import Topology
from worker.core.doubt_window import DoubtWindow
from worker.core.outcome import AwaitReconciliation, Retry

NOW = datetime(2026, 8, 5, tzinfo=UTC)
DOUBT = DoubtWindow(NOW, NOW + timedelta(seconds=2))
OUTGOING = MessageBuilder(Topology("onenet", (5, 600)), "host:1")


def handed_back(came: Delivery, now: datetime) -> Publication:
    return OUTGOING.hand_back(came, came.doubt_of_copy(now))


def failed(message: str = "", details: tuple[Detail, ...] = ()) -> Reply:
    error = ReplyError(code="invalid_command", message=message, details=details or None)
    return Reply(command_id="a", status="failed", error=error, attempts=1, completed_at=NOW)


REPLY = Reply(command_id="a", status="accepted", uuid="u", attempts=1, completed_at=NOW)


def delivery(
    headers: dict[str, Any] | None = None, *, returned: bool = False, redelivered: bool = False, **properties: Any
) -> Delivery:
    exchange = "onenet.returns" if returned else "onenet.commands"
    return Delivery(1, 1, exchange, redelivered, BasicProperties(headers=headers, **properties), b"body", returned)


def headers(publication: Publication) -> dict[str, Any]:
    """Return the headers, without the time of arrival that each copy has."""
    return {name: value for name, value in (publication.properties.headers or {}).items() if name != FIRST_ARRIVED}


@pytest.mark.parametrize(("value", "attempt"), [(3, 3), (1, 1), (0, 1), (-2, 1), ("3", 1), (None, 1), (2**40, 2**40)])
def test_the_attempt_is_read_from_our_own_header(value: object, attempt: int) -> None:
    assert delivery({"x-onenet-attempt": value}, returned=True).attempt == attempt
    assert delivery({"x-onenet-attempt": value}).attempt == 1


def test_a_message_that_was_moved_is_in_doubt_until_it_came() -> None:
    """To the broker it is a new message; that it was delivered before, and sent, is forgotten."""
    for moved in (
        replace(delivery(), is_moved=True),
        replace(delivery({"x-onenet-attempt": 1, "x-onenet-in-doubt": str(DOUBT)}), is_moved=True),  # not believed
        delivery(returned=True),
        delivery({"tenant": "a"}, returned=True),
        delivery({"x-onenet-attempt": 1, "x-onenet-reason": "outcome_unknown"}, returned=True),  # a dead letter
        delivery({"x-onenet-attempt": 1, "x-death": [{"reason": "delivery_limit"}]}, returned=True),  # of the broker
    ):
        arrived_at = datetime.fromtimestamp(moved.arrived_at, UTC)
        assert moved.doubt == DoubtWindow(None, arrived_at)
        assert moved.doubt_of_copy(NOW) == DoubtWindow(None, arrived_at)
        assert moved.attempt == 1
    rested = {"x-onenet-attempt": 1, "x-death": [{"reason": "expired", "queue": "onenet.execute.retry.5s"}]}
    for known in (delivery(), delivery({"x-onenet-attempt": 1}, returned=True), delivery(rested, returned=True)):
        assert known.doubt is None


_FRAMES = [4096, 16_384, 131_072]
_FOREIGN: list[dict[Any, Any]] = [
    {"a": "v" * 130_000},
    {f"h{number}": "v" * 240 for number in range(500)},
    {"nested": {"list": ["v" * 1000] * 200}},
    {"CC": ["k" * 245] * 522},
    {"traceparent": "v" * 4000, "tracestate": "v" * 4000},
    {b"\xff": "v" * 20_000},
]


@pytest.mark.parametrize("frame_max", _FRAMES)
@pytest.mark.parametrize("foreign", _FOREIGN, ids=lambda table: str(next(iter(table))))
def test_every_publication_fits_the_frame_that_was_agreed_on(foreign: dict[Any, Any], frame_max: int) -> None:
    """A frame that is larger ends the connection, and the message comes again."""
    texts = ("content_type", "correlation_id", "reply_to", "message_id", "app_id")
    names: dict[str, Any] = dict.fromkeys(texts, "n" * 255)
    for returned in (False, True):
        came = delivery(foreign, returned=returned, **names)
        for publication in (
            OUTGOING.reply(came, REPLY),
            OUTGOING.retry(came, Retry(5, 2, ""), DOUBT),
            OUTGOING.settle(came, AwaitReconciliation(1, "answer lost"), 60, DOUBT, 3),
            handed_back(came, NOW),
            OUTGOING.dead_letter(came, failed("é" * 9000, tuple([Detail(field="f", message="y" * 1000)] * 9))),
        ):
            sent = fitted(publication, frame_max)
            assert len(Header(1, len(sent.body), sent.properties).marshal()) <= frame_max
            assert (sent.exchange, sent.routing_key, sent.body) == (
                publication.exchange, publication.routing_key, publication.body,
            )  # fmt: skip
            own = {name: value for name, value in headers(publication).items() if str(name).startswith("x-onenet-")}
            lost = own.keys() - headers(sent).keys()
            assert lost <= {"x-onenet-details", "x-onenet-cc"}  # what is only there to be read


def test_what_fits_is_published_as_it_is() -> None:
    publication = OUTGOING.dead_letter(delivery({"tenant": "a" * 3000}), failed())
    assert fitted(publication, 4096) is publication


@pytest.mark.parametrize("name", ["CC", "BCC", "cc", "Bcc", " CC ", b"cc"])
def test_what_would_route_a_copy_to_further_queues_never_travels_on(name: str | bytes) -> None:
    table: dict[Any, Any] = {name: ["stolen"], "tenant": "a"}
    came = delivery(table)
    for publication in (
        OUTGOING.retry(came, Retry(5, 2, ""), None),
        handed_back(came, NOW),
        OUTGOING.dead_letter(came, failed()),
    ):
        found = headers(publication)
        assert name not in found
        assert found["tenant"] == "a"
        assert found.get("x-onenet-cc") == (["stolen"] if name == "CC" else None)


def test_a_plain_publication_has_nothing_that_a_sender_chose_but_its_body_and_ids() -> None:
    came = delivery({"tenant": "a", "traceparent": "t"}, app_id="billing", reply_to="over.there")
    reply = plain(OUTGOING.reply(came, REPLY))
    assert (reply.exchange, reply.routing_key) == ("onenet.replies", "execute.accepted.unknown")
    assert not reply.properties.headers
    copy = plain(OUTGOING.retry(came, Retry(5, 2, ""), DOUBT))
    assert copy.routing_key == "onenet.execute.retry.5s"
    assert headers(copy).keys() == {"x-onenet-attempt", "x-onenet-in-doubt", "x-onenet-headers-dropped"}


def test_what_may_have_been_sent() -> None:
    assert not delivery().may_have_been_sent
    assert not delivery({"x-onenet-attempt": 1}, returned=True).may_have_been_sent
    assert delivery(redelivered=True).may_have_been_sent
    assert delivery({"x-onenet-attempt": 2}, returned=True).may_have_been_sent
    assert delivery({"x-onenet-in-doubt": "2026"}, returned=True).may_have_been_sent
    assert not delivery({"x-onenet-attempt": 2, "x-onenet-in-doubt": "2026"}).may_have_been_sent


@pytest.mark.parametrize(
    ("properties", "routing_key"),
    [
        ({}, "execute.accepted.unknown"),
        ({"app_id": ""}, "execute.accepted.unknown"),
        ({"app_id": b"\xff"}, "execute.accepted.unknown"),
        ({"app_id": "billing"}, "execute.accepted.billing"),
        ({"app_id": "billing", "reply_to": ""}, "execute.accepted.billing"),
        ({"app_id": "billing", "reply_to": b"\xff"}, "execute.accepted.billing"),
        ({"app_id": "billing", "reply_to": "over.there"}, "over.there"),
    ],
    ids=str,
)
def test_where_a_reply_goes(properties: dict[str, Any], routing_key: str) -> None:
    found = OUTGOING.reply(delivery(**properties), REPLY)
    assert (found.exchange, found.routing_key) == ("onenet.replies", routing_key)


def test_the_brokers_own_record_of_deaths_is_never_sent_back() -> None:
    """With it the broker sees a cycle, and silently drops the message on a later pass."""
    brokers = {
        "x-death": [{"count": 1}],
        "x-first-death-queue": "q",
        "x-last-death-reason": "expired",
        "x-delivery-count": 3,
    }
    came = delivery({**brokers, "tenant": "a"}, returned=True)
    for publication in (
        OUTGOING.retry(came, Retry(5, 2, ""), None),
        OUTGOING.settle(came, AwaitReconciliation(1, "answer lost"), 60, DOUBT, 0),
        OUTGOING.postpone(came, 5, DOUBT, None),
        handed_back(came, NOW),
        OUTGOING.dead_letter(came, failed()),
    ):
        assert not headers(publication).keys() & brokers.keys()
        assert headers(publication)["tenant"] == "a"


def test_a_retry_carries_its_attempt_and_rests_in_the_queue_of_its_delay() -> None:
    found = OUTGOING.retry(delivery({"x-onenet-attempt": 2}, returned=True, expiration="1"), Retry(600, 3, "429"), None)
    assert (found.exchange, found.routing_key) == ("onenet.retry", "onenet.execute.retry.600s")
    assert headers(found)["x-onenet-attempt"] == 3
    assert 540_000 <= int(str(found.properties.expiration)) <= 600_000
    assert OUTGOING.retry(delivery(expiration="1"), Retry(5, 2, "429"), None).properties.expiration is None


def test_a_wait_that_the_platform_asked_for_is_not_shortened() -> None:
    assert (
        OUTGOING.retry(delivery(), Retry(600, 2, "429", honours_retry_after=True), None).properties.expiration is None
    )


def test_a_doubt_travels_with_its_time() -> None:
    found = OUTGOING.settle(
        delivery({"x-onenet-attempt": 2}, returned=True), AwaitReconciliation(3, "answer lost"), 60, DOUBT, None
    )
    assert (found.exchange, found.routing_key) == ("onenet.retry", "onenet.execute.retry.60s")
    assert found.properties.expiration is None  # jitter would shorten what must not be shorter
    assert headers(found) == {"x-onenet-attempt": 3, "x-onenet-in-doubt": str(DOUBT)}
    assert delivery(headers(found), returned=True).doubt == DOUBT
    assert headers(OUTGOING.retry(delivery(), Retry(5, 2, ""), DOUBT))["x-onenet-in-doubt"] == str(DOUBT)


def test_a_doubt_is_believed_of_nobody_else_and_one_that_cannot_be_read_is_still_one() -> None:
    assert delivery({"x-onenet-in-doubt": str(DOUBT), "x-onenet-unfinished": 4}).doubt is None
    assert delivery({"x-onenet-unfinished": 4}).unfinished is None
    unreadable = delivery({"x-onenet-in-doubt": "since then"}, returned=True).doubt
    assert unreadable is not None
    assert unreadable.since is None


def test_what_is_handed_back_is_as_innocent_as_it_came() -> None:
    fresh = handed_back(delivery(), NOW)
    assert (fresh.exchange, fresh.routing_key) == ("onenet.returns", "execute")
    assert headers(fresh) == {"x-onenet-attempt": 1}
    assert headers(handed_back(delivery(redelivered=True), NOW))["x-onenet-in-doubt"] == str(DoubtWindow(None, NOW))
    doubted = delivery({"x-onenet-in-doubt": str(DOUBT), "x-onenet-unfinished": 2}, returned=True)
    assert headers(handed_back(doubted, NOW)) == {
        "x-onenet-attempt": 1, "x-onenet-in-doubt": str(DOUBT), "x-onenet-unfinished": 2,
    }  # fmt: skip


def test_what_is_put_off_uses_up_no_attempt() -> None:
    found = headers(OUTGOING.postpone(delivery({"x-onenet-attempt": 3}, returned=True), 5, DOUBT, 1))
    assert found == {"x-onenet-attempt": 3, "x-onenet-in-doubt": str(DOUBT), "x-onenet-unfinished": 1}
    assert headers(OUTGOING.postpone(delivery(), 5, None, None)) == {"x-onenet-attempt": 1}


def test_a_dead_letter_has_its_reason_cut_to_what_a_frame_can_carry() -> None:
    reply = failed("é" * 100_000, tuple(Detail(field="f", message="y" * 1000) for _ in range(100)))
    found = OUTGOING.dead_letter(delivery(), reply)
    assert (found.exchange, found.routing_key) == ("onenet.dead-letters", "execute.invalid_command")
    assert sum(map(len, found.properties.encode())) < 10_000
    assert headers(found)["x-onenet-reason"] == "invalid_command"
    assert headers(found)["x-onenet-worker"] == "host:1"
    assert len(json.loads(headers(found)["x-onenet-details"])) == 3


def test_only_what_failed_is_dead_lettered() -> None:
    with pytest.raises(ValueError, match="failed"):
        OUTGOING.dead_letter(delivery(), REPLY)


def _field_values() -> st.SearchStrategy[Any]:
    scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text() | st.binary()
    moments = st.integers(0, 2**32).map(lambda seconds: datetime.fromtimestamp(seconds, UTC))
    names = st.text(max_size=60) | st.binary(max_size=60)
    return st.recursive(
        scalars | moments | st.decimals(-21_000_000, 21_000_000, places=2),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
        max_leaves=5,
    )


@given(st.dictionaries(st.text(max_size=60) | st.binary(max_size=60), _field_values(), max_size=4), st.booleans())
def test_no_headers_of_upstreams_keep_a_message_from_being_published(table: dict[Any, Any], returned: bool) -> None:
    """One that could not be encoded again would end the worker each time it came."""
    encoded = b"".join(BasicProperties(headers=table).encode())
    came = delivery(dict(BasicProperties().decode(encoded).headers or {}), returned=returned)
    for publication in (
        OUTGOING.reply(came, REPLY),
        OUTGOING.retry(came, Retry(5, 2, ""), None),
        handed_back(came, NOW),
        OUTGOING.dead_letter(came, failed()),
    ):
        publication.properties.encode()


@pytest.mark.parametrize(
    "value",
    [b"T" + (1_790_000_000_000).to_bytes(8), b"T" + b"\xff" * 8,
     b"d" + struct.pack(">d", 3.75), b"f" + struct.pack(">f", 0.5),
     b"D\x02" + (314).to_bytes(4), b"D\xff" + b"\xff" * 4],
    ids=["milliseconds", "no-time", "double", "float", "decimal", "odd-decimal"],
)  # fmt: skip
def test_header_values_that_pika_would_change_or_choke_on_are_carried_as_they_are(value: bytes) -> None:
    entry = b"\x04when" + value
    encoded = b"\x20\x00" + len(entry).to_bytes(4) + entry  # the flag of headers, then a table of one
    came = delivery(dict(BasicProperties().decode(encoded).headers or {}))
    assert entry in b"".join(OUTGOING.dead_letter(came, failed()).properties.encode())


def test_the_attempt_on_a_dead_letter_is_that_of_its_reply() -> None:
    """The message may have come with another: a command that is sent after all goes on counting where it is."""
    reply = failed().model_copy(update={"attempts": 4})
    came = delivery({"x-onenet-attempt": 3, "x-onenet-in-doubt": str(DOUBT), "x-onenet-unfinished": 1}, returned=True)
    found = headers(OUTGOING.dead_letter(came, reply))
    assert found["x-onenet-attempt"] == 4
    assert not {"x-onenet-in-doubt", "x-onenet-unfinished"} & found.keys()


def test_a_copy_says_what_is_so_now_and_not_what_was() -> None:
    """A doubt that is over, or a suspicion, would have the command rest or be tried with care for nothing."""
    came = delivery({"x-onenet-attempt": 2, "x-onenet-in-doubt": str(DOUBT), "x-onenet-unfinished": 1}, returned=True)
    assert headers(OUTGOING.retry(came, Retry(5, 3, ""), None)) == {"x-onenet-attempt": 3}
    assert headers(OUTGOING.postpone(came, 5, None, None)) == {"x-onenet-attempt": 2}
    assert headers(OUTGOING.settle(came, AwaitReconciliation(2, "answer lost"), 60, DoubtWindow(None, NOW), None)) == {
        "x-onenet-attempt": 2, "x-onenet-in-doubt": str(DoubtWindow(None, NOW)),
    }  # fmt: skip


def test_headers_that_only_look_like_ours_go_nowhere() -> None:
    """Once they were on a copy that comes back through the worker's own exchange, they would be believed."""
    came = delivery({"x-onenet-attempt": 9, "x-onenet-in-doubt": str(DOUBT), "x-onenet-unfinished": 5})
    for publication in (OUTGOING.postpone(came, 5, None, None), handed_back(came, NOW)):
        assert headers(publication) == {"x-onenet-attempt": 1}


def test_what_begins_nowhere_is_open_on_the_message() -> None:
    found = headers(OUTGOING.postpone(delivery(), 5, DoubtWindow(None, NOW), None))["x-onenet-in-doubt"]
    assert found == "../2026-08-05T00:00:00.000+00:00"
    assert delivery({"x-onenet-in-doubt": found}, returned=True).doubt == DoubtWindow(None, NOW)


@pytest.mark.parametrize("value", ["since then", "", 5, b"\xff", True, "../2026-08-05T00:00:00", []])
def test_a_doubt_that_cannot_be_read_reaches_until_now(value: object) -> None:
    """It is noted that there was a request; when is not known, and only all times are sure to cover it."""
    before = datetime.now(UTC)
    found = delivery({"x-onenet-in-doubt": value}, returned=True)
    assert found.doubt is not None
    assert found.doubt.since is None
    assert before <= found.doubt.until <= datetime.now(UTC)
    assert found.may_have_been_sent
    assert headers(handed_back(found, NOW))["x-onenet-in-doubt"] == str(found.doubt)


@pytest.mark.parametrize(("value", "tries"), [(0, 0), (3, 3), (-1, None), ("3", None), (None, None)])
def test_unfinished_tries_are_read_from_our_own_header(value: object, tries: int | None) -> None:
    assert delivery({"x-onenet-unfinished": value}, returned=True).unfinished == tries
    assert delivery({"x-onenet-unfinished": value}).unfinished is None


def test_a_suspicion_without_a_try_is_still_one_on_the_copy() -> None:
    """None and 0 are two things: 0 says that the first try with a mark is still to come."""
    found = headers(OUTGOING.settle(delivery(), AwaitReconciliation(1, "answer lost"), 60, DOUBT, 0))
    assert found["x-onenet-unfinished"] == 0
    assert "x-onenet-unfinished" not in headers(
        OUTGOING.settle(delivery(), AwaitReconciliation(1, "answer lost"), 60, DOUBT, None)
    )


def test_what_is_handed_back_after_a_redelivery_keeps_the_doubt_that_it_had() -> None:
    came = delivery({"x-onenet-in-doubt": str(DOUBT)}, returned=True, redelivered=True)
    assert headers(handed_back(came, NOW))["x-onenet-in-doubt"] == str(DoubtWindow(None, DOUBT.until))
    later = DOUBT.until + timedelta(seconds=9)
    assert headers(handed_back(came, later))["x-onenet-in-doubt"] == str(DoubtWindow(None, later))


@pytest.mark.parametrize(("value", "times"), [(10, 10), (0, 0), ("10", 0), (None, 0)])
def test_the_brokers_count_of_returns_is_read_wherever_the_message_came_in(value: object, times: int) -> None:
    for returned in (False, True):
        assert delivery({"x-delivery-count": value}, returned=returned).times_returned == times


ARRIVED_AT = 1_790_000_000.25


@pytest.mark.parametrize(
    ("published_at", "began_at"),
    [
        (None, ARRIVED_AT),
        (1_790_000_000, ARRIVED_AT),  # whole seconds, so that it may be any time within this one
        (1_789_999_990, 1_789_999_990),
        (1_790_000_100, ARRIVED_AT),  # a clock that is ahead
        (1_790_000_000_000, ARRIVED_AT),  # milliseconds, which the property does not have
        (0, ARRIVED_AT),
    ],
)
def test_a_command_began_when_it_was_published_or_else_when_it_first_arrived(
    published_at: int | None, began_at: float
) -> None:
    properties = BasicProperties(timestamp=published_at)
    assert Delivery(1, 1, "", False, properties, b"", False, ARRIVED_AT).began_at == began_at


def test_the_first_arrival_is_kept_through_every_rest() -> None:
    """A copy's own arrival would hide all the waiting before it."""
    first = Delivery(1, 1, "", False, BasicProperties(), b"", False, ARRIVED_AT)
    copy = OUTGOING.retry(first, Retry(5, 2, ""), None).properties
    again = OUTGOING.hand_back(Delivery(1, 2, "", False, copy, b"", True, ARRIVED_AT + 5), None).properties
    assert Delivery(1, 3, "", False, again, b"", True, ARRIVED_AT + 9).began_at == ARRIVED_AT
    assert Delivery(1, 3, "", False, again, b"", False, ARRIVED_AT + 9).began_at == ARRIVED_AT + 9  # not believed
