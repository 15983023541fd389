"""Declares what the work needs, or checks it, over a connection of its own, so that a worker can consume meanwhile."""

import asyncio
from collections.abc import Sequence
from typing import Any

from pika import URLParameters

from worker.amqp.channel import BrokerChannel
from worker.amqp.topology import Part, Topology
from worker.errors import BrokerUnavailable, ClosedByBroker

DECLARE_S = 120.0  # a cluster that has just lost a node answers each declaration after many seconds (measured)


async def prepare_topology(
    nodes: Sequence[URLParameters], name: str, topology: Topology, *, declare: bool, spare: BrokerChannel | None = None
) -> int:
    """Declare what the work needs, or check that it is there; returns the number of consumers of the command queue.

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
            consumers = await (declare_part if declare else _check_part)(channel, topology.work)
            return consumers[topology.execute_queue]
    except TimeoutError as exc:
        raise BrokerUnavailable(f"the topology was not declared within {DECLARE_S:g} s") from exc


async def declare_part(channel: BrokerChannel, part: Part) -> dict[str, int]:
    """Declare a part of a topology; returns the number of consumers of each of its queues.

    Raises:
        BrokerUnavailable: the connection was lost.
        ChannelRefused: something is different (406), or this user may not declare it (403).
    """
    call, pika_channel = channel.call_untimed, channel.pika_channel
    for exchange in part.exchanges:
        kind, arguments = exchange.kind, exchange.arguments
        await call(pika_channel.exchange_declare, exchange.name, kind, durable=True, arguments=arguments)
    consumers = {}
    for queue in part.queues:
        frame = await call(pika_channel.queue_declare, queue.name, durable=True, arguments=queue.arguments)
        consumers[queue.name] = _consumers(frame)
    for binding in part.bindings:
        await call(pika_channel.queue_bind, binding.queue, binding.exchange, binding.routing_key)
    return consumers


async def _check_part(channel: BrokerChannel, part: Part) -> dict[str, int]:
    call, pika_channel = channel.call_untimed, channel.pika_channel
    for exchange in part.exchanges:
        await call(pika_channel.exchange_declare, exchange.name, passive=True)
    return {
        queue.name: _consumers(await call(pika_channel.queue_declare, queue.name, passive=True))
        for queue in part.queues
    }


def _consumers(frame: Any) -> int:
    return int(frame.method.consumer_count)
