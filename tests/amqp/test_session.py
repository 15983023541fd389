"""One session with a real broker: what ``settle`` tells, and what becomes of the delivery."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from uuid import uuid4

import pytest
from pika import BasicProperties
from pydantic import SecretStr

from tests.support.builders import a_command
from tests.support.proxies import Proxy
from tests.support.upstream import Upstream
from tests.support.waiting import PATIENCE_S
from worker.amqp.address import BrokerAddress
from worker.amqp.blocking import declare_on
from worker.amqp.channel import BrokerChannel
from worker.amqp.connection import connection_parameters
from worker.amqp.consumer import Source
from worker.amqp.messages import Delivery, Publication
from worker.amqp.session import Session
from worker.amqp.suspects import Suspects
from worker.amqp.topology import Topology
from worker.dev.services.ports import wait_until


@dataclass
class Opened:
    """A session that consumes, and its deliveries."""

    session: Session
    deliveries: asyncio.Queue[Delivery]

    async def next(self) -> Delivery:
        async with asyncio.timeout(PATIENCE_S):
            return await self.deliveries.get()


@asynccontextmanager
async def a_session(url: str, topology: Topology, number: int = 1) -> AsyncIterator[Opened]:
    deliveries: asyncio.Queue[Delivery] = asyncio.Queue()
    nodes = connection_parameters(BrokerAddress([SecretStr(url)]))
    channel = BrokerChannel()
    await channel.open(nodes[0], "test consume")
    source, put = Source(topology.execute_queue, is_cautious=True), deliveries.put_nowait
    session = Session(number, topology, source, channel, nodes, Suspects(), put, lambda _is_blocked: None)
    try:
        await session.open("test", declare=False)
        await session.consumer.consume(10)
        yield Opened(session, deliveries)
    finally:
        await session.close()


@pytest.fixture
def upstream(broker_url: str) -> Iterator[Upstream]:
    """An upstream system that has published one command and reads the replies."""
    upstream = Upstream(broker_url, Topology(f"test-{uuid4().hex[:8]}", (1,)))
    declare_on(upstream.channel, upstream.topology)
    upstream.bind_replies()
    upstream.publish(a_command())
    yield upstream
    upstream.close()


@pytest.fixture
def proxy(broker_url: str) -> Iterator[Proxy]:
    proxy = Proxy(broker_url)
    yield proxy
    proxy.close()


def a_reply(topology: Topology) -> Publication:
    return Publication(topology.replies_exchange, "execute.accepted.unknown", BasicProperties(delivery_mode=2), b"{}")


def assert_none_is_left(upstream: Upstream) -> None:
    """Fail if the broker still has the command, after the session that had it was closed."""
    wait_until(lambda: upstream.consumers() == 0, PATIENCE_S, "the end of the consumer")
    assert upstream.count(upstream.topology.execute_queue) == 0


async def test_settle_is_true_once_the_reply_is_confirmed_and_the_delivery_acknowledged(
    broker_url: str, upstream: Upstream
) -> None:
    async with a_session(broker_url, upstream.topology) as opened:
        delivery = await opened.next()
        assert await opened.session.settle(delivery, [a_reply(upstream.topology), a_reply(upstream.topology)])
        # Its acknowledgement waits while the consumer that took a first delivery alone is replaced.
        await asyncio.wait_for(opened.session.consumer.drain(), PATIENCE_S)
        assert opened.session.consumer.unacknowledged == 0
    assert_none_is_left(upstream)
    assert upstream.reply().body == upstream.reply().body == b"{}"


async def test_settle_is_false_if_the_session_is_lost_before_the_confirm(
    broker_url: str, upstream: Upstream, proxy: Proxy
) -> None:
    """The broker delivers the command again, and the session that gets it can settle it."""
    async with a_session(proxy.url, upstream.topology) as opened:
        delivery = await opened.next()
        proxy.silence()  # so that no confirm arrives
        settling = asyncio.create_task(opened.session.settle(delivery, [a_reply(upstream.topology)]))
        await asyncio.sleep(0)
        proxy.cut()
        async with asyncio.timeout(PATIENCE_S):
            assert not await settling
            await opened.session.lost
    async with a_session(broker_url, upstream.topology, number=2) as opened:
        again = await opened.next()
        assert again.is_redelivered
        assert await opened.session.settle(again, [a_reply(upstream.topology)])


async def test_a_delivery_of_a_lost_session_is_neither_published_for_nor_acknowledged_by_the_next(
    broker_url: str, upstream: Upstream, proxy: Proxy
) -> None:
    """Delivery tags begin at 1 again: it would acknowledge another delivery."""
    async with a_session(proxy.url, upstream.topology) as opened:
        void = await opened.next()
        proxy.cut()
        async with asyncio.timeout(PATIENCE_S):
            await opened.session.lost
        assert not await opened.session.settle(void, [a_reply(upstream.topology)])
    async with a_session(broker_url, upstream.topology, number=2) as opened:
        again = await opened.next()
        assert again.tag == void.tag
        assert not await opened.session.settle(void, [a_reply(upstream.topology)])
        assert opened.session.consumer.unacknowledged == 1
        assert await opened.session.settle(again, [a_reply(upstream.topology)])
    assert upstream.reply().body == b"{}"
    assert upstream.try_reply() is None


async def test_a_confirm_that_nobody_waits_for_any_more_still_acknowledges_the_delivery(
    broker_url: str, upstream: Upstream
) -> None:
    """The wait for an announcement has a time limit; the copy has taken the delivery's place all the same."""
    async with a_session(broker_url, upstream.topology) as opened:
        delivery = await opened.next()
        settling = asyncio.create_task(opened.session.settle(delivery, [a_reply(upstream.topology)]))
        await asyncio.sleep(0)  # published
        settling.cancel()
        async with asyncio.timeout(PATIENCE_S):
            await opened.session.consumer.drain()
        assert settling.cancelled()
    assert_none_is_left(upstream)
    assert upstream.reply().body == b"{}"


async def test_closing_a_session_ends_every_settle(broker_url: str, upstream: Upstream) -> None:
    async with a_session(broker_url, upstream.topology) as opened:
        delivery = await opened.next()
        settling = asyncio.create_task(opened.session.settle(delivery, [a_reply(upstream.topology)]))
        await asyncio.sleep(0)  # published, and not yet written
    assert not await settling


async def test_what_the_consumers_of_a_lost_session_held_comes_back_in_order(
    broker_url: str, upstream: Upstream, proxy: Proxy
) -> None:
    """Each change of the prefetch is another consumer, and the cancelled ones still hold what they were sent."""
    names = [f"{number:02}" for number in range(40)]
    upstream.get(upstream.topology.execute_queue)  # the command of the fixture
    for name in names:
        upstream.publish(name.encode())
    async with a_session(proxy.url, upstream.topology) as opened:
        held = 10
        for prefetch in (20, 5, 8):
            for _ in range(held):
                await opened.next()
            await opened.session.consumer.consume(prefetch)
            held = prefetch
        proxy.cut()
        async with asyncio.timeout(PATIENCE_S):
            await opened.session.lost
    async with a_session(broker_url, upstream.topology, number=2) as opened:
        found = []
        for _ in names:
            delivery = await opened.next()
            found.append(delivery.body.decode())
            assert await opened.session.settle(delivery, [a_reply(upstream.topology)])
    assert found == names


async def test_a_large_body_whose_dead_letter_is_refused_is_left_to_the_broker(
    broker_url: str, upstream: Upstream
) -> None:
    """The broker accepts no dead letter for a while: a few large bodies would take all memory of the worker."""
    topology = upstream.topology
    async with a_session(broker_url, topology) as opened:
        assert await opened.session.settle(await opened.next(), [a_reply(topology)])
        upstream.channel.queue_unbind(topology.dead_letters_exchange, topology.dead_letters_exchange, "#")
        upstream.publish(b"x" * 200_000)
        large = await opened.next()
        exchange, key = topology.dead_letters_exchange, "execute.invalid_message"
        dead_letter = Publication(exchange, key, BasicProperties(delivery_mode=2), large.body)
        async with asyncio.timeout(PATIENCE_S):
            assert await opened.session.settle(large, [a_reply(topology), dead_letter])
        assert opened.session.consumer.unacknowledged == 0
