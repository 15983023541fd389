"""The command line waits for the broker with a time limit."""

import time
from uuid import uuid4

import pytest
from pika import BasicProperties
from pydantic import SecretStr

from tests.support.waiting import PATIENCE_S
from worker.amqp.address import BrokerAddress
from worker.amqp.blocking import connect_blocking, publish
from worker.amqp.bounded_connection import BoundedConnection
from worker.amqp.messages import Publication
from worker.dev.services.broker import LocalBroker
from worker.errors import Unconfirmed


def test_a_queue_that_does_not_answer_ends_the_wait_for_a_confirm(
    own_broker: LocalBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The node answers all else, and its heartbeats: pika itself would wait forever. Shown with a second."""
    monkeypatch.setattr(BoundedConnection, "_limit_s", 1)
    connection, _ = connect_blocking(BrokerAddress([SecretStr(own_broker.url)]))
    channel, name = connection.channel(), f"hangs-{uuid4().hex[:8]}"
    channel.queue_declare(name, durable=True, arguments={"x-queue-type": "quorum"})
    channel.confirm_delivery()
    resource = f'rabbit_misc:r(<<"/">>, queue, <<"{name}">>)'
    leader = f"{{ok, Queue}} = rabbit_amqqueue:lookup({resource}), {{Name, _}} = amqqueue:get_pid(Queue)"
    own_broker.control("eval", f"{leader}, sys:suspend(whereis(Name)).")
    try:
        with pytest.raises(Unconfirmed, match="no answer from the broker within 1 s"):
            publish(channel, Publication("", name, BasicProperties(), b""))
    finally:
        own_broker.control("eval", f"{leader}, sys:resume(whereis(Name)).")
    connection.close_quietly()


def test_a_wait_in_which_nothing_is_expected_of_the_broker_has_no_limit(
    own_broker: LocalBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BoundedConnection, "_limit_s", 0.1)
    connection, _ = connect_blocking(BrokerAddress([SecretStr(own_broker.url)]))
    began = time.monotonic()
    connection.sleep(1)
    assert 1 <= time.monotonic() - began < PATIENCE_S
    assert connection.is_open
    connection.close_quietly()
