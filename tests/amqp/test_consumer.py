"""The order in which the consumer acknowledges, cancels and consumes again, on a channel that records every call."""

import asyncio
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any, Literal, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pika import BasicProperties

from schemas.command import MAX_BODY_BYTES
from worker.amqp.channel import BrokerChannel
from worker.amqp.consumer import MANY_RETURNS, QueueConsumer, Source
from worker.amqp.topology import Topology
from worker.errors import BrokerUnavailable

TOPOLOGY = Topology("onenet", (5,))


class FakeChannel:
    """Pika's channel: records what is called, and replies in the next iteration of the loop.

    ``unacknowledged`` are the delivery tags that a broker would deliver again if the connection were lost now.
    """

    def __init__(self) -> None:
        self.history: list[str] = []
        self.unacknowledged: set[int] = set()
        self.consumers: set[str] = set()
        self.arrives_with_reply: list[int] = []  # in the same read as the next consume-ok
        self._cancelled: set[str] = set()  # of pika's own, which returns what still arrives for these consumers
        self._deliver: Callable[..., None]
        self._last_consumer = ""

    def basic_qos(self, *, prefetch_count: int, callback: Callable[[Any], None]) -> None:
        self._reply(f"qos {prefetch_count}", callback)

    def basic_consume(
        self,
        _queue: str,
        *,
        consumer_tag: str,
        on_message_callback: Callable[..., None],
        callback: Callable[[Any], None],
    ) -> None:
        assert not self.consumers, "one consumer at a time"
        assert consumer_tag > self._last_consumer, "the broker returns messages in the order of the tags"
        self._deliver = on_message_callback
        self._last_consumer = consumer_tag
        self.consumers.add(consumer_tag)
        for tag in self.arrives_with_reply:
            self.deliver(tag)
        self.arrives_with_reply = []
        self._reply("consume", callback)

    def basic_cancel(self, consumer_tag: str, *, callback: Callable[[Any], None]) -> None:
        self.consumers.remove(consumer_tag)
        self._cancelled.add(consumer_tag)
        self._reply("cancel", callback)

    def basic_ack(self, tag: int, *, multiple: bool = False) -> None:
        self.history.append(f"ack {'up to ' if multiple else ''}{tag}")
        assert tag in self.unacknowledged, "the broker closes the channel over an unknown delivery tag"
        self.unacknowledged -= {each for each in self.unacknowledged if each <= tag} if multiple else {tag}

    def basic_nack(self, tag: int) -> None:
        self.history.append(f"nack {tag}")
        self.unacknowledged.remove(tag)

    def deliver(self, tag: int, times_returned: int = 0, body: bytes = b"{}", app_id: str = "") -> None:
        """Deliver one message."""
        assert self._last_consumer not in self._cancelled
        self.unacknowledged.add(tag)
        method = SimpleNamespace(delivery_tag=tag, exchange=TOPOLOGY.commands_exchange, redelivered=times_returned > 0)
        properties = BasicProperties(headers={"x-delivery-count": times_returned}, app_id=app_id)
        self._deliver(self, method, properties, body)

    def _reply(self, call: str, callback: Callable[[Any], None], **fields: str) -> None:
        self.history.append(call)
        asyncio.get_running_loop().call_soon(callback, SimpleNamespace(method=SimpleNamespace(**fields)))


class Bench:
    """A consumer on such a channel; ``deliveries`` are those that it passed on."""

    def __init__(self, *, is_cautious: bool = True) -> None:
        self.channel = FakeChannel()
        self.deliveries: list[Any] = []
        self.acknowledged: list[int] = []
        self._tasks: list[asyncio.Task[None]] = []
        channel = BrokerChannel()
        channel.pika_channel = cast("Any", self.channel)
        source = Source(TOPOLOGY.execute_queue, is_cautious=is_cautious)
        self.consumer = QueueConsumer(
            1, TOPOLOGY, source, channel, self.deliveries.append, self.acknowledged.extend, self._run
        )

    @property
    def excess(self) -> list[int]:
        """The tags of the deliveries that are to be given back."""
        return [delivery.tag for delivery in self.deliveries if delivery.is_excess]

    async def settled(self) -> None:
        """Wait until the consumer has finished the operations that it started."""
        await asyncio.gather(*self._tasks)

    async def consume_several(self) -> None:
        """Consume, beyond the single delivery with which a session begins: that is tag 1."""
        await self.consumer.consume(10)
        self.channel.deliver(1)
        await self.settled()
        self.consumer.acknowledge(1)
        await asyncio.sleep(0)
        self.channel.history.clear()

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.append(asyncio.ensure_future(work))


class Reading:
    """Whether the connection of a bench is read."""

    def __init__(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_on = asyncio.Event()
        self.is_on.set()
        monkeypatch.setattr(bench.consumer.channel, "pause_reading", self.is_on.clear)
        monkeypatch.setattr(bench.consumer.channel, "resume_reading", self.is_on.set)
        monkeypatch.setattr(BrokerChannel, "heartbeat_s", 60.0)


@pytest.fixture
async def bench() -> Bench:
    return Bench()


async def test_a_session_takes_one_delivery_and_then_as_many_as_wanted(bench: Bench) -> None:
    """The first delivery stays unacknowledged outside of any consumer, and counts towards the prefetch."""
    await bench.consumer.consume(10)
    bench.channel.deliver(1)
    await bench.settled()
    assert bench.channel.history == ["qos 1", "consume", "cancel", "qos 9", "consume"]


async def test_more_deliveries_are_taken_by_another_consumer_in_the_place_of_the_first(bench: Bench) -> None:
    """What the first one holds waits for busy devices, and must not take the place of deliveries for free ones."""
    await bench.consumer.consume(3)
    bench.channel.deliver(1)
    await bench.settled()
    for tag in (2, 3):
        bench.channel.deliver(tag)
    bench.channel.history.clear()
    await bench.consumer.consume(6)
    assert bench.channel.history == ["cancel", "qos 6", "consume"]


async def test_a_larger_prefetch_waits_until_the_present_one_is_used_up(bench: Bench) -> None:
    """What the broker sends while a consumer is cancelled goes back as redelivered, though nobody has handled it."""
    await bench.consumer.consume(3)
    bench.channel.deliver(1)
    await bench.settled()
    bench.channel.deliver(2)
    bench.channel.history.clear()
    await bench.consumer.consume(6)
    assert bench.channel.history == []
    bench.channel.deliver(3)
    await bench.settled()
    assert bench.channel.history == ["cancel", "qos 6", "consume"]


async def test_a_delivery_that_comes_with_the_brokers_reply_uses_the_prefetch_up(bench: Bench) -> None:
    await bench.consumer.consume(3)
    bench.channel.deliver(1)
    await bench.settled()
    bench.consumer.acknowledge(1)
    await bench.consumer.consume(0)
    bench.channel.arrives_with_reply = [2]
    await bench.consumer.consume(1)
    await bench.consumer.consume(3)
    assert bench.channel.history[-3:] == ["cancel", "qos 2", "consume"]


async def test_what_arrives_while_the_consumer_is_cancelled_is_held(bench: Bench) -> None:
    """Pika would return it to the queue as if it had been handled."""
    channel, consumer = bench.channel, bench.consumer
    await consumer.consume(3)
    channel.deliver(1)
    await bench.settled()
    stopping = asyncio.ensure_future(consumer.consume(0))
    await asyncio.sleep(0)
    assert channel.history[-1] == "cancel"
    channel.deliver(2)
    consumer.acknowledge(1)
    await stopping
    await asyncio.sleep(0)
    assert bench.acknowledged == [1]
    assert [delivery.tag for delivery in bench.deliveries] == [1, 2]
    assert consumer.unacknowledged == 1


@pytest.mark.parametrize("body", [b" " * (MAX_BODY_BYTES + 1), b" " * 50_000], ids=["too large", "too much"])
async def test_a_large_message_that_arrives_while_the_consumer_is_cancelled_is_returned(
    bench: Bench, body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the broker's reply, because the cancelled consumer would get it again; what is small is held."""
    monkeypatch.setattr("worker.amqp.consumer.MAX_HELD_BYTES", 10_000)
    reading = Reading(bench, monkeypatch)
    channel, consumer = bench.channel, bench.consumer
    await bench.consume_several()
    stopping = asyncio.ensure_future(consumer.consume(0))
    await asyncio.sleep(0)
    for tag in (2, 3):
        channel.deliver(tag, body=body)
    channel.deliver(4)
    assert reading.is_on.is_set()
    await stopping
    assert channel.history == ["cancel", "nack 2", "nack 3"]
    assert [delivery.tag for delivery in bench.deliveries] == [1, 4]
    assert channel.unacknowledged == {4}


async def test_what_is_settled_while_others_are_to_be_returned_is_acknowledged_alone(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    Reading(bench, monkeypatch)
    await bench.consume_several()
    stopping = asyncio.ensure_future(bench.consumer.consume(0))
    await asyncio.sleep(0)
    bench.channel.deliver(2, body=b" " * (MAX_BODY_BYTES + 1))
    bench.channel.deliver(3)
    bench.consumer.acknowledge(3)
    await stopping
    await asyncio.sleep(0)
    assert bench.channel.history == ["cancel", "ack 3", "nack 2"]


async def test_a_large_message_whose_reply_is_rejected_keeps_no_others_unread(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading = Reading(bench, monkeypatch)
    await bench.consume_several()
    bench.channel.deliver(2, body=b" " * (MAX_BODY_BYTES + 1))
    assert not reading.is_on.is_set()
    bench.consumer.take_next_beside(2)
    assert reading.is_on.is_set()


async def test_one_frame_acknowledges_all_that_was_settled_before_the_oldest_delivery_in_progress(
    bench: Bench,
) -> None:
    await bench.consume_several()
    for tag in range(2, 8):
        bench.channel.deliver(tag)
    for tag in (3, 2, 4, 6):
        bench.consumer.acknowledge(tag)
    await asyncio.sleep(0)
    assert bench.channel.history == ["ack up to 4", "ack 6"]
    assert bench.channel.unacknowledged == {5, 7}


async def test_nothing_is_acknowledged_over_a_channel_that_was_lost_meanwhile(bench: Bench) -> None:
    await bench.consume_several()
    bench.channel.deliver(2)
    bench.consumer.acknowledge(2)
    bench.consumer.channel.fail(BrokerUnavailable("cut"))
    await asyncio.sleep(0)
    assert bench.channel.unacknowledged == {2}


Turn = list[tuple[Literal["deliver", "acknowledge", "requeue"], int]]


@given(turns=st.lists(st.lists(st.tuples(st.sampled_from(["deliver", "acknowledge", "requeue"]), st.integers(0, 9)))))
async def test_whatever_the_order_just_what_was_settled_is_acknowledged(turns: list[Turn]) -> None:
    """An acknowledgement of a delivery in progress would lose its command if this worker crashed."""
    bench = Bench()
    await bench.consume_several()
    in_progress: list[int] = []
    delivered = 1
    for turn in turns:
        for action, choice in turn:
            if action == "deliver":
                delivered += 1
                bench.channel.deliver(delivered)
                in_progress.append(delivered)
            elif in_progress:
                getattr(bench.consumer, action)(in_progress.pop(choice % len(in_progress)))
        await asyncio.sleep(0)
        assert bench.channel.unacknowledged == set(in_progress)
        assert bench.consumer.unacknowledged == len(in_progress)


async def test_after_a_message_that_was_returned_many_times_one_delivery_is_taken_at_a_time(bench: Bench) -> None:
    """It may be one that crashes workers, and would raise the delivery counts of all other held deliveries."""
    await bench.consumer.consume(2)
    bench.channel.deliver(1)
    await bench.settled()
    bench.channel.history.clear()
    bench.channel.deliver(2, times_returned=MANY_RETURNS)
    await bench.settled()
    assert bench.channel.history == ["cancel", "qos 1", "consume"]


async def test_messages_whose_processing_sends_nothing_are_taken_together_however_often_they_were_returned() -> None:
    """One that hangs would keep all the others waiting."""
    bench = Bench(is_cautious=False)
    await bench.consumer.consume(3)
    for tag in (1, 2, 3):
        bench.channel.deliver(tag, times_returned=MANY_RETURNS)
    await bench.settled()
    assert bench.channel.history == ["qos 3", "consume"]


async def test_a_message_that_arrives_after_the_channel_was_lost_is_not_passed_on(bench: Bench) -> None:
    """It cannot be acknowledged any more, and the broker delivers it to the next session."""
    await bench.consumer.consume(2)
    bench.consumer.channel.fail(BrokerUnavailable("cut"))
    bench.channel.deliver(1)
    assert bench.deliveries == []
    assert bench.consumer.unacknowledged == 0


async def test_while_too_much_is_held_each_large_message_is_to_be_given_back_before_the_next_is_read(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small ones are held beyond the bound, so that large ones of another sender do not keep them from being read."""
    monkeypatch.setattr("worker.amqp.consumer.MAX_HELD_BYTES", 110_000)
    reading = Reading(bench, monkeypatch)
    await bench.consume_several()
    bench.channel.deliver(2, body=b" " * 60_000)
    assert reading.is_on.is_set()
    bench.channel.deliver(3, body=b" " * 60_000)
    assert not reading.is_on.is_set()
    bench.consumer.acknowledge(3)
    await asyncio.sleep(0)
    assert reading.is_on.is_set()
    bench.channel.deliver(4, body=b" " * 10_000)
    bench.channel.deliver(5)
    assert reading.is_on.is_set()
    assert bench.excess == [3]


async def test_only_the_sender_that_takes_much_gives_large_messages_back(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bound for one sender is three times what is free: what it cannot have is there for others."""
    monkeypatch.setattr("worker.amqp.consumer.MAX_HELD_BYTES", 1_000_000)
    Reading(bench, monkeypatch)
    await bench.consume_several()
    for tag in range(2, 22):
        bench.channel.deliver(tag, body=b" " * 50_000, app_id="greedy")
        if bench.excess == [tag]:
            break
    else:
        pytest.fail("one sender may hold everything")
    bench.consumer.acknowledge(tag)
    await asyncio.sleep(0)
    bench.channel.deliver(30, body=b" " * 50_000, app_id="modest")
    bench.channel.deliver(31, body=b" " * 50_000, app_id="greedy")
    assert bench.excess == [tag, 31]


async def test_small_bodies_with_wide_properties_are_bounded_too(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """They take more than many a large body does."""
    monkeypatch.setattr("worker.amqp.consumer.MAX_HELD_BYTES", 100_000)
    Reading(bench, monkeypatch)
    await bench.consume_several()
    for tag in range(2, 102):
        bench.channel.deliver(tag, app_id="\U0001f600" + "a" * 2_000)
    assert len(bench.excess) > 80


async def test_large_bodies_and_what_is_given_back_take_no_room_of_another_sender(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have a bound of their own, or leave at once."""
    monkeypatch.setattr("worker.amqp.consumer.MAX_HELD_BYTES", 1_000_000)
    Reading(bench, monkeypatch)
    await bench.consume_several()
    bench.channel.deliver(2, body=b" " * 5_000_000, app_id="greedy")
    for tag in range(3, 60):
        bench.channel.deliver(tag, body=b" " * 50_000, app_id="greedy")
    assert bench.excess
    bench.channel.deliver(60, body=b" " * 50_000, app_id="modest")
    assert 60 not in bench.excess


async def test_what_a_sender_holds_is_forgotten_when_it_is_settled(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.amqp.consumer.MAX_HELD_BYTES", 100_000)
    await bench.consume_several()
    for tag in range(2, 20):
        bench.channel.deliver(tag, body=b" " * 50_000, app_id="steady")
        bench.consumer.acknowledge(tag)
        await asyncio.sleep(0)
    assert bench.excess == []


async def test_all_bodies_that_are_too_large_share_one_bound(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """While nothing is confirmed they stay for long; of the next one only the beginning is kept."""
    monkeypatch.setattr("worker.amqp.consumer.MAX_KEPT_BYTES", 1_000_000)
    Reading(bench, monkeypatch)
    await bench.consume_several()
    left = []
    for tag, size in ((2, 600_000), (3, 300_000), (4, 90_000)):
        bench.channel.deliver(tag, body=b" " * size)
        left.append(bench.consumer.channel.most_body_bytes)
    assert left == [400_000, 100_000, MAX_BODY_BYTES]
    for tag in (2, 4, 3):
        bench.consumer.acknowledge(tag)
    await asyncio.sleep(0)
    assert bench.consumer.channel.most_body_bytes == 1_000_000


async def test_a_large_message_that_is_held_keeps_the_others_with_the_broker_whatever_else_is_settled(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading = Reading(bench, monkeypatch)
    await bench.consume_several()
    bench.channel.deliver(2, body=b" " * 60_000)
    bench.channel.deliver(3, body=b" " * 70_000)
    bench.consumer.acknowledge(2)
    await asyncio.sleep(0)
    assert not reading.is_on.is_set()
