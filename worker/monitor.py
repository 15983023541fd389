"""Feeds the health probes and the metrics: a report of the event loop each second, and a regular poll of the queue."""

import asyncio
import time
from collections.abc import Callable, Mapping

from worker.amqp.broker import Broker
from worker.flow.consumer import Consumer
from worker.flow.result_consumer import ResultConsumer
from worker.processing.circuit_breaker import CircuitBreakers
from worker.processing.store_watch import StoreWatch
from worker.telemetry.health import Condition, Health
from worker.telemetry.metrics import State

_REPORT_INTERVAL_S = 1.0
_POLL_INTERVAL_S = 10.0  # a sixth of the minute after which an idle worker counts as stalled


class HealthMonitor:
    """Reports the worker's condition to the health probes, and supplies the gauges of the metrics.

    A worker that takes nothing from its queue while commands wait there, though nothing keeps it from consuming, may be
    a standby, whom the broker gives nothing, or have a consumer that the broker has forgotten. So it reconnects once;
    if the broker still gives it nothing, that is the broker's will where there are other consumers, else a fault.

    Args:
        broker: supplies the state of the connection and of the queue, and reconnects.
        consumer: supplies the state of the deliveries.
        results: supplies how many commands wait for their result; None: results are off.
        breakers: supply which products are paused.
        store_watch: supplies whether the store can be used.
        health: receives the reports.
        clock_offsets_s: supplies the offsets of the platforms' clocks.
        clock: monotonic time in seconds, the event loop's; replaced in tests.
    """

    def __init__(
        self,
        broker: Broker,
        consumer: Consumer,
        results: ResultConsumer | None,
        breakers: CircuitBreakers,
        store_watch: StoreWatch,
        health: Health,
        clock_offsets_s: Callable[[], Mapping[str | None, float]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._broker = broker
        self._consumer = consumer
        self._results = results
        self._breakers = breakers
        self._store_watch = store_watch
        self._health = health
        self._clock_offsets_s = clock_offsets_s
        self._clock = clock
        self._ready_messages = 0
        self._consumers = 0
        self._consumed_at = float("-inf")  # when it last consumed
        self._explained_at = self._clock()  # when it last had a consumer, or a reason to have none
        self._satisfied_at = self._clock()  # when no command waited that it should have taken
        self._reconnected_at = float("-inf")  # because it took nothing

    async def run(self) -> None:
        """Send reports and poll the queue until cancelled."""
        await asyncio.gather(self._report(), self._poll())

    def state(self) -> State:
        """Return the worker's state. May be called from any thread."""
        return State(
            is_connected=self._broker.is_connected,
            is_blocked=self._broker.is_blocked,
            is_store_available=self._store_watch.is_available,
            is_consuming=self._broker.is_connected and self._consumer.is_consuming,
            in_flight=self._consumer.in_flight,
            unacknowledged=self._broker.unacknowledged,
            ready_messages=self._ready_messages,
            consumers=self._consumers,
            outstanding_results=0 if self._results is None else self._results.outstanding,
            paused=self._breakers.paused(),
            paused_by_hand=self._breakers.paused_by_hand(),
            clock_offsets_s=self._clock_offsets_s(),
        )

    async def poll_queue(self) -> None:
        """Look at the queue, and reconnect if the broker gives this worker nothing of it."""
        found = await self._broker.look_at_queue()
        self._ready_messages, self._consumers = found or (0, 0)
        if self._none_taken_s() > self._health.stall_s and not self._broker.unacknowledged:
            self._reconnect()

    async def _report(self) -> None:
        while True:
            self._health.report(self.condition())
            await asyncio.sleep(_REPORT_INTERVAL_S)

    async def _poll(self) -> None:
        while True:
            await self.poll_queue()
            await asyncio.sleep(_POLL_INTERVAL_S)

    def condition(self) -> Condition:
        """Return the worker's condition."""
        broker, consumer, now = self._broker, self._consumer, self._clock()
        if broker.is_connected and consumer.is_consuming:
            self._consumed_at = now
        if broker.consumers or broker.is_changing_consumer or self._idle_is_expected():
            self._explained_at = now
        return Condition(
            is_connected=broker.is_connected,
            is_stopping=consumer.is_stopping,
            is_blocked=broker.is_blocked,
            is_paused=not self._breakers.allows_any(),
            longest_handling_s=consumer.longest_processing_s,
            unanswered_s=broker.unanswered_s,
            none_settled_s=consumer.none_settled_s,
            not_consuming_s=now - self._consumed_at,
            unexplained_s=now - self._explained_at,
            ready_messages=self._ready_messages,
            none_taken_s=self._none_taken_s() if broker.unacknowledged or self._has_reconnected() else 0.0,
            is_standby=self._is_standby(),
            refused_s=broker.refused_s,
        )

    def _none_taken_s(self) -> float:
        """Return for how long commands have waited in the queue that this worker should have taken."""
        if not self._ready_messages or self._idle_is_expected():
            self._satisfied_at = self._clock()
        return self._clock() - max(self._satisfied_at, self._consumer.taken_at)

    def _is_standby(self) -> bool:
        """Tell whether the broker may have reasons of its own for giving this worker nothing."""
        own = self._broker.consumers
        has_others = self._broker.other_consumers > 0 or self._consumers > own
        return own > 0 and has_others and not self._broker.unacknowledged

    def _has_reconnected(self) -> bool:
        """Tell whether the worker has reconnected and taken nothing since."""
        return self._reconnected_at >= self._consumer.taken_at

    def _reconnect(self) -> None:
        """Reconnect, unless nothing was taken since the last time."""
        if not self._has_reconnected():
            self._reconnected_at = self._satisfied_at = self._clock()
            self._broker.reconnect(f"no delivery arrives, though {self._ready_messages} messages wait")

    def _idle_is_expected(self) -> bool:
        """Tell whether there is a known reason for taking no deliveries from the queue."""
        return (
            not self._broker.is_connected
            or self._broker.is_publishing_impaired
            or not self._breakers.allows_any()
            or not self._store_watch.is_available
            or self._consumer.is_rate_limiting
            or self._consumer.is_stopping
        )
