"""A RabbitMQ for the demo and the tests: in Docker, or a private node of the installed server."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Protocol

import requests

from worker.dev.services import engine
from worker.dev.services.ports import free_port, is_listening, wait_until
from worker.dev.services.signals import signals_held_back
from worker.errors import LocalServiceError

_NAMED_IMAGE = os.environ.get("TEST_RABBITMQ_IMAGE")  # if set, no other broker is started
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
_START_S = 180
_STOP_S = 60

UNAVAILABLE = (
    "no RabbitMQ found: set AMQP_URL to a running one, start a Docker engine "
    f"(image {IMAGE}), or install the package rabbitmq-server (it need not run)"
)


class LocalBroker(Protocol):
    """A broker that was started by this process, so that tests may kill it."""

    url: str
    tls_url: str  # empty without certificates
    origin: str

    def start(self) -> None:
        """Start the broker, or start it again on the same port with the same data; returns when it is ready."""

    def kill(self) -> None:
        """Kill the broker; its data stays."""

    def control(self, *arguments: str) -> None:
        """Run ``rabbitmqctl``."""

    def stop(self) -> None:
        """Stop the broker and delete its data."""


class PrivateNode:
    """A node with free ports and a data folder of its own, on loopback only; independent of the system's broker.

    Source: https://www.rabbitmq.com/docs/configure#supported-environment-variables
    """

    def __init__(self, script: Path, tls: Path | None = None, parent: Path | None = None) -> None:
        self.origin = "a private node of the rabbitmq-server on this machine"
        self._script = script
        self._folder = Path(tempfile.mkdtemp(prefix="onenet-rabbitmq-", dir=parent))
        self._port, self.distribution_port, self._epmd_port = free_port(), free_port(), free_port()
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
        try:
            self._start_epmd()
            with (self._folder / "output").open("ab") as output, signals_held_back():
                self._server = subprocess.Popen(
                    [str(self._script)],
                    env=self._environment(),
                    stdout=output,
                    stderr=output,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                    cwd=self._folder,
                )
            wait_until(self._is_ready, _START_S, "the private RabbitMQ node")
        except TimeoutError as exc:
            output_end = (self._folder / "output").read_text(errors="replace")[-1500:]
            raise LocalServiceError(f"{exc}; the end of its output:", *output_end.splitlines()) from exc

    def kill(self) -> None:
        if self._server is None:
            return
        group = self._server.pid  # a session leader: the Erlang VM may outlive its shell script
        with suppress(ProcessLookupError, TimeoutError):
            os.killpg(group, signal.SIGKILL)
            wait_until(lambda: not _exists(group), _STOP_S, "the end of the Erlang VM")
        self._server.wait()
        self._server = None

    def control(self, *arguments: str) -> None:
        command = [str(self._script.with_name("rabbitmqctl")), *arguments]
        subprocess.run(command, env=self._environment(), cwd=self._folder, check=True, capture_output=True)

    def stop(self) -> None:
        self.kill()  # not stopped: its data is deleted anyway, and the caller may have little time left
        if self._epmd is not None:
            self._epmd.kill()
            self._epmd.wait()
            self._epmd = None
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start_epmd(self) -> None:
        """Start the port mapper in the foreground, so that this process can stop it."""
        epmd = shutil.which("epmd")
        if epmd is not None and self._epmd is None:
            with signals_held_back():
                self._epmd = subprocess.Popen(
                    [epmd, "-address", "127.0.0.1"],
                    env=self._environment(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )

    def _is_ready(self) -> bool:
        assert self._server is not None  # set by start()
        if self._server.poll() is not None:
            raise TimeoutError(f"the private RabbitMQ node ended with exit code {self._server.returncode}")
        return is_listening("127.0.0.1", self._port)

    def _environment(self) -> dict[str, str]:
        folder = str(self._folder)
        loopback = "-kernel inet_dist_use_interface {127,0,0,1}"
        return {
            "PATH": f"{self._script.parent}:{os.environ.get('PATH', os.defpath)}:/usr/sbin",
            "HOME": folder,  # holds the Erlang cookie
            "LANG": "C.UTF-8",
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(self._epmd_port),
            "RABBITMQ_NODENAME": f"onenet{self._port}@localhost",
            "RABBITMQ_DIST_PORT": str(self.distribution_port),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": loopback,
            "RABBITMQ_MNESIA_BASE": f"{folder}/data",
            "RABBITMQ_LOG_BASE": f"{folder}/log",
            "RABBITMQ_PID_FILE": f"{folder}/pid",
            "RABBITMQ_ENABLED_PLUGINS_FILE": f"{folder}/enabled_plugins",
            "RABBITMQ_CONFIG_FILE": f"{folder}/rabbitmq.conf",
            "RABBITMQ_CONF_ENV_FILE": f"{folder}/none",  # not the settings of the system's broker
            "RABBITMQ_ADVANCED_CONFIG_FILE": f"{folder}/none.config",
        }


class DockerBroker:
    """A container, started by testcontainers."""

    def __init__(self, tls: Path | None = None) -> None:
        from testcontainers.community.rabbitmq import RabbitMqContainer

        self.origin = f"Docker ({IMAGE})"
        # Fixed ports: those that Docker assigns change with a restart.
        self._container = RabbitMqContainer(IMAGE).with_bind_ports(5672, free_port())
        self._has_tls = tls is not None
        if tls is not None:
            self._container.with_bind_ports(5671, free_port())
            folder = "/etc/rabbitmq/tls"
            for name in _TLS_FILES:  # copied, because an engine on another host cannot mount local files
                self._container.with_copy_into_container(tls / name, f"{folder}/{name}")
            configuration = _TLS.format(address="5671", folder=folder).encode()
            self._container.with_copy_into_container(configuration, "/etc/rabbitmq/conf.d/90-tls.conf")
        self._stack = ExitStack()
        self.url = self.tls_url = ""

    def start(self) -> None:
        if self.url:
            self._container.get_wrapped_container().start()
        else:
            self._stack.callback(self._container.stop)
            self._container.start()
        # Host and port differ between Docker's host and a container next to this one.
        self._address = self._container.get_container_host_ip(), int(self._container.get_exposed_port(5672))
        self.url = "amqp://guest:guest@{}:{}/".format(*self._address)
        if self._has_tls:
            self.tls_url = f"amqps://guest:guest@{self._address[0]}:{self._container.get_exposed_port(5671)}/"
        wait_until(self._answers, _START_S, "RabbitMQ in Docker")

    def kill(self) -> None:
        self._container.get_wrapped_container().kill()

    def control(self, *arguments: str) -> None:
        code, output = self._container.exec(["rabbitmqctl", *arguments])
        if code != 0:
            raise LocalServiceError(*output.decode(errors="replace").splitlines())

    def stop(self) -> None:
        self._stack.close()

    def _answers(self) -> bool:
        # Docker's proxy accepts connections before the broker does, so ask the broker.
        code, _ = self._container.exec(["rabbitmq-diagnostics", "-q", "check_port_connectivity"])
        return int(code) == 0 and is_listening(*self._address)


def is_installed() -> bool:
    """Tell whether the server is installed, so that private nodes can be started."""
    return _script() is not None


def is_available() -> bool:
    """Tell whether a broker can be started; True where an image is named, since nothing else will do then."""
    return bool(_NAMED_IMAGE) or is_installed() or engine.has_image(IMAGE)


def start_local_broker(stack: ExitStack, tls: Path | None = None, parent: Path | None = None) -> LocalBroker:
    """Start a broker: in Docker, or as a private node of the installed server.

    Args:
        stack: stops the broker when it is closed, also if this is interrupted before the broker is ready.
        tls: a folder with ``ca.pem``, ``cert.pem`` and ``key.pem``. With it the broker also listens with TLS, and
            requires a client certificate of that authority there.
        parent: a folder for the node's own folder; None: that of temporary files.

    Raises:
        LocalServiceError: neither is possible, or the named image is missing; the message lists the alternatives.
    """
    broker = _start_in_docker(stack, tls)
    if broker is not None:
        return broker
    if _NAMED_IMAGE:
        raise LocalServiceError(f"TEST_RABBITMQ_IMAGE names {IMAGE}, but there is no Docker engine that has it")
    with signals_held_back():
        node = PrivateNode(installed_script(), tls, parent)
        stack.callback(node.stop)
    node.start()
    return node


def installed_script() -> Path:
    """Return the script that starts the installed server.

    Raises:
        LocalServiceError: it is not installed.
    """
    script = _script()
    if script is None:
        raise LocalServiceError(UNAVAILABLE)
    return script


def _start_in_docker(stack: ExitStack, tls: Path | None) -> LocalBroker | None:
    if not engine.has_image(IMAGE):
        return None
    from docker.errors import DockerException

    broker = DockerBroker(tls)
    stack.callback(broker.stop)
    try:
        broker.start()
    except (DockerException, RuntimeError, requests.RequestException, OSError) as exc:
        broker.stop()
        print(f"Docker could not start {IMAGE}: {exc}", file=sys.stderr)
        return None
    return broker


def _script() -> Path | None:
    return next((script for script in _SCRIPTS if script.exists()), None)


def _exists(group: int) -> bool:
    """Tell whether a process group has a running process; a zombie does not count.

    A process whose main thread has ended looks like a zombie while other threads still hold its sockets.
    """
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            state, its_group, threads = fields[0], int(fields[2]), int(fields[17])
            if its_group == group and (state != "Z" or threads > 1):
                return True
    return False
