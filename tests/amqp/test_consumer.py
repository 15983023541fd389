"""The order in which the consumer acknowledges, cancels and consumes again, on a channel that records every call."""

import asyncio
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any, cast

import pytest
from pika import BasicProperties

from worker.amqp.consumer import MANY_RETURNS, QueueConsumer
from worker.amqp.topology import Topology
from worker.errors import BrokerUnavailable

TOPOLOGY = Topology("onenet", (5,))


class FakeChannel:
    """Pika's channel: records what is called, and replies in the next iteration of the loop."""

    def __init__(self) -> None:
        self.history: list[str] = []
        self._deliver: Callable[..., None]
        self._consumers = 0

    def basic_qos(self, *, prefetch_count: int, callback: Callable[[Any], None]) -> None:
        self._reply(f"qos {prefetch_count}", callback)

    def basic_consume(
        self, _queue: str, *, on_message_callback: Callable[..., None], callback: Callable[[Any], None]
    ) -> None:
        self._deliver = on_message_callback
        self._consumers += 1
        self._reply("consume", callback, consumer_tag=f"consumer-{self._consumers}")

    def basic_cancel(self, consumer_tag: str, *, callback: Callable[[Any], None]) -> None:
        self._reply(f"cancel {consumer_tag}", callback)

    def basic_ack(self, tag: int) -> None:
        self.history.append(f"ack {tag}")

    def deliver(self, tag: int, times_returned: int = 0) -> None:
        """Deliver one message."""
        method = SimpleNamespace(delivery_tag=tag, exchange=TOPOLOGY.commands_exchange, redelivered=times_returned > 0)
        self._deliver(self, method, BasicProperties(headers={"x-delivery-count": times_returned}), b"{}")

    def _reply(self, call: str, callback: Callable[[Any], None], **fields: str) -> None:
        self.history.append(call)
        asyncio.get_running_loop().call_soon(callback, SimpleNamespace(method=SimpleNamespace(**fields)))


class Bench:
    """A consumer on such a channel; ``deliveries`` are those that it passed on."""

    def __init__(self) -> None:
        self.channel = FakeChannel()
        self.deliveries: list[object] = []
        self._tasks: list[asyncio.Task[None]] = []
        self.consumer = QueueConsumer(1, TOPOLOGY, self.deliveries.append, self._run)
        self.consumer.channel.pika_channel = cast("Any", self.channel)

    async def settled(self) -> None:
        """Wait until the consumer has finished the operations that it started."""
        await asyncio.gather(*self._tasks)

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.append(asyncio.ensure_future(work))


@pytest.fixture
async def bench() -> Bench:
    return Bench()


async def test_a_session_takes_one_delivery_and_then_as_many_as_wanted(bench: Bench) -> None:
    """The first delivery stays unacknowledged outside of any consumer, and counts towards the prefetch."""
    await bench.consumer.consume(10)
    bench.channel.deliver(1)
    await bench.settled()
    assert bench.channel.history == ["qos 1", "consume", "cancel consumer-1", "qos 9", "consume"]


async def test_acknowledgements_are_deferred_until_the_consumer_is_cancelled(bench: Bench) -> None:
    """An acknowledgement before would have the broker send a delivery that pika requeues as if it had been handled."""
    channel, consumer = bench.channel, bench.consumer
    await consumer.consume(3)
    channel.deliver(1)
    await bench.settled()
    channel.deliver(2)
    stopping = asyncio.ensure_future(consumer.consume(0))
    await asyncio.sleep(0)
    consumer.acknowledge(1)
    assert "ack 1" not in channel.history
    channel.deliver(3)  # which uses the prefetch up
    await stopping
    assert bench.channel.history[-2:] == ["cancel consumer-2", "ack 1"]
    assert bench.consumer.unacknowledged == 2


async def test_after_a_message_that_was_returned_many_times_one_delivery_is_taken_at_a_time(bench: Bench) -> None:
    """It may be one that crashes workers, and would raise the delivery counts of all other held deliveries."""
    await bench.consumer.consume(2)
    bench.channel.deliver(1)
    await bench.settled()
    bench.channel.history.clear()
    bench.channel.deliver(2, times_returned=MANY_RETURNS)
    await bench.settled()
    assert bench.channel.history == ["cancel consumer-2", "qos 1", "consume"]


async def test_a_message_that_arrives_after_the_channel_was_lost_is_not_passed_on(bench: Bench) -> None:
    """It cannot be acknowledged any more, and the broker delivers it to the next session."""
    await bench.consumer.consume(2)
    bench.consumer.channel.fail(BrokerUnavailable("cut"))
    bench.channel.deliver(1)
    assert bench.deliveries == []
    assert bench.consumer.unacknowledged == 0
