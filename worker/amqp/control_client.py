"""Gives orders to all workers through the control stream, and collects what they answer; for the command line."""

import time
from dataclasses import dataclass
from typing import Any

from pika import BasicProperties
from pika.adapters.blocking_connection import BlockingChannel, BlockingConnection
from pika.exceptions import AMQPError, ChannelClosedByBroker

from worker.amqp.address import BrokerAddress
from worker.amqp.blocking import HINT, connect_blocking, publish
from worker.amqp.connection import CALL_S, reason_of
from worker.amqp.control_messages import FIRST, PREFETCH, beginning_at, order_publication, report_key
from worker.amqp.topology import Topology
from worker.core.pauses import Order, Pauses, WorkerReport, read_order, read_report
from worker.errors import BrokerUnavailable, WorkerError

FIRST_REPORT_S = 2.0  # longest wait for the first worker that answers
_NEXT_REPORT_S = 0.3  # and then for each further one
_SLICE_S = 0.1


@dataclass(frozen=True, slots=True)
class Answers:
    """What is known after an order.

    Attributes:
        pauses: by hand, that are in force.
        reports: of the workers that have answered.
    """

    pauses: Pauses
    reports: tuple[WorkerReport, ...]


def give_order(broker: BrokerAddress, topology: Topology, order: Order) -> Answers:
    """Give an order to all workers: those that run follow it now, and those that start later know it too.

    Raises:
        WorkerError: the broker did not take it: the control stream is not there, or this user may not use it.
        BrokerUnavailable: no node can be reached, or the connection was lost.
    """
    connection, _ = connect_blocking(broker)
    try:
        return _give_order(connection, topology, order)
    except ChannelClosedByBroker as exc:
        raise WorkerError(f"{reason_of(exc)}: {HINT}") from exc
    except AMQPError as exc:
        raise BrokerUnavailable(f"the connection was lost: {reason_of(exc)}") from exc
    finally:
        if connection.is_open:
            connection.close()


def _give_order(connection: BlockingConnection, topology: Topology, order: Order) -> Answers:
    reports: list[WorkerReport] = []
    orders: list[Order] = []

    def on_report(_channel: object, _method: object, _properties: object, body: bytes) -> None:
        report = read_report(body)
        if report is not None:
            reports.append(report)

    def on_order(channel: BlockingChannel, method: Any, _properties: BasicProperties, body: bytes) -> None:
        channel.basic_ack(method.delivery_tag)  # gives the broker credit, no more
        found = read_order(body)
        if found is not None and order not in orders:
            orders.append(found)

    answers = connection.channel()
    queue = answers.queue_declare("", exclusive=True).method.queue
    answers.queue_bind(queue, topology.control_exchange, report_key(order))
    answers.basic_consume(queue, on_report, auto_ack=True)
    publishing = connection.channel()
    publishing.confirm_delivery()
    publish(publishing, order_publication(topology, order))
    reading = connection.channel()
    reading.basic_qos(prefetch_count=PREFETCH)
    reading.basic_consume(topology.control_stream, on_order, arguments=beginning_at(FIRST))
    deadline = time.monotonic() + CALL_S
    while order not in orders:
        if time.monotonic() > deadline:
            raise BrokerUnavailable(f"{topology.control_stream} was not read within {CALL_S} s")
        connection.process_data_events(time_limit=_SLICE_S)
    deadline, known = time.monotonic() + FIRST_REPORT_S, 0
    while time.monotonic() < deadline:
        connection.process_data_events(time_limit=_SLICE_S)
        if len(reports) > known:
            deadline, known = time.monotonic() + _NEXT_REPORT_S, len(reports)
    return Answers(Pauses.after(orders), tuple(sorted(reports, key=lambda each: each.worker)))
