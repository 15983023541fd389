"""Finds out what this user may do with the topology, and whether delayed commands return; for ``onenet-worker check``.

A right is tried with a request that the broker refuses for another reason, or that is rolled back, so that nothing
changes. The broker checks rights first: it answers 403 only where one is missing.
Source: https://www.rabbitmq.com/docs/access-control#authorisation
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any
from uuid import uuid4

from pika import BasicProperties, DeliveryMode
from pika.adapters.blocking_connection import BlockingChannel, BlockingConnection
from pika.exceptions import AMQPError, ChannelClosedByBroker, NackError, UnroutableError

from worker.amqp.connection import reason_of
from worker.amqp.messages import PROBE
from worker.amqp.topology import EXECUTE, ORDER, QUESTION, RESULT, Topology
from worker.errors import BrokerUnavailable

_ACCESS_REFUSED = 403
_RETURNS_S = 5.0
_Got = tuple[Any, BasicProperties | None, bytes | None]
_NOTHING: _Got = (None, None, None)
_UNUSABLE = "none"  # no value of any of the arguments that are used


@dataclass(frozen=True, slots=True)
class _Trial:
    """A request for which a right is needed: ``right`` in words."""

    right: str
    request: Callable[[BlockingChannel], object]


def missing_rights(connection: BlockingConnection, topology: Topology, *, may_declare: bool) -> list[str]:
    """Return one line for each right that a worker would need, and this user lacks.

    Args:
        connection: to the broker; a missing right closes a channel, and not the connection.
        topology: what the worker uses.
        may_declare: whether the worker declares the topology.

    Raises:
        BrokerUnavailable: the connection was lost.
    """
    return _missing(connection, [*(_to_declare(topology) if may_declare else ()), *_to_work(topology)])


def missing_rights_to_answer(connection: BlockingConnection, topology: Topology) -> list[str]:
    """Return one line for each right that this user lacks to take and answer questions, which workers can do without.

    Raises:
        BrokerUnavailable: the connection was lost.
    """
    return _missing(connection, [*_to_answer(topology)])


def _missing(connection: BlockingConnection, trials: Iterable[_Trial]) -> list[str]:
    missing = [trial.right for trial in trials if _is_refused(connection, trial)]
    return [f"this user has no right to {right}" for right in dict.fromkeys(missing)]


def _is_refused(connection: BlockingConnection, trial: _Trial) -> bool:
    try:
        channel = connection.channel()
        trial.request(channel)
        channel.close()
    except ChannelClosedByBroker as exc:
        return exc.reply_code == _ACCESS_REFUSED  # any other: the broker has got to the unusable argument
    except AMQPError as exc:
        raise BrokerUnavailable(f"the connection was lost: {reason_of(exc)}") from exc
    return False


def _to_declare(topology: Topology) -> Iterator[_Trial]:
    for exchange in topology.exchanges():
        arguments = {"alternate-exchange": 0}
        declare = partial(
            BlockingChannel.exchange_declare,
            exchange=exchange.name,
            exchange_type=exchange.kind,
            durable=True,
            arguments=arguments,
        )
        yield _Trial(f"configure the exchange {exchange.name}", declare)
    for queue in topology.queues():
        arguments_of_queue = {"x-message-ttl": _UNUSABLE}
        declare_queue = partial(
            BlockingChannel.queue_declare, queue=queue.name, durable=True, arguments=arguments_of_queue
        )
        yield _Trial(f"configure the queue {queue.name}", declare_queue)
        if "x-dead-letter-exchange" in queue.arguments:  # which needs the right to read the queue as well
            yield _to_read(queue.name)
    for binding in topology.bindings():
        unbind = partial(
            BlockingChannel.queue_unbind,
            queue=binding.queue,
            exchange=binding.exchange,
            routing_key=f"check.{uuid4()}",  # of no binding
        )
        yield _Trial(f"bind: write {binding.queue} and read {binding.exchange}", unbind)
    unbind_exchange = partial(
        BlockingChannel.exchange_unbind,
        destination=topology.unrouted_exchange,
        source=topology.replies_exchange,
        routing_key=f"check.{uuid4()}",
    )
    exchanges = f"read {topology.replies_exchange} and write {topology.unrouted_exchange}, its alternate exchange"
    yield _Trial(exchanges, unbind_exchange)


def _to_work(topology: Topology) -> Iterator[_Trial]:
    yield _to_read(topology.execute_queue)
    yield _to_read(topology.control_stream)
    yield _to_read(topology.unrouted_samples_queue)
    if topology.result_delays_s:
        yield _to_read(topology.results_queue)
    for exchange, routing_key in (
        (topology.replies_exchange, f"{EXECUTE}.accepted.unknown"),
        (topology.unrouted_exchange, f"{EXECUTE}.accepted.unknown"),
        (topology.dead_letters_exchange, f"{EXECUTE}.expired"),
        (topology.returns_exchange, EXECUTE),
        (topology.control_exchange, ORDER),
        *((topology.retry_exchange, topology.retry_queue(delay_s)) for delay_s in topology.delay_queues_s),
        *((topology.retry_exchange, topology.result_delay_queue(delay_s)) for delay_s in topology.result_delays_s),
    ):
        write = partial(_publish_and_roll_back, exchange=exchange, routing_key=routing_key)
        yield _Trial(f"write to the exchange {exchange} with the routing key {routing_key}", write)


def _to_answer(topology: Topology) -> Iterator[_Trial]:
    """Yield the trials of a queue for questions, whose name is another one for each connection."""
    queue, exchange = topology.questions_queue(f"check-{uuid4()}"), topology.control_exchange
    declare = partial(
        BlockingChannel.queue_declare, queue=queue, exclusive=True, arguments={"x-message-ttl": _UNUSABLE}
    )
    yield _Trial(f"configure queues {topology.questions_queue('…')}", declare)
    unbind = partial(BlockingChannel.queue_unbind, queue=queue, exchange=exchange, routing_key=QUESTION)
    yield _Trial(f"bind them: write {topology.questions_queue('…')} and read {exchange}", unbind)


def _to_read(queue: str) -> _Trial:
    consume = partial(
        BlockingChannel.basic_consume,
        queue=queue,
        on_message_callback=_on_no_message,
        arguments={"x-priority": _UNUSABLE},
    )
    return _Trial(f"read the queue {queue}", consume)


def _publish_and_roll_back(channel: BlockingChannel, exchange: str, routing_key: str) -> None:
    channel.tx_select()
    channel.basic_publish(exchange, routing_key, b"")
    channel.tx_rollback()


def _on_no_message(*_: object) -> None:
    """Nothing is delivered to a consumer that the broker refused."""


@dataclass(frozen=True, slots=True)
class _Route:
    """The way of what is delayed: retry exchange, delay queue, returns exchange, queue.

    Attributes:
        what: is delayed, for messages.
        delay_queues: the delay queues.
        queue: the queue to which they lead.
        routing_key: of that queue, at the returns exchange.
        entry: the exchange of upstream systems that leads to it as well; None: there is none.
        is_for_one: the queue has one active consumer, so that the broker lets nobody get single messages.
    """

    what: str
    delay_queues: list[str]
    queue: str
    routing_key: str
    entry: str | None = None
    is_for_one: bool = False


def _routes(topology: Topology) -> Iterator[_Route]:
    delay_queues = [topology.retry_queue(delay_s) for delay_s in topology.delay_queues_s]
    yield _Route("commands", delay_queues, topology.execute_queue, EXECUTE, topology.commands_exchange)
    if topology.result_delays_s:
        delay_queues = [topology.result_delay_queue(delay_s) for delay_s in topology.result_delays_s]
        yield _Route("accepted commands", delay_queues, topology.results_queue, RESULT, is_for_one=True)


def delay_faults(connection: BlockingConnection, topology: Topology) -> tuple[list[str], list[str]]:
    """Send probes to the command queue, and through each delay queue and back.

    A probe ends its delay at once. Workers drop it, and without a worker this function takes it from the command
    queue, if that is empty otherwise. None is sent to dead letters or replies: a consumer would receive it.

    Args:
        connection: to the broker.
        topology: the expected one.

    Returns:
        The faults, and what could not be told.

    Raises:
        BrokerUnavailable: the connection was lost.
    """
    faults, unknown = list[str](), list[str]()
    for route in _routes(topology):
        path = _DelayPath(connection, topology, route)
        try:
            path.run()
        except ChannelClosedByBroker as exc:
            path.unknown.append(f"whether delayed {route.what} return could not be tried: {reason_of(exc)}")
        except AMQPError as exc:
            raise BrokerUnavailable(f"the connection was lost: {reason_of(exc)}") from exc
        faults += path.faults
        unknown += path.unknown
    return faults, unknown


class _DelayPath:
    """Tries one route."""

    def __init__(self, connection: BlockingConnection, topology: Topology, route: _Route) -> None:
        self.faults: list[str] = []
        self.unknown: list[str] = []
        self._connection = connection
        self._topology = topology
        self._route = route
        self._channel = self._open()
        self._name = str(uuid4())
        self._arrived: set[str] = set()  # the exchanges and delay queues whose probe has come to the queue
        self._taken: deque[_Got] = deque()  # where single messages cannot be got

    def run(self) -> None:
        topology, route = self._topology, self._route
        state = self._channel.queue_declare(route.queue, passive=True).method
        has_worker = state.consumer_count > 0
        if not has_worker and state.message_count:
            self.unknown.append(
                f"whether delayed {route.what} return was not tried: {route.what} wait, and no worker is running"
            )
            return
        leading = {exchange for exchange in self._to_try(has_worker=has_worker) if self._leads_to_queue(exchange)}
        returns = topology.returns_exchange in leading
        is_watched = self._watch()
        queues = route.delay_queues
        sent = [name for name in queues if self._publish(topology.retry_exchange, name, name, expiration="1")]
        self.faults += [
            f"no binding: {topology.retry_exchange} does not lead to {name}" for name in queues if name not in sent
        ]
        to_take: set[str] = set() if has_worker else {*leading, *(sent if returns else ())}
        is_undisturbed = self._wait_for({*to_take, *(sent if is_watched else ())}, len(to_take))
        if not is_undisturbed:
            self.unknown.append("a command arrived meanwhile: a worker sees the probes that are left")
        if not is_watched and not (is_undisturbed and returns and not has_worker):
            self.unknown.append(
                f"whether delayed {route.what} return cannot be told: this user may not have a queue amq.gen-… to watch"
            )
            return
        for name in sent:
            if name not in self._arrived:
                self._report_missing(name)

    def _to_try(self, *, has_worker: bool) -> Iterator[str]:
        """Yield the exchanges from which a probe is sent to the queue.

        Workers drop no probe that came by the exchange of upstream systems: those could make messages vanish so.
        """
        yield self._topology.returns_exchange
        entry, queue = self._route.entry, self._route.queue
        if entry is not None and has_worker:
            self.unknown.append(f"whether {entry} leads to {queue} was not tried: a worker is running")
        elif entry is not None:
            yield entry

    def _leads_to_queue(self, exchange: str) -> bool:
        """Publish a probe that the queue should take; notes the fault if it does not."""
        queue = self._route.queue
        try:
            is_routed = self._publish(exchange, self._route.routing_key, exchange, expiration=None)
        except ChannelClosedByBroker as exc:
            if exc.reply_code != _ACCESS_REFUSED or exchange != self._route.entry:
                raise
            self._channel = self._open()  # workers need no right to write there
            self.unknown.append(f"whether {exchange} leads to {queue} cannot be told by this user")
            return False
        if not is_routed:
            self.faults.append(f"no binding: {exchange} does not lead to {queue}")
        return is_routed

    def _report_missing(self, name: str) -> None:
        waiting = self._channel.queue_declare(name, passive=True).method.message_count
        if waiting > 1:  # one that expires is only seen at the head of its queue
            what = self._route.what
            self.unknown.append(f"whether {what} return from {name} cannot be told: {waiting} messages wait there")
        else:
            returns = self._topology.returns_exchange
            self.faults.append(f"{self._route.what} do not return from {name} through {returns}")

    def _open(self) -> BlockingChannel:
        channel = self._connection.channel()
        channel.confirm_delivery()
        return channel

    def _publish(self, exchange: str, routing_key: str, probe: str, expiration: str | None) -> bool:
        """Publish a probe; tells whether a queue took it."""
        properties = BasicProperties(
            headers={PROBE: f"{self._name}/{probe}"},
            delivery_mode=DeliveryMode.Persistent,
            expiration=expiration,
        )
        try:
            self._channel.basic_publish(exchange, routing_key, b"", properties, mandatory=True)
        except (UnroutableError, NackError):
            return False
        return True

    def _watch(self) -> bool:
        """Get a copy of what returns; tells whether this user may."""

        def on_message(_channel: object, _method: object, properties: BasicProperties, _body: bytes) -> None:
            self._note(properties)

        try:
            queue = self._channel.queue_declare("", exclusive=True).method.queue
            self._channel.queue_bind(queue, self._topology.returns_exchange, self._route.routing_key)
            self._channel.basic_consume(queue, on_message, auto_ack=True)
        except ChannelClosedByBroker as exc:
            if exc.reply_code != _ACCESS_REFUSED:
                raise
            self._channel = self._open()
            return False
        return True

    def _note(self, properties: BasicProperties) -> bool:
        """Note a probe that came back; tells whether it is one of these."""
        name, _, probe = str((properties.headers or {}).get(PROBE)).partition("/")
        if name == self._name:
            self._arrived.add(probe)
        return name == self._name

    def _wait_for(self, probes: set[str], to_take: int) -> bool:
        """Wait until the probes have come and, where no worker drops them, take them out of the queue.

        Args:
            probes: those that are seen.
            to_take: how many to take out of the queue.

        Returns:
            False if another message was in the way there, which is left: each look would count as a delivery of it.
        """
        if to_take and self._route.is_for_one:
            self._take_all(to_take)
        deadline, is_undisturbed = time.monotonic() + _RETURNS_S, True
        while time.monotonic() < deadline and (to_take or not probes <= self._arrived):
            method, properties, _ = self._get() if to_take else _NOTHING
            if method is None:
                self._connection.process_data_events(time_limit=0.05)
            elif properties is not None and self._note(properties):
                self._channel.basic_ack(_tag(method))
                to_take -= 1
            else:
                self._channel.basic_nack(_tag(method))
                to_take, is_undisturbed = 0, False  # the others can still be watched
        return is_undisturbed

    def _get(self) -> "_Got":
        if not self._route.is_for_one:
            return self._channel.basic_get(self._route.queue)
        return self._taken.popleft() if self._taken else _NOTHING

    def _take_all(self, count: int) -> None:
        """Consume the queue, as long as this channel lasts; holds no more messages than there are probes."""

        def on_message(_channel: object, method: Any, properties: BasicProperties, body: bytes) -> None:
            self._taken.append((method, properties, body))

        self._channel.basic_qos(prefetch_count=count)
        self._channel.basic_consume(self._route.queue, on_message)


def _tag(method: Any) -> int:
    return int(method.delivery_tag)
