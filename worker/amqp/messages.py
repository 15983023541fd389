"""The messages that arrive and that are published: the one place where headers are read and written."""

import json
import re
import sys
import time
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from operator import attrgetter
from typing import Any, assert_never

from pika import BasicProperties, DeliveryMode

from schemas.command import MAX_ARGS_BYTES, MAX_BODY_BYTES
from schemas.reply import Reply, ReplyError, Status
from worker.amqp.bodies import TruncatedBody
from worker.amqp.field_table import RawFieldValue, decoded
from worker.amqp.topology import EXECUTE, Topology
from worker.core.backoff import spread_ms
from worker.core.command import Command
from worker.core.doubt_window import DoubtWindow
from worker.core.envelope import Envelope, Replay
from worker.core.resolution import AwaitReconciliation, Conclude, Duplicate, Postpone, Replaced, Resolution, Retry
from worker.core.tenants import own_reply_to
from worker.core.times import parse_instant

REPLY_TYPE, RESULT_TYPE = "execute.reply", "execute.result"  # the AMQP property type
OWN_PREFIX = "x-onenet-"
ATTEMPT = "x-onenet-attempt"
IN_DOUBT = "x-onenet-in-doubt"
CRASH_COUNT = "x-onenet-crash-count"
FREE_ATTEMPT = "x-onenet-free-attempt"
FIRST_ARRIVED = "x-onenet-first-arrived"
UNSTARTED = "x-onenet-unstarted"
DELAY = "x-onenet-delay"
REPLAY = "x-onenet-replay"
REPLAY_CODE = "x-onenet-replay-code"
REPLY_COPY = "x-onenet-reply-copy"  # of a replay: the end of the routing key for a copy of its reply
REPLY_COPIES = "replay"  # the first word of those keys
PROBE = "x-onenet-probe"  # of a message that only shows whether messages come back: nothing becomes of it
REASON = "x-onenet-reason"
ERROR = "x-onenet-error"
DETAILS = "x-onenet-details"
FAILED_AT = "x-onenet-failed-at"
USER_ID = "x-onenet-user-id"
_HEADERS_DROPPED = "x-onenet-headers-dropped"
_HEADERS_OF_COPIES = frozenset({ATTEMPT, IN_DOUBT, CRASH_COUNT, FREE_ATTEMPT, FIRST_ARRIVED, REPLAY})
_TRACE = ("traceparent", "tracestate")
_DELIVERY_COUNT = "x-delivery-count"
_MAX_SHORT_BYTES = 255
_REPLY_COPY = re.compile(r"[0-9a-f]{32}\.[0-9]{1,9}\Z")
_texts_of = attrgetter(
    "content_type",
    "content_encoding",
    "correlation_id",
    "reply_to",
    "expiration",
    "message_id",
    "type",
    "user_id",
    "app_id",
    "cluster_id",
)
_MESSAGE_BYTES = 1_700  # what a message takes in this process beside its texts
# The texts that are kept of a body: args, the ids and a product, or what is wrong with it.
_KEPT_TEXT_BYTES = MAX_ARGS_BYTES + 500
# Characters, as such or escaped, with which each character of a Python string takes four bytes; with other ones that
# are not ASCII it takes two at most.
_WIDE = re.compile(rb"[\xf0-\xff]|\\u[dD][89abAB]")
_MAX_TEXT_BYTES = 4096
# All properties are sent in one frame: 8 bytes of framing and 12 bytes of content header are added to them.
# Source: https://www.rabbitmq.com/resources/specs/amqp0-9-1.pdf, 4.2.3 and 4.2.6.1
_FRAME_OVERHEAD_BYTES = 20
_BROKERS_SHARE = 16  # a sixteenth of the frame is left for what the broker adds later, such as its record of deaths
_MAX_CUT_TEXT_BYTES = 200
# Older times are ignored: a queue keeps no command for a month, and one wrong time of a sender, such as 1970, would
# outweigh all durations that are measured.
_MAX_WAIT_S = 30 * 24 * 3600.0
# The broker routes a publication to the queues that these name, no matter which client set them.
# Source: https://www.rabbitmq.com/docs/sender-selected
_ROUTING_HEADERS = frozenset({"cc", "bcc"})
# With its own record of former deaths a message looks like a cycle to the broker, which then drops it silently.
# Source: https://www.rabbitmq.com/docs/dlx#automatic-dead-letter-cycles
_BROKERS_PREFIXES = ("x-death", "x-first-death-", "x-last-death-", "x-delivery-count")


@dataclass(frozen=True, eq=False)
class Delivery:
    """One hand-over of a message; its tag is valid on the channel of its session only.

    Attributes:
        session: the number of the session.
        tag: the delivery tag.
        is_redelivered: the broker delivered the message before.
        properties: the message's properties.
        body: the message's body.
        is_returned: the message arrived through the worker's own exchange, so its headers are believed.
        arrived_at: seconds of the epoch.
        is_moved: the message came neither from upstream nor through the worker's own exchange: a shovel moved it, or an
            operator.
        is_excess: so much is held that this one has to be given back.
    """

    session: int
    tag: int
    is_redelivered: bool
    properties: BasicProperties
    body: bytes
    is_returned: bool
    arrived_at: float = field(default_factory=time.time)
    is_moved: bool = False
    is_excess: bool = False

    @property
    def is_truncated(self) -> bool:
        """Whether the body is only the beginning of the message's, so that no copy may be published."""
        return isinstance(self.body, TruncatedBody)

    @property
    def headers(self) -> Mapping[str, Any]:
        """The message's headers."""
        return self.properties.headers or {}

    @cached_property
    def size(self) -> int:
        """How much memory the message takes at most, with what is parsed of it, in bytes.

        Not what it takes on the wire: thousands of small headers take thirty times that, and a text with one wide
        character five times.
        """
        properties = sum(map(sys.getsizeof, _texts_of(self.properties)))
        headers = _memory(self.properties.headers) if self.properties.headers else 0
        return _MESSAGE_BYTES + len(self.body) + _memory_of_texts(self.body) + properties + headers

    @cached_property
    def envelope(self) -> Envelope:
        """What the delivery says of itself, without the broker's terms."""
        headers = self.headers
        if not headers and not self.is_returned and not self.is_moved:  # as most commands arrive
            return Envelope(
                is_redelivered=self.is_redelivered,
                arrived_at=self.arrived_at,
                first_arrived_at=self.arrived_at,
                published_at=self._published_at(self.arrived_at),
                message_id=self.properties.message_id,
                app_id=self._app_id,
                user_id=self._user_id,
                reply_to=self._reply_to,
            )
        own = headers if self.is_returned else {}
        doubt = self._doubt()
        first_arrived_at = self._first_arrived_at(own)
        return Envelope(
            is_redelivered=self.is_redelivered,
            is_copy=self.is_returned,
            times_returned=_count(headers.get(_DELIVERY_COUNT)) or 0,
            attempt=_count(own.get(ATTEMPT)) or 1,
            is_free_attempt=own.get(FREE_ATTEMPT) is True,
            is_unstarted=own.get(UNSTARTED) is True,
            crash_count=_count(own.get(CRASH_COUNT)),
            doubt=doubt,
            replay=_replay(own.get(REPLAY), doubt, own.get(REPLAY_CODE)),
            arrived_at=self.arrived_at,
            first_arrived_at=first_arrived_at,
            delay=_delay(own.get(DELAY)),
            published_at=self._published_at(first_arrived_at),
            message_id=self.properties.message_id,
            app_id=self._app_id,
            user_id=self._user_id,
            reply_to=self._reply_to,
            trace={name: headers[name] for name in _TRACE if isinstance(headers.get(name), str)},
        )

    @property
    def _app_id(self) -> str:
        named = self.properties.app_id
        return named if isinstance(named, str) else ""

    @property
    def _user_id(self) -> str | None:
        """The user for whom the broker vouched when the message was published to the worker's exchange."""
        user_id = self.headers.get(USER_ID) if self.is_returned else self.properties.user_id
        return user_id if isinstance(user_id, str) else None

    @property
    def _reply_to(self) -> str | None:
        asked = self.properties.reply_to
        return asked if isinstance(asked, str) and asked else None

    def _doubt(self) -> DoubtWindow | None:
        """Return when the command may have been sent, as far as the message says.

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
        """Whether a worker or a replay published this message to bring it back, and it came back as planned.

        A dead letter was not published for that, and a copy that the broker dead-lettered was delivered before.
        """
        deaths = decoded(self.headers.get("x-death"))
        has_died = isinstance(deaths, list) and any(
            not isinstance(death, dict) or death.get("reason") != "expired" for death in deaths
        )
        return REASON not in self.headers and not has_died and not _HEADERS_OF_COPIES.isdisjoint(self.headers)

    def _first_arrived_at(self, own: Mapping[str, Any]) -> float:
        noted = own.get(FIRST_ARRIVED)
        return noted / 1000 if isinstance(noted, int) and 0 < noted / 1000 < self.arrived_at else self.arrived_at

    def _published_at(self, first_arrived_at: float) -> float:
        """Return the time from which metrics count: the first that can be, of those that the message tells."""
        noted, earliest = self.properties.timestamp, self.arrived_at - _MAX_WAIT_S
        # The property has whole seconds: of less than one it says nothing.
        if isinstance(noted, int) and earliest <= noted <= first_arrived_at - 1:
            return noted
        return first_arrived_at if first_arrived_at >= earliest else self.arrived_at


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and value >= 0 else None


def _delay_text(since: float, until: float) -> str:
    return f"{round(since * 1000)}/{round(until * 1000)}"


def _delay(text: object) -> tuple[float, float] | None:
    since, _, until = str(text).partition("/")
    try:
        return None if text is None else (int(since) / 1000, int(until) / 1000)
    except (ValueError, OverflowError):  # the latter for hundreds of digits
        return None


def _replay(text: object, doubt: DoubtWindow | None, code: object) -> Replay | None:
    try:
        return None if text is None else Replay(parse_instant(str(text)), doubt, code if isinstance(code, str) else "")
    except ValueError:
        return None


@dataclass(frozen=True, slots=True)
class Publication:
    """One message to be published: persistent, mandatory, confirmed."""

    exchange: str
    routing_key: str
    properties: BasicProperties
    body: bytes
    status: Status | None = None  # where it is a reply: what it says became of the command
    plain_key: str | None = None  # of a reply or a result: a routing key of which no part was chosen by its receiver


class MessageBuilder:
    """Builds everything that the worker publishes: what a resolution means in exchanges, routing keys and headers.

    Args:
        topology: where to publish.
        worker: the name under which this process signs dead letters.
        is_isolated: the upstream systems do not trust each other, so that none may choose where a reply goes.
        await_result: returns what brings an accepted command back for its result; None: results are off.
    """

    def __init__(
        self,
        topology: Topology,
        worker: str,
        *,
        is_isolated: bool = False,
        await_result: Callable[[Delivery, Command, Reply], Publication] | None = None,
    ) -> None:
        self._topology = topology
        self._worker = worker
        self._is_isolated = is_isolated
        self._await_result = await_result

    def publications(
        self, delivery: Delivery, resolution: Resolution, command: Command | None = None
    ) -> list[Publication]:
        """Return what must be confirmed before a delivery is acknowledged.

        Args:
            delivery: that is to be acknowledged.
            resolution: what becomes of it.
            command: that it carries, if it does.
        """
        match resolution:
            case Conclude(_, reply):
                return [self._reply(delivery, reply), *self._with_reply(delivery, reply, command)]
            case Duplicate(reply, repeats_all):
                return [
                    self._reply(delivery, reply),
                    *(self._with_reply(delivery, reply, command) if repeats_all else ()),
                ]
            case Retry(delay_s, attempt, _, doubt, honours_retry_after):
                properties = _copied(delivery, attempt, doubt)
                return [self._delayed(delivery, delay_s, properties, has_jitter=not honours_retry_after)]
            case AwaitReconciliation(delay_s, attempt, _, doubt, is_free, crash_count):
                properties = _copied(delivery, attempt, doubt, crash_count, is_free=is_free)
                return [self._delayed(delivery, delay_s, properties, has_jitter=False)]
            case Postpone(delay_s, attempt, _, doubt, is_free, crash_count, _, has_jitter):
                properties = _copied(delivery, attempt, doubt, crash_count, is_free=is_free)
                return [self._delayed(delivery, delay_s, properties, has_jitter=has_jitter)]
            case Replaced():
                return []
            case _:
                assert_never(resolution)

    def reply_copy(self, delivery: Delivery, resolution: Resolution) -> Publication | None:
        """Return a copy of the reply for who replayed the command and waits; None: nobody asked for one.

        Nothing depends on it, so it goes where nobody else reads, and the broker drops it if nobody waits any more. A
        binding for the reply itself would take that from the exchange of the unrouted ones.
        """
        copied_to = _reply_copy(delivery)
        if copied_to is None or not isinstance(resolution, Conclude | Duplicate):
            return None
        properties = BasicProperties(content_type="application/json", type=REPLY_TYPE)
        body = resolution.reply.model_dump_json().encode()
        return Publication(self._topology.control_exchange, f"{REPLY_COPIES}.{copied_to}", properties, body)

    def republish(self, delivery: Delivery, doubt: DoubtWindow | None, *, is_stopping: bool) -> Publication:
        """Return a message that was not started to the queue; unlike a requeued message it looks new.

        Args:
            delivery: the message.
            doubt: when its command may have been sent.
            is_stopping: this process takes nothing more. One that goes on may send the command for the original, if
                that is not acknowledged, and then lose its memory.
        """
        envelope = delivery.envelope
        properties = _copied(
            delivery,
            envelope.attempt,
            doubt,
            envelope.crash_count,
            is_free=envelope.is_free_attempt,
            # Another copy may have a twin: the message that it was copied from, if that was not acknowledged.
            is_unstarted=is_stopping and (envelope.is_unstarted or not envelope.is_copy),
        )
        return Publication(self._topology.returns_exchange, EXECUTE, properties, delivery.body)

    def replay(self, delivery: Delivery, replay: Replay, reply_copy: str | None = None) -> Publication:
        """Return a dead letter to the queue, to be tried from the beginning.

        Args:
            delivery: the dead letter.
            replay: which failure it repeats.
            reply_copy: the end of the routing key for a copy of the reply, behind ``REPLY_COPIES``; None: no copy.
        """
        own: dict[str, Any] = {REPLAY: replay.failed_at.isoformat(timespec="milliseconds"), FREE_ATTEMPT: True}
        if replay.doubt is not None:
            own[IN_DOUBT] = str(replay.doubt)
        if replay.code:
            own[REPLAY_CODE] = replay.code
        if reply_copy is not None:
            own[REPLY_COPY] = reply_copy
        return Publication(self._topology.returns_exchange, EXECUTE, _carried_along(delivery, own), delivery.body)

    def _with_reply(self, delivery: Delivery, reply: Reply, command: Command | None) -> list[Publication]:
        """Return what belongs to a reply: a dead letter, or what brings an accepted command back for its result."""
        if reply.status == "failed" and reply.error is not None:
            return [self._dead_letter(delivery, reply, reply.error)]
        if reply.status == "accepted" and command is not None and self._await_result is not None:
            return [self._await_result(delivery, command, reply)]
        return []

    def _reply(self, delivery: Delivery, reply: Reply) -> Publication:
        """Address an outcome to the sender of the command."""
        asked, usual = delivery.properties, f"{EXECUTE}.{reply.status}"
        routing_key = address(delivery.envelope, usual, is_isolated=self._is_isolated)
        properties = BasicProperties(
            content_type="application/json",
            type=REPLY_TYPE,
            delivery_mode=DeliveryMode.Persistent,
            correlation_id=asked.correlation_id or reply.command_id,
            headers=trace_of(delivery.envelope) or None,
        )
        body = reply.model_dump_json().encode()
        plain_key = f"{usual}.unknown"
        return Publication(self._topology.replies_exchange, routing_key, properties, body, reply.status, plain_key)

    def _dead_letter(self, delivery: Delivery, reply: Reply, failed: ReplyError) -> Publication:
        """Set a message aside unchanged, with the reason that its reply gives."""
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

    def _delayed(
        self, delivery: Delivery, delay_s: int, properties: BasicProperties, *, has_jitter: bool
    ) -> Publication:
        spread = spread_ms(delay_s) if has_jitter else None
        properties.expiration = None if spread is None else str(spread)
        since = time.time()
        delay = _delay_text(since, since + (delay_s if spread is None else spread / 1000))
        properties.headers = {DELAY: delay, **(properties.headers or {})}
        routing_key = self._topology.retry_queue(delay_s)
        return Publication(self._topology.retry_exchange, routing_key, properties, delivery.body)


def _reply_copy(delivery: Delivery) -> str | None:
    asked = delivery.headers.get(REPLY_COPY) if delivery.is_returned else None
    return asked if isinstance(asked, str) and _REPLY_COPY.match(asked) else None


def _copied(
    delivery: Delivery,
    attempt: int,
    doubt: DoubtWindow | None,
    crash_count: int | None = None,
    *,
    is_free: bool = False,
    is_unstarted: bool = False,
) -> BasicProperties:
    envelope = delivery.envelope
    # What came back unstarted cannot have been sent before it arrived here.
    arrived_at = envelope.arrived_at if envelope.is_unstarted else envelope.first_arrived_at
    own: dict[str, Any] = {ATTEMPT: attempt, FIRST_ARRIVED: round(arrived_at * 1000)}
    if is_free:
        own[FREE_ATTEMPT] = True
    if is_unstarted:
        own[UNSTARTED] = True
    if envelope.delay is not None and envelope.delay_left_s:
        own[DELAY] = _delay_text(*envelope.delay)  # it came back early, and its delays end when the first was to end
    if doubt is not None:
        own[IN_DOUBT] = str(doubt)
    if crash_count is not None:
        own[CRASH_COUNT] = crash_count
    if envelope.replay is not None:  # it may not have been claimed yet, or its record may go
        own[REPLAY] = delivery.headers[REPLAY]
    if (copied_to := _reply_copy(delivery)) is not None:
        own[REPLY_COPY] = copied_to
    return _carried_along(delivery, own)


def _carried_along(delivery: Delivery, own: dict[str, Any]) -> BasicProperties:
    """Return the original properties with our headers, and without what would harm a second publication.

    The broker refuses a ``user_id`` that is not the publisher's own, by closing the channel; an ``expiration`` would
    end a delay early and take a dead letter away; headers ``CC`` and ``BCC`` would route each copy to further queues.
    The first three stay readable in headers of ours. The broker needs seconds to read a header with thousands of
    levels, in which it confirms nothing else of this connection (2.3 s for 10,000, four times as much for twice as
    many, measured on RabbitMQ 3.10).
    """
    original = delivery.properties
    foreign = {_text(name): value for name, value in delivery.headers.items()}
    headers = {
        name: value
        for name, value in without_brokers_headers(delivery.headers).items()
        if not _text(name).startswith(OWN_PREFIX)
    }
    if too_deep := [name for name, value in headers.items() if isinstance(value, RawFieldValue) and value.is_deep]:
        headers = {name: headers[name] for name in headers if name not in too_deep}
        own[_HEADERS_DROPPED] = "those of the message's own headers that are nested too deeply"
    elif delivery.is_returned and _HEADERS_DROPPED in delivery.headers:
        own[_HEADERS_DROPPED] = delivery.headers[_HEADERS_DROPPED]
    harmful = {"user-id": original.user_id, "expiration": original.expiration, "cc": foreign.get("CC")}
    for name, value in harmful.items():
        header = OWN_PREFIX + name
        kept = value or (delivery.headers.get(header) if delivery.is_returned else None)
        if kept and len(repr(kept)) <= _MAX_TEXT_BYTES:
            own[header] = kept
    carried = _with_headers(original, headers | own)
    carried.delivery_mode = DeliveryMode.Persistent.value
    carried.user_id = carried.expiration = None
    return carried


def without_brokers_headers(headers: Mapping[str, Any]) -> dict[str, Any]:
    """Return headers without those that the broker writes or routes by, which would harm a second publication."""
    return {
        name: value
        for name, value in headers.items()
        if not _text(name).startswith(_BROKERS_PREFIXES) and _text(name).strip().casefold() not in _ROUTING_HEADERS
    }


def fitted(publication: Publication, frame_max: int) -> Publication:
    """Return a publication whose properties fit a frame: unchanged if they do, otherwise with fewer headers.

    A frame that is too large ends the connection, each time that the message comes.

    Args:
        publication: the message to publish.
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
    properties = _with_headers(publication.properties, _own_headers(publication.properties))
    return replace(publication, routing_key=publication.plain_key or publication.routing_key, properties=properties)


def _own_headers(properties: BasicProperties) -> dict[str, Any]:
    headers: Mapping[str, Any] = properties.headers or {}
    own = {name: value for name, value in headers.items() if _text(name).startswith(OWN_PREFIX)}
    if own and len(own) < len(headers):  # a reply has none of ours
        own[_HEADERS_DROPPED] = "the message's own headers could not be published"
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


def _memory_of_texts(body: bytes) -> int:
    """Return the most memory that the texts take which are kept of a body once it is parsed, in bytes."""
    if len(body) > MAX_BODY_BYTES:
        return 0  # it is not parsed
    kept = min(len(body), _KEPT_TEXT_BYTES)
    if body.isascii() and b"\\u" not in body:
        return kept
    return kept * (5 if _WIDE.search(body) else 3)  # Python may keep a text in UTF-8 beside it


def _memory(headers: Mapping[Any, Any]) -> int:
    """Return the memory that what headers contain takes, in bytes."""
    taken = sum(map(sys.getsizeof, headers)) + sum(map(sys.getsizeof, headers.values()))
    return taken + sum(len(value.encoded) for value in headers.values() if isinstance(value, RawFieldValue))


def _text(name: object) -> str:
    return name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)


def trace_of(envelope: Envelope) -> dict[str, Any]:
    """Return the headers with which what is told to a command's sender continues its trace."""
    return {name: value for name, value in envelope.trace.items() if len(value.encode()) <= _MAX_TEXT_BYTES}


def address(envelope: Envelope, usual: str, *, is_isolated: bool) -> str:
    """Return the routing key of what is told to a command's sender.

    Args:
        envelope: of the command.
        usual: the key's first words.
        is_isolated: the upstream systems do not trust each other, so that none may choose where it goes.
    """
    reply_to = own_reply_to(envelope) if is_isolated else envelope.reply_to
    # Where app_id is not the user's name, the user is the one who has to know.
    source = (envelope.user_id if is_isolated else envelope.app_id) or "unknown"
    return reply_to or _cut(f"{usual}.{source}", _MAX_SHORT_BYTES)


def _cut(text: str, most_bytes: int) -> str:
    return text.encode()[:most_bytes].decode("utf-8", "ignore")
