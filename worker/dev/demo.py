"""The demo: the real worker processes commands of all kinds, with a real broker and the simulator."""

import json
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import requests
from pydantic import SecretStr
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from worker.amqp.blocking import CommandClient, connect_blocking, declare_on, delete_on
from worker.amqp.topology import Topology
from worker.dev.services.broker import start_local_broker
from worker.dev.services.ports import free_port
from worker.dev.services.processes import LocalProcess
from worker.errors import WorkerError
from worker.settings import Settings, load_settings

_API_KEY = "demo-key"
_RETRY_DELAYS_S = (1, 2)
_RESULT_DELAYS_S = (2, 5)
_MAX_ATTEMPTS = 3
_CONNECT_TIMEOUT_S, _READ_TIMEOUT_S, _SETTLE_S = 1, 2, 3
_TIMEOUT_S = 120
_FIRST_DEVICE = 865820030000000
_REFUSING = str(_FIRST_DEVICE + 7)  # gets good commands, and answers that it cannot do them
_UNKNOWN, _NOT_FOUND, _BUSY_ONCE, _BUSY, _SILENT, _DEAF, _DARK = (str(_FIRST_DEVICE + 900 + n) for n in range(7))


@dataclass(frozen=True, slots=True)
class _Message:
    """One message to send, and its expected outcome: a status and an error code."""

    kind: str
    body: bytes
    outcome: str


def run_demo(console: Console, count: int) -> bool:
    """Run the demo; returns whether every command had its expected outcome.

    Raises:
        WorkerError: the broker, the simulator or the worker could not be started.
    """
    namespace = f"onenet-demo-{uuid4().hex[:6]}"
    topology = Topology(namespace, (*_RETRY_DELAYS_S, _SETTLE_S), _RESULT_DELAYS_S)
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="onenet-demo-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        settings = load_settings().model_copy(update={"worker_namespace": namespace})
        if "amqp_url" in settings.model_fields_set:
            console.print("broker     the one in AMQP_URL")
        else:
            with console.status("starting a private broker, which takes some seconds"):
                broker = start_local_broker()
            stack.callback(broker.stop)
            console.print(f"broker     {broker.origin}")
            settings = settings.model_copy(update={"amqp_url": (SecretStr(broker.url),)})
        connection, _ = connect_blocking(settings.broker_address)
        stack.enter_context(connection)
        stack.callback(lambda: delete_on(connection.channel(), topology))
        channel = connection.channel()
        declare_on(channel, topology)
        port = free_port()
        control = stack.enter_context(requests.Session())
        control.trust_env = False  # a proxy of the environment cannot reach this machine
        _start_simulator(port, folder, stack, control)
        console.print(f"OneNET     the simulator, at http://127.0.0.1:{port}")
        worker = _start_worker(settings, port, folder)
        stack.callback(worker.stop)
        console.print(f"worker     onenet-worker run, process {worker.pid}\n")
        messages = list(_messages(count))
        replies, results = _exchange(console, settings, topology, messages, worker)
        cached = control.get(f"http://127.0.0.1:{port}/control/commands", timeout=60).json()
        dead_letters = _dead_letters(channel, topology)
    return _report(console, messages, replies, results, cached, dead_letters)


def _messages(count: int) -> Iterator[_Message]:
    """Yield messages of every kind, frequent kinds more often."""
    kinds = ["good"] * (count - 145) + [
        *["valid_time has passed"] * 15,
        *["platform too busy, once"] * 15,
        *["sent twice by upstream"] * 15,
        *["device unknown"] * 15,
        *["page not found"] * 5,
        *["no JSON"] * 10,
        *["field breaks its rule"] * 20,
        *["product unknown"] * 5,
        *["expired"] * 10,
        *["platform too busy, always"] * 5,
        *["answer lost, but cached"] * 10,
        *["answer lost, not cached"] * 10,
        *["answer lost, history too"] * 5,
        *["id used twice"] * 5,
    ]
    tomorrow = (datetime.now(UTC) + timedelta(days=1)).strftime("%Y-%m-%dT%H:%M:%SZ")
    yesterday = (datetime.now(UTC) - timedelta(days=1)).strftime("%Y-%m-%dT%H:%M:%SZ")
    for number, kind in enumerate(kinds):
        fields: dict[str, Any] = {
            "command_id": f"demo-{number}",
            "imei": str(_FIRST_DEVICE + number % 100),
            "obj_id": 3311,
            "obj_inst_id": 0,
            "res_id": 5850,
            "expired_time": tomorrow,
            "args": f"demo-{number}",  # identifies the command in the platform's list
        }
        outcome = "accepted"
        match kind:
            case "valid_time has passed":
                fields["valid_time"] = yesterday
            case "platform too busy, once":
                fields["imei"] = _BUSY_ONCE
            case "sent twice by upstream":
                yield _Message(kind, json.dumps(fields).encode(), outcome)
            case "device unknown":
                fields["imei"] = _UNKNOWN
                outcome = "rejected onenet_rejected"
            case "page not found":
                fields["imei"] = _NOT_FOUND
                outcome = "rejected http_rejected"
            case "no JSON":
                yield _Message(kind, b'{"imei": 8658', "failed invalid_message")
                continue
            case "field breaks its rule":
                fields["retry"] = "three"
                outcome = "failed invalid_command"
            case "product unknown":
                fields["product"] = "heating"
                outcome = "failed unknown_product"
            case "expired":
                fields["expired_time"] = yesterday
                outcome = "failed expired"
            case "platform too busy, always":
                fields["imei"] = _BUSY
                outcome = "failed retries_exhausted"
            case "answer lost, but cached":
                fields["imei"] = _SILENT
            case "answer lost, not cached":
                fields["imei"] = _DEAF
            case "answer lost, history too":
                fields["imei"] = _DARK
                outcome = "failed outcome_unknown"
            case "id used twice":
                yield _Message(kind, json.dumps(fields).encode(), outcome)
                fields["args"] = f"demo-{number}, but another"  # the first of the two to be processed is accepted
                outcome = "failed command_id_conflict"
        yield _Message(kind, json.dumps(fields).encode(), outcome)


def _start_simulator(port: int, folder: Path, stack: ExitStack, control: requests.Session) -> None:
    faults = [
        {"kind": "not_found", "imei": _NOT_FOUND},
        {
            "kind": "too_many_requests",
            "imei": _BUSY_ONCE,
            "count": 15,
            "seconds": 0,
        },  # a Retry-After would pause all
        {"kind": "too_many_requests", "imei": _BUSY, "seconds": 0},
        {"kind": "drop_after_caching", "imei": _SILENT},
        {"kind": "error_503", "imei": _DEAF, "count": 10},
        {"kind": "drop_after_caching", "imei": _DARK},
        {"kind": "error_500", "imei": _DARK, "endpoint": "history"},
    ]
    arguments = ["simulator", "--port", str(port), "--api-key", _API_KEY, "--offline", _UNKNOWN, "--latency", "0.03"]
    arguments += ["--devices", "up", "--device", f"{_REFUSING}=up:METHOD_NOT_ALLOWED"]
    arguments += ["--queue", "0", "--rate", "0"]  # most devices of the demo get more than ten commands
    simulator = LocalProcess(arguments, {}, folder / "simulator")
    stack.callback(simulator.stop)
    simulator.wait_for_port(port)
    control.put(f"http://127.0.0.1:{port}/control/faults", json=faults, timeout=10).raise_for_status()


def _start_worker(settings: Settings, port: int, folder: Path) -> LocalProcess:
    tls = {
        name.upper(): str(path.absolute())
        for name in ("amqp_ca_file", "amqp_cert_file", "amqp_key_file")
        if (path := getattr(settings, name)) is not None
    }
    environment = tls | {
        "AMQP_URL": ",".join(url.get_secret_value() for url in settings.amqp_url),
        "ONENET_URL": f"http://127.0.0.1:{port}",
        "ONENET_API_KEY": _API_KEY,
        "WORKER_NAMESPACE": settings.worker_namespace,
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
    return LocalProcess(["run"], environment, folder / "worker")


def _exchange(
    console: Console, settings: Settings, topology: Topology, messages: list[_Message], worker: LocalProcess
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Send all messages and collect their replies and results, with progress bars."""
    replies: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    deadline = time.monotonic() + _TIMEOUT_S
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        CommandClient(settings.broker_address, topology, app_id="demo", wants_replies=True) as client,
        Progress(*columns, console=console) as progress,
    ):
        sending = progress.add_task("commands sent", total=len(messages))
        receiving = progress.add_task("replies       ", total=len(messages))
        for message in messages:
            client.send(None, message.body)
            progress.advance(sending)
            replies += client.some_replies(wait_s=0)
            progress.update(receiving, completed=len(replies))
        while len(replies) < len(messages):
            replies += client.some_replies()
            progress.update(receiving, completed=len(replies))
            if not worker.is_running or time.monotonic() > deadline:
                last_lines = worker.output.read_text(errors="replace").splitlines()[-5:]
                raise WorkerError(f"{len(replies)} of {len(messages)} replies arrived; end of the log:", *last_lines)
        accepted = {reply["command_id"] for reply in replies if reply["status"] == "accepted"}
        executing = progress.add_task("results       ", total=len(accepted))
        for result in client.results([*accepted], deadline - time.monotonic()):
            results.append(result)
            progress.advance(executing)
    return replies, results


def _dead_letters(channel: Any, topology: Topology) -> list[tuple[Any, bytes]]:
    found: list[tuple[Any, bytes]] = []
    while True:
        method, properties, body = channel.basic_get(topology.dead_letters_exchange, auto_ack=True)
        if method is None:
            return found
        found.append((properties, body))


def _report(
    console: Console,
    messages: list[_Message],
    replies: list[dict[str, Any]],
    results: list[dict[str, Any]],
    cached: list[dict[str, Any]],
    dead_letters: list[tuple[Any, bytes]],
) -> bool:
    found = Counter(f"{reply['status']} {(reply['error'] or {}).get('code', '')}".strip() for reply in replies)
    wanted = Counter(message.outcome for message in messages)
    table = Table(title="\noutcomes", title_justify="left")
    for heading in ("status", "code", "commands", "as expected", "sent as"):
        table.add_column(heading, justify="right" if heading == "commands" else "left")
    for outcome in sorted(wanted | found):
        status, _, code = outcome.partition(" ")
        kinds = sorted({message.kind for message in messages if message.outcome == outcome})
        colour = {"accepted": "green", "rejected": "yellow", "failed": "red"}[status]
        is_right = "yes" if found[outcome] == wanted[outcome] else f"no: {wanted[outcome]}"
        table.add_row(f"[{colour}]{status}", code, str(found[outcome]), is_right, "; ".join(kinds))
    console.print(table)
    _report_results(console, results)
    times_cached = Counter(command["args"] for command in cached)
    twice = sum(1 for times in times_cached.values() if times > 1)
    console.print(
        f"OneNET cached {len(times_cached)} commands, {twice} of them twice; {len(dead_letters)} dead letters.\n"
    )

    accepted = next((reply for reply in replies if reply["status"] == "accepted"), None)
    if accepted is not None:
        console.print(
            "[bold]an accepted reply[/bold], on exchange onenet.replies, routing key execute.accepted.<app_id>"
        )
        console.print_json(data=accepted)
    if dead_letters:
        properties, body = next(
            (each for each in dead_letters if each[0].headers["x-onenet-reason"] == "invalid_command"), dead_letters[0]
        )
        console.print("\n[bold]a dead letter[/bold], in queue onenet.dead-letters: the original body, and the reason")
        own = {name: value for name, value in properties.headers.items() if name.startswith("x-onenet-")}
        console.print_json(data=own | {"body": body.decode()})
    _print_next(console)
    accepted_ids = {reply["command_id"] for reply in replies if reply["status"] == "accepted"}
    return found == wanted and not twice and accepted_ids == {result["command_id"] for result in results}


def _report_results(console: Console, results: list[dict[str, Any]]) -> None:
    table = Table(title="\nresults: what the devices did with accepted commands", title_justify="left")
    for heading in ("result", "confirm_status", "commands"):
        table.add_column(heading, justify="right" if heading == "commands" else "left")
    found = Counter((result["result"], result["confirm_status"] or "") for result in results)
    for (result, status), commands in sorted(found.items()):
        table.add_row(f"[{'green' if result == 'executed' else 'yellow'}]{result}", status, str(commands))
    console.print(table)


def _print_next(console: Console) -> None:
    called = Path(sys.argv[0])
    program = shlex.quote(os.path.relpath(called)) if called.name == "onenet-worker" else "onenet-worker"
    console.print("\n[bold]next[/bold], each in its own terminal, with a RabbitMQ on localhost, or with AMQP_URL set:")
    for command in (
        f"{program} simulator",
        f"ONENET_URL=http://127.0.0.1:8580 ONENET_API_KEY=simulator-key {program} run",
        f"{program} send --imei 865820030000001 --obj-id 3311 --obj-inst-id 0 --res-id 5850 --args on --wait",
    ):
        console.print(f"  {command}", soft_wrap=True, highlight=False, markup=False)
    console.print(f"All processes of the demo have been stopped. All commands: {program} --help")
