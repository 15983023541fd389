"""Gives orders to all workers, and collects what they answer; for the command line."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from pika import BasicProperties
from pika.adapters.blocking_connection import BlockingChannel, BlockingConnection
from pika.exceptions import AMQPError, ChannelClosedByBroker, UnroutableError

from worker.amqp.address import BrokerAddress
from worker.amqp.blocking import connect_blocking, count_on, lost, publish, refused
from worker.amqp.connection import CALL_S
from worker.amqp.control_messages import (
    FIRST,
    LAST,
    NOTHING,
    PREFETCH,
    beginning_at,
    offset_of,
    order_publication,
    report_key,
)
from worker.amqp.topology import Topology
from worker.core.pauses import Order, Pauses, WorkerReport, read_order, read_report
from worker.errors import AnswersLost, BrokerUnavailable, WorkerError

FIRST_REPORT_S = 2.0  # longest wait for the first worker that answers
_NEXT_REPORT_S = 0.5  # and then for each further one
_NEXT_OF_CHUNK_S = 0.3  # longest wait for a further message of a chunk, which the broker sends at once
_LAST_ORDER_S = 1.0  # longest wait for the last order: without one for so long there is none
_SLICE_S = 0.1


@dataclass(frozen=True, slots=True)
class Answers:
    """What is known after an order.

    Attributes:
        pauses: by hand, that are in force.
        reports: of the workers that have answered.
        ended: pauses that this order has ended.
        consumers: of the command queue, before the order: one of each worker that takes commands.
    """

    pauses: Pauses
    reports: tuple[WorkerReport, ...]
    ended: tuple[Order, ...] = ()
    consumers: int = 0

    @property
    def silent(self) -> int:
        """How many workers took commands and have not answered, as far as it is known."""
        return max(0, self.consumers - len(self.reports))


def give_order(broker: BrokerAddress, topology: Topology, order: Order) -> Answers:
    """Give an order to all workers: those that run follow it now, and of a lasting one those that start later know.

    Raises:
        WorkerError: the broker did not take it: the control stream is not there, or this user may not use it.
        PublishingBlocked: the broker has an alarm of its memory or disk.
        Unconfirmed: the order may be in force: the connection was lost, or the broker has an alarm.
        AnswersLost: the order is in force, but no answer to it could be read.
        BrokerUnavailable: no node can be reached, or the connection was lost.
    """
    connection, _ = connect_blocking(broker)
    try:
        consumers = (count_on(connection, topology.execute_queue) or (0, 0))[1]
        with _translated():
            reports = _hear_reports(connection, topology, order)
            has_listeners = _publish(connection, topology, order)
        try:
            with _translated():
                found = _collect(connection, topology, order, reports, has_listeners=has_listeners)
                return replace(found, consumers=consumers)
        except WorkerError as exc:
            if order.is_lasting:
                raise AnswersLost(str(exc)) from exc
            raise
    finally:
        connection.close_quietly()


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except ChannelClosedByBroker as exc:
        raise refused(exc) from exc
    except AMQPError as exc:
        raise lost(exc) from exc


def _hear_reports(connection: BlockingConnection, topology: Topology, order: Order) -> list[WorkerReport]:
    """Return a list to which the workers' reports will be added, as they arrive."""
    reports: list[WorkerReport] = []

    def on_report(_channel: object, _method: object, _properties: object, body: bytes) -> None:
        report = read_report(body)
        if report is not None:
            reports.append(report)

    answers = connection.channel()
    queue = answers.queue_declare("", exclusive=True).method.queue
    answers.queue_bind(queue, topology.control_exchange, report_key(order))
    answers.basic_consume(queue, on_report, auto_ack=True)
    return reports


def _collect(
    connection: BlockingConnection,
    topology: Topology,
    order: Order,
    reports: Sequence[WorkerReport],
    *,
    has_listeners: bool,
) -> Answers:
    """Read what is paused, and wait for the workers that answer."""
    is_empty = not order.is_lasting and not (count_on(connection, topology.control_stream) or (0, 0))[0]
    pauses, ended = read_pauses(connection, topology, order, _LAST_ORDER_S if is_empty else CALL_S)
    deadline, known = time.monotonic() + FIRST_REPORT_S, 0
    while has_listeners and time.monotonic() < deadline:
        connection.process_data_events(time_limit=_SLICE_S)
        if len(reports) > known:
            deadline, known = time.monotonic() + _NEXT_REPORT_S, len(reports)
    return Answers(pauses, tuple(sorted(reports, key=lambda each: each.worker)), ended)


def _publish(connection: BlockingConnection, topology: Topology, order: Order) -> bool:
    """Publish an order; returns whether anybody may answer: a question reaches running workers only."""
    channel = connection.channel()
    channel.confirm_delivery()
    publication = order_publication(topology, order)
    if order.is_lasting:
        publish(channel, publication)
        return True
    exchange, key = publication.exchange, publication.routing_key
    try:
        channel.basic_publish(exchange, key, publication.body, publication.properties, mandatory=True)
    except UnroutableError:
        return False
    return True


def read_pauses(
    connection: BlockingConnection, topology: Topology, own: Order, patience_s: float
) -> tuple[Pauses, tuple[Order, ...]]:
    """Read all orders that last; returns what is paused, and the pauses that an order has ended.

    They are read up to the order itself, if it lasts, and else up to the last one: ``ControlReader`` says how that is
    found.

    Args:
        connection: to the broker.
        topology: names the stream.
        own: the order.
        patience_s: for how long no message comes from an empty stream. The broker counts the messages of a stream with
            a delay (measured on 3.10: the last one may be missing), so that one of none may have one.

    Raises:
        BrokerUnavailable: the stream is not empty, and does not give its messages.
    """
    end, pauses = NOTHING, Pauses()
    ended: tuple[Order, ...] = ()

    def on_last(offset: int, _order: Order | None) -> bool:
        nonlocal end
        end = max(end, offset)
        return False

    def on_order(offset: int, order: Order | None) -> bool:
        nonlocal pauses, ended
        is_own = order is not None and order.id == own.id
        if order is not None:
            changed = pauses.changed(order)
            if is_own:
                ended = tuple(each for each in pauses.orders if each not in changed.orders)
            pauses = changed
        return is_own if own.is_lasting else offset >= end

    if not own.is_lasting:
        # Reading begins with the last chunk of the stream, in which there may be several messages.
        _read(connection, topology, LAST, on_last, patience_s, next_s=_NEXT_OF_CHUNK_S)
        if end == NOTHING:
            return pauses, ended
    if not _read(connection, topology, FIRST, on_order, CALL_S):
        raise BrokerUnavailable(f"{topology.control_stream} gave no message within {CALL_S} s")
    return pauses, ended


def _read(
    connection: BlockingConnection,
    topology: Topology,
    offset: str,
    on_order: Callable[[int, Order | None], bool],
    patience_s: float,
    next_s: float | None = None,
) -> bool:
    """Read the stream until ``on_order`` returns True; returns False if no message comes for that long.

    Args:
        connection: to the broker.
        topology: names the stream.
        offset: where reading begins.
        on_order: called with the place of each message, and with its order if it is one.
        patience_s: longest wait for the first message, in seconds.
        next_s: for each further one; default: as long.
    """
    is_done = False
    deadline = time.monotonic() + patience_s

    def on_message(channel: BlockingChannel, method: Any, properties: BasicProperties, body: bytes) -> None:
        nonlocal is_done, deadline
        channel.basic_ack(method.delivery_tag)  # gives the broker credit, no more
        deadline = time.monotonic() + (patience_s if next_s is None else next_s)
        is_done = is_done or on_order(offset_of(properties), read_order(body))

    channel = connection.channel()
    channel.basic_qos(prefetch_count=PREFETCH)
    channel.basic_consume(topology.control_stream, on_message, arguments=beginning_at(offset))
    while not is_done and time.monotonic() < deadline:
        connection.process_data_events(time_limit=_SLICE_S)
    channel.close()
    return is_done
