"""Follows the orders of operators, over a connection of its own, and answers them."""

import asyncio
import itertools
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

from pika import BasicProperties, URLParameters
from pika.channel import Channel

from worker.amqp.channel import BrokerChannel
from worker.amqp.control_messages import (
    FIRST,
    LAST,
    NOTHING,
    PREFETCH,
    beginning_at,
    offset_of,
    order_publication,
    report_publication,
)
from worker.amqp.declaring import DECLARE_S, declare_part
from worker.amqp.messages import Publication
from worker.amqp.publisher import CLOSE_S
from worker.amqp.side_channel import open_side_channel
from worker.amqp.topology import QUESTION, Topology
from worker.amqp.unrouted_watch import UnroutedWatch
from worker.core.backoff import backoff_s
from worker.core.pauses import Order, Pauses, WorkerReport, read_order
from worker.errors import BrokerUnavailable, ClosedByBroker, UserRefused, WorkerError
from worker.telemetry.logs import get_logger

_SEEMS_EMPTY_S = 0.1  # without a message for so long the stream may be empty, which a mark finds out
_READ_S = 30.0  # longest wait for the next message of a stream that is not empty
_UNMARKED_S = 2.0  # longest wait for the first message where this user may not write a mark
_MISSING_AGAIN_S = 5.0
_REFUSED_AGAIN_S = 60.0
_TOLD_AGAIN_S = 60.0
_BACKOFF_BASE_S, _BACKOFF_CAP_S = 0.5, 10.0
_ACCESS_REFUSED, _NOT_FOUND = 403, 404
_MAX_QUESTIONS = 100  # that wait for an answer

log = get_logger()


class ControlReader:
    """Follows the orders that last, from the control stream, and questions, from a queue of its own.

    A stream does not say where it ends. So a consumer that begins with the last message tells how far the others have
    to be read; into a stream that seems to be empty a mark is written, which is its last message then. Not again by the
    same worker: the stream keeps so many bytes, and marks must not drive orders out of it.
    Source: https://www.rabbitmq.com/docs/streams#consuming

    Args:
        topology: has the stream.
        declare: whether to declare it.
        on_pauses: called with the pauses by hand, once they are known and whenever they may have changed.
        on_order: called with each order that is given while the worker runs, after ``on_pauses``.
        report: describes the worker.
        watch: of unrouted replies, over the same connection.
    """

    def __init__(
        self,
        topology: Topology,
        on_pauses: Callable[[Pauses], object],
        on_order: Callable[[Order], object],
        report: Callable[[], WorkerReport],
        watch: UnroutedWatch,
        *,
        declare: bool,
    ) -> None:
        self.is_caught_up = asyncio.Event()
        """Set while all earlier orders are known, or the broker has refused to tell them."""
        self._topology = topology
        self._may_declare = declare
        self._wants_declaring = declare  # before the next look into the stream
        self._on_pauses = on_pauses
        self._on_order = on_order
        self._report = report
        self._watch = watch
        self._pauses = Pauses()
        self._may_write = True  # as far as this session knows
        self._told: tuple[str, float] = ("", 0.0)  # why orders could not be followed, and when it was logged
        self._had_messages = False  # the stream, when it was last read
        self._has_written = False  # over the present channel
        self._channel: BrokerChannel | None = None  # while orders are followed

    async def follow(self, nodes: Sequence[URLParameters], name: str) -> None:
        """Follow orders until cancelled.

        Args:
            nodes: the brokers, tried in turn.
            name: of the connection, in the broker's list of connections.
        """
        self._may_write = True
        failures = 0
        for node in itertools.cycle(nodes):
            channel = BrokerChannel()
            self._has_written = False
            try:
                await channel.open(node, name)
                await self._declare(channel)
                await self._catch_up(channel)
                self._channel = channel
                self._watch.begin(channel.pika_connection)
                self._hear_questions(channel)
                failures = 0
                error: WorkerError = await asyncio.shield(channel.lost)
            except BrokerUnavailable as exc:
                error = exc
            finally:
                self._channel = None
                await asyncio.wait([asyncio.ensure_future(channel.close())], timeout=CLOSE_S)
            failures += 1
            await asyncio.sleep(self._wait_s(error, failures))

    def publish(self, publication: Publication) -> None:
        """Publish something that only a person waits for; it is dropped where that is not possible."""
        if self._channel is not None and self._may_write:
            self._publish(self._channel, publication)

    def _wait_s(self, error: WorkerError, failures: int) -> float:
        """Return when to try again after an error, in seconds, and log it if orders cannot be followed for now."""
        code = error.code if isinstance(error, ClosedByBroker) else None
        if code is not None and self._wants_declaring:  # what is there may be usable all the same
            self._wants_declaring = False
            log.warning("topology_not_declared", reason=str(error))
            return 0.0
        if code == _ACCESS_REFUSED and self._has_written and self._may_write:
            self._may_write = False
            log.warning("control_not_answered", reason=str(error), hint="orders are followed all the same")
            return 0.0
        wait_s = backoff_s(failures, _BACKOFF_BASE_S, _BACKOFF_CAP_S)
        if code == _NOT_FOUND:
            self._wants_declaring = self._may_declare  # the stream was deleted, or never declared
        if code in {_ACCESS_REFUSED, _NOT_FOUND} or isinstance(error, UserRefused):
            self.is_caught_up.set()  # a worker that cannot be paused by hand is better than none
            wait_s = _MISSING_AGAIN_S if code == _NOT_FOUND else _REFUSED_AGAIN_S
        self._tell_unavailable(str(error), wait_s)
        return wait_s

    def _tell_unavailable(self, reason: str, retry_in_s: float) -> None:
        """Log why orders cannot be followed, the same reason once a minute."""
        now = asyncio.get_running_loop().time()
        if self._told[0] != reason or now - self._told[1] > _TOLD_AGAIN_S:
            log.warning("control_unavailable", reason=reason, retry_in_s=round(retry_in_s, 1))
            self._told = (reason, now)

    async def _declare(self, channel: BrokerChannel) -> None:
        """Declare the stream, once or after it was missing.

        Raises:
            BrokerUnavailable: the channel is lost, or the broker does not answer in time.
        """
        if not self._wants_declaring:
            return
        try:
            async with asyncio.timeout(DECLARE_S):
                await declare_part(channel, self._topology.control)
        except TimeoutError as exc:
            raise BrokerUnavailable(f"{self._topology.control_stream} was not declared within {DECLARE_S:g} s") from exc
        self._wants_declaring = False

    async def _catch_up(self, channel: BrokerChannel) -> None:
        """Read all orders that are in the stream, and begin to follow those to come.

        Raises:
            BrokerUnavailable: the channel is lost, or the stream cannot be read.
        """
        await channel.call(channel.pika_channel.basic_qos, prefetch_count=PREFETCH)
        end = await self._find_end(channel)
        pauses, arrived = Pauses(), asyncio.Event()
        is_live = end == NOTHING

        def on_message(properties: BasicProperties, body: bytes) -> None:
            nonlocal is_live, pauses
            order = read_order(body)
            if is_live:
                self._follow_order(channel, order)
                return
            pauses = pauses if order is None else pauses.changed(order)
            is_live = offset_of(properties) >= end
            if is_live:
                self._know(pauses)
            arrived.set()

        if is_live:
            self._know(pauses)
        await self._consume(channel, FIRST, on_message)
        while not is_live:
            await _next_message(channel, arrived)
            arrived.clear()

    async def _find_end(self, channel: BrokerChannel) -> int:
        """Return the place of the last message, of which there may be some more by now.

        Raises:
            BrokerUnavailable: the channel is lost, or no message comes although there is one.
        """
        found, arrived = NOTHING, asyncio.Event()
        is_filled, self._had_messages = self._had_messages, False

        def on_message(properties: BasicProperties, _body: bytes) -> None:
            nonlocal found
            found = offset_of(properties)
            arrived.set()

        tag = await self._consume(channel, LAST, on_message)
        try:
            async with asyncio.timeout(_SEEMS_EMPTY_S if self._may_write else _UNMARKED_S):
                await channel.until_lost(asyncio.ensure_future(arrived.wait()))
        except TimeoutError:
            if self._may_write and not is_filled:
                mark = Order(id=str(uuid4()), kind="mark", at=datetime.now(UTC))
                self._publish(channel, order_publication(self._topology, mark))
            if self._may_write or is_filled:  # then it is not empty
                await _next_message(channel, arrived)
        await channel.cancel(tag)
        self._had_messages = found != NOTHING
        return found

    async def _consume(
        self, channel: BrokerChannel, offset: str, on_message: Callable[[BasicProperties, bytes], None]
    ) -> str:
        """Read the stream from a place on; returns the consumer's tag."""

        def take(_channel: object, method: Any, properties: BasicProperties, body: bytes) -> None:
            channel.invoke(channel.pika_channel.basic_ack, method.delivery_tag)  # gives the broker credit, no more
            on_message(properties, body)

        tag = f"control-{offset}"
        await channel.call(
            channel.pika_channel.basic_consume,
            self._topology.control_stream,
            on_message_callback=take,
            consumer_tag=tag,
            arguments=beginning_at(offset),
        )
        return tag

    def _hear_questions(self, channel: BrokerChannel) -> None:
        """Take questions from a queue of this connection; without the right to declare one none is answered."""
        queue = self._topology.questions_queue(str(uuid4()))

        def on_message(_channel: Channel, _method: Any, _properties: BasicProperties, body: bytes) -> None:
            self._follow_order(channel, read_order(body))

        def consume(side: Channel) -> None:
            side.queue_declare(queue, exclusive=True, arguments={"x-max-length": _MAX_QUESTIONS})
            side.queue_bind(queue, self._topology.control_exchange, QUESTION)
            side.basic_consume(queue, on_message, auto_ack=True)

        open_side_channel(
            channel.pika_connection,
            consume,
            lambda reason: log.warning("control_not_answered", reason=reason, hint="pauses are followed all the same"),
        )

    def _know(self, pauses: Pauses) -> None:
        """Take over the pauses that earlier orders have left in force."""
        former, self._pauses = self._pauses, pauses
        for order in pauses.orders:
            if order not in former.orders:
                _log(order)
        in_force = {order.scope for order in pauses.orders}
        for order in former.orders:
            if order.scope not in in_force:
                why = "while the control stream could not be read"
                log.info("resumed_by_hand", product=order.scope, is_for_all=order.scope is None, by="", reason=why)
        self._on_pauses(pauses)
        self.is_caught_up.set()

    def _follow_order(self, channel: BrokerChannel, order: Order | None) -> None:
        """Do what is ordered now, and answer."""
        if order is None or order.kind == "mark":
            return
        _log(order)
        self._pauses = self._pauses.changed(order)
        self._on_pauses(self._pauses)
        self._on_order(order)
        if self._may_write:
            self._publish(channel, report_publication(self._topology, order, self._report()))

    def _publish(self, channel: BrokerChannel, publication: Publication) -> None:
        self._has_written = True
        channel.invoke(
            channel.pika_channel.basic_publish,
            publication.exchange,
            publication.routing_key,
            publication.body,
            publication.properties,
        )


def _log(order: Order) -> None:
    scope = {"product": order.scope, "is_for_all": order.scope is None}
    facts = {**scope, "by": order.by, "ordered_at": order.at.isoformat(timespec="seconds"), "reason": order.reason}
    match order.kind:
        case "pause":
            log.warning("paused_by_hand", **facts)
        case "resume":
            log.info("resumed_by_hand", **facts)
        case "probe":
            log.info("probe_by_hand", **facts)


async def _next_message(channel: BrokerChannel, arrived: asyncio.Event) -> None:
    """Wait for a message of a stream that is not empty.

    Raises:
        BrokerUnavailable: the channel is lost, or none arrived in time.
    """
    try:
        async with asyncio.timeout(_READ_S):
            await channel.until_lost(asyncio.ensure_future(arrived.wait()))
    except TimeoutError as exc:
        raise BrokerUnavailable(f"the control stream gave no message within {_READ_S:g} s") from exc
