"""The messages that come in and go out: their properties and headers, read and written in one place."""

import json
import time
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from pika import BasicProperties, DeliveryMode

from schemas.reply import Reply, ReplyError, Status
from worker.amqp.topology import EXECUTE, Topology
from worker.core.backoff import spread_ms
from worker.core.doubt import DoubtWindow
from worker.core.outcome import AwaitReconciliation, Retry
from worker.core.replay import Replay

OWN_PREFIX = "x-onenet-"
ATTEMPT = "x-onenet-attempt"
IN_DOUBT = "x-onenet-in-doubt"
UNFINISHED = "x-onenet-unfinished"
UNCOUNTED = "x-onenet-uncounted"
FIRST_ARRIVED = "x-onenet-first-arrived"
REPLAY = "x-onenet-replay"
REASON = "x-onenet-reason"
ERROR = "x-onenet-error"
DETAILS = "x-onenet-details"
FAILED_AT = "x-onenet-failed-at"
_MARKS_OF_COPIES = frozenset({ATTEMPT, IN_DOUBT, UNFINISHED, UNCOUNTED, FIRST_ARRIVED, REPLAY})
_DELIVERY_COUNT = "x-delivery-count"
_MAX_SHORT_BYTES = 255
_MAX_TEXT_BYTES = 4096
# All properties travel in one frame, behind 8 bytes around every frame and 12 of their own before them.
# Source: https://www.rabbitmq.com/resources/specs/amqp0-9-1.pdf, 4.2.3 and 4.2.6.1
_FRAME_OVERHEAD_BYTES = 20
_BROKERS_SHARE = 16  # a sixteenth of the frame is left for what the broker adds later, such as its record of deaths
_MAX_CUT_TEXT_BYTES = 200
# The broker routes a publication to the queues that these name, whoever wrote them.
# Source: https://www.rabbitmq.com/docs/sender-selected
_ROUTING_HEADERS = frozenset({"cc", "bcc"})
# With its own record of former deaths a message looks like a cycle to the broker, which then drops it silently.
# Source: https://www.rabbitmq.com/docs/dlx#automatic-dead-letter-cycles
_BROKERS_PREFIXES = ("x-death", "x-first-death-", "x-last-death-", "x-delivery-count")


@dataclass(frozen=True, eq=False)
class Delivery:
    """One hand-over of a message; its tag is valid on the channel of its session only."""

    session: int
    tag: int
    exchange: str
    is_redelivered: bool
    properties: BasicProperties
    body: bytes
    is_returned: bool  # it came in through the worker's own exchange, so its headers are believed
    arrived_at: float = field(default_factory=time.time)  # seconds of the epoch
    is_moved: bool = False  # it came neither from upstream nor through the worker's own exchange: by a shovel, perhaps

    @property
    def message_id(self) -> object:
        """The AMQP property, None where it is not set; bytes where it is no UTF-8."""
        return self.properties.message_id

    @property
    def headers(self) -> Mapping[str, Any]:
        return self.properties.headers or {}

    @property
    def attempt(self) -> int:
        """Which attempt this is; the first is 1."""
        attempt = self.headers.get(ATTEMPT) if self.is_returned else None
        return attempt if isinstance(attempt, int) and attempt >= 1 else 1

    @property
    def may_have_been_sent(self) -> bool:
        """Tell whether, for all that the message says of itself, its command may have been sent before."""
        return self.is_redelivered or self.attempt > 1 or self.doubt is not None or self.replay is not None

    @property
    def doubt(self) -> DoubtWindow | None:
        """When its command may have been sent, as far as that is noted on the message.

        A message that was moved by an operator or a shovel is a new message to the broker, which no longer tells
        whether it was delivered before. So is one that came through the worker's own exchange but is no copy of its.
        """
        if self.is_moved or (self.is_returned and not self._is_own_copy):
            return DoubtWindow(None, datetime.fromtimestamp(self.arrived_at, UTC))
        text = self.headers.get(IN_DOUBT) if self.is_returned else None
        if text is None:
            return None
        try:
            return DoubtWindow.parse(str(text))
        except ValueError:
            return DoubtWindow(None, datetime.fromtimestamp(self.arrived_at, UTC))

    @property
    def _is_own_copy(self) -> bool:
        """Whether a worker or a replay wrote it in order to bring it back, and it has come back as it was to.

        A dead letter was not written for that, and a copy that the broker dead-lettered was delivered before.
        """
        deaths = self.headers.get("x-death")
        has_died = isinstance(deaths, list) and any(
            not isinstance(death, dict) or death.get("reason") != "expired" for death in deaths
        )
        return REASON not in self.headers and not has_died and not _MARKS_OF_COPIES.isdisjoint(self.headers)

    def doubt_of_copy(self, now: datetime) -> DoubtWindow | None:
        """Return the doubt to note on a copy: unlike the message itself, it does not look redelivered."""
        return DoubtWindow(None, now).union(self.doubt) if self.is_redelivered else self.doubt

    @property
    def unfinished(self) -> int | None:
        """How many tries were noted on the message before they began; None where it is under no suspicion.

        Those that ended well are among them: only a record, or its absence, tells.
        """
        tries = self.headers.get(UNFINISHED) if self.is_returned else None
        return tries if isinstance(tries, int) and tries >= 0 else None

    @property
    def replay(self) -> Replay | None:
        """A person's order to try it again, None where it is no replay."""
        text = self.headers.get(REPLAY) if self.is_returned else None
        try:
            failed_at = None if text is None else datetime.fromisoformat(str(text))
        except ValueError:
            return None
        return None if failed_at is None or failed_at.tzinfo is None else Replay(failed_at, self.doubt)

    @property
    def consumes_attempt(self) -> bool:
        """Whether the attempt that is in doubt is used up; the platform being down for all uses up none."""
        return not (self.is_returned and self.headers.get(UNCOUNTED) is True)

    @property
    def first_arrived_at(self) -> float:
        """When the command first came to a worker, in seconds of the epoch; noted on each copy of its message."""
        noted = self.headers.get(FIRST_ARRIVED) if self.is_returned else None
        return noted / 1000 if isinstance(noted, int) and 0 < noted / 1000 < self.arrived_at else self.arrived_at

    @property
    def began_at(self) -> float:
        """When the command was published, as far as its property tells, else when it first came to a worker."""
        published_at = self.properties.timestamp
        # Whole seconds: of less than one it says nothing.
        if isinstance(published_at, int) and 0 < published_at <= self.first_arrived_at - 1:
            return published_at
        return self.first_arrived_at

    @property
    def times_returned(self) -> int:
        """How often the broker took the message back, from a worker that had begun with it or had not."""
        count = self.headers.get(_DELIVERY_COUNT)
        return count if isinstance(count, int) else 0


@dataclass(frozen=True, slots=True)
class Publication:
    """One message to be published: persistent, mandatory, confirmed."""

    exchange: str
    routing_key: str
    properties: BasicProperties
    body: bytes
    status: Status | None = None  # where it is a reply: what it says became of the command


class MessageBuilder:
    """Writes everything that the worker publishes.

    Args:
        topology: where to.
        worker: the name under which this process signs dead letters.
    """

    def __init__(self, topology: Topology, worker: str) -> None:
        self._topology = topology
        self._worker = worker

    def reply(self, delivery: Delivery, reply: Reply) -> Publication:
        """Address an outcome to whoever sent the command."""
        asked = delivery.properties
        if isinstance(asked.reply_to, str) and asked.reply_to:
            routing_key = asked.reply_to
        else:
            source = asked.app_id if isinstance(asked.app_id, str) and asked.app_id else "unknown"
            routing_key = _cut(f"{EXECUTE}.{reply.status}.{source}", _MAX_SHORT_BYTES)
        traced = {name: delivery.headers.get(name) for name in ("traceparent", "tracestate")}
        trace: dict[str, Any] = {
            name: value
            for name, value in traced.items()
            if isinstance(value, str) and len(value.encode()) <= _MAX_TEXT_BYTES
        }
        properties = BasicProperties(
            content_type="application/json",
            type="execute.reply",
            delivery_mode=DeliveryMode.Persistent,
            correlation_id=asked.correlation_id or reply.command_id,
            headers=trace or None,
        )
        body = reply.model_dump_json().encode()
        return Publication(self._topology.replies_exchange, routing_key, properties, body, reply.status)

    def dead_letter(self, delivery: Delivery, reply: Reply) -> Publication:
        """Set a message aside as it came, with the reason that its reply has.

        Raises:
            ValueError: the reply is not one of a failure.
        """
        failed = reply.error
        if reply.status != "failed" or failed is None:
            raise ValueError("only what failed is dead-lettered")
        headers: dict[str, Any] = {
            REASON: failed.code,
            ERROR: _cut(failed.message, _MAX_TEXT_BYTES),
            DETAILS: _details(failed),
            ATTEMPT: reply.attempts,
            FAILED_AT: reply.completed_at.isoformat(timespec="milliseconds"),
            "x-onenet-worker": self._worker,
        }
        properties = _carried_along(delivery, headers)
        exchange = self._topology.dead_letters_exchange
        return Publication(exchange, f"{EXECUTE}.{failed.code}", properties, delivery.body)

    def retry(self, delivery: Delivery, again: Retry, doubt: DoubtWindow | None) -> Publication:
        """Send a message to rest until its next attempt."""
        properties = _copied(delivery, again.attempt, doubt)
        spread = None if again.honours_retry_after else spread_ms(again.delay_s)
        properties.expiration = None if spread is None else str(spread)
        return self._to_rest(delivery, again.delay_s, properties)

    def settle(
        self, delivery: Delivery, settle: AwaitReconciliation, delay_s: int, doubt: DoubtWindow, unfinished: int | None
    ) -> Publication:
        """Send a message to rest until its device's history can tell what became of its attempt."""
        properties = _copied(delivery, settle.attempt, doubt, unfinished, consumes_attempt=settle.consumes_attempt)
        return self._to_rest(delivery, delay_s, properties)

    def postpone(
        self, delivery: Delivery, delay_s: int, doubt: DoubtWindow | None, unfinished: int | None
    ) -> Publication:
        """Send a message to rest because it cannot be handled now; no attempt is used up."""
        properties = _copied(delivery, delivery.attempt, doubt, unfinished, consumes_attempt=delivery.consumes_attempt)
        return self._to_rest(delivery, delay_s, properties)

    def hand_back(self, delivery: Delivery, doubt: DoubtWindow | None) -> Publication:
        """Put a message that was not started back into the queue; unlike a requeued one it looks new."""
        properties = _copied(
            delivery, delivery.attempt, doubt, delivery.unfinished, consumes_attempt=delivery.consumes_attempt
        )
        return Publication(self._topology.returns_exchange, EXECUTE, properties, delivery.body)

    def replay(self, delivery: Delivery, replay: Replay) -> Publication:
        """Bring a dead letter back to be tried from the beginning."""
        own: dict[str, Any] = {REPLAY: replay.failed_at.isoformat(timespec="milliseconds"), UNCOUNTED: True}
        if replay.doubt is not None:
            own[IN_DOUBT] = str(replay.doubt)
        return Publication(self._topology.returns_exchange, EXECUTE, _carried_along(delivery, own), delivery.body)

    def _to_rest(self, delivery: Delivery, delay_s: int, properties: BasicProperties) -> Publication:
        routing_key = self._topology.retry_queue(delay_s)
        return Publication(self._topology.retry_exchange, routing_key, properties, delivery.body)


def _copied(
    delivery: Delivery,
    attempt: int,
    doubt: DoubtWindow | None,
    unfinished: int | None = None,
    *,
    consumes_attempt: bool = True,
) -> BasicProperties:
    own: dict[str, Any] = {ATTEMPT: attempt, FIRST_ARRIVED: round(delivery.first_arrived_at * 1000)}
    if not consumes_attempt:
        own[UNCOUNTED] = True
    if doubt is not None:
        own[IN_DOUBT] = str(doubt)
    if unfinished is not None:
        own[UNFINISHED] = unfinished
    if delivery.replay is not None:  # it may not have been claimed yet, or its record may go
        own[REPLAY] = delivery.headers[REPLAY]
    return _carried_along(delivery, own)


def _carried_along(delivery: Delivery, own: dict[str, Any]) -> BasicProperties:
    """Return the original properties with our headers, and without what would harm a second publication.

    The broker refuses a ``user_id`` that is not the publisher's own, by closing the channel; an ``expiration`` would
    end a delay early and take a dead letter away; headers ``CC`` and ``BCC`` would route each copy to further queues.
    The first three stay readable in headers of ours.
    """
    original = delivery.properties
    foreign = {_text(name): value for name, value in delivery.headers.items()}
    headers: dict[str, Any] = {
        name: value
        for name, value in delivery.headers.items()
        if not _text(name).startswith((*_BROKERS_PREFIXES, OWN_PREFIX))
        and _text(name).strip().casefold() not in _ROUTING_HEADERS
    }
    harmful = {"user-id": original.user_id, "expiration": original.expiration, "cc": foreign.get("CC")}
    for name, value in harmful.items():
        header = OWN_PREFIX + name
        kept = value or (delivery.headers.get(header) if delivery.is_returned else None)
        if kept and len(repr(kept)) <= _MAX_TEXT_BYTES:
            own[header] = kept
    return BasicProperties(
        content_type=original.content_type,
        content_encoding=original.content_encoding,
        headers=headers | own,
        delivery_mode=DeliveryMode.Persistent,
        priority=original.priority,
        correlation_id=original.correlation_id,
        reply_to=original.reply_to,
        message_id=original.message_id,
        timestamp=original.timestamp,
        type=original.type,
        app_id=original.app_id,
        cluster_id=original.cluster_id,
    )


def fitted(publication: Publication, frame_max: int) -> Publication:
    """Return a publication whose properties fit a frame: unchanged if they do, otherwise with fewer headers.

    A frame that is too large ends the connection, each time that the message comes.

    Args:
        publication: what is to be published.
        frame_max: the largest frame that the broker takes on this connection, in bytes.
    """
    if not publication.properties.headers:
        return publication  # the other properties have 255 bytes each at most, so that they fit every frame
    limit = frame_max - frame_max // _BROKERS_SHARE - _FRAME_OVERHEAD_BYTES
    if _size(publication.properties) <= limit:
        return publication
    own = _own_headers(publication.properties)
    reduced = _with_headers(publication.properties, own)
    if _size(reduced) > limit:
        own = {name: value for name, value in own.items() if name not in {DETAILS, OWN_PREFIX + "cc"}}
        if ERROR in own:
            own[ERROR] = _cut(str(own[ERROR]), _MAX_CUT_TEXT_BYTES)
        reduced = _with_headers(publication.properties, own)
    return replace(publication, properties=reduced)


def plain(publication: Publication) -> Publication:
    """Return a publication in which no header and no routing key is a sender's choice.

    For a message over whose publication the broker has closed a channel or a connection.
    """
    # A reply's key may be the sender's, and one that the worker may not write to.
    routing_key = publication.routing_key if publication.status is None else f"{EXECUTE}.{publication.status}.unknown"
    properties = _with_headers(publication.properties, _own_headers(publication.properties))
    return replace(publication, routing_key=routing_key, properties=properties)


def _own_headers(properties: BasicProperties) -> dict[str, Any]:
    headers: Mapping[str, Any] = properties.headers or {}
    own = {name: value for name, value in headers.items() if _text(name).startswith(OWN_PREFIX)}
    if own and len(own) < len(headers):  # a reply has none of ours
        own["x-onenet-headers-dropped"] = "the message's own headers could not be published"
    return own


def _with_headers(properties: BasicProperties, headers: dict[str, Any]) -> BasicProperties:
    changed = copy(properties)
    changed.headers = headers or None
    return changed


def _size(properties: BasicProperties) -> int:
    return sum(map(len, properties.encode()))


def _details(error: ReplyError) -> str:
    """Return the details as JSON: as many of them as a header can carry."""
    details = [detail.model_dump() for detail in error.details or ()]
    while len(text := json.dumps(details)) > _MAX_TEXT_BYTES:
        details.pop()
    return text


def _text(name: object) -> str:
    return name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)


def _cut(text: str, most_bytes: int) -> str:
    return text.encode()[:most_bytes].decode("utf-8", "ignore")
