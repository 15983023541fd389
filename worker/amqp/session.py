"""One attachment to the broker, from connecting to the first fault: two links with one fate.

One link consumes and acknowledges, the other publishes, because the broker stops reading a connection that publishes
while it is short of memory or disk, and acknowledgements must get through all the same. Whatever breaks, a connection,
a channel, the consumer, ends the session: everything unacknowledged comes again, to the next one. Only a publisher
whose publications the broker goes on refusing is replaced without that.
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from pika import URLParameters
from pika.channel import Channel
from pika.spec import BasicProperties

from schemas.command import MAX_BODY_BYTES
from worker.amqp.channel import Link
from worker.amqp.connection import CALL_S, address
from worker.amqp.messages import Delivery, Publication, plain
from worker.amqp.publisher import InFlight, Publisher, Settlement
from worker.amqp.suspects import Suspects, is_about_a_publication
from worker.amqp.topology import Queue, Topology
from worker.errors import BrokerUnavailable, ChannelRefused, TopologyMismatch, WorkerError
from worker.telemetry.logs import get_logger

SATURATE_S = 1.0
LARGE_BODY_S = 10.0  # at most, and not longer than a heartbeat: a peer from which nothing is read counts as lost
MANY_RETURNS = 3  # a message that came back so often may be what ends the workers
FEW_RETURNS_IN_A_ROW = 20  # so many messages that did not, after one that did: then several are taken at once again
MAX_REFUSALS = 3  # of one publication, or
REFUSED_S = 5.0  # for so long: then the publisher is replaced
_REPLACE_CAP_S = 60.0
_RETIRE_S = 10.0  # how long what a replaced publisher has published may take to be confirmed
_CLOSE_S = 2.0
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
        self._consumers: dict[str, int] = {}  # each one's prefetch by its tag
        self._prefetch = 0
        self._wanted_prefetch = 0
        self._takes_one = True  # at a time
        self._until_several = 1  # so many more messages with few returns
        self._unacknowledged: set[int] = set()
        self._unacknowledged_of_consumers: set[int] = set()  # which alone count towards their prefetch
        self._large: set[int] = set()  # tags of deliveries beside which no other is read
        self._held_back: list[int] | None = None
        self._consumer_change = asyncio.Lock()
        self._waiters: set[asyncio.Future[None]] = set()  # for a delivery that comes or is settled
        self._was_blocked = False  # as last reported
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
        await self._publisher.connect(parameters, f"{name} publish")
        self._consuming.lost.add_done_callback(lambda lost: self._fail(lost.result()))
        try:
            await (self._declare() if declare else self._check())
        except ChannelRefused as exc:
            if exc.code == _PRECONDITION_FAILED:
                raise TopologyMismatch(str(exc)) from exc
            if exc.code == _ACCESS_REFUSED:
                raise TopologyMismatch(f"{exc}; with AMQP_DECLARE=false the topology is only checked") from exc
            raise
        await self._publisher.open()
        self._share_fate(self._publisher)
        self._consuming.channel.add_on_cancel_callback(
            lambda _frame: self._fail(BrokerUnavailable("the broker cancelled the consumer"))
        )

    async def consume(self, prefetch: int) -> None:
        """Hold so many deliveries unacknowledged at once; 0: take no new ones. Those that are here stay valid.

        A session begins with a single delivery. Several are taken only behind one that has not come back many times: a
        message that ends every worker would otherwise drive up the count of returns of all the others, until the broker
        dead-letters them too.

        The broker does not change a consumer's prefetch, so that more of it is one more consumer.
        Source: https://www.rabbitmq.com/docs/consumer-prefetch

        Raises:
            WorkerError: the session was lost before.
        """
        self._wanted_prefetch = prefetch
        await self._renew_consumers()

    async def _renew_consumers(self, *, is_forced: bool = False) -> None:
        """Have the prefetch that is wanted by now; if forced, with a new consumer in any case."""
        async with self._consumer_change:
            prefetch = min(self._wanted_prefetch, 1) if self._takes_one else self._wanted_prefetch
            if prefetch == self._prefetch and not is_forced:
                return
            more = prefetch
            if prefetch > self._prefetch > 1:
                more -= self._prefetch
            elif self._consumers:
                held = await self._cancel()
                if prefetch > self._prefetch:  # the only delivery until now counts too, or there would be one too many
                    more -= held
            self._prefetch = prefetch
            if more:
                channel, queue = self._consuming.channel, self._topology.execute_queue
                await self._consuming.call(channel.basic_qos, prefetch_count=more)
                frame = await self._consuming.call(channel.basic_consume, queue, on_message_callback=self._on_message)
                self._consumers[frame.method.consumer_tag] = more

    async def _cancel(self) -> int:
        """End all consumers; returns how many deliveries they hold.

        Pika requeues what arrives between its cancel and the broker's answer, which makes an innocent message look as
        if it had been handled before. So acknowledgements are held back first, until the prefetch is used up and the
        broker sends nothing more by itself; where that takes longer than a second, next to nothing arrives anyway.
        """
        self._held_back = []
        prefetch = sum(self._consumers.values())
        end = self._loop.time() + SATURATE_S
        # While a large message is held nothing else is read, so that nothing can arrive.
        while len(self._unacknowledged_of_consumers) < prefetch and (self._large or self._loop.time() < end):
            with suppress(TimeoutError):
                async with asyncio.timeout(SATURATE_S if self._large else end - self._loop.time()):
                    await self._next_progress()
        consumers, self._consumers = self._consumers, {}
        held = len(self._unacknowledged_of_consumers)
        self._unacknowledged_of_consumers.clear()
        self._resume_reading()  # or the broker's answer would not be read
        for tag in consumers:
            await self._consuming.call(self._consuming.channel.basic_cancel, tag)
        held_back, self._held_back = self._held_back, None
        for delivery_tag in held_back:
            self._acknowledge(delivery_tag)
        return held

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
        for publication in wanted:
            item = InFlight(plain(publication) if closures else publication, settlement)
            if closures > 1 and self._leave_to_broker(item):
                continue
            self._publisher.publish(item)

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
        await asyncio.wait(closing, timeout=_CLOSE_S)

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
        self._unacknowledged_of_consumers.add(tag)
        self._note_progress()
        exchange = method.exchange
        delivery = Delivery(
            self.number,
            tag,
            method.redelivered,
            properties,
            body,
            is_returned=exchange == self._topology.returns_exchange,
            is_moved=exchange in self._topology.exchanges_upstream_never_uses,
        )
        self._note_returns(delivery)
        if len(body) > MAX_BODY_BYTES:
            self._read_nothing_beside(tag)
        self._on_delivery(delivery)

    def _note_returns(self, delivery: Delivery) -> None:
        """Take one message at a time from one on that came back many times, until some have come that did not."""
        did_take_one = self._takes_one
        if (
            delivery.is_redelivered and delivery.envelope.times_returned >= MANY_RETURNS
        ):  # a sender may have written the count
            self._takes_one, self._until_several = True, FEW_RETURNS_IN_A_ROW
        elif self._takes_one and len(delivery.body) <= MAX_BODY_BYTES:  # a large one is taken alone anyway
            self._until_several -= 1
            self._takes_one = self._until_several > 0
        if did_take_one != self._takes_one:
            self._in_background(self._renew_consumers())

    def _read_nothing_beside(self, tag: int) -> None:
        """Leave all other messages with the broker until this large one is settled: each of them may be as large."""
        self._large.add(tag)
        self._consuming.pause_reading()
        self._loop.call_later(min(LARGE_BODY_S, self._consuming.heartbeat_s), self._forget_large, tag)

    def _forget_large(self, tag: int) -> None:
        self._large.discard(tag)
        if not self._large:
            self._resume_reading()

    def _resume_reading(self) -> None:
        self._large.clear()
        if not self.lost.done():
            self._consuming.resume_reading()

    def _new_publisher(self) -> Publisher:
        return Publisher(self._on_confirmed, self._on_refused, self._report_blocked)

    def _share_fate(self, publisher: Publisher) -> None:
        """Have the session end with the present publisher, unless its end is due to one publication."""

        def on_lost(lost: "asyncio.Future[WorkerError]") -> None:
            if self.lost.done():
                return
            error = lost.result()
            if publisher is not self._publisher:  # it has been replaced: nobody knows what of this was stored
                self._publish_all(publisher.withdraw_unconfirmed())
            elif is_about_a_publication(error):
                self._publisher = self._new_publisher()
                self._in_background(self._find_refused_publication(publisher, self._publisher, error))
            else:
                self._fail(error)

        publisher.link.lost.add_done_callback(on_lost)

    async def _find_refused_publication(self, closed: Publisher, new: Publisher, error: WorkerError) -> None:
        """Publish one by one, over a link of its own, what was unconfirmed when the broker closed a publisher's link.

        So the broker tells which publication it refuses, and the others are published as they are. Everything else goes
        on over a new publisher meanwhile.
        """
        suspects = [*closed.withdraw_unconfirmed(), *closed.withdraw_waiting()]
        await self._closed(closed)
        parameters = self._nodes[0]
        try:
            await new.connect(parameters, f"{self._name} publish")
            await new.open()
            self._share_fate(new)
            self._report_blocked()
            log.warning("publisher_replaced", broker=address(parameters), reason=str(error))
            for item in suspects:
                if plain(item.publication) == item.publication:  # the worker's own words, which are refused to none
                    new.publish(item)
                else:
                    await self._publish_alone(item)
        except WorkerError as exc:
            self._fail(exc)

    async def _publish_alone(self, item: InFlight) -> None:
        """Publish one item over a link of its own, and again in another form if the broker closes that link over it.

        Raises:
            WorkerError: the broker cannot be reached, or refuses the worker's own words too.
        """
        while True:
            alone = self._new_publisher()
            try:
                await alone.connect(self._nodes[0], f"{self._name} publish one")
                await alone.open()
                alone.publish(item)
                await alone.wait_until_confirmed()
            except WorkerError as exc:
                if not alone.in_flight or not is_about_a_publication(exc):
                    raise
            else:
                return
            finally:
                await self._closed(alone)
            closures = self._suspects.note(item.settlement.delivery)
            log.warning(
                "publication_refused",
                exchange=item.publication.exchange,
                routing_key=item.publication.routing_key,
                reason=str(alone.link.lost.result()),
            )
            if closures > 1 or len(item.publication.body) > MAX_BODY_BYTES:  # too large, maybe, for this broker
                if self._leave_to_broker(item):
                    return
                if closures > 1:
                    raise alone.link.lost.result()
            item = InFlight(plain(item.publication), item.settlement)

    def _leave_to_broker(self, item: InFlight) -> bool:
        """Have the broker dead-letter the message itself instead of this publication, if that is a dead letter."""
        if item.publication.exchange != self._topology.dead_letters_exchange:
            return False
        item.settlement.is_rejected = True
        self._on_confirmed(item)
        return True

    def _on_confirmed(self, item: InFlight) -> None:
        if self.lost.done():
            return
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
        delivery_tag = item.settlement.delivery.tag
        if self._takes_one and delivery_tag in self._unacknowledged_of_consumers:
            # It has been handled and ended no worker, and may be refused for long: the next one must not wait for it.
            self._in_background(self._renew_consumers(is_forced=len(self._unacknowledged) < self._wanted_prefetch))
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
            await new.connect(parameters, f"{self._name} publish")
            await new.open()
            if self._publisher.link.lost.done():
                return  # it is being replaced for another reason
            old, self._publisher = self._publisher, new
            self._share_fate(new)
            self._report_blocked()
            log.warning("publisher_replaced", broker=address(parameters), reason="publications are refused")
            self._publish_all(old.withdraw_waiting())
            with suppress(TimeoutError):
                async with asyncio.timeout(_RETIRE_S):
                    await old.wait_until_confirmed()
            self._publish_all(old.withdraw_unconfirmed())
        except WorkerError as exc:
            if old is new:
                log.warning("publisher_not_replaced", broker=address(parameters), reason=str(exc))
        finally:
            await self._closed(old)

    async def _closed(self, publisher: Publisher) -> None:
        """Close a publisher; a broker that is blocked does not answer, and is not waited for."""
        await asyncio.wait((asyncio.ensure_future(publisher.close()),), timeout=_CLOSE_S)

    def _publish_all(self, items: Iterable[InFlight]) -> None:
        for item in items:
            self._publisher.publish(item)

    def _report_blocked(self) -> None:
        """Report whether the present publisher is blocked, when that has changed."""
        if self._publisher.is_blocked != self._was_blocked:
            self._was_blocked = self._publisher.is_blocked
            if self._was_blocked:
                self._resume_reading()  # what is held cannot be settled for now
            self._on_blocked(self._was_blocked)

    def _acknowledge(self, tag: int) -> None:
        if self._held_back is not None and tag not in self._large:  # which keeps the others from being read
            self._held_back.append(tag)
            return
        self._settle_with(self._consuming.channel.basic_ack, tag)

    def _settle_with(self, method: Callable[[int], None], tag: int) -> None:
        if self.lost.done():
            return
        self._consuming.do(method, tag)
        self._unacknowledged.discard(tag)
        self._unacknowledged_of_consumers.discard(tag)
        if tag in self._large:
            self._forget_large(tag)
        self._note_progress()

    async def _next_progress(self) -> None:
        """Wait until a delivery comes or is settled."""
        waiter: asyncio.Future[None] = self._loop.create_future()
        self._waiters.add(waiter)
        try:
            await self._consuming.or_lost(waiter)
        finally:
            self._waiters.discard(waiter)

    def _note_progress(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

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
