"""Keeps the worker attached to the broker: connects, and after every fault connects again."""

import asyncio
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from pika import URLParameters

from worker.amqp.connection import address
from worker.amqp.messages import Delivery, Publication
from worker.amqp.session import Session
from worker.amqp.suspects import Suspects
from worker.amqp.topology import Topology
from worker.core.backoff import backoff_s
from worker.errors import BrokerUnavailable, WorkerError
from worker.telemetry.logs import get_logger

BACKOFF_BASE_S = 0.5
BACKOFF_CAP_S = 15
_GATHER_S = 0.001  # for how long settlements are gathered, so that one turn of the loop serves several
STABLE_S = 10  # a session that ends earlier counts as one more failure, so that the waits grow

log = get_logger()


class DeliveryListener(Protocol):
    """What takes the deliveries."""

    def on_delivery(self, delivery: Delivery) -> None:
        """Take one delivery."""

    def on_blocked(self, is_blocked: bool) -> None:
        """Learn that the broker takes no publications any more, or takes them again."""

    def on_lost(self) -> None:
        """Learn that every delivery which is still here has become void."""


class Broker:
    """The worker's side of RabbitMQ. All but ``settle`` belong to the event loop's thread.

    Args:
        parameters: the brokers, tried in turn.
        topology: declared at each connection, or checked.
        name: shown in the broker's list of connections.
        declare: whether to declare the topology.
        prefetch: deliveries held unacknowledged at once, to begin with.
        on_consumers_found: is told how many others consume when this worker connects for the first time.
    """

    def __init__(
        self,
        parameters: Sequence[URLParameters],
        topology: Topology,
        *,
        name: str,
        declare: bool,
        prefetch: int,
        on_consumers_found: Callable[[int], None],
    ) -> None:
        self._parameters = parameters
        self._topology = topology
        self._name = name
        self._declare = declare
        self._prefetch = prefetch
        self._on_consumers_found = on_consumers_found
        self._session: Session | None = None
        self._loop = asyncio.get_running_loop()
        self._settlements: deque[tuple[Delivery, Sequence[Publication], Callable[[], object] | None]] = deque()
        self._is_woken = False
        self._connected_at: float | None = None  # of the present session, or the one that has just ended
        self._suspects = Suspects()
        self._has_looked_for_others = False

    async def run(self, intake: DeliveryListener) -> None:
        """Stay attached until cancelled.

        Raises:
            TopologyMismatch: the broker has another topology under our names.
        """
        failures = 0
        nodes = deque(self._parameters)
        for number in itertools.count(1):
            self._connected_at = None
            error = await self._attend(number, list(nodes), intake)
            failed = nodes[0]
            nodes.rotate(-1)
            was_connected = self._connected_at is not None
            # The time that a node takes to not answer is no sign of its being well.
            is_stable = self._connected_at is not None and self._loop.time() - self._connected_at > STABLE_S
            failures = 1 if is_stable else failures + 1
            # Every broker of the list is tried once before the first wait.
            rounds, tried = divmod(failures, len(nodes))
            wait_s = 0.0 if tried else backoff_s(rounds, BACKOFF_BASE_S, BACKOFF_CAP_S)
            event = "broker_connection_lost" if was_connected else "broker_unavailable"
            log.warning(event, broker=address(failed), reason=str(error), retry_in_s=round(wait_s, 1))
            await asyncio.sleep(wait_s)

    async def _attend(self, number: int, nodes: Sequence[URLParameters], intake: DeliveryListener) -> WorkerError:
        """Live through one session with the first node; returns what ended it, or kept it from beginning."""
        session = Session(number, self._topology, nodes, self._suspects, intake.on_delivery, intake.on_blocked)
        try:
            await session.open(self._name, declare=self._declare)
            log.info("broker_connected", broker=address(nodes[0]))
            self._session = session
            self._connected_at = self._loop.time()
            if session.consumers_found and not self._has_looked_for_others:
                self._on_consumers_found(session.consumers_found)
            self._has_looked_for_others = True
            await session.consume(self._prefetch)
            self._log_consuming()
            return await asyncio.shield(session.lost)
        except BrokerUnavailable as exc:
            return exc
        finally:  # before any wait, so that nothing is begun that has become void
            if self._session is session:
                self._session = None
                intake.on_lost()
            if session.is_blocked:
                intake.on_blocked(False)  # the next connection learns for itself whether it is
            await session.close()

    async def consume(self, prefetch: int) -> None:
        """Take so many deliveries at once from now on, after reconnections too; 0 for none.

        Raises:
            WorkerError: the session was lost meanwhile.
        """
        is_new = self._prefetch <= 1
        self._prefetch = prefetch
        if self._session is not None:
            await self._session.consume(prefetch)
            if is_new:
                self._log_consuming()

    def _log_consuming(self) -> None:
        if self._prefetch > 1:  # a single delivery is no more than a probe
            log.info("consumer_started", queue=self._topology.execute_queue, prefetch=self._prefetch)

    def settle(
        self,
        delivery: Delivery,
        publications: Sequence[Publication],
        on_confirmed: Callable[[], object] | None = None,
    ) -> None:
        """Have the event loop publish, await the confirms and acknowledge. May be called from any thread.

        Args:
            delivery: what to acknowledge.
            publications: what must be confirmed before; without any, nothing is acknowledged either.
            on_confirmed: is called once they are; never, if the session is lost before.
        """
        self._settlements.append((delivery, publications, on_confirmed))
        if not self._is_woken:  # one wake-up serves all that is appended until it runs
            self._is_woken = True
            self._loop.call_soon_threadsafe(self._loop.call_later, _GATHER_S, self._settle_all)

    def _settle_all(self) -> None:
        self._is_woken = False  # before the first look, so that whatever is appended from here on wakes again
        while self._settlements:
            settlement = self._settlements.popleft()
            if self._session is not None:
                self._session.settle(*settlement)

    @property
    def is_connected(self) -> bool:
        """Tell whether there is a session, so that commands can come and outcomes can go."""
        return self._session is not None

    @property
    def is_blocked(self) -> bool:
        """Tell whether the broker takes no publications."""
        return self._session is not None and self._session.is_blocked

    @property
    def is_publishing_hindered(self) -> bool:
        """Tell whether the broker takes no publications, refuses some again and again, or is slow to confirm them."""
        return self._session is not None and self._session.is_publishing_hindered

    @property
    def unacknowledged(self) -> int:
        """How many deliveries are held."""
        return 0 if self._session is None else self._session.unacknowledged

    async def look_at_queue(self) -> tuple[int, int] | None:
        """Return how many messages are ready in the queue and how many consumers it has; None: nobody says."""
        try:
            return None if self._session is None else await self._session.look_at_queue()
        except (WorkerError, TimeoutError):
            return None

    @property
    def can_publish(self) -> bool:
        """Tell whether there is a broker, and it takes publications."""
        return self._session is not None and not self._session.is_blocked

    def requeue(self, delivery: Delivery) -> None:
        """Give back a delivery that was not started, while the broker takes no publications."""
        if self._session is not None:
            self._session.requeue(delivery)

    async def drain(self) -> None:
        """Wait until everything is confirmed and acknowledged, or there is no session any more.

        Raises:
            WorkerError: the session was lost before.
        """
        if self._session is not None:
            await self._session.drain()
