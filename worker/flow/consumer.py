"""Takes deliveries from the broker, as many as may be sent, and settles each by its resolution."""

import asyncio
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from zoneinfo import ZoneInfo

from worker.amqp.broker import Broker
from worker.amqp.messages import Delivery, MessageBuilder, Publication
from worker.core.envelope import Task
from worker.core.parsing import read_task
from worker.core.resolution import Conclude, Postpone, Replaced, Resolution
from worker.errors import WorkerError
from worker.flow import prefetch
from worker.flow.background import Background
from worker.flow.device_queues import KeyedQueues
from worker.flow.dispatcher import Dispatcher
from worker.flow.rate_limited_queue import Acquire, Turns
from worker.processing.circuit_breaker import CircuitBreakers, finite_s
from worker.processing.crash_guard import ANNOUNCE_S
from worker.processing.engine import Engine
from worker.processing.store_watch import PROBE_INTERVAL_S, StoreWatch
from worker.telemetry.logs import get_logger
from worker.telemetry.metrics import Metrics
from worker.telemetry.tracing import Tracing

OVERFLOW_DELAY_S = 60.0  # a backlog of thousands for one device takes minutes
MAX_HELD_S = 600.0  # a third of the broker's consumer_timeout: what waits longer is returned to the queue

log = get_logger()


class Consumer:
    """Deliveries in, resolutions out.

    Args:
        engine: runs one task.
        messages: builds the publications.
        broker: settles deliveries.
        breakers: tell whether anything may be sent; while nothing may, single commands are taken as probes.
        store_watch: tells whether commands can be claimed; while none can, single ones are taken: some have expired.
        queues: keep the order within a device.
        acquire: takes one request from a product's rate limit; None: there is no rate limit.
        turns: shared with the reads of the history, which take requests from the same rate limit.
        metrics: measure how long commands take.
        tracing: makes the spans.
        platform_zone: where times without an offset are read.
        concurrency: how many commands are processed at once.
        usual_prefetch: deliveries held at once, besides those that wait for their device.
        probe_interval_s: seconds between two looks for a command that may be the probe.
        is_isolated: the upstream systems do not trust each other.
    """

    def __init__(
        self,
        engine: Engine,
        messages: MessageBuilder,
        broker: Broker,
        breakers: CircuitBreakers,
        store_watch: StoreWatch,
        queues: KeyedQueues,
        acquire: Acquire | None,
        turns: Turns,
        metrics: Metrics,
        tracing: Tracing,
        platform_zone: ZoneInfo,
        *,
        concurrency: int,
        usual_prefetch: int,
        probe_interval_s: float,
        is_isolated: bool = False,
    ) -> None:
        self._engine = engine
        self._unstarted = engine.unstarted
        self._messages = messages
        self._broker = broker
        self._breakers = breakers
        self._store_watch = store_watch
        self._queues = queues
        self._metrics = metrics
        self._tracing = tracing
        self._zone = platform_zone
        self._concurrency = concurrency
        self._usual_prefetch = usual_prefetch
        self._probe_interval_s = probe_interval_s
        self._is_isolated = is_isolated
        self._loop = asyncio.get_running_loop()
        self.taken_at = self._loop.time()  # when a delivery last arrived

        self._background = Background()
        self._dispatcher = Dispatcher(
            self._start,
            queues,
            acquire,
            breakers.allows,
            concurrency=concurrency,
            background=self._background,
            turns=turns,
        )
        self._deliveries: dict[Task, Delivery] = {}  # of all tasks that are not settled
        self._started: dict[Task, float] = {}  # when each task started that is being processed

        self._settling = 0  # publications and their acknowledgements that are in progress
        self._settled_at = 0.0  # when one was last confirmed, or the first of these began
        self._is_blocked = False
        self._is_stopping = False
        self._full_prefetch = usual_prefetch
        self._grown_at = 0.0  # when it last grew
        self._prefetch = usual_prefetch  # requested from the broker: 0 for no deliveries, 1 for a probe
        self._not_submitted: list[Task] = []  # what arrived while nothing was wanted
        self._probe: Task | None = None  # in progress
        self._in_doubt: set[Task] = set()  # taken while nothing is sent: their histories come first, so none is a probe
        self._look_at = 0.0  # the earliest time to look for the next probe
        self._has_changed = asyncio.Event()
        self._breakers.on_change = self._store_watch.on_change = self._has_changed.set
        self._steering = self._background.start(self._steer())

    def on_delivery(self, delivery: Delivery) -> None:
        """Take one delivery."""
        self.taken_at = self._loop.time()
        task = read_task(
            delivery.envelope,
            delivery.body,
            self._zone,
            self.taken_at,
            size=delivery.size,
            is_readable=not delivery.is_truncated,
            is_isolated=self._is_isolated,
        )
        self._deliveries[task] = delivery
        if self._engine.wants_note(task):
            self._background.start(self._unstarted.note_arrival(task))
        if delivery.is_excess:
            self._postpone(task, "too many large messages are held", OVERFLOW_DELAY_S)
        elif self._prefetch > 1:
            self._submit(task)
        else:
            self._not_submitted.append(task)
            self._has_changed.set()

    def on_blocked(self, is_blocked: bool) -> None:
        """Take nothing new while the broker takes no publications: every outcome would have to wait here."""
        self._is_blocked = is_blocked
        self._has_changed.set()
        if is_blocked:
            log.warning("publishing_blocked")
        else:
            log.info("publishing_unblocked")

    def on_lost(self) -> None:
        """Forget the deliveries that have not started: they are void, and are delivered again."""
        void = [*self._not_submitted, *self._withdraw()]
        self._not_submitted = []
        for task in void:
            self._unstarted.mark_not_sent(task)
            del self._deliveries[task]

    @property
    def is_consuming(self) -> bool:
        """Whether commands are taken, and not only a probe."""
        return self._prefetch > 1

    @property
    def is_stopping(self) -> bool:
        """Whether the worker takes nothing new because it stops."""
        return self._is_stopping

    @property
    def is_rate_limiting(self) -> bool:
        """Whether commands are held here because their product's rate is used up."""
        return self._dispatcher.is_rate_limiting

    @property
    def in_flight(self) -> int:
        """How many commands are being processed."""
        return len(self._started)

    @property
    def longest_processing_s(self) -> float:
        """For how long the longest processing that is in progress has lasted."""
        now = self._loop.time()
        return max((now - started for started in self._started.values()), default=0.0)

    @property
    def none_settled_s(self) -> float:
        """For how long deliveries have waited for the broker's confirms while it confirmed none, in seconds."""
        return self._loop.time() - self._settled_at if self._settling else 0.0

    def look_at_once(self) -> None:
        """Look for the next probe now, and not only after the interval."""
        self._look_at = 0.0
        self._has_changed.set()

    async def stop(self) -> None:
        """Take nothing new, return what has not started, finish the rest, and see it acknowledged."""
        self._is_stopping = True
        self._dispatcher.begin_stop()
        self._has_changed.set()
        await self._steering
        await self._dispatcher.stop()
        try:
            await self._broker.drain()
        except WorkerError as exc:
            log.warning("broker_connection_lost", reason=str(exc))

    def abandon(self) -> None:
        """Give up what is in progress: its deliveries are not acknowledged, so the broker delivers them again."""
        self._background.cancel()

    async def _steer(self) -> None:
        """Ask the broker for as many deliveries as may be sent, whenever that changes, until the worker stops."""
        while True:
            self._has_changed.clear()
            wanted = prefetch.wanted(self._demand(), self._full_prefetch)
            if wanted != self._prefetch:
                await self._ask_for(wanted)
            if self._is_stopping and not self._prefetch:  # it may have begun to stop while more was asked for
                return
            with suppress(TimeoutError):
                patience_s = prefetch.patience_s(self._demand(), self._prefetch, is_blocked=self._is_blocked)
                async with asyncio.timeout(patience_s):
                    await self._has_changed.wait()
            self._republish(self._withdraw(self._loop.time() - MAX_HELD_S))
            is_calm = self._loop.time() - self._grown_at > prefetch.SWEEP_S
            if is_calm and not self._is_too_small(self._usual_prefetch):
                self._full_prefetch = self._usual_prefetch

    def _demand(self) -> prefetch.Demand:
        return prefetch.Demand(
            is_idle=self._is_stopping or self._is_blocked,
            allows_any=self._breakers.allows_any() and self._store_watch.is_available,
            retry_in_s=self._breakers.retry_in_s(),
            look_in_s=self._look_at - self._loop.time(),
            has_probe=self._probe is not None,
            has_unstarted=bool(self._not_submitted),
        )

    def _is_too_small(self, size: int) -> bool:
        """Tell whether with this prefetch deliveries that wait for busy devices keep others from arriving."""
        return self._queues.waiting + self._concurrency > size

    async def _ask_for(self, wanted: int) -> None:
        former, self._prefetch = self._prefetch, wanted
        is_idle = self._is_stopping or self._is_blocked
        if wanted <= 1 < former:
            self._full_prefetch = self._usual_prefetch
            self._not_submitted += self._withdraw()
            if not is_idle:
                reason = self._store_watch.reason or self._breakers.reason()
                log.warning("consumption_paused", reason=reason, next_try_in_s=finite_s(self._breakers.retry_in_s()))
        try:
            await self._broker.consume(wanted)
        except WorkerError:
            return  # the session is over, on_lost has taken what was here, and the next one begins with this
        if wanted == 1:
            if self._not_submitted:  # the probe has arrived; it starts in the next round, when no other can arrive
                self._has_changed.set()
            return
        arrived, self._not_submitted = self._not_submitted, []
        if former == 1 and arrived and not is_idle:
            self._look_at_first(arrived.pop(0))  # only now that no other can arrive
        self._republish(arrived)

    def _look_at_first(self, task: Task) -> None:
        """Start the probe, or a command in doubt that may precede the probe."""
        if not task.looks_in_doubt or not self._store_watch.is_available:
            self._probe = task
            self._submit(task)
            return
        self._has_changed.set()  # the next one may be the probe
        if len(self._in_doubt) < max(1, self._concurrency - 1):
            self._in_doubt.add(task)
            self._submit(task)
        else:  # their histories may take long, and the probe needs its turn
            self._postpone(task, "other commands in doubt are being reconciled")

    def _submit(self, task: Task) -> None:
        """Have a task run as soon as its device is free."""
        if not self._dispatcher.submit(task) and self._is_too_small(self._full_prefetch):
            self._full_prefetch = min(2 * self._full_prefetch, self._usual_prefetch + prefetch.MAX_WAITING)
            self._grown_at = self._loop.time()
            self._has_changed.set()
        while prefetch.is_too_much(self._queues.waiting, self._queues.waiting_bytes):
            last = self._queues.withdraw_last_of_largest()  # so that nobody else's command has to make room
            self._forget_look(last)
            self._postpone(last, "too many commands wait for its device", OVERFLOW_DELAY_S)

    def _postpone(self, task: Task, reason: str, at_least_s: float = 0) -> None:
        """Postpone a task that has not started."""
        self._background.start(self._settle(task, self._unstarted.postpone(task, reason, at_least_s)))

    def _start(self, task: Task) -> None:
        self._started[task] = self._loop.time()
        self._background.start(self._handle(task))

    async def _handle(self, task: Task) -> None:
        """Process one delivery, let the next one of its device start, and see this one settled."""
        envelope = task.envelope
        command_id = None if task.command is None else task.command.command_id
        with self._tracing.consuming(envelope.trace, command_id, envelope.attempt):
            resolution = await self._engine.run(task, partial(self._replace_with, task), self._on_history_first)
            duration_s = self._loop.time() - self._started.pop(task)
            self._dispatcher.finish(task)  # the next of its device starts when this coroutine waits for the broker
            if task is self._probe or task in self._in_doubt:
                self._on_look_end(task, resolution)
            await self._settle(task, resolution, duration_s)

    async def _settle(self, task: Task, resolution: Resolution, duration_s: float = 0.0) -> None:
        """Report what becomes of a task, publish it, and acknowledge its delivery once that is confirmed."""
        delivery = self._deliveries.pop(task)
        self._engine.reporter.report(task, resolution, duration_s)
        if isinstance(resolution, Replaced):
            return  # published already, and acknowledged when that is confirmed
        is_confirmed = await self._publish(task, delivery, resolution)
        if not is_confirmed and isinstance(resolution, Postpone) and resolution.is_unclaimed:
            self._unstarted.mark_not_sent(task)  # it is delivered again: the copy may not have been stored

    async def _replace_with(self, task: Task, resolution: Resolution) -> bool:
        """Publish a resolution while its task is processed; tells whether that was confirmed in time.

        The broker has the acknowledgement too by then: one that was only written can be lost with its connection, and a
        worker that dies in the attempt would get the message back beside the one that announced it.
        """
        try:
            async with asyncio.timeout(ANNOUNCE_S):
                is_confirmed = await self._publish(task, self._deliveries[task], resolution)
                return is_confirmed and await self._broker.look_at_queue() is not None  # answered in order
        except TimeoutError:
            return False

    async def _publish(self, task: Task, delivery: Delivery, resolution: Resolution) -> bool:
        """Publish what a resolution means, and acknowledge its delivery; tells whether all of that was confirmed."""
        publications = self._messages.publications(delivery, resolution, task.command)
        span_ends = [self._begin_span(publication) for publication in publications]
        if not self._settling:
            self._settled_at = self._loop.time()
        self._settling += 1
        try:
            is_confirmed = await self._broker.settle(delivery, publications)
        finally:
            self._settling -= 1
            for end in span_ends:
                end()
        if is_confirmed:
            self._settled_at = self._loop.time()
            for publication in publications:
                if publication.status is not None:
                    self._metrics.time_command(publication.status, task.envelope.published_at)
            if (copy := self._messages.reply_copy(delivery, resolution)) is not None:
                self._broker.tell_operators(copy)
        return is_confirmed

    def _begin_span(self, publication: Publication) -> Callable[[], object]:
        """Begin the span of a publication; a reply names it, so that its reader continues the trace."""
        headers, end = self._tracing.publishing(publication.exchange, publication.routing_key)
        if headers and publication.status is not None:
            publication.properties.headers = {**(publication.properties.headers or {}), **headers}
        return end

    def _withdraw(self, arrived_before: float = math.inf) -> list[Task]:
        """Take back the tasks that have not started and came before a monotonic time, in order of arrival."""
        tasks = self._dispatcher.withdraw(arrived_before)
        for task in tasks:
            self._forget_look(task)
        return sorted(tasks, key=lambda task: self._deliveries[task].tag)

    def _republish(self, tasks: Sequence[Task]) -> None:
        """Return tasks that have not started to the queue."""
        for task in tasks:
            self._unstarted.mark_not_sent(task)  # it may be redelivered all the same
            delivery = self._deliveries.pop(task)
            if self._broker.is_connected and not self._broker.is_blocked and not delivery.is_truncated:
                doubt = self._unstarted.doubt_of_copy(task)
                copy = self._messages.republish(delivery, doubt, is_stopping=self._is_stopping)
                self._background.start(self._broker.settle(delivery, [copy]))
            else:
                self._broker.requeue(delivery)

    def _forget_look(self, task: Task) -> None:
        """Note that a task, which may be the probe, has not started and will not."""
        if task is self._probe:
            self._probe = None
        self._in_doubt.discard(task)

    def _on_look_end(self, task: Task, resolution: Resolution) -> None:
        """Continue to look for a probe, after one that was processed or a command in doubt."""
        if task is self._probe:
            self._probe = None
            # One that asked the platform nothing, or another product than the one that is due, is followed by the next
            # at once: else an hour's expired commands would keep the first good one waiting.
            is_at_once = self._breakers.retry_in_s() == 0
            self._look_at = self._loop.time() + (0 if is_at_once else self._probe_interval_s)
            if not self._store_watch.is_available and not isinstance(resolution, Conclude):
                self._look_at = self._loop.time() + PROBE_INTERVAL_S
        self._in_doubt.discard(task)
        self._has_changed.set()

    def _on_history_first(self, task: Task) -> None:
        """Look for another probe at once: the history of this one comes first, which may take long."""
        if self._probe is task:
            self._in_doubt.add(task)
            self._probe = None
            self._has_changed.set()
