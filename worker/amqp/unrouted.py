"""Reads, publishes again and discards the replies that no queue was bound for."""

from copy import copy

from pika import BasicProperties, DeliveryMode
from pika.exceptions import AMQPError, ChannelClosedByBroker, NackError, UnroutableError

from worker.amqp.address import BrokerAddress
from worker.amqp.connection import reason_of
from worker.amqp.messages import without_brokers_headers
from worker.amqp.queue_reader import QueueMessage, QueueReader
from worker.amqp.topology import Topology
from worker.errors import BrokerUnavailable, WorkerError


class UnroutedReader(QueueReader):
    """Holds all unrouted replies while it is open; those not published or discarded then return to their places.

    Args:
        broker: where to connect.
        topology: names the queue and the exchange of replies.

    Raises:
        WorkerError: another reader is open.
        BrokerUnavailable: no broker answers, or the connection was lost.
    """

    def __init__(self, broker: BrokerAddress, topology: Topology) -> None:
        super().__init__(broker, topology.unrouted_exchange, "unrouted replies")  # named like the exchange
        self._topology = topology
        self._witness: str | None = None

    def publish(self, message: QueueMessage) -> bool:
        """Publish a reply again under its routing key; returns whether a queue is bound for it by now.

        If none is, the reply is still in the queue of unrouted replies, but is its last now. It is never in no queue:
        it is removed only after the broker has confirmed its copy. Where it goes is seen by a queue of this connection
        that also receives what is unrouted, since the alternate exchange hides from a publisher that none was bound.

        Raises:
            WorkerError: the broker did not accept it, or this user lacks a right.
            BrokerUnavailable: the connection was lost.
        """
        exchange, key = self._topology.replies_exchange, message.routing_key
        try:
            if self._witness is None:
                self._witness = self._publishing.queue_declare("", exclusive=True).method.queue
                self._publishing.queue_bind(self._witness, self._topology.unrouted_exchange)
            properties = _copied(message.properties)
            self._publishing.basic_publish(exchange, key, message.body, properties, mandatory=True)
            is_unrouted = self._has_seen(message)
        except UnroutableError:
            return False  # nobody took it, not even the queue of unrouted replies: the alternate exchange was removed
        except NackError as exc:
            raise WorkerError(f"a queue that is bound for {key} refuses it: it is full, or has no leader now") from exc
        except ChannelClosedByBroker as exc:
            raise WorkerError(reason_of(exc)) from exc
        except AMQPError as exc:
            raise BrokerUnavailable(f"the connection was lost: {reason_of(exc)}") from exc
        self.remove(message.tag)
        return not is_unrouted

    def _has_seen(self, message: QueueMessage) -> bool:
        """Tell whether a reply, whose publication was confirmed, went to the queue of unrouted replies.

        The broker has put it into both queues by then. Those of the workers pass here too.
        """
        while True:
            method, _, body = self._publishing.basic_get(str(self._witness), auto_ack=True)
            if method is None:
                return False
            if (method.routing_key, body) == (message.routing_key, message.body):
                return True


def _copied(original: BasicProperties) -> BasicProperties:
    properties = copy(original)
    properties.headers = without_brokers_headers(original.headers or {}) or None
    properties.delivery_mode = DeliveryMode.Persistent.value
    properties.user_id = properties.expiration = None
    return properties
