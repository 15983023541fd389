"""An upstream system: publishes commands and reads the replies and the dead letters."""

import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import pika
from pika.exceptions import AMQPError, ConnectionClosedByBroker

from tests.support.waiting import PATIENCE_S
from worker.amqp.blocking import delete_on
from worker.amqp.field_table import decoded, preserve_raw_values
from worker.amqp.topology import Topology

_INTERNAL_ERROR = 541
_ALL = "#"


@dataclass
class Message:
    """A message that the broker delivered."""

    routing_key: str
    properties: pika.BasicProperties
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def headers(self) -> dict[str, Any]:
        """Return the headers without x-delivery-count, which quorum queues add."""
        found = self.properties.headers or {}
        return {name: decoded(value) for name, value in found.items() if name != "x-delivery-count"}


class Upstream:
    """An upstream system on a connection of its own.

    Args:
        url: of the broker; of a cluster the URLs of its nodes, comma-separated, tried in turn.
        topology: of the workers.
    """

    def __init__(self, url: str, topology: Topology) -> None:
        self.topology = topology
        self._urls = url.split(",")
        self._wants_all = True
        self.connect()

    def connect(self) -> None:
        """Connect, or connect again after the connection was lost."""
        preserve_raw_values()
        nodes = [pika.URLParameters(url) for url in self._urls]
        for node in nodes:
            node.blocked_connection_timeout = PATIENCE_S
            if len(nodes) == 1:  # a test may do other things for minutes, without answering heartbeats
                node.heartbeat = 0
        self.connection = pika.BlockingConnection(nodes)
        self.channel = self.connection.channel()
        self.channel.confirm_delivery()

    def disconnect(self) -> None:
        """Close the connection and leave the topology."""
        with suppress(AMQPError):
            self.connection.close()

    def close(self) -> None:
        """Delete the topology of the namespace and close the connection."""
        if not self.connection.is_open:
            self.connect()
        delete_on(self.channel, self.topology)
        self.channel.queue_delete(self.replies_queue)
        self.connection.close()

    @property
    def replies_queue(self) -> str:
        return f"{self.topology.namespace}.test-replies"

    def bind_replies(self, routing_key: str = _ALL) -> None:
        """Bind a durable queue for replies, so that none is lost while the broker is down."""
        self._wants_all = routing_key == _ALL
        arguments = {"x-queue-type": "quorum"} if len(self._urls) > 1 else None  # a classic one is on one node only
        self.channel.queue_declare(self.replies_queue, durable=True, arguments=arguments)
        self.channel.queue_bind(self.replies_queue, self.topology.replies_exchange, routing_key)

    def publish(self, body: bytes | dict[str, Any], **properties: Any) -> None:
        """Publish one command; returns after the publisher confirm."""
        if isinstance(body, dict):
            body = json.dumps(body).encode()
        wanted = pika.BasicProperties(delivery_mode=pika.DeliveryMode.Persistent, **properties)
        self.channel.basic_publish(self.topology.commands_exchange, "execute", body, wanted, mandatory=True)

    def publish_as_returned(self, body: dict[str, Any], headers: dict[str, Any]) -> None:
        """Publish through the exchange to which only workers write."""
        wanted = pika.BasicProperties(delivery_mode=pika.DeliveryMode.Persistent, headers=headers)
        exchange = self.topology.returns_exchange
        self.channel.basic_publish(exchange, "execute", json.dumps(body).encode(), wanted, mandatory=True)

    def get(self, queue: str, patience_s: float = PATIENCE_S) -> Message:
        """Wait for the next message of a queue and acknowledge it."""
        return self._wait_for(partial(self.try_get, queue), queue, patience_s)

    def _wait_for(self, get: Callable[[], Message | None], what: str, patience_s: float) -> Message:
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            try:
                found = get()
            except ConnectionClosedByBroker as exc:
                if exc.reply_code != _INTERNAL_ERROR:
                    raise
                self.connect()  # right after the broker's start a quorum queue may not have a leader yet
                continue
            if found is not None:
                return found
            self.connection.process_data_events(time_limit=0.02)
        raise AssertionError(f"nothing came to {what} within {patience_s} s")

    def try_get(self, queue: str) -> Message | None:
        """Return the next message of a queue and acknowledge it; None if the queue is empty."""
        method, properties, body = self.channel.basic_get(queue)
        if method is None or properties is None or body is None:
            return None
        # Not by auto_ack, which loses the message if the broker is killed now. If this fails, it is delivered again.
        with suppress(AMQPError):
            self.channel.basic_ack(method.delivery_tag or 0)
        return Message(str(method.routing_key), properties, body)

    def take_and_return(self, queue: str, count: int = 1, *, is_requeued: bool = True) -> None:
        """Take messages and return them to the queue, as a consumer that crashes does, or reject them."""
        taken = [self.channel.basic_get(queue)[0] for _ in range(count)]
        for method in taken:
            assert method is not None, f"fewer than {count} messages in {queue}"
            self.channel.basic_nack(method.delivery_tag or 0, requeue=is_requeued)

    def try_reply(self) -> Message | None:
        """Return the next reply; None if there is none.

        A killed broker may lose a binding that was just made; replies without a bound queue go to the unrouted queue.
        """
        found = self.try_get(self.replies_queue)
        return self.try_get(self.topology.unrouted_exchange) if found is None and self._wants_all else found

    def reply(self, patience_s: float = PATIENCE_S) -> Message:
        """Wait for the next reply."""
        return self._wait_for(self.try_reply, self.replies_queue, patience_s)

    def replies(self, count: int) -> list[dict[str, Any]]:
        """Wait for ``count`` replies."""
        return [self.reply().json for _ in range(count)]

    def take_all(self) -> list[Message]:
        """Read all replies that are there, thousands in a second."""
        channel, found = self.connection.channel(), []
        for method, properties, body in channel.consume(self.replies_queue, auto_ack=True, inactivity_timeout=1):
            if method is None or properties is None or body is None:
                break
            found.append(Message(str(method.routing_key), properties, body))
        channel.close()
        return found

    def replies_waiting(self) -> int:
        """Return the number of replies that can be read."""
        return self.count(self.replies_queue)

    def consumers(self) -> int:
        """Return the number of consumers of commands; a closed one counts until its deliveries are requeued."""
        frame = self.channel.queue_declare(self.topology.execute_queue, passive=True)
        return int(frame.method.consumer_count)

    def dead_letter(self) -> Message:
        """Wait for the next dead letter."""
        return self.get(self.topology.dead_letters_exchange)

    def count(self, queue: str) -> int:
        """Return the number of ready messages in a queue."""
        return int(self.channel.queue_declare(queue, passive=True).method.message_count)
