"""Consumes one queue over a channel of its own: prefetch, cancellation and acknowledgements."""

import asyncio
import itertools
import math
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pika.channel import Channel
from pika.spec import BasicProperties

from schemas.command import MAX_BODY_BYTES
from worker.amqp.bodies import MAX_KEPT_BYTES
from worker.amqp.channel import BrokerChannel
from worker.amqp.connection import CALL_S
from worker.amqp.messages import PROBE, Delivery
from worker.amqp.topology import Topology
from worker.core.shares import Shares

if TYPE_CHECKING:
    from worker.core.envelope import Sender

LARGE_MESSAGE_S = 1.0  # for so long nothing is read beside it; the others must not wait for a broker that is slow
MAX_HELD_BYTES = 12 * 1024 * 1024  # of memory, which what is published for them takes twice more
# One sender may hold three times what is free: alone three quarters, and another one finds room at any time. Source:
# Choudhury, Hahne, "Dynamic queue length thresholds for shared-memory packet switches", doi.org/10.1109/90.664262
SHARE_OF_FREE = 3
SMALL_BYTES = 4 * 1024  # messages that take no more are held beyond that: all that the prefetch allows need some MiB
MANY_RETURNS = 3  # a message that was returned this often may be one that crashes workers
CAUTIOUS_DELIVERIES = 20  # with few returns, in a row, after one with many: then several are taken at once again


@dataclass(frozen=True, slots=True)
class Source:
    """A queue to consume from.

    Attributes:
        queue: its name.
        is_cautious: whether to take what was returned many times alone, because it may have crashed the workers.
    """

    queue: str
    is_cautious: bool


class QueueConsumer:
    """Consumes a queue and settles its deliveries.

    Args:
        session: number of the session, which each delivery carries.
        topology: tells which exchange brings the worker's own messages.
        source: what to consume from.
        channel: open; nothing is consumed before ``consume``.
        on_delivery: called with each delivery.
        on_acknowledged: called with delivery tags after their acknowledgements were written to the connection.
        run_in_background: runs a coroutine until it ends or the session is closed.
    """

    def __init__(
        self,
        session: int,
        topology: Topology,
        source: Source,
        channel: BrokerChannel,
        on_delivery: Callable[[Delivery], None],
        on_acknowledged: Callable[[Sequence[int]], None],
        run_in_background: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:
        self.channel = channel
        self._session = session
        self._topology = topology
        self._source = source
        self._on_delivery = on_delivery
        self._on_acknowledged = on_acknowledged
        self._run_in_background = run_in_background
        self._loop = asyncio.get_running_loop()
        self._consumer_tag: str | None = None
        self._consumer_numbers = itertools.count(1)
        self._consumer_prefetch = 0  # of that consumer
        self._prefetch = 0
        self._wanted_prefetch = 0
        self._is_cautious = source.is_cautious  # one delivery at a time
        self._cautious_deliveries_left = 1
        # Tags, the oldest first, with who sent each and how much it takes of the memory that all share, in bytes; None:
        # it takes none, because it is given back.
        self._unacknowledged: dict[int, tuple[Sender, int] | None] = {}
        self._held: Shares[Sender] = Shares()  # the sums
        self._unacknowledged_of_consumer: set[int] = set()  # without those of cancelled ones
        self._to_acknowledge: list[int] = []  # tags, to be sent at the end of this iteration of the loop
        self._large_bodies: dict[int, int] = {}  # tags of messages with too large a body, and how much of it is kept
        self._bound_bodies()
        self._large: set[int] = set()  # tags of large deliveries, during which nothing else is read
        self._to_return: list[int] = []  # tags of what arrived while a consumer was cancelled, and takes much memory
        self._is_cancelling = False
        self._consumer_change = asyncio.Lock()
        self._waiters: set[asyncio.Future[None]] = set()  # for the next settlement

    async def consume(self, prefetch: int) -> None:
        """Set the number of deliveries held unacknowledged at once; 0: take no new ones. Held deliveries stay valid.

        From a cautious source a session begins with a single delivery. Several are taken only after one that was not
        returned many times: a message that crashes every worker would otherwise drive up the delivery count of all the
        others, until the broker dead-letters them too.

        The broker does not change the prefetch of a consumer that exists, so each change is another consumer. There is
        one at a time: of two, each would get a part of what a device was sent, and the broker would return both parts
        one after the other when the connection is lost.
        Source: https://www.rabbitmq.com/docs/consumer-prefetch

        Raises:
            WorkerError: the channel is lost.
        """
        self._wanted_prefetch = prefetch
        await self._apply_prefetch()

    async def renew(self) -> None:
        """Replace the consumer by another one: of a queue with a single active consumer, another may be served then.

        Raises:
            WorkerError: the channel is lost.
        """
        await self._apply_prefetch(force_new_consumer=True)

    async def _apply_prefetch(self, *, force_new_consumer: bool = False) -> None:
        """Replace the consumer by one with the wanted prefetch, as it is by then.

        A larger prefetch waits until the present one is used up, and is needed only then.
        """
        async with self._consumer_change:
            prefetch = self._allowed_prefetch
            if prefetch == self._prefetch and not force_new_consumer:
                return
            self._send_acknowledgements()
            if 0 < self._prefetch < prefetch and not self._is_used_up and not force_new_consumer:
                return  # the delivery that uses it up continues here
            held = await self._cancel_consumer()
            prefetch = self._allowed_prefetch  # what arrived meanwhile may have changed it
            # The one delivery taken alone counts too, or there would be one too many. Others stay held for longer,
            # behind busy devices, and must not take the place of those for devices that are free.
            more = prefetch - held if self._prefetch == 1 < prefetch else prefetch
            self._prefetch = prefetch
            if more:
                await self._start_consumer(more)

    async def _start_consumer(self, prefetch: int) -> None:
        channel, queue = self.channel.pika_channel, self._source.queue
        # Ascending: the broker returns what several consumers of a lost channel held in the order of their tags, and
        # the cancelled ones hold what came earlier (measured).
        consumer_tag = f"{next(self._consumer_numbers):08}"
        self._consumer_prefetch = prefetch  # before the broker's reply: deliveries may come with it
        await self.channel.call(channel.basic_qos, prefetch_count=prefetch)
        await self.channel.call(
            channel.basic_consume, queue, on_message_callback=self._on_message, consumer_tag=consumer_tag
        )
        self._consumer_tag = consumer_tag

    async def _cancel_consumer(self) -> int:
        """Cancel the consumer, if there is one; returns how many unacknowledged deliveries it holds.

        What arrives before the broker's reply is held like what came before it, a prefetch at most. Large messages are
        returned to the queue then: to read nothing beside each of them would delay the reply.
        """
        if self._consumer_tag is None:
            return 0
        consumer_tag, self._consumer_tag = self._consumer_tag, None
        self._is_cancelling = True
        self.resume_reading()
        await self.channel.cancel(consumer_tag)
        self._is_cancelling = False
        held = len(self._unacknowledged_of_consumer)
        self._unacknowledged_of_consumer.clear()
        to_return, self._to_return = self._to_return, []
        for tag in to_return:  # not before, or the cancelled consumer would get it again
            self.requeue(tag)
        return held

    @property
    def _allowed_prefetch(self) -> int:
        return min(self._wanted_prefetch, 1) if self._is_cautious else self._wanted_prefetch

    @property
    def _is_used_up(self) -> bool:
        """Whether the broker sends nothing more to this consumer until a delivery of it is acknowledged."""
        return len(self._unacknowledged_of_consumer) >= self._consumer_prefetch

    @property
    def unacknowledged(self) -> int:
        """The number of unacknowledged deliveries."""
        return len(self._unacknowledged)

    @property
    def consumers(self) -> int:
        """How many consumers the broker has registered over this channel."""
        return int(self._consumer_tag is not None)

    @property
    def is_changing(self) -> bool:
        """Whether a consumer is being replaced, for which the broker may take its time."""
        return self._consumer_change.locked()

    async def look_at_queue(self, queue: str | None = None) -> tuple[int, int]:
        """Return the numbers of ready messages and of consumers of a queue, by default of the one that is consumed.

        Raises:
            WorkerError: the channel is lost.
            TimeoutError: the broker did not reply in time; the channel stays in use.
        """
        # Over this channel: during an alarm the broker does not read the publisher's connection.
        channel = self.channel.pika_channel
        async with asyncio.timeout(CALL_S):
            frame = await self.channel.call_untimed(channel.queue_declare, queue or self._source.queue, passive=True)
        return frame.method.message_count, frame.method.consumer_count

    def acknowledge(self, tag: int) -> None:
        """Acknowledge a delivery at the end of this iteration of the loop."""
        if not self._to_acknowledge:
            self._loop.call_soon(self._send_acknowledgements)
        self._to_acknowledge.append(tag)

    def reject(self, tag: int) -> None:
        """Reject a delivery, so that the broker dead-letters it."""
        self.channel.invoke(self.channel.pika_channel.basic_reject, tag, requeue=False)
        self._settle([tag])

    def requeue(self, tag: int) -> None:
        """Return a delivery to the queue; it is redelivered with ``redelivered`` set."""
        self.channel.invoke(self.channel.pika_channel.basic_nack, tag)  # which requeues
        self._settle([tag])

    def take_next_beside(self, tag: int) -> None:
        """Take the next delivery although this one, which was to be alone, stays unacknowledged.

        It was handled without crashing the worker, but a publication for it may be rejected for long: the next delivery
        must not wait for it.
        """
        if tag in self._large:
            self._forget_large(tag)
        if self._is_cautious and tag in self._unacknowledged_of_consumer:
            has_room = len(self._unacknowledged) < self._wanted_prefetch
            self._run_in_background(self._apply_prefetch(force_new_consumer=has_room))

    def resume_reading(self) -> None:
        """Read from the connection again, large deliveries or not."""
        self._large.clear()
        if not self.channel.lost.done():
            self.channel.resume_reading()

    async def drain(self) -> None:
        """Wait until no delivery is unacknowledged.

        Raises:
            WorkerError: the channel is lost.
        """
        while self._unacknowledged:
            await self._next_settlement()

    def _on_message(self, _channel: Channel, method: Any, properties: BasicProperties, body: bytes) -> None:
        if self.channel.lost.done():
            return  # the broker delivers it again, to the next session
        tag: int = method.delivery_tag
        if method.exchange == self._topology.returns_exchange and PROBE in (properties.headers or {}):
            self.channel.invoke(self.channel.pika_channel.basic_ack, tag)
            return
        exchange = method.exchange
        delivery = Delivery(
            self._session,
            tag,
            method.redelivered,
            properties,
            body,
            is_returned=exchange == self._topology.returns_exchange,
            is_moved=exchange in self._topology.exchanges_closed_to_upstream,
        )
        sender, size = delivery.envelope.sender, delivery.size
        if len(body) > MAX_BODY_BYTES:
            size -= len(body)  # large bodies have a bound of their own, so that they take no other sender's room
        self._unacknowledged[tag] = sender, size
        if self._is_excess(delivery, self._held.add(sender, size)):
            self._held.remove(sender, size)
            self._unacknowledged[tag] = None
            delivery = replace(delivery, is_excess=True)
        is_large = len(body) > MAX_BODY_BYTES or delivery.is_excess
        if is_large and self._is_cancelling:
            self._to_return.append(tag)
            return
        self._unacknowledged_of_consumer.add(tag)
        self._adapt_caution(delivery)
        if self._is_used_up and 0 < self._prefetch < self._allowed_prefetch:
            self._run_in_background(self._apply_prefetch())
        if len(body) > MAX_BODY_BYTES:
            self._large_bodies[tag] = len(body)
            self._bound_bodies()
        if is_large:
            self._read_nothing_beside(tag)
        self._on_delivery(delivery)

    def _is_excess(self, delivery: Delivery, share: int) -> bool:
        """Tell whether its sender takes so much that this one is given back; too large a body is refused at once."""
        is_large = delivery.size > SMALL_BYTES and len(delivery.body) <= MAX_BODY_BYTES
        return is_large and self._prefetch > 1 and share > SHARE_OF_FREE * (MAX_HELD_BYTES - self._held.total)

    def _adapt_caution(self, delivery: Delivery) -> None:
        """Take one delivery at a time after one with many returns, until enough with few returns have come."""
        if not self._source.is_cautious:
            return
        was_cautious = self._is_cautious
        # The first condition because a sender may have written the count.
        if delivery.is_redelivered and delivery.envelope.times_returned >= MANY_RETURNS:
            self._is_cautious, self._cautious_deliveries_left = True, CAUTIOUS_DELIVERIES
        elif self._is_cautious and len(delivery.body) <= MAX_BODY_BYTES:  # a large one is taken alone anyway
            self._cautious_deliveries_left -= 1
            self._is_cautious = self._cautious_deliveries_left > 0
        if self._is_cautious and not was_cautious:
            self._run_in_background(self._apply_prefetch())

    def _bound_bodies(self) -> None:
        """Keep no more of the next body than there is room for: those that are held may stay as long as an alarm."""
        self.channel.most_body_bytes = max(MAX_BODY_BYTES, MAX_KEPT_BYTES - sum(self._large_bodies.values()))

    def _read_nothing_beside(self, tag: int) -> None:
        """Leave all other messages with the broker until this large one is settled: each of them may be as large."""
        self._large.add(tag)
        self.channel.pause_reading()
        self._loop.call_later(LARGE_MESSAGE_S, self._forget_large, tag)

    def _forget_large(self, tag: int) -> None:
        self._large.discard(tag)
        if not self._large:
            self.resume_reading()

    def _send_acknowledgements(self) -> None:
        """Acknowledge with one frame everything older than the oldest delivery in progress, and the rest one by one."""
        tags, self._to_acknowledge = self._to_acknowledge, []
        if self.channel.lost.done():
            return
        self._settle(tags)
        oldest_in_progress = next(iter(self._unacknowledged), math.inf)
        acknowledge = self.channel.pika_channel.basic_ack
        if older := [tag for tag in tags if tag < oldest_in_progress]:
            self.channel.invoke(acknowledge, max(older), multiple=True)
        for tag in set(tags).difference(older):
            self.channel.invoke(acknowledge, tag)
        self._loop.call_soon(self._on_acknowledged, tags)  # what pika wrote leaves before: it was scheduled before

    def _settle(self, tags: Sequence[int]) -> None:
        for tag in tags:
            if (held := self._unacknowledged.pop(tag, None)) is not None:
                self._held.remove(*held)
            self._unacknowledged_of_consumer.discard(tag)
            if self._large_bodies.pop(tag, 0):
                self._bound_bodies()
            if tag in self._large:
                self._forget_large(tag)
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def _next_settlement(self) -> None:
        waiter: asyncio.Future[None] = self._loop.create_future()
        self._waiters.add(waiter)
        try:
            await self.channel.until_lost(waiter)
        finally:
            self._waiters.discard(waiter)
