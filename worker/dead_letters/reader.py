"""The dead letters in the broker: read, brought back, discarded. Reading loses none and keeps their order.

A quorum queue takes back what a consumer held in the order in which it was delivered, behind what was given back
before and in front of all else. So the order stays as long as each reader has one consumer, takes all that is there,
and nothing besides. With several `basic.get`, with two readers at once, with a prefetch of less, or with one of more
(pika gives back first what came last) it does not (measured on 3.10 and 4.0).
"""

import time
from datetime import datetime
from types import TracebackType
from typing import Any, Self
from zoneinfo import ZoneInfo

from pika.exceptions import AMQPError, ChannelClosedByBroker

from worker.amqp.address import BrokerAddress
from worker.amqp.blocking import HINT, connect_blocking, publish
from worker.amqp.connection import CALL_S, reason_of, without_user
from worker.amqp.messages import MessageBuilder
from worker.amqp.topology import Topology
from worker.dead_letters.letter import DeadLetter
from worker.errors import BrokerUnavailable, WorkerError

MOST = 65_535  # the largest prefetch there is
_RESOURCE_LOCKED = 405
_ACCESS_REFUSED = 403


class DeadLetterReader:
    """One look at the dead letters. What was not discarded or replayed is back in its place when it ends, however.

    Args:
        broker: to connect to.
        topology: names the queue.
        zone: the zone in which a command's times without an offset are read.
    """

    def __init__(self, broker: BrokerAddress, topology: Topology, zone: ZoneInfo) -> None:
        self._queue = topology.dead_letters_exchange  # it has the exchange's name
        self._outgoing = MessageBuilder(topology, "command line")
        self._zone = zone
        self.waiting = 0
        self._connection, _ = connect_blocking(broker)
        try:
            self._lock()
            self._channel = self._connection.channel()
            self._publishing = self._connection.channel()
            self._publishing.confirm_delivery()
        except AMQPError as exc:
            raise BrokerUnavailable(f"the broker refused: {reason_of(exc)}") from exc

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if self._connection.is_open:
                self._connection.close()
        except AMQPError as exc:
            if error is None:  # what was acknowledged last may not have arrived
                raise BrokerUnavailable(f"the connection was lost: {reason_of(exc)}") from exc

    def _lock(self) -> None:
        """Keep other readers of this kind away until this connection ends.

        The consumer's own flag "exclusive" does nothing on a quorum queue.
        """
        try:
            self._connection.channel().queue_declare(f"{self._queue}.reading", exclusive=True)
        except ChannelClosedByBroker as exc:
            if exc.reply_code == _RESOURCE_LOCKED:
                self._connection.close()
                raise WorkerError("somebody else is reading the dead letters: try again in a moment") from exc
            if exc.reply_code != _ACCESS_REFUSED:  # who may not declare goes without: two at once lose nothing either
                raise

    def take(self) -> list[DeadLetter]:
        """Take all letters that are there now, the oldest first; of more than 65,535 so many, and their order is lost.

        Raises:
            WorkerError: there is no such queue, or it may not be read.
            BrokerUnavailable: the connection was lost.
        """
        letters: list[DeadLetter] = []

        def on_letter(_channel: object, method: Any, properties: Any, body: bytes) -> None:
            exchange, routing_key = method.exchange, method.routing_key
            letters.append(DeadLetter(method.delivery_tag, exchange, routing_key, properties, body, self._zone))

        try:
            self.waiting = self._channel.queue_declare(self._queue, passive=True).method.message_count
            wanted = min(self.waiting, MOST)
            if not wanted:
                return letters
            self._channel.basic_qos(prefetch_count=wanted)
            consumer = self._channel.basic_consume(self._queue, on_letter)
            deadline = time.monotonic() + CALL_S
            while (taken := len(letters)) < wanted and time.monotonic() < deadline:
                self._connection.process_data_events(time_limit=1)
                if len(letters) > taken:
                    deadline = time.monotonic() + CALL_S
            self._channel.basic_cancel(consumer)  # or each that is discarded would make room for a new one
        except ChannelClosedByBroker as exc:
            raise WorkerError(f"{without_user(exc.reply_text)}: {HINT}") from exc
        except AMQPError as exc:
            raise BrokerUnavailable(f"the connection was lost: {reason_of(exc)}") from exc
        return letters

    def replay(self, letter: DeadLetter, now: datetime) -> None:
        """Bring a letter back to the worker; it is gone from here only when the broker has confirmed that.

        Raises:
            WorkerError: the broker did not take it.
        """
        publish(self._publishing, self._outgoing.replay(letter.delivery(), letter.replay(now)))
        self.discard(letter)

    def discard(self, letter: DeadLetter) -> None:
        """Have the broker forget a letter.

        Raises:
            BrokerUnavailable: the connection was lost.
        """
        try:
            self._channel.basic_ack(letter.tag)
        except AMQPError as exc:
            raise BrokerUnavailable(f"the connection was lost: {reason_of(exc)}") from exc

    def wait(self, seconds: float) -> None:
        """Let time pass without losing the connection."""
        try:
            self._connection.sleep(seconds)
        except AMQPError as exc:
            raise BrokerUnavailable(f"the connection was lost: {reason_of(exc)}") from exc
