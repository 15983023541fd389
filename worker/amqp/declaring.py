"""Declares the topology, or checks it, over a connection of its own: a worker that has run can consume meanwhile."""

import asyncio
from collections.abc import Sequence
from typing import Any

from pika import URLParameters

from worker.amqp.channel import BrokerChannel
from worker.amqp.topology import Queue, Topology
from worker.errors import BrokerUnavailable, ClosedByBroker

DECLARE_S = 120.0  # a cluster that has just lost a node answers each declaration after many seconds (measured)


async def prepare_topology(
    nodes: Sequence[URLParameters], name: str, topology: Topology, *, declare: bool, spare: BrokerChannel | None = None
) -> int:
    """Declare a topology, or check that it is there; returns the number of consumers of the command queue.

    A node leads the queues that were declared on it. If it hangs, connections to other nodes go on at once with another
    leader, but nothing new can be consumed or published before the cluster gives the node up, after a minute by default
    (measured on 3.10; ``net_ticktime``). So the node that is used for declaring is the last one, and not the first one,
    with which the session is.

    Args:
        nodes: the brokers.
        name: of the connection, in the broker's list of connections.
        topology: the exchanges, queues and bindings.
        declare: whether to declare them.
        spare: open, to use if no other connection can be made: the broker may limit their number for each user.

    Raises:
        BrokerUnavailable: the broker cannot be reached, or does not answer in time.
        ChannelRefused: something is not there (404), is different (406), or this user may not declare it (403).
    """
    error = BrokerUnavailable("")  # there is a node
    for parameters in nodes[-1:] if len(nodes) == 1 else (nodes[-1], nodes[0]):
        channel = BrokerChannel()
        try:
            await channel.open(parameters, name)
            return await _prepare_over(channel, topology, declare=declare)
        except ClosedByBroker:
            raise
        except BrokerUnavailable as exc:
            error = exc
        finally:
            channel.abandon()
    if spare is None:
        raise error
    return await _prepare_over(spare, topology, declare=declare)


async def _prepare_over(channel: BrokerChannel, topology: Topology, *, declare: bool) -> int:
    try:
        async with asyncio.timeout(DECLARE_S):
            return await (_declare(channel, topology) if declare else _check(channel, topology))
    except TimeoutError as exc:
        raise BrokerUnavailable(f"the topology was not declared within {DECLARE_S:g} s") from exc


async def _declare(channel: BrokerChannel, topology: Topology) -> int:
    consumers = 0
    call, pika_channel = channel.call_untimed, channel.pika_channel
    for exchange in topology.exchanges():
        kind, arguments = exchange.kind, exchange.arguments
        await call(pika_channel.exchange_declare, exchange.name, kind, durable=True, arguments=arguments)
    for queue in topology.queues():
        frame = await call(pika_channel.queue_declare, queue.name, durable=True, arguments=queue.arguments)
        consumers += _consumers(topology, queue, frame)
    for binding in topology.bindings():
        await call(pika_channel.queue_bind, binding.queue, binding.exchange, binding.routing_key)
    return consumers


async def _check(channel: BrokerChannel, topology: Topology) -> int:
    consumers = 0
    call, pika_channel = channel.call_untimed, channel.pika_channel
    for exchange in topology.exchanges():
        await call(pika_channel.exchange_declare, exchange.name, passive=True)
    for queue in topology.queues():
        frame = await call(pika_channel.queue_declare, queue.name, passive=True)
        consumers += _consumers(topology, queue, frame)
    return consumers


def _consumers(topology: Topology, queue: Queue, frame: Any) -> int:
    return int(frame.method.consumer_count) if queue.name == topology.execute_queue else 0
