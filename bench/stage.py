"""The environment of a measurement: a broker with queued commands, a platform, and worker processes."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal, Self

import pika

from bench.platform import Platform
from worker.amqp.blocking import declare_on, delete_on
from worker.amqp.topology import EXECUTE
from worker.dev.services.ports import free_port, wait_until
from worker.settings import Settings

Kind = Literal["worker", "comparison"]
DEVICES = 5_000
# The best values: a quarter above its concurrency with a slow platform, so that no request waits for a publisher
# confirm; equal to it with a fast one.
COMPARISON_PREFETCH = {32: 40}
_PATIENCE_S = 300
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_MODULES: Mapping[Kind, list[str]] = {"worker": ["worker", "run"], "comparison": ["bench.comparison"]}


@dataclass(frozen=True)
class Usage:
    """Processor time, and current and peak resident memory in MiB, of a process."""

    cpu_s: float
    mib: float
    peak_mib: float


class Process:
    """One worker of either kind."""

    def __init__(self, kind: Kind, settings: Mapping[str, str], folder: Path) -> None:
        self.kind = kind
        self.started_at = time.monotonic()
        self._output = Path(tempfile.mkstemp(prefix=f"{kind}-", dir=folder)[1])
        with self._output.open("wb") as stream:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *_MODULES[kind]],
                env={**os.environ, "NO_PROXY": "127.0.0.1", "LOG_FORMAT": "json", **settings},
                stdout=stream,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def usage(self) -> Usage:
        """Return its usage so far."""
        folder = Path(f"/proc/{self.pid}")
        fields = (folder / "stat").read_text().rpartition(")")[2].split()
        ticks = int(fields[11]) + int(fields[12])  # utime, stime
        status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
        mib, peak_mib = (int(status[name].split()[0]) / 1024 for name in ("VmRSS", "VmHWM"))
        return Usage(ticks / _TICKS_PER_S, mib, peak_mib)

    def has_logged(self, event: str) -> bool:
        """Tell whether its log contains an event."""
        self.assert_is_running()
        return f'"event": "{event}"' in self._output.read_text()

    def stop(self) -> None:
        """Kill it."""
        self._process.kill()
        self._process.wait()

    def assert_is_running(self) -> None:
        """Raise an error with the end of its log if it has ended."""
        if self._process.poll() is not None:
            raise RuntimeError(f"the {self.kind} ended:\n{self._output.read_text()[-2000:]}")


class Stage:
    """A namespace on a broker, and a platform.

    Args:
        namespace: begins the names of exchanges and queues.
        amqp_url: the broker.
        platform: the stand-in for OneNET.
        folder: where the workers' logs go.
    """

    def __init__(self, namespace: str, amqp_url: str, platform: Platform, folder: Path) -> None:
        self.platform = platform
        self.replies = f"{namespace}.measured-replies"
        self.amqp_url = amqp_url
        self._folder = folder
        self.topology = Settings(worker_namespace=namespace).topology
        self._connection = pika.BlockingConnection(pika.URLParameters(f"{amqp_url}?heartbeat=0"))
        self.channel = self._connection.channel()

    def __enter__(self) -> Self:
        declare_on(self.channel, self.topology)
        self.channel.queue_declare(self.replies, durable=True)
        self.channel.queue_bind(self.replies, self.topology.replies_exchange, "#")
        return self

    def __exit__(self, *_: object) -> None:
        delete_on(self.channel, self.topology)
        self.channel.queue_delete(self.replies)
        self._connection.close()

    def fill(self, count: int) -> None:
        """Queue a number of commands, and wait until they are ready; purges older replies."""
        self.channel.queue_purge(self.topology.execute_queue)
        self.channel.queue_purge(self.replies)
        for number in range(count):
            self.channel.basic_publish(self.topology.commands_exchange, EXECUTE, command(number), PROPERTIES)
        wait_until(lambda: self._ready(self.topology.execute_queue) >= count, _PATIENCE_S, "queued commands")

    def wait_for_replies(self, count: int) -> None:
        """Wait for a number of replies, which proves that no command was lost."""
        wait_until(lambda: self._ready(self.replies) >= count, _PATIENCE_S, "the replies")

    def consumers(self) -> int:
        """Return the number of consuming workers."""
        return int(self.channel.queue_declare(self.topology.execute_queue, passive=True).method.consumer_count)

    def _ready(self, queue: str) -> int:
        return int(self.channel.queue_declare(queue, passive=True).method.message_count)

    @contextmanager
    def workers(self, kind: Kind, concurrency: int, count: int = 1, **settings: str) -> Iterator[list[Process]]:
        """Run a number of workers."""
        everything = {
            "AMQP_URL": self.amqp_url,
            "ONENET_URL": self.platform.url,
            "ONENET_API_KEY": "key",
            "ONENET_RATE_LIMIT": "off",
            "ONENET_DEVICE_INTERVAL": "0",
            "WORKER_NAMESPACE": self.topology.namespace,
            "WORKER_CONCURRENCY": str(concurrency),
            "COMPARISON_PREFETCH": str(COMPARISON_PREFETCH.get(concurrency, concurrency)),
            **settings,
        }
        running = [Process(kind, {**everything, "HTTP_PORT": str(free_port())}, self._folder) for _ in range(count)]
        try:
            yield running
        finally:
            for process in running:
                process.stop()

    def wait_for(self, answered: int, workers: list[Process]) -> None:
        """Wait until the platform has answered a number of requests."""
        self.wait(lambda: self.platform.answered >= answered, workers)

    def wait(self, condition: Callable[[], bool], workers: list[Process]) -> None:
        """Wait for a condition, polled every 5 ms, which is short compared to all measurements."""

        def holds() -> bool:
            for worker in workers:
                worker.assert_is_running()
            return condition()

        wait_until(holds, _PATIENCE_S, "the end of the measurement", every_s=0.005)


PROPERTIES = pika.BasicProperties(delivery_mode=2, app_id="bench", content_type="application/json")


def command(number: int, command_id: str | None = None) -> bytes:
    """Return a typical command for one of many devices."""
    valid_s = 24 * 3600 + number // DEVICES  # unique per device
    expires_at = (datetime.now(UTC) + timedelta(seconds=valid_s)).strftime("%Y-%m-%dT%H:%M:%SZ")
    return json.dumps(
        {
            "command_id": command_id or f"bench-{time.time_ns():x}-{number}",
            "imei": str(865820030000000 + number % DEVICES),
            "obj_id": 3311,
            "obj_inst_id": 0,
            "res_id": 5850,
            "expired_time": expires_at,
            "args": "on",
        }
    ).encode()
