"""A blocking client of the broker for the command line: declares the topology, sends commands and reads replies."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

import pika
from pika.adapters.blocking_connection import BlockingChannel, BlockingConnection
from pika.adapters.utils.connection_workflow import AMQPConnectorException
from pika.exceptions import (
    AMQPConnectionError,
    AMQPError,
    ChannelClosedByBroker,
    ConnectionBlockedTimeout,
    NackError,
    ProbableAccessDeniedError,
    ProbableAuthenticationError,
    UnroutableError,
)

from worker.amqp.address import BrokerAddress
from worker.amqp.bounded_connection import BoundedConnection
from worker.amqp.connection import connection_parameters, printable_address, reason_of
from worker.amqp.field_table import preserve_raw_values
from worker.amqp.messages import RESULT_TYPE, Publication
from worker.amqp.topology import EXECUTE, SENT, Topology
from worker.errors import BrokerUnavailable, PublishingBlocked, TopologyMismatch, Unconfirmed, WorkerError

_WAIT_SLICE_S = 0.25
_BLOCKED_S = 3  # a person waits at the terminal
_MAX_APP_ID_BYTES = 200  # a routing key and the name of a queue have 255
_ACCESS_REFUSED = 403
_NOT_FOUND = 404
HINT = "if WORKER_NAMESPACE is right, start the worker, or run onenet-worker topology"
SENDER = "cli"  # the app_id of the command line
Connection = BlockingConnection  # the name of its type for packages that may not import pika


def connect_blocking(
    broker: BrokerAddress, blocked_s: float = _BLOCKED_S
) -> tuple[BoundedConnection, pika.URLParameters]:
    """Connect to the first node that can be reached; returns the connection and its parameters.

    Args:
        broker: to connect to.
        blocked_s: for how many seconds the broker may block publishing before the connection ends: a person waits.

    Raises:
        SettingsError: a URL, or one of the files for TLS, cannot be used.
        BrokerUnavailable: no node can be reached.
    """
    preserve_raw_values()
    reasons = []
    for parameters in connection_parameters(broker):
        parameters.client_properties = {"connection_name": "onenet-worker command line"}
        parameters.blocked_connection_timeout = blocked_s
        try:
            return BoundedConnection(parameters), parameters
        except (AMQPConnectionError, AMQPConnectorException, OSError) as exc:
            is_refused = isinstance(exc, ProbableAuthenticationError | ProbableAccessDeniedError)
            what = "" if is_refused else " cannot be reached"
            reasons.append(f"{printable_address(parameters)}{what}: {reason_of(exc, parameters)}")
    raise BrokerUnavailable("; ".join(reasons))


def declare(broker: BrokerAddress, topology: Topology) -> pika.URLParameters:
    """Declare a topology; returns the parameters of the connection that was used.

    Raises:
        BrokerUnavailable: no node can be reached.
        TopologyMismatch: it exists with other arguments, or may not be declared.
    """
    connection, parameters = connect_blocking(broker)
    try:
        declare_on(connection.channel(), topology)
    except ChannelClosedByBroker as exc:
        raise TopologyMismatch(reason_of(exc)) from exc
    except AMQPError as exc:
        raise BrokerUnavailable(f"{printable_address(parameters)} refused: {reason_of(exc)}") from exc
    finally:
        if connection.is_open:
            connection.close()
    return parameters


def declare_on(channel: BlockingChannel, topology: Topology) -> None:
    """Declare a topology on an open channel."""
    for exchange in topology.exchanges():
        channel.exchange_declare(exchange.name, exchange.kind, durable=True, arguments=exchange.arguments)
    for queue in topology.queues():
        channel.queue_declare(queue.name, durable=True, arguments=queue.arguments)
    for binding in topology.bindings():
        channel.queue_bind(binding.queue, binding.exchange, binding.routing_key)


def check_topology(connection: BlockingConnection, topology: Topology) -> list[str]:
    """Return one line per fault of the exchanges and queues; creates none. AMQP has no way to read bindings.

    Their arguments are compared if this user has the right to declare them.

    Args:
        connection: to the broker; a fault closes a channel, and not the connection.
        topology: the expected one.

    Raises:
        BrokerUnavailable: the connection was lost.
    """
    wanted: list[tuple[str, Callable[..., object], Mapping[str, object]]] = [
        *(
            (each.name, partial(BlockingChannel.exchange_declare, exchange_type=each.kind), each.arguments)
            for each in topology.exchanges()
        ),
        *((each.name, BlockingChannel.queue_declare, each.arguments) for each in topology.queues()),
    ]
    missing, faults = [], []
    try:
        for name, declare, arguments in wanted:
            try:
                channel = connection.channel()
                declare(channel, name, passive=True)
                declare(channel, name, durable=True, arguments=arguments)  # it exists, so that this creates nothing
                channel.close()
            except ChannelClosedByBroker as exc:
                if exc.reply_code == _NOT_FOUND:
                    missing.append(name)
                elif exc.reply_code != _ACCESS_REFUSED:
                    faults.append(reason_of(exc))
    except AMQPError as exc:
        raise BrokerUnavailable(f"the connection was lost: {reason_of(exc)}") from exc
    return [*([f"not there: {', '.join(dict.fromkeys(missing))}: {HINT}"] if missing else []), *faults]


def count_on(connection: BlockingConnection, queue: str) -> tuple[int, int] | None:
    """Return how many messages of a queue are ready, and how many consumers it has; None if it is not there.

    Raises:
        BrokerUnavailable: the connection was lost, or this user may not look at the queue.
    """
    try:
        channel = connection.channel()
        method = channel.queue_declare(queue, passive=True).method
        channel.close()
    except ChannelClosedByBroker as exc:
        if exc.reply_code == _NOT_FOUND:
            return None
        raise BrokerUnavailable(reason_of(exc)) from exc
    except AMQPError as exc:
        raise BrokerUnavailable(f"the connection was lost: {reason_of(exc)}") from exc
    return method.message_count, method.consumer_count


def is_publishing_blocked(connection: BlockingConnection) -> bool:
    """Tell whether the broker has a memory or disk alarm. If so, the connection is closed.

    The broker stops to read a connection once it publishes during an alarm, and says so. So something is published that
    reaches no queue, in a transaction that is rolled back; if the broker goes on reading, there is no alarm.

    Args:
        connection: that has not published yet; its time limit for being blocked bounds this.

    Raises:
        BrokerUnavailable: the connection was lost for another reason.
    """
    try:
        channel = connection.channel()
        with suppress(ChannelClosedByBroker):  # this user may not publish there: the broker has read it all the same
            channel.tx_select()
            channel.basic_publish("", f"check.{uuid4()}", b"")
            channel.tx_rollback()
        connection.channel().close()  # an answer: the broker reads what follows the publication
    except ConnectionBlockedTimeout:
        return True
    except AMQPError as exc:
        raise BrokerUnavailable(f"the connection was lost: {reason_of(exc)}") from exc
    return False


def delete_on(channel: BlockingChannel, topology: Topology) -> None:
    """Delete a topology, the messages in its queues, and the replies that the command line keeps."""
    channel.queue_delete(topology.kept_replies_queue(SENDER))
    for queue in topology.queues():
        channel.queue_delete(queue.name)
    for exchange in topology.exchanges():
        channel.exchange_delete(exchange.name)


def delete(broker: BrokerAddress, topology: Topology) -> None:
    """Delete a topology and the messages in its queues; what is not there needs no deletion.

    Raises:
        BrokerUnavailable: no node can be reached, or it refused.
    """
    connection, parameters = connect_blocking(broker)
    try:
        delete_on(connection.channel(), topology)
    except AMQPError as exc:
        raise BrokerUnavailable(f"{printable_address(parameters)} refused: {reason_of(exc)}") from exc
    finally:
        if connection.is_open:
            connection.close()


def publish(channel: BlockingChannel, publication: Publication) -> None:
    """Publish on a channel with publisher confirms; returns after the confirm.

    Raises:
        Unconfirmed: it may be stored or not: the connection was lost, the broker blocks publishers, does not answer, or
            says that a queue has not taken it.
        WorkerError: the broker refused it.
    """
    exchange, routing_key = publication.exchange, publication.routing_key
    try:
        channel.basic_publish(exchange, routing_key, publication.body, publication.properties, mandatory=True)
    except UnroutableError as exc:
        raise WorkerError(f"no queue is bound to {exchange}: {HINT}") from exc
    except NackError as exc:
        raise Unconfirmed(
            f"a queue that is bound to {exchange} refuses it: it is full, or has no leader now; "
            "it may have stored the last message or not"
        ) from exc
    except ChannelClosedByBroker as exc:
        raise refused(exc) from exc
    except AMQPError as exc:
        raise Unconfirmed(f"{lost(exc)}; it may have stored the last message or not") from exc


def lost(error: AMQPError) -> BrokerUnavailable:
    """Return the error of a lost connection: pika ends one that the broker has blocked for too long."""
    if isinstance(error, ConnectionBlockedTimeout):
        return PublishingBlocked(reason_of(error))
    return BrokerUnavailable(f"the connection was lost: {reason_of(error)}")


def refused(error: ChannelClosedByBroker) -> WorkerError:
    """Return the error of a refused request; what is missing can be declared."""
    hint = f": {HINT}" if error.reply_code == _NOT_FOUND else ""
    return WorkerError(f"{reason_of(error)}{hint}")


class CommandClient:
    """Sends commands as an upstream system does, and reads their replies from an exclusive queue.

    Args:
        broker: to connect to.
        topology: names the exchanges.
        app_id: the name of the upstream system; None: that of the broker's user.
        wants_replies: whether to read replies.
        names_user: whether each message names the broker's user as its sender, for whom the broker then vouches.
        keeps_replies: whether to declare a queue that keeps the replies nobody waits for.

    Attributes:
        kept_queue: the queue that keeps replies; None where there is none.
        not_kept: why there is none, if one was wanted.
    """

    def __init__(
        self,
        broker: BrokerAddress,
        topology: Topology,
        *,
        app_id: str | None,
        wants_replies: bool,
        names_user: bool = False,
        keeps_replies: bool = False,
    ) -> None:
        self.kept_queue: str | None = None
        self.not_kept = ""
        self._topology = topology
        self._connection, parameters = connect_blocking(broker)
        credentials: Any = parameters.credentials
        user = credentials.username
        self._user_id = user if names_user else None
        self._app_id = app_id or user
        self._reply_to: str | None = None
        self._replies: list[dict[str, Any]] = []
        self._results: list[dict[str, Any]] = []
        try:
            self._channel = self._connection.channel()
            self._channel.confirm_delivery()
            if keeps_replies:
                self._keep_replies()
            if wants_replies:
                self._read_replies()
        except AMQPError as exc:
            self._connection.close_quietly()
            raise refused(exc) if isinstance(exc, ChannelClosedByBroker) else lost(exc) from exc

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # Everything sent is confirmed by now; after a Ctrl-C in the middle of a frame the broker cannot parse the rest.
        self._connection.close_quietly()

    def send(self, command_id: str | None, body: bytes) -> None:
        """Publish one command, persistent, and wait for the publisher confirm.

        Args:
            command_id: the property message_id.
            body: the body of the message.

        Raises:
            Unconfirmed: the connection was lost, or the broker blocks publishers: it may have stored it or not.
            WorkerError: the broker refused it.
        """
        properties = pika.BasicProperties(
            content_type="application/json",
            delivery_mode=pika.DeliveryMode.Persistent,
            message_id=command_id,
            app_id=self._app_id,
            user_id=self._user_id,
            reply_to=self._reply_to,
            timestamp=int(time.time()),
        )
        publish(self._channel, Publication(self._topology.commands_exchange, EXECUTE, properties, body))

    def some_replies(self, wait_s: float = _WAIT_SLICE_S) -> list[dict[str, Any]]:
        """Return the replies that have arrived, after a wait for the first of at most ``wait_s`` seconds.

        Raises:
            BrokerUnavailable: the connection was lost.
        """
        self._receive(wait_s)
        replies, self._replies = self._replies, []
        return replies

    def replies(self, command_ids: Sequence[str], timeout_s: float) -> Iterator[dict[str, Any]]:
        """Yield one reply per command as they arrive, until all have arrived or the time limit has passed."""
        missing = set(command_ids)
        deadline = time.monotonic() + timeout_s
        while missing and time.monotonic() < deadline:
            for reply in self.some_replies():
                if reply["command_id"] in missing:
                    missing.discard(reply["command_id"])
                    yield reply

    def results(self, command_ids: Sequence[str], timeout_s: float) -> Iterator[dict[str, Any]]:
        """Yield one result per command as they arrive, until all have arrived or the time limit has passed.

        Args:
            command_ids: of accepted commands, whose replies have been read.
            timeout_s: in seconds.

        Raises:
            BrokerUnavailable: the connection was lost.
        """
        missing = set(command_ids)
        deadline = time.monotonic() + timeout_s
        while missing and time.monotonic() < deadline:
            self._receive(_WAIT_SLICE_S)
            results, self._results = self._results, []
            for result in results:
                if result["command_id"] in missing:
                    missing.discard(result["command_id"])
                    yield result

    def _receive(self, wait_s: float) -> None:
        try:
            self._connection.process_data_events(time_limit=wait_s)
        except AMQPError as exc:
            raise lost(exc) from exc

    def _keep_replies(self) -> None:
        """Declare the queue that keeps replies, on a channel of its own, which a refusal closes."""
        queue, binding = self._topology.kept_replies(self._app_id)
        if len(self._app_id.encode()) > _MAX_APP_ID_BYTES or {"*", "#"} & set(self._app_id):
            self.not_kept = f"no queue can be named after {self._app_id[:_MAX_APP_ID_BYTES]}"
            return
        try:
            channel = self._connection.channel()
            channel.queue_declare(queue.name, durable=True, arguments=queue.arguments)
            channel.queue_bind(binding.queue, binding.exchange, binding.routing_key)
            channel.close()
        except ChannelClosedByBroker as exc:
            if exc.reply_code == _NOT_FOUND:
                raise
            self.not_kept = f"this user may not declare and bind {queue.name}"
            if exc.reply_code != _ACCESS_REFUSED:
                self.not_kept = reason_of(exc)
        else:
            self.kept_queue = queue.name
            self._reply_to = self._own_key()

    def _own_key(self) -> str:
        return f"{self._app_id}.{SENT}.{uuid4()}"

    def _read_replies(self) -> None:
        queue = self._channel.queue_declare("", exclusive=True).method.queue
        self._reply_to = self._own_key()
        self._channel.queue_bind(queue, self._topology.replies_exchange, self._reply_to)

        def on_reply(_channel: object, _method: object, properties: pika.BasicProperties, body: bytes) -> None:
            found = self._results if properties.type == RESULT_TYPE else self._replies
            found.append(json.loads(body))

        self._channel.basic_consume(queue, on_reply, auto_ack=True)
