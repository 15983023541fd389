"""The commands of ``onenet-worker`` as a user runs them, with valid and with invalid arguments."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import requests
import typer
from pydantic import SecretStr

from schemas.command import COMMAND
from tests.support.builders import a_command
from tests.support.command_line import TARGET_OPTIONS, run_cli
from tests.support.deployment import Deployment
from tests.support.proxies import Proxy
from tests.support.waiting import PATIENCE_S
from worker.amqp.address import BrokerAddress
from worker.amqp.blocking import CommandClient, declare_on
from worker.cli.program import app
from worker.dev.services.ports import free_port, wait_until
from worker.dev.services.processes import LocalProcess


def _paths(group: Any) -> Iterator[tuple[str, ...]]:
    for name, command in group.commands.items():
        yield (name,)
        if hasattr(command, "commands"):
            yield from ((name, *path) for path in _paths(command))


PATHS = list(_paths(typer.main.get_command(app)))  # of every command and subcommand


def test_without_arguments_the_program_lists_its_commands(tmp_path: Path) -> None:
    result = run_cli(folder=tmp_path)
    assert all(path[0] in result.stdout for path in PATHS)


@pytest.mark.parametrize("path", PATHS, ids=" ".join)
def test_every_command_has_help_with_an_example(path: tuple[str, ...], tmp_path: Path) -> None:
    result = run_cli(*path, "--help", folder=tmp_path)
    assert result.returncode == 0
    assert f"onenet-worker {' '.join(path)} " in result.stdout.partition("xample")[2].partition("Options")[0] + " "


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("onenet-worker dead-l", {"dead-letters"}),
        ("onenet-worker unrouted ", {"list", "publish", "discard"}),
        ("onenet-worker dev", {"device"}),
        ("onenet-worker st", {"status"}),
        ("onenet-worker dead-letters ", {"list", "summary", "show", "replay", "discard"}),
        ("onenet-worker schema ", {"command", "reply", "result", "asyncapi"}),
        ("onenet-worker dead-letters list --reason pois", {"poison_message"}),
    ],
)
def test_shell_completion_offers_commands_and_option_values(typed: str, expected: set[str], tmp_path: Path) -> None:
    """Asked in the way of bash after ``--install-completion``."""
    words = typed.split(" ")
    asked = {"_ONENET_WORKER_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(len(words) - 1)}
    program = str(Path(sys.executable).with_name("onenet-worker"))
    result = subprocess.run([program], cwd=tmp_path, env=asked, capture_output=True, text=True, check=False)
    assert set(result.stdout.split()) == expected, result.stderr


def test_a_wrong_setting_stops_the_start_with_exit_code_78(tmp_path: Path) -> None:
    result = run_cli("run", folder=tmp_path, WORKER_CONCURRENCY="many", ONENET_API_KEY="k", LOG_LEVEL="loud")
    assert result.returncode == 78
    assert [line.split(": ")[1] for line in result.stderr.splitlines()] == ["WORKER_CONCURRENCY", "LOG_LEVEL"]
    assert result.stdout == ""


def test_run_without_credentials_names_the_missing_setting(tmp_path: Path) -> None:
    result = run_cli("run", folder=tmp_path)
    assert result.returncode == 78
    assert "ONENET_API_KEY" in result.stderr


def test_schema_prints_json_schema_2020_12(tmp_path: Path) -> None:
    command = json.loads(run_cli("schema", "command", folder=tmp_path).stdout)
    assert command["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert set(command["properties"]) == set(COMMAND.json_schema()["properties"])
    assert set(command["required"]) == {"imei", "obj_id", "obj_inst_id", "res_id", "expired_time"}
    assert command["additionalProperties"] is False
    reply = json.loads(run_cli("schema", "reply", folder=tmp_path).stdout)
    assert set(reply["required"]) == set(reply["properties"])
    assert run_cli("schema", "nonsense", folder=tmp_path).returncode == 2


def test_topology_json_describes_the_declared_topology(deployment: Deployment, tmp_path: Path) -> None:
    environment = {
        "AMQP_URL": deployment.broker_url,
        "WORKER_NAMESPACE": deployment.topology.namespace,
        "WORKER_RETRY_DELAYS": "1,2",
    }
    result = run_cli("topology", folder=tmp_path, **environment)
    assert result.returncode == 0, result.stderr
    assert deployment.topology.execute_queue in result.stdout
    definitions = json.loads(run_cli("topology", "--json", folder=tmp_path, **environment).stdout)
    for exchange in definitions["exchanges"]:
        deployment.upstream.channel.exchange_declare(
            exchange["name"], exchange["type"], durable=exchange["durable"], arguments=exchange["arguments"]
        )
    for queue in definitions["queues"]:
        deployment.upstream.channel.queue_declare(queue["name"], durable=queue["durable"], arguments=queue["arguments"])
    bindings = {(one["source"], one["destination"], one["routing_key"]) for one in definitions["bindings"]}
    name = deployment.topology.namespace
    assert bindings >= {
        (f"{name}.commands", f"{name}.execute", "execute"),
        (f"{name}.returns", f"{name}.execute", "execute"),
        (f"{name}.dead-letters", f"{name}.dead-letters", "#"),
    }


def test_topology_reports_a_queue_with_other_arguments_in_one_line(deployment: Deployment, tmp_path: Path) -> None:
    deployment.upstream.channel.queue_declare(deployment.topology.execute_queue, durable=True)
    result = run_cli(
        "topology", folder=tmp_path, AMQP_URL=deployment.broker_url, WORKER_NAMESPACE=deployment.topology.namespace
    )
    assert result.returncode == 78
    assert len(result.stderr.splitlines()) == 1
    queue = deployment.topology.execute_queue
    assert f"the queue {queue} exists with another x-dead-letter-exchange: none, and not " in result.stderr


def test_an_unreachable_broker_is_reported_in_one_line_without_the_password(tmp_path: Path) -> None:
    url = f"amqp://me:aSecret@127.0.0.1:{free_port()}/"
    for command in (("topology",), ("send", *TARGET_OPTIONS)):
        result = run_cli(*command, folder=tmp_path, AMQP_URL=url)
        assert result.returncode == 1
        assert len(result.stderr.splitlines()) == 1
        assert "aSecret" not in result.stderr


def test_send_wait_prints_the_reply(deployment: Deployment, tmp_path: Path) -> None:
    environment = {"AMQP_URL": deployment.broker_url, "WORKER_NAMESPACE": deployment.topology.namespace}
    with deployment.worker():
        result = run_cli("send", *TARGET_OPTIONS, "--args", "on", "--wait", folder=tmp_path, **environment)
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout)["status"] == "accepted"
        refused = run_cli("send", *TARGET_OPTIONS, "--product", "none", "--wait", folder=tmp_path, **environment)
        assert refused.returncode == 1
        assert json.loads(refused.stdout)["error"]["code"] == "unknown_product"


def test_send_reports_invalid_fields_and_sends_nothing(tmp_path: Path) -> None:
    result = run_cli("send", "--imei", "1", "--retry", "11", folder=tmp_path)
    assert result.returncode == 1
    assert all(field in result.stderr for field in ("imei", "retry", "obj_id"))
    assert "nothing was sent" in result.stderr


def test_send_without_a_topology_names_the_command_that_declares_it(deployment: Deployment, tmp_path: Path) -> None:
    result = run_cli(
        "send", *TARGET_OPTIONS, folder=tmp_path, AMQP_URL=deployment.broker_url, WORKER_NAMESPACE="nowhere"
    )
    assert result.returncode == 1
    assert "onenet-worker topology" in result.stderr


def test_send_file_sends_all_lines_or_none(deployment: Deployment, tmp_path: Path) -> None:
    environment = {"AMQP_URL": deployment.broker_url, "WORKER_NAMESPACE": deployment.topology.namespace}
    commands: list[dict[str, Any]] = [a_command(command_id=f"line-{number}", args="on") for number in range(50)]
    lines = [json.dumps(command) for command in commands]
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    good.write_text("\n".join(lines) + "\n\n")
    bad.write_text("\n".join([*lines[:7], '{"imei": 1}', *lines[7:], lines[0]]))
    with deployment.worker():
        result = run_cli("send", "--file", str(bad), "--wait", folder=tmp_path, **environment)
        assert result.returncode == 1
        assert "bad.jsonl:8: " in result.stderr
        assert "bad.jsonl:52: command_id: line-0 is a duplicate" in result.stderr
        result = run_cli("send", "--file", str(good), "--wait", folder=tmp_path, **environment)
        assert result.returncode == 0, result.stderr
        assert {json.loads(line)["command_id"] for line in result.stdout.splitlines()} == {
            command["command_id"] for command in commands
        }
    assert len(deployment.simulator.platform.commands) == 50
    both = run_cli("send", "--file", str(good), "--imei", "1", folder=tmp_path)
    assert both.returncode == 2
    assert "--imei" in both.stderr


def lines_of(count: int) -> list[bytes]:
    return [json.dumps(a_command(command_id=f"line-{number}")).encode() for number in range(count)]


def test_send_file_accepts_a_byte_order_mark_blank_lines_and_crlf(deployment: Deployment, tmp_path: Path) -> None:
    """Programs on Windows write files like this."""
    declare_on(deployment.upstream.channel, deployment.topology)
    environment = {"AMQP_URL": deployment.broker_url, "WORKER_NAMESPACE": deployment.topology.namespace}
    file = tmp_path / "lines.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + b"\r\n\r\n  \r\n".join(lines_of(2_000)))
    result = run_cli("send", "--file", str(file), folder=tmp_path, **environment)
    assert (result.returncode, result.stderr) == (0, "onenet-worker: all 2,000 commands were sent\n")
    assert result.stdout.splitlines() == [f"line-{number}" for number in range(2_000)]
    assert deployment.upstream.count(deployment.topology.execute_queue) == 2_000


def test_send_file_names_the_first_invalid_lines_and_counts_the_others(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_bytes(b"\n".join([*lines_of(3), b'{"imei": "\xff"}', *[b"{}"] * 1_253]))
    result = run_cli("send", "--file", str(file), folder=tmp_path)
    errors = result.stderr.splitlines()
    assert result.returncode == 1
    assert "lines.jsonl:4: the body is not UTF-8" in errors[0]
    assert errors[-3] == "onenet-worker: and 1,234 more"
    assert errors[-2].startswith("onenet-worker: a file has one command on each line")
    assert errors[-1] == "onenet-worker: nothing was sent"
    assert len(errors) == 23


def test_send_reads_commands_from_a_pipe_and_from_stdin(deployment: Deployment, tmp_path: Path) -> None:
    declare_on(deployment.upstream.channel, deployment.topology)
    environment = {"AMQP_URL": deployment.broker_url, "WORKER_NAMESPACE": deployment.topology.namespace}
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    lines = b"\n".join(lines_of(3))
    Thread(target=fifo.write_bytes, args=(lines,), daemon=True).start()
    for file, stdin in ((fifo, ""), ("/dev/stdin", lines.decode())):
        result = run_cli("send", "--file", str(file), folder=tmp_path, stdin=stdin, **environment)
        assert (result.returncode, result.stderr) == (0, "onenet-worker: all 3 commands were sent\n")
        assert result.stdout.splitlines() == ["line-0", "line-1", "line-2"]


def test_a_file_to_send_that_never_ends_is_refused(tmp_path: Path) -> None:
    result = run_cli("send", "--file", "/dev/zero", folder=tmp_path)
    assert (result.returncode, result.stderr) == (
        1, "onenet-worker: /dev/zero:1: the line has more than 131072 bytes\n",
    )  # fmt: skip


def test_a_line_to_send_forges_no_line_of_the_error(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_text(json.dumps({"imei\nall is well\x1b[2J\x9b\u2028": 1}, ensure_ascii=False))
    result = run_cli("send", "--file", str(file), folder=tmp_path)
    assert [line.isprintable() for line in result.stderr.split("\n")] == [True] * 3
    assert result.stderr.endswith("\nonenet-worker: nothing was sent\n")
    assert "all is well\\x1b[2J\\x9b\\u2028" in result.stderr


def test_send_file_without_a_command_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_bytes(b"\n \n")
    result = run_cli("send", "--file", str(file), folder=tmp_path)
    assert result.returncode == 1
    assert "no command" in result.stderr


def _cut_and_interrupt(client: CommandClient, proxy: Proxy) -> None:
    with client:
        proxy.cut()
        raise KeyboardInterrupt


def test_a_connection_lost_on_exit_does_not_hide_the_interrupt(deployment: Deployment) -> None:
    """After a ctrl-C between two frames of a message, the broker closes the connection itself."""
    proxy = Proxy(deployment.broker_url)
    broker = BrokerAddress((SecretStr(proxy.url),))
    try:
        with pytest.raises(KeyboardInterrupt):
            _cut_and_interrupt(CommandClient(broker, deployment.topology, app_id="cli", wants_replies=False), proxy)
    finally:
        proxy.close()


def test_an_interrupted_send_file_reports_how_many_commands_were_sent(deployment: Deployment, tmp_path: Path) -> None:
    declare_on(deployment.upstream.channel, deployment.topology)
    file = tmp_path / "lines.jsonl"
    file.write_bytes(b"\n".join(lines_of(20_000)))
    environment = {"AMQP_URL": deployment.broker_url, "WORKER_NAMESPACE": deployment.topology.namespace}
    process = LocalProcess(["send", "--file", str(file)], environment, tmp_path / "output")
    wait_until(
        lambda: deployment.upstream.count(deployment.topology.execute_queue) >= 1, PATIENCE_S, "the first command"
    )
    process.signal(signal.SIGINT)
    assert process.wait() == 130
    result = process.output.read_text().splitlines()
    ids = [line for line in result if line.startswith("line-")]
    found = re.match(r"onenet-worker: interrupted: ([0-9,]+) of 20,000 were sent; ", result[len(ids)])
    assert found is not None
    sent = int(found[1].replace(",", ""))
    assert sent - len(ids) in {0, 1}  # the line of the last command may be missing
    assert deployment.upstream.count(deployment.topology.execute_queue) in {
        sent,
        sent + 1,
    }  # one more may have been in flight


def test_the_simulator_stops_on_sigterm_and_sigint(tmp_path: Path) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        port = free_port()
        simulator = LocalProcess(["simulator", "--port", str(port)], {}, tmp_path / f"simulator-{number}")
        simulator.wait_for_port(port)
        assert requests.get(f"http://127.0.0.1:{port}/control/commands", timeout=PATIENCE_S).json() == []
        simulator.signal(number)
        assert simulator.wait() == 0
        assert "Traceback" not in simulator.output.read_text()


def test_the_simulator_reports_invalid_options(tmp_path: Path) -> None:
    assert "--fault nonsense: kind" in run_cli("simulator", "--fault", "nonsense", folder=tmp_path).stderr
    assert "--fault hang=2: probability" in run_cli("simulator", "--fault", "hang=2", folder=tmp_path).stderr
    assert "cannot listen" in run_cli("simulator", "--host", "192.0.2.1", folder=tmp_path).stderr
