"""Dead letters on a real broker: listed without side effects, replayed, discarded."""

import json
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pika
import pytest
from pydantic import SecretStr

from schemas.command import MAX_BODY_BYTES
from tests.support.builders import a_command
from tests.support.command_line import run_cli
from tests.support.dead_letters import NOW, DeadLettersCommand, publish_dead_letters
from tests.support.deployment import SOON_CERTAIN, SOON_S, Deployment
from tests.support.proxies import Proxy
from tests.support.simulator import API_KEY, onenet
from tests.support.startup_code import run_at_startup
from tests.support.waiting import PATIENCE_S
from worker.amqp.blocking import declare_on
from worker.cli.dead_letters import list_dead_letters
from worker.dead_letters.letter import DeadLetter
from worker.dead_letters.reader import DeadLetterReader
from worker.dev.services.ports import free_port, wait_until
from worker.dev.services.processes import LocalProcess
from worker.errors import BrokerUnavailable, WorkerError
from worker.settings import Settings
from worker.simulator.faults import Fault

pytestmark = pytest.mark.broker_version


@pytest.fixture
def deployment(broker_url: str, tmp_path: Path) -> Iterator[Deployment]:
    with onenet() as simulator, Deployment.set_up(broker_url, tmp_path, simulator, SOON_S) as found:
        declare_on(found.upstream.channel, found.topology)
        yield found


def open_reader(deployment: Deployment, url: str | None = None) -> DeadLetterReader:
    settings = Settings(
        amqp_url=(SecretStr(url or deployment.broker_url),), worker_namespace=deployment.topology.namespace
    )
    return DeadLetterReader(settings.broker_address, deployment.topology, settings.platform_zone)


def all_of(reader: DeadLetterReader) -> list[DeadLetter]:
    found: list[DeadLetter] = []
    reader.read(found.append)
    return found


def read_ids(deployment: Deployment, count: int) -> list[str | None]:
    """Return the ids in order, once the queue has ``count`` dead letters: a closed reader returns them with a delay."""
    wait_until(
        lambda: deployment.upstream.count(deployment.topology.dead_letters_exchange) == count,
        PATIENCE_S,
        "the dead letters",
    )
    with open_reader(deployment) as found:
        return [letter.command_id for letter in all_of(found)]


@pytest.fixture
def dead_letters(deployment: Deployment, tmp_path: Path) -> DeadLettersCommand:
    return DeadLettersCommand(deployment, tmp_path)


IDS = [f"command-{number}" for number in range(12)]


def test_repeated_reads_keep_all_dead_letters_in_order(deployment: Deployment) -> None:
    """By default RabbitMQ 4 drops a message that a consumer returns for the 21st time."""
    publish_dead_letters(deployment, *IDS)
    for _ in range(30):
        assert read_ids(deployment, len(IDS)) == IDS


def test_dead_letters_return_in_order_when_their_reader_loses_its_connection(deployment: Deployment) -> None:
    publish_dead_letters(deployment, *IDS)
    proxy = Proxy(deployment.broker_url)
    cut = open_reader(deployment, proxy.url)
    assert len(all_of(cut)) == len(IDS)
    proxy.cut()
    assert read_ids(deployment, len(IDS)) == IDS
    with pytest.raises(BrokerUnavailable):
        cut.__exit__(None, None, None)  # the last acknowledgements may have been lost
    proxy.close()


def test_dead_letters_that_arrive_during_a_read_are_queued_last(deployment: Deployment) -> None:
    publish_dead_letters(deployment, *IDS[:6])
    with open_reader(deployment) as found:
        letters = all_of(found)
        assert len(letters) == 6
        publish_dead_letters(deployment, *IDS[6:9])
        for letter in letters[2:4]:
            found.remove(letter.tag)
        publish_dead_letters(deployment, *IDS[9:])
        found.wait(0.1)  # for deliveries that replace the discarded ones
    assert read_ids(deployment, 10) == IDS[:2] + IDS[4:]


def test_a_second_reader_of_dead_letters_is_refused(deployment: Deployment) -> None:
    """Two readers would return their dead letters in the order in which they close."""
    publish_dead_letters(deployment, *IDS)
    with open_reader(deployment) as first:
        all_of(first)
        with pytest.raises(WorkerError, match="another command is reading"):
            open_reader(deployment)
    assert read_ids(deployment, len(IDS)) == IDS


def test_a_second_reader_waits_for_one_that_is_about_to_end(deployment: Deployment) -> None:
    """As a page that is opened while somebody lists them."""
    publish_dead_letters(deployment, *IDS)
    with ThreadPoolExecutor(1) as executor:
        with open_reader(deployment):
            second = executor.submit(open_reader, deployment)
        with second.result(PATIENCE_S) as reader:
            assert len(all_of(reader)) == len(IDS)


def test_discarding_dead_letters_keeps_the_order_of_the_others(
    deployment: Deployment, dead_letters: DeadLettersCommand
) -> None:
    publish_dead_letters(deployment, *IDS)
    result = dead_letters("discard", IDS[2], IDS[5], "--id", IDS[6], "--yes")
    assert (result.returncode, result.stdout) == (0, "discarded 3 dead letters\n")
    left = [name for name in IDS if name not in {IDS[2], IDS[5], IDS[6]}]
    assert read_ids(deployment, 9) == left
    assert dead_letters("discard", "--all", "--yes", "--limit", "4").returncode == 0
    assert read_ids(deployment, 5) == left[4:]


def test_thousands_of_dead_letters_are_read_in_order(deployment: Deployment) -> None:
    """More than the 2,000 that RabbitMQ delivers to a consumer without a prefetch."""
    names = [str(number) for number in range(5_000)]
    publish_dead_letters(deployment, *names)
    for _ in range(2):
        assert read_ids(deployment, len(names)) == names


def test_a_filter_selects_the_dead_letters_that_match_all_its_conditions(
    deployment: Deployment, dead_letters: DeadLettersCommand
) -> None:
    publish_dead_letters(deployment, "old", reason="expired", failed_at=NOW - timedelta(days=2))
    publish_dead_letters(deployment, "invalid", reason="invalid_command", imei="1")
    publish_dead_letters(deployment, "theirs", app_id="metering")
    publish_dead_letters(deployment, "other-device", imei="865820030000002")
    assert dead_letters.ids() == ["old", "invalid", "theirs", "other-device"]
    assert dead_letters.ids("--reason", "expired", "--reason", "invalid_command") == ["old", "invalid"]
    assert dead_letters.ids("--source", "metering") == ["theirs"]
    assert dead_letters.ids("--device", "865820030000002") == ["other-device"]
    assert dead_letters.ids("--older-than", "1d") == ["old"]
    assert dead_letters.ids("--newer-than", "1d", "--reason", "expired") == []
    assert dead_letters.ids("--id", "theirs", "--id", "old") == ["old", "theirs"]
    assert dead_letters.ids("--limit", "2") == ["old", "invalid"]
    table = dead_letters("list")
    assert "865820030000002" in table.stdout
    assert "4 dead letters" in table.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("list", "--reason", "nonsense"), 2, "outcome_unknown"),
        (("list", "--older-than", "5"), 2, "90s, 15m, 2h or 7d"),
        (("replay", "--all", "--rate", "fast"), 2, "200/second"),
        (("replay",), 2, "--all"),
        (("discard", "--yes"), 2, "--all"),
        (("discard", "--all", "--reason", "expired", "--yes"), 2, "one or the other"),
        (("discard", "--all"), 1, "--yes"),
        (("show", "no-such-id"), 1, "no-such-id"),
        (("replay", "no-such-id"), 1, "nothing was replayed"),
        (("discard", "no-such-id", "--yes"), 1, "nothing was discarded"),
        (("list", "--reason", "expired"), 0, "0 of 1 dead letter match"),
    ],
)
def test_an_impossible_request_is_reported_and_changes_no_dead_letter(
    deployment: Deployment, dead_letters: DeadLettersCommand, arguments: tuple[str, ...], code: int, words: str
) -> None:
    publish_dead_letters(deployment, "an-id")
    result = dead_letters(*arguments)
    assert result.returncode == code
    assert words in result.stderr
    assert read_ids(deployment, 1) == ["an-id"]


def test_list_without_a_broker_or_a_queue_reports_the_cause(dead_letters: DeadLettersCommand) -> None:
    result = dead_letters("list", AMQP_URL=f"amqp://me:aSecret@127.0.0.1:{free_port()}/")
    assert (result.returncode, len(result.stderr.splitlines())) == (1, 1)
    assert "aSecret" not in result.stderr
    result = dead_letters("list", WORKER_NAMESPACE="nowhere")
    assert result.returncode == 1
    assert "onenet-worker topology" in result.stderr


def test_show_prints_the_whole_dead_letter_with_control_characters_escaped(
    deployment: Deployment, dead_letters: DeadLettersCommand
) -> None:
    properties = pika.BasicProperties(
        message_id="odd", headers={"colour": "\x1b[31mred", "n": 7}, app_id="up\x07\x9b\u202e\u2028[red]stream[/red]"
    )
    exchange = deployment.topology.dead_letters_exchange
    deployment.upstream.channel.basic_publish(exchange, "execute.x", b"\xff\x1b[2J\nend", properties)
    publish_dead_letters(deployment, "tidy", args="on")
    odd = dead_letters("show", "odd")
    assert odd.returncode == 0, odd.stderr
    shown = odd.stdout + dead_letters("list").stdout + dead_letters("list", "--json").stdout
    assert shown.replace("\n", "").isprintable()
    assert (
        shown.count("\\x07\\x9b\\u202e\\u2028[red]stream[/red]") == 4
    )  # as a property, as the source in both, and in the advice
    assert "\\x1b[31mred" in odd.stdout
    assert "\\xff\\x1b[2J" in odd.stdout
    as_json = json.loads(dead_letters("show", "odd", "--json").stdout)
    assert (as_json["body_base64"], as_json["headers"]["n"]) == ("/xtbMkoKZW5k", 7)
    assert as_json["reason"] == "broker: unknown"
    tidy = dead_letters("show", "tidy").stdout
    assert '"args": "on"' in tidy
    assert "x-onenet-failed-at" in tidy


def test_a_dry_run_changes_no_dead_letter(deployment: Deployment, dead_letters: DeadLettersCommand) -> None:
    publish_dead_letters(deployment, *IDS)
    for command in ("replay", "discard"):
        result = dead_letters(command, "--all", "--dry-run", "--json", "--limit", "5")
        assert [json.loads(line)["command_id"] for line in result.stdout.splitlines()] == IDS[:5]
        unknown = dead_letters(command, "no-such-id", "--dry-run")
        assert (unknown.returncode, unknown.stdout) == (1, "")
    assert "--json needs --dry-run" in dead_letters("discard", "--all", "--json").stderr
    assert "--limit 4" in dead_letters("replay", "--all", "--rate", "10/hour", "--dry-run").stderr
    assert read_ids(deployment, len(IDS)) == IDS
    assert deployment.upstream.count(deployment.topology.execute_queue) == 0


def test_listing_takes_little_memory_however_large_the_dead_letters_are(deployment: Deployment) -> None:
    """Of each only what is printed is kept: the memory that 200 MiB of bodies need is a fraction of that."""
    large, count, command = b"x" * 15 * 1024 * 1024, 2_000, json.dumps(a_command(command_id="large")).encode()
    for body, times in ((large, 6), (command.ljust(MAX_BODY_BYTES), count)):
        for _ in range(times):
            properties = pika.BasicProperties(delivery_mode=2, message_id="large")
            deployment.upstream.channel.basic_publish(deployment.topology.dead_letters_exchange, "x", body, properties)
    code = """
import re, sys
from pathlib import Path
from worker.dead_letters.letter import DeadLetter
from worker.dead_letters.reader import DeadLetterReader
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
read = DeadLetterReader.read
def measured(*arguments, **named):
    before = peak()
    found = read(*arguments, **named)
    print(peak() - before, file=sys.stderr)
    return found
replace(DeadLetterReader, "read", measured)
"""
    settings = {"AMQP_URL": deployment.broker_url, "ONENET_API_KEY": API_KEY}
    namespace = {"WORKER_NAMESPACE": deployment.topology.namespace}
    at_startup = run_at_startup(deployment.folder, code)
    arguments = ("dead-letters", "list", "--json")
    result = run_cli(*arguments, folder=deployment.folder, **settings, **namespace, **at_startup)
    assert result.returncode == 0, result.stderr
    assert [json.loads(line)["command_id"] for line in result.stdout.splitlines()] == ["large"] * (6 + count)
    assert int(result.stderr) < 40 * 1024  # kB


def test_list_warns_when_the_queue_has_more_dead_letters_than_one_reader_can_hold(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("worker.amqp.queue_reader.MAX_PREFETCH", 6)
    publish_dead_letters(deployment, *IDS)
    monkeypatch.setenv("AMQP_URL", deployment.broker_url)
    monkeypatch.setenv("ONENET_API_KEY", API_KEY)
    monkeypatch.setenv("WORKER_NAMESPACE", deployment.topology.namespace)
    list_dead_letters(as_json=True)
    result = capsys.readouterr()
    assert [json.loads(line)["command_id"] for line in result.out.splitlines()] == IDS[:6]
    assert "only 6 of 12 dead letters can be read at once; their order is lost" in result.err
    monkeypatch.undo()
    assert set(read_ids(deployment, len(IDS))) == set(IDS)


def test_replaying_a_command_that_was_not_sent_sends_it(
    deployment: Deployment, dead_letters: DeadLettersCommand
) -> None:
    """Its failure is recorded in the store; without the replay header the worker would only repeat the reply."""
    command = a_command(args="on")
    with deployment.worker(
        ONENET_URL=f"http://127.0.0.1:{free_port()}", WORKER_MAX_ATTEMPTS="1", WORKER_PAUSE_AFTER_FAILURES="9"
    ) as worker:
        deployment.upstream.publish(command, app_id="billing", correlation_id="c", expiration="3600000")
        assert deployment.upstream.reply().json["error"]["code"] == "retries_exhausted"
        assert dead_letters("replay", "--reason", "retries_exhausted").stdout == "replayed 1 dead letter\n"
        worker.wait_for("command_failed", count=2)
    again = deployment.upstream.reply()
    assert (again.json["attempts"], again.properties.correlation_id) == (1, "c")
    with deployment.worker():
        assert dead_letters("replay", command["command_id"]).returncode == 0
        accepted = deployment.upstream.reply()
    assert (accepted.json["status"], accepted.json["command_id"]) == ("accepted", command["command_id"])
    assert accepted.routing_key == "execute.accepted.billing"
    assert len(deployment.simulator.platform.commands) == 1
    assert dead_letters.ids() == []


def test_replaying_a_command_that_may_have_been_cached_reads_its_history(
    deployment: Deployment, dead_letters: DeadLettersCommand
) -> None:
    command = a_command(args="on")
    deployment.simulator.faults.replace([Fault(kind="drop_after_caching")])
    with deployment.worker(**SOON_CERTAIN, WORKER_IN_DOUBT="dead-letter"):
        deployment.upstream.publish(command)
        assert deployment.upstream.reply().json["error"]["code"] == "outcome_unknown"
        deployment.simulator.faults.replace([])
        assert dead_letters("replay", "--all").returncode == 0
        reply = deployment.upstream.reply().json
    assert (reply["status"], reply["recovered"]) == ("accepted", True)
    assert [kept.uuid for kept in deployment.simulator.platform.commands] == [reply["uuid"]]


def test_replaying_a_command_that_the_broker_dead_lettered_puts_it_in_doubt(
    deployment: Deployment, dead_letters: DeadLettersCommand
) -> None:
    command = a_command(args="on")
    before = datetime.now(UTC)
    deployment.upstream.publish(command, headers={"x-onenet-reason": "retries_exhausted"})
    channel, queue = deployment.upstream.channel, deployment.topology.execute_queue

    def give_back() -> bool:
        method, _, _ = channel.basic_get(queue)
        if method is not None:
            channel.basic_nack(method.delivery_tag or 0)
        return deployment.upstream.count(deployment.topology.dead_letters_exchange) == 1

    wait_until(give_back, PATIENCE_S, "the broker's own dead letter")
    [letter] = dead_letters.listed("--reason", "broker")
    assert letter["reason"] == "broker: delivery_limit"
    tolerance = timedelta(minutes=1)  # of the broker's clock
    assert before - tolerance < datetime.fromisoformat(letter["failed_at"]) < datetime.now(UTC) + tolerance
    assert dead_letters("replay", command["command_id"]).returncode == 0
    with deployment.worker(**SOON_CERTAIN) as worker:
        worker.wait_for("command_in_doubt")
        assert deployment.upstream.reply().json["status"] == "accepted"
    assert len(deployment.simulator.platform.commands) == 1


def test_an_interrupted_replay_reports_its_progress_and_loses_no_dead_letter(
    deployment: Deployment, tmp_path: Path
) -> None:
    publish_dead_letters(deployment, *IDS)
    environment = {"AMQP_URL": deployment.broker_url, "WORKER_NAMESPACE": deployment.topology.namespace}
    process = LocalProcess(["dead-letters", "replay", "--all", "--rate", "60/minute"], environment, tmp_path / "replay")
    wait_until(
        lambda: deployment.upstream.count(deployment.topology.execute_queue) >= 1, PATIENCE_S, "the first replay"
    )
    process.signal(signal.SIGINT)
    assert process.wait() == 130
    done = deployment.upstream.count(deployment.topology.execute_queue)
    assert f"replayed {done} of 12 dead letters" in process.output.read_text()
    assert read_ids(deployment, len(IDS) - done) == IDS[done:]


def test_a_replay_that_would_hold_dead_letters_unacknowledged_too_long_is_refused(
    deployment: Deployment, dead_letters: DeadLettersCommand
) -> None:
    publish_dead_letters(deployment, *IDS)
    result = dead_letters("replay", "--all", "--rate", "10/hour")
    assert result.returncode == 1
    assert "--limit 4" in result.stderr
    assert read_ids(deployment, len(IDS)) == IDS
