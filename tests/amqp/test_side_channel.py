"""A further channel on a connection, where there can be none."""

from pydantic import SecretStr

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
