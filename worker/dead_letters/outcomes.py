"""What becomes of replayed dead letters: the workers publish a copy of each reply for who waits for it."""

import json
from contextlib import suppress
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

from pika import BasicProperties
from pika.exceptions import AMQPError, ChannelClosedByBroker

from worker.amqp.address import BrokerAddress
from worker.amqp.blocking import connect_blocking, lost, refused
from worker.amqp.messages import REPLY_COPIES
from worker.amqp.topology import Topology

_PREFETCH = 100
_MAX_WAITING = 10_000  # copies in its queue; the oldest are dropped


class OutcomeWatcher:
    """Receives the copies of replies in an exclusive queue, while it is open.

    No reply is taken from anybody: the queue is bound for the copies only. With a binding for the replies themselves,
    those that no other queue is bound for would not go to the exchange of unrouted replies meanwhile.

    Args:
        broker: where to connect.
        topology: names the exchange.

    Raises:
        WorkerError: the exchange is missing, or reading from it is not permitted.
        BrokerUnavailable: no broker answers, or the connection was lost.
    """

    def __init__(self, broker: BrokerAddress, topology: Topology) -> None:
        self._name = uuid4().hex
        self._received: list[tuple[int, dict[str, Any]]] = []
        self._connection, _ = connect_blocking(broker)
        try:
            channel = self._connection.channel()
            queue = channel.queue_declare("", exclusive=True, arguments={"x-max-length": _MAX_WAITING}).method.queue
            channel.queue_bind(queue, topology.control_exchange, f"{REPLY_COPIES}.{self._name}.*")
            channel.basic_qos(prefetch_count=_PREFETCH)
            channel.basic_consume(queue, self._on_copy)
        except AMQPError as exc:
            self._connection.close_quietly()
            raise refused(exc) if isinstance(exc, ChannelClosedByBroker) else lost(exc) from exc

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._connection.close_quietly()  # nothing is left to be confirmed

    def address(self, number: int) -> str:
        """Return where the workers publish the copy of one reply; ``receive`` gives it with the same number."""
        return f"{self._name}.{number}"

    def receive(self, wait_s: float) -> list[tuple[int, dict[str, Any]]]:
        """Return the replies that have arrived, with their numbers, after a wait for the first of at most ``wait_s``.

        One may arrive twice.

        Raises:
            BrokerUnavailable: the connection was lost.
        """
        try:
            self._connection.process_data_events(time_limit=wait_s)
        except AMQPError as exc:
            raise lost(exc) from exc
        received, self._received = self._received, []
        return received

    def _on_copy(self, channel: Any, method: Any, _properties: BasicProperties, body: bytes) -> None:
        channel.basic_ack(method.delivery_tag)
        with suppress(ValueError):  # otherwise no worker has published it
            number, reply = int(method.routing_key.rpartition(".")[2]), json.loads(body)
            if isinstance(reply, dict) and isinstance(reply.get("status"), str):
                self._received.append((number, reply))
