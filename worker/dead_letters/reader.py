"""Reads, replays and discards dead letters. Reading loses none and keeps their order.

A quorum queue requeues what a consumer held in delivery order, after earlier requeued messages and before all others.
The order is therefore kept if each reader uses one consumer with a prefetch of exactly the number of messages in the
queue. It is not kept with `basic.get`, with two readers at once, with a smaller prefetch, or with a larger one, since
pika requeues surplus messages last first (measured on 3.10 and 4.0).
"""

import time
from collections.abc import Callable
from datetime import datetime
from types import TracebackType
from typing import Any, Self
from zoneinfo import ZoneInfo

from pika.exceptions import AMQPError, ChannelClosedByBroker

from schemas.command import MAX_BODY_BYTES
from worker.amqp.address import BrokerAddress
from worker.amqp.blocking import HINT, connect_blocking, publish
from worker.amqp.bodies import BoundedAssembler
from worker.amqp.connection import CALL_S, reason_of
from worker.amqp.messages import MessageBuilder
from worker.amqp.topology import Topology
from worker.dead_letters.letter import DeadLetter
from worker.errors import BrokerUnavailable, WorkerError

MAX_PREFETCH = 65_535  # of the protocol
_RESOURCE_LOCKED = 405
_ACCESS_REFUSED = 403


class DeadLetterReader:
    """Holds all dead letters while it is open; those not discarded or replayed then return to their places.

    Args:
        broker: where to connect.
        topology: names the queue.
        zone: time zone of the commands' times without an offset.

    Raises:
        WorkerError: another reader is open.
        BrokerUnavailable: no broker answers, or the connection was lost.
    """

    def __init__(self, broker: BrokerAddress, topology: Topology, zone: ZoneInfo) -> None:
        self._queue = topology.dead_letters_exchange  # named like the exchange
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
            if error is None:  # the last acknowledgements may be lost
                raise BrokerUnavailable(f"the connection was lost: {reason_of(exc)}") from exc

    def _lock(self) -> None:
        """Exclude other readers until this connection ends.

        A quorum queue ignores the consumer's flag "exclusive".
        """
        try:
            self._connection.channel().queue_declare(f"{self._queue}.reading", exclusive=True)
        except ChannelClosedByBroker as exc:
            if exc.reply_code == _RESOURCE_LOCKED:
                self._connection.close()
                raise WorkerError("another command is reading the dead letters: try again in a moment") from exc
            # Without the right to declare there is no lock; two readers then only change the order.
            if exc.reply_code != _ACCESS_REFUSED:
                raise

    def fetch_all(self) -> list[DeadLetter]:
        """Return all messages that are in the queue now, the oldest first; see ``read``."""
        found: list[DeadLetter] = []
        self.read(found.append)
        return found

    def read(self, on_letter: Callable[[DeadLetter], object], *, cuts_bodies: bool = False) -> int:
        """Read all messages that are in the queue now, the oldest first; returns their number.

        Of more than ``MAX_PREFETCH`` messages only so many are read, and the queue's order is lost.

        Args:
            on_letter: called with each. What it does not keep takes no memory any more.
            cuts_bodies: whether only the beginning of a body is needed that is too large for a command.

        Raises:
            WorkerError: the queue is missing, or reading it is not permitted.
            BrokerUnavailable: the connection was lost.
        """
        read = 0

        def on_message(_channel: object, method: Any, properties: Any, body: bytes) -> None:
            nonlocal read
            read += 1
            on_letter(DeadLetter(method.delivery_tag, method.routing_key, properties, body, self._zone))

        if cuts_bodies:
            blocking: Any = self._channel
            channel = blocking._impl  # noqa: SLF001 - pika has no other way
            channel._content_assembler = BoundedAssembler(channel._content_assembler, lambda: MAX_BODY_BYTES)  # noqa: SLF001
        try:
            self.waiting = self._channel.queue_declare(self._queue, passive=True).method.message_count
            wanted = min(self.waiting, MAX_PREFETCH)
            if not wanted:
                return read
            self._channel.basic_qos(prefetch_count=wanted)
            consumer = self._channel.basic_consume(self._queue, on_message)
            deadline = time.monotonic() + CALL_S
            while (before := read) < wanted and time.monotonic() < deadline:
                self._connection.process_data_events(time_limit=1)
                if read > before:
                    deadline = time.monotonic() + CALL_S
            self._channel.basic_cancel(consumer)  # otherwise each discarded message is replaced by a new one
        except ChannelClosedByBroker as exc:
            raise WorkerError(f"{reason_of(exc)}: {HINT}") from exc
        except AMQPError as exc:
            raise BrokerUnavailable(f"the connection was lost: {reason_of(exc)}") from exc
        return read

    def replay(self, dead_letter: DeadLetter, now: datetime) -> None:
        """Publish a dead letter to the workers again, and remove it from the queue after the broker's confirm.

        Raises:
            WorkerError: the broker did not accept it.
        """
        publish(self._publishing, self._outgoing.replay(dead_letter.delivery(), dead_letter.replay(now)))
        self.discard(dead_letter)

    def discard(self, dead_letter: DeadLetter) -> None:
        """Delete a dead letter.

        Raises:
            BrokerUnavailable: the connection was lost.
        """
        try:
            self._channel.basic_ack(dead_letter.tag)
        except AMQPError as exc:
            raise BrokerUnavailable(f"the connection was lost: {reason_of(exc)}") from exc

    def wait(self, seconds: float) -> None:
        """Sleep while heartbeats keep the connection alive."""
        try:
            self._connection.sleep(seconds)
        except AMQPError as exc:
            raise BrokerUnavailable(f"the connection was lost: {reason_of(exc)}") from exc
