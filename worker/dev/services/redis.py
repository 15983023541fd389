"""A Redis for the tests: named, in Docker, or a private server of the system's package."""

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
from docker.errors import DockerException
from testcontainers.core.container import DockerContainer
from testcontainers.core.docker_client import DockerClient

from worker.dev.services import packages
from worker.dev.services.ports import free_port, wait_until
from worker.errors import LocalServiceError

IMAGE = os.environ.get("TEST_REDIS_IMAGE", "redis:7")
START_S = 60
CHOICES = f"""no Redis to be had. Any one of these will do:
  - name a running one:     REDIS_URL=redis://host:6379/0
  - let Docker bring one:   start the Docker engine (image {IMAGE})
  - install the server:     sudo apt-get install redis-server   (it need not run)"""


class LocalRedis(Protocol):
    """A Redis that was started here, so that it may also fail here."""

    url: str

    def start(self) -> None:
        """Start it, again on the same port; returns when it answers."""

    def kill(self) -> None:
        """End it at once, with all that it held."""

    def stop(self) -> None:
        """Stop it, and remove what it stored."""


class PrivateServer:
    """A server of its own: a free port, its own data folder, loopback only, nothing kept on disk."""

    def __init__(self, program: str) -> None:
        self._program = program
        self._folder = Path(tempfile.mkdtemp(prefix="onenet-redis-"))
        self._port = free_port()
        self.url = f"redis://127.0.0.1:{self._port}/0"
        self._server: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        arguments = ["--port", str(self._port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        with (self._folder / "output").open("ab") as output:
            self._server = subprocess.Popen(
                [self._program, *arguments], cwd=self._folder, stdout=output, stderr=output, start_new_session=True
            )
        wait_until(lambda: answers(self.url), START_S, "the private Redis")

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
    """A container, through testcontainers."""

    def __init__(self) -> None:
        # The port is chosen here, since one that Docker chooses changes with a restart.
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
        wait_until(lambda: answers(self.url), START_S, "Redis in Docker")

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


def start_own_redis() -> LocalRedis:
    """Start a Redis: in Docker, or a private server, of a package that is installed for it if need be.

    Raises:
        LocalServiceError: neither can be had; says what the choices are.
    """
    in_docker = _start_in_docker()
    if in_docker is not None:
        return in_docker
    program = shutil.which("redis-server")
    if program is None and packages.may_install() and packages.install("redis-server"):
        program = shutil.which("redis-server")
    if program is None:
        raise LocalServiceError(CHOICES)
    server = PrivateServer(program)
    server.start()
    return server


def _start_in_docker() -> LocalRedis | None:
    try:
        DockerClient().client.ping()
    except DockerException:
        return None  # no engine: the usual case, nothing to say about
    own = DockerRedis()
    try:
        own.start()
    except (DockerException, RuntimeError, requests.RequestException, OSError) as exc:
        own.stop()
        print(f"Docker is here, but {IMAGE} is not to be had: {exc}", file=sys.stderr)
        return None
    return own
