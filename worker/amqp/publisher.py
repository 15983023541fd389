"""Publishes with pipelined publisher confirms, over a channel of its own."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pika import URLParameters
from pika.channel import Channel
from pika.spec import Basic

from worker.amqp.channel import BrokerChannel
from worker.amqp.messages import Delivery, Publication, fitted
from worker.core.backoff import backoff_s

SLOW_CONFIRM_S = 10.0
CLOSE_S = 2.0
_RETRY_BASE_S = 1.0
_RETRY_CAP_S = 30.0


@dataclass(slots=True, eq=False)
class Settlement:
    """A delivery that is acknowledged once all of its publications are confirmed.

    ``confirmed``: True after that; False: the session was lost before. ``is_delivery_rejected``: it is rejected then.
    """

    delivery: Delivery
    unconfirmed: int
    confirmed: asyncio.Future[bool]
    is_delivery_rejected: bool = False


@dataclass(slots=True)
class InFlight:
    """A publication that the broker has not confirmed yet."""

    publication: Publication
    settlement: Settlement
    rejections: int = 0
    first_rejected_at: float | None = None  # on the loop's clock
    published_at: float = 0.0
    was_returned: bool = False


class Publisher:
    """Publishes over one channel in confirm mode.

    Args:
        on_confirmed: called with each publication that the broker confirmed.
        on_rejected: called with each publication that the broker nacked or returned; ``publish_later`` retries it.
        on_blocked: called when the broker blocks the connection, and when it unblocks it.
    """

    def __init__(
        self,
        on_confirmed: Callable[[InFlight], object],
        on_rejected: Callable[[InFlight], object],
        on_blocked: Callable[[], object],
    ) -> None:
        self.channel = BrokerChannel()
        self.is_blocked = False
        self.in_flight: dict[int, InFlight] = {}  # by delivery tag, in order of publication
        self._is_open = False
        self._unpublished: list[InFlight] = []  # passed to publish() before open(), or after the channel was lost
        self._retries: dict[int, tuple[InFlight, asyncio.TimerHandle]] = {}
        self._on_confirmed = on_confirmed
        self._on_rejected = on_rejected
        self._on_blocked = on_blocked
        self._loop = asyncio.get_running_loop()
        self._confirm_arrived = asyncio.Event()
        self._last_tag = 0

    async def connect(self, parameters: URLParameters, name: str) -> None:
        """Connect; nothing is published before ``open``.

        Raises:
            BrokerUnavailable: the broker cannot be reached.
        """
        await self.channel.open(parameters, name)
        connection = self.channel.pika_connection
        connection.add_on_connection_blocked_callback(lambda *_: self._set_blocked(is_blocked=True))
        connection.add_on_connection_unblocked_callback(lambda *_: self._set_blocked(is_blocked=False))
        self.channel.pika_channel.add_on_return_callback(self._on_return)

    async def open(self) -> None:
        """Turn publisher confirms on and begin to publish.

        Raises:
            WorkerError: the channel is lost.
        """
        await self.channel.call(self.channel.pika_channel.confirm_delivery, self._on_confirm)
        self._is_open = True
        unpublished, self._unpublished = self._unpublished, []
        for item in unpublished:
            self.publish(item)

    @property
    def is_open(self) -> bool:
        """Whether it publishes."""
        return self._is_open and not self.channel.lost.done()

    @property
    def is_impaired(self) -> bool:
        """Whether it is not open yet, or the broker blocks it, rejects publications, or is slow to confirm them."""
        return not self._is_open or self.is_blocked or bool(self._retries) or self.unanswered_s > SLOW_CONFIRM_S

    @property
    def unanswered_s(self) -> float:
        """For how long the oldest publication has waited that the broker neither confirmed nor rejected, in seconds."""
        oldest = next(iter(self.in_flight.values()), None)
        return 0.0 if oldest is None else self._loop.time() - oldest.published_at

    def publish(self, item: InFlight) -> None:
        """Publish at once; without an open channel the publication is kept for ``withdraw_unconfirmed``."""
        if not self._is_open or self.channel.lost.done():
            self._unpublished.append(item)
            return
        publication = fitted(item.publication, self.channel.frame_max)
        self._last_tag += 1
        item.published_at = self._loop.time()
        item.was_returned = False
        self.in_flight[self._last_tag] = item
        self.channel.invoke(
            self.channel.pika_channel.basic_publish,
            publication.exchange,
            publication.routing_key,
            publication.body,
            publication.properties,
            mandatory=True,
        )

    def publish_later(self, item: InFlight) -> float:
        """Publish a rejected publication again after a backoff; returns the wait, in seconds."""
        wait_s = backoff_s(item.rejections, _RETRY_BASE_S, _RETRY_CAP_S)
        self._retries[id(item)] = item, self._loop.call_later(wait_s, self._retry, item)
        return wait_s

    def withdraw_retries(self) -> list[InFlight]:
        """Remove and return the publications that wait for ``publish_later``."""
        waiting = list(self._retries.values())
        self._retries.clear()
        for _, timer in waiting:
            timer.cancel()
        return [item for item, _ in waiting]

    def withdraw_unconfirmed(self) -> list[InFlight]:
        """Remove and return the unconfirmed publications: the broker may have stored them, or not."""
        unconfirmed = [*self.in_flight.values(), *self._unpublished]
        self.in_flight.clear()
        self._unpublished.clear()
        return unconfirmed

    async def wait_until_confirmed(self) -> None:
        """Wait until every publication is confirmed or rejected.

        Raises:
            WorkerError: the channel is lost.
        """
        while self.in_flight:
            self._confirm_arrived.clear()
            await self.channel.until_lost(asyncio.ensure_future(self._confirm_arrived.wait()))

    async def until_routed(self) -> None:
        """Wait until the broker has routed what was published; it may still have to be stored.

        The broker does what is asked for over one channel in turn, so that its next answer tells.

        Raises:
            WorkerError: the channel is lost.
        """
        await self.channel.call_untimed(self.channel.pika_channel.basic_qos)

    async def close(self) -> None:
        """Close the connection; a broker that does not answer, because it blocks publishing or hangs, is left.

        RabbitMQ ends a channel that hangs a minute after its connection has ended, and never before.
        """
        self.withdraw_retries()
        try:
            async with asyncio.timeout(CLOSE_S):
                await self.channel.close()
        except TimeoutError:
            self.channel.abort()

    def _retry(self, item: InFlight) -> None:
        del self._retries[id(item)]
        self.publish(item)

    def _on_return(self, _channel: Channel, method: Basic.Return, _properties: object, _body: bytes) -> None:
        """Mark every unconfirmed publication with this exchange and routing key as returned.

        basic.return carries no delivery tag and comes before its confirm, so the returned publication is among them. A
        queue that was bound meanwhile may get one of the others twice, which readers of replies and the idempotency
        records tolerate.
        """
        for item in self.in_flight.values():
            route = (item.publication.exchange, item.publication.routing_key)
            if route == (method.exchange, method.routing_key):
                item.was_returned = True

    def _on_confirm(self, frame: Any) -> None:
        method: Basic.Ack | Basic.Nack = frame.method
        if method.multiple:
            tags = [tag for tag in self.in_flight if tag <= method.delivery_tag]
        else:
            tags = [method.delivery_tag]
        for tag in tags:
            item = self.in_flight.pop(tag, None)
            if item is None:  # it has been withdrawn
                continue
            if item.was_returned or isinstance(method, Basic.Nack):
                item.rejections += 1
                if item.first_rejected_at is None:
                    item.first_rejected_at = self._loop.time()
                self._on_rejected(item)
            else:
                self._on_confirmed(item)
        self._confirm_arrived.set()

    def _set_blocked(self, *, is_blocked: bool) -> None:
        self.is_blocked = is_blocked
        self._on_blocked()
