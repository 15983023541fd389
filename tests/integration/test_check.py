"""``onenet-worker check``: the exit code, and the report of each part that cannot be used."""

import json
import re
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, nullcontext
from pathlib import Path
from urllib.parse import urlsplit
from uuid import uuid4

import pytest

from tests.support.builders import a_command
from tests.support.checks import check, settings_of
from tests.support.command_line import run_cli
from tests.support.deployment import Deployment
from tests.support.proxies import Proxy, raw_server
from tests.support.simulator import API_KEY, onenet
from tests.support.terminal import Screen, assert_screen, show
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
    code, found = check(deployment, AMQP_DECLARE="false", **rights("", ".*", ".*"))
    assert (code, found.get("permissions")) == (0, None)
    assert f"no right to configure queues {topology.questions_queue('…')}" in found[""][0]
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
    for queue in emptied(topology):  # the command is there, was not delivered, and nothing came beside it
        expected = int(queue == topology.execute_queue)
        assert channel.queue_declare(queue, passive=True).method.message_count == expected
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


def test_check_counts_what_waits_and_who_consumes(with_results: Deployment) -> None:
    topology, channel = with_results.topology, with_results.upstream.channel
    declare_on(channel, topology)
    for exchange, routing_key, count in (
        (topology.commands_exchange, EXECUTE, 3),
        (topology.retry_exchange, topology.retry_queue(60), 2),
        (topology.retry_exchange, topology.result_delay_queue(300), 4),
        (topology.dead_letters_exchange, "execute.expired", 1),
        (topology.replies_exchange, "execute.accepted.nobody", 2),
    ):
        for _ in range(count):
            channel.basic_publish(exchange, routing_key, b"{}", mandatory=True)
    assert said_of(check(with_results)[1], "queues") == (
        f"3 commands waiting in {topology.execute_queue}; 0 consumers; 2 commands waiting for another attempt; "
        "4 commands waiting for a result; 1 dead letter; 2 unrouted replies"
    )
    channel.queue_purge(topology.execute_queue)
    with with_results.worker():
        assert "; 1 consumer; " in said_of(check(with_results)[1], "queues")


def said_of(found: dict[str, list[str]], name: str) -> str:
    """Return the detail of a check that was made once."""
    [line] = [line for line in map(json.loads, found[""][0].splitlines()) if line["check"] == name]
    return str(line["detail"])


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_check_fails_at_once_during_an_alarm_and_says_what_to_do(
    own_broker: LocalBroker, tmp_path: Path, kind: str
) -> None:
    """It would hang in its first publication, as workers and upstream systems do."""
    usual = {"memory": ("set_vm_memory_high_watermark", "0.6"), "disk": ("set_disk_free_limit", "50MB")}
    too_much = {
        "memory": ("set_vm_memory_high_watermark", "absolute", "1MB"),
        "disk": ("set_disk_free_limit", "1000000GB"),
    }
    with onenet() as simulator, Deployment.set_up(own_broker.url, tmp_path, simulator) as deployment:
        declare_on(deployment.upstream.channel, deployment.topology)
        deployment.upstream.publish(a_command())
        try:
            own_broker.control(*too_much[kind])
            wait_until(lambda: check(deployment)[1].get("alarms") is not None, PATIENCE_S, "the alarm")
            code, faults = check(deployment)
            assert code == 1
            assert faults.keys() == {"", "alarms", "permissions"}
            assert "rabbitmq-diagnostics alarms" in faults["alarms"][0]
            assert said_of(faults, "queues").startswith("1 command waiting in ")
        finally:
            own_broker.control(*usual[kind])
        wait_until(lambda: check(deployment)[0] == 0, PATIENCE_S, "the end of the alarm")


@pytest.mark.parametrize("rights", [(".*", "^$", ".*"), ("^$", ".*", ".*")], ids=["write nothing", "declare nothing"])
def test_check_sees_an_alarm_whatever_rights_its_user_has(
    with_rights: tuple[Deployment, Rights], own_broker: LocalBroker, rights: tuple[str, str, str]
) -> None:
    deployment, give = with_rights
    settings = give(*rights)
    assert "alarms" not in check(deployment, **settings)[1]
    try:
        own_broker.control("set_vm_memory_high_watermark", "absolute", "1MB")
        wait_until(lambda: "alarms" in check(deployment, **settings)[1], PATIENCE_S, "the alarm")
    finally:
        own_broker.control("set_vm_memory_high_watermark", "0.6")


@pytest.mark.parametrize("is_there", [True, False])
def test_check_says_which_url_it_asked_and_by_which_proxy(deployment: Deployment, is_there: bool) -> None:
    declare_on(deployment.upstream.channel, deployment.topology)
    url = deployment.simulator.url if is_there else f"http://127.0.0.1:{free_port()}"
    direct = check(deployment, ONENET_URL=url)[1]
    assert said_of(direct, "OneNET").startswith(f"{url}: {'credentials' if is_there else 'cannot be reached: '}")
    proxy = urlsplit(url)
    settings = {"ONENET_URL": "http://onenet.invalid", "HTTP_PROXY": f"http://svc:aSecret@{proxy.netloc}/"}
    by_proxy = check(deployment, **settings)[1]
    assert said_of(by_proxy, "OneNET").startswith(f"http://onenet.invalid by the proxy {proxy.netloc}: ")
    assert not [secret for secret in ("svc", "aSecret") if secret in by_proxy[""][0]]


@pytest.mark.parametrize("place", ["environment", ".env"])
def test_check_fails_for_a_misspelt_setting_and_names_the_one_that_may_be_meant(
    deployment: Deployment, place: str
) -> None:
    declare_on(deployment.upstream.channel, deployment.topology)
    misspelt = {"WORKER_CONCURENCY": "7", "onenet_ratelimit": "9/second"}
    if place == ".env":
        (deployment.folder / ".env").write_text("".join(f"{name}={value}\n" for name, value in misspelt.items()))
    code, faults = check(deployment, **(misspelt if place == "environment" else {}))
    assert code == 1
    where = "the environment" if place == "environment" else ".env"
    assert faults["settings"] == [
        f"onenet_ratelimit: is not a setting, and has no effect ({where}): did you mean ONENET_RATE_LIMIT?",
        f"WORKER_CONCURENCY: is not a setting, and has no effect ({where}): did you mean WORKER_CONCURRENCY?",
    ]
    assert faults.keys() == {"", "settings"}  # the other checks are made all the same
    assert "9/second" not in faults[""][0]


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("is_good", [True, False], ids=["good", "bad"])
def test_a_terminal_shows_every_word_of_the_checks(deployment: Deployment, columns: int, is_good: bool) -> None:
    if is_good:
        declare_on(deployment.upstream.channel, deployment.topology)
    closed = str(free_port())
    bad = {
        "WORKER_CONCURENCY": "7",
        "IDEMPOTENCY_URL": f"redis://svc:aSecret@127.0.0.1:{closed}/0",
        "ONENET_URL": "https://onenet.invalid",
        "HTTPS_PROXY": f"http://svc:aSecret@127.0.0.1:{closed}",
    }
    shown, replaced = show_check(deployment, columns, {} if is_good else bad)
    assert shown.exit_code == (0 if is_good else 1)
    assert max(map(len, shown.text.split("\n"))) <= columns
    assert_screen(f"check-{'good' if is_good else 'bad'}-{columns}", shown.text, replaced | {closed: "7" * len(closed)})


def show_check(deployment: Deployment, columns: int, settings: Mapping[str, str]) -> tuple[Screen, dict[str, str]]:
    """Return the screen of ``check``, and what differs in each run; the broker is at 127.0.0.1, wherever it is."""
    with closing(Proxy(deployment.broker_url)) as proxy:
        environment = settings_of(deployment) | {"AMQP_URL": proxy.url} | dict(settings)
        shown = show(["check"], deployment.folder, environment, columns=columns)
        port, platform = str(urlsplit(proxy.url).port), str(urlsplit(deployment.simulator.url).port)
    replaced = {port: "5" * len(port), platform: "8" * len(platform)}
    return shown, replaced | {deployment.topology.namespace: "test-namespace"[:13]}


@pytest.mark.parametrize("columns", [80, 120])
def test_a_terminal_shows_what_running_workers_say(deployment: Deployment, columns: int) -> None:
    settings = settings_of(deployment)
    with deployment.worker() as worker:
        order = ("pause", "--by", "alice@control-room", "--reason", "valve 7 leaks")
        show(order, deployment.folder, settings, columns=columns)
        worker.wait_for("paused_by_hand")
        shown, replaced = show_check(deployment, columns, {})
    assert_screen(f"check-paused-{columns}", shown.text, replaced)


def test_a_worker_that_consumes_and_does_not_answer_is_a_warning(deployment: Deployment) -> None:
    """A worker could be started all the same, as during an upgrade: the other one may be of an older version."""
    with deployment.worker() as worker:
        worker.process.signal(signal.SIGSTOP)
        result = run_cli("check", folder=deployment.folder, **settings_of(deployment))
        worker.process.signal(signal.SIGCONT)
    assert result.returncode == 0, result.stdout
    assert "warn  workers: none answered; workers that take commands and do not answer: 1 of 1" in result.stdout


def test_running_workers_that_cannot_use_their_store_fail(deployment: Deployment) -> None:
    """Not that of this machine, which may be another one."""
    with deployment.start_worker(IDEMPOTENCY_URL=f"redis://127.0.0.1:{free_port()}/0") as worker:
        worker.wait_for("store_unavailable")
        exit_code, faults = check(deployment)
    assert exit_code == 1
    assert "no worker can use the idempotency store" in faults["workers"][0]


def test_a_terminal_without_utf_8_shows_the_checks_in_its_width(deployment: Deployment) -> None:
    settings = settings_of(deployment) | {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    shown = show(["check"], deployment.folder, settings, columns=80).text
    assert shown.isascii()
    assert {len(line) for line in shown.split("\n") if line.startswith(("|", "+"))} == {80}
