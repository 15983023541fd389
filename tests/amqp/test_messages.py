"""The headers and properties of messages, read and written."""

import json
import struct
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pika import BasicProperties
from pika.frame import Header

from schemas.reply import Detail, Reply, ReplyError
from tests.support.builders import a_command
from tests.support.memory import retained_by
from worker.amqp.field_table import RawFieldValue
from worker.amqp.messages import DELAY, FIRST_ARRIVED, Delivery, MessageBuilder, Publication, fitted, plain
from worker.amqp.topology import Topology
from worker.core.doubt import doubt_of_copy
from worker.core.doubt_window import DoubtWindow
from worker.core.outcome import Accepted, Failed
from worker.core.parsing import read_task
from worker.core.resolution import AwaitReconciliation, Conclude, Duplicate, Postpone, Replaced, Retry
from worker.flow.device_queues import KeyedQueues

NOW = datetime(2026, 8, 5, tzinfo=UTC)
DOUBT = DoubtWindow(NOW, NOW + timedelta(seconds=2))
MESSAGES = MessageBuilder(Topology("onenet", (5, 600)), "host:1")


def reply_to(came: Delivery, reply: Reply) -> Publication:
    return MESSAGES.publications(came, Duplicate(reply))[0]


def dead_letter(came: Delivery, reply: Reply) -> Publication:
    assert reply.error is not None
    outcome = Failed("invalid_command", reply.error.message)
    return MESSAGES.publications(came, Conclude(outcome, reply))[1]


def retry(came: Delivery, resolution: Retry) -> Publication:
    [found] = MESSAGES.publications(came, resolution)
    return found


def awaiting(came: Delivery, attempt: int, doubt: DoubtWindow = DOUBT, crash_count: int | None = None) -> Publication:
    [found] = MESSAGES.publications(
        came, AwaitReconciliation(60, attempt, "answer lost", doubt, crash_count=crash_count)
    )
    return found


def postponed(came: Delivery, doubt: DoubtWindow | None, crash_count: int | None = None) -> Publication:
    [found] = MESSAGES.publications(came, Postpone(5, came.envelope.attempt, "busy", doubt, crash_count=crash_count))
    return found


def republished(came: Delivery, now: datetime, *, is_stopping: bool = True) -> Publication:
    return MESSAGES.republish(came, doubt_of_copy(came.envelope.doubt, came.envelope, now), is_stopping=is_stopping)


def failed(message: str = "", details: tuple[Detail, ...] = ()) -> Reply:
    error = ReplyError(code="invalid_command", message=message, details=details or None)
    return Reply(command_id="a", status="failed", error=error, attempts=1, completed_at=NOW)


REPLY = Reply(command_id="a", status="accepted", uuid="u", attempts=1, completed_at=NOW)


def delivery(
    headers: dict[str, Any] | None = None, *, returned: bool = False, redelivered: bool = False, **properties: Any
) -> Delivery:
    return Delivery(1, 1, redelivered, BasicProperties(headers=headers, **properties), b"body", returned)


def headers(publication: Publication) -> dict[str, Any]:
    """Return the headers, without the times that each copy has."""
    times = {FIRST_ARRIVED, DELAY}
    return {name: value for name, value in (publication.properties.headers or {}).items() if name not in times}


@pytest.mark.parametrize(("value", "attempt"), [(3, 3), (1, 1), (0, 1), (-2, 1), ("3", 1), (None, 1), (2**40, 2**40)])
def test_the_attempt_is_read_from_the_workers_own_header(value: object, attempt: int) -> None:
    assert delivery({"x-onenet-attempt": value}, returned=True).envelope.attempt == attempt
    assert delivery({"x-onenet-attempt": value}).envelope.attempt == 1


def test_a_moved_message_is_in_doubt_until_its_arrival() -> None:
    """To the broker it is a new message: whether it was delivered before, and sent, is lost."""
    for moved in (
        replace(delivery(), is_moved=True),
        replace(delivery({"x-onenet-attempt": 1, "x-onenet-in-doubt": str(DOUBT)}), is_moved=True),  # not believed
        delivery(returned=True),
        delivery({"tenant": "a"}, returned=True),
        delivery({"x-onenet-attempt": 1, "x-onenet-reason": "outcome_unknown"}, returned=True),  # a dead letter
        delivery({"x-onenet-attempt": 1, "x-death": [{"reason": "delivery_limit"}]}, returned=True),  # of the broker
    ):
        arrived_at = datetime.fromtimestamp(moved.arrived_at, UTC)
        assert moved.envelope.doubt == DoubtWindow(None, arrived_at)
        assert doubt_of_copy(moved.envelope.doubt, moved.envelope, NOW) == DoubtWindow(None, arrived_at)
        assert moved.envelope.attempt == 1
    rested = {"x-onenet-attempt": 1, "x-death": [{"reason": "expired", "queue": "onenet.execute.retry.5s"}]}
    for known in (delivery(), delivery({"x-onenet-attempt": 1}, returned=True), delivery(rested, returned=True)):
        assert known.envelope.doubt is None


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
def test_every_publication_fits_the_negotiated_frame(foreign: dict[Any, Any], frame_max: int) -> None:
    """A larger frame closes the connection, and the message is delivered again."""
    texts = ("content_type", "correlation_id", "reply_to", "message_id", "app_id")
    names: dict[str, Any] = dict.fromkeys(texts, "n" * 255)
    for returned in (False, True):
        came = delivery(foreign, returned=returned, **names)
        for publication in (
            reply_to(came, REPLY),
            retry(came, Retry(5, 2, "", DOUBT)),
            awaiting(came, 1, DOUBT, 3),
            republished(came, NOW),
            dead_letter(came, failed("é" * 9000, tuple([Detail(field="f", message="y" * 1000)] * 9))),
        ):
            sent = fitted(publication, frame_max)
            assert len(Header(1, len(sent.body), sent.properties).marshal()) <= frame_max
            assert (sent.exchange, sent.routing_key, sent.body) == (
                publication.exchange, publication.routing_key, publication.body,
            )  # fmt: skip
            own = {name: value for name, value in headers(publication).items() if str(name).startswith("x-onenet-")}
            lost = own.keys() - headers(sent).keys()
            assert lost <= {"x-onenet-details", "x-onenet-cc"}  # what is only there to be read


def test_a_publication_that_fits_the_frame_is_unchanged() -> None:
    publication = dead_letter(delivery({"tenant": "a" * 3000}), failed())
    assert fitted(publication, 4096) is publication


@pytest.mark.parametrize("name", ["CC", "BCC", "cc", "Bcc", " CC ", b"cc"])
def test_headers_that_route_to_further_queues_are_not_copied(name: str | bytes) -> None:
    table: dict[Any, Any] = {name: ["stolen"], "tenant": "a"}
    came = delivery(table)
    for publication in (
        retry(came, Retry(5, 2, "")),
        republished(came, NOW),
        dead_letter(came, failed()),
    ):
        found = headers(publication)
        assert name not in found
        assert found["tenant"] == "a"
        assert found.get("x-onenet-cc") == (["stolen"] if name == "CC" else None)


def test_a_plain_publication_keeps_only_the_body_and_the_ids_of_the_sender() -> None:
    came = delivery({"tenant": "a", "traceparent": "t"}, app_id="billing", reply_to="over.there")
    reply = plain(reply_to(came, REPLY))
    assert (reply.exchange, reply.routing_key) == ("onenet.replies", "execute.accepted.unknown")
    assert not reply.properties.headers
    copy = plain(retry(came, Retry(5, 2, "", DOUBT)))
    assert copy.routing_key == "onenet.execute.retry.5s"
    assert headers(copy).keys() == {"x-onenet-attempt", "x-onenet-in-doubt", "x-onenet-headers-dropped"}


def test_redelivery_attempt_and_doubt_tell_that_a_command_may_have_been_sent() -> None:
    assert not delivery().envelope.may_have_been_sent
    assert not delivery({"x-onenet-attempt": 1}, returned=True).envelope.may_have_been_sent
    assert delivery(redelivered=True).envelope.may_have_been_sent
    assert delivery({"x-onenet-attempt": 2}, returned=True).envelope.may_have_been_sent
    assert delivery({"x-onenet-in-doubt": "2026"}, returned=True).envelope.may_have_been_sent
    assert not delivery({"x-onenet-attempt": 2, "x-onenet-in-doubt": "2026"}).envelope.may_have_been_sent


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
def test_a_reply_is_routed_by_reply_to_or_status_and_app_id(properties: dict[str, Any], routing_key: str) -> None:
    found = reply_to(delivery(**properties), REPLY)
    assert (found.exchange, found.routing_key) == ("onenet.replies", routing_key)


ISOLATED = MessageBuilder(Topology("onenet", (5,)), "host:1", is_isolated=True)


@pytest.mark.parametrize(
    ("properties", "routing_key"),
    [
        ({"app_id": "billing", "user_id": "billing"}, "execute.accepted.billing"),
        ({"app_id": "billing", "user_id": "billing", "reply_to": "billing.x"}, "billing.x"),
        ({"app_id": "billing", "user_id": "billing", "reply_to": "metering.x"}, "execute.accepted.billing"),
        ({"app_id": "metering", "user_id": "billing", "reply_to": "metering.x"}, "execute.accepted.billing"),
        ({"app_id": "metering", "reply_to": "metering.x"}, "execute.accepted.unknown"),
    ],
    ids=str,
)
def test_between_isolated_systems_a_reply_goes_only_to_whom_the_broker_vouches_for(
    properties: dict[str, Any], routing_key: str
) -> None:
    [found] = ISOLATED.publications(delivery(**properties), Duplicate(REPLY))
    assert found.routing_key == routing_key


def test_the_user_of_a_message_is_known_of_its_copies_and_replays_too() -> None:
    came = delivery(user_id="billing", app_id="billing")
    copy = retry(came, Retry(5, 2, ""))
    assert copy.properties.user_id is None  # the broker takes no other user's name from the worker
    back = Delivery(1, 1, is_redelivered=False, properties=copy.properties, body=b"", is_returned=True)
    assert back.envelope.user_id == "billing"
    assert delivery({"x-onenet-user-id": "billing"}).envelope.user_id is None


def test_the_memory_of_a_message_is_that_of_its_decoded_headers() -> None:
    """Thirty times what they take in the frame."""
    plain_size = delivery().size
    assert delivery({f"{number:03x}": True for number in range(4096)}).size > plain_size + 300_000
    received = BasicProperties()
    received.decode(b"".join(BasicProperties(headers={"nested": [{}] * 1000}).encode()))
    assert (
        plain_size + 5_000 < delivery(dict(received.headers or {})).size < plain_size + 6_000
    )  # each takes five, as it came
    assert delivery({"raw": RawFieldValue(b"x" * 100_000)}).size > plain_size + 100_000


@pytest.mark.parametrize(
    "value", [b"V", b"t\x01", b"I\x00\x01\x02\x03", b"S\x00\x00\x00\x00", b"T" + bytes(8), b"F" + bytes(4)]
)
def test_the_size_of_a_message_is_what_its_headers_take_once_they_are_decoded(value: bytes) -> None:
    """Thousands of headers of five bytes take megabytes."""
    table = b"".join(b"\x04%04x" % number + value for number in range(10_000))
    encoded = BasicProperties.FLAG_HEADERS.to_bytes(2) + len(table).to_bytes(4) + table
    properties = BasicProperties()
    taken = retained_by(lambda: properties.decode(encoded))
    properties.decode(encoded)
    size = Delivery(1, 7, is_redelivered=False, properties=properties, body=b"", is_returned=False).size
    assert taken / 2 < size < 2 * taken


_WIDE = "\U0001f600" + "a" * 250  # one wide character makes each of the text's take four bytes
_NAMED = ("app_id", "correlation_id", "reply_to", "type", "content_type", "content_encoding", "user_id")


@pytest.mark.parametrize("is_escaped", [False, True])
@pytest.mark.parametrize(
    ("fields", "properties"),
    [
        ({}, {}),
        ({"args": "on"}, {"app_id": "billing", "user_id": "billing", "content_type": "application/json"}),
        ({"args": "\u5f00" * 600}, {}),
        ({"args": "\xe9" * 1_000}, {}),
        ({"args": "\U0001f600" + "p" * 2_000}, {}),
        ({"product": "\U0001f600" + "p" * 58_000}, {}),
        ({"product": "p" * 58_000}, {}),
        ({}, dict.fromkeys(_NAMED, _WIDE)),
        ({"args": "\U0001f600" + "p" * 1_500}, dict.fromkeys(_NAMED, _WIDE) | {"headers": {"wide": _WIDE}}),
    ],
    ids=range(9),
)
def test_the_size_of_a_message_covers_what_is_held_of_it(
    fields: dict[str, Any], properties: dict[str, Any], is_escaped: bool
) -> None:
    """Its properties and what is parsed of it too, as objects of Python, while it waits for its device."""
    bodies = [json.dumps(a_command(**fields), ensure_ascii=is_escaped).encode() for _ in range(20)]
    senders = [{"app_id": f"{number}{_WIDE}"[:240]} for number in range(20)]  # each of them is counted on its own
    tables = [b"".join(BasicProperties(**sender | properties).encode()) for sender in senders]
    queues = KeyedQueues(by_device=True, interval_s=0, clock=lambda: 0.0)
    held = []

    def hold(body: bytes, table: bytes) -> None:
        decoded = BasicProperties()
        decoded.decode(table)
        came = Delivery(1, 7, is_redelivered=False, properties=decoded, body=bytes(bytearray(body)), is_returned=False)
        task = read_task(came.envelope, came.body, ZoneInfo("Asia/Shanghai"), 0.0, size=came.size)
        assert task.command is not None
        queues.try_start(task)
        held.append((task, came))

    hold(bodies[0], tables[0])  # and all that is kept only once

    def hold_others() -> None:
        for body, table in zip(bodies[1:], tables[1:], strict=True):
            hold(body, table)

    taken = retained_by(hold_others)
    hold_others()
    assert taken < sum(came.size for _, came in held[1:]) + 2_000  # the queue itself


def test_the_brokers_record_of_deaths_is_not_copied() -> None:
    """With it the broker sees a cycle and drops the message silently on a later pass."""
    brokers = {
        "x-death": [{"count": 1}],
        "x-first-death-queue": "q",
        "x-last-death-reason": "expired",
        "x-delivery-count": 3,
    }
    came = delivery({**brokers, "tenant": "a"}, returned=True)
    for publication in (
        retry(came, Retry(5, 2, "")),
        awaiting(came, 1, DOUBT, 0),
        postponed(came, DOUBT),
        republished(came, NOW),
        dead_letter(came, failed()),
    ):
        assert not headers(publication).keys() & brokers.keys()
        assert headers(publication)["tenant"] == "a"


def test_a_retry_carries_its_attempt_to_the_delay_queue() -> None:
    found = retry(delivery({"x-onenet-attempt": 2}, returned=True, expiration="1"), Retry(600, 3, "429"))
    assert (found.exchange, found.routing_key) == ("onenet.retry", "onenet.execute.retry.600s")
    assert headers(found)["x-onenet-attempt"] == 3
    assert 540_000 <= int(str(found.properties.expiration)) <= 600_000
    assert retry(delivery(expiration="1"), Retry(5, 2, "429")).properties.expiration is None


def test_jitter_does_not_shorten_the_wait_that_the_platform_asked_for() -> None:
    assert retry(delivery(), Retry(600, 2, "429", honours_retry_after=True)).properties.expiration is None


def test_the_doubt_window_travels_in_a_header() -> None:
    found = awaiting(delivery({"x-onenet-attempt": 2}, returned=True), 3, DOUBT)
    assert (found.exchange, found.routing_key) == ("onenet.retry", "onenet.execute.retry.60s")
    assert found.properties.expiration is None  # jitter would shorten what must not be shorter
    assert headers(found) == {"x-onenet-attempt": 3, "x-onenet-in-doubt": str(DOUBT)}
    assert delivery(headers(found), returned=True).envelope.doubt == DOUBT
    assert headers(retry(delivery(), Retry(5, 2, "", DOUBT)))["x-onenet-in-doubt"] == str(DOUBT)


def test_a_doubt_window_is_believed_only_on_the_workers_own_copies() -> None:
    assert delivery({"x-onenet-in-doubt": str(DOUBT), "x-onenet-crash-count": 4}).envelope.doubt is None
    assert delivery({"x-onenet-crash-count": 4}).envelope.crash_count is None
    unreadable = delivery({"x-onenet-in-doubt": "since then"}, returned=True).envelope.doubt
    assert unreadable is not None
    assert unreadable.since is None


def test_a_republished_message_keeps_its_attempt_doubt_and_crash_count() -> None:
    fresh = republished(delivery(), NOW)
    assert (fresh.exchange, fresh.routing_key) == ("onenet.returns", "execute")
    assert headers(fresh) == {"x-onenet-attempt": 1, "x-onenet-unstarted": True}
    assert headers(republished(delivery(redelivered=True), NOW))["x-onenet-in-doubt"] == str(DoubtWindow(None, NOW))
    doubted = delivery({"x-onenet-in-doubt": str(DOUBT), "x-onenet-crash-count": 2}, returned=True)
    assert headers(republished(doubted, NOW)) == {
        "x-onenet-attempt": 1, "x-onenet-in-doubt": str(DOUBT), "x-onenet-crash-count": 2,
    }  # fmt: skip


def test_only_a_republished_message_says_that_it_was_not_started() -> None:
    again = delivery(headers(republished(delivery(), NOW)), returned=True)
    assert again.envelope.is_unstarted
    assert "x-onenet-unstarted" not in headers(postponed(again, None))
    assert "x-onenet-unstarted" in headers(republished(again, NOW))
    assert "x-onenet-unstarted" not in headers(republished(again, NOW, is_stopping=False))
    assert not delivery({"x-onenet-unstarted": True}).envelope.is_unstarted  # not believed


def test_a_copy_that_is_returned_unstarted_does_not_say_so() -> None:
    """The message that it was copied from may not be acknowledged, and be sent by another worker meanwhile."""
    copy = delivery(headers(postponed(delivery(), None)), returned=True)
    assert "x-onenet-unstarted" not in headers(republished(copy, NOW))


def test_a_postponed_message_keeps_its_attempt() -> None:
    found = headers(postponed(delivery({"x-onenet-attempt": 3}, returned=True), DOUBT, 1))
    assert found == {"x-onenet-attempt": 3, "x-onenet-in-doubt": str(DOUBT), "x-onenet-crash-count": 1}
    assert headers(postponed(delivery(), None)) == {"x-onenet-attempt": 1}


def test_the_reason_of_a_dead_letter_is_cut_to_fit_a_frame() -> None:
    reply = failed("é" * 100_000, tuple(Detail(field="f", message="y" * 1000) for _ in range(100)))
    found = dead_letter(delivery(), reply)
    assert (found.exchange, found.routing_key) == ("onenet.dead-letters", "execute.invalid_command")
    assert sum(map(len, found.properties.encode())) < 10_000
    assert headers(found)["x-onenet-reason"] == "invalid_command"
    assert headers(found)["x-onenet-worker"] == "host:1"
    assert len(json.loads(headers(found)["x-onenet-details"])) == 3


def test_only_a_failed_command_is_dead_lettered() -> None:
    assert len(MESSAGES.publications(delivery(), Conclude(Accepted("u"), REPLY))) == 1
    assert len(MESSAGES.publications(delivery(), Conclude(Failed("invalid_command", ""), failed()))) == 2


def test_a_duplicate_repeats_the_dead_letter_only_if_it_may_be_missing() -> None:
    assert len(MESSAGES.publications(delivery(), Duplicate(failed()))) == 1
    assert len(MESSAGES.publications(delivery(), Duplicate(failed(), repeats_all=True))) == 2


def test_nothing_is_published_for_a_message_that_a_copy_has_replaced() -> None:
    assert MESSAGES.publications(delivery(), Replaced(Duplicate(REPLY))) == []


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
def test_no_headers_of_a_sender_prevent_a_publication(table: dict[Any, Any], returned: bool) -> None:
    """A header that cannot be encoded again would crash the worker at each delivery."""
    encoded = b"".join(BasicProperties(headers=table).encode())
    came = delivery(dict(BasicProperties().decode(encoded).headers or {}), returned=returned)
    for publication in (
        reply_to(came, REPLY),
        retry(came, Retry(5, 2, "")),
        republished(came, NOW),
        dead_letter(came, failed()),
    ):
        publication.properties.encode()


@pytest.mark.parametrize(
    "value",
    [b"T" + (1_790_000_000_000).to_bytes(8), b"T" + b"\xff" * 8,
     b"d" + struct.pack(">d", 3.75), b"f" + struct.pack(">f", 0.5),
     b"D\x02" + (314).to_bytes(4), b"D\xff" + b"\xff" * 4, b"S" + (2).to_bytes(4) + b"\xbf\xaa"],
    ids=["milliseconds", "no-time", "double", "float", "decimal", "odd-decimal", "text in GBK"],
)  # fmt: skip
def test_header_values_that_pika_cannot_handle_are_copied_unchanged(value: bytes) -> None:
    entry = b"\x04when" + value
    encoded = b"\x20\x00" + len(entry).to_bytes(4) + entry  # the flag of headers, then a table of one
    came = delivery(dict(BasicProperties().decode(encoded).headers or {}))
    assert entry in b"".join(dead_letter(came, failed()).properties.encode())


def test_a_dead_letter_has_the_attempt_of_its_reply() -> None:
    """The message may have another one: a command that is sent after reconciliation continues its own count."""
    reply = failed().model_copy(update={"attempts": 4})
    came = delivery({"x-onenet-attempt": 3, "x-onenet-in-doubt": str(DOUBT), "x-onenet-crash-count": 1}, returned=True)
    found = headers(dead_letter(came, reply))
    assert found["x-onenet-attempt"] == 4
    assert not {"x-onenet-in-doubt", "x-onenet-crash-count"} & found.keys()


def test_a_copy_has_the_present_doubt_and_crash_count_not_the_former() -> None:
    """A former doubt or suspicion would delay the command for nothing."""
    came = delivery({"x-onenet-attempt": 2, "x-onenet-in-doubt": str(DOUBT), "x-onenet-crash-count": 1}, returned=True)
    assert headers(retry(came, Retry(5, 3, ""))) == {"x-onenet-attempt": 3}
    assert headers(postponed(came, None)) == {"x-onenet-attempt": 2}
    assert headers(awaiting(came, 2, DoubtWindow(None, NOW))) == {
        "x-onenet-attempt": 2, "x-onenet-in-doubt": str(DoubtWindow(None, NOW)),
    }  # fmt: skip


def test_forged_headers_are_not_copied() -> None:
    """On a copy that returns through the worker's own exchange they would be believed."""
    came = delivery({"x-onenet-attempt": 9, "x-onenet-in-doubt": str(DOUBT), "x-onenet-crash-count": 5})
    assert headers(postponed(came, None)) == {"x-onenet-attempt": 1}
    assert headers(republished(came, NOW)) == {"x-onenet-attempt": 1, "x-onenet-unstarted": True}


def test_a_doubt_window_without_beginning_travels_as_an_open_interval() -> None:
    found = headers(postponed(delivery(), DoubtWindow(None, NOW)))["x-onenet-in-doubt"]
    assert found == "../2026-08-05T00:00:00.000+00:00"
    assert delivery({"x-onenet-in-doubt": found}, returned=True).envelope.doubt == DoubtWindow(None, NOW)


@pytest.mark.parametrize(
    "value", ["since then", "", 5, b"\xff", True, "../2026-08-05T00:00:00", [], "../0001-01-01T00:00:00+23:00"]
)
def test_an_unreadable_doubt_window_reaches_until_the_arrival(value: object) -> None:
    """There was a request at an unknown time: only a window without beginning is sure to cover it."""
    before = datetime.now(UTC)
    found = delivery({"x-onenet-in-doubt": value}, returned=True)
    assert found.envelope.doubt is not None
    assert found.envelope.doubt.since is None
    assert before <= found.envelope.doubt.until <= datetime.now(UTC)
    assert found.envelope.may_have_been_sent
    assert headers(republished(found, NOW))["x-onenet-in-doubt"] == str(found.envelope.doubt)


@pytest.mark.parametrize(("value", "tries"), [(0, 0), (3, 3), (-1, None), ("3", None), (None, None)])
def test_the_crash_count_is_read_from_the_workers_own_header(value: object, tries: int | None) -> None:
    assert delivery({"x-onenet-crash-count": value}, returned=True).envelope.crash_count == tries
    assert delivery({"x-onenet-crash-count": value}).envelope.crash_count is None


def test_a_crash_count_of_zero_is_copied() -> None:
    """None and 0 differ: 0 says that the command is suspected and no attempt was announced yet."""
    found = headers(awaiting(delivery(), 1, DOUBT, 0))
    assert found["x-onenet-crash-count"] == 0
    assert "x-onenet-crash-count" not in headers(awaiting(delivery(), 1, DOUBT))


def test_a_republished_redelivery_extends_its_doubt_window() -> None:
    came = delivery({"x-onenet-in-doubt": str(DOUBT)}, returned=True, redelivered=True)
    assert headers(republished(came, NOW))["x-onenet-in-doubt"] == str(DoubtWindow(None, DOUBT.until))
    later = DOUBT.until + timedelta(seconds=9)
    assert headers(republished(came, later))["x-onenet-in-doubt"] == str(DoubtWindow(None, later))


@pytest.mark.parametrize(("value", "times"), [(10, 10), (0, 0), ("10", 0), (None, 0)])
def test_the_delivery_count_is_read_from_any_exchange(value: object, times: int) -> None:
    for returned in (False, True):
        assert delivery({"x-delivery-count": value}, returned=returned).envelope.times_returned == times


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
        (1, ARRIVED_AT),  # no queue keeps a command since 1970
        (1_780_000_000, ARRIVED_AT),
        (1_789_000_000, 1_789_000_000),  # ten days
        (2**63 - 1, ARRIVED_AT),
        (-1, ARRIVED_AT),
    ],
)
def test_a_command_is_timed_from_its_publication_or_first_arrival(published_at: int | None, began_at: float) -> None:
    properties = BasicProperties(timestamp=published_at)
    assert Delivery(1, 1, False, properties, b"", False, ARRIVED_AT).envelope.published_at == began_at


def test_the_first_arrival_is_copied_every_time() -> None:
    """The arrival of the copy itself would hide all the waiting before it."""
    first = Delivery(1, 1, False, BasicProperties(), b"", False, ARRIVED_AT)
    copy = retry(first, Retry(5, 2, "")).properties
    again = MESSAGES.republish(
        Delivery(1, 2, False, copy, b"", True, ARRIVED_AT + 5), None, is_stopping=False
    ).properties
    assert Delivery(1, 3, False, again, b"", True, ARRIVED_AT + 9).envelope.published_at == ARRIVED_AT
    assert (
        Delivery(1, 3, False, again, b"", False, ARRIVED_AT + 9).envelope.published_at == ARRIVED_AT + 9
    )  # not believed


def test_a_delayed_copy_says_from_when_until_when_it_rests() -> None:
    [copy] = MESSAGES.publications(delivery(), Retry(5, 2, "refused", None))
    since, until = copied(copy, ARRIVED_AT).envelope.delay or (0, 0)
    assert until - since == pytest.approx(5)


@pytest.mark.parametrize(
    ("delay", "left_s"),
    [
        ((-1, 59), 59),
        ((-55, 5), 0),  # within a tenth of the delay, as clocks differ
        ((-3, 2), 0),  # or within two seconds
        ((-61, -1), 0),
        ((3600, 3660), 0),  # the clock was set back meanwhile
    ],
)
def test_a_copy_that_comes_back_early_waits_for_what_is_left(delay: tuple[int, int], left_s: int) -> None:
    since, until = (1000 * (int(ARRIVED_AT) + offset) for offset in delay)
    copy = Delivery(1, 1, False, BasicProperties(headers={DELAY: f"{since}/{until}"}), b"", True, int(ARRIVED_AT))
    assert copy.envelope.delay_left_s == left_s


def test_a_copy_that_came_back_early_rests_until_the_same_time() -> None:
    """Otherwise a policy that shortens every delay would keep it circling for ever."""
    times = f"{int(ARRIVED_AT) * 1000 - 1000}/{int(ARRIVED_AT) * 1000 + 59000}"
    early = Delivery(1, 1, False, BasicProperties(headers={DELAY: times}), b"", True, int(ARRIVED_AT))
    [delayed] = MESSAGES.publications(early, Postpone(60, 1, "its delay queue returned it early"))
    for copy in (delayed, MESSAGES.republish(early, None, is_stopping=False)):
        assert (copy.properties.headers or {})[DELAY] == times


@pytest.mark.parametrize(
    "value", ["", "1", "1/", "a/b", 7, b"1/2", None, "1/" + "9" * 400], ids=lambda value: repr(value)[:9]
)
def test_an_unreadable_time_of_rest_is_none(value: object) -> None:
    assert delivery({DELAY: value}, returned=True).envelope.delay is None


def test_a_time_of_rest_from_upstream_is_not_believed() -> None:
    """A system must not be able to delay commands that it could not delay otherwise."""
    assert delivery({DELAY: "0/9999999999999"}).envelope.delay is None


def copied(publication: Publication, arrived_at: float) -> Delivery:
    return Delivery(1, 2, False, publication.properties, publication.body, True, arrived_at)


def test_a_first_arrival_that_cannot_be_is_no_beginning_of_a_duration() -> None:
    properties = BasicProperties(headers={"x-onenet-attempt": 2, "x-onenet-first-arrived": 1000})
    envelope = Delivery(1, 1, False, properties, b"", True, ARRIVED_AT).envelope
    assert (envelope.first_arrived_at, envelope.published_at) == (1, ARRIVED_AT)
