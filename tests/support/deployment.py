"""A deployment under test: workers, an upstream system and a simulator in one namespace of a broker."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

from tests.support.simulator import API_KEY
from tests.support.upstream import Upstream
from tests.support.waiting import PATIENCE_S
from tests.support.worker_process import WorkerProcess
from worker.amqp.topology import Topology
from worker.dev.services.ports import wait_until
from worker.dev.services.processes import LocalProcess
from worker.simulator.server import Simulator

RETRY_DELAYS_S = (1, 2)
RECONCILE_DELAY_S = 60  # the sum of both request timeouts, which no slow machine exceeds
SOON_S = 6
# The settings of workers whose commands are in doubt, so that the history tells soon. A slow machine may exceed these
# timeouts, which puts another command in doubt.
SOON_CERTAIN = {
    "ONENET_CONNECT_TIMEOUT": "2",
    "ONENET_READ_TIMEOUT": "4",
    "WORKER_RECONCILE_DELAY": str(SOON_S),
}


@dataclass
class Deployment:
    """One namespace on a broker, with all that a test needs to run workers in it."""

    broker_url: str
    folder: Path
    topology: Topology
    upstream: Upstream
    simulator: Simulator

    @classmethod
    @contextmanager
    def set_up(
        cls,
        broker_url: str,
        folder: Path,
        simulator: Simulator,
        reconcile_delay_s: int = RECONCILE_DELAY_S,
        result_delays_s: tuple[int, ...] = (),
    ) -> Iterator["Deployment"]:
        """Yield a deployment in a new namespace, and delete the namespace at the end.

        Args:
            broker_url: of the broker; of a cluster the URLs of its nodes, comma-separated.
            folder: for the workers' logs.
            simulator: the platform.
            reconcile_delay_s: the workers' WORKER_RECONCILE_DELAY.
            result_delays_s: the workers' WORKER_RESULT_DELAYS; none: results are off.
        """
        topology = Topology(f"test-{uuid4().hex[:8]}", (*RETRY_DELAYS_S, reconcile_delay_s), result_delays_s)
        upstream = Upstream(broker_url, topology)
        try:
            yield cls(broker_url, folder, topology, upstream, simulator)
        finally:
            upstream.close()

    def start_worker(self, python: Path | str = sys.executable, **settings: str) -> WorkerProcess:
        """Start a worker, in the environment of an interpreter, and return at once."""
        environment = {
            "AMQP_URL": self.broker_url,
            "ONENET_URL": self.simulator.url,
            "ONENET_API_KEY": API_KEY,
            "ONENET_CONNECT_TIMEOUT": "15",
            "ONENET_READ_TIMEOUT": "45",
            "ONENET_RATE_LIMIT": "off",
            "ONENET_DEVICE_INTERVAL": "0",
            "WORKER_RECONCILE_DELAY": str(RECONCILE_DELAY_S),
            "WORKER_NAMESPACE": self.topology.namespace,
            "WORKER_RETRY_DELAYS": ",".join(map(str, RETRY_DELAYS_S)),
            **self.result_settings,
            "LOG_FORMAT": "json",
            "HTTP_PORT": "0",
        } | settings
        output = self.folder / f"worker-{uuid4().hex[:8]}"
        return WorkerProcess(LocalProcess(["run"], environment, output, python))

    @property
    def result_settings(self) -> dict[str, str]:
        """The settings for results, if they are on."""
        delays_s = self.topology.result_delays_s
        return {"WORKER_RESULTS": "on", "WORKER_RESULT_DELAYS": ",".join(map(str, delays_s))} if delays_s else {}

    def worker(self, **settings: str) -> WorkerProcess:
        """Start a worker, wait until it consumes, and bind a queue for its replies."""
        worker = self.start_worker(**settings)
        try:
            worker.wait_for("consumer_started")
        except BaseException:
            worker.process.stop()
            raise
        self.upstream.bind_replies()
        return worker

    def run_until_finished(self, **settings: str) -> list[dict[str, Any]]:
        """Run workers until there is a reply, with results on a result too, and no command is left; returns them all.

        Empty queues are not enough: the broker may be about to move a command or to requeue one, so the queues are
        counted again after the worker has stopped. What is left then leads to another reply or result.
        """
        told: list[dict[str, Any]] = []
        wanted = {"status", "result"} if self.topology.result_delays_s else {"status"}

        def count_told() -> int:
            while (message := self.upstream.try_reply()) is not None:
                told.append(message.json)
            return len(told)

        def is_more_told_than(count: int) -> bool:
            return count_told() > count and wanted <= set().union(*told)

        known, is_finished = 0, False
        while not is_finished:
            with self.worker(**settings) as worker:
                wait_until(partial(is_more_told_than, known), 3 * PATIENCE_S, "the reply")  # the machine may be busy
                wait_until(self._has_no_ready_command, PATIENCE_S, "empty queues")
                worker.process.signal(signal.SIGTERM)
                worker.process.wait()
            wait_until(lambda: self.upstream.consumers() == 0, PATIENCE_S, "the end of the consumer")
            is_finished, known = self._has_no_ready_command(), count_told()
        return told

    def _has_no_ready_command(self) -> bool:
        """Tell whether no queue has a ready command; a running worker may still hold one unacknowledged."""
        topology = self.topology
        queues = [topology.execute_queue, *map(topology.retry_queue, RETRY_DELAYS_S)]
        if topology.result_delays_s:
            queues += [topology.results_queue, *map(topology.result_delay_queue, topology.result_delays_s)]
        return not any(map(self.upstream.count, queues))

    def wait_for_request(self, simulator: Simulator | None = None) -> None:
        """Wait until the platform has received a request."""
        receiver = simulator or self.simulator
        wait_until(lambda: bool(receiver.requests), PATIENCE_S, "a request")

    def cached(self, command_id: str) -> int:
        """Return how often the platform cached a command whose args are its id."""
        return sum(1 for command in self.simulator.platform.commands if command.args == command_id)
