"""One attachment to the broker, from connecting to the first fault: two connections with one fate.

One connection consumes and acknowledges, the other publishes, because the broker stops reading a connection that
publishes while it is short of memory or disk, and acknowledgements must get through all the same. Whatever breaks, a
connection, a channel, the consumer, ends the session: everything unacknowledged comes again, to the next one.
"""

import asyncio
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pika import URLParameters
from pika.adapters.asyncio_connection import AsyncioConnection
from pika.channel import Channel
from pika.exceptions import AMQPError, ChannelClosedByBroker
from pika.spec import Basic, BasicProperties

from worker.amqp.connecting import CALL_S, close, connect, without_user
from worker.amqp.messages import Delivery, Publication
from worker.amqp.topology import Queue, Topology
from worker.backoff import backoff_s
from worker.errors import BrokerUnavailable, ChannelRefused, TopologyMismatch, WorkerError
from worker.telemetry.logs import get_logger

SATURATE_S = 1.0
SLOW_CONFIRM_S = 10.0
_PRECONDITION_FAILED = 406
_ACCESS_REFUSED = 403

log = get_logger()


@dataclass(slots=True)
class _Settlement:
    """A delivery that is acknowledged when the broker has confirmed all that was published for it."""

    delivery: Delivery
    unconfirmed: int
    on_confirmed: Callable[[], object] | None


@dataclass(slots=True)
class _InFlight:
    publication: Publication
    settlement: _Settlement
    tries: int
    published_at: float = 0.0  # monotonic
    was_returned: bool = False


class Session:
    """Consumes, publishes with confirms and acknowledges, all on the event loop's thread.

    Args:
        number: tells the deliveries of this session from those of every other.
        topology: what to consume from.
        on_delivery: takes each delivery.
        on_blocked: is told when the broker stops taking publications (True), and when it takes them again (False).
    """

    def __init__(
        self,
        number: int,
        topology: Topology,
        on_delivery: Callable[[Delivery], None],
        on_blocked: Callable[[bool], None],
    ) -> None:
        self.number = number
        self.lost: asyncio.Future[WorkerError] = asyncio.get_running_loop().create_future()
        self.is_blocked = False
        self.consumers_found = 0
        self._topology = topology
        self._on_delivery = on_delivery
        self._on_blocked = on_blocked
        self._loop = asyncio.get_running_loop()
        self._connections: list[AsyncioConnection] = []
        self._consuming: Channel
        self._publishing: Channel
        self._consumers: dict[str, int] = {}  # each one's prefetch by its tag
        self._published = 0
        self._in_flight: dict[int, _InFlight] = {}
        self._unacknowledged: set[int] = set()
        self._waiting_to_publish = 0  # what the broker refused
        self._held_back: list[int] | None = None
        self._consumer_change = asyncio.Lock()
        self._progress = asyncio.Event()

    async def open(self, parameters: URLParameters, name: str, *, declare: bool) -> None:
        """Connect, and declare the topology or check that it is there.

        Raises:
            BrokerUnavailable: the broker cannot be reached, or the topology is not there yet.
            TopologyMismatch: it is there, but different, or this user may not declare it.
        """
        for purpose in ("consume", "publish"):
            connection = await connect(parameters, f"{name} {purpose}")
            self._connections.append(connection)
            connection.add_on_close_callback(lambda _connection, error: self._fail(_as_fault(error)))
        self._connections[1].add_on_connection_blocked_callback(lambda *_: self._set_blocked(is_blocked=True))
        self._connections[1].add_on_connection_unblocked_callback(lambda *_: self._set_blocked(is_blocked=False))
        self._consuming = await self._open_channel(self._connections[0])
        self._publishing = await self._open_channel(self._connections[1])
        self._publishing.add_on_return_callback(self._on_return)
        try:
            await (self._declare() if declare else self._check())
        except ChannelRefused as exc:
            if exc.code == _PRECONDITION_FAILED:
                raise TopologyMismatch(str(exc)) from exc
            if exc.code == _ACCESS_REFUSED:
                raise TopologyMismatch(f"{exc}; with AMQP_DECLARE=false the topology is only checked") from exc
            raise
        await self._call(self._publishing.confirm_delivery, self._on_confirm)
        self._consuming.add_on_cancel_callback(
            lambda _frame: self._fail(BrokerUnavailable("the broker cancelled the consumer"))
        )

    async def consume(self, prefetch: int) -> None:
        """Hold so many deliveries unacknowledged at once; 0: take no new ones. Those that are here stay valid.

        The broker does not change a consumer's prefetch, so that more of it is one more consumer.
        Source: https://www.rabbitmq.com/docs/consumer-prefetch

        Raises:
            WorkerError: the session was lost before.
        """
        async with self._consumer_change:
            if prefetch < self._prefetch:
                await self._cancel()
            if prefetch > self._prefetch:
                more = prefetch - self._prefetch
                await self._call(self._consuming.basic_qos, prefetch_count=more)
                frame = await self._call(
                    self._consuming.basic_consume, self._topology.execute_queue, on_message_callback=self._on_message
                )
                self._consumers[frame.method.consumer_tag] = more

    async def _cancel(self) -> None:
        """End all consumers.

        Pika requeues what arrives between its cancel and the broker's answer, which makes an innocent message look as
        if it had been handled before. So acknowledgements are held back first, until the prefetch is used up and the
        broker sends nothing more by itself; where that takes longer than a second, next to nothing arrives anyway.
        """
        self._held_back = []
        with suppress(TimeoutError):
            async with asyncio.timeout(SATURATE_S):
                while len(self._unacknowledged) < self._prefetch:
                    await self._next_progress()
        consumers, self._consumers = self._consumers, {}
        for tag in consumers:
            await self._call(self._consuming.basic_cancel, tag)
        held_back, self._held_back = self._held_back, None
        for delivery_tag in held_back:
            self._acknowledge(delivery_tag)

    @property
    def _prefetch(self) -> int:
        return sum(self._consumers.values())

    @property
    def unacknowledged(self) -> int:
        """How many deliveries are held."""
        return len(self._unacknowledged)

    @property
    def is_publishing_hindered(self) -> bool:
        """Whether the broker takes no publications, refuses some again and again, or is slow to confirm them."""
        oldest = next(iter(self._in_flight.values()), None)
        is_slow = oldest is not None and self._loop.time() - oldest.published_at > SLOW_CONFIRM_S
        return self.is_blocked or self._waiting_to_publish > 0 or is_slow

    async def look_at_queue(self) -> tuple[int, int]:
        """Return how many messages are ready in the queue, and how many consumers it has.

        Raises:
            WorkerError: the session was lost before.
            TimeoutError: the broker did not say, which is no reason to give the session up.
        """
        # On the consuming channel: in an alarm the broker does not read the other connection.
        async with asyncio.timeout(CALL_S):
            frame = await self._ask(self._consuming.queue_declare, self._topology.execute_queue, passive=True)
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
        settlement = _Settlement(delivery, len(wanted), on_confirmed)
        for publication in wanted:
            self._publish(_InFlight(publication, settlement, tries=1))

    def requeue(self, delivery: Delivery) -> None:
        """Give back a delivery that was not started, without publishing; it will look as if it may have been."""
        if delivery.session == self.number:
            self._settle_with(self._consuming.basic_nack, delivery.tag)  # which requeues

    async def close(self) -> None:
        """Close both connections; what is unacknowledged comes again."""
        if not self.lost.done():
            self.lost.set_result(BrokerUnavailable("closed"))
        closed = [asyncio.ensure_future(_closed(connection)) for connection in self._connections]
        if closed:
            await asyncio.wait(closed, timeout=2)

    async def _open_channel(self, connection: AsyncioConnection) -> Channel:
        channel: Channel = await self._call(lambda callback: connection.channel(on_open_callback=callback))
        channel.add_on_close_callback(lambda _channel, error: self._fail(_as_fault(error)))
        return channel

    async def _declare(self) -> None:
        channel, call = self._publishing, self._call
        for exchange in self._topology.exchanges():
            kind, arguments = exchange.kind, exchange.arguments
            await call(channel.exchange_declare, exchange.name, kind, durable=True, arguments=arguments)
        for queue in self._topology.queues():
            frame = await call(channel.queue_declare, queue.name, durable=True, arguments=queue.arguments)
            self._note_consumers(queue, frame)
        for binding in self._topology.bindings():
            await call(channel.queue_bind, binding.queue, binding.exchange, binding.routing_key)

    async def _check(self) -> None:
        for exchange in self._topology.exchanges():
            await self._call(self._publishing.exchange_declare, exchange.name, passive=True)
        for queue in self._topology.queues():
            frame = await self._call(self._publishing.queue_declare, queue.name, passive=True)
            self._note_consumers(queue, frame)

    def _note_consumers(self, queue: Queue, frame: Any) -> None:
        if queue.name == self._topology.execute_queue:
            self.consumers_found = frame.method.consumer_count

    async def _call(self, method: Callable[..., object], *args: object, **kwargs: object) -> Any:
        """Call one of pika's methods and wait for the broker's answer; without one the session is over."""
        try:
            async with asyncio.timeout(CALL_S):
                return await self._ask(method, *args, **kwargs)
        except TimeoutError as exc:
            error = BrokerUnavailable(f"no answer from the broker within {CALL_S} s")
            self._fail(error)  # half done is undone: the next session begins anew
            raise error from exc

    async def _ask(self, method: Callable[..., object], *args: object, **kwargs: object) -> Any:
        """Call one of pika's methods and wait for the broker's answer, or for the end of the session."""
        answer: asyncio.Future[Any] = self._loop.create_future()
        try:
            method(*args, callback=lambda frame: None if answer.done() else answer.set_result(frame), **kwargs)
        except AMQPError as exc:
            self._fail(_as_fault(exc))
        return await self._or_lost(answer)

    async def _or_lost(self, future: "asyncio.Future[Any]") -> Any:
        try:
            await asyncio.wait((future, self.lost), return_when=asyncio.FIRST_COMPLETED)
            if not future.done():
                raise self.lost.result()
            return future.result()
        finally:
            future.cancel()

    def _on_message(self, _channel: Channel, method: Any, properties: BasicProperties, body: bytes) -> None:
        if self.lost.done():
            return  # void: it comes again
        tag: int = method.delivery_tag
        self._unacknowledged.add(tag)
        self._progress.set()
        is_returned = method.exchange == self._topology.returns_exchange
        self._on_delivery(
            Delivery(self.number, tag, method.exchange, method.redelivered, properties, body, is_returned)
        )

    def _publish(self, item: _InFlight) -> None:
        if self.lost.done():
            return
        self._published += 1
        item.published_at = self._loop.time()
        self._in_flight[self._published] = item
        wanted = item.publication
        try:
            self._publishing.basic_publish(
                wanted.exchange, wanted.routing_key, wanted.body, wanted.properties, mandatory=True
            )
        except AMQPError as exc:
            self._fail(_as_fault(exc))

    def _on_return(self, _channel: Channel, method: Basic.Return, _properties: object, _body: bytes) -> None:
        """Note that a route leads nowhere.

        A return has no number of its own, but what is on its way by the same route leads there too, and its confirm
        has not come yet. Should one of those have found a queue that was bound meanwhile, it is published twice, which
        readers of replies and the records of commands bear.
        """
        for item in self._in_flight.values():
            route = (item.publication.exchange, item.publication.routing_key)
            if route == (method.exchange, method.routing_key):
                item.was_returned = True

    def _on_confirm(self, frame: Any) -> None:
        method: Basic.Ack | Basic.Nack = frame.method
        if method.multiple:
            numbers = [number for number in self._in_flight if number <= method.delivery_tag]
        else:
            numbers = [method.delivery_tag]
        for number in numbers:
            item = self._in_flight.pop(number)
            if item.was_returned or isinstance(method, Basic.Nack):
                self._refused(item)
                continue
            item.settlement.unconfirmed -= 1
            if not item.settlement.unconfirmed:
                self._acknowledge(item.settlement.delivery.tag)
                if item.settlement.on_confirmed is not None:
                    item.settlement.on_confirmed()

    def _refused(self, item: _InFlight) -> None:
        """Try again later: nothing is acknowledged for a publication that the broker did not keep."""
        wait_s = backoff_s(item.tries, base_s=1, cap_s=30)
        log.error(
            "publish_refused",
            exchange=item.publication.exchange,
            routing_key=item.publication.routing_key,
            reason="unroutable" if item.was_returned else "refused by the broker",
            retry_in_s=round(wait_s, 1),
        )
        self._waiting_to_publish += 1
        self._loop.call_later(wait_s, self._publish_again, _InFlight(item.publication, item.settlement, item.tries + 1))

    def _publish_again(self, item: _InFlight) -> None:
        self._waiting_to_publish -= 1
        self._publish(item)

    def _acknowledge(self, tag: int) -> None:
        if self._held_back is not None:
            self._held_back.append(tag)
            return
        self._settle_with(self._consuming.basic_ack, tag)

    def _settle_with(self, method: Callable[[int], None], tag: int) -> None:
        if self.lost.done():
            return
        try:
            method(tag)
        except AMQPError as exc:
            self._fail(_as_fault(exc))
        self._unacknowledged.discard(tag)
        self._progress.set()

    async def _next_progress(self) -> None:
        """Wait until a delivery comes or is settled."""
        self._progress.clear()
        await self._or_lost(asyncio.ensure_future(self._progress.wait()))

    def _set_blocked(self, *, is_blocked: bool) -> None:
        self.is_blocked = is_blocked
        self._on_blocked(is_blocked)

    def _fail(self, error: WorkerError) -> None:
        if not self.lost.done():
            self.lost.set_result(error)


def _as_fault(error: BaseException) -> WorkerError:
    if isinstance(error, ChannelClosedByBroker):
        return ChannelRefused(error.reply_code, without_user(error.reply_text))
    return BrokerUnavailable(without_user(str(error)) or type(error).__name__)


async def _closed(connection: AsyncioConnection) -> None:
    if connection.is_closed:
        return
    closed = asyncio.Event()
    connection.add_on_close_callback(lambda *_: closed.set())
    close(connection)
    await closed.wait()
