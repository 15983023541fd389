"""Keeps the worker connected to the broker: connects, and reconnects after every fault."""

import asyncio
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from pika import URLParameters

from worker.amqp.channel import BrokerChannel
from worker.amqp.connection import CONNECT_S
from worker.amqp.consumer import Source
from worker.amqp.control_reader import ControlReader
from worker.amqp.dialing import Dialler, Node
from worker.amqp.messages import Delivery, Publication
from worker.amqp.session import Session
from worker.amqp.suspects import Suspects
from worker.amqp.topology import Topology
from worker.core.backoff import backoff_s
from worker.errors import BrokerUnavailable, ClosedByBroker, SettingsError, TopologyMismatch, WorkerError
from worker.telemetry.logs import get_logger

BACKOFF_BASE_S = 0.5
BACKOFF_CAP_S = 5
MAX_DIAL_S = 20.0  # each round in which no node answers doubles the limit of a dial: a busy broker may need longer
ORDERS_S = 30.0  # longest wait of a start for earlier orders of operators
MISSED_ORDERS_S = 3.0  # longest wait after a lost connection for the orders given meanwhile; the earlier ones are known
STABLE_S = 10  # a session that ends earlier counts as one more failure, so that the backoff grows

_TOPOLOGY_FAULTS = {404, 406}  # something is not there, or is different

log = get_logger()


class DeliveryListener(Protocol):
    """Receives the deliveries and what happens to their session."""

    def on_delivery(self, delivery: Delivery) -> None:
        """Called with each delivery."""

    def on_blocked(self, is_blocked: bool) -> None:
        """Called with True when the broker blocks publishing, with False when it unblocks it."""

    def on_lost(self) -> None:
        """Called when the session is lost: its deliveries can no longer be settled."""


class Broker:
    """The connection to RabbitMQ, across sessions.

    Args:
        urls: the broker's; the node that answers first is used.
        read_urls: returns the URLs as the files say by now, with the certificates: called, in a thread, before each
            connection. Raises SettingsError if a file cannot be used; then the former ones are tried again.
        topology: declared at each connection, or checked.
        source: what to consume from.
        name: of the worker, in the broker's list of connections.
        declare: whether to declare the topology.
        prefetch: the initial number of deliveries held unacknowledged at once.
        on_other_consumers: called with the number of other consumers, if any, when the worker connects for the first
            time.
        control: follows the orders of operators beside each session; None: another broker's does.
    """

    def __init__(
        self,
        urls: Sequence[URLParameters],
        read_urls: Callable[[], Sequence[URLParameters]],
        topology: Topology,
        source: Source,
        *,
        name: str,
        declare: bool,
        prefetch: int,
        on_other_consumers: Callable[[int], object] | None = None,
        control: ControlReader | None = None,
    ) -> None:
        self._urls = urls
        self._read_urls = read_urls
        self._topology = topology
        self._source = source
        self._name = name
        self._declare = declare
        self._prefetch = prefetch
        self._on_other_consumers = on_other_consumers
        self._control = control
        self._session: Session | None = None
        self._loop = asyncio.get_running_loop()
        self._dialler = Dialler()
        self._connected_at: float | None = None  # of the present session, or of the last one
        self._has_connected = False
        self._is_prepared = False  # the topology was found as it should be, and nothing has shown otherwise since
        self._suspects = Suspects()
        self._first_refused_at: float | None = None
        self.other_consumers = 0
        """The number of other consumers of the command queue when a session last looked at the topology first.

        Of a queue with a single active consumer the broker counts the active one only, so that a standby never sees the
        others beside its own (measured on 3.10).
        """
        self.refused_s = 0.0
        """From the first to the latest of the connections in a row that the broker refused to this user."""

    async def run(self, listener: DeliveryListener) -> None:
        """Stay connected until cancelled.

        Raises:
            TopologyMismatch: before the first session, the broker has exchanges or queues of these names with other
                arguments, or this user may not declare them.
        """
        failures = unanswered = 0
        for number in itertools.count(1):
            await self._read_files()
            limit_s = min(MAX_DIAL_S, CONNECT_S * 2**unanswered)
            found = await self._dialler.dial(self._urls, f"{self._name} consume", limit_s)
            if found.channel is None or found.node is None:
                unanswered += 1
                failures += 1
                self._note_refusal(is_refused=found.is_user_refused)
                wait_s = backoff_s(failures, BACKOFF_BASE_S, BACKOFF_CAP_S)
                _log_unavailable(found.failures, wait_s)
            else:
                _log_unavailable(found.failures, 0)
                self._connected_at = None
                error = await self._run_session(number, found.channel, found.node, limit_s, listener)
                unanswered = unanswered + 1 if self._connected_at is None else 0
                self._note_end(error)
                # Counted from the connection: the time that a dead node takes to fail says nothing about its stability.
                is_stable = self._connected_at is not None and self._loop.time() - self._connected_at > STABLE_S
                failures = 1 if is_stable else failures + 1
                wait_s = backoff_s(failures, BACKOFF_BASE_S, BACKOFF_CAP_S)
                event = "broker_unavailable" if self._connected_at is None else "broker_connection_lost"
                log.warning(event, broker=str(found.node), reason=str(error), retry_in_s=round(wait_s, 1))
                self._dialler.demote(found.node)
            await asyncio.sleep(wait_s)

    async def _read_files(self) -> None:
        """Use the password and the certificates that the files hold by now; established connections go on."""
        try:
            self._urls = await self._loop.run_in_executor(None, self._read_urls)
        except SettingsError as exc:
            log.warning("broker_settings_unusable", reason="; ".join(exc.lines), hint="the former ones are tried again")

    def _note_refusal(self, *, is_refused: bool) -> None:
        """Note whether the broker has refused a connection to this user, or what came last was something else."""
        now = self._loop.time()
        self._first_refused_at = (self._first_refused_at or now) if is_refused else None
        self.refused_s = 0.0 if self._first_refused_at is None else now - self._first_refused_at

    def _note_end(self, error: WorkerError) -> None:
        """Learn from what ended a session.

        Raises:
            TopologyMismatch: before the first session. Later the worker retries until the topology is corrected.
        """
        if isinstance(error, TopologyMismatch) and not self._has_connected:
            raise error
        is_fault = isinstance(error, ClosedByBroker) and error.code in _TOPOLOGY_FAULTS
        if is_fault or isinstance(error, TopologyMismatch):
            self._is_prepared = False

    async def _run_session(
        self, number: int, channel: BrokerChannel, node: Node, limit_s: float, listener: DeliveryListener
    ) -> WorkerError:
        """Run one session until it is lost or cannot begin; returns the reason."""
        others = (Node(url, url.host) for url in self._urls if url is not node.url)
        nodes = [each.parameters(limit_s) for each in (node, *others)]
        session = Session(
            number,
            self._topology,
            self._source,
            channel,
            nodes,
            self._suspects,
            listener.on_delivery,
            listener.on_blocked,
        )
        following: asyncio.Task[None] | None = None
        try:
            await session.open(self._name, declare=self._declare, is_prepared=self._is_prepared)
            if self._control is not None:
                self._control.is_caught_up.clear()
                following = self._loop.create_task(self._control.follow(nodes, f"{self._name} control"))
                following.add_done_callback(_raise_fault)
                await self._wait_for_orders(self._control, session)
            log.info("broker_connected", broker=str(node))
            self._session = session
            self._connected_at = self._loop.time()
            self._note_refusal(is_refused=False)
            if not self._is_prepared:
                self.other_consumers = session.other_consumers
            if session.other_consumers and self._on_other_consumers is not None:
                self._on_other_consumers(session.other_consumers)
            self._on_other_consumers = None  # later ones may be this worker's own, which the broker has not noticed
            prefetch = self._prefetch  # may change during the wait; `consume` tells of the change then
            await session.consumer.consume(prefetch)
            self._has_connected = self._is_prepared = True
            self._log_consuming(prefetch)
            return await asyncio.shield(session.lost)
        except (BrokerUnavailable, TopologyMismatch) as exc:
            return exc
        finally:  # before any wait, so that no delivery is started that can no longer be settled
            if self._session is session:
                self._session = None
                listener.on_lost()
            if session.publishers.was_blocked:
                listener.on_blocked(False)  # the broker tells the next connection whether it is blocked
            if following is not None:
                following.cancel()
            await asyncio.gather(session.close(), *([] if following is None else [following]), return_exceptions=True)

    async def _wait_for_orders(self, control: ControlReader, session: Session) -> None:
        """Take no command before it is known which products are paused by hand, unless the broker does not tell."""
        limit_s = MISSED_ORDERS_S if self._has_connected else ORDERS_S
        try:
            async with asyncio.timeout(limit_s):
                await session.consumer.channel.until_lost(asyncio.ensure_future(control.is_caught_up.wait()))
        except TimeoutError:
            log.warning("control_unavailable", reason=f"earlier orders were not read within {limit_s:g} s")

    async def consume(self, prefetch: int) -> None:
        """Set the number of deliveries held unacknowledged at once, after reconnections too; 0: take no new ones.

        Raises:
            WorkerError: the session is lost.
        """
        is_new = self._prefetch <= 1
        self._prefetch = prefetch
        if self._session is not None:
            await self._session.consumer.consume(prefetch)
            if is_new:
                self._log_consuming(prefetch)

    async def renew_consumer(self) -> None:
        """Replace the consumer by one that comes after those of others; what it holds stays valid.

        Raises:
            WorkerError: the session is lost.
        """
        if self._session is not None:
            await self._session.consumer.renew()

    def _log_consuming(self, prefetch: int) -> None:
        if prefetch > 1:  # a prefetch of 1 takes a probe only
            log.info("consumer_started", queue=self._source.queue, prefetch=prefetch)

    async def settle(self, delivery: Delivery, publications: Sequence[Publication]) -> bool:
        """Publish, and acknowledge once everything is confirmed; False: the session was lost before."""
        return self._session is not None and await self._session.settle(delivery, publications)

    def tell_operators(self, publication: Publication) -> None:
        """Publish something that only a person waits for: if that is not possible now, it is dropped."""
        if self._control is not None:
            self._control.publish(publication)

    @property
    def is_connected(self) -> bool:
        """Whether there is a session."""
        return self._session is not None

    @property
    def is_blocked(self) -> bool:
        """Whether the broker blocks publishing."""
        return self._session is not None and self._session.publishers.current.is_blocked

    @property
    def is_publishing_impaired(self) -> bool:
        """Whether the broker blocks publishing, rejects publications, or is slow to confirm them."""
        return self._session is not None and self._session.publishers.is_impaired

    @property
    def unanswered_s(self) -> float:
        """For how long a publication has waited that the broker neither confirmed nor rejected, in seconds."""
        return 0.0 if self._session is None else self._session.publishers.current.unanswered_s

    @property
    def consumers(self) -> int:
        """The number of this worker's consumers."""
        return 0 if self._session is None else self._session.consumer.consumers

    @property
    def is_changing_consumer(self) -> bool:
        """Whether a consumer is being replaced."""
        return self._session is not None and self._session.consumer.is_changing

    @property
    def unacknowledged(self) -> int:
        """The number of unacknowledged deliveries."""
        return 0 if self._session is None else self._session.consumer.unacknowledged

    async def look_at_queue(self) -> tuple[int, int] | None:
        """Return the command queue's numbers of ready messages and of consumers; None if the broker does not reply."""
        try:
            return None if self._session is None else await self._session.consumer.look_at_queue()
        except (WorkerError, TimeoutError):
            return None

    async def count_ready(self, queues: Iterable[str]) -> int | None:
        """Return how many messages are ready in some queues together; None if the broker does not reply."""
        session = self._session
        if session is None:
            return None
        try:
            return sum([(await session.consumer.look_at_queue(queue))[0] for queue in queues])
        except (WorkerError, TimeoutError):
            return None

    def reconnect(self, reason: str) -> None:
        """End the session, if there is one; the next one looks at the topology and at other consumers first."""
        self._is_prepared = False
        if self._session is not None:
            self._session.consumer.channel.fail(BrokerUnavailable(reason))

    def requeue(self, delivery: Delivery) -> None:
        """Return a delivery that was not started to the queue, where it cannot be republished."""
        if self._session is not None:
            self._session.requeue(delivery)

    async def drain(self) -> None:
        """Wait until no delivery is unacknowledged; returns at once without a session.

        Raises:
            WorkerError: the session is lost.
        """
        if self._session is not None:
            await self._session.consumer.drain()


def _log_unavailable(failures: Mapping[str, str], wait_s: float) -> None:
    for broker, reason in failures.items():
        log.warning("broker_unavailable", broker=broker, reason=reason, retry_in_s=round(wait_s, 1))


def _raise_fault(task: asyncio.Task[None]) -> None:
    """Let an error that nobody expected end the worker, as everywhere: it would not be seen otherwise."""
    if not task.cancelled() and (error := task.exception()) is not None:
        raise error
