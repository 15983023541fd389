"""What operators see of dead letters, and what they can ask for and do."""

import json
import re
import signal
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pika
import pytest

from tests.support.builders import a_command
from tests.support.command_line import run_cli
from tests.support.dead_letters import NOW, DeadLettersCommand, publish_dead_letters
from tests.support.deployment import SOON_CERTAIN, SOON_S, Deployment
from tests.support.simulator import API_KEY, onenet
from tests.support.terminal import assert_screen, show
from tests.support.waiting import PATIENCE_S
from worker.amqp.blocking import declare_on
from worker.dev.services.ports import wait_until
from worker.dev.services.processes import LocalProcess

FAILED_AT = datetime(2026, 8, 5, 12, tzinfo=UTC)
PAST = "2026-08-06T00:00:00Z"
LONG_ERROR = "OneNET answered 503 Service Unavailable, and 10 of 10 attempts failed: " + "the upstream timed out; " * 9
IDS = ("8f6c0a52-5d1e-4f5e-9a55-0d7c5f8b9f01", "8f6c1111-5d1e-4f5e-9a55-0d7c5f8b9f02")


@pytest.fixture
def deployment(broker_url: str, tmp_path: Path) -> Iterator[Deployment]:
    with onenet() as simulator, Deployment.set_up(broker_url, tmp_path, simulator, SOON_S) as found:
        declare_on(found.upstream.channel, found.topology)
        yield found


@pytest.fixture
def dead_letters(deployment: Deployment, tmp_path: Path) -> DeadLettersCommand:
    return DeadLettersCommand(deployment, tmp_path)


def publish_invalid(deployment: Deployment, body: bytes, **properties: Any) -> None:
    """Publish a dead letter without a command id, as a worker does."""
    headers = {
        "x-onenet-reason": "invalid_message",
        "x-onenet-error": "the body is no JSON",
        "x-onenet-failed-at": (FAILED_AT + timedelta(hours=2)).isoformat(),
    }
    wanted = pika.BasicProperties(delivery_mode=2, headers=headers, **properties)
    exchange = deployment.topology.dead_letters_exchange
    deployment.upstream.channel.basic_publish(exchange, "execute.invalid_message", body, wanted)


def publish_all_kinds(deployment: Deployment) -> None:
    """Publish the dead letters that the screens show."""
    in_time = "2099-01-01T00:00:00Z"
    publish_dead_letters(deployment, IDS[0], failed_at=FAILED_AT, error=LONG_ERROR, expired_time=in_time)
    publish_dead_letters(
        deployment, IDS[1], reason="outcome_unknown", failed_at=FAILED_AT + timedelta(hours=1), app_id="metering",
        error="设备不在线 历史记录无法判定", expired_time=PAST,
    )  # fmt: skip
    publish_invalid(deployment, b"no JSON")
    # As the broker dead-letters it: with its own record, and none of the worker's headers.
    broken = pika.BasicProperties(delivery_mode=2, headers={"x-death": [], "x-first-death-reason": "delivery_limit"})
    body = json.dumps(a_command(command_id="returned-too-often", expired_time=in_time)).encode()
    deployment.upstream.channel.basic_publish(deployment.topology.dead_letters_exchange, "execute", body, broken)


def seen(
    dead_letters: DeadLettersCommand,
    *arguments: str,
    columns: int,
    typed: str = "",
    interrupted_at: str | None = None,
) -> str:
    """Return what a person sees in a terminal."""
    environment = {name: dead_letters.environment[name] for name in ("AMQP_URL", "WORKER_NAMESPACE")}
    arguments = ("dead-letters", *arguments)
    folder = dead_letters.folder
    return show(arguments, folder, environment, columns=columns, typed=typed, interrupted_at=interrupted_at).text


@pytest.mark.parametrize("columns", [80, 120, 160])
def test_what_a_person_sees_of_dead_letters(
    deployment: Deployment, dead_letters: DeadLettersCommand, columns: int
) -> None:
    """Ids and IMEIs are whole in each width, and what is cut is only the error."""
    publish_all_kinds(deployment)
    unreadable, *_ = [letter for letter in dead_letters.listed() if letter["command_id"] is None]
    for name, arguments in (
        ("list", ("list",)),
        ("newest", ("list", "--newest-first", "--limit", "1")),
        ("summary", ("summary",)),
        ("show", ("show", IDS[0])),
        ("show-invalid", ("show", unreadable["digest"][:8])),
        ("show-broker", ("show", "returned-too-often")),
        ("show-nothing", ("show", "no-such-id")),
        ("ambiguous", ("show", "8f6c")),
    ):
        screen = seen(dead_letters, *arguments, columns=columns)
        assert_screen(f"dead-letters-{name}-{columns}", screen)
        if name == "list":
            assert all(text in screen for text in (*IDS, "865820030000001", "returned-too-often"))
            assert len(screen.splitlines()) <= 3 * 4 + 1
    question = seen(dead_letters, "discard", "--reason", "invalid_message", columns=columns, typed="n\n")
    assert_screen(f"dead-letters-discard-{columns}", question)
    assert len(dead_letters.listed()) == 4
    replaying = seen(dead_letters, "replay", IDS[0], columns=columns)
    assert_screen(f"dead-letters-replay-{columns}", replaying, {deployment.topology.namespace: "onenet-namesp"})


@pytest.mark.parametrize("columns", [80, 120])
def test_what_a_person_sees_of_replays_and_of_the_end(
    deployment: Deployment, dead_letters: DeadLettersCommand, columns: int
) -> None:
    """A replay that waits, that is interrupted, and of what has expired; a deletion, and a queue that is empty then."""
    replaced = {deployment.topology.namespace: "onenet-namesp"}

    def check(name: str, *arguments: str, typed: str = "", interrupted_at: str | None = None) -> None:
        screen = seen(dead_letters, *arguments, columns=columns, typed=typed, interrupted_at=interrupted_at)
        screen = re.sub(r"uuid [0-9a-f-]{36}$", f"uuid {IDS[1]}", screen, flags=re.MULTILINE)
        assert_screen(f"dead-letters-{name}-{columns}", screen, replaced)

    publish_dead_letters(deployment, "late", failed_at=FAILED_AT, error="expired_time has passed", expired_time=PAST)
    publish_dead_letters(deployment, IDS[0], failed_at=FAILED_AT)
    check("replay-expired", "replay", "late")
    check(
        "replay-interrupted", "replay", IDS[0], "--wait", "--wait-timeout", "600",
        interrupted_at="waiting for the outcomes",
    )  # fmt: skip
    with deployment.worker(**SOON_CERTAIN):
        assert deployment.upstream.reply().json["status"] == "accepted"
        publish_dead_letters(deployment, "accepted-now", failed_at=FAILED_AT)
        check("replay-wait", "replay", "accepted-now", "--wait", "--wait-timeout", str(PATIENCE_S))
    check("discard-done", "discard", "late", typed="y\n")
    check("empty", "list")


def test_an_empty_queue_is_said_to_be_empty(dead_letters: DeadLettersCommand) -> None:
    for command in ("list", "summary"):
        result = dead_letters(command)
        assert (result.returncode, result.stdout) == (0, "")
        assert "there are no dead letters: no command has failed" in result.stderr


def test_counts_are_of_all_dead_letters_and_thousands_are_listed_fast_and_small(
    deployment: Deployment, dead_letters: DeadLettersCommand
) -> None:
    publish_dead_letters(deployment, *(f"c-{number}" for number in range(4_000)), error="503 after 10 attempts")
    publish_dead_letters(deployment, *(f"d-{number}" for number in range(211)), reason="expired")
    result = dead_letters("list", "--limit", "1", "--newest-first")
    assert "d-210" in result.stdout
    assert "showing the newest 1 of 4,211 dead letters" in result.stderr
    assert (
        "showing the oldest 2 of 211 dead letters" in dead_letters("list", "--reason", "expired", "--limit", "2").stderr
    )
    whole = dead_letters("list")
    assert len(whole.stdout.splitlines()) == 4_211 + 4  # one line for each
    groups = [json.loads(line) for line in dead_letters("summary", "--json").stdout.splitlines()]
    assert [(group["reason"], group["count"]) for group in groups] == [("retries_exhausted", 4_000), ("expired", 211)]
    assert len(dead_letters("summary").stdout.splitlines()) == 2 + 4
    lines = dead_letters.listed()
    assert json.loads(lines[0]["body"])["command_id"] == "c-0"
    assert dead_letters("show", lines[7]["digest"][:8]).returncode == 0


def test_a_dead_letter_without_an_id_is_shown_and_discarded_by_its_digest(
    deployment: Deployment, dead_letters: DeadLettersCommand
) -> None:
    for body in (b"no JSON", b"\xff"):
        publish_invalid(deployment, body)
    first, second = dead_letters.listed()
    assert (first["command_id"], first["body"], second["body_base64"]) == (None, "no JSON", "/w==")
    assert "no JSON" in dead_letters("show", first["digest"][:8]).stdout
    result = dead_letters("discard", first["digest"][:8], "--yes")
    assert (result.returncode, result.stdout) == (0, "discarded 1 dead letter\n")
    assert [letter["digest"] for letter in dead_letters.listed()] == [second["digest"]]


def test_the_beginning_of_an_id_names_it_and_an_ambiguous_one_lists_the_ids(
    deployment: Deployment, dead_letters: DeadLettersCommand
) -> None:
    publish_dead_letters(deployment, *IDS)
    assert json.loads(dead_letters("show", "8f6c0", "--json").stdout)["command_id"] == IDS[0]
    for command in (("show", "8f6c"), ("replay", "8f6c"), ("discard", "8f6c", "--yes"), ("list", "--id", "8f6c")):
        result = dead_letters(*command)
        assert (result.returncode, result.stdout) == (1, "")
        assert f"8f6c is the beginning of {IDS[0]}, {IDS[1]}: give more of it" in result.stderr
    assert "needs 4 characters" in dead_letters("show", "8f6").stderr
    assert dead_letters("discard", "8f6c1", "--yes").returncode == 0
    assert dead_letters.ids() == [IDS[0]]


def test_only_what_was_confirmed_is_discarded(deployment: Deployment, dead_letters: DeadLettersCommand) -> None:
    publish_dead_letters(deployment, *IDS)
    publish_dead_letters(deployment, *(f"c-{number}" for number in range(12)), reason="expired")
    screen = seen(dead_letters, "discard", "--reason", "expired", columns=80, typed="y\n")
    assert re.search(r"12 letters\W+expired", screen)  # of many, what they are is counted
    assert "Delete these 12 dead letters permanently? [y/N]: discarded 12 dead letters\n" in screen
    assert dead_letters.ids() == list(IDS)
    assert "nothing was discarded" in seen(dead_letters, "discard", "--all", columns=80, typed="n\n")
    assert dead_letters.ids() == list(IDS)


def test_replay_waits_for_the_outcomes_and_counts_them(
    deployment: Deployment, dead_letters: DeadLettersCommand
) -> None:
    """Its sender gets each reply too, as always."""
    publish_dead_letters(deployment, *IDS)
    publish_dead_letters(deployment, "no-longer-valid", product="nowhere")
    deployment.upstream.bind_replies("execute.#")
    with deployment.start_worker(**SOON_CERTAIN) as worker:
        worker.wait_for("consumer_started")
        result = dead_letters("replay", "--all", "--wait", "--wait-timeout", str(PATIENCE_S))
        assert result.returncode == 1, result.stderr
        outcomes, last = result.stdout.splitlines()[:-1], result.stdout.splitlines()[-1]
        assert sorted(line.split()[0] for line in outcomes) == ["accepted", "accepted", "failed"]
        assert last == "replayed 3 dead letters: 2 accepted, 1 failed (unknown_product)"
        [failed] = [line for line in outcomes if "no-longer-valid" in line]
        assert "unknown_product: product: nowhere is not configured" in failed
    keys = sorted(deployment.upstream.reply().routing_key for _ in range(3))
    assert keys == ["execute.accepted.billing", "execute.accepted.billing", "execute.failed.billing"]
    assert dead_letters.ids() == ["no-longer-valid"]


def test_replies_that_nobody_bound_a_queue_for_are_kept_while_a_replay_waits(
    deployment: Deployment, dead_letters: DeadLettersCommand
) -> None:
    """Also those of the replayed commands."""
    publish_dead_letters(deployment, "replayed")
    with deployment.start_worker(**SOON_CERTAIN) as worker:
        worker.wait_for("consumer_started")
        result = dead_letters("replay", "--all", "--wait", "--json", "--wait-timeout", str(PATIENCE_S))
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout)["reply"]["status"] == "accepted"
        kept = deployment.upstream.get(deployment.topology.unrouted_exchange)
    assert (kept.routing_key, kept.json["command_id"]) == ("execute.accepted.billing", "replayed")
    assert deployment.upstream.count(deployment.topology.unrouted_exchange) == 0  # not the copy


def test_a_replay_says_that_nothing_is_sent_while_no_worker_consumes(
    deployment: Deployment, dead_letters: DeadLettersCommand
) -> None:
    publish_dead_letters(deployment, *IDS)
    result = dead_letters("replay", IDS[0])
    assert (result.returncode, result.stdout) == (0, "replayed 1 dead letter\n")
    assert "commands may wait: no worker consumes" in result.stderr
    result = dead_letters("replay", IDS[1], "--wait", "--wait-timeout", "0")
    assert (result.returncode, result.stdout) == (1, "replayed 1 dead letter: 1 without an outcome\n")
    assert f"no outcome after 0 s of {IDS[1]}" in result.stderr
    assert "commands may wait: no worker consumes" in result.stderr


def test_what_has_expired_is_left_where_it_is_and_said(
    deployment: Deployment, dead_letters: DeadLettersCommand
) -> None:
    """A replay would fail again at once; one in doubt may be found in the history."""
    publish_dead_letters(deployment, "late", expired_time=PAST)
    alone = dead_letters("replay", "late")
    assert (alone.returncode, alone.stdout) == (1, "")
    assert alone.stderr.endswith("onenet-worker: nothing was replayed\n")
    assert "1 dead letter: late" in alone.stderr
    publish_dead_letters(deployment, "late-in-doubt", reason="outcome_unknown", expired_time=PAST)
    publish_dead_letters(deployment, "in-time")
    result = dead_letters("replay", "--all")
    assert result.stdout == "replayed 2 dead letters\n"
    assert "--include-expired" in result.stderr
    assert dead_letters.ids() == ["late"]
    assert dead_letters("replay", "--all", "--include-expired").stdout == "replayed 1 dead letter\n"


def test_what_has_expired_counts_towards_no_limit_and_no_rate(
    deployment: Deployment, dead_letters: DeadLettersCommand
) -> None:
    """Otherwise those at the head of the queue would keep all others from being replayed."""
    publish_dead_letters(deployment, *(f"late-{number}" for number in range(10)), expired_time=PAST)
    publish_dead_letters(deployment, *IDS)
    tried = dead_letters("replay", "--all", "--limit", "1", "--rate", "1/hour", "--dry-run", "--json")
    assert (tried.returncode, json.loads(tried.stdout)["command_id"]) == (0, IDS[0]), tried.stderr
    assert "10 dead letters: late-0, " in tried.stderr
    assert dead_letters("replay", "--all", "--limit", "1").stdout == "replayed 1 dead letter\n"
    assert dead_letters.ids() == [*(f"late-{number}" for number in range(10)), IDS[1]]
    named = dead_letters("replay", "late-0", IDS[1], "--limit", "1")
    assert (named.returncode, named.stdout) == (0, "replayed 1 dead letter\n")


@pytest.mark.parametrize("limit", [(), ("--limit", "5")])
@pytest.mark.parametrize("action", [("replay",), ("replay", "--dry-run"), ("discard", "--yes")])
def test_what_is_not_there_is_said_and_nothing_is_done(
    deployment: Deployment, dead_letters: DeadLettersCommand, action: tuple[str, ...], limit: tuple[str, ...]
) -> None:
    publish_dead_letters(deployment, IDS[0])
    missing = dead_letters(*action, IDS[0], "mistyped-id", *limit)
    assert (missing.returncode, missing.stdout) == (1, "")
    assert "no dead letter with id mistyped-id" in missing.stderr
    none = dead_letters(*action, "--reason", "expired", *limit)
    assert none.returncode == 0
    assert dead_letters.ids() == [IDS[0]]
    if action == ("replay",):
        assert (none.stdout, "0 of 1 dead letter match" in none.stderr) == ("", True)


def test_a_replay_says_that_its_product_is_paused_and_of_no_other(
    deployment: Deployment, dead_letters: DeadLettersCommand, tmp_path: Path
) -> None:
    products = tmp_path / "products.json"
    products.write_text(json.dumps({name: {"api_key": API_KEY} for name in ("heating", "meters")}))
    publish_dead_letters(deployment, IDS[0], product="heating")
    environment = {name: dead_letters.environment[name] for name in ("AMQP_URL", "WORKER_NAMESPACE")}
    with deployment.worker(ONENET_PRODUCTS_FILE=str(products)):
        for name in ("heating", "meters"):
            order = ("pause", "--product", name, "--by", "alice", "--reason", "valve 7 leaks")
            assert run_cli(*order, folder=tmp_path, **environment).returncode == 0
        result = dead_letters("replay", IDS[0], "--wait", "--wait-timeout", "0")
        assert result.returncode == 1
        said = "commands may wait: product heating is paused by hand, by alice (valve 7 leaks): "
        assert f"{said}onenet-worker resume --product heating ends it" in result.stderr
        assert "meters" not in result.stderr
        assert run_cli("resume", "--product", "heating", folder=tmp_path, **environment).returncode == 0
        assert deployment.upstream.reply().json["command_id"] == IDS[0]


def test_an_interrupted_replay_names_what_was_replayed_and_what_was_not(
    deployment: Deployment, dead_letters: DeadLettersCommand, tmp_path: Path
) -> None:
    publish_dead_letters(deployment, *(f"c-{number}" for number in range(12)))
    arguments = ["dead-letters", "replay", "--all", "--rate", "60/minute"]
    environment = {name: dead_letters.environment[name] for name in ("AMQP_URL", "WORKER_NAMESPACE")}
    process = LocalProcess(arguments, environment, tmp_path / "replay")
    replayed = deployment.topology.execute_queue
    wait_until(lambda: deployment.upstream.count(replayed) >= 1, PATIENCE_S, "the first replay")
    process.signal(signal.SIGINT)
    assert process.wait() == 130
    done, said = deployment.upstream.count(replayed), process.output.read_text()
    if f"perhaps replayed as well: c-{done - 1}" in said:  # it did not know yet that the broker had it
        assert f"interrupted: replayed {done - 1} of 12 dead letters" in said
    else:
        assert f"interrupted: replayed {done} of 12 dead letters" in said
        assert f"replayed: {', '.join(f'c-{number}' for number in range(done))}\n" in said
    assert f"still in the queue: {', '.join(f'c-{number}' for number in range(done, 12))}\n" in said


def test_a_slow_replay_keeps_its_connections(
    deployment: Deployment, dead_letters: DeadLettersCommand, tmp_path: Path
) -> None:
    publish_dead_letters(deployment, "c-1", "c-2")
    url = f"{dead_letters.environment['AMQP_URL']}?heartbeat=1"  # the broker gives a silent client up after 2 s
    environment = dead_letters.environment | {"AMQP_URL": url}
    arguments = ["dead-letters", "replay", "--all", "--rate", "15/minute", "--wait", "--wait-timeout", "0.1"]
    result = run_cli(*arguments, folder=tmp_path, **environment)
    assert "replayed 2 dead letters" in result.stderr, result.stderr


def test_a_wait_that_is_interrupted_names_what_has_no_outcome(
    deployment: Deployment, dead_letters: DeadLettersCommand, tmp_path: Path
) -> None:
    publish_dead_letters(deployment, *IDS)
    arguments = ["dead-letters", "replay", "--all", "--wait", "--wait-timeout", "600"]
    environment = {name: dead_letters.environment[name] for name in ("AMQP_URL", "WORKER_NAMESPACE")}
    process = LocalProcess(arguments, environment, tmp_path / "replay")
    wait_until(lambda: "waiting for the outcomes" in process.output.read_text(), PATIENCE_S, "the wait")
    process.signal(signal.SIGINT)
    assert process.wait() == 130
    assert f"without an outcome so far: {', '.join(IDS)}" in process.output.read_text()


def test_replay_as_json_tells_each_dead_letter_that_was_replayed(
    deployment: Deployment, dead_letters: DeadLettersCommand
) -> None:
    publish_dead_letters(deployment, *IDS, failed_at=NOW)
    result = dead_letters("replay", "--all", "--json")
    assert [json.loads(line)["command_id"] for line in result.stdout.splitlines()] == list(IDS)
    publish_dead_letters(deployment, *IDS)
    result = dead_letters("replay", "--all", "--json", "--wait", "--wait-timeout", "0")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(line["command_id"], line["reply"]) for line in lines] == [(name, None) for name in IDS]
