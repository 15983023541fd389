"""``onenet-worker send``: what it says of each command, whatever happens meanwhile."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import pytest

from tests.support.builders import a_command
from tests.support.command_line import TARGET_OPTIONS, run_cli
from tests.support.deployment import Deployment
from tests.support.proxies import Proxy
from tests.support.simulator import onenet
from tests.support.terminal import assert_screen, show
from tests.support.waiting import PATIENCE_S
from worker.amqp.blocking import declare_on
from worker.amqp.connection import ALARM
from worker.dev.services.broker import LocalBroker
from worker.dev.services.ports import wait_until
from worker.dev.services.processes import LocalProcess
from worker.simulator.faults import Fault

AN_ID = "2f6c0a52-5d1e-4f5e-9a55-0d7c5f8b9f01"
LATER = "with IDEMPOTENCY_URL=memory:// nothing else tells what became of it; late replies are kept for a day"
RUN = "onenet-worker run"
FIXED = ("--command-id", AN_ID, "--expired-time", "2099-01-01T00:00:00Z")


@pytest.fixture
def declared(deployment: Deployment) -> Deployment:
    """A deployment without a worker."""
    declare_on(deployment.upstream.channel, deployment.topology)
    return deployment


def settings_of(deployment: Deployment, url: str = "") -> dict[str, str]:
    return {"AMQP_URL": url or deployment.broker_url, "WORKER_NAMESPACE": deployment.topology.namespace}


def a_file(folder: Path, count: int, **changes: Any) -> Path:
    lines = [json.dumps(a_command(command_id=f"line-{number}", **changes)) for number in range(count)]
    path = folder / "lines.jsonl"
    path.write_text("\n".join(lines))
    return path


def kept(deployment: Deployment) -> str:
    return deployment.topology.kept_replies_queue("cli")


def test_replies_that_nobody_waits_for_are_kept_and_never_unrouted(deployment: Deployment, tmp_path: Path) -> None:
    topology, upstream = deployment.topology, deployment.upstream
    worker = deployment.start_worker()
    with worker:
        worker.wait_for("consumer_started")
        result = run_cli("send", *TARGET_OPTIONS, folder=tmp_path, **settings_of(deployment))
        assert (result.returncode, result.stderr) == (0, "")
        found = upstream.get(kept(deployment))
        assert (found.json["command_id"], found.json["status"]) == (result.stdout.strip(), "accepted")
        assert found.routing_key.startswith("cli.send.")  # replies to the system itself are not taken from it
    assert upstream.count(topology.unrouted_exchange) == 0


def test_without_the_right_to_declare_a_queue_the_command_is_sent_all_the_same(
    own_broker: LocalBroker, tmp_path: Path
) -> None:
    user = f"user-{uuid4().hex[:8]}"
    own_broker.control("add_user", user, "password")
    own_broker.control("set_permissions", user, "^$", ".*", ".*")
    target = urlsplit(own_broker.url)
    with onenet() as simulator, Deployment.set_up(own_broker.url, tmp_path, simulator) as deployment:
        declare_on(deployment.upstream.channel, deployment.topology)
        environment = settings_of(deployment, f"amqp://{user}:password@{target.hostname}:{target.port}/")
        result = run_cli("send", *TARGET_OPTIONS, folder=tmp_path, **environment)
        sent = deployment.upstream.count(deployment.topology.execute_queue)
    own_broker.control("delete_user", user)
    assert (result.returncode, sent) == (0, 1)
    [line] = result.stderr.splitlines()
    assert line.endswith(f"this user may not declare and bind {kept(deployment)}")


@pytest.mark.parametrize("app_id", ["a*", "#", "x" * 201])
def test_a_sender_after_whom_no_queue_can_be_named_sends_all_the_same(
    app_id: str, declared: Deployment, tmp_path: Path
) -> None:
    result = run_cli("send", *TARGET_OPTIONS, "--app-id", app_id, folder=tmp_path, **settings_of(declared))
    assert result.returncode == 0, result.stderr
    assert "no queue can be named after" in result.stderr


def test_a_wait_without_a_worker_says_what_is_known_and_its_late_reply_is_kept(
    declared: Deployment, tmp_path: Path
) -> None:
    result = run_cli(
        "send", *TARGET_OPTIONS, *FIXED, "--wait", "--wait-timeout", "0", folder=tmp_path, **settings_of(declared)
    )
    queue = declared.topology.execute_queue
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.splitlines() == [
        f"onenet-worker: the reply of {AN_ID} has not arrived within 0 s",
        f"onenet-worker: {AN_ID} was sent, so that its reply still comes: {LATER} in {kept(declared)}",
        f"onenet-worker: commands may wait: no worker consumes {queue}: start one with {RUN}",
    ]
    with declared.start_worker() as worker:
        worker.wait_for("consumer_started")
        assert declared.upstream.get(kept(declared)).json["command_id"] == AN_ID
    assert declared.upstream.count(declared.topology.unrouted_exchange) == 0


def test_with_shared_records_the_command_status_is_named(declared: Deployment, tmp_path: Path) -> None:
    settings = settings_of(declared) | {"IDEMPOTENCY_URL": "redis://127.0.0.1:1/0"}  # that of the workers
    result = run_cli("send", *TARGET_OPTIONS, *FIXED, "--wait", "--wait-timeout", "0", folder=tmp_path, **settings)
    assert f"onenet-worker status {AN_ID} tells what became of it" in result.stderr


def test_a_wait_says_soon_why_no_reply_may_come(declared: Deployment, tmp_path: Path) -> None:
    process = LocalProcess(["send", *TARGET_OPTIONS, *FIXED, "--wait"], settings_of(declared), tmp_path / "output")
    process.wait_for_output(f"commands may wait: no worker consumes {declared.topology.execute_queue}")
    with declared.start_worker():
        assert process.wait(PATIENCE_S) == 0
    assert '"status": "accepted"' in process.output.read_text()


@pytest.mark.parametrize(
    ("options", "said"),
    [(("--wait-timeout", "5"), "needs --wait"), (("--wait", "--result-timeout", "5"), "needs --wait-result")],
    ids=str,
)
def test_a_limit_of_a_wait_that_was_not_asked_for_is_refused(
    options: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    result = run_cli("send", *TARGET_OPTIONS, *options, folder=tmp_path)
    assert (result.returncode, said in result.stderr) == (2, True)


@pytest.mark.parametrize(
    "text",
    [json.dumps([{"imei": "1"}], indent=1), "imei,obj_id\n865820030000001,1\n", '{"imei": "1"}\n'],
    ids=["a list", "CSV", "UTF-16"],
)
def test_a_file_of_another_format_says_which_is_read(text: str, tmp_path: Path) -> None:
    file = tmp_path / "commands"
    file.write_bytes(text.encode("utf-16" if 'imei": "1"}\n' in text else "utf-8"))
    result = run_cli("send", "--file", str(file), folder=tmp_path)
    assert result.returncode == 1
    assert "a file has one command on each line, as a JSON object in UTF-8, not a list and not CSV" in result.stderr


def test_an_interrupted_wait_says_which_replies_are_missing(declared: Deployment, tmp_path: Path) -> None:
    process = LocalProcess(
        ["send", "--file", str(a_file(tmp_path, 12)), "--wait"], settings_of(declared), tmp_path / "output"
    )
    wait_until(lambda: declared.upstream.count(declared.topology.execute_queue) == 12, PATIENCE_S, "all commands")
    process.signal(signal.SIGINT)
    assert process.wait() == 130
    first = process.output.read_text().splitlines()[0].removeprefix("onenet-worker: interrupted: ")
    # The last confirm may have been under way.
    assert first.startswith(("12 of 12 replies have not arrived", "11 of 12 were sent; it is not known whether the "))
    assert "late replies are kept for a day" in process.output.read_text()


def test_a_file_ends_with_a_summary_by_outcome(deployment: Deployment, tmp_path: Path) -> None:
    file = a_file(tmp_path, 5)
    with file.open("a") as lines:
        for number in range(2):
            lines.write("\n" + json.dumps(a_command(command_id=f"other-{number}", product="nowhere")))
        lines.write("\n" + json.dumps(a_command(command_id="late", expired_time="2020-01-01T00:00:00.5")))
    with deployment.worker():
        result = run_cli("send", "--file", str(file), "--wait", folder=tmp_path, **settings_of(deployment))
    assert result.returncode == 1
    assert len(result.stdout.splitlines()) == 8
    assert result.stderr.splitlines() == [
        "onenet-worker: replies: accepted 5, failed unknown_product 2, failed expired 1"
    ]


def test_results_are_a_phase_of_their_own_with_a_summary(broker_url: str, tmp_path: Path) -> None:
    with onenet() as simulator, Deployment.set_up(broker_url, tmp_path, simulator, result_delays_s=(1,)) as deployment:
        environment = settings_of(deployment) | deployment.result_settings
        file = a_file(tmp_path, 2)
        with deployment.worker():
            result = run_cli(
                "send", "--file", str(file), "--wait-result", "--result-timeout", "0", folder=tmp_path, **environment
            )
        assert result.returncode == 1
        lines = result.stderr.splitlines()
        assert lines[0] == "onenet-worker: 2 of 2 results have not arrived within 0 s"
        assert lines[2:4] == ["onenet-worker: replies: accepted 2", "onenet-worker: results: none yet 2"]
        assert "no result yet to line-" in lines[4]


def test_a_file_is_read_from_stdin(declared: Deployment, tmp_path: Path) -> None:
    lines = a_file(tmp_path, 3).read_text()
    result = run_cli("send", "--file", "-", folder=tmp_path, stdin=lines, **settings_of(declared))
    assert (result.returncode, result.stderr) == (0, "onenet-worker: all 3 commands were sent\n")
    assert result.stdout.splitlines() == ["line-0", "line-1", "line-2"]
    wrong = run_cli("send", "--file", "-", folder=tmp_path, stdin='\n{"imei": 1,\n', **settings_of(declared))
    assert wrong.stderr.startswith(
        "onenet-worker: stdin:2: the body is not JSON: column 12: a name in double quotes, or }, is expected: "
    )


def test_a_reader_of_the_output_that_ends_leaves_no_command_unsent(declared: Deployment, tmp_path: Path) -> None:
    """As ``| head -1`` does."""
    arguments = [sys.executable, "-m", "worker", "send", "--file", str(a_file(tmp_path, 3_000))]
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd()), **settings_of(declared)}
    with subprocess.Popen(
        arguments, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "line-0\n"
        process.stdout.close()
        said = process.stderr.read()
    assert said == "onenet-worker: nobody reads the output any more: all 3,000 commands were sent\n"
    assert process.returncode == 1
    assert declared.upstream.count(declared.topology.execute_queue) == 3_000


def test_an_id_of_ones_own_needs_an_expired_time_of_ones_own(declared: Deployment, tmp_path: Path) -> None:
    """The default moves, so that the second time would be a conflict."""
    arguments = ("send", *TARGET_OPTIONS, "--command-id", AN_ID)
    refused = run_cli(*arguments, folder=tmp_path, **settings_of(declared))
    assert refused.returncode == 2
    found = re.search(r"add (--expired-time [0-9-]+T[0-9:]+Z)\n$", refused.stderr)
    assert found is not None
    for _ in range(2):
        again = run_cli(*arguments, *found[1].split(), folder=tmp_path, **settings_of(declared))
        assert (again.returncode, again.stdout) == (0, f"{AN_ID}\n")
    declared.upstream.bind_replies()
    with declared.worker():
        first, second = (declared.upstream.reply() for _ in range(2))
    assert first.json == second.json
    assert first.json["status"] == "accepted"


def test_a_conflict_names_the_fields_that_differ(deployment: Deployment, tmp_path: Path) -> None:
    with deployment.worker():
        arguments = ("send", *TARGET_OPTIONS, "--command-id", AN_ID, "--wait")
        for options in (("2099-01-01T00:00:00Z", "--args", "on"), ("2099-01-01T00:00:01Z", "--args", "off")):
            result = run_cli(*arguments, "--expired-time", *options, folder=tmp_path, **settings_of(deployment))
    error = json.loads(result.stdout)["error"]
    assert error["code"] == "command_id_conflict"
    assert error["message"].endswith(": expired_time, args differ")
    assert [each["field"] for each in error["details"]] == ["command_id", "expired_time", "args"]
    assert "2099" not in json.dumps(error)


@pytest.mark.parametrize("columns", [80, 120])
def test_the_screens_of_a_result(columns: int, broker_url: str, tmp_path: Path) -> None:
    with onenet() as simulator, Deployment.set_up(broker_url, tmp_path, simulator, result_delays_s=(1,)) as deployment:
        simulator.platform.replace_devices({"*": "up:BAD_REQUEST"})
        named = {deployment.topology.namespace: "test-12345678"}
        with deployment.worker():
            screen = _screen(deployment, tmp_path, (*TARGET_OPTIONS, "--wait-result"), columns)
            assert_screen(f"send-result-{columns}", screen, named)
        with deployment.worker(WORKER_RESULTS="off"):
            arguments = (*TARGET_OPTIONS, "--wait-result", "--result-timeout", "0")
            screen = _screen(deployment, tmp_path, arguments, columns)
            assert_screen(f"send-no-result-{columns}", screen, named)


@pytest.fixture
def alarmed(own_broker: LocalBroker, tmp_path: Path) -> Iterator[Deployment]:
    """A deployment whose broker has an alarm of its memory."""
    with onenet() as simulator, Deployment.set_up(own_broker.url, tmp_path, simulator) as deployment:
        declare_on(deployment.upstream.channel, deployment.topology)
        own_broker.control("set_vm_memory_high_watermark", "absolute", "1MB")
        try:
            yield deployment
        finally:  # otherwise every other test would be blocked
            own_broker.control("set_vm_memory_high_watermark", "0.6")


def test_an_alarm_of_the_broker_is_said_and_ends_the_command(
    alarmed: Deployment, own_broker: LocalBroker, tmp_path: Path
) -> None:
    file = a_file(tmp_path, 50)
    process = LocalProcess(["send", "--file", str(file)], settings_of(alarmed), tmp_path / "output")
    assert process.wait() == 1
    lines = process.output.read_text().splitlines()
    assert lines[-2].startswith(f"onenet-worker: {ALARM}") or lines[-3].startswith(f"onenet-worker: {ALARM}")
    said = re.search(
        r"^onenet-worker: ([0-9]+) of 50 were sent; it is not known whether the broker stored line-\1; ([0-9]+) were",
        "\n".join(lines), re.MULTILINE,
    )  # fmt: skip
    assert said is not None, lines
    sent = int(said[1])
    own_broker.control("set_vm_memory_high_watermark", "0.6")
    assert alarmed.upstream.count(alarmed.topology.execute_queue) in {sent, sent + 1}
    again = run_cli("send", "--file", str(file), folder=tmp_path, **settings_of(alarmed))
    assert (again.returncode, again.stderr) == (0, "onenet-worker: all 50 commands were sent\n")


def test_a_lost_connection_tells_which_commands_were_sent(declared: Deployment, tmp_path: Path) -> None:
    with closing(Proxy(declared.broker_url)) as proxy:
        file = a_file(tmp_path, 20_000)
        process = LocalProcess(["send", "--file", str(file)], settings_of(declared, proxy.url), tmp_path / "output")
        wait_until(lambda: declared.upstream.count(declared.topology.execute_queue) > 0, PATIENCE_S, "a command")
        proxy.cut()
        assert process.wait() == 1
    lines = process.output.read_text().splitlines()
    ids = [line for line in lines if line.startswith("line-")]
    assert lines[len(ids)].startswith("onenet-worker: the connection was lost: ")
    assert lines[len(ids) + 1] == (
        f"onenet-worker: {len(ids):,} of 20,000 were sent; it is not known whether the broker stored line-{len(ids)}; "
        f"{20_000 - len(ids) - 1:,} were not sent, from line-{len(ids) + 1} on; send all of them again: ids that were "
        "already sent have no second effect"
    )
    assert declared.upstream.count(declared.topology.execute_queue) in {len(ids), len(ids) + 1}


def test_ids_reach_a_file_while_the_terminal_shows_a_progress_bar(declared: Deployment, tmp_path: Path) -> None:
    """As with ``send --file commands.jsonl >ids.txt``."""
    leader, follower = pty.openpty()
    result = subprocess.run(
        [sys.executable, "-m", "worker", "send", "--file", str(a_file(tmp_path, 3))],
        env={**os.environ, "TERM": "xterm", "PYTHONPATH": str(Path.cwd()), **settings_of(declared)},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=follower,
        text=True,
        check=False,
    )
    os.close(follower)
    os.close(leader)
    assert (result.returncode, result.stdout) == (0, "line-0\nline-1\nline-2\n")


def _screen(
    deployment: Deployment, folder: Path, arguments: Sequence[str], columns: int, interrupted_at: str | None = None
) -> str:
    environment = {"TERM": "dumb", "NO_PROXY": "127.0.0.1", **settings_of(deployment), **deployment.result_settings}
    shown = show(("send", *arguments), folder, environment, columns=columns, interrupted_at=interrupted_at).text
    shown = re.sub(r"[0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}", AN_ID, shown)
    shown = re.sub(r"[0-9]{4}-[0-9-]{5}T[0-9:]{8}\.[0-9]+Z", "2026-11-22T08:00:00.123456Z", shown)
    shown = re.sub(r"(add --expired-time |_at\": \")[0-9-]+T[0-9:]+Z", r"\g<1>2026-11-23T08:00:00Z", shown)
    return re.sub(r"it was 20[0-9-]+ [0-9:]{8}", "it was 2026-11-22 08:00:00", shown)


@pytest.mark.parametrize("columns", [80, 120])
def test_the_screens_of_send(columns: int, deployment: Deployment, tmp_path: Path) -> None:
    named = {deployment.topology.namespace: "test-12345678"}

    def check(name: str, *arguments: str, interrupted_at: str | None = None) -> None:
        screen = _screen(deployment, tmp_path, arguments, columns, interrupted_at)
        assert_screen(f"send-{name}-{columns}", screen, named)

    declare_on(deployment.upstream.channel, deployment.topology)
    check("times-out", *TARGET_OPTIONS, "--wait", "--wait-timeout", "0")
    check("interrupted", *TARGET_OPTIONS, "--wait", interrupted_at="waiting for its reply")
    check("sent", *TARGET_OPTIONS)
    check("wrong-time", *TARGET_OPTIONS, "--expired-time", "soon")
    check("id-without-expired-time", *TARGET_OPTIONS, "--command-id", "a")
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text('{"imei": 865820030000001, "retry": 11}\n{"imei": "1"\n\n["x"]\n')
    check("errors-of-a-file", "--file", "wrong.jsonl")
    file = a_file(tmp_path, 3)
    with file.open("a") as lines:
        lines.write("\n" + json.dumps(a_command(command_id="other", product="nowhere")))
    with deployment.worker():
        shown = _screen(deployment, tmp_path, ("--file", "lines.jsonl", "--wait"), columns)
        replies: list[str] = []
        others: list[str] = []
        for line in shown.split("\n"):  # the replies come in any order
            (replies if line.startswith("{") else others).append(line)
        assert len(replies) == 4
        assert_screen(f"send-summary-{columns}", "\n".join(others), named)
        check("accepted", *TARGET_OPTIONS, "--wait")
        check("failed", *TARGET_OPTIONS, "--wait", "--expired-time", "2020-01-01T08:00:00")
        deployment.simulator.faults.replace([Fault(kind="errno", errno=1, error="auth failed")])
        check("rejected", *TARGET_OPTIONS, "--wait")
