"""The engine: processes a task and records its outcome before it returns the resolution."""

from worker.core.claims import IdempotencyStore
from worker.core.clock import Clock, utc_now
from worker.core.decide import RetryPolicy
from worker.core.envelope import Task
from worker.core.platform import PlatformClient
from worker.core.resolution import Conclude, Resolution
from worker.processing.circuit_breaker import CircuitBreakers
from worker.processing.crash_guard import ReplaceWith
from worker.processing.leases import Leases
from worker.processing.processor import OnHistoryFirst, Processor
from worker.processing.reporter import Reporter
from worker.processing.unstarted import Unstarted
from worker.telemetry.metrics import Metrics


class Engine:
    """Runs tasks. Knows no broker.

    Args:
        client: sends requests to OneNET.
        store: remembers commands.
        breakers: tell of which products commands may be sent.
        history_breakers: tell of which products histories may be read.
        policy: when to try again.
        metrics: where to count.
        now: the time, aware; replaced in tests.

    Attributes:
        unstarted: postpones tasks that are not run.
        reporter: logs and counts resolutions.
    """

    def __init__(
        self,
        client: PlatformClient,
        store: IdempotencyStore,
        breakers: CircuitBreakers,
        history_breakers: CircuitBreakers,
        policy: RetryPolicy,
        metrics: Metrics,
        now: Clock = utc_now,
    ) -> None:
        self.unstarted = Unstarted(store, breakers, policy, now)
        self.reporter = Reporter(metrics)
        self._leases = Leases(store, policy, now)
        self._processor = Processor(
            client, store, self._leases, self.unstarted, breakers, history_breakers, policy, self.reporter, now
        )

    async def run(self, task: Task, replace_with: ReplaceWith, on_history_first: OnHistoryFirst) -> Resolution:
        """Process a task; returns its resolution, an outcome only after it is recorded.

        Args:
            task: the delivery.
            replace_with: publishes a resolution in the delivery's place before processing ends.
            on_history_first: called if a task that held the permit to send needs its history first after all.
        """
        resolution = await self._processor.process(task, replace_with, on_history_first)
        if isinstance(resolution, Conclude):
            return await self._leases.record(task.envelope, resolution)
        return resolution
