"""``onenet-worker check``: the exit code, and the report of each part that cannot be used."""

import json
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from urllib.parse import urlsplit
from uuid import uuid4

import pytest

from tests.support.builders import a_command
from tests.support.checks import check
from tests.support.deployment import Deployment
from tests.support.proxies import raw_server
from tests.support.simulator import API_KEY, onenet
from tests.support.waiting import PATIENCE_S
from worker.amqp.blocking import declare_on, delete_on
from worker.amqp.topology import EXECUTE, RESULT, Topology
from worker.dev.services.broker import LocalBroker
from worker.dev.services.ports import free_port, wait_until
from worker.simulator.faults import Fault

pytestmark = pytest.mark.broker_version


def _swallow(sock: socket.socket) -> None:
    while sock.recv(65536):
        pass


def test_check_exits_with_0_and_sends_no_command_when_everything_is_reachable(
    deployment: Deployment, redis_url: str
) -> None:
    declare_on(deployment.upstream.channel, deployment.topology)
    code, faults = check(deployment, IDEMPOTENCY_URL=redis_url)
    assert code == 0, faults
    assert deployment.simulator.platform.commands == []


@pytest.fixture
def with_rights(own_broker: LocalBroker, tmp_path: Path) -> Iterator[tuple[Deployment, "Rights"]]:
    """A deployment, and what gives its user rights."""
    with onenet() as simulator, Deployment.set_up(own_broker.url, tmp_path, simulator) as deployment:
        declare_on(deployment.upstream.channel, deployment.topology)
        user = f"user-{uuid4().hex[:8]}"
        own_broker.control("add_user", user, "password")

        def rights(configure: str, write: str, read: str) -> dict[str, str]:
            own_broker.control("set_permissions", user, configure, write, read)
            target = urlsplit(own_broker.url)
            return {"AMQP_URL": f"amqp://{user}:password@{target.hostname}:{target.port}/"}

        yield deployment, rights
        own_broker.control("delete_user", user)


Rights = Callable[[str, str, str], dict[str, str]]


def emptied(topology: Topology) -> list[str]:
    """Return the queues that are empty once their messages are read, which a stream never is."""
    return [queue.name for queue in topology.queues() if queue.name != topology.control_stream]


def test_check_names_each_right_that_is_missing_and_changes_nothing(
    with_rights: tuple[Deployment, Rights],
) -> None:
    deployment, rights = with_rights
    topology, channel = deployment.topology, deployment.upstream.channel
    deployment.upstream.publish(a_command())
    assert check(deployment, **rights(".*", ".*", ".*"))[1].get("permissions") is None
    assert check(deployment, AMQP_DECLARE="false", **rights("", ".*", ".*"))[1].get("permissions") is None
    code, faults = check(deployment, **rights("^$", f"^{topology.replies_exchange}$", "^$"))
    assert code == 1
    lines = "\n".join(faults["permissions"])
    for wanted in (
        f"configure the queue {topology.execute_queue}",
        f"configure the exchange {topology.commands_exchange}",
        f"read the queue {topology.execute_queue}",
        f"write to the exchange {topology.retry_exchange}",
        f"write to the exchange {topology.dead_letters_exchange}",
    ):
        assert wanted in lines
    assert topology.replies_exchange + " with" not in lines
    code, faults = check(deployment, AMQP_DECLARE="false", **rights("^$", ".*", "^$"))
    assert [line.removeprefix("this user has no right to ") for line in faults["permissions"]] == [
        f"read the queue {queue}"
        for queue in (topology.execute_queue, topology.control_stream, topology.unrouted_samples_queue)
    ]
    for queue in topology.queues():  # the command is there, was not delivered, and nothing came beside it
        expected = int(queue.name == topology.execute_queue)
        assert channel.queue_declare(queue.name, passive=True).method.message_count == expected
    method, _, _ = channel.basic_get(topology.execute_queue)
    assert method is not None
    assert not method.redelivered


def test_check_names_missing_rights_before_anything_is_declared(with_rights: tuple[Deployment, Rights]) -> None:
    """And creates nothing, whichever rights there are."""
    deployment, rights = with_rights
    delete_on(deployment.upstream.channel, deployment.topology)
    for configure, missing in ((".*", False), ("^$", True)):
        _, faults = check(deployment, **rights(configure, ".*", ".*"))
        assert deployment.topology.execute_queue in faults["topology"][0]
        assert ("permissions" in faults) == missing


@pytest.mark.parametrize("has_worker", [False, True])
def test_check_finds_that_delayed_commands_return_and_leaves_nothing(deployment: Deployment, has_worker: bool) -> None:
    declare_on(deployment.upstream.channel, deployment.topology)
    with deployment.worker(AMQP_DECLARE="false") if has_worker else nullcontext():
        code, faults = check(deployment, AMQP_DECLARE="false")
        assert code == 0, faults
        wait_until(
            lambda: all(deployment.upstream.count(queue) == 0 for queue in emptied(deployment.topology)),
            PATIENCE_S,
            "the end of the probes",
        )


@pytest.mark.parametrize("direction", ["to the delay queue", "back"])
def test_without_declaring_check_sees_a_missing_binding(deployment: Deployment, direction: str) -> None:
    """Delayed commands would stay for ever."""
    topology, channel = deployment.topology, deployment.upstream.channel
    declare_on(channel, topology)
    if direction == "back":
        channel.queue_unbind(topology.execute_queue, topology.returns_exchange, "execute")
        named = topology.returns_exchange
    else:
        named = topology.retry_queue(topology.delay_queues_s[0])
        channel.queue_unbind(named, topology.retry_exchange, named)
    code, faults = check(deployment, AMQP_DECLARE="false")
    assert code == 1
    [fault] = faults["topology"]
    assert named in fault
    assert "no binding" in fault


@pytest.fixture
def with_results(broker_url: str, tmp_path: Path) -> Iterator[Deployment]:
    """A deployment with results."""
    with onenet() as simulator, Deployment.set_up(broker_url, tmp_path, simulator, result_delays_s=(60, 300)) as found:
        yield found


@pytest.mark.parametrize("has_worker", [False, True])
def test_check_finds_that_accepted_commands_return_for_their_results(
    with_results: Deployment, has_worker: bool
) -> None:
    deployment, topology = with_results, with_results.topology
    declare_on(deployment.upstream.channel, topology)
    with deployment.worker(AMQP_DECLARE="false") if has_worker else nullcontext() as worker:
        code, faults = check(deployment, AMQP_DECLARE="false")
        assert code == 0, faults
        assert "cannot be told" not in faults[""][0]
        assert ("not tried" in faults[""][0]) == has_worker
        wait_until(
            lambda: all(deployment.upstream.count(queue) == 0 for queue in emptied(topology)),
            PATIENCE_S,
            "the end of the probes",
        )
        assert not worker or not [line for line in worker.events if line["level"] == "error"]


@pytest.mark.parametrize("direction", ["to the delay queue", "back"])
@pytest.mark.parametrize("has_worker", [False, True])
def test_without_declaring_check_sees_a_missing_binding_of_results(
    with_results: Deployment, direction: str, has_worker: bool
) -> None:
    """Results would wait for ever."""
    deployment, topology, channel = with_results, with_results.topology, with_results.upstream.channel
    declare_on(channel, topology)
    if direction == "back":
        channel.queue_unbind(topology.results_queue, topology.returns_exchange, RESULT)
        wanted = f"no binding: {topology.returns_exchange} does not lead to {topology.results_queue}"
    else:
        delay_queue = topology.result_delay_queue(300)
        channel.queue_unbind(delay_queue, topology.retry_exchange, delay_queue)
        wanted = f"no binding: {topology.retry_exchange} does not lead to {delay_queue}"
    with deployment.worker(AMQP_DECLARE="false") if has_worker else nullcontext():
        code, faults = check(deployment, AMQP_DECLARE="false")
    assert (code, faults["topology"]) == (1, [wanted])


def test_check_takes_no_command_that_waits_for_its_result(with_results: Deployment) -> None:
    deployment, topology, channel = with_results, with_results.topology, with_results.upstream.channel
    declare_on(channel, topology)
    channel.basic_publish(topology.returns_exchange, RESULT, b"an accepted command", mandatory=True)
    code, faults = check(deployment, AMQP_DECLARE="false")
    assert code == 0, faults
    assert "whether delayed accepted commands return was not tried" in faults[""][0]
    assert deployment.upstream.count(topology.results_queue) == 1


def test_check_names_the_queues_of_results_that_are_missing(with_results: Deployment) -> None:
    """Results are turned on where workers may not declare the topology."""
    topology = with_results.topology
    declare_on(with_results.upstream.channel, Topology(topology.namespace, topology.delay_queues_s))
    code, faults = check(with_results, AMQP_DECLARE="false")
    missing = [topology.results_queue, *(topology.result_delay_queue(delay_s) for delay_s in (60, 300))]
    assert code == 1
    [line] = faults["topology"]
    assert f"not there: {', '.join(missing)}: " in line


def test_without_the_right_to_declare_check_sees_delay_arguments_that_lead_elsewhere(
    with_rights: tuple[Deployment, Rights],
) -> None:
    """This user may have a queue of its own to watch what returns."""
    deployment, rights = with_rights
    topology, channel = deployment.topology, deployment.upstream.channel
    queue = topology.retry_queue(topology.delay_queues_s[0])
    channel.queue_delete(queue)
    channel.queue_declare(queue, durable=True, arguments={"x-queue-type": "quorum"})
    channel.queue_bind(queue, topology.retry_exchange, queue)
    code, faults = check(deployment, AMQP_DECLARE="false", **rights("^amq.gen-", ".*", ".*"))
    assert code == 1
    [fault] = faults["topology"]
    assert queue in fault
    assert "do not return" in fault


@pytest.mark.parametrize("has_worker", [False, True])
def test_without_a_queue_of_its_own_check_sees_missing_bindings_and_leaves_nothing(
    with_rights: tuple[Deployment, Rights], has_worker: bool
) -> None:
    """The usual rights where AMQP_DECLARE is false: this user may declare nothing."""
    deployment, rights = with_rights
    topology, channel = deployment.topology, deployment.upstream.channel
    declare_on(channel, topology)
    usual = rights("^$", ".*", ".*")
    of_workers = "|".join(
        re.escape(exchange.name) for exchange in topology.exchanges() if exchange.name != topology.commands_exchange
    )
    unbound, *_ = (topology.retry_queue(delay_s) for delay_s in topology.delay_queues_s)
    with deployment.worker(AMQP_DECLARE="false", **usual) if has_worker else nullcontext():
        assert check(deployment, AMQP_DECLARE="false", **usual)[0] == 0
        code, lines = check(deployment, AMQP_DECLARE="false", **rights("^$", f"^({of_workers})$", ".*"))
        assert code == 0
        assert ("was not tried" if has_worker else "cannot be told by this user") in lines[""][0]
        usual = rights("^$", ".*", ".*")
        channel.queue_unbind(unbound, topology.retry_exchange, unbound)
        code, faults = check(deployment, AMQP_DECLARE="false", **usual)
        assert code == 1
        assert faults["topology"] == [f"no binding: {topology.retry_exchange} does not lead to {unbound}"]
        channel.queue_bind(unbound, topology.retry_exchange, unbound)
        tried = [topology.returns_exchange, *([] if has_worker else [topology.commands_exchange])]
        for exchange in tried:
            channel.queue_unbind(topology.execute_queue, exchange, EXECUTE)
            code, faults = check(deployment, AMQP_DECLARE="false", **usual)
            assert code == 1
            assert faults["topology"] == [f"no binding: {exchange} does not lead to {topology.execute_queue}"]
            channel.queue_bind(topology.execute_queue, exchange, EXECUTE)
        wait_until(lambda: deployment.upstream.count(topology.execute_queue) == 0, PATIENCE_S, "the end of the probes")


def test_check_does_not_declare_a_missing_topology(deployment: Deployment) -> None:
    for _ in range(2):
        code, faults = check(deployment)
        assert code == 1
        [fault] = faults["topology"]
        assert deployment.topology.execute_queue in fault
        assert "onenet-worker topology" in fault


def test_check_names_a_queue_with_other_arguments(deployment: Deployment) -> None:
    queue = deployment.topology.dead_letters_exchange
    deployment.upstream.channel.queue_declare(queue, durable=True, arguments={"x-queue-type": "quorum"})
    for exchange in deployment.topology.exchanges():
        deployment.upstream.channel.exchange_declare(
            exchange.name, exchange.kind, durable=True, arguments=exchange.arguments
        )
    for wanted in deployment.topology.queues():
        if wanted.name != queue:
            deployment.upstream.channel.queue_declare(wanted.name, durable=True, arguments=wanted.arguments)
    code, faults = check(deployment)
    assert code == 1
    [fault] = faults["topology"]
    assert "x-delivery-limit" in fault
    assert check(deployment, AMQP_DECLARE="false")[1]["topology"] == [fault]


def test_check_prints_one_line_for_each_wrong_setting(deployment: Deployment) -> None:
    code, faults = check(deployment, WORKER_CONCURRENCY="many", LOG_LEVEL="loud", ONENET_API_KEY="the key")
    assert code == 1
    assert [line.split(":")[0] for line in faults["settings"]] == ["ONENET_API_KEY", "WORKER_CONCURRENCY", "LOG_LEVEL"]
    assert "the key" not in faults[""][0]


def test_check_names_each_unreachable_service_without_its_secrets(deployment: Deployment) -> None:
    port = free_port()
    code, faults = check(
        deployment,
        AMQP_URL=f"amqp://me:aSecret@127.0.0.1:{port}/",
        IDEMPOTENCY_URL=f"redis://:aSecret@127.0.0.1:{port}/0",
        ONENET_URL=f"https://127.0.0.1:{port}",
        ONENET_API_KEY="aSecret",
    )
    assert code == 1
    assert faults.keys() == {"", "broker", "idempotency", "OneNET"}
    assert "aSecret" not in faults[""][0]


def test_check_ends_although_no_service_answers(deployment: Deployment) -> None:
    with raw_server(_swallow) as url:
        silent = url.removeprefix("http://")
        code, faults = check(
            deployment,
            AMQP_URL=f"amqp://{silent}/",
            IDEMPOTENCY_URL=f"redis://{silent}/0",
            ONENET_URL=f"http://{silent}",
            ONENET_CONNECT_TIMEOUT="1",
            ONENET_READ_TIMEOUT="1",
        )
    assert code == 1
    assert faults.keys() == {"", "broker", "idempotency", "OneNET"}


def test_check_tries_every_product_with_its_own_credentials(deployment: Deployment) -> None:
    declare_on(deployment.upstream.channel, deployment.topology)
    products = deployment.folder / "products.json"
    products.write_text(json.dumps({"good": {"api_key": API_KEY}, "bad": {"api_key": "another"}}))
    code, faults = check(deployment, ONENET_PRODUCTS_FILE=str(products))
    assert code == 1
    [fault] = faults["OneNET, product bad"]
    assert "credentials" in fault
    assert faults.keys() == {"", "OneNET, product bad"}


def test_check_fails_when_the_platform_refuses_the_credentials_with_errno_3(deployment: Deployment) -> None:
    """The live platform answers so with HTTP 200."""
    declare_on(deployment.upstream.channel, deployment.topology)
    deployment.simulator.faults.replace([Fault(kind="errno", errno=3, error="token鉴权失败", endpoint="history")])
    code, faults = check(deployment, "--imei", "865820030000001")
    assert code == 1
    [fault] = faults["OneNET"]
    assert "refuses the credentials" in fault
    assert "device 865820030000001" in fault
    assert "--imei" in fault
    assert fault.endswith("errno 3: token鉴权失败")
    assert faults.keys() == {"", "OneNET"}
