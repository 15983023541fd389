"""``pause``, ``resume`` and ``probe``: orders to all workers, through the broker."""

import json
import re
import shlex
import signal
import socket
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from pydantic import SecretStr

from tests.support.builders import a_command
from tests.support.command_line import run_cli
from tests.support.deployment import Deployment
from tests.support.proxies import Proxy
from tests.support.simulator import API_KEY, onenet
from tests.support.terminal import assert_screen, show
from tests.support.waiting import PATIENCE_S
from worker.admin.obstacles import find_obstacles
from worker.admin.pauses import Operator
from worker.amqp import control_client
from worker.amqp.address import BrokerAddress
from worker.amqp.blocking import declare_on
from worker.amqp.connection import ALARM
from worker.amqp.control_messages import order_publication
from worker.core.pauses import Order
from worker.dev.services.broker import LocalBroker
from worker.dev.services.ports import wait_until
from worker.dev.services.processes import LocalProcess
from worker.errors import WorkerError
from worker.simulator.faults import Fault

pytestmark = pytest.mark.broker_version


@pytest.fixture
def environment(deployment: Deployment) -> dict[str, str]:
    return {"AMQP_URL": deployment.broker_url, "WORKER_NAMESPACE": deployment.topology.namespace}


def ordered(tmp_path: Path, environment: dict[str, str], *arguments: str, workers: int = 0) -> Any:
    """Run one of the commands with ``--json``; returns what it printed.

    Again until so many workers have answered in time: a slow one follows the order all the same.
    """
    found: list[Any] = []

    def have_answered() -> bool:
        result = run_cli(*arguments, "--json", folder=tmp_path, **environment)
        assert result.stdout, result.stderr
        found.append(json.loads(result.stdout))
        return len(found[-1]["workers"]) >= workers

    wait_until(have_answered, PATIENCE_S, f"{workers} answers")
    return found[-1]


def two_products(folder: Path) -> dict[str, str]:
    """Return the settings of a worker with a default product and one named heating."""
    path = folder / "products.json"
    path.write_text(json.dumps({"heating": {"api_key": API_KEY}}))
    return {"ONENET_PRODUCTS_FILE": str(path)}


def test_a_key_is_rotated_while_its_product_is_paused_by_hand(
    deployment: Deployment, environment: dict[str, str], tmp_path: Path
) -> None:
    """As docs/operations.md says; a command is not sent with the former key."""
    secret = tmp_path / "key"
    secret.write_text("former\n")
    settings = {"ONENET_API_KEY": "", "ONENET_API_KEY_FILE": str(secret), "WORKER_PROBE_INTERVAL": "1"}
    with deployment.worker(**settings) as worker:
        ordered(tmp_path, environment, "pause", "--reason", "new key", workers=1)
        deployment.upstream.publish(a_command(command_id="c"))
        secret.write_text(f"{API_KEY}\n")
        worker.wait_for("products_reloaded")
        ordered(tmp_path, environment, "resume", workers=1)
        assert deployment.upstream.reply().json["status"] == "accepted"


def test_a_paused_fleet_sends_nothing_until_it_is_resumed(
    deployment: Deployment, environment: dict[str, str], tmp_path: Path
) -> None:
    with deployment.worker() as first, deployment.worker() as second:
        found = ordered(tmp_path, environment, "pause", "--by", "alice", "--reason", "valve 7 leaks", workers=2)
        assert all(state["is_by_hand"] for worker in found["workers"] for state in worker["products"])
        for worker in (first, second):
            worker.wait_for("paused_by_hand", by="alice", reason="valve 7 leaks", is_for_all=True)
            worker.wait_for("consumption_paused", next_try_in_s=None)
        wait_until(lambda: deployment.upstream.consumers() == 0, PATIENCE_S, "the end of consuming")
        deployment.upstream.publish(a_command(command_id="c-1"))
        assert deployment.upstream.count(deployment.topology.execute_queue) == 1
        found = ordered(tmp_path, environment, "resume", "--by", "bob")
        assert found["paused_by_hand"] == []
        assert deployment.upstream.reply().json["status"] == "accepted"
        first.wait_for("resumed_by_hand", by="bob")
    assert len(deployment.simulator.requests) == 1


def test_a_worker_that_starts_later_knows_the_pause(
    deployment: Deployment, environment: dict[str, str], tmp_path: Path
) -> None:
    """However its predecessor ended: a pause that a restart ends would open a valve by accident."""
    with deployment.worker():
        ordered(tmp_path, environment, "pause", "--by", "alice")
    deployment.upstream.publish(a_command(command_id="c-1"))
    with deployment.start_worker() as worker:
        worker.wait_for("paused_by_hand", by="alice")
        worker.wait_for("consumption_paused")
        assert deployment.upstream.count(deployment.topology.execute_queue) == 1
        ordered(tmp_path, environment, "resume")
        deployment.upstream.bind_replies()
        assert deployment.upstream.reply().json["status"] == "accepted"
    assert len(deployment.simulator.requests) == 1


def test_a_worker_that_lost_its_connection_sends_nothing_after_a_pause_that_it_missed(
    deployment: Deployment, environment: dict[str, str], tmp_path: Path
) -> None:
    with closing(Proxy(deployment.broker_url)) as proxy, deployment.worker(AMQP_URL=proxy.url) as worker:
        proxy.hold()
        proxy.cut()
        worker.wait_for("broker_connection_lost")
        ordered(tmp_path, environment, "pause", "--by", "alice")
        deployment.upstream.publish(a_command(command_id="c-1"))
        proxy.release()
        worker.wait_for("consumption_paused")
        assert worker.wait_for("paused_by_hand")["by"] == "alice"
        assert deployment.upstream.count(deployment.topology.execute_queue) == 1
    assert not deployment.simulator.requests


def test_without_the_control_stream_commands_are_sent_and_pauses_followed_once_it_is_there(
    deployment: Deployment, environment: dict[str, str], tmp_path: Path
) -> None:
    """Where the workers may not declare, an operator does it, perhaps late."""
    declare_on(deployment.upstream.channel, deployment.topology)
    for queue in (deployment.topology.control_stream, deployment.topology.unrouted_samples_queue):
        deployment.upstream.channel.queue_delete(queue)
    with deployment.worker(AMQP_DECLARE="false") as worker:
        worker.wait_for("control_unavailable")
        deployment.upstream.publish(a_command(command_id="c-1"))
        assert deployment.upstream.reply().json["status"] == "accepted"
        silent = run_cli("pause", folder=tmp_path, **environment)
        assert (silent.returncode, "topology" in silent.stderr) == (1, True), silent.stderr
        assert run_cli("topology", folder=tmp_path, **environment).returncode == 0
        ordered(tmp_path, environment, "pause", "--by", "alice")
        worker.wait_for("paused_by_hand", by="alice")


def test_a_control_stream_that_is_deleted_is_declared_again(
    deployment: Deployment, environment: dict[str, str], tmp_path: Path
) -> None:
    with deployment.worker() as worker:
        deployment.upstream.channel.queue_delete(deployment.topology.control_stream)
        worker.wait_for("control_unavailable")
        wait_until(
            lambda: run_cli("pause", folder=tmp_path, **environment).returncode == 0, PATIENCE_S, "the worker's answer"
        )
        worker.wait_for("paused_by_hand")


def test_a_pause_that_a_sending_worker_has_not_answered_is_no_success(
    deployment: Deployment, environment: dict[str, str], tmp_path: Path
) -> None:
    with deployment.worker() as worker:
        worker.process.signal(signal.SIGSTOP)
        result = run_cli("pause", folder=tmp_path, **environment)
        worker.process.signal(signal.SIGCONT)
        assert result.returncode == 1
        assert "workers that have not answered: 1 of 1; they may send until the order reaches them" in result.stderr
        worker.wait_for("paused_by_hand")


def test_a_probe_where_nothing_is_paused_says_so(
    deployment: Deployment, environment: dict[str, str], tmp_path: Path
) -> None:
    with deployment.worker():
        ordered(tmp_path, environment, "probe", workers=1)
        result = run_cli("probe", folder=tmp_path, **environment)
        assert "is the probe" not in result.stderr


def test_a_probe_of_a_product_that_no_worker_has_is_no_success(
    deployment: Deployment, environment: dict[str, str], tmp_path: Path
) -> None:
    with deployment.worker():
        result = run_cli("probe", "--product", "heatign", folder=tmp_path, **environment)
        assert result.returncode == 1
        assert "no worker that answered has a product named heatign" in result.stderr
        assert "is the probe" not in result.stderr


def test_one_product_is_paused_and_the_others_go_on(
    deployment: Deployment, environment: dict[str, str], tmp_path: Path
) -> None:
    with deployment.worker(**two_products(tmp_path)) as worker:
        ordered(tmp_path, environment, "pause", "--product", "heating")
        deployment.upstream.publish(a_command(command_id="held", product="heating"))
        deployment.upstream.publish(a_command(command_id="sent"))
        assert deployment.upstream.reply().json["command_id"] == "sent"
        worker.wait_for("command_postponed", command_id="held")
        ordered(tmp_path, environment, "resume", "--product", "heating")
        assert deployment.upstream.reply().json["command_id"] == "held"


def test_commands_without_a_product_are_paused_alone(
    deployment: Deployment, environment: dict[str, str], tmp_path: Path
) -> None:
    with deployment.worker(**two_products(tmp_path)) as worker:
        ordered(tmp_path, environment, "pause", "--default-product")
        deployment.upstream.publish(a_command(command_id="held"))
        deployment.upstream.publish(a_command(command_id="sent", product="heating"))
        assert deployment.upstream.reply().json["command_id"] == "sent"
        worker.wait_for("command_postponed", command_id="held")


def test_a_probe_by_hand_ends_a_pause_long_before_the_next_one_is_due(
    deployment: Deployment, environment: dict[str, str], tmp_path: Path
) -> None:
    fault = Fault(kind="error_500", endpoint="execute")
    deployment.simulator.faults.replace([fault])
    settings = {"WORKER_PAUSE_AFTER_FAILURES": "1", "WORKER_PROBE_INTERVAL": "3600"}
    with deployment.worker(**settings) as worker:
        deployment.upstream.publish(a_command(command_id="failed"))
        worker.wait_for("consumption_paused")
        deployment.simulator.faults.replace([])
        deployment.upstream.publish(a_command(command_id="probe"))
        found = ordered(tmp_path, environment, "probe", "--by", "carol", workers=1)
        [state] = found["workers"][0]["products"]
        assert (state["is_paused"], state["is_by_hand"]) == (True, False)
        worker.wait_for("probe_by_hand", by="carol")
        worker.wait_for("product_resumed")
        assert deployment.upstream.reply().json["command_id"] == "probe"


def test_a_product_that_was_paused_by_hand_is_not_probed(
    deployment: Deployment, environment: dict[str, str], tmp_path: Path
) -> None:
    with deployment.worker():
        ordered(tmp_path, environment, "pause", "--by", "alice")
        for refused in (("probe",), ("resume", "--product", "heating")):
            result = run_cli(*refused, folder=tmp_path, **environment)
            assert result.returncode == 1
            assert all(words in result.stderr for words in ("by alice", "onenet-worker resume"))


def test_the_end_of_all_pauses_names_each(deployment: Deployment, environment: dict[str, str], tmp_path: Path) -> None:
    """One of them may be another person's."""
    with deployment.worker(**two_products(tmp_path)):
        ordered(tmp_path, environment, "pause", "--product", "heating", "--by", "alice")
        ordered(tmp_path, environment, "pause", "--default-product", "--by", "bob")
        found = ordered(tmp_path, environment, "resume", "--default-product")
        assert [(order["scope"], order["by"]) for order in found["ended"]] == [("", "bob")]
        result = run_cli("resume", folder=tmp_path, **environment)
        assert result.stdout.splitlines()[1].startswith("ended the pause of product heating, since ")
        assert ordered(tmp_path, environment, "resume")["ended"] == []


@pytest.mark.parametrize(
    ("option", "text", "said"),
    [
        ("--reason", "x" * 501, "reason: must have at most 500 characters"),
        ("--by", "x" * 301, "by: must have at most 300 characters"),
    ],
    ids=ascii,
)
def test_what_no_order_can_hold_is_refused_in_plain_words(
    option: str, text: str, said: str, deployment: Deployment, environment: dict[str, str], tmp_path: Path
) -> None:
    declare_on(deployment.upstream.channel, deployment.topology)
    result = run_cli("pause", option, text, folder=tmp_path, **environment)
    assert (result.returncode, result.stderr) == (1, f"onenet-worker: {said}\n")


def test_during_an_alarm_it_is_said_what_keeps_commands_and_whether_an_order_holds(
    own_broker: LocalBroker, tmp_path: Path
) -> None:
    with onenet() as simulator, Deployment.set_up(own_broker.url, tmp_path, simulator) as site:
        declare_on(site.upstream.channel, site.topology)
        environment = {"AMQP_URL": own_broker.url, "WORKER_NAMESPACE": site.topology.namespace}
        own_broker.control("set_vm_memory_high_watermark", "absolute", "1MB")
        try:
            [obstacle] = find_obstacles(BrokerAddress((SecretStr(own_broker.url),)), site.topology)
            result = run_cli("pause", folder=tmp_path, **environment)
        finally:  # otherwise every other test would be blocked
            own_broker.control("set_vm_memory_high_watermark", "0.6")
    assert (obstacle.kind, obstacle.text) == ("alarm", ALARM)
    assert result.returncode == 1
    assert result.stderr.startswith(f"onenet-worker: {ALARM}")


def test_without_a_worker_an_order_says_that_none_has_answered(
    deployment: Deployment, environment: dict[str, str], tmp_path: Path
) -> None:
    assert run_cli("topology", folder=tmp_path, **environment).returncode == 0
    result = run_cli("pause", folder=tmp_path, **environment)
    assert (result.returncode, "no worker has answered" in result.stderr) == (0, True)
    result = run_cli("pause", folder=tmp_path, AMQP_URL=deployment.broker_url, WORKER_NAMESPACE="nowhere")
    assert result.returncode == 1
    assert "onenet-worker topology" in result.stderr


def test_a_probe_that_no_worker_answers_is_no_success(
    deployment: Deployment, environment: dict[str, str], tmp_path: Path
) -> None:
    """Nobody will know of it later, unlike of a pause."""
    assert run_cli("topology", folder=tmp_path, **environment).returncode == 0
    result = run_cli("probe", folder=tmp_path, **environment)
    assert result.returncode == 1
    assert "no worker has answered; nothing was probed" in result.stderr


def test_orders_that_arrive_together_are_all_read(deployment: Deployment) -> None:
    """They are in one chunk of the stream, which is where a reader of its last message begins."""
    declare_on(deployment.upstream.channel, deployment.topology)
    operator = Operator(BrokerAddress([SecretStr(deployment.broker_url)]), deployment.topology, "alice")
    for _ in range(5):
        operator.resume(None)
        for product in ("heating", "cooling"):
            order = Order(id=str(uuid4()), kind="pause", scope=product, at=datetime.now(UTC))
            publication = order_publication(deployment.topology, order)
            deployment.upstream.channel.basic_publish(
                publication.exchange, publication.routing_key, publication.body, publication.properties
            )
        wait_until(lambda: len(operator.state().pauses.orders) == 2, PATIENCE_S, "both pauses")
        assert {order.scope for order in operator.state().pauses.orders} == {"heating", "cooling"}


def test_an_order_whose_answers_are_lost_is_said_to_be_given(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    declare_on(deployment.upstream.channel, deployment.topology)
    read = control_client.read_pauses
    with closing(Proxy(deployment.broker_url)) as proxy:

        def cut(*args: Any) -> Any:
            proxy.cut()
            return read(*args)

        monkeypatch.setattr(control_client, "read_pauses", cut)
        operator = Operator(BrokerAddress([SecretStr(proxy.url)]), deployment.topology, "alice")
        with pytest.raises(WorkerError, match="the order was given, but its answers were lost: "):
            operator.pause(None)
    monkeypatch.undo()
    direct = Operator(BrokerAddress([SecretStr(deployment.broker_url)]), deployment.topology, "bob")
    assert [order.by for order in direct.state().pauses.orders] == ["alice"]


def test_an_interrupt_says_that_an_order_may_be_in_force(tmp_path: Path) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        url = f"amqp://127.0.0.1:{server.getsockname()[1]}/"
        process = LocalProcess(["pause"], {"AMQP_URL": url, "ONENET_API_KEY": "k"}, tmp_path / "pause")
        server.settimeout(PATIENCE_S)
        with closing(server.accept()[0]):
            process.signal(signal.SIGINT)
            assert process.wait() == 130
    assert "interrupted: the order may be in force" in process.output.read_text()


def test_what_is_no_order_changes_nothing(deployment: Deployment, environment: dict[str, str], tmp_path: Path) -> None:
    """Another version, or a person, may have written anything into the stream."""
    nonsense = [
        b"",
        b"\xff" * 200_000,
        b'{"id": "1", "kind": "explode", "at": "2026-01-01T00:00:00Z"}',
        b'{"id": "1", "kind": "pause", "at": "0001-01-01T00:00:00Z"}',
        b'{"id": "1", "kind": "pause", "at": "9999-12-31T23:59:59-23:59", "scope": 5}',
        b"[" * 10_000,
    ]

    def write() -> None:
        for body in nonsense:
            deployment.upstream.channel.basic_publish(deployment.topology.control_exchange, "order", body)

    with deployment.worker() as running:
        write()
        ordered(tmp_path, environment, "pause", "--by", "alice")
        ordered(tmp_path, environment, "resume", "--by", "alice")
        running.wait_for("resumed_by_hand")
        write()
    with deployment.worker() as worker:
        deployment.upstream.publish(a_command(command_id="c-1"))
        assert deployment.upstream.reply().json["status"] == "accepted"
        assert not [line for line in worker.events if line["event"] == "control_unavailable"]


def test_all_earlier_orders_are_read_before_a_command_is_taken(deployment: Deployment) -> None:
    with deployment.worker():
        pass
    at = datetime.now(UTC).isoformat()
    for number in range(2_001):  # the last one is a pause
        kind = "resume" if number % 2 else "pause"
        body = json.dumps({"id": str(number), "kind": kind, "by": "alice", "at": at}).encode()
        deployment.upstream.channel.basic_publish(deployment.topology.control_exchange, "order", body)
    deployment.upstream.publish(a_command(command_id="c-1"))
    with deployment.start_worker() as worker:
        worker.wait_for("consumption_paused")
        assert [line["event"] for line in worker.events].count("paused_by_hand") == 1
        assert deployment.upstream.count(deployment.topology.execute_queue) == 1
    assert not deployment.simulator.requests


@pytest.mark.parametrize("columns", [80, 120])
def test_the_screens_of_an_operator(
    columns: int, deployment: Deployment, environment: dict[str, str], tmp_path: Path
) -> None:
    assert run_cli("topology", folder=tmp_path, **environment).returncode == 0

    def shown(*arguments: str) -> str:
        screen = show(arguments, tmp_path, environment, columns=columns)
        return f"$ onenet-worker {shlex.join(arguments)}\n{screen.text}"

    who = ("--by", "alice@control-room")
    screens = [
        shown("pause", "--product", "heating", *who, "--reason", "valve 7 leaks, and nobody is there before 18:00"),
        shown("pause", *who, "--reason", "maintenance"),
        shown("resume", "--product", "heating"),
        shown("probe"),
        shown("resume", *who),
    ]
    found = re.sub(r"[0-9]{4}(-[0-9]{2}){2} [0-9]{2}(:[0-9]{2}){2}", "2026-11-30 08:00:00", "\n".join(screens))
    assert_screen(f"pause-{columns}", found)


def test_a_screen_shows_what_each_worker_does(
    deployment: Deployment, environment: dict[str, str], tmp_path: Path
) -> None:
    with deployment.worker(**two_products(tmp_path)) as worker:
        screen = show(("pause", "--product", "heating"), tmp_path, environment, columns=120).text
        name = worker.wait_for("worker_started")["worker"]
    rows = [re.split(r"\s*│\s*", line.strip("│ "))[:3] for line in screen.splitlines() if name in line]
    assert rows == [[name, "the default product", "sends"], [name, "product heating", "paused by hand"]]
