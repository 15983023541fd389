"""Logs the routing keys of replies that nobody has bound a queue for: their senders wait for an answer in vain.

The alternate exchange keeps such replies, and the broker does not tell the publisher. It also copies the latest of them
into a short queue of samples, which workers read slowly: what it drops costs nothing, and a key that is used again
comes again.
"""

import asyncio
from collections import OrderedDict
from typing import Any

from pika import BasicProperties
from pika.adapters.asyncio_connection import AsyncioConnection
from pika.channel import Channel

from worker.amqp.side_channel import open_side_channel
from worker.amqp.topology import Topology
from worker.telemetry.logs import get_logger

_SAMPLES = 10
_PERIOD_S = 1.0  # in which so many samples are read at most
_MAX_KEYS = 1_000  # that are remembered
_MAX_LINES = 50  # in one period of so many seconds: a system may use another reply_to for each command
_LINES_PERIOD_S = 3600.0

log = get_logger()


class UnroutedWatch:
    """Reads samples of unrouted replies, and logs each routing key once.

    Args:
        topology: has the queue of samples.
        declare: whether to declare it.
    """

    def __init__(self, topology: Topology, *, declare: bool) -> None:
        self._topology = topology
        self._declare = declare
        self._loop = asyncio.get_running_loop()
        self._known: OrderedDict[str, None] = OrderedDict()
        self._lines = 0
        self._lines_until = 0.0

    def begin(self, connection: AsyncioConnection) -> None:
        """Read samples for as long as a connection lasts."""

        def consume(channel: Channel) -> None:
            if self._declare:
                for queue in self._topology.samples.queues:
                    channel.queue_declare(queue.name, durable=True, arguments=queue.arguments)
                for binding in self._topology.samples.bindings:
                    channel.queue_bind(binding.queue, binding.exchange, binding.routing_key)
            channel.basic_qos(prefetch_count=_SAMPLES)
            channel.basic_consume(self._topology.unrouted_samples_queue, self._on_message)

        open_side_channel(
            connection, consume, lambda reason: log.warning("unrouted_replies_not_watched", reason=reason)
        )

    def _on_message(self, channel: Channel, method: Any, _properties: BasicProperties, _body: bytes) -> None:
        # A reply that this worker has diverted comes from another exchange, and was logged then.
        if method.exchange == self._topology.replies_exchange:
            self._note(method.routing_key)
        self._loop.call_later(_PERIOD_S, _acknowledge, channel, method.delivery_tag)

    def _note(self, routing_key: str) -> None:
        if routing_key in self._known:
            self._known.move_to_end(routing_key)
            return
        now = self._loop.time()
        if now > self._lines_until:
            self._lines, self._lines_until = 0, now + _LINES_PERIOD_S
        if self._lines == _MAX_LINES:
            return
        self._lines += 1
        self._known[routing_key] = None
        if len(self._known) > _MAX_KEYS:
            self._known.popitem(last=False)
        hint = f"bind a queue to {self._topology.replies_exchange} with this key; see onenet-worker unrouted"
        log.warning("reply_unrouted", routing_key=routing_key, hint=hint)


def _acknowledge(channel: Channel, tag: int) -> None:
    if channel.is_open:
        channel.basic_ack(tag)
