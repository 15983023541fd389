"""A deployment under test: workers, an upstream system and a simulator in one namespace of a broker."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
SETTLE_S = 2  # as long as the two timeouts together, which are 1 s each
LONG_SETTLE_S = 60  # for tests with a longer timeout


@dataclass
class Deployment:
    """One namespace on the broker, with everything that a test needs to drive a worker."""

    broker_url: str
    folder: Path
    topology: Topology
    upstream: Upstream
    simulator: Simulator

    @classmethod
    @contextmanager
    def set_up(
        cls, broker_url: str, folder: Path, simulator: Simulator, settle_s: int = LONG_SETTLE_S
    ) -> Iterator["Deployment"]:
        """Yield a rig, and delete what it declared."""
        topology = Topology(f"test-{uuid4().hex[:8]}", (*RETRY_DELAYS_S, settle_s))
        upstream = Upstream(broker_url, topology)
        try:
            yield cls(broker_url, folder, topology, upstream, simulator)
        finally:
            upstream.close()

    def start_worker(self, **settings: str) -> WorkerProcess:
        """Start a worker without waiting for anything."""
        environment = {
            "AMQP_URL": self.broker_url,
            "ONENET_URL": self.simulator.url,
            "ONENET_API_KEY": API_KEY,
            "ONENET_CONNECT_TIMEOUT": "1",
            "ONENET_READ_TIMEOUT": "1",
            "WORKER_RECONCILE_DELAY": str(SETTLE_S),
            "WORKER_NAMESPACE": self.topology.namespace,
            "WORKER_RETRY_DELAYS": ",".join(map(str, RETRY_DELAYS_S)),
            "LOG_FORMAT": "json",
            "HTTP_PORT": "0",
        } | settings
        output = self.folder / f"worker-{uuid4().hex[:8]}"
        return WorkerProcess(LocalProcess(["run"], environment, output))

    def worker(self, **settings: str) -> WorkerProcess:
        """Start a worker and wait until it consumes."""
        worker = self.start_worker(**settings)
        try:
            worker.wait_for("consumer_started")
        except BaseException:
            worker.process.stop()
            raise
        self.upstream.bind_replies()
        return worker

    def finish(self, **settings: str) -> list[dict[str, Any]]:
        """Let workers run until there is a reply and no command is left; returns all replies.

        Empty queues do not tell that by themselves: the broker may be about to move a command, or to take it back.
        """
        replies: list[dict[str, Any]] = []
        is_over = False
        while not is_over:
            with self.worker(**settings) as worker:
                if not replies:
                    replies.append(self.upstream.reply(3 * PATIENCE_S).json)  # many rigs may be busy side by side
                wait_until(self._holds_no_command, PATIENCE_S, "the end of all commands")
                worker.process.signal(signal.SIGTERM)
                worker.process.wait()
            wait_until(lambda: self.upstream.consumers() == 0, PATIENCE_S, "the return of what they held")
            is_over = self._holds_no_command()
        while (message := self.upstream.try_reply()) is not None:
            replies.append(message.json)
        return replies

    def _holds_no_command(self) -> bool:
        """Tell whether no queue has a ready command; a running worker may still hold one unacknowledged."""
        queues = [self.topology.execute_queue, *map(self.topology.retry_queue, RETRY_DELAYS_S)]
        return not any(map(self.upstream.count, queues))

    def wait_for_request(self, simulator: Simulator | None = None) -> None:
        """Wait until the platform has been asked something."""
        asked = simulator or self.simulator
        wait_until(lambda: bool(asked.requests), PATIENCE_S, "a request")

    def cached(self, command_id: str) -> int:
        """Return how often the platform has cached a command whose args are its id."""
        return sum(1 for command in self.simulator.platform.commands if command.args == command_id)
