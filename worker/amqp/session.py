"""One attachment to the broker, from connecting to the first fault: two links with one fate.

One link consumes and acknowledges, the other publishes, because the broker stops reading a connection that publishes
while it is short of memory or disk, and acknowledgements must get through all the same. Whatever breaks, a connection,
a channel, the consumer, ends the session: everything unacknowledged comes again, to the next one. Only a publisher
whose publications the broker goes on refusing is replaced without that.
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

from pika import URLParameters
from pika.channel import Channel
from pika.spec import BasicProperties

from schemas.command import MAX_BODY_BYTES
from worker.amqp.connecting import CALL_S, address
from worker.amqp.link import Link
from worker.amqp.messages import Delivery, Publication, plain
from worker.amqp.publisher import InFlight, Publisher, Settlement
from worker.amqp.suspects import Suspects
from worker.amqp.topology import Queue, Topology
from worker.errors import BrokerUnavailable, ChannelRefused, TopologyMismatch, WorkerError
from worker.telemetry.logs import get_logger

SATURATE_S = 1.0
LARGE_BODY_S = (
    10.0  # less than the two heartbeats after which either side gives up a connection that it hears nothing of
)
FEW_RETURNS = 3  # a message that came back so often may be what ends the workers
CALM_DELIVERIES = 20  # so many messages without such a past, after one with it, and several are taken at once again
MAX_REFUSALS = 3  # of one publication, or
REFUSED_S = 5.0  # for so long: then the publisher is replaced
_REPLACE_CAP_S = 60.0
_RETIRE_S = 10.0  # how long what a replaced publisher has published may take to be confirmed
_PRECONDITION_FAILED = 406
_ACCESS_REFUSED = 403

log = get_logger()


class Session:
    """Consumes, publishes with confirms and acknowledges, all on the event loop's thread.

    Args:
        number: tells the deliveries of this session from those of every other.
        topology: what to consume from.
        nodes: the brokers; the session is with the first, and its publisher may be replaced by one with another.
        suspects: remembers over which messages the broker closed a connection.
        on_delivery: takes each delivery.
        on_blocked: is told when the broker stops taking publications (True), and when it takes them again (False).
    """

    def __init__(
        self,
        number: int,
        topology: Topology,
        nodes: Sequence[URLParameters],
        suspects: Suspects,
        on_delivery: Callable[[Delivery], None],
        on_blocked: Callable[[bool], None],
    ) -> None:
        self.number = number
        self.lost: asyncio.Future[WorkerError] = asyncio.get_running_loop().create_future()
        self.consumers_found = 0
        self._topology = topology
        self._nodes = nodes
        self._name = ""
        self._suspects = suspects
        self._on_delivery = on_delivery
        self._on_blocked = on_blocked
        self._loop = asyncio.get_running_loop()
        self._consuming = Link()
        self._publisher = self._new_publisher()
        self._consumer_tag: str | None = None
        self._prefetch = 0
        self._wanted_prefetch = 0
        self._calm_for: int | None = CALM_DELIVERIES - 1  # deliveries without a past so far; None: several are taken
        self._unacknowledged: set[int] = set()
        self._unacknowledged_of_consumer: set[int] = set()  # which alone count towards its prefetch
        self._large: set[int] = set()  # tags of deliveries beside which no other is read
        self._held_back: list[int] | None = None
        self._consumer_change = asyncio.Lock()
        self._progress = asyncio.Event()
        self._replacements = 0  # of the publisher, as long as there are refusals
        self._replace_at = 0.0  # not before this
        self._refused_at = 0.0  # the last time
        self._background: set[asyncio.Task[None]] = set()

    async def open(self, name: str, *, declare: bool) -> None:
        """Connect, and declare the topology or check that it is there.

        Raises:
            BrokerUnavailable: the broker cannot be reached, or the topology is not there yet.
            TopologyMismatch: it is there, but different, or this user may not declare it.
        """
        self._name = name
        parameters = self._nodes[0]
        await self._consuming.open(parameters, f"{name} consume")
        await self._publisher.open(parameters, f"{name} publish")
        self._consuming.lost.add_done_callback(lambda lost: self._fail(lost.result()))
        self._share_fate(self._publisher)
        try:
            await (self._declare() if declare else self._check())
        except ChannelRefused as exc:
            if exc.code == _PRECONDITION_FAILED:
                raise TopologyMismatch(str(exc)) from exc
            if exc.code == _ACCESS_REFUSED:
                raise TopologyMismatch(f"{exc}; with AMQP_DECLARE=false the topology is only checked") from exc
            raise
        await self._publisher.begin_confirms()
        self._consuming.channel.add_on_cancel_callback(
            lambda _frame: self._fail(BrokerUnavailable("the broker cancelled the consumer"))
        )

    async def consume(self, prefetch: int) -> None:
        """Hold so many deliveries unacknowledged at once; 0: take no new ones. Those that are here stay valid.

        A session begins with a single delivery. Only when that shows no sign of having ended workers are several
        taken: a message that does would take the count of returns of all the others up with its own, until the broker
        sets all of them aside.

        The broker does not change a consumer's prefetch, so that another one means another consumer. There is one at a
        time, because what several held comes back out of order when the connection is lost.
        Source: https://www.rabbitmq.com/docs/consumer-prefetch

        Raises:
            WorkerError: the session was lost before.
        """
        self._wanted_prefetch = prefetch
        async with self._consumer_change:
            prefetch = self._wanted_prefetch if self._calm_for is None else min(self._wanted_prefetch, 1)
            if prefetch == self._prefetch:
                return
            if self._consumer_tag is not None:
                await self._cancel(self._consumer_tag)
            self._prefetch = prefetch
            if prefetch:
                channel, queue = self._consuming.channel, self._topology.execute_queue
                await self._consuming.call(channel.basic_qos, prefetch_count=prefetch)
                frame = await self._consuming.call(channel.basic_consume, queue, on_message_callback=self._on_message)
                self._consumer_tag = frame.method.consumer_tag

    async def _cancel(self, consumer_tag: str) -> None:
        """End the consumer.

        Pika requeues what arrives between its cancel and the broker's answer, which makes an innocent message look as
        if it had been handled before. So acknowledgements are held back first, until the prefetch is used up and the
        broker sends nothing more by itself; where that takes longer than a second, next to nothing arrives anyway.
        """
        self._held_back = []
        with suppress(TimeoutError):
            async with asyncio.timeout(SATURATE_S):
                while len(self._unacknowledged_of_consumer) < self._prefetch:
                    await self._next_progress()
        self._consumer_tag = None
        self._unacknowledged_of_consumer.clear()
        self._read_on()  # or the broker's answer would not be read
        await self._consuming.call(self._consuming.channel.basic_cancel, consumer_tag)
        held_back, self._held_back = self._held_back, None
        for delivery_tag in held_back:
            self._acknowledge(delivery_tag)

    @property
    def unacknowledged(self) -> int:
        """How many deliveries are held."""
        return len(self._unacknowledged)

    @property
    def is_blocked(self) -> bool:
        """Whether the broker takes no publications."""
        return self._publisher.is_blocked

    @property
    def is_publishing_hindered(self) -> bool:
        """Whether the broker takes no publications, refuses some again and again, or is slow to confirm them."""
        return self._publisher.is_impaired

    async def look_at_queue(self) -> tuple[int, int]:
        """Return how many messages are ready in the queue, and how many consumers it has.

        Raises:
            WorkerError: the session was lost before.
            TimeoutError: the broker did not say, which is no reason to give the session up.
        """
        # On the consuming channel: in an alarm the broker does not read the other connection.
        channel, queue = self._consuming.channel, self._topology.execute_queue
        async with asyncio.timeout(CALL_S):
            frame = await self._consuming.ask(channel.queue_declare, queue, passive=True)
        return frame.method.message_count, frame.method.consumer_count

    async def drain(self) -> None:
        """Wait until nothing is unacknowledged.

        Raises:
            WorkerError: the session was lost before.
        """
        while self._unacknowledged:
            await self._next_progress()

    def settle(
        self,
        delivery: Delivery,
        publications: Iterable[Publication],
        on_confirmed: Callable[[], object] | None = None,
    ) -> None:
        """Publish, and acknowledge once all of it is confirmed. A delivery of another session is left alone."""
        if delivery.session != self.number or self.lost.done():
            return
        wanted = list(publications)
        settlement = Settlement(delivery, len(wanted), on_confirmed)
        closures = self._suspects.closures(delivery)
        if closures:
            wanted = [plain(publication) for publication in wanted]
        if closures > 1 or (closures and len(delivery.body) > MAX_BODY_BYTES):
            # Refused even without a sender's headers, or too large: let the broker dead-letter the message itself.
            letters = [each for each in wanted if each.exchange == self._topology.dead_letters_exchange]
            wanted = [each for each in wanted if each not in letters]
            settlement = replace(settlement, unconfirmed=len(wanted), is_rejected=bool(letters))
        for publication in wanted:
            self._publisher.publish(InFlight(publication, settlement))

    def requeue(self, delivery: Delivery) -> None:
        """Give back a delivery that was not started, without publishing; it will look as if it may have been."""
        if delivery.session == self.number:
            self._settle_with(self._consuming.channel.basic_nack, delivery.tag)  # which requeues

    async def close(self) -> None:
        """Close the connections; what is unacknowledged comes again."""
        self._fail(BrokerUnavailable("closed"))
        for task in self._background:
            task.cancel()
        closing = [asyncio.ensure_future(self._consuming.close()), asyncio.ensure_future(self._publisher.close())]
        await asyncio.wait(closing, timeout=2)

    async def _declare(self) -> None:
        channel, call = self._publisher.link.channel, self._publisher.link.call
        for exchange in self._topology.exchanges():
            kind, arguments = exchange.kind, exchange.arguments
            await call(channel.exchange_declare, exchange.name, kind, durable=True, arguments=arguments)
        for queue in self._topology.queues():
            frame = await call(channel.queue_declare, queue.name, durable=True, arguments=queue.arguments)
            self._note_consumers(queue, frame)
        for binding in self._topology.bindings():
            await call(channel.queue_bind, binding.queue, binding.exchange, binding.routing_key)

    async def _check(self) -> None:
        channel, call = self._publisher.link.channel, self._publisher.link.call
        for exchange in self._topology.exchanges():
            await call(channel.exchange_declare, exchange.name, passive=True)
        for queue in self._topology.queues():
            frame = await call(channel.queue_declare, queue.name, passive=True)
            self._note_consumers(queue, frame)

    def _note_consumers(self, queue: Queue, frame: Any) -> None:
        if queue.name == self._topology.execute_queue:
            self.consumers_found = frame.method.consumer_count

    def _on_message(self, _channel: Channel, method: Any, properties: BasicProperties, body: bytes) -> None:
        if self.lost.done():
            return  # void: it comes again
        tag: int = method.delivery_tag
        self._unacknowledged.add(tag)
        self._unacknowledged_of_consumer.add(tag)
        self._progress.set()
        exchange = method.exchange
        delivery = Delivery(
            self.number,
            tag,
            exchange,
            method.redelivered,
            properties,
            body,
            is_returned=exchange == self._topology.returns_exchange,
            is_moved=exchange in self._topology.exchanges_upstream_never_uses,
        )
        self._note_past(delivery)
        if len(body) > MAX_BODY_BYTES:
            self._read_nothing_beside(tag)
        self._on_delivery(delivery)

    def _note_past(self, delivery: Delivery) -> None:
        """Take one message at a time from one on that came back a few times, until some have come that did not."""
        before = self._calm_for
        if delivery.is_redelivered and delivery.times_returned >= FEW_RETURNS:  # a sender may have written the count
            self._calm_for = 0
        elif self._calm_for is not None and len(delivery.body) <= MAX_BODY_BYTES:  # a large one is taken alone anyway
            self._calm_for += 1
            if self._calm_for == CALM_DELIVERIES:
                self._calm_for = None
        if (before is None) != (self._calm_for is None):
            self._in_background(self.consume(self._wanted_prefetch))

    def _read_nothing_beside(self, tag: int) -> None:
        """Leave all other messages with the broker until this large one is settled: each of them may be as large."""
        self._large.add(tag)
        self._consuming.pause_reading()
        self._loop.call_later(LARGE_BODY_S, self._read_on, tag)  # heartbeats must be read

    def _read_on(self, tag: int | None = None) -> None:
        """Read again once no large message is held, or none but this one for too long; without a tag in any case."""
        if tag is None:
            self._large.clear()
        else:
            self._large.discard(tag)
        if not self._large and not self.lost.done():
            self._consuming.resume_reading()

    def _new_publisher(self) -> Publisher:
        return Publisher(self._on_confirmed, self._on_refused, self._on_publisher_blocked)

    def _share_fate(self, publisher: Publisher) -> None:
        def on_lost(lost: "asyncio.Future[WorkerError]") -> None:
            error = lost.result()
            self._suspects.note(error, [item.settlement.delivery for item in publisher.in_flight.values()])
            if publisher is self._publisher:
                self._fail(error)
            elif not self.lost.done():  # it has been replaced: nobody knows what of this was stored
                self._publish_all(publisher.withdraw_unconfirmed())

        publisher.link.lost.add_done_callback(on_lost)

    def _on_confirmed(self, item: InFlight) -> None:
        settlement = item.settlement
        settlement.unconfirmed -= 1
        if not settlement.unconfirmed:
            if settlement.is_rejected:
                reject = partial(self._consuming.channel.basic_reject, requeue=False)
                self._settle_with(reject, settlement.delivery.tag)
            else:
                self._acknowledge(settlement.delivery.tag)
            if settlement.on_confirmed is not None:
                settlement.on_confirmed()

    def _on_refused(self, item: InFlight) -> None:
        """Try again later: nothing is acknowledged for a publication that the broker did not keep."""
        if self.lost.done():
            return
        wait_s = self._publisher.publish_later(item)
        log.error(
            "publish_refused",
            exchange=item.publication.exchange,
            routing_key=item.publication.routing_key,
            reason="unroutable" if item.was_returned else "refused by the broker",
            retry_in_s=round(wait_s, 1),
        )
        now = self._loop.time()
        if now - self._refused_at > _REPLACE_CAP_S:
            self._replacements = 0
        self._refused_at = now
        has_lasted = item.refusals >= MAX_REFUSALS or (item.refused_at or now) <= now - REFUSED_S
        if has_lasted and now >= self._replace_at:
            # Each time later: a queue that is full for good refuses what is published over any connection.
            self._replacements += 1
            self._replace_at = now + min(_REPLACE_CAP_S, REFUSED_S * 2**self._replacements)
            self._in_background(self._replace_publisher())

    async def _replace_publisher(self) -> None:
        """Publish over another connection, to another node if there is one, what the broker goes on refusing.

        A channel that was opened in the moment in which the node that leads a queue died may have every publication to
        that queue refused for as long as the node is away, although another node leads it by then (measured on 3.10).
        """
        parameters = self._nodes[self._replacements % len(self._nodes)]
        old = new = self._new_publisher()
        try:
            await new.open(parameters, f"{self._name} publish")
            await new.begin_confirms()
            old, self._publisher = self._publisher, new
            self._share_fate(new)
            log.warning("publisher_replaced", broker=address(parameters))
            if old.is_blocked:
                self._on_blocked(False)
            self._publish_all(old.withdraw_waiting())
            with suppress(TimeoutError):
                async with asyncio.timeout(_RETIRE_S):
                    while old.in_flight:
                        await self._next_progress()
            self._publish_all(old.withdraw_unconfirmed())
        except WorkerError as exc:
            if old is new:
                log.warning("publisher_not_replaced", broker=address(parameters), reason=str(exc))
        finally:
            await old.close()

    def _publish_all(self, items: Iterable[InFlight]) -> None:
        for item in items:
            self._publisher.publish(item)

    def _on_publisher_blocked(self, is_blocked: bool) -> None:
        if is_blocked:
            self._read_on()  # what is held cannot be settled for now
        self._on_blocked(is_blocked)

    def _acknowledge(self, tag: int) -> None:
        if self._held_back is not None:
            self._held_back.append(tag)
            return
        self._settle_with(self._consuming.channel.basic_ack, tag)

    def _settle_with(self, method: Callable[[int], None], tag: int) -> None:
        if self.lost.done():
            return
        self._consuming.do(method, tag)
        self._unacknowledged.discard(tag)
        self._unacknowledged_of_consumer.discard(tag)
        if tag in self._large:
            self._read_on(tag)
        self._progress.set()

    async def _next_progress(self) -> None:
        """Wait until a delivery comes or is settled."""
        self._progress.clear()
        await self._consuming.or_lost(asyncio.ensure_future(self._progress.wait()))

    def _in_background(self, work: Any) -> None:
        async def run() -> None:
            with suppress(WorkerError):  # the session is lost, which says it all
                await work

        task = asyncio.ensure_future(run())
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def _fail(self, error: WorkerError) -> None:
        if not self.lost.done():
            self.lost.set_result(error)
            self._publisher.withdraw_waiting()
            self._consuming.fail(error)
