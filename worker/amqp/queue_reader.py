"""Reads a quorum queue that people look into. Reading loses no message and keeps their order.

A quorum queue requeues what a consumer held in delivery order, after earlier requeued messages and before all others.
The order is therefore kept if each reader uses one consumer with a prefetch of exactly the number of messages in the
queue. It is not kept with `basic.get`, with two readers at once, with a smaller prefetch, or with a larger one, since
pika requeues surplus messages last first (measured on 3.10 and 4.0).
"""

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple, Self

from pika import BasicProperties
from pika.exceptions import AMQPError, ChannelClosedByBroker

from schemas.command import MAX_BODY_BYTES
from worker.amqp.address import BrokerAddress
from worker.amqp.blocking import connect_blocking, refused
from worker.amqp.bodies import BoundedAssembler
from worker.amqp.connection import CALL_S, reason_of
from worker.errors import BrokerUnavailable, WorkerError

MAX_PREFETCH = 65_535  # of the protocol
_RESOURCE_LOCKED = 405
_ACCESS_REFUSED = 403
_RETURNING_S = 5.0  # in which the broker returns what a closed reader held; more than enough for 65,535
_LOCKED_S = 5.0  # longest wait for another reader; most take less
_LOOK_AGAIN_S = 0.05


class QueueMessage(NamedTuple):
    """One message of a queue; its tag is valid only on the channel that received it."""

    tag: int
    routing_key: str
    properties: BasicProperties
    body: bytes


class QueueReader:
    """Holds all messages of a queue while it is open; those not removed then return to their places.

    Args:
        broker: where to connect.
        queue: the queue.
        contents: what is in it, for people, in the plural.

    Raises:
        WorkerError: another reader of this queue stays open.
        BrokerUnavailable: no broker answers, or the connection was lost.
    """

    def __init__(self, broker: BrokerAddress, queue: str, contents: str) -> None:
        self._queue = queue
        self._contents = contents
        self.waiting = 0
        self._connection, _ = connect_blocking(broker)
        try:
            self._lock()
            self._channel = self._connection.channel()
            self._publishing = self._connection.channel()
            self._publishing.confirm_delivery()
        except AMQPError as exc:
            self._connection.close_quietly()
            raise BrokerUnavailable(f"the broker refused: {reason_of(exc)}") from exc

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self._connection.close_quietly()
            return
        try:
            if self._connection.is_open:
                self._connection.close()
        except AMQPError as exc:  # the last acknowledgements may be lost
            raise BrokerUnavailable(f"the connection was lost: {reason_of(exc)}") from exc

    def _lock(self) -> None:
        """Exclude other readers until this connection ends; waits a moment for one that is open.

        A quorum queue ignores the consumer's flag "exclusive".
        """
        deadline = time.monotonic() + _LOCKED_S
        while True:
            try:
                self._connection.channel().queue_declare(f"{self._queue}.reading", exclusive=True)
            except ChannelClosedByBroker as exc:
                # Without the right to declare there is no lock; two readers then only change the order.
                if exc.reply_code == _ACCESS_REFUSED:
                    return
                if exc.reply_code != _RESOURCE_LOCKED:
                    raise
                if time.monotonic() >= deadline:
                    self._connection.close_quietly()
                    busy = f"another command is reading the {self._contents}: try again in a moment"
                    raise WorkerError(busy) from exc
            else:
                return
            self._connection.sleep(_LOOK_AGAIN_S)

    def read_messages(
        self, on_message: Callable[[QueueMessage], object], *, cuts_bodies: bool = False, expected: int = 0
    ) -> int:
        """Read all messages that are in the queue now, the oldest first; returns their number.

        Of more than ``MAX_PREFETCH`` messages only so many are read, and the queue's order is lost.

        Args:
            on_message: called with each. What it does not keep takes no memory any more.
            cuts_bodies: whether only the beginning of a body is needed that is too large for a command.
            expected: how many a former reader has just seen, whose messages the broker may still be returning.

        Raises:
            WorkerError: the queue is missing, or reading it is not permitted.
            BrokerUnavailable: the connection was lost.
        """
        read = 0

        def on_delivery(_channel: object, method: Any, properties: Any, body: bytes) -> None:
            nonlocal read
            read += 1
            on_message(QueueMessage(method.delivery_tag, method.routing_key, properties, body))

        if cuts_bodies:
            blocking: Any = self._channel
            channel = blocking._impl  # noqa: SLF001 - pika has no other way
            channel._content_assembler = BoundedAssembler(channel._content_assembler, lambda: MAX_BODY_BYTES)  # noqa: SLF001
        try:
            self.waiting = self._count(expected)
            wanted = min(self.waiting, MAX_PREFETCH)
            if not wanted:
                return read
            self._channel.basic_qos(prefetch_count=wanted)
            consumer = self._channel.basic_consume(self._queue, on_delivery)
            deadline = time.monotonic() + CALL_S
            while (before := read) < wanted and time.monotonic() < deadline:
                self._connection.process_data_events(time_limit=1)
                if read > before:
                    deadline = time.monotonic() + CALL_S
            self._channel.basic_cancel(consumer)  # otherwise each removed message is replaced by a new one
        except ChannelClosedByBroker as exc:
            raise refused(exc) from exc
        except AMQPError as exc:
            raise BrokerUnavailable(f"the connection was lost: {reason_of(exc)}") from exc
        return read

    def _count(self, expected: int) -> int:
        """Return the number of messages in the queue; while it is lower than expected, wait a moment for more."""
        deadline = time.monotonic() + _RETURNING_S
        while True:
            count: int = self._channel.queue_declare(self._queue, passive=True).method.message_count
            if count >= expected or time.monotonic() >= deadline:
                return count
            self._connection.sleep(_LOOK_AGAIN_S)

    def remove(self, tag: int) -> None:
        """Delete a message from the queue.

        Raises:
            BrokerUnavailable: the connection was lost.
        """
        try:
            self._channel.basic_ack(tag)
        except AMQPError as exc:
            raise BrokerUnavailable(f"the connection was lost: {reason_of(exc)}") from exc

    def wait(self, seconds: float) -> None:
        """Sleep while heartbeats keep the connection alive."""
        try:
            self._connection.sleep(seconds)
        except AMQPError as exc:
            raise BrokerUnavailable(f"the connection was lost: {reason_of(exc)}") from exc
