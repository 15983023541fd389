"""A RabbitMQ for the demo and the tests: named, in Docker, or a private node of the system's package."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import requests

from worker.dev.services import packages
from worker.dev.services.ports import free_port, is_listening, wait_until
from worker.errors import LocalServiceError

_NAMED_IMAGE = os.environ.get("TEST_RABBITMQ_IMAGE")  # this one and nothing else
IMAGE = _NAMED_IMAGE or "rabbitmq:4.0-management"
# Debian's wrapper in /usr/sbin insists on root or the user rabbitmq; the script that it calls does not.
_SCRIPTS = (Path("/usr/lib/rabbitmq/bin/rabbitmq-server"), Path("/opt/rabbitmq/sbin/rabbitmq-server"))
_TLS_FILES = ("ca.pem", "cert.pem", "key.pem")
_TLS = """listeners.ssl.own = {address}
ssl_options.cacertfile = {folder}/ca.pem
ssl_options.certfile = {folder}/cert.pem
ssl_options.keyfile = {folder}/key.pem
ssl_options.verify = verify_peer
ssl_options.fail_if_no_peer_cert = true
"""
_START_S = 90
_STOP_S = 20

CHOICES = """no RabbitMQ to be had. Any one of these will do:
  - name a running one:     AMQP_URL=amqp://user:password@host:5672/
  - let Docker bring one:   start the Docker engine (image {image})
  - install the server:     sudo apt-get install rabbitmq-server   (it need not run)"""


class LocalBroker(Protocol):
    """A broker that was started here, so that it may also fail here."""

    url: str
    tls_url: str  # empty unless it was started with the files for TLS
    origin: str

    def start(self) -> None:
        """Start it, again on the same port and with the same data; returns when it takes connections."""

    def kill(self) -> None:
        """End it at once; what it stored stays."""

    def control(self, *arguments: str) -> None:
        """Call ``rabbitmqctl``."""

    def stop(self) -> None:
        """Stop it, and remove what it stored."""


class PrivateNode:
    """A node of its own: free ports, its own data folder, loopback only, beside any broker of the system.

    Source: https://www.rabbitmq.com/docs/configure#supported-environment-variables
    """

    def __init__(self, script: Path, tls: Path | None = None) -> None:
        self.origin = "a private node of the rabbitmq-server on this machine"
        self._script = script
        self._folder = Path(tempfile.mkdtemp(prefix="onenet-rabbitmq-"))
        self._port, self._distribution_port, self._epmd_port = free_port(), free_port(), free_port()
        self.url = f"amqp://guest:guest@127.0.0.1:{self._port}/"
        self.tls_url = ""
        configuration = f"listeners.tcp.local = 127.0.0.1:{self._port}\nlog.file.level = warning\n"
        if tls is not None:
            tls_port = free_port()
            self.tls_url = f"amqps://guest:guest@127.0.0.1:{tls_port}/"
            configuration += _TLS.format(address=f"127.0.0.1:{tls_port}", folder=tls)
        (self._folder / "rabbitmq.conf").write_text(configuration)
        (self._folder / "enabled_plugins").write_text("[].\n")
        self._epmd: subprocess.Popen[bytes] | None = None
        self._server: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        environment = self._environment()
        epmd = shutil.which("epmd")
        if epmd is not None and self._epmd is None:  # in the foreground, so that it ends with us
            self._epmd = subprocess.Popen(
                [epmd, "-address", "127.0.0.1"], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
        with (self._folder / "output").open("ab") as output:
            self._server = subprocess.Popen(
                [str(self._script)],
                env=environment,
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                cwd=self._folder,
            )
        try:
            wait_until(self._is_ready, _START_S, "the private RabbitMQ node")
        except TimeoutError as exc:
            said = (self._folder / "output").read_text(errors="replace")[-1500:]
            self.stop()
            raise LocalServiceError(f"{exc}; it said:\n{said}") from exc
        except BaseException:  # a ctrl-C, most of all: nobody else knows yet that there is something to stop
            self.stop()
            raise

    def kill(self) -> None:
        if self._server is None:
            return
        group = self._server.pid  # it leads a session of its own: the Erlang machine may outlive its shell script
        with suppress(ProcessLookupError, TimeoutError):
            os.killpg(group, signal.SIGKILL)
            wait_until(lambda: not _exists(group), _STOP_S, "the Erlang machine's end")
        self._server.wait()
        self._server = None

    def control(self, *arguments: str) -> None:
        command = [str(self._script.with_name("rabbitmqctl")), *arguments]
        subprocess.run(command, env=self._environment(), cwd=self._folder, check=True, capture_output=True)

    def stop(self) -> None:
        self.kill()  # what it stored goes too, and whoever stops us may not wait for long
        if self._epmd is not None:
            self._epmd.kill()
            self._epmd.wait()
            self._epmd = None
        shutil.rmtree(self._folder, ignore_errors=True)

    def _is_ready(self) -> bool:
        assert self._server is not None  # started right before
        if self._server.poll() is not None:
            raise TimeoutError(f"the private RabbitMQ node ended with exit code {self._server.returncode}")
        return is_listening("127.0.0.1", self._port)

    def _environment(self) -> dict[str, str]:
        folder = str(self._folder)
        loopback = "-kernel inet_dist_use_interface {127,0,0,1}"
        return {
            "PATH": f"{self._script.parent}:{os.environ.get('PATH', os.defpath)}:/usr/sbin",
            "HOME": folder,  # where the Erlang cookie lies
            "LANG": "C.UTF-8",
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(self._epmd_port),
            "RABBITMQ_NODENAME": f"onenet{self._port}@localhost",
            "RABBITMQ_DIST_PORT": str(self._distribution_port),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": loopback,
            "RABBITMQ_MNESIA_BASE": f"{folder}/data",
            "RABBITMQ_LOG_BASE": f"{folder}/log",
            "RABBITMQ_PID_FILE": f"{folder}/pid",
            "RABBITMQ_ENABLED_PLUGINS_FILE": f"{folder}/enabled_plugins",
            "RABBITMQ_CONFIG_FILE": f"{folder}/rabbitmq.conf",
            "RABBITMQ_CONF_ENV_FILE": f"{folder}/none",  # the system broker's settings are not ours
            "RABBITMQ_ADVANCED_CONFIG_FILE": f"{folder}/none.config",
        }


class DockerBroker:
    """A container, through testcontainers."""

    def __init__(self, tls: Path | None = None) -> None:
        from testcontainers.community.rabbitmq import RabbitMqContainer

        self.origin = f"Docker ({IMAGE})"
        # The ports are chosen here, since those that Docker chooses change with a restart.
        self._container = RabbitMqContainer(IMAGE).with_bind_ports(5672, free_port())
        self._has_tls = tls is not None
        if tls is not None:
            self._container.with_bind_ports(5671, free_port())
            folder = "/etc/rabbitmq/tls"
            for name in _TLS_FILES:  # copied, since an engine elsewhere cannot mount what is here
                self._container.with_copy_into_container(tls / name, f"{folder}/{name}")
            configuration = _TLS.format(address="5671", folder=folder).encode()
            self._container.with_copy_into_container(configuration, "/etc/rabbitmq/conf.d/90-tls.conf")
        self._is_created = False
        self.url = self.tls_url = ""

    def start(self) -> None:
        try:
            if self._is_created:
                self._container.get_wrapped_container().start()
            else:
                self._is_created = True
                self._container.start()
            # Both depend on where we are: on Docker's host, or ourselves in a container beside it.
            self._address = self._container.get_container_host_ip(), int(self._container.get_exposed_port(5672))
            self.url = "amqp://guest:guest@{}:{}/".format(*self._address)
            if self._has_tls:
                self.tls_url = f"amqps://guest:guest@{self._address[0]}:{self._container.get_exposed_port(5671)}/"
            wait_until(self._answers, _START_S, "RabbitMQ in Docker")
        except BaseException:  # a ctrl-C, most of all: nobody else knows yet that there is something to stop
            self.stop()
            raise

    def kill(self) -> None:
        self._container.get_wrapped_container().kill()

    def control(self, *arguments: str) -> None:
        code, output = self._container.exec(["rabbitmqctl", *arguments])
        if code != 0:
            raise LocalServiceError(output.decode(errors="replace"))

    def stop(self) -> None:
        if self._is_created:
            self._container.stop()

    def _answers(self) -> bool:
        # Docker's proxy takes connections before the broker does, so ask the broker itself.
        code, _ = self._container.exec(["rabbitmq-diagnostics", "-q", "check_port_connectivity"])
        return int(code) == 0 and is_listening(*self._address)


def start_own_broker(tls: Path | None = None) -> LocalBroker:
    """Start a broker: in Docker, or a private node, of a package that is installed for it if need be.

    Args:
        tls: a folder with ``ca.pem``, ``cert.pem`` and ``key.pem``: the broker listens with TLS as well then, and lets
            in nobody there without a certificate of that authority.

    Raises:
        LocalServiceError: neither can be had, or not the image that is named; says what the choices are.
    """
    broker = _start_in_docker(tls)
    if broker is not None:
        return broker
    if _NAMED_IMAGE:
        raise LocalServiceError(f"TEST_RABBITMQ_IMAGE names {IMAGE}, but there is no Docker engine that has it")
    script = _script()
    if script is None and packages.may_install() and packages.install("rabbitmq-server"):
        script = _script()
    if script is None:
        raise LocalServiceError(CHOICES.format(image=IMAGE))
    node = PrivateNode(script, tls)
    node.start()
    return node


def _start_in_docker(tls: Path | None) -> LocalBroker | None:
    try:
        from docker.errors import DockerException
        from testcontainers.core.docker_client import DockerClient
    except ImportError:
        return None
    try:
        DockerClient().client.ping()
    except DockerException:
        return None  # no engine: the usual case, nothing to say about
    try:
        broker = DockerBroker(tls)
        broker.start()
    except (DockerException, RuntimeError, requests.RequestException, OSError) as exc:
        print(f"Docker is here, but {IMAGE} is not to be had: {exc}", file=sys.stderr)
        return None
    return broker


def _script() -> Path | None:
    return next((script for script in _SCRIPTS if script.exists()), None)


def _exists(group: int) -> bool:
    """Tell whether a process of a group runs; one that has ended and only waits for its parent does not.

    A process whose first thread has ended looks like that too while its other threads still hold its sockets.
    """
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            state, its_group, threads = fields[0], int(fields[2]), int(fields[17])
            if its_group == group and (state != "Z" or threads > 1):
                return True
    return False
