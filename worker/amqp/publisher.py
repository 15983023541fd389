"""Publishes with pipelined confirms, over a link of its own."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pika import URLParameters
from pika.channel import Channel
from pika.spec import Basic

from worker.amqp.channel import Link
from worker.amqp.messages import Delivery, Publication, fitted
from worker.core.backoff import backoff_s

SLOW_CONFIRM_S = 10.0
_RETRY_BASE_S = 1.0
_RETRY_CAP_S = 30.0


@dataclass(slots=True)
class Settlement:
    """A delivery that is acknowledged when the broker has confirmed all that was published for it.

    ``is_rejected``: it is rejected instead, so that the broker itself dead-letters it.
    """

    delivery: Delivery
    unconfirmed: int
    on_confirmed: Callable[[], object] | None
    is_rejected: bool = False


@dataclass(slots=True)
class InFlight:
    """A publication that the broker has not confirmed yet."""

    publication: Publication
    settlement: Settlement
    refusals: int = 0
    refused_at: float | None = None  # the first time, on the loop's clock
    published_at: float = 0.0
    was_returned: bool = False


class Publisher:
    """One link that publishes.

    Args:
        on_confirmed: is told of each publication that the broker has taken over.
        on_refused: is told of each that it has not; it is published again by ``publish_later``.
        on_blocked: is told when the broker stops taking publications, and when it takes them again.
    """

    def __init__(
        self,
        on_confirmed: Callable[[InFlight], object],
        on_refused: Callable[[InFlight], object],
        on_blocked: Callable[[], object],
    ) -> None:
        self.link = Link()
        self.is_blocked = False
        self.in_flight: dict[int, InFlight] = {}
        self._is_open = False
        self._unpublished: list[InFlight] = []  # before it is open, or after its link is lost
        self._waiting: dict[int, tuple[InFlight, asyncio.TimerHandle]] = {}  # to be published again
        self._on_confirmed = on_confirmed
        self._on_refused = on_refused
        self._on_blocked = on_blocked
        self._loop = asyncio.get_running_loop()
        self._answered = asyncio.Event()
        self._published = 0

    async def connect(self, parameters: URLParameters, name: str) -> None:
        """Connect; nothing is published before ``open``.

        Raises:
            BrokerUnavailable: the broker cannot be reached.
        """
        await self.link.open(parameters, name)
        connection, channel = self.link.connection, self.link.channel
        connection.add_on_connection_blocked_callback(lambda *_: self._set_blocked(is_blocked=True))
        connection.add_on_connection_unblocked_callback(lambda *_: self._set_blocked(is_blocked=False))
        channel.add_on_return_callback(self._on_return)

    async def open(self) -> None:
        """Begin to publish, with confirms.

        Raises:
            WorkerError: the link is lost.
        """
        await self.link.call(self.link.channel.confirm_delivery, self._on_confirm)
        self._is_open = True
        unpublished, self._unpublished = self._unpublished, []
        for item in unpublished:
            self.publish(item)

    @property
    def is_impaired(self) -> bool:
        """Whether the broker takes no publications, refuses some, or is slow to confirm them."""
        oldest = next(iter(self.in_flight.values()), None)
        is_slow = oldest is not None and self._loop.time() - oldest.published_at > SLOW_CONFIRM_S
        return self.is_blocked or bool(self._waiting) or is_slow

    def publish(self, item: InFlight) -> None:
        """Publish at once; what cannot be published is kept for ``withdraw_unconfirmed``."""
        if not self._is_open or self.link.lost.done():
            self._unpublished.append(item)
            return
        wanted = fitted(item.publication, self.link.frame_max)
        self._published += 1
        item.published_at = self._loop.time()
        item.was_returned = False
        self.in_flight[self._published] = item
        self.link.do(
            self.link.channel.basic_publish,
            wanted.exchange,
            wanted.routing_key,
            wanted.body,
            wanted.properties,
            mandatory=True,
        )

    def publish_later(self, item: InFlight) -> float:
        """Publish again what was refused; returns the wait before that, in seconds."""
        wait_s = backoff_s(item.refusals, _RETRY_BASE_S, _RETRY_CAP_S)
        self._waiting[id(item)] = item, self._loop.call_later(wait_s, self._publish_again, item)
        return wait_s

    def withdraw_waiting(self) -> list[InFlight]:
        """Take out what waits to be published again."""
        waiting = list(self._waiting.values())
        self._waiting.clear()
        for _, timer in waiting:
            timer.cancel()
        return [item for item, _ in waiting]

    def withdraw_unconfirmed(self) -> list[InFlight]:
        """Take out what is not confirmed: it may be stored, or not."""
        unconfirmed = [*self.in_flight.values(), *self._unpublished]
        self.in_flight.clear()
        self._unpublished.clear()
        return unconfirmed

    async def wait_until_confirmed(self) -> None:
        """Wait until everything that was published is confirmed or refused.

        Raises:
            WorkerError: the link is lost.
        """
        while self.in_flight:
            self._answered.clear()
            await self.link.or_lost(asyncio.ensure_future(self._answered.wait()))

    async def close(self) -> None:
        """Close the connection."""
        self.withdraw_waiting()
        await self.link.close()

    def _publish_again(self, item: InFlight) -> None:
        del self._waiting[id(item)]
        self.publish(item)

    def _on_return(self, _channel: Channel, method: Basic.Return, _properties: object, _body: bytes) -> None:
        """Note that a route leads nowhere.

        A return has no number of its own, but what is on its way by the same route leads there too, and its confirm
        has not come yet. Should one of those have found a queue that was bound meanwhile, it is published twice, which
        readers of replies and the records of commands bear.
        """
        for item in self.in_flight.values():
            route = (item.publication.exchange, item.publication.routing_key)
            if route == (method.exchange, method.routing_key):
                item.was_returned = True

    def _on_confirm(self, frame: Any) -> None:
        method: Basic.Ack | Basic.Nack = frame.method
        if method.multiple:
            numbers = [number for number in self.in_flight if number <= method.delivery_tag]
        else:
            numbers = [method.delivery_tag]
        for number in numbers:
            item = self.in_flight.pop(number, None)
            if item is None:  # it has been withdrawn
                continue
            if item.was_returned or isinstance(method, Basic.Nack):
                item.refusals += 1
                if item.refused_at is None:
                    item.refused_at = self._loop.time()
                self._on_refused(item)
            else:
                self._on_confirmed(item)
        self._answered.set()

    def _set_blocked(self, *, is_blocked: bool) -> None:
        self.is_blocked = is_blocked
        self._on_blocked()
