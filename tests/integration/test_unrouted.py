"""Unrouted replies on a real broker: listed without side effects, published again, discarded."""

import json
import signal
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pika
import pytest
from pydantic import SecretStr

from tests.support.command_line import run_cli
from tests.support.deployment import Deployment
from tests.support.proxies import Proxy
from tests.support.simulator import onenet
from tests.support.terminal import Screen, assert_screen, show
from tests.support.waiting import PATIENCE_S
from worker.admin.unrouted import Published, UnroutedFilter, UnroutedReply, publish_unrouted
from worker.amqp.address import BrokerAddress
from worker.amqp.blocking import declare_on
from worker.amqp.unrouted import UnroutedReader
from worker.dev.services.ports import wait_until
from worker.dev.services.processes import LocalProcess
from worker.errors import BrokerUnavailable, WorkerError

pytestmark = pytest.mark.broker_version

TOLD_AT = datetime(2026, 11, 30, 8, tzinfo=UTC)
BILLING, PAYROLL = "execute.accepted.billing", "execute.failed.payroll"


@pytest.fixture
def deployment(broker_url: str, tmp_path: Path) -> Iterator[Deployment]:
    with onenet() as simulator, Deployment.set_up(broker_url, tmp_path, simulator) as found:
        declare_on(found.upstream.channel, found.topology)
        yield found


def leave(deployment: Deployment, key: str, *ids: str, at: datetime = TOLD_AT, **properties: Any) -> None:
    """Publish replies that nobody has bound a queue for, as a worker does; each a minute after the one before."""
    for number, command_id in enumerate(ids):
        body = {"command_id": command_id, "completed_at": (at + number * timedelta(minutes=1)).isoformat()}
        sent = pika.BasicProperties(
            content_type="application/json",
            type="execute.reply",
            delivery_mode=2,
            correlation_id=command_id,
            **properties,
        )
        deployment.upstream.channel.basic_publish(
            deployment.topology.replies_exchange, key, json.dumps(body).encode(), sent, mandatory=True
        )


def left(deployment: Deployment, count: int) -> list[tuple[str, str]]:
    """Return routing key and command id of what is unrouted, once there are so many."""
    queue = deployment.topology.unrouted_exchange
    wait_until(lambda: deployment.upstream.count(queue) == count, PATIENCE_S, "the unrouted replies")
    with open_reader(deployment) as reader:
        found: list[tuple[str, str]] = []
        reader.read_messages(
            lambda message: found.append((message.routing_key, json.loads(message.body)["command_id"]))
        )
    wait_until(lambda: deployment.upstream.count(queue) == count, PATIENCE_S, "their return")
    return found


def received(deployment: Deployment) -> list[str]:
    return [message.json["command_id"] for message in deployment.upstream.take_all()]


def open_reader(deployment: Deployment, url: str | None = None) -> UnroutedReader:
    return UnroutedReader(BrokerAddress((SecretStr(url or deployment.broker_url),)), deployment.topology)


@pytest.fixture
def environment(deployment: Deployment) -> dict[str, str]:
    return {"AMQP_URL": deployment.broker_url, "WORKER_NAMESPACE": deployment.topology.namespace}


Run = Callable[..., Any]


@pytest.fixture
def run(environment: dict[str, str], tmp_path: Path) -> Run:
    return partial(run_cli, "unrouted", folder=tmp_path, **environment)


def test_they_are_listed_by_routing_key_and_all_stay_in_order(deployment: Deployment, run: Run) -> None:
    leave(deployment, BILLING, "a", "b")
    leave(deployment, PAYROLL, "c")
    leave(deployment, "billing.own", "d")
    listed = run("list")
    assert listed.returncode == 0, listed.stderr
    assert [line.split("│")[1].strip() for line in listed.stdout.splitlines() if "│" in line] == [
        BILLING, PAYROLL, "billing.own",
    ]  # fmt: skip
    assert "4 unrouted replies" in listed.stderr
    assert left(deployment, 4) == [(BILLING, "a"), (BILLING, "b"), (PAYROLL, "c"), ("billing.own", "d")]


def test_json_has_each_reply_with_its_body(deployment: Deployment, run: Run) -> None:
    leave(deployment, BILLING, "a")
    deployment.upstream.channel.basic_publish(deployment.topology.replies_exchange, "odd.key", b"\xff[\x1b")
    first, second = map(json.loads, run("list", "--json").stdout.splitlines())
    assert first == {
        "routing_key": BILLING,
        "source": "billing",
        "command_id": "a",
        "occurred_at": "2026-11-30T08:00:00Z",
        "type": "execute.reply",
        "correlation_id": "a",
        "body": ANY,
    }
    assert json.loads(first["body"])["command_id"] == "a"
    assert (second["routing_key"], second["source"], second["command_id"], second["body_base64"]) == (
        "odd.key", None, None, "/1sb",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--key", PAYROLL], ["c"]),
        (["--key", PAYROLL, "--key", "billing.own"], ["c", "d"]),
        (["--source", "billing"], ["a", "b", "d"]),
        (["--source", "bill"], []),
        (["--older-than", "30m"], ["a", "b", "c"]),
        (["--source", "billing", "--limit", "2"], ["a", "b"]),
    ],
)
def test_filters_choose_some_of_them(options: list[str], expected: list[str], deployment: Deployment, run: Run) -> None:
    leave(deployment, BILLING, "a", "b")
    leave(deployment, PAYROLL, "c")
    leave(deployment, "billing.own", "d", at=datetime.now(UTC))
    found = [json.loads(line)["command_id"] for line in run("list", "--json", *options).stdout.splitlines()]
    assert found == expected


def test_those_with_a_queue_by_now_are_published_under_their_own_key(deployment: Deployment, run: Run) -> None:
    leave(deployment, BILLING, "a", "b", headers={"traceparent": "00-1-2-01"})
    leave(deployment, PAYROLL, "c")
    deployment.upstream.bind_replies("execute.*.billing")
    published = run("publish", "--source", "billing")
    assert (published.returncode, published.stdout) == (0, "published 2 unrouted replies\n"), published.stderr
    messages = deployment.upstream.take_all()
    assert [(message.routing_key, message.json["command_id"]) for message in messages] == [
        (BILLING, "a"),
        (BILLING, "b"),
    ]
    assert messages[0].properties.correlation_id == "a"
    assert messages[0].properties.type == "execute.reply"
    assert messages[0].properties.delivery_mode == 2
    assert messages[0].headers == {"traceparent": "00-1-2-01"}
    assert left(deployment, 1) == [(PAYROLL, "c")]


def test_what_nobody_has_bound_is_not_taken_away_and_goes_round_once(deployment: Deployment, run: Run) -> None:
    """The alternate exchange tells no publisher that no queue was bound: the broker confirms such a reply too."""
    leave(deployment, BILLING, "a", "b", "c")
    leave(deployment, PAYROLL, "d")
    deployment.upstream.bind_replies(PAYROLL)
    published = run("publish", "--all")
    assert published.returncode == 1
    assert published.stdout.startswith("published 1 unrouted reply\n")
    assert "3 unrouted replies stay: bind a queue" in published.stderr
    assert BILLING in published.stdout
    assert received(deployment) == ["d"]
    assert sorted(left(deployment, 3)) == [(BILLING, "a"), (BILLING, "b"), (BILLING, "c")]


def test_without_the_alternate_exchange_they_stay_too(deployment: Deployment, run: Run) -> None:
    topology, channel = deployment.topology, deployment.upstream.channel
    leave(deployment, BILLING, "a")
    channel.exchange_delete(topology.replies_exchange)
    channel.exchange_declare(topology.replies_exchange, "topic", durable=True)
    assert run("publish", "--all").returncode == 1
    assert left(deployment, 1) == [(BILLING, "a")]


def test_a_queue_that_is_full_refuses_a_reply_which_stays(deployment: Deployment, run: Run) -> None:
    upstream = deployment.upstream
    full = upstream.channel.queue_declare(
        "", exclusive=True, arguments={"x-max-length": 1, "x-overflow": "reject-publish"}
    ).method.queue
    leave(deployment, BILLING, "a", "b", "c")
    upstream.channel.queue_bind(full, deployment.topology.replies_exchange, BILLING)
    published = run("publish", "--all")
    assert published.returncode == 1
    assert f"a queue that is bound for {BILLING} refuses it" in published.stderr
    assert "published 1 of 3 unrouted replies, and perhaps the next one; the others are still there" in published.stderr
    assert left(deployment, 2) == [(BILLING, "b"), (BILLING, "c")]


def test_a_publication_that_is_cut_loses_none(deployment: Deployment) -> None:
    leave(deployment, BILLING, *(str(number) for number in range(50)))
    deployment.upstream.bind_replies(BILLING)
    proxy = Proxy(deployment.broker_url)
    done = Published()

    def cut_after_ten() -> None:
        if done.count == 10:
            proxy.cut()

    with pytest.raises(BrokerUnavailable):
        publish_unrouted(
            BrokerAddress((SecretStr(proxy.url),)),
            deployment.topology,
            UnroutedFilter(),
            datetime.now(UTC),
            limit=None,
            done=done,
            on_selected=lambda _total: cut_after_ten,
        )
    proxy.close()
    queue = deployment.topology.unrouted_exchange
    wait_until(lambda: deployment.upstream.count(queue) >= 39, PATIENCE_S, "the return of the others")
    with open_reader(deployment) as reader:
        rest: list[str] = []
        reader.read_messages(lambda message: rest.append(str(UnroutedReply(message).command_id)))
    assert {*rest, *received(deployment)} == {str(number) for number in range(50)}


def test_an_interrupt_says_what_was_done_and_the_others_stay(
    deployment: Deployment, environment: dict[str, str], tmp_path: Path
) -> None:
    leave(deployment, BILLING, *(str(number) for number in range(3_000)))
    deployment.upstream.bind_replies(BILLING)
    process = LocalProcess(["unrouted", "publish", "--all"], environment, tmp_path / "output")
    wait_until(lambda: deployment.upstream.replies_waiting() > 0, PATIENCE_S, "the first reply")
    process.signal(signal.SIGINT)
    assert process.wait() == 130
    said = process.output.read_text()
    assert "Traceback" not in said
    assert "of 3,000 unrouted replies, and perhaps the next one; the others are still there" in said
    queue, arrived = deployment.topology.unrouted_exchange, len(received(deployment))
    wait_until(lambda: deployment.upstream.count(queue) + arrived >= 3_000, PATIENCE_S, "the return of the others")


def test_two_commands_at_once_exclude_each_other(deployment: Deployment, run: Run) -> None:
    leave(deployment, BILLING, "a")
    with open_reader(deployment):
        for command in (["list"], ["publish", "--all"], ["discard", "--all", "--yes"]):
            refused = run(*command)
            assert refused.returncode == 1
            assert "another command is reading the unrouted replies: try again in a moment" in refused.stderr
        with pytest.raises(WorkerError):
            open_reader(deployment)
    assert left(deployment, 1) == [(BILLING, "a")]


def test_discard_deletes_what_is_chosen_and_keeps_the_order_of_the_others(deployment: Deployment, run: Run) -> None:
    leave(deployment, BILLING, "a")
    leave(deployment, PAYROLL, "b")
    leave(deployment, BILLING, "c")
    assert run("discard", "--key", BILLING).returncode == 1  # nobody to ask
    assert len(left(deployment, 3)) == 3
    dry = run("discard", "--key", BILLING, "--dry-run")
    assert "2 unrouted replies" in dry.stderr
    assert len(left(deployment, 3)) == 3
    assert run("discard", "--key", BILLING, "--limit", "1", "--yes").stdout == "discarded 1 unrouted reply\n"
    assert left(deployment, 2) == [(PAYROLL, "b"), (BILLING, "c")]


def test_a_large_reply_is_deleted_too_once_a_person_has_agreed(
    deployment: Deployment, environment: dict[str, str], tmp_path: Path
) -> None:
    """Only its beginning is read, to show it and to delete it."""
    exchange = deployment.topology.replies_exchange
    deployment.upstream.channel.basic_publish(exchange, BILLING, b"x" * 200_000, mandatory=True)
    screen = show(["unrouted", "discard", "--all"], tmp_path, environment, columns=80, typed="y\n")
    assert (screen.exit_code, "discarded 1 unrouted reply" in screen.text) == (0, True)
    assert deployment.upstream.count(deployment.topology.unrouted_exchange) == 0


@pytest.mark.parametrize("command", ["publish", "discard"])
def test_what_to_change_must_be_said(command: str, run: Run) -> None:
    assert "give --key, --source, --older-than or --all" in run(command).stderr
    assert "use one or the other" in run(command, "--all", "--source", "billing").stderr


def test_when_there_is_none_it_says_so(deployment: Deployment, run: Run) -> None:
    for command in (["list"], ["publish", "--all"], ["discard", "--all", "--yes"]):
        result = run(*command)
        assert (result.returncode, result.stdout) == (0, "")
        assert "there is no unrouted reply" in result.stderr
    leave(deployment, BILLING, "a")
    assert "none of 1 unrouted reply matches" in run("publish", "--source", "other").stderr


@pytest.mark.parametrize("columns", [80, 120])
def test_screens(columns: int, deployment: Deployment, environment: dict[str, str], tmp_path: Path) -> None:
    def assert_shown(name: str, *arguments: str, typed: str = "") -> Screen:
        screen = show(["unrouted", *arguments], tmp_path, environment, columns=columns, typed=typed)
        assert_screen(f"unrouted-{name}-{columns}", screen.text, {deployment.topology.namespace: "test-00000000"})
        return screen

    till = "收银台.回复\x1b[2J"
    assert_shown("none", "list")
    leave(deployment, BILLING, *(f"order-{number}" for number in range(1_201)))
    leave(deployment, PAYROLL, "pay-1", "pay-2")
    leave(deployment, till, "till-1")
    assert_shown("list", "list")
    assert assert_shown("discard-no", "discard", "--key", PAYROLL, typed="n\n").exit_code == 1
    assert_shown("publish", "publish", "--key", PAYROLL, "--key", till)
    deployment.upstream.bind_replies("收银台.#")
    assert_shown("publish-some", "publish", "--key", PAYROLL, "--key", till)
    assert_shown("discard-yes", "discard", "--key", PAYROLL, typed="y\n")
