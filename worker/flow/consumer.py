"""Takes deliveries in, as many as may be sent, and hands back what has not been started when nothing may."""

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from contextvars import copy_context
from functools import partial

from worker.amqp.broker import Broker
from worker.amqp.messages import Delivery, Publication
from worker.core.task import Task
from worker.errors import WorkerError
from worker.flow.crew import Crew
from worker.flow.device_queues import KeyedQueues
from worker.flow.pace import Pacer
from worker.processing.circuit_breaker import CircuitBreakers
from worker.processing.processor import PASS_ON_S, Processor
from worker.telemetry.logs import get_logger
from worker.telemetry.metrics import Metrics
from worker.telemetry.tracing import Tracing

MAX_BEHIND = 2_000  # deliveries held behind a busy device; what comes beyond them rests in a delay queue
OVERFLOW_REST_S = 60.0  # so long, since a backlog of thousands for one device takes minutes
MAX_HELD_S = 600.0  # a third of the broker's consumer_timeout: what waits for longer goes back to the queue
_SWEEP_S = 30.0
_NEVER = float("inf")
_TRACE_HEADERS = ("traceparent", "tracestate")

log = get_logger()


class Consumer:
    """Between the broker and the handler: what waits for a thread, for its device or for its slot.

    Args:
        handler: handles one delivery.
        broker: settles it.
        gates: tell whether anything may be sent; while nothing may, single commands are taken as probes.
        lanes: keep the order within a device.
        new_pacer: makes what gives a product's tasks to ``let_go`` at its rate; None: there is no rate to keep.
        metrics: are told how long commands take.
        tracing: spans what is done with each.
        concurrency: how many threads.
        few_threads: so many of them are kept awake while there is work; the others only where they are needed.
        prefetch: deliveries held at once, besides those that wait for their device.
        probe_s: seconds between two looks for a command that may be the probe.
    """

    def __init__(
        self,
        handler: Processor,
        broker: Broker,
        gates: CircuitBreakers,
        lanes: KeyedQueues,
        new_pacer: Callable[[str | None, Callable[[Task], object]], Pacer] | None,
        metrics: Metrics,
        tracing: Tracing,
        *,
        concurrency: int,
        few_threads: int,
        prefetch: int,
        probe_s: float,
    ) -> None:
        self._handler = handler
        self._broker = broker
        self._gates = gates
        self._lanes = lanes
        self._new_pacer = new_pacer
        self._concurrency = concurrency
        self._usual_prefetch = prefetch
        self._probe_s = probe_s
        self._metrics = metrics
        self._tracing = tracing
        self._loop = asyncio.get_running_loop()
        self.taken_at = self._loop.time()  # when a delivery last came

        self._pacers: dict[str | None, Pacer] = {}
        self._pacers_lock = threading.Lock()
        self._crew = Crew(self._handle, concurrency, few_threads)
        self._begun: dict[Task, float] = {}  # when each was that is being handled

        self._is_blocked = False
        self._is_stopping = False
        self._full_prefetch = prefetch
        self._grown_at = 0.0  # when it last was
        self._prefetch = prefetch  # what is asked of the broker: 0 for nothing, 1 for a probe
        self._not_started: list[Task] = []  # what came while nothing was to come
        self._resting: dict[Task, None] = {}  # what goes to rest unbegun, until that is confirmed
        self._probe: Task | None = None  # under way
        self._in_doubt: set[Task] = set()  # taken while nothing is sent: their histories come first, so none is a probe
        self._look_at = 0.0  # the earliest time to look for the next probe
        self._has_changed = asyncio.Event()
        self._handler.on_history_first = lambda delivery: self._loop.call_soon_threadsafe(self._on_no_probe, delivery)
        self._gates.on_change = lambda: self._loop.call_soon_threadsafe(self._has_changed.set)
        self._steering = asyncio.create_task(self._steer())
        self._steering.add_done_callback(self._on_steering_end)

    def on_delivery(self, delivery: Delivery) -> None:
        self.taken_at = self._loop.time()
        task = self._handler.read(delivery, self.taken_at)
        if self._prefetch > 1:
            self._take(task)
        else:
            self._not_started.append(task)
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
        void = [*self._not_started, *self._withdraw(), *self._resting]
        self._not_started, self._resting = [], {}
        for task in void:
            self._handler.mark_not_sent(task)

    @property
    def is_consuming(self) -> bool:
        """Whether commands are taken, and not only a probe."""
        return self._prefetch > 1

    @property
    def is_stopping(self) -> bool:
        return self._is_stopping

    @property
    def waits_for_slots(self) -> bool:
        """Whether commands are held here because their product's rate is used up."""
        return any(pacer.is_holding for pacer in list(self._pacers.values()))

    @property
    def in_flight(self) -> int:
        """How many commands are being handled."""
        return len(self._begun)

    @property
    def longest_handling_s(self) -> float:
        """For how long the longest handling that is under way has lasted."""
        now = time.monotonic()
        return max((now - began for began in list(self._begun.values())), default=0.0)

    async def stop(self) -> None:
        """Take nothing new, hand back what has not been started, finish the rest, and see it acknowledged."""
        self._is_stopping = True
        self._has_changed.set()
        await self._steering
        await self._crew.end()
        try:
            await self._broker.drain()
        except WorkerError as exc:
            log.warning("broker_connection_lost", reason=str(exc))

    async def _steer(self) -> None:
        """Ask the broker for as much as may be taken, whenever that changes, until the worker stops."""
        while True:
            self._has_changed.clear()
            wanted = self._wanted_prefetch()
            if wanted != self._prefetch:
                await self._ask_for(wanted)
            if self._is_stopping and not self._prefetch:  # it may have begun to stop while more was asked for
                return
            with suppress(TimeoutError):
                async with asyncio.timeout(self._patience_s()):
                    await self._has_changed.wait()
            self._hand_back(self._withdraw_old())
            if self._loop.time() - self._grown_at > _SWEEP_S and not self._needs_more(self._usual_prefetch):
                self._full_prefetch = self._usual_prefetch

    def _wanted_prefetch(self) -> int:
        if self._is_stopping or self._is_blocked:
            return 0
        if self._gates.allows_any():
            return self._full_prefetch
        is_due = self._gates.retry_in_s() == 0 and self._loop.time() >= self._look_at
        return 1 if is_due and self._probe is None and not self._not_started else 0

    def _patience_s(self) -> float:
        """Return how long nothing needs to be done by itself."""
        if self._prefetch or self._is_blocked or self._probe is not None:
            return _SWEEP_S
        return min(_SWEEP_S, max(self._gates.retry_in_s(), self._look_at - self._loop.time()))

    async def _ask_for(self, prefetch: int) -> None:
        former, self._prefetch = self._prefetch, prefetch
        is_idle = self._is_stopping or self._is_blocked
        if prefetch <= 1 < former:
            self._full_prefetch = self._usual_prefetch
            self._not_started += self._withdraw()
            if not is_idle:
                next_try_in_s = round(self._gates.retry_in_s(), 1)
                log.warning("consumption_paused", reason=self._gates.reason(), next_try_in_s=next_try_in_s)
        try:
            await self._broker.consume(prefetch)
        except WorkerError:
            return  # the session is over, on_lost has taken what was here, and the next one begins with this
        if prefetch == 1:
            if self._not_started:  # the probe has come already; it begins in the next round, when no other can come
                self._has_changed.set()
            return
        came, self._not_started = self._not_started, []
        if former == 1 and came and not is_idle:
            self._begin_look(came.pop(0))  # only now that no other can come
        self._hand_back(came)

    def _begin_look(self, task: Task) -> None:
        """Begin the probe, or a command in doubt behind which the probe may be."""
        if not task.looks_in_doubt:
            self._probe = task
            self._take(task)
            return
        self._has_changed.set()  # the next one may be the probe
        if len(self._in_doubt) < max(1, self._concurrency - 1):
            self._in_doubt.add(task)
            self._take(task)
        else:
            self._rest(task)  # its history may take long, and the probe needs a thread

    def _take(self, task: Task) -> None:
        """Let a task go as soon as its device is free."""
        if self._lanes.waiting >= MAX_BEHIND and self._lanes.is_busy(task):
            self._rest(task, OVERFLOW_REST_S)
        elif self._lanes.try_start(task):
            self._let_go(task)
        elif self._needs_more(self._full_prefetch):
            self._full_prefetch = min(2 * self._full_prefetch, self._usual_prefetch + MAX_BEHIND)
            self._grown_at = self._loop.time()
            self._has_changed.set()

    def _needs_more(self, prefetch: int) -> bool:
        """Tell whether so many deliveries are too few: what waits for busy devices must not keep others from coming."""
        return self._lanes.waiting + self._concurrency > prefetch

    def _let_go(self, task: Task) -> None:
        """Give a task to the threads, or first to its product's pacer. Called in any thread."""
        command = task.command
        if self._new_pacer is None or command is None or self._is_stopping or not self._gates.allows(command.product):
            self._crew.put(task)
            return
        with self._pacers_lock:
            if command.product not in self._pacers:
                self._pacers[command.product] = self._new_pacer(command.product, self._crew.put)
        self._pacers[command.product].put(task)

    def _withdraw(self) -> list[Task]:
        """Take back all that has not been started, in order of arrival."""
        behind = self._lanes.withdraw(_NEVER)
        ahead = [task for pacer in list(self._pacers.values()) for task in pacer.withdraw(_NEVER)]
        ahead += self._crew.withdraw()  # behind the pacers, which put there what they let go
        for task in ahead:
            self._lanes.finish(task)  # nothing is left behind it
        return self._in_order([*behind, *ahead])

    def _withdraw_old(self) -> list[Task]:
        """Take back what has waited for its device or its slot for too long, in order of arrival."""
        before = self._loop.time() - MAX_HELD_S
        behind = self._lanes.withdraw(before)
        ahead = [task for pacer in list(self._pacers.values()) for task in pacer.withdraw(before)]
        for task in self._crew.withdraw():
            if task.arrived_at < before:
                ahead.append(task)
            else:
                self._crew.put(task)
        for task in ahead:
            self._go_on_behind(task)
        return self._in_order([*behind, *ahead])

    def _go_on_behind(self, task: Task) -> None:
        """Let the next of a lane go. Called in any thread."""
        follower = self._lanes.finish(task)
        if follower is not None:
            self._let_go(follower)

    def _in_order(self, tasks: list[Task]) -> list[Task]:
        if self._probe in tasks:
            self._probe = None
        self._in_doubt.difference_update(tasks)
        return sorted(tasks, key=lambda task: task.delivery.tag)

    def _rest(self, task: Task, at_least_s: float = 0) -> None:
        """Send a task that was not begun to rest; if that is not confirmed, it is known all the same."""
        self._resting[task] = None
        self._broker.settle(
            task.delivery, [self._handler.rest(task, at_least_s)], partial(self._resting.pop, task, None)
        )

    def _hand_back(self, tasks: Sequence[Task]) -> None:
        for task in tasks:
            self._handler.mark_not_sent(task)  # it may come back redelivered all the same
            if self._broker.can_publish:
                self._broker.settle(task.delivery, [self._handler.hand_back(task)])
            else:
                self._broker.requeue(task.delivery)

    def _pass_on(self, delivery: Delivery, publications: Sequence[Publication]) -> bool:
        """Publish, acknowledge once that is confirmed, and tell whether it was in time."""
        confirmed = threading.Event()
        self._broker.settle(delivery, publications, confirmed.set)
        return confirmed.wait(PASS_ON_S)

    def _handle(self, task: Task) -> None:
        """Handle one task in one of the threads."""
        self._begun[task] = time.monotonic()
        with self._consuming(task):
            context = copy_context()  # whichever thread ends it, what is published then belongs to the same span

            def end(publications: Sequence[Publication] | None) -> None:
                context.run(self._end, task, publications)

            self._handler.handle(task, partial(self._pass_on, task.delivery), end)

    def _end(self, task: Task, publications: Sequence[Publication] | None) -> None:
        """Pass on what has become of a task. Called in any thread."""
        delivery = task.delivery
        if publications is None:
            self._rest(task)
        else:
            ends = [self._begin_publishing(publication) for publication in publications]
            self._broker.settle(delivery, publications, partial(self._on_confirmed, delivery, publications, ends))
        del self._begun[task]
        self._go_on_behind(task)
        if task is self._probe or task in self._in_doubt:
            self._loop.call_soon_threadsafe(self._on_look_end, task)

    def _consuming(self, task: Task) -> AbstractContextManager[object]:
        command_id = None if task.command is None else task.command.command_id
        headers = task.delivery.headers
        trace = {name: value for name in _TRACE_HEADERS if isinstance(value := headers.get(name), str)}
        return self._tracing.consuming(trace, command_id, task.delivery.attempt)

    def _begin_publishing(self, publication: Publication) -> Callable[[], object]:
        """Begin the span of a publication; a reply names it, so that whoever reads it goes on from there."""
        headers, end = self._tracing.publishing(publication.exchange, publication.routing_key)
        if headers and publication.status is not None:
            publication.properties.headers = {**(publication.properties.headers or {}), **headers}
        return end

    def _on_confirmed(
        self, delivery: Delivery, publications: Sequence[Publication], ends: Sequence[Callable[[], object]]
    ) -> None:
        for end in ends:
            end()
        for publication in publications:
            if publication.status is not None:
                self._metrics.time_command(publication.status, delivery.began_at)

    def _on_look_end(self, task: Task) -> None:
        """Go on looking for a probe, behind one that has been handled or a command in doubt."""
        if task is self._probe:
            self._probe = None
            # One that asked the platform nothing, or another product than the one that is due, is followed by the next
            # at once: else an hour's expired commands would keep the first good one waiting.
            self._look_at = self._loop.time() + (0 if self._gates.retry_in_s() == 0 else self._probe_s)
        self._in_doubt.discard(task)
        self._has_changed.set()

    def _on_no_probe(self, delivery: Delivery) -> None:
        """Look for another probe at once: this one's history comes first, which may take long."""
        if self._probe is not None and self._probe.delivery is delivery:
            self._in_doubt.add(self._probe)
            self._probe = None
            self._has_changed.set()

    def _on_steering_end(self, steering: "asyncio.Task[None]") -> None:
        if not steering.cancelled() and (error := steering.exception()) is not None:
            self._loop.call_exception_handler({"message": "steering", "exception": error})
