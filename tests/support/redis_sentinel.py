"""A Redis with a replica, watched by three Sentinels: private processes that tests may kill."""

import shutil
import signal
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Self

import redis

from tests.support.waiting import PATIENCE_S
from worker.dev.services.ports import free_port, wait_until
from worker.dev.services.redis import UNAVAILABLE, answers
from worker.errors import LocalServiceError

MASTER_NAME = "onenet"
DOWN_AFTER_MS = 2000
_SENTINELS = 3
_QUORUM = 2
# docs/operations.md recommends the same; tests/cluster/test_recipes.py compares the two.
SERVER = """\
appendonly yes
appendfsync always
maxmemory-policy noeviction
"""
SENTINEL = f"""\
sentinel down-after-milliseconds {MASTER_NAME} {DOWN_AFTER_MS}
sentinel failover-timeout {MASTER_NAME} 10000
sentinel parallel-syncs {MASTER_NAME} 1
"""


class _Server:
    """One process of redis-server, with a data folder and a free port of its own, on loopback only."""

    def __init__(self, program: str, folder: Path, *arguments: str) -> None:
        self._program = program
        self._arguments = arguments
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._folder = folder / str(self.port)
        self._folder.mkdir()
        self._file = self._folder / "redis.conf"  # Sentinel writes what it learns into it
        self._process: subprocess.Popen[bytes] | None = None
        self.configure("")

    def configure(self, text: str) -> None:
        """Write the configuration; call this before the server is started."""
        self._file.write_text(f"bind 127.0.0.1\nport {self.port}\ndir {self._folder}\n{text}")

    def start(self) -> None:
        with (self._folder / "output").open("ab") as output:
            self._process = subprocess.Popen(
                [self._program, str(self._file), *self._arguments],
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        wait_until(lambda: answers(self.url), PATIENCE_S, f"Redis on port {self.port}")

    def signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


class RedisWithSentinels:
    """A primary, its replicas and three Sentinels.

    Args:
        replicas: number of replicas.
        is_sure: whether the servers write each command to disk before they answer it; without it they persist nothing.
    """

    def __init__(self, replicas: int = 1, *, is_sure: bool = True) -> None:
        program = shutil.which("redis-server")
        if program is None:
            raise LocalServiceError(UNAVAILABLE)
        self._folder = Path(tempfile.mkdtemp(prefix="onenet-sentinel-"))
        settings = SERVER if is_sure else 'save ""\nappendonly no\n'
        self.servers = [_Server(program, self._folder) for _ in range(1 + replicas)]
        first, *others = self.servers
        first.configure(settings)
        for other in others:
            other.configure(f"{settings}replicaof 127.0.0.1 {first.port}\n")
        self.sentinels = [_Server(program, self._folder, "--sentinel") for _ in range(_SENTINELS)]
        for sentinel in self.sentinels:
            sentinel.configure(f"sentinel monitor {MASTER_NAME} 127.0.0.1 {first.port} {_QUORUM}\n{SENTINEL}")

    @property
    def url(self) -> str:
        """The value of IDEMPOTENCY_URL."""
        addresses = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in self.sentinels)
        return f"redis+sentinel://{addresses}/{MASTER_NAME}/0"

    def __enter__(self) -> Self:
        try:
            for server in (*self.servers, *self.sentinels):
                server.start()
            wait_until(self.is_whole, PATIENCE_S, "the Sentinels", every_s=0.2)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        for server in (*self.sentinels, *self.servers):
            server.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def primary(self) -> _Server:
        """Return the server that the Sentinels name as the primary."""
        with redis.Redis(port=self.sentinels[0].port, decode_responses=True) as sentinel:
            _, port = sentinel.sentinel_get_master_addr_by_name(MASTER_NAME)
        return next(server for server in self.servers if server.port == int(port))

    def is_whole(self) -> bool:
        """Tell whether all Sentinels know each other and the replicas, and all replicas follow the primary."""
        try:
            for sentinel in self.sentinels:
                with redis.Redis(port=sentinel.port, decode_responses=True) as connection:
                    state = connection.sentinel_master(MASTER_NAME)
                if state["num-other-sentinels"] != _SENTINELS - 1 or state["num-slaves"] != len(self.servers) - 1:
                    return False
                if state["flags"] != "master":
                    return False
            with redis.Redis(port=self.primary().port, decode_responses=True) as connection:
                links = connection.info("replication")
        except redis.RedisError:
            return False
        return links["role"] == "master" and all(
            links.get(f"slave{number}", {}).get("state") == "online" for number in range(len(self.servers) - 1)
        )

    def wait_for_failover(self, former: _Server) -> None:
        """Wait until another server is the primary and accepts writes."""
        wait_until(lambda: self._is_replaced(former), PATIENCE_S, "the failover", every_s=0.2)

    def fail_over(self) -> None:
        """Have a Sentinel promote a replica while the primary still runs."""
        former = self.primary()

        def is_over() -> bool:
            if self._is_replaced(former):
                return True
            # Again and again: Sentinel gives up a failover that takes longer than its time limit.
            with redis.Redis(port=self.sentinels[0].port) as connection, suppress(redis.ResponseError):
                connection.sentinel_failover(MASTER_NAME)
            return False

        wait_until(is_over, PATIENCE_S, "the failover", every_s=1)

    def _is_replaced(self, former: _Server) -> bool:
        try:
            now = self.primary()
            with redis.Redis(port=now.port, socket_timeout=1) as connection:
                return now is not former and connection.info("replication")["role"] == "master"
        except redis.RedisError:
            return False

    def kill_primary(self) -> None:
        """Kill the primary, wait for its replacement, and start it again: it becomes a replica."""
        former = self.primary()
        former.kill()
        self.wait_for_failover(former)
        former.start()

    def hang_primary(self) -> None:
        """Stop the primary's process until another is promoted; then it still takes itself for the primary."""
        former = self.primary()
        former.signal(signal.SIGSTOP)
        try:
            self.wait_for_failover(former)
        finally:
            former.signal(signal.SIGCONT)
