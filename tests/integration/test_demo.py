"""The demo: what it shows, what can be typed while it keeps running, and that it leaves nothing behind."""

import io
import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import pytest
from pydantic import SecretStr
from rich.console import Console

from scripts import services
from tests.support.command_line import run_cli
from tests.support.terminal import assert_screen, show
from tests.support.waiting import PATIENCE_S
from worker.amqp.address import BrokerAddress
from worker.amqp.blocking import check_topology, connect_blocking
from worker.amqp.topology import Topology
from worker.dev import demo
from worker.dev.demo_messages import Message
from worker.dev.demo_screen import Findings
from worker.dev.services.ports import free_port, wait_until
from worker.dev.services.processes import LocalProcess

_COUNT = ("--commands", "200")
_KEEPS = "Everything keeps running until ctrl-C"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder for temporary files that only the demo uses."""
    found = tmp_path / "temporary"
    found.mkdir()
    return found


def temporary(folder: Path) -> dict[str, str]:
    return {"TMPDIR": str(folder)}


def assert_nothing_is_left(said: str, folder: Path, broker_url: str | None) -> None:
    """No file, no process that would still write one, and nothing in the broker."""
    assert re.search("^stopped    and removed: .*a temporary folder$", said, re.MULTILINE), said
    assert not list(folder.glob("onenet-*"))
    for stat in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            assert str(folder).encode() not in stat.read_bytes(), f"process {stat.parent.name} is left"
    if broker_url is None:
        return
    [namespace] = set(re.findall(r"onenet-demo-[0-9a-f]{6}(?=\.\*)", said))
    topology = Topology(namespace, (1, 2, 3), (2, 5))
    connection, _ = connect_blocking(BrokerAddress((SecretStr(broker_url),)))
    with connection:
        [fault] = check_topology(connection, topology)
    assert fault.startswith("not there: ")
    missing = set(fault.removeprefix("not there: ").rpartition(": ")[0].split(", "))
    assert missing == {each.name for each in topology.queues()} | {each.name for each in topology.exchanges()}


def test_the_demo_says_in_a_pipe_what_it_waits_for_and_what_came_of_it(broker_url: str, folder: Path) -> None:
    result = run_cli("demo", *_COUNT, folder=folder, AMQP_URL=broker_url, COLUMNS="80", **temporary(folder))
    assert (result.returncode, result.stderr) == (0, ""), result.stdout
    said = result.stdout
    for setting in ("WORKER_RECONCILE_DELAY", "WORKER_RETRY_DELAYS", "WORKER_RESULT_DELAYS"):
        assert setting in said
    assert re.search(r"^ +replies 220 of 220, after [0-9]+ s$", said, re.MULTILINE)
    assert '"x-onenet-reason": "invalid_command"' in said
    assert "\N{BOX DRAWINGS HEAVY HORIZONTAL}" not in said  # no bar
    assert_the_table_is_last(said)
    assert_nothing_is_left(said, folder, broker_url)


def assert_the_table_is_last(said: str) -> None:
    """All that matters stays on a screen of 24 lines, of which the prompt needs one."""
    screen = said.rstrip("\n").split("\n")[-23:]
    assert any(line.split() == ["status", "code", "messages", "sent", "as"] for line in screen)
    for code in ("outcome_unknown", "command_id_conflict", "retries_exhausted", "http_rejected"):
        assert any(code in line for line in screen)
    assert any("0 of them twice" in line for line in screen)
    assert screen[-2] == "All as expected: 220 messages, 220 outcomes."
    assert screen[-1] == "To look around yourself: onenet-worker demo --keep"


def test_the_demo_ends_in_a_terminal_with_the_table_on_the_screen(broker_url: str, folder: Path) -> None:
    screen = show(["demo", *_COUNT], folder, {"AMQP_URL": broker_url, **temporary(folder)}, columns=80)
    assert screen.exit_code == 0, screen.text
    assert_the_table_is_last(screen.text)
    assert "\N{BOX DRAWINGS HEAVY HORIZONTAL}" in screen.text


def test_what_the_demo_prints_with_keep_can_be_typed_as_it_is_until_ctrl_c(broker_url: str, folder: Path) -> None:
    environment = {"AMQP_URL": broker_url, **temporary(folder)}
    process = LocalProcess(["demo", *_COUNT, "--keep"], environment, folder / "output")
    process.wait_for_output("The worker's log", PATIENCE_S)
    said = process.output.read_text()
    typed = said.partition(_KEEPS)[2].partition("\n")[2].partition("The worker's log")[0]
    kept = {name: os.environ[name] for name in ("PATH", "HOME")} | {"PYTHONPATH": str(Path.cwd())}
    done = subprocess.run(
        ["sh", "-ec", typed], cwd=folder, env=kept, capture_output=True, text=True, check=False, timeout=PATIENCE_S
    )
    assert done.returncode == 0, f"{typed}\n{done.stdout}{done.stderr}"
    assert '"status": "accepted"' in done.stdout
    assert "command_id_conflict" in done.stdout
    assert "FAIL" not in done.stdout
    assert sum(line.split()[0] == "onenet-worker" for line in typed.strip().splitlines()) == 4
    process.signal(signal.SIGINT)
    assert process.wait() == 0
    assert_nothing_is_left(process.output.read_text(), folder, broker_url)


@pytest.mark.parametrize("columns", [80, 120])
def test_the_end_of_the_demo_stays_on_the_screen(columns: int, broker_url: str, folder: Path) -> None:
    screen = show(["demo", *_COUNT], folder, {"AMQP_URL": broker_url, **temporary(folder)}, columns=columns)
    _, heading, table = screen.text.rpartition("status     code")
    assert_screen(f"demo-{columns}", heading + table)


@pytest.mark.parametrize(
    ("phase", "number", "code"),
    [
        ("OneNET     starting", signal.SIGINT, 130),
        ("worker     starting", signal.SIGTERM, 143),
        ("replies    ", signal.SIGHUP, 129),
        ("results    ", signal.SIGINT, 130),
        (_KEEPS, signal.SIGTERM, 143),
    ],
)
def test_the_demo_leaves_nothing_behind_whenever_it_is_interrupted(
    phase: str, number: signal.Signals, code: int, broker_url: str, folder: Path
) -> None:
    environment = {"AMQP_URL": broker_url, **temporary(folder)}
    process = LocalProcess(["demo", *_COUNT, "--keep"], environment, folder / "output")
    process.wait_for_output(phase, PATIENCE_S)
    process.signal(number)
    process.wait_for_output("stopping", PATIENCE_S)
    process.signal(signal.SIGINT)  # a second one does not keep it from stopping all
    assert process.wait() == code
    said = process.output.read_text()
    assert "interrupted" in said
    assert "Traceback" not in said
    assert_nothing_is_left(said, folder, broker_url)


@pytest.mark.parametrize("command", ["simulator", "run"])
def test_the_demo_leaves_no_process_behind_that_has_started_as_a_signal_comes(
    command: str, broker_url: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class SignalledProcess(LocalProcess):
        def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], output: Path) -> None:
            super().__init__(arguments, environment, output)
            if arguments[0] == command:
                signal.raise_signal(signal.SIGTERM)  # nobody knows the process yet

    monkeypatch.setattr(demo, "LocalProcess", SignalledProcess)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    for name, value in {"AMQP_URL": broker_url, **temporary(folder)}.items():
        monkeypatch.setenv(name, value)
    said = io.StringIO()
    with pytest.raises(SystemExit, match="143"):
        demo.run_demo(Console(file=said), 150, keep=True)
    assert_nothing_is_left(said.getvalue(), folder, broker_url)


def test_the_demo_leaves_no_broker_behind_that_it_was_just_starting(folder: Path) -> None:
    services.provide_installed("rabbitmq")
    private = {"DOCKER_HOST": f"tcp://127.0.0.1:{free_port()}", "TEST_RABBITMQ_IMAGE": ""}  # no engine answers there
    process = LocalProcess(["demo"], temporary(folder) | private, folder / "output")
    process.wait_for_output("starting a RabbitMQ", PATIENCE_S)
    wait_until(
        lambda: any(folder.glob("*/onenet-rabbitmq-*")) or not process.is_running, PATIENCE_S, "the broker's folder"
    )
    process.signal(signal.SIGINT)
    assert process.wait() == 130
    assert_nothing_is_left(process.output.read_text(), folder, None)


def test_the_demo_says_what_is_not_as_expected() -> None:
    findings = Findings([Message("good", b"{}", "accepted")], [], [], [{"args": "a"}, {"args": "a"}], [])
    assert findings.faults == ["the numbers of some outcomes", "1 commands were cached twice"]
