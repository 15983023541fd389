"""A Redis for tests and benchmark: in Docker, or a private process of the installed server."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import redis
import requests

from worker.dev.services import engine
from worker.dev.services.ports import free_port, wait_until
from worker.dev.services.signals import signals_held_back
from worker.errors import LocalServiceError

IMAGE = os.environ.get("TEST_REDIS_IMAGE", "redis:7")
_START_S = 180
UNAVAILABLE = (
    "no Redis found: set REDIS_URL to a running one, start a Docker engine "
    f"(image {IMAGE}), or install the package redis-server (it need not run)"
)


class LocalRedis(Protocol):
    """A Redis that was started by this process, so that tests may kill it."""

    url: str

    def start(self) -> None:
        """Start the server, or start it again on the same port; returns when it answers."""

    def kill(self) -> None:
        """Kill the server; its data is lost."""

    def stop(self) -> None:
        """Stop the server and delete its data."""


class PrivateServer:
    """A server with a free port and a data folder of its own, on loopback only, without persistence."""

    def __init__(self, program: str) -> None:
        self._program = program
        self._folder = Path(tempfile.mkdtemp(prefix="onenet-redis-"))
        self._port = free_port()
        self.url = f"redis://127.0.0.1:{self._port}/0"
        self._server: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        arguments = ["--port", str(self._port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        with (self._folder / "output").open("ab") as output, signals_held_back():
            self._server = subprocess.Popen(
                [self._program, *arguments], cwd=self._folder, stdout=output, stderr=output, start_new_session=True
            )
        wait_until(lambda: answers(self.url), _START_S, "the private Redis")

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        self._end(signal.SIGTERM)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _end(self, number: signal.Signals) -> None:
        if self._server is not None:
            self._server.send_signal(number)
            self._server.wait()
            self._server = None


class DockerRedis:
    """A container, started by testcontainers."""

    def __init__(self) -> None:
        from testcontainers.core.container import DockerContainer

        # A fixed port: one that Docker assigns changes with a restart.
        self._container = DockerContainer(IMAGE).with_bind_ports(6379, free_port())
        self._stack = ExitStack()
        self.url = ""

    def start(self) -> None:
        if self.url:
            self._container.get_wrapped_container().start()
        else:
            self._stack.callback(self._container.stop)
            self._container.start()
            host, port = self._container.get_container_host_ip(), self._container.get_exposed_port(6379)
            self.url = f"redis://{host}:{port}/0"
        wait_until(lambda: answers(self.url), _START_S, "Redis in Docker")

    def kill(self) -> None:
        self._container.get_wrapped_container().kill()

    def stop(self) -> None:
        self._stack.close()


def answers(url: str) -> bool:
    """Tell whether a Redis answers at a URL."""
    try:
        with redis.Redis.from_url(url, socket_timeout=1, socket_connect_timeout=1) as client:
            return bool(client.ping())
    except redis.RedisError:
        return False


def is_installed() -> bool:
    """Tell whether the server is installed, so that private processes can be started."""
    return shutil.which("redis-server") is not None


def is_available() -> bool:
    """Tell whether a Redis can be started."""
    return is_installed() or engine.has_image(IMAGE)


def start_local_redis(stack: ExitStack) -> LocalRedis:
    """Start a Redis: in Docker, or a private process of the installed server.

    Args:
        stack: stops the server when it is closed, also if this is interrupted before the server answers.

    Raises:
        LocalServiceError: neither is possible; the message lists the alternatives.
    """
    in_docker = _start_in_docker(stack)
    if in_docker is not None:
        return in_docker
    program = shutil.which("redis-server")
    if program is None:
        raise LocalServiceError(UNAVAILABLE)
    with signals_held_back():
        server = PrivateServer(program)
        stack.callback(server.stop)
    server.start()
    return server


def _start_in_docker(stack: ExitStack) -> LocalRedis | None:
    if not engine.has_image(IMAGE):
        return None
    from docker.errors import DockerException

    container = DockerRedis()
    stack.callback(container.stop)
    try:
        container.start()
    except (DockerException, RuntimeError, requests.RequestException, OSError) as exc:
        container.stop()
        print(f"Docker could not start {IMAGE}: {exc}", file=sys.stderr)
        return None
    return container
