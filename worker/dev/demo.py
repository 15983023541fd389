"""The demo: the real worker processes commands of all kinds, with a real broker and the simulator."""

import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit
from uuid import uuid4

import requests
from pydantic import SecretStr
from rich.console import Console

from worker.amqp.blocking import CommandClient, connect_blocking, declare, delete
from worker.amqp.connection import printable_address
from worker.amqp.topology import Topology
from worker.dead_letters.reader import DeadLetterReader
from worker.dev.demo_messages import FAULTS, GOOD, REFUSING, UNKNOWN, Message, demo_messages
from worker.dev.demo_screen import Findings, counting, print_examples, print_outcomes, show, step
from worker.dev.services.broker import LocalBroker, start_local_broker
from worker.dev.services.ports import free_port, is_listening
from worker.dev.services.processes import LocalProcess
from worker.dev.services.signals import ended_by_signals, ignore_signals, signals_held_back
from worker.errors import WorkerError
from worker.settings import load_settings

_API_KEY = "demo-key"
_RETRY_DELAYS_S = (1, 2)
_RESULT_DELAYS_S = (2, 5)
_MAX_ATTEMPTS = 3
_CONNECT_TIMEOUT_S, _READ_TIMEOUT_S, _SETTLE_S = 1, 2, 3
_TIMEOUT_S = 120
_LOOK_EVERY_S = 0.5
_PROGRAM = "onenet-worker"
# What another terminal needs of the worker's settings.
_SHARED = (
    "AMQP_URL",
    "AMQP_CA_FILE",
    "AMQP_CERT_FILE",
    "AMQP_KEY_FILE",
    "ONENET_URL",
    "ONENET_API_KEY",
    "WORKER_NAMESPACE",
    "WORKER_RECONCILE_DELAY",
    "WORKER_RETRY_DELAYS",
    "WORKER_RESULTS",
    "WORKER_RESULT_DELAYS",
    "ONENET_CONNECT_TIMEOUT",
    "ONENET_READ_TIMEOUT",
)
_WHY_REPLIES = f"""10 to 20 s, because some commands have to wait:
- an answer was lost: the command rests for {_SETTLE_S} s (WORKER_RECONCILE_DELAY),
  then the device's history shows whether OneNET has it
- OneNET is busy: it is asked again after {_RETRY_DELAYS_S[0]} s, then after {_RETRY_DELAYS_S[1]} s
  (WORKER_RETRY_DELAYS)"""
_WHY_RESULTS = f"""2 to 10 s: OneNET is asked what the devices did, first {_RESULT_DELAYS_S[0]} s after
a reply, then every {_RESULT_DELAYS_S[1]} s (WORKER_RESULT_DELAYS)"""


def run_demo(console: Console, count: int, *, keep: bool) -> bool:
    """Run the demo; returns whether every command had its expected outcome.

    Args:
        console: to print on.
        count: number of commands to send.
        keep: whether everything keeps running at the end until ctrl-C.

    Raises:
        WorkerError: the broker, the simulator or the worker could not be started.
    """
    with ended_by_signals(), ExitStack() as stack, _Stage(console, stack) as stage:
        findings = stage.try_all(list(demo_messages(count)))
        if keep:
            _report(console, findings, stage.topology)
            stage.keep()
    if not keep:
        _report(console, findings, stage.topology)
        program = _program()
        console.print(f"To look around yourself: [bold]{program} demo --keep[/bold]", soft_wrap=True, highlight=False)
    return not findings.faults


def _report(console: Console, findings: Findings, topology: Topology) -> None:
    print_examples(console, findings, topology)
    print_outcomes(console, findings)


class _Stage:
    """Broker, simulator and worker, in a namespace of their own; all of it is removed at the end, whatever happens.

    Args:
        console: to print on.
        stack: gets all that must be removed; its owner closes it, also if a signal comes while this ends.
    """

    def __init__(self, console: Console, stack: ExitStack) -> None:
        self._console = console
        self._stack = stack
        self._owned: list[str] = []
        self._folder = Path()
        self._broker_port: int | None = None  # of the one that the demo has started
        namespace = f"onenet-demo-{uuid4().hex[:6]}"
        self.topology = Topology(namespace, (*_RETRY_DELAYS_S, _SETTLE_S), _RESULT_DELAYS_S)
        self._settings = load_settings().model_copy(update={"worker_namespace": namespace})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        ignore_signals()
        with suppress(OSError):  # the terminal may have gone
            if kind in (KeyboardInterrupt, SystemExit):
                self._console.print("\ninterrupted")
            show(self._console, "stopping", "this takes some seconds")
        self._stack.close()
        removed = ", ".join(reversed(self._owned)) or "nothing: nothing had been started"
        with suppress(OSError):
            show(self._console, "stopped", f"and removed: {removed}")

    def try_all(self, messages: list[Message]) -> Findings:
        """Start everything, send the messages, and wait for all that comes of them.

        Raises:
            WorkerError: something could not be started, or replies are missing.
        """
        with signals_held_back():
            self._folder = Path(tempfile.mkdtemp(prefix="onenet-demo-"))
            self._own("a temporary folder", lambda: shutil.rmtree(self._folder, ignore_errors=True))
        self._start_broker()
        self._start_simulator()
        self._start_worker()
        replies, results = self._exchange(messages)
        cached = self._control.get(f"{self._simulator_url}/control/commands", timeout=60).json()
        return Findings(messages, replies, results, cached, self._dead_letters())

    def keep(self) -> None:
        """Say what can be tried in another terminal, and keep everything running until ctrl-C.

        Raises:
            WorkerError: the broker, the worker or the simulator has ended by itself.
        """
        settings = self._folder / "settings"
        settings.write_text("".join(f"{line}\n" for line in self._settings_lines()))
        self._console.print("\n[bold]Everything keeps running until ctrl-C[/bold]; in another terminal:")
        for line in (
            f". {settings}",
            f"{_PROGRAM} send --imei {GOOD} --obj-id 3311 --obj-inst-id 0 \\",
            "    --res-id 5850 --args on --wait",
            f"{_PROGRAM} device {GOOD}",
            f"{_PROGRAM} dead-letters list",
            f"{_PROGRAM} check",
        ):
            self._console.print(f"  {line}", soft_wrap=True, highlight=False, markup=False)
        self._console.print(f"The worker's log: {self._worker.output}", soft_wrap=True, highlight=False)
        try:
            while self._worker.is_running and self._simulator.is_running and self._has_broker():
                time.sleep(_LOOK_EVERY_S)
        except KeyboardInterrupt:
            self._console.print()  # the terminal has echoed ^C
            return
        if not self._has_broker():
            raise WorkerError("the demo cannot go on: its broker has ended")
        ended = self._simulator if self._worker.is_running else self._worker
        raise WorkerError("the demo cannot go on: a process ended; the end of its log:", *_last_lines(ended))

    def _has_broker(self) -> bool:
        """Tell whether the broker still listens; one that was there before the demo may come back by itself."""
        return self._broker_port is None or is_listening("127.0.0.1", self._broker_port)

    def _own(self, what: str, remove: Callable[[], object]) -> None:
        self._owned.append(what)
        self._stack.callback(remove)

    def _start_broker(self) -> None:
        if "amqp_url" in self._settings.model_fields_set:
            namespace = self.topology.namespace
            connection, parameters = connect_blocking(self._settings.broker_address)
            connection.close()  # it can be reached: from here on there may be something to remove
            self._own(f"the queues and exchanges {namespace}.*", self._remove_namespace)
            declare(self._settings.broker_address, self.topology)
            where = f"the one in AMQP_URL, {printable_address(parameters)}, with queues named {namespace}.*"
            show(self._console, "broker", where)
            return

        def start() -> LocalBroker:
            broker = start_local_broker(self._stack, parent=self._folder)
            self._owned.append("the broker")
            return broker

        broker = step(self._console, "broker", "starting a RabbitMQ: 5 to 30 s", start, lambda made: made.origin)
        self._settings = self._settings.model_copy(update={"amqp_url": (SecretStr(broker.url),)})
        self._broker_port = urlsplit(broker.url).port
        declare(self._settings.broker_address, self.topology)

    def _start_simulator(self) -> None:
        port = free_port()
        self._simulator_url = f"http://127.0.0.1:{port}"
        arguments = ["simulator", "--port", str(port), "--api-key", _API_KEY, "--offline", UNKNOWN]
        arguments += ["--latency", "0.03", "--devices", "up", "--device", f"{REFUSING}=up:METHOD_NOT_ALLOWED"]
        arguments += ["--queue", "0", "--rate", "0"]  # most devices of the demo get more than ten commands

        def start() -> None:
            with signals_held_back():
                self._simulator = LocalProcess(arguments, {}, self._folder / "simulator")
                self._own("the simulator", self._simulator.stop)
            self._simulator.wait_for_port(port)

        step(self._console, "OneNET", "starting the simulator: 1 to 5 s", start, lambda _: self._simulator_url)
        self._control = self._stack.enter_context(requests.Session())
        self._control.trust_env = False  # a proxy of the environment cannot reach this machine
        self._control.put(f"{self._simulator_url}/control/faults", json=FAULTS, timeout=10).raise_for_status()

    def _start_worker(self) -> None:
        def start() -> None:
            with signals_held_back():
                self._worker = LocalProcess(["run"], self._environment(), self._folder / "worker")
                self._own("the worker", self._worker.stop)
            self._worker.wait_for_output("consumer_started")

        done = "onenet-worker run, process {}"
        step(self._console, "worker", "starting: 1 to 10 s", start, lambda _: done.format(self._worker.pid))

    def _environment(self) -> dict[str, str]:
        tls = {
            name.upper(): str(path.absolute())
            for name in ("amqp_ca_file", "amqp_cert_file", "amqp_key_file")
            if (path := getattr(self._settings, name)) is not None
        }
        return tls | {
            "AMQP_URL": ",".join(url.get_secret_value() for url in self._settings.amqp_url),
            "ONENET_URL": self._simulator_url,
            "ONENET_API_KEY": _API_KEY,
            "WORKER_NAMESPACE": self._settings.worker_namespace,
            "ONENET_CONNECT_TIMEOUT": str(_CONNECT_TIMEOUT_S),
            "ONENET_READ_TIMEOUT": str(_READ_TIMEOUT_S),
            "WORKER_RECONCILE_DELAY": str(_SETTLE_S),
            "WORKER_RETRY_DELAYS": ",".join(map(str, _RETRY_DELAYS_S)),
            "WORKER_RESULTS": "on",
            "WORKER_RESULT_DELAYS": ",".join(map(str, _RESULT_DELAYS_S)),
            "WORKER_MAX_ATTEMPTS": str(_MAX_ATTEMPTS),
            "WORKER_PAUSE_AFTER_FAILURES": "1000",  # many faults in a row, but each of a single device
            "ONENET_DEVICE_INTERVAL": "0",  # dozens of commands go to a few devices that misbehave
            "HTTP_PORT": "0",  # the default port may be in use
            "LOG_FORMAT": "json",
        }

    def _settings_lines(self) -> Iterator[str]:
        """Yield the shell commands that make another terminal use this broker and this simulator."""
        folder = Path(sys.executable).parent
        if (folder / _PROGRAM).exists():
            yield f"export PATH={shlex.quote(str(folder))}:$PATH"
        environment = self._environment()
        yield f"unset {' '.join(f'{name}_FILE' for name in _SHARED if not name.endswith('_FILE'))}"
        yield from (f"export {name}={shlex.quote(environment[name])}" for name in _SHARED if name in environment)

    def _exchange(self, messages: list[Message]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Send all messages and collect their replies and results."""
        console, total = self._console, len(messages)
        replies: list[dict[str, Any]] = []
        results: list[dict[str, Any]] = []
        deadline = time.monotonic() + _TIMEOUT_S
        with CommandClient(self._settings.broker_address, self.topology, app_id="demo", wants_replies=True) as client:
            kinds = len({message.kind for message in messages})
            show(console, "commands", f"{total}, of {kinds} kinds, good and bad")
            with counting(console, "sent   ", total) as update:
                for number, message in enumerate(messages, start=1):
                    client.send(None, message.body)
                    update(number)
                    replies += client.some_replies(wait_s=0)
            show(console, "replies", _WHY_REPLIES)
            with counting(console, "replies", total) as update:
                while len(replies) < total:
                    replies += client.some_replies()
                    update(len(replies))
                    if not self._worker.is_running or time.monotonic() > deadline:
                        lines = _last_lines(self._worker)
                        raise WorkerError(f"{len(replies)} of {total} replies arrived; the end of the log:", *lines)
            show(console, "results", _WHY_RESULTS)
            accepted = {reply["command_id"] for reply in replies if reply["status"] == "accepted"}
            with counting(console, "results", len(accepted)) as update:
                for result in client.results([*accepted], deadline - time.monotonic()):
                    results.append(result)
                    update(len(results))
        return replies, results

    def _dead_letters(self) -> list[tuple[dict[str, Any], bytes]]:
        """Return headers and body of all dead letters, which stay where they are, in their order."""
        found: list[tuple[dict[str, Any], bytes]] = []
        settings = self._settings
        with DeadLetterReader(settings.broker_address, self.topology, settings.platform_zone) as reader:
            reader.read(lambda letter: found.append((dict(letter.headers), letter.body)))
        return found

    def _remove_namespace(self) -> None:
        try:
            delete(self._settings.broker_address, self.topology)
        except WorkerError as exc:
            what = self._owned.pop(1)  # the first after the folder
            show(self._console, "", f"could not remove {what}: {exc}")


def _last_lines(process: LocalProcess) -> list[str]:
    return process.output.read_text(errors="replace").splitlines()[-5:]


def _program() -> str:
    """Return how this program was called: its name alone if it is on the PATH."""
    called = Path(sys.argv[0])
    return shlex.quote(os.path.relpath(called)) if called.name == _PROGRAM else _PROGRAM
