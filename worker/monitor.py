"""Tells how the worker stands: to those who ask for its health, and to those who read its metrics."""

import asyncio

from worker.amqp.broker import Broker
from worker.flow.consumer import Consumer
from worker.processing.circuit_breaker import CircuitBreakers
from worker.telemetry.health import Health
from worker.telemetry.metrics import State

_BEAT_S = 1.0
_LOOK_S = 10.0  # a sixth of the minute after which a worker that takes nothing has stalled


class HealthMonitor:
    """Beats in the event loop, and looks at the queue from time to time.

    Args:
        broker: the connection.
        intake: what takes deliveries.
        gates: tell what is paused.
        health: is told.
    """

    def __init__(self, broker: Broker, consumer: Consumer, gates: CircuitBreakers, health: Health) -> None:
        self._broker = broker
        self._consumer = consumer
        self._gates = gates
        self._health = health
        self._ready_messages = 0
        self._consumers = 0

    async def run(self) -> None:
        """Beat and look until cancelled."""
        await asyncio.gather(self._keep_beating(), self._keep_looking())

    def state(self) -> State:
        """Return how the worker stands. May be called from any thread."""
        return State(
            is_connected=self._broker.is_connected,
            is_blocked=self._broker.is_blocked,
            is_consuming=self._broker.is_connected and self._consumer.is_consuming,
            in_flight=self._consumer.in_flight,
            unacknowledged=self._broker.unacknowledged,
            ready_messages=self._ready_messages,
            consumers=self._consumers,
            paused=self._gates.paused(),
        )

    async def _keep_beating(self) -> None:
        while True:
            self._health.beat(is_connected=self._broker.is_connected, is_stopping=self._consumer.is_stopping)
            await asyncio.sleep(_BEAT_S)

    async def _keep_looking(self) -> None:
        while True:
            found = await self._broker.look_at_queue()
            self._ready_messages, self._consumers = found or (0, 0)
            taken_at, longest_s = self._consumer.taken_at, self._consumer.longest_handling_s
            self._health.look(self._ready_messages, taken_at, longest_s, is_excused=self._is_excused())
            await asyncio.sleep(_LOOK_S)

    def _is_excused(self) -> bool:
        """Tell whether there is a reason for taking nothing from the queue."""
        return (
            not self._broker.is_connected
            or self._broker.is_publishing_impaired
            or not self._gates.is_any_open()
            or self._consumer.waits_for_slots
            or self._consumer.is_stopping
        )
