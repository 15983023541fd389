"""One attachment to the broker, from a connection to its first fault: a consumer and a publisher with a common fate.

Each has a connection of its own, because the broker stops reading a connection that publishes while it is short of
memory or disk, and acknowledgements must get through all the same. Whatever breaks, a connection, a channel, the
consumer, ends the session: the broker delivers everything unacknowledged again, to the next one. Only a publisher whose
publications the broker goes on rejecting, or that hangs in the routing of one, is replaced within the session.
"""

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from pika import URLParameters

from worker.amqp.channel import BrokerChannel
from worker.amqp.consumer import QueueConsumer, Source
from worker.amqp.declaring import prepare_topology
from worker.amqp.messages import Delivery, Publication, plain
from worker.amqp.publisher import CLOSE_S, InFlight, Settlement
from worker.amqp.publisher_supervisor import PublisherSupervisor
from worker.amqp.suspects import Suspects
from worker.amqp.topology import Topology
from worker.errors import BrokerUnavailable, ChannelRefused, TopologyMismatch, WorkerError
from worker.telemetry.logs import get_logger

_PRECONDITION_FAILED = 406
_ACCESS_REFUSED = 403
_PREPARE_AGAIN_S = 10.0  # after a topology that could not be declared in time

log = get_logger()


class Session:
    """Consumes, publishes with confirms and acknowledges.

    ``lost`` is done as soon as the session can no longer be used, and holds the reason. ``consumer`` and ``publishers``
    are its two halves.

    Args:
        number: tells the deliveries of this session from those of every other.
        topology: what to declare, and where to publish.
        source: what to consume from.
        channel: open, to the first of the nodes.
        nodes: the brokers; the session is with the first, and its publisher may be replaced by one with another.
        suspects: counts the messages over whose publications the broker closed a channel.
        on_delivery: called with each delivery.
        on_blocked: called with True when the broker blocks publishing, with False when it unblocks it.
    """

    def __init__(
        self,
        number: int,
        topology: Topology,
        source: Source,
        channel: BrokerChannel,
        nodes: Sequence[URLParameters],
        suspects: Suspects,
        on_delivery: Callable[[Delivery], None],
        on_blocked: Callable[[bool], None],
    ) -> None:
        self.number = number
        self._loop = asyncio.get_running_loop()
        self.lost: asyncio.Future[WorkerError] = self._loop.create_future()
        self.other_consumers = 0  # on the command queue, when the session began
        self._topology = topology
        self._nodes = nodes
        self._suspects = suspects
        self._on_blocked = on_blocked
        self._settlements: set[Settlement] = set()  # that have not ended
        self._confirmed: dict[int, Settlement] = {}  # by tag, until they are acknowledged
        self._background: set[asyncio.Task[None]] = set()
        self.consumer = QueueConsumer(
            number, topology, source, channel, on_delivery, self._on_acknowledged, self._run_in_background
        )
        self.publishers = PublisherSupervisor(
            nodes,
            suspects,
            topology.dead_letters_exchange,
            topology.unrouted_exchange,
            on_confirmed=self._on_confirmed,
            on_rejected=lambda item: self.consumer.take_next_beside(item.settlement.delivery.tag),
            on_blocked=self._on_blocked_change,
            on_fault=self._fail,
            run_in_background=self._run_in_background,
        )

    async def open(self, name: str, *, declare: bool, is_prepared: bool = False) -> None:
        """Connect the publisher, and declare the topology or check that it is there.

        Args:
            name: of the worker, in the broker's list of connections.
            declare: whether to declare the topology.
            is_prepared: an earlier session found the topology as it should be, so that this one need not wait for that.

        Raises:
            BrokerUnavailable: the broker cannot be reached, or the topology is not there yet.
            TopologyMismatch: it is there, but different, or this user may not declare it.
        """
        await self.publishers.connect(f"{name} publish")
        self.consumer.channel.lost.add_done_callback(lambda lost: self._fail(lost.result()))
        preparing = partial(prepare_topology, self._nodes, f"{name} topology", self._topology, declare=declare)
        if is_prepared:
            self._run_in_background(self._prepare_meanwhile(preparing))
        else:
            prepared = asyncio.ensure_future(preparing(spare=self.publishers.current.channel))
            try:
                self.other_consumers = await self.consumer.channel.until_lost(prepared)
            except ChannelRefused as exc:
                if exc.code == _PRECONDITION_FAILED:
                    raise TopologyMismatch(str(exc)) from exc
                if exc.code == _ACCESS_REFUSED:
                    raise TopologyMismatch(f"{exc}; with AMQP_DECLARE=false the topology is only checked") from exc
                raise
        await self.publishers.open()

    async def settle(self, delivery: Delivery, publications: Sequence[Publication]) -> bool:
        """Publish, and acknowledge once everything is confirmed; False: the session was lost before, or is another."""
        if delivery.session != self.number or self.lost.done():
            return False
        settlement = Settlement(delivery, len(publications), self._loop.create_future())
        self._settlements.add(settlement)
        closures = self._suspects.closures(delivery)
        for publication in publications:
            item = InFlight(plain(publication) if closures else publication, settlement)
            if (closures > 1 or delivery.is_truncated) and self.publishers.leave_to_broker(item):
                continue
            self.publishers.publish(item)
        if not publications:
            self._acknowledge(settlement)
        return await settlement.confirmed

    def requeue(self, delivery: Delivery) -> None:
        """Return a delivery that was not started to the queue; it is redelivered with ``redelivered`` set."""
        if delivery.session == self.number:
            self.consumer.requeue(delivery.tag)

    async def close(self) -> None:
        """Close the connections; the broker redelivers all unacknowledged messages."""
        self._fail(BrokerUnavailable("closed"))
        for task in self._background:
            task.cancel()
        closing = (self.consumer.channel.close(), self.publishers.current.close())
        await asyncio.wait([asyncio.ensure_future(each) for each in closing], timeout=CLOSE_S)

    async def _prepare_meanwhile(self, prepare: Callable[[], Awaitable[int]]) -> None:
        """See to the topology while messages are consumed: a cluster without one of its nodes may take minutes."""
        for wait_s in (_PREPARE_AGAIN_S * 2.0 ** min(turn, 6) for turn in itertools.count()):
            try:
                await prepare()
            except ChannelRefused as exc:
                if exc.code == _ACCESS_REFUSED:
                    log.warning("topology_not_declared", reason=str(exc))  # what is there can be used
                else:
                    self._fail(exc)
                return
            except BrokerUnavailable as exc:
                log.warning("topology_not_declared", reason=str(exc), retry_in_s=wait_s)
                await asyncio.sleep(wait_s)
            else:
                return

    def _on_confirmed(self, item: InFlight) -> None:
        if self.lost.done():
            return
        settlement = item.settlement
        settlement.unconfirmed -= 1
        if not settlement.unconfirmed:
            if settlement.is_delivery_rejected:
                self.consumer.reject(settlement.delivery.tag)
                self._end(settlement, is_confirmed=True)
            else:
                self._acknowledge(settlement)

    def _acknowledge(self, settlement: Settlement) -> None:
        self._confirmed[settlement.delivery.tag] = settlement
        self.consumer.acknowledge(settlement.delivery.tag)

    def _on_acknowledged(self, tags: Sequence[int]) -> None:
        for tag in tags:
            self._end(self._confirmed.pop(tag), is_confirmed=True)

    def _on_blocked_change(self, is_blocked: bool) -> None:
        if is_blocked:
            self.consumer.resume_reading()  # large deliveries that are held cannot be settled for now
        self._on_blocked(is_blocked)

    def _run_in_background(self, work: Coroutine[Any, Any, None]) -> None:
        async def run() -> None:
            with suppress(WorkerError):  # the session is lost, and ``lost`` says why
                await work

        task = asyncio.ensure_future(run())
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def _fail(self, error: WorkerError) -> None:
        if not self.lost.done():
            self.lost.set_result(error)
            self.publishers.stop()
            self.consumer.channel.fail(error)
            for settlement in list(self._settlements):
                self._end(settlement, is_confirmed=False)

    def _end(self, settlement: Settlement, *, is_confirmed: bool) -> None:
        self._settlements.discard(settlement)
        if not settlement.confirmed.done():  # done: its waiter was cancelled
            settlement.confirmed.set_result(is_confirmed)
