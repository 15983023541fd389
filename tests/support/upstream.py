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
from worker.amqp.field_table import preserve_raw_values
from worker.amqp.topology import Topology

_INTERNAL_ERROR = 541
_ALL = "#"


@dataclass
class Message:
    """What the broker delivered."""

    routing_key: str
    properties: pika.BasicProperties
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def headers(self) -> dict[str, Any]:
        """Return the headers, without the one that the broker adds to whatever a quorum queue delivers."""
        return {name: value for name, value in (self.properties.headers or {}).items() if name != "x-delivery-count"}


class Upstream:
    """An upstream system: publishes commands, reads the replies and the dead letters."""

    def __init__(self, url: str, topology: Topology) -> None:
        self.topology = topology
        self._url = url
        self._wants_all = True
        self.connect()

    def connect(self) -> None:
        """Connect, again if need be; what was read before stays."""
        preserve_raw_values()
        parameters = pika.URLParameters(self._url)
        parameters.blocked_connection_timeout = PATIENCE_S
        self.connection = pika.BlockingConnection(parameters)
        self.channel = self.connection.channel()
        self.channel.confirm_delivery()

    def close(self) -> None:
        """Delete everything below the namespace and go."""
        if not self.connection.is_open:
            self.connect()
        delete_on(self.channel, self.topology)
        self.channel.queue_delete(self._replies_queue)
        self.connection.close()

    @property
    def _replies_queue(self) -> str:
        return f"{self.topology.namespace}.test-replies"

    def bind_replies(self, routing_key: str = _ALL) -> None:
        """Read replies from a durable queue of our own, so that none is missed while the broker is away."""
        self._wants_all = routing_key == _ALL
        self.channel.queue_declare(self._replies_queue, durable=True)
        self.channel.queue_bind(self._replies_queue, self.topology.replies_exchange, routing_key)

    def publish(self, body: bytes | dict[str, Any], **properties: Any) -> None:
        """Publish one command; returns when the broker has it."""
        if isinstance(body, dict):
            body = json.dumps(body).encode()
        wanted = pika.BasicProperties(delivery_mode=pika.DeliveryMode.Persistent, **properties)
        self.channel.basic_publish(self.topology.commands_exchange, "execute", body, wanted, mandatory=True)

    def publish_as_returned(self, body: dict[str, Any], headers: dict[str, Any]) -> None:
        """Publish through the exchange that only the worker writes to."""
        wanted = pika.BasicProperties(delivery_mode=pika.DeliveryMode.Persistent, headers=headers)
        exchange = self.topology.returns_exchange
        self.channel.basic_publish(exchange, "execute", json.dumps(body).encode(), wanted, mandatory=True)

    def get(self, queue: str, patience_s: float = PATIENCE_S) -> Message:
        """Wait for the next message of a queue and take it."""
        return self._wait_for(partial(self.try_get, queue), queue, patience_s)

    def _wait_for(self, try_it: Callable[[], Message | None], what: str, patience_s: float) -> Message:
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            try:
                found = try_it()
            except ConnectionClosedByBroker as exc:
                if exc.reply_code != _INTERNAL_ERROR:
                    raise
                self.connect()  # right behind the broker's start a quorum queue may have no leader to ask yet
                continue
            if found is not None:
                return found
            self.connection.process_data_events(time_limit=0.02)
        raise AssertionError(f"nothing came to {what} within {patience_s} s")

    def try_get(self, queue: str) -> Message | None:
        """Take the next message of a queue if one is there."""
        method, properties, body = self.channel.basic_get(queue)
        if method is None or properties is None or body is None:
            return None
        # Not by auto_ack: a broker that is killed meanwhile would forget it. Where this fails it comes once more.
        with suppress(AMQPError):
            self.channel.basic_ack(method.delivery_tag or 0)
        return Message(str(method.routing_key), properties, body)

    def try_reply(self) -> Message | None:
        """Take the next reply if one is there.

        A broker that is killed may have forgotten a binding that was made a second before; what finds no queue then is
        kept for whoever did not bind one.
        """
        found = self.try_get(self._replies_queue)
        return self.try_get(self.topology.unrouted_exchange) if found is None and self._wants_all else found

    def reply(self, patience_s: float = PATIENCE_S) -> Message:
        """Wait for the next reply."""
        return self._wait_for(self.try_reply, self._replies_queue, patience_s)

    def replies(self, count: int) -> list[dict[str, Any]]:
        """Wait for so many replies."""
        return [self.reply().json for _ in range(count)]

    def consumers(self) -> int:
        """Return how many consume commands; who went counts until the broker has back what it held."""
        frame = self.channel.queue_declare(self.topology.execute_queue, passive=True)
        return int(frame.method.consumer_count)

    def dead_letter(self) -> Message:
        """Wait for the next dead letter."""
        return self.get(self.topology.dead_letters_exchange)

    def count(self, queue: str) -> int:
        """Return how many messages a queue holds ready."""
        return int(self.channel.queue_declare(queue, passive=True).method.message_count)
