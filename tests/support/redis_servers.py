"""Redis servers of a test's own: a primary with replicas, Sentinels, a node of a cluster."""

import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import redis

from worker.dev.services.ports import free_port, wait_until
from worker.dev.services.redis import answers

START_S = 90
MASTER = "records"


class Server:
    """One server process with a folder of its own.

    Args:
        options: of the command line, without the leading dashes.
    """

    def __init__(self, *options: str, config: str = "", is_sentinel: bool = False) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._folder = Path(tempfile.mkdtemp(prefix="onenet-redis-"))
        self._config = self._folder / "server.conf"
        self._config.write_text(config)
        self._options = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", *options]
        if is_sentinel:
            self._options = ["--port", str(self.port), "--bind", "127.0.0.1", "--sentinel"]
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        program = shutil.which("redis-server")
        assert program is not None
        with (self._folder / "output").open("ab") as output:
            self._process = subprocess.Popen(
                [program, str(self._config), *self._options], cwd=self._folder, stdout=output, stderr=output
            )
        wait_until(lambda: answers(self.url), START_S, "a Redis server")

    def client(self) -> Any:
        return redis.Redis.from_url(self.url, decode_responses=True)

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.kill()
            self._process.wait()
            self._process = None

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)


def patient(url: str) -> str:
    """Return a server's URL with a time limit for its answers that no slow machine exceeds."""
    return f"{url}?socket_timeout=60"


@contextmanager
def servers(*made: Server) -> Iterator[None]:
    """End servers at the end of a block."""
    try:
        yield
    finally:
        for each in made:
            each.close()


@contextmanager
def replicated(replicas: int = 1) -> Iterator[list[Server]]:
    """Start a primary and its replicas, the primary first."""
    made = [Server("--repl-diskless-sync-delay", "0")]
    try:
        for _ in range(replicas):
            made.append(Server("--replicaof", "127.0.0.1", str(made[0].port), "--repl-diskless-sync-delay", "0"))
        with made[0].client() as client:
            wait_until(lambda: is_replicated(client, replicas), START_S, "the replicas")
            client.set("ready", 1)
            client.wait(replicas, 1000 * START_S)
        yield made
    finally:
        for each in made:
            each.close()


def is_replicated(client: Any, replicas: int) -> bool:
    """Tell whether so many replicas are online."""
    facts = client.info("replication")
    return bool(sum(facts.get(f"slave{number}", {}).get("state") == "online" for number in range(replicas)) == replicas)


@contextmanager
def watched(primary: Server, count: int = 3) -> Iterator[list[Server]]:
    """Start Sentinels that watch a primary, and fail over two seconds after it is gone."""
    config = (
        f"sentinel monitor {MASTER} 127.0.0.1 {primary.port} {count // 2 + 1}\n"
        f"sentinel down-after-milliseconds {MASTER} 2000\n"
        f"sentinel failover-timeout {MASTER} 3000\n"
    )
    made: list[Server] = []
    try:
        made.extend(Server(config=config, is_sentinel=True) for _ in range(count))
        for each in made:
            with each.client() as client:
                wait_until(lambda: knows_all(client, count), START_S, "the Sentinels")
        yield made
    finally:
        for each in made:
            each.close()


def knows_all(client: Any, count: int) -> bool:
    """Tell whether a Sentinel knows the others and a replica."""
    state = client.sentinel_masters()[MASTER]
    return bool(state["num-other-sentinels"] == count - 1 and state["num-slaves"] >= 1)


def sentinel_url(sentinels: list[Server]) -> str:
    """Return the URL of the store behind Sentinels."""
    return f"redis+sentinel://{','.join(f'127.0.0.1:{each.port}' for each in sentinels)}/{MASTER}/0"
