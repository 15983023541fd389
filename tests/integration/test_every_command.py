"""What every command has in common: without a broker, interrupted, in a pipe that ends, in a terminal without UTF-8."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pika
import pytest

from tests.support.builders import AN_IMEI, a_command
from tests.support.command_line import TARGET_OPTIONS, run_cli
from tests.support.dead_letters import publish_dead_letters
from tests.support.deployment import Deployment
from tests.support.simulator import API_KEY, onenet
from tests.support.terminal import show
from tests.support.upstream import Upstream
from tests.support.waiting import PATIENCE_S
from worker.amqp.blocking import declare_on
from worker.dev.services.ports import free_port, wait_until
from worker.dev.services.processes import LocalProcess

# Each with what it needs to get as far as the broker.
WITH_BROKER: tuple[tuple[str, ...], ...] = (
    ("check",),
    ("check", "--json"),
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
    ("status", "some-id", "--json"),
    ("unrouted", "list"),
    ("unrouted", "list", "--json"),
    ("unrouted", "publish", "--all"),
    ("unrouted", "discard", "--all", "--yes"),
    ("demo",),
)
WITH_OUTPUT: tuple[tuple[str, ...], ...] = (
    ("--help",),
    ("schema", "asyncapi"),
    ("topology", "--json"),
)
# Each prints something of the deployment below.
OF_A_DEPLOYMENT: tuple[tuple[str, ...], ...] = (
    ("check",),
    ("check", "--json"),
    ("topology",),
    ("dead-letters", "list"),
    ("dead-letters", "list", "--json"),
    ("dead-letters", "summary"),
    ("dead-letters", "show", "failed"),
    ("dead-letters", "replay", "failed", "--dry-run"),
    ("dead-letters", "discard", "failed", "--dry-run"),
    ("status", "failed"),
    ("status", "failed", "--json"),
    ("device", AN_IMEI),
    ("device", AN_IMEI, "--json"),
    ("unrouted", "list"),
    ("unrouted", "list", "--json"),
    ("unrouted", "publish", "--all", "--dry-run"),
    ("unrouted", "discard", "--all", "--dry-run"),
    ("resume",),
    ("resume", "--json"),
)


@dataclass(frozen=True)
class Site:
    """A deployment that has something to show of everything, in words that are not ASCII."""

    deployment: Deployment
    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AMQP_URL": self.deployment.broker_url,
            "ONENET_URL": self.deployment.simulator.url,
            "ONENET_API_KEY": API_KEY,
            "WORKER_NAMESPACE": self.deployment.topology.namespace,
            "WORKER_RETRY_DELAYS": ",".join(map(str, sorted(self.deployment.topology.delay_queues_s))),
            "NO_PROXY": "127.0.0.1",
        }


@pytest.fixture
def site(broker_url: str, tmp_path: Path) -> Iterator[Site]:
    with onenet() as simulator, Deployment.set_up(broker_url, tmp_path, simulator) as deployment:
        channel, topology = deployment.upstream.channel, deployment.topology
        declare_on(channel, topology)
        publish_dead_letters(deployment, "failed", error="设备不在线 — 已过期")
        reply = json.dumps({"command_id": "told", "completed_at": "2026-11-30T08:00:00Z"}).encode()
        channel.basic_publish(topology.replies_exchange, "收银台", reply, pika.BasicProperties(), mandatory=True)
        query = {"imei": AN_IMEI, "obj_id": "1", "obj_inst_id": "2", "res_id": "3"}
        simulator.platform.execute(query | {"expired_time": "2099-01-01T08:00:00"}, b"{}")
        yield Site(deployment, tmp_path)


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


def _interrupted(arguments: tuple[str, ...], folder: Path) -> str:
    """Interrupt a command that waits for a broker which accepts connections and never answers; returns what it said."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        environment = {"AMQP_URL": f"amqp://127.0.0.1:{server.getsockname()[1]}/", "ONENET_API_KEY": "k"}
        process = LocalProcess(list(arguments), environment, folder / "output")
        server.settimeout(PATIENCE_S)
        with closing(server.accept()[0]):
            process.signal(signal.SIGINT)
            assert process.wait() == 130
    return process.output.read_text()


@pytest.mark.parametrize("arguments", WITH_BROKER, ids=_name)
def test_an_interrupt_ends_a_command_without_a_traceback(arguments: tuple[str, ...], tmp_path: Path) -> None:
    assert "Traceback" not in _interrupted(arguments, tmp_path)


@pytest.mark.parametrize("arguments", [("device", AN_IMEI), ("check",)], ids=_name)
def test_an_interrupt_ends_a_command_that_waits_for_the_platform(arguments: tuple[str, ...], site: Site) -> None:
    """It accepts the connection, and never answers."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        settings = site.environment | {"ONENET_URL": f"http://127.0.0.1:{server.getsockname()[1]}"}
        process = LocalProcess(list(arguments), settings, site.folder / "output")
        server.settimeout(PATIENCE_S)
        with closing(server.accept()[0]):
            process.signal(signal.SIGINT)
            assert process.wait() == 130
    assert "Traceback" not in process.output.read_text()


def test_an_interrupt_while_the_program_is_being_loaded_ends_it_silently(tmp_path: Path) -> None:
    """It takes part of a second."""
    code = (
        "import os, signal, sys; from worker.__main__ import main\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'worker.cli.program': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "main()"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=Path.cwd(), capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "")


@pytest.mark.parametrize("arguments", [("schema", "asyncapi"), ("check",), ("send", *TARGET_OPTIONS)], ids=_name)
def test_without_space_for_the_output_one_line_says_so(arguments: tuple[str, ...], site: Site) -> None:
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "worker", *arguments],
            cwd=Path.cwd(),
            env={"PATH": os.environ["PATH"]} | site.environment,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert result.returncode == 1
    assert "no space is left where the output is written" in result.stderr
    assert "Traceback" not in result.stderr
    if arguments[0] == "send":
        assert " was sent" in result.stderr


@pytest.mark.parametrize("closed", ["stdin", "stdout", "stderr", "stdin stdout stderr"])
@pytest.mark.parametrize(
    "arguments",
    [
        ("--version",),
        ("--help",),
        ("check",),
        ("schema", "asyncapi"),
        ("topology", "--json"),
        ("dead-letters", "list"),
        ("send", *TARGET_OPTIONS),
        ("send", "--file", "-"),
        ("dead-letters", "discard", "--all"),
        ("device", AN_IMEI, "--cancel-all"),
    ],
    ids=_name,
)
def test_standard_streams_that_are_closed_are_empty(arguments: tuple[str, ...], closed: str, site: Site) -> None:
    numbers = [("stdin", "stdout", "stderr").index(name) for name in closed.split()]
    redirections = [f"{number}{'<' if number == 0 else '>'}&-" for number in numbers]
    result = subprocess.run(
        ["bash", "-c", f'exec "$@" {" ".join(redirections)}', "-", sys.executable, "-m", "worker", *arguments],
        cwd=Path.cwd(),
        env={"PATH": os.environ["PATH"]} | site.environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    asks = arguments[0] == "device" or arguments[:2] == ("dead-letters", "discard")
    assert result.returncode == (1 if asks or "-" in arguments else 0), result.stderr
    assert "Traceback" not in result.stderr
    if asks and "stderr" not in closed:
        assert "without a terminal there is nobody to ask: give --yes" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("send", *TARGET_OPTIONS), "nothing was sent"),
        (("dead-letters", "replay", "--all"), "nothing was replayed"),
        (("dead-letters", "discard", "--all", "--yes"), "nothing was discarded"),
        (("unrouted", "publish", "--all"), "nothing was published"),
    ],
    ids=str,
)
def test_an_interrupt_before_anything_was_done_says_so(arguments: tuple[str, ...], said: str, tmp_path: Path) -> None:
    assert _interrupted(arguments, tmp_path) == f"onenet-worker: interrupted: {said}\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("pause", "heating"), "there is no argument heating: did you mean --product heating?"),
        (("dead-letters", "list", "order-17"), "there is no argument order-17: did you mean --id order-17?"),
        (("send", AN_IMEI), f"there is no argument {AN_IMEI}: did you mean --imei {AN_IMEI}?"),
        (("schema", "command", "more"), "there is no argument more"),
    ],
    ids=str,
)
def test_a_value_without_its_option_names_the_option(arguments: tuple[str, ...], said: str, tmp_path: Path) -> None:
    result = run_cli(*arguments, folder=tmp_path)
    assert result.returncode == 2
    assert said in result.stderr


def test_arguments_in_another_encoding_than_the_terminals_are_refused(tmp_path: Path) -> None:
    product = os.fsdecode("供热".encode("gbk"))
    result = run_cli("pause", "--product", product, folder=tmp_path, LC_ALL="C.UTF-8")
    assert result.returncode == 2
    assert result.stderr.startswith("onenet-worker: an argument is no text in this terminal's encoding, utf-8: ")


def test_an_interrupt_ends_the_simulator(tmp_path: Path) -> None:
    port = free_port()
    process = LocalProcess(["simulator", "--port", str(port)], {}, tmp_path / "output")
    process.wait_for_output("ctrl-C stops it")
    process.signal(signal.SIGINT)
    assert process.wait() == 0
    assert process.output.read_text().splitlines()[-1] == "stopped"


def test_an_interrupt_ends_a_worker_that_waits_for_its_broker(tmp_path: Path) -> None:
    settings = {"AMQP_URL": f"amqp://127.0.0.1:{free_port()}/", "ONENET_API_KEY": "k", "HTTP_PORT": "0"}
    process = LocalProcess(["run"], settings, tmp_path / "output")
    process.wait_for_output("broker_unavailable")
    process.signal(signal.SIGINT)
    assert process.wait() == 0
    events = [json.loads(line)["event"] for line in process.output.read_text().splitlines()]
    assert events[-1] == "worker_stopped"


def _in_an_ended_pipe(arguments: tuple[str, ...], folder: Path, **environment: str) -> tuple[int, str]:
    """Return the exit code, and what was written to stderr."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as out:
        result = subprocess.run(
            [sys.executable, "-m", "worker", *arguments],
            cwd=folder,
            env={"PYTHONPATH": str(Path.cwd()), "PATH": os.environ["PATH"]} | environment,
            stdout=out,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    return result.returncode, result.stderr


@pytest.mark.parametrize("arguments", WITH_OUTPUT, ids=_name)
def test_a_pipe_whose_reader_ends_early_ends_a_command_silently(arguments: tuple[str, ...], tmp_path: Path) -> None:
    assert _in_an_ended_pipe(arguments, tmp_path) == (1, "")


def _has_one(upstream: Upstream, queue: str) -> bool:
    return upstream.count(queue) == 1


@pytest.mark.parametrize("arguments", OF_A_DEPLOYMENT, ids=_name)
def test_a_pipe_whose_reader_ends_early_leaves_everything_as_it_is(arguments: tuple[str, ...], site: Site) -> None:
    code, said = _in_an_ended_pipe(arguments, site.folder, **site.environment)
    assert code == 1
    assert all(line.startswith("onenet-worker: ") for line in said.splitlines())
    assert not any(word in said for word in ("Traceback", "BrokenPipe", "Exception"))
    upstream, topology = site.deployment.upstream, site.deployment.topology
    for queue in (topology.dead_letters_exchange, topology.unrouted_exchange):
        wait_until(partial(_has_one, upstream, queue), PATIENCE_S, "its message")


@pytest.mark.parametrize("arguments", OF_A_DEPLOYMENT, ids=_name)
def test_a_terminal_without_utf_8_shows_chinese_words_in_ascii(arguments: tuple[str, ...], site: Site) -> None:
    settings = site.environment | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C", "LANG": "C"}
    screen = show(arguments, site.folder, settings, columns=80)
    assert screen.exit_code == 0, screen.text
    assert screen.text.isascii()
    assert "Traceback" not in screen.text
    if "--json" in arguments:
        assert [json.loads(line) for line in screen.text.splitlines() if not line.startswith("onenet-worker: ")]


@pytest.mark.parametrize("arguments", [*WITH_BROKER, *WITH_OUTPUT], ids=_name)
def test_a_terminal_without_utf_8_shows_everything_in_ascii(arguments: tuple[str, ...], tmp_path: Path) -> None:
    url = f"amqp://127.0.0.1:{free_port()}/"
    environment = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C", "AMQP_URL": url}
    result = run_cli(*arguments, folder=tmp_path, ONENET_API_KEY="k", **environment)
    said = result.stdout + result.stderr
    assert said.isascii()
    assert not any(word in said for word in ("Traceback", "\\u2026"))
