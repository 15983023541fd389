"""The commands as a user types them, right and wrong."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import typer
from pydantic import SecretStr

from schemas.command import COMMAND
from tests.support.rig import PATIENCE_S, Proxy, Rig, a_command
from worker.__main__ import app
from worker.amqp.blocking import CommandClient, declare_on
from worker.dev.services.ports import free_port, wait_until
from worker.dev.services.processes import LocalProcess
from worker.settings import Settings

A_DEVICE = ("--imei", "865820030000001", "--obj-id", "1", "--obj-inst-id", "2", "--res-id", "3")


def type_in(*arguments: str, folder: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Call the program as a user would, with nothing set but what is named."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return subprocess.run(
        [sys.executable, "-m", "worker", *arguments],
        cwd=folder,
        env=kept | {"COLUMNS": "200", "PYTHONPATH": str(Path.cwd())} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def _paths(group: Any) -> Iterator[tuple[str, ...]]:
    for name, command in group.commands.items():
        yield (name,)
        if hasattr(command, "commands"):
            yield from ((name, *path) for path in _paths(command))


PATHS = list(_paths(typer.main.get_command(app)))  # of every command and subcommand


def test_without_a_command_it_says_what_there_is(tmp_path: Path) -> None:
    said = type_in(folder=tmp_path)
    assert all(path[0] in said.stdout for path in PATHS)


@pytest.mark.parametrize("path", PATHS, ids=" ".join)
def test_every_command_has_help_with_an_example(path: tuple[str, ...], tmp_path: Path) -> None:
    said = type_in(*path, "--help", folder=tmp_path)
    assert said.returncode == 0
    assert f"onenet-worker {' '.join(path)} " in said.stdout.partition("xample")[2].partition("Options")[0] + " "


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("onenet-worker dead-l", {"dead-letters"}),
        ("onenet-worker dead-letters ", {"list", "show", "replay", "discard"}),
        ("onenet-worker schema ", {"command", "reply", "asyncapi"}),
        ("onenet-worker dead-letters list --reason pois", {"poison_message"}),
    ],
)
def test_the_shell_completes_commands_and_their_words(typed: str, expected: set[str], tmp_path: Path) -> None:
    """As bash asks for it, once ``--install-completion`` was called."""
    words = typed.split(" ")
    asked = {"_ONENET_WORKER_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(len(words) - 1)}
    program = str(Path(sys.executable).with_name("onenet-worker"))
    said = subprocess.run([program], cwd=tmp_path, env=asked, capture_output=True, text=True, check=False)
    assert set(said.stdout.split()) == expected, said.stderr


def test_a_wrong_setting_stops_the_start_with_78(tmp_path: Path) -> None:
    said = type_in("run", folder=tmp_path, WORKER_CONCURRENCY="many", ONENET_API_KEY="k", LOG_LEVEL="loud")
    assert said.returncode == 78
    assert [line.split(": ")[1] for line in said.stderr.splitlines()] == ["WORKER_CONCURRENCY", "LOG_LEVEL"]
    assert said.stdout == ""


def test_without_credentials_run_says_which(tmp_path: Path) -> None:
    said = type_in("run", folder=tmp_path)
    assert said.returncode == 78
    assert "ONENET_API_KEY" in said.stderr


def test_a_schema_is_json_schema_2020_12(tmp_path: Path) -> None:
    command = json.loads(type_in("schema", "command", folder=tmp_path).stdout)
    assert command["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert set(command["properties"]) == set(COMMAND.json_schema()["properties"])
    assert set(command["required"]) == {"imei", "obj_id", "obj_inst_id", "res_id", "expired_time"}
    assert command["additionalProperties"] is False
    reply = json.loads(type_in("schema", "reply", folder=tmp_path).stdout)
    assert set(reply["required"]) == set(reply["properties"])
    assert type_in("schema", "nonsense", folder=tmp_path).returncode == 2


def test_the_topology_as_a_definitions_file_is_the_one_that_is_declared(rig: Rig, tmp_path: Path) -> None:
    environment = {"AMQP_URL": rig.broker_url, "WORKER_NAMESPACE": rig.topology.namespace, "WORKER_RETRY_DELAYS": "1,2"}
    said = type_in("topology", folder=tmp_path, **environment)
    assert said.returncode == 0, said.stderr
    assert rig.topology.execute_queue in said.stdout
    definitions = json.loads(type_in("topology", "--json", folder=tmp_path, **environment).stdout)
    for exchange in definitions["exchanges"]:
        rig.upstream.channel.exchange_declare(
            exchange["name"], exchange["type"], durable=exchange["durable"], arguments=exchange["arguments"]
        )
    for queue in definitions["queues"]:
        rig.upstream.channel.queue_declare(queue["name"], durable=queue["durable"], arguments=queue["arguments"])
    bindings = {(one["source"], one["destination"], one["routing_key"]) for one in definitions["bindings"]}
    name = rig.topology.namespace
    assert bindings >= {
        (f"{name}.commands", f"{name}.execute", "execute"),
        (f"{name}.returns", f"{name}.execute", "execute"),
        (f"{name}.dead-letters", f"{name}.dead-letters", "#"),
    }


def test_a_topology_that_differs_is_one_line(rig: Rig, tmp_path: Path) -> None:
    rig.upstream.channel.queue_declare(rig.topology.execute_queue, durable=True)
    said = type_in("topology", folder=tmp_path, AMQP_URL=rig.broker_url, WORKER_NAMESPACE=rig.topology.namespace)
    assert said.returncode == 78
    assert len(said.stderr.splitlines()) == 1
    assert "inequivalent arg" in said.stderr


def test_no_broker_is_one_line_without_the_password(tmp_path: Path) -> None:
    url = f"amqp://me:aSecret@127.0.0.1:{free_port()}/"
    for command in (("topology",), ("send", *A_DEVICE)):
        said = type_in(*command, folder=tmp_path, AMQP_URL=url)
        assert said.returncode == 1
        assert len(said.stderr.splitlines()) == 1
        assert "aSecret" not in said.stderr


def test_send_waits_for_the_reply(rig: Rig, tmp_path: Path) -> None:
    environment = {"AMQP_URL": rig.broker_url, "WORKER_NAMESPACE": rig.topology.namespace}
    with rig.worker():
        said = type_in("send", *A_DEVICE, "--args", "on", "--wait", folder=tmp_path, **environment)
        assert said.returncode == 0, said.stderr
        assert json.loads(said.stdout)["status"] == "accepted"
        refused = type_in("send", *A_DEVICE, "--product", "none", "--wait", folder=tmp_path, **environment)
        assert refused.returncode == 1
        assert json.loads(refused.stdout)["error"]["code"] == "unknown_product"


def test_send_says_what_is_wrong_before_anything_is_sent(tmp_path: Path) -> None:
    said = type_in("send", "--imei", "1", "--retry", "11", folder=tmp_path)
    assert said.returncode == 1
    assert all(field in said.stderr for field in ("imei", "retry", "obj_id"))
    assert "nothing was sent" in said.stderr


def test_send_without_a_worker_or_topology_says_what_to_do(rig: Rig, tmp_path: Path) -> None:
    said = type_in("send", *A_DEVICE, folder=tmp_path, AMQP_URL=rig.broker_url, WORKER_NAMESPACE="nowhere")
    assert said.returncode == 1
    assert "onenet-worker topology" in said.stderr


def test_a_file_is_sent_whole_or_not_at_all(rig: Rig, tmp_path: Path) -> None:
    environment = {"AMQP_URL": rig.broker_url, "WORKER_NAMESPACE": rig.topology.namespace}
    commands: list[dict[str, Any]] = [a_command(command_id=f"line-{number}", args="on") for number in range(50)]
    lines = [json.dumps(command) for command in commands]
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    good.write_text("\n".join(lines) + "\n\n")
    bad.write_text("\n".join([*lines[:7], '{"imei": 1}', *lines[7:], lines[0]]))
    with rig.worker():
        said = type_in("send", "--file", str(bad), "--wait", folder=tmp_path, **environment)
        assert said.returncode == 1
        assert "bad.jsonl:8: " in said.stderr
        assert "bad.jsonl:52: command_id: line-0 is a duplicate" in said.stderr
        said = type_in("send", "--file", str(good), "--wait", folder=tmp_path, **environment)
        assert said.returncode == 0, said.stderr
        assert {json.loads(line)["command_id"] for line in said.stdout.splitlines()} == {
            command["command_id"] for command in commands
        }
    assert len(rig.simulator.platform.commands) == 50
    both = type_in("send", "--file", str(good), "--imei", "1", folder=tmp_path)
    assert both.returncode == 1
    assert "--imei" in both.stderr


def lines_of(count: int) -> list[bytes]:
    return [json.dumps(a_command(command_id=f"line-{number}")).encode() for number in range(count)]


def test_thousands_of_lines_are_sent_however_they_were_written(rig: Rig, tmp_path: Path) -> None:
    """With a byte order mark, blank lines, and lines that end as on Windows."""
    declare_on(rig.upstream.channel, rig.topology)
    environment = {"AMQP_URL": rig.broker_url, "WORKER_NAMESPACE": rig.topology.namespace}
    file = tmp_path / "lines.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + b"\r\n\r\n  \r\n".join(lines_of(2_000)))
    said = type_in("send", "--file", str(file), folder=tmp_path, **environment)
    assert (said.returncode, said.stderr) == (0, "")
    assert said.stdout.splitlines() == [f"line-{number}" for number in range(2_000)]
    assert rig.upstream.count(rig.topology.execute_queue) == 2_000


def test_of_many_bad_lines_the_first_are_named_and_the_others_counted(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_bytes(b"\n".join([*lines_of(3), b'{"imei": "\xff"}', *[b"{}"] * 1_253]))
    said = type_in("send", "--file", str(file), folder=tmp_path)
    errors = said.stderr.splitlines()
    assert said.returncode == 1
    assert "lines.jsonl:4: the body is not UTF-8" in errors[0]
    assert errors[-2:] == ["and 1,234 more", "nothing was sent"]
    assert len(errors) == 22


def test_a_file_without_a_command_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_bytes(b"\n \n")
    said = type_in("send", "--file", str(file), folder=tmp_path)
    assert said.returncode == 1
    assert "no command" in said.stderr


def _cut_and_interrupt(client: CommandClient, proxy: Proxy) -> None:
    with client:
        proxy.cut()
        raise KeyboardInterrupt


def test_an_end_that_the_broker_does_not_answer_hides_nothing(rig: Rig) -> None:
    """As after a ctrl-C between two frames of one message: the broker closes the connection itself."""
    proxy = Proxy(rig.broker_url)
    settings = Settings(amqp_url=(SecretStr(proxy.url),))
    try:
        with pytest.raises(KeyboardInterrupt):
            _cut_and_interrupt(CommandClient(settings, rig.topology, app_id="cli", wants_replies=False), proxy)
    finally:
        proxy.close()


def test_a_file_that_is_interrupted_says_how_far_it_came(rig: Rig, tmp_path: Path) -> None:
    declare_on(rig.upstream.channel, rig.topology)
    file = tmp_path / "lines.jsonl"
    file.write_bytes(b"\n".join(lines_of(20_000)))
    environment = {"AMQP_URL": rig.broker_url, "WORKER_NAMESPACE": rig.topology.namespace}
    process = LocalProcess(["send", "--file", str(file)], environment, tmp_path / "output")
    wait_until(lambda: rig.upstream.count(rig.topology.execute_queue) >= 1, PATIENCE_S, "the first command")
    process.signal(signal.SIGINT)
    assert process.wait() == 130
    said = process.output.read_text().splitlines()
    found = re.match(r"onenet-worker: interrupted: ([0-9,]+) of 20,000 were sent; ", said[-1])
    assert found is not None
    sent = int(found[1].replace(",", ""))
    assert sent - (len(said) - 1) in {0, 1}  # the last one's line may not have been written yet
    assert rig.upstream.count(rig.topology.execute_queue) in {sent, sent + 1}  # one may have been on its way


def test_the_simulator_stops_on_both_signals(tmp_path: Path) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        port = free_port()
        simulator = LocalProcess(["simulator", "--port", str(port)], {}, tmp_path / f"simulator-{number}")
        simulator.wait_for_port(port)
        assert requests.get(f"http://127.0.0.1:{port}/control/commands", timeout=10).json() == []
        simulator.signal(number)
        assert simulator.wait() == 0
        assert "Traceback" not in simulator.output.read_text()


def test_the_simulator_says_what_is_wrong(tmp_path: Path) -> None:
    assert "--fault nonsense: kind" in type_in("simulator", "--fault", "nonsense", folder=tmp_path).stderr
    assert "--fault hang=2: probability" in type_in("simulator", "--fault", "hang=2", folder=tmp_path).stderr
    assert "cannot listen" in type_in("simulator", "--host", "192.0.2.1", folder=tmp_path).stderr


def test_the_demo_ends_as_it_should(broker_url: str, tmp_path: Path) -> None:
    said = type_in("demo", "--commands", "200", folder=tmp_path, AMQP_URL=broker_url)
    assert said.returncode == 0, said.stdout + said.stderr
    assert "0 of them twice" in said.stdout
    for code in ("outcome_unknown", "command_id_conflict", "retries_exhausted", "http_rejected"):
        assert code in said.stdout
    assert '"x-onenet-reason": "invalid_command"' in said.stdout
