"""What the publisher makes of confirms and returns, on a channel that only records what is published."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import MagicMock

import pytest
from pika import BasicProperties, URLParameters
from pika.spec import Basic

from worker.amqp.channel import BrokerChannel
from worker.amqp.messages import Publication
from worker.amqp.publisher import InFlight, Publisher
from worker.errors import BrokerUnavailable


class FakeChannel:
    """Pika's channel in confirm mode."""

    def __init__(self) -> None:
        self.published: list[str] = []
        self._on_confirm: Callable[[Any], None]
        self._on_return: Callable[..., None]

    def add_on_return_callback(self, on_return: Callable[..., None]) -> None:
        self._on_return = on_return

    def confirm_delivery(self, on_confirm: Callable[[Any], None], *, callback: Callable[[Any], None]) -> None:
        self._on_confirm = on_confirm
        callback(None)

    def basic_publish(
        self, _exchange: str, routing_key: str, _body: bytes, _properties: BasicProperties, *, mandatory: bool
    ) -> None:
        assert mandatory
        self.published.append(routing_key)

    def confirm(self, method: Basic.Ack | Basic.Nack) -> None:
        """Confirm what was published, or refuse it."""
        self._on_confirm(SimpleNamespace(method=method))

    def give_back(self, method: Basic.Return) -> None:
        """Return a message that no queue took."""
        self._on_return(self, method, BasicProperties(), b"{}")


class Bench:
    """A publisher on such a channel, and the routing keys of what it reported."""

    def __init__(self) -> None:
        self.channel = FakeChannel()
        self.confirmed: list[str] = []
        self.rejected: list[str] = []
        self.publisher = Publisher(
            lambda item: self.confirmed.append(item.publication.routing_key),
            lambda item: self.rejected.append(item.publication.routing_key),
            lambda: None,
        )
        self.publisher.channel.pika_channel = cast("Any", self.channel)

    def publish(self, *routing_keys: str) -> None:
        """Publish one message for each routing key."""
        for routing_key in routing_keys:
            self.publisher.publish(an_item(routing_key))


def an_item(routing_key: str) -> InFlight:
    publication = Publication("replies", routing_key, BasicProperties(), b"{}")
    return InFlight(publication, cast("Any", None))  # the publisher does not look into it


@pytest.fixture(autouse=True)
def without_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is dialled, and the broker does not block the connection."""

    async def opened(*_: object) -> None:
        pass

    monkeypatch.setattr(BrokerChannel, "open", opened)
    monkeypatch.setattr(BrokerChannel, "pika_connection", MagicMock())
    monkeypatch.setattr(BrokerChannel, "frame_max", 131_072)


@pytest.fixture
async def bench() -> Bench:
    """A publisher that is open."""
    bench = Bench()
    await bench.publisher.connect(URLParameters("amqp://host"), "test")
    await bench.publisher.open()
    return bench


def names(items: Sequence[InFlight]) -> list[str]:
    return [item.publication.routing_key for item in items]


async def test_a_confirm_of_several_confirms_every_earlier_publication_and_no_later_one(bench: Bench) -> None:
    bench.publish("a", "b", "c", "d")
    bench.channel.confirm(Basic.Ack(2))
    bench.channel.confirm(Basic.Ack(3, multiple=True))
    assert bench.confirmed == ["b", "a", "c"]
    assert names(list(bench.publisher.in_flight.values())) == ["d"]


async def test_a_returned_publication_is_rejected_though_the_broker_confirms_it(bench: Bench) -> None:
    """The broker confirms what no queue took: only the return before the confirm tells."""
    bench.publish("nowhere", "somewhere")
    bench.channel.give_back(Basic.Return(312, "", "replies", "nowhere"))
    bench.channel.confirm(Basic.Ack(2, multiple=True))
    assert (bench.rejected, bench.confirmed) == (["nowhere"], ["somewhere"])


async def test_a_rejected_publication_impairs_the_publisher_until_it_is_withdrawn(bench: Bench) -> None:
    item = an_item("full")
    bench.publisher.publish(item)
    bench.channel.confirm(Basic.Nack(1))
    assert bench.rejected == ["full"]
    assert bench.publisher.publish_later(item) >= 0
    assert bench.publisher.is_impaired
    assert bench.publisher.withdraw_retries() == [item]
    assert not bench.publisher.is_impaired
    assert bench.channel.published == ["full"]


async def test_publications_without_an_open_channel_are_kept_as_unconfirmed(bench: Bench) -> None:
    """The supervisor publishes them, and those that were in flight, over another channel."""
    bench.publish("in flight")
    bench.publisher.channel.fail(BrokerUnavailable("cut"))
    bench.publish("too late")
    assert bench.channel.published == ["in flight"]
    assert names(bench.publisher.withdraw_unconfirmed()) == ["in flight", "too late"]
    assert not bench.publisher.withdraw_unconfirmed()
