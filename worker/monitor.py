"""Feeds the health probes and the metrics: a heartbeat of the event loop, and a regular poll of the queue."""

import asyncio
from collections.abc import Callable, Mapping

from worker.amqp.broker import Broker
from worker.flow.consumer import Consumer
from worker.processing.circuit_breaker import CircuitBreakers
from worker.telemetry.health import Health
from worker.telemetry.metrics import State

_HEARTBEAT_INTERVAL_S = 1.0
_POLL_INTERVAL_S = 10.0  # a sixth of the minute after which an idle worker counts as stalled


class HealthMonitor:
    """Reports the worker's state to the health probes, and supplies the gauges of the metrics.

    Args:
        broker: supplies the state of the connection and of the queue.
        consumer: supplies the state of the deliveries.
        breakers: supply which products are paused.
        health: receives the state.
        clock_offsets_s: supplies the offsets of the platforms' clocks.
    """

    def __init__(
        self,
        broker: Broker,
        consumer: Consumer,
        breakers: CircuitBreakers,
        health: Health,
        clock_offsets_s: Callable[[], Mapping[str | None, float]],
    ) -> None:
        self._broker = broker
        self._consumer = consumer
        self._breakers = breakers
        self._health = health
        self._clock_offsets_s = clock_offsets_s
        self._ready_messages = 0
        self._consumers = 0

    async def run(self) -> None:
        """Send heartbeats and poll the queue until cancelled."""
        await asyncio.gather(self._heartbeat(), self._poll_queue())

    def state(self) -> State:
        """Return the worker's state. May be called from any thread."""
        return State(
            is_connected=self._broker.is_connected,
            is_blocked=self._broker.is_blocked,
            is_consuming=self._broker.is_connected and self._consumer.is_consuming,
            in_flight=self._consumer.in_flight,
            unacknowledged=self._broker.unacknowledged,
            ready_messages=self._ready_messages,
            consumers=self._consumers,
            paused=self._breakers.paused(),
            clock_offsets_s=self._clock_offsets_s(),
        )

    async def _heartbeat(self) -> None:
        while True:
            self._health.heartbeat(is_connected=self._broker.is_connected, is_stopping=self._consumer.is_stopping)
            await asyncio.sleep(_HEARTBEAT_INTERVAL_S)

    async def _poll_queue(self) -> None:
        while True:
            found = await self._broker.look_at_queue()
            self._ready_messages, self._consumers = found or (0, 0)
            self._health.observe_queue(
                self._ready_messages,
                self._consumer.taken_at,
                self._consumer.longest_processing_s,
                idle_is_expected=self._idle_is_expected(),
            )
            await asyncio.sleep(_POLL_INTERVAL_S)

    def _idle_is_expected(self) -> bool:
        """Tell whether there is a known reason for taking no deliveries from the queue."""
        return (
            not self._broker.is_connected
            or self._broker.is_publishing_impaired
            or not self._breakers.allows_any()
            or self._consumer.is_rate_limiting
            or self._consumer.is_stopping
        )
