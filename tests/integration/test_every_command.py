"""What every command has in common: without a broker, interrupted, in a pipe that ends, in a terminal without UTF-8."""

import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from tests.support.builders import a_command
from tests.support.command_line import TARGET_OPTIONS, run_cli
from tests.support.waiting import PATIENCE_S
from worker.dev.services.ports import free_port
from worker.dev.services.processes import LocalProcess

# Each with what it needs to get as far as the broker.
WITH_BROKER: tuple[tuple[str, ...], ...] = (
    ("check",),
    ("topology",),
    ("send", *TARGET_OPTIONS),
    ("send", *TARGET_OPTIONS, "--wait"),
    ("pause",),
    ("resume",),
    ("probe",),
    ("send", "--file", "commands.jsonl"),
    ("dead-letters", "list"),
    ("dead-letters", "list", "--json"),
    ("dead-letters", "summary"),
    ("dead-letters", "show", "some-id"),
    ("dead-letters", "replay", "--all"),
    ("dead-letters", "replay", "--all", "--wait"),
    ("dead-letters", "discard", "--all", "--yes"),
    ("status", "some-id"),
    ("unrouted", "list"),
    ("unrouted", "publish", "--all"),
    ("unrouted", "discard", "--all", "--yes"),
    ("demo",),
)
WITH_OUTPUT: tuple[tuple[str, ...], ...] = (
    ("--help",),
    ("schema", "asyncapi"),
    ("topology", "--json"),
)


@pytest.fixture(autouse=True)
def commands_file(tmp_path: Path) -> None:
    (tmp_path / "commands.jsonl").write_text(json.dumps(a_command()))


def _name(path: tuple[str, ...]) -> str:
    return " ".join(word for word in path if word not in TARGET_OPTIONS)


@pytest.mark.parametrize("arguments", WITH_BROKER, ids=_name)
def test_without_a_broker_one_line_says_so(arguments: tuple[str, ...], tmp_path: Path) -> None:
    port = free_port()
    url = f"amqp://someone:aSecret@127.0.0.1:{port}/"
    result = run_cli(*arguments, folder=tmp_path, AMQP_URL=url, ONENET_API_KEY="k")
    said = result.stdout + result.stderr
    assert result.returncode == 1
    assert f"127.0.0.1:{port}" in said
    assert len([line for line in said.splitlines() if "cannot be reached" in line]) >= 1
    assert not any(word in said for word in ("aSecret", "someone", "Traceback"))


@pytest.mark.parametrize("arguments", WITH_BROKER, ids=_name)
def test_an_interrupt_ends_a_command_without_a_traceback(arguments: tuple[str, ...], tmp_path: Path) -> None:
    """While it waits for a broker that accepts connections and never answers."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        environment = {"AMQP_URL": f"amqp://127.0.0.1:{server.getsockname()[1]}/", "ONENET_API_KEY": "k"}
        process = LocalProcess(list(arguments), environment, tmp_path / "output")
        server.settimeout(PATIENCE_S)
        with closing(server.accept()[0]):
            process.signal(signal.SIGINT)
            assert process.wait() == 130
    assert "Traceback" not in process.output.read_text()


@pytest.mark.parametrize("arguments", WITH_OUTPUT, ids=_name)
def test_a_pipe_whose_reader_ends_early_ends_a_command_silently(arguments: tuple[str, ...], tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    environment = {"PYTHONPATH": str(Path.cwd()), "PATH": os.environ["PATH"]}
    with os.fdopen(writer, "wb") as out:
        result = subprocess.run(
            [sys.executable, "-m", "worker", *arguments],
            cwd=tmp_path,
            env=environment,
            stdout=out,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (result.returncode, result.stderr) == (1, "")


@pytest.mark.parametrize("arguments", [*WITH_BROKER, *WITH_OUTPUT], ids=_name)
def test_a_terminal_without_utf_8_shows_everything_in_ascii(arguments: tuple[str, ...], tmp_path: Path) -> None:
    url = f"amqp://127.0.0.1:{free_port()}/"
    environment = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C", "AMQP_URL": url}
    result = run_cli(*arguments, folder=tmp_path, ONENET_API_KEY="k", **environment)
    said = result.stdout + result.stderr
    assert said.isascii()
    assert not any(word in said for word in ("Traceback", "\\u2026"))
