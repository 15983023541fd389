"""The dead letters on a real broker: looked at without a trace, brought back, discarded."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pika
import pytest
from pydantic import SecretStr

from tests.support.rig import API_KEY, PATIENCE_S, SETTLE_S, Proxy, Rig, a_command, onenet
from worker.amqp.blocking import connect_blocking, declare_on
from worker.cli.dead_letters import list_dead_letters
from worker.dead_letters.reader import DeadLetterReader
from worker.dev.services.ports import free_port, wait_until
from worker.dev.services.processes import LocalProcess
from worker.errors import BrokerUnavailable, WorkerError
from worker.settings import Settings
from worker.simulator.faults import Fault

NOW = datetime.now(UTC)


@pytest.fixture
def rig(broker_url: str, tmp_path: Path) -> Iterator[Rig]:
    with onenet() as simulator, Rig.set_up(broker_url, tmp_path, simulator, SETTLE_S) as found:
        declare_on(found.upstream.channel, found.topology)
        yield found


def set_aside(
    rig: Rig,
    *ids: str,
    reason: str = "retries_exhausted",
    failed_at: datetime = NOW,
    app_id: str = "billing",
    **fields: Any,
) -> None:
    """Put dead letters there as a worker does."""
    headers = {"x-onenet-reason": reason, "x-onenet-error": "as it is", "x-onenet-failed-at": failed_at.isoformat()}
    for command_id in ids:
        body = json.dumps(a_command(command_id=command_id, **fields)).encode()
        properties = pika.BasicProperties(delivery_mode=2, headers=headers, app_id=app_id)
        rig.upstream.channel.basic_publish(rig.topology.dead_letters_exchange, f"execute.{reason}", body, properties)


def look(rig: Rig, url: str | None = None) -> DeadLetterReader:
    settings = Settings(amqp_url=(SecretStr(url or rig.broker_url),), worker_namespace=rig.topology.namespace)
    connection, _ = connect_blocking(settings)
    return DeadLetterReader(connection, rig.topology, settings.platform_zone)


def seen(rig: Rig, count: int) -> list[str | None]:
    """Return the ids in order, once so many letters are there; what a connection held takes a moment to be back."""
    wait_until(lambda: rig.upstream.count(rig.topology.dead_letters_exchange) == count, PATIENCE_S, "the letters")
    with look(rig) as found:
        return [letter.command_id for letter in found.fetch_all()]


class Typed:
    """The command line of one namespace."""

    def __init__(self, rig: Rig, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            "AMQP_URL": rig.broker_url,
            "WORKER_NAMESPACE": rig.topology.namespace,
            "COLUMNS": "200",
            "PYTHONPATH": str(Path.cwd()),
            "PATH": os.environ["PATH"],
        }

    def __call__(self, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "worker", "dead-letters", *arguments],
            cwd=self.folder,
            env=self.environment | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )

    def listed(self, *arguments: str) -> list[Any]:
        """Return what a list has, as JSON."""
        said = self("list", "--json", *arguments)
        assert said.returncode == 0, said.stderr
        return [json.loads(line) for line in said.stdout.splitlines()]

    def ids(self, *arguments: str) -> list[str]:
        return [line["command_id"] for line in self.listed(*arguments)]


@pytest.fixture
def typed(rig: Rig, tmp_path: Path) -> Typed:
    return Typed(rig, tmp_path)


NAMES = [f"letter-{number}" for number in range(12)]


def test_looking_again_and_again_loses_nothing_and_moves_nothing(rig: Rig) -> None:
    """By itself RabbitMQ 4 forgets a message that was taken and given back for the 21st time."""
    set_aside(rig, *NAMES)
    for _ in range(30):
        assert seen(rig, len(NAMES)) == NAMES


def test_a_look_that_is_cut_off_gives_everything_back_in_its_order(rig: Rig) -> None:
    set_aside(rig, *NAMES)
    proxy = Proxy(rig.broker_url)
    cut = look(rig, proxy.url)
    assert len(cut.fetch_all()) == len(NAMES)
    proxy.cut()
    assert seen(rig, len(NAMES)) == NAMES
    with pytest.raises(BrokerUnavailable):
        cut.__exit__(None, None, None)  # what was acknowledged last may not have arrived
    proxy.close()


def test_what_comes_while_somebody_looks_comes_behind(rig: Rig) -> None:
    set_aside(rig, *NAMES[:6])
    with look(rig) as found:
        letters = found.fetch_all()
        assert len(letters) == 6
        set_aside(rig, *NAMES[6:9])
        for letter in letters[2:4]:
            found.discard(letter)
        set_aside(rig, *NAMES[9:])
        found.wait(0.1)  # for what would be delivered in the place of those
    assert seen(rig, 10) == NAMES[:2] + NAMES[4:]


def test_only_one_looks_at_a_time(rig: Rig) -> None:
    """What two hold at once would come back in the order in which they end."""
    set_aside(rig, *NAMES)
    with look(rig) as first:
        first.fetch_all()
        with pytest.raises(WorkerError, match="another command is reading"):
            look(rig)
    assert seen(rig, len(NAMES)) == NAMES


def test_what_is_discarded_is_gone_and_the_others_keep_their_places(rig: Rig, typed: Typed) -> None:
    set_aside(rig, *NAMES)
    said = typed("discard", NAMES[2], NAMES[5], "--id", NAMES[6], "--yes")
    assert (said.returncode, said.stdout) == (0, "discarded 3 dead letters\n")
    left = [name for name in NAMES if name not in {NAMES[2], NAMES[5], NAMES[6]}]
    assert seen(rig, 9) == left
    assert typed("discard", "--all", "--yes", "--limit", "4").returncode == 0
    assert seen(rig, 5) == left[4:]


def test_thousands_of_letters_are_looked_at_in_their_order(rig: Rig) -> None:
    """More than the 2,000 that a consumer without a prefetch is given."""
    names = [str(number) for number in range(5_000)]
    set_aside(rig, *names)
    for _ in range(2):
        assert seen(rig, len(names)) == names


def test_a_selection_takes_what_every_condition_fits(rig: Rig, typed: Typed) -> None:
    set_aside(rig, "old", reason="expired", failed_at=NOW - timedelta(days=2))
    set_aside(rig, "invalid", reason="invalid_command", imei="1")
    set_aside(rig, "theirs", app_id="metering")
    set_aside(rig, "other-device", imei="865820030000002")
    assert typed.ids() == ["old", "invalid", "theirs", "other-device"]
    assert typed.ids("--reason", "expired", "--reason", "invalid_command") == ["old", "invalid"]
    assert typed.ids("--source", "metering") == ["theirs"]
    assert typed.ids("--device", "865820030000002") == ["other-device"]
    assert typed.ids("--older-than", "1d") == ["old"]
    assert typed.ids("--newer-than", "1d", "--reason", "expired") == []
    assert typed.ids("--id", "theirs", "--id", "old") == ["old", "theirs"]
    assert typed.ids("--limit", "2") == ["old", "invalid"]
    table = typed("list")
    assert "865820030000002" in table.stdout
    assert "4 dead letters" in table.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("list", "--reason", "nonsense"), 2, "outcome_unknown"),
        (("list", "--older-than", "5"), 2, "90s, 15m, 2h or 7d"),
        (("replay", "--all", "--rate", "fast"), 2, "200/second"),
        (("replay",), 1, "--all"),
        (("discard", "--yes"), 1, "--all"),
        (("discard", "--all", "--reason", "expired", "--yes"), 1, "one or the other"),
        (("discard", "--all"), 1, "--yes"),
        (("show", "nobody"), 1, "nobody"),
        (("replay", "nobody"), 1, "nothing was replayed"),
        (("discard", "nobody", "--yes"), 1, "nothing was discarded"),
        (("list", "--reason", "expired"), 0, "0 dead letters"),
    ],
)
def test_what_cannot_be_done_is_said(rig: Rig, typed: Typed, arguments: tuple[str, ...], code: int, words: str) -> None:
    set_aside(rig, "somebody")
    said = typed(*arguments)
    assert said.returncode == code
    assert words in said.stderr
    assert seen(rig, 1) == ["somebody"]


def test_without_a_broker_or_a_queue_it_says_so(typed: Typed) -> None:
    said = typed("list", AMQP_URL=f"amqp://me:aSecret@127.0.0.1:{free_port()}/")
    assert (said.returncode, len(said.stderr.splitlines())) == (1, 1)
    assert "aSecret" not in said.stderr
    said = typed("list", WORKER_NAMESPACE="nowhere")
    assert said.returncode == 1
    assert "onenet-worker topology" in said.stderr


def test_show_shows_all_there_is_and_steers_no_terminal(rig: Rig, typed: Typed) -> None:
    properties = pika.BasicProperties(
        message_id="odd", headers={"colour": "\x1b[31mred", "n": 7}, app_id="up\x07stream"
    )
    exchange = rig.topology.dead_letters_exchange
    rig.upstream.channel.basic_publish(exchange, "execute.x", b"\xff\x1b[2J\nend", properties)
    set_aside(rig, "tidy", args="on")
    odd = typed("show", "odd")
    assert odd.returncode == 0, odd.stderr
    assert "\x1b" not in odd.stdout + typed("list").stdout
    assert "\\x1b[31mred" in odd.stdout
    assert "\\xff\\x1b[2J" in odd.stdout
    as_json = json.loads(typed("show", "odd", "--json").stdout)
    assert (as_json["body_base64"], as_json["headers"]["n"]) == ("/xtbMkoKZW5k", 7)
    assert as_json["reason"] == "broker: unknown"
    tidy = typed("show", "tidy").stdout
    assert '"args": "on"' in tidy
    assert "x-onenet-failed-at" in tidy


def test_a_dry_run_changes_nothing(rig: Rig, typed: Typed) -> None:
    set_aside(rig, *NAMES)
    for command in ("replay", "discard"):
        said = typed(command, "--all", "--dry-run", "--json", "--limit", "5")
        assert [json.loads(line)["command_id"] for line in said.stdout.splitlines()] == NAMES[:5]
        unknown = typed(command, "nobody", "--dry-run")
        assert (unknown.returncode, unknown.stdout) == (1, "")
        assert "--json needs --dry-run" in typed(command, "--all", "--json").stderr
    assert "--limit 4" in typed("replay", "--all", "--rate", "10/hour", "--dry-run").stderr
    assert seen(rig, len(NAMES)) == NAMES
    assert rig.upstream.count(rig.topology.execute_queue) == 0


def test_of_more_letters_than_one_reader_can_hold_it_is_said_that_the_order_goes(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("worker.dead_letters.reader.MAX_PREFETCH", 6)
    set_aside(rig, *NAMES)
    monkeypatch.setenv("AMQP_URL", rig.broker_url)
    monkeypatch.setenv("ONENET_API_KEY", API_KEY)
    monkeypatch.setenv("WORKER_NAMESPACE", rig.topology.namespace)
    list_dead_letters(as_json=True)
    said = capsys.readouterr()
    assert [json.loads(line)["command_id"] for line in said.out.splitlines()] == NAMES[:6]
    assert "only 6 of 12 dead letters can be read at once; their order is lost" in said.err
    monkeypatch.undo()
    assert set(seen(rig, len(NAMES))) == set(NAMES)


def test_what_was_not_sent_is_sent_when_it_is_replayed(rig: Rig, typed: Typed) -> None:
    """The worker has its failure on record, and would otherwise only repeat it."""
    command = a_command(args="on")
    with rig.worker(
        ONENET_URL=f"http://127.0.0.1:{free_port()}", WORKER_MAX_ATTEMPTS="1", WORKER_PAUSE_AFTER="9"
    ) as worker:
        rig.upstream.publish(command, app_id="billing", correlation_id="c", expiration="3600000")
        assert rig.upstream.reply().json["error"]["code"] == "retries_exhausted"
        assert typed("replay", "--reason", "retries_exhausted").stdout == "replayed 1 dead letter\n"
        worker.wait_for("command_failed", count=2)
    again = rig.upstream.reply()
    assert (again.json["attempts"], again.properties.correlation_id) == (1, "c")
    with rig.worker():
        assert typed("replay", command["command_id"]).returncode == 0
        accepted = rig.upstream.reply()
    assert (accepted.json["status"], accepted.json["command_id"]) == ("accepted", command["command_id"])
    assert accepted.routing_key == "execute.accepted.billing"
    assert len(rig.simulator.platform.commands) == 1
    assert typed.ids() == []


def test_what_may_have_been_cached_is_looked_up_when_it_is_replayed(rig: Rig, typed: Typed) -> None:
    command = a_command(args="on")
    rig.simulator.faults.replace([Fault(kind="drop_after_caching")])
    with rig.worker(WORKER_IN_DOUBT="dead-letter"):
        rig.upstream.publish(command)
        assert rig.upstream.reply().json["error"]["code"] == "outcome_unknown"
        rig.simulator.faults.replace([])
        assert typed("replay", "--all").returncode == 0
        reply = rig.upstream.reply().json
    assert (reply["status"], reply["recovered"]) == ("accepted", True)
    assert [kept.uuid for kept in rig.simulator.platform.commands] == [reply["uuid"]]


def test_what_the_broker_set_aside_is_shown_and_goes_back_in_doubt(rig: Rig, typed: Typed) -> None:
    command = a_command(args="on")
    rig.upstream.publish(command, headers={"x-onenet-reason": "retries_exhausted"})
    channel, queue = rig.upstream.channel, rig.topology.execute_queue

    def give_back() -> bool:
        method, _, _ = channel.basic_get(queue)
        if method is not None:
            channel.basic_nack(method.delivery_tag or 0)
        return rig.upstream.count(rig.topology.dead_letters_exchange) == 1

    wait_until(give_back, PATIENCE_S, "the broker's own dead letter")
    [letter] = typed.listed("--reason", "broker")
    assert letter["reason"] == "broker: delivery_limit"
    assert NOW - timedelta(minutes=1) < datetime.fromisoformat(letter["failed_at"]) < NOW + timedelta(minutes=10)
    assert typed("replay", command["command_id"]).returncode == 0
    with rig.worker() as worker:
        worker.wait_for("command_in_doubt")
        assert rig.upstream.reply().json["status"] == "accepted"
    assert len(rig.simulator.platform.commands) == 1


def test_an_interrupted_replay_says_how_far_it_came_and_loses_nothing(rig: Rig, tmp_path: Path) -> None:
    set_aside(rig, *NAMES)
    environment = {"AMQP_URL": rig.broker_url, "WORKER_NAMESPACE": rig.topology.namespace}
    process = LocalProcess(["dead-letters", "replay", "--all", "--rate", "60/minute"], environment, tmp_path / "replay")
    wait_until(lambda: rig.upstream.count(rig.topology.execute_queue) >= 1, PATIENCE_S, "the first replay")
    process.signal(signal.SIGINT)
    assert process.wait() == 130
    done = rig.upstream.count(rig.topology.execute_queue)
    assert f"replayed {done} of 12 dead letters" in process.output.read_text()
    assert seen(rig, len(NAMES) - done) == NAMES[done:]


def test_a_replay_that_would_hold_letters_too_long_is_refused(rig: Rig, typed: Typed) -> None:
    set_aside(rig, *NAMES)
    said = typed("replay", "--all", "--rate", "10/hour")
    assert said.returncode == 1
    assert "--limit 4" in said.stderr
    assert seen(rig, len(NAMES)) == NAMES
