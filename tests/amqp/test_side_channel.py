"""A further channel on a connection, where there can be none, or none for now."""

import asyncio
from typing import Any
from uuid import uuid4

import pytest
from pydantic import SecretStr

from tests.support.waiting import PATIENCE_S
from worker.amqp import side_channel
from worker.amqp.address import BrokerAddress
from worker.amqp.channel import BrokerChannel
from worker.amqp.connection import connection_parameters
from worker.amqp.side_channel import open_side_channel


async def connected(url: str) -> BrokerChannel:
    channel = BrokerChannel()
    await channel.open(connection_parameters(BrokerAddress([SecretStr(url)]))[0], "test")
    return channel


async def test_a_connection_that_has_just_ended_is_no_error(broker_url: str) -> None:
    """Its owner learns it in another way; an error here would end the worker."""
    channel = await connected(broker_url)
    await channel.close()
    lost: list[str] = []
    open_side_channel(channel.pika_connection, lambda _channel: None, lost.append)
    assert lost == []


async def test_a_connection_without_a_free_channel_says_so(broker_url: str) -> None:
    channel = await connected(f"{broker_url}{'&' if '?' in broker_url else '?'}channel_max=1")
    lost: list[str] = []
    open_side_channel(channel.pika_connection, lambda _channel: None, lost.append)
    await channel.close()
    assert lost == ["the broker allows no further channel on this connection"]


async def test_a_channel_that_is_lost_is_opened_again(broker_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its queue is missing, is declared, is deleted, and declared again: each message in it is taken."""
    monkeypatch.setattr(side_channel, "AGAIN_S", 0.05)
    channel, other = await connected(broker_url), await connected(broker_url)
    queue, bodies, lost = f"test-{uuid4().hex[:8]}", asyncio.Queue[bytes](), asyncio.Queue[str]()

    def begin(side: Any) -> None:
        side.basic_consume(queue, lambda _channel, _method, _properties, body: bodies.put_nowait(body), auto_ack=True)

    open_side_channel(channel.pika_connection, begin, lost.put_nowait)
    async with asyncio.timeout(PATIENCE_S):
        assert "NOT_FOUND" in await lost.get()
        for body, reason in ((b"first", "the broker cancelled the consumer"), (b"second", None)):
            await other.call(other.pika_channel.queue_declare, queue)
            other.pika_channel.basic_publish("", queue, body)
            assert await bodies.get() == body
            if reason is not None:
                await other.call(other.pika_channel.queue_delete, queue)
                assert await lost.get() == reason
    await other.call(other.pika_channel.queue_delete, queue)
    await channel.close()
    await other.close()
