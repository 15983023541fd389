"""Each line of the table in docs/security.md, tried by the users that this page creates."""

import asyncio
import json
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit
from uuid import uuid4

import pika
import pytest
import redis
import yaml
from pika.adapters.blocking_connection import BlockingChannel, BlockingConnection
from pika.exceptions import AMQPConnectionError, ChannelClosedByBroker

from scripts.documents import ROOT
from tests.support.builders import a_command
from tests.support.checks import check
from tests.support.command_line import run_cli
from tests.support.deployment import RETRY_DELAYS_S, Deployment
from tests.support.proxies import raw_server
from tests.support.security import NETWORK, THREATS, acl, definitions, rabbitmqctl
from tests.support.simulator import API_KEY, onenet
from tests.support.startup_code import run_at_startup
from tests.support.stores import LONG_S
from tests.support.upstream import Message, Upstream
from tests.support.waiting import PATIENCE_S
from worker.amqp.control_messages import FIRST, PREFETCH, beginning_at
from worker.amqp.topology import EXECUTE, ORDER, Topology
from worker.dev.services.broker import LocalBroker
from worker.dev.services.ports import free_port, is_listening, wait_until
from worker.dev.services.redis import LocalRedis
from worker.errors import StoreUnavailable
from worker.idempotency.redis import RedisStore
from worker.settings import Settings

pytestmark = [
    pytest.mark.broker_version,
    pytest.mark.xdist_group("security"),  # one process of pytest-xdist has the vhost and its users
    pytest.mark.timeout(900),  # the first test creates them: 14 calls of rabbitmqctl, each of which starts an Erlang VM
]

Act = Callable[[BlockingChannel], object]
Test = TypeVar("Test")
RedisClient = Any  # redis.Redis, not all of whose methods are typed
PASSWORD = "PASSWORD"  # as in the page
ACCESS_REFUSED, NOT_FOUND, PRECONDITION_FAILED = 403, 404, 406
SYSTEMS = ("billing", "payroll")
TOPOLOGY = Topology("onenet", (*RETRY_DELAYS_S, 60))
EXCHANGES = [exchange.name for exchange in TOPOLOGY.exchanges()]
QUEUES = [queue.name for queue in TOPOLOGY.queues()]
CLOSED_EXCHANGES = ["", "amq.topic", *(name for name in EXCHANGES if name != TOPOLOGY.commands_exchange)]
OTHERS_QUEUES = [*QUEUES, "payroll.replies"]

tried: set[tuple[str, str]] = set()


def tries(who: str, action: str, result: str) -> Callable[[Test], Test]:
    """Say which line of the table a test tries, and with what result."""
    assert THREATS[who, action] == result
    tried.add((who, action))
    return lambda test: test


@dataclass
class Broker:
    """A vhost with the users of the page, and the topology, which the operator has declared."""

    server: LocalBroker
    vhost: str
    folder: Path
    connections: dict[str, BlockingConnection] = field(default_factory=dict)

    def url(self, user: str, password: str = PASSWORD) -> str:
        address = urlsplit(self.server.url)
        return f"amqp://{user}:{password}@{address.hostname}:{address.port}/{self.vhost}"

    def run(self, arguments: list[str], system: str = "billing") -> None:
        """Run a command of the page in this vhost, for one of the upstream systems."""
        command, *others = (argument.replace("billing", system) for argument in arguments)
        in_vhost = ["-p", self.vhost] if command in {"set_permissions", "set_topic_permissions"} else []
        self.server.control(command, *in_vhost, *others)

    def import_definitions(self) -> None:
        """Import the definitions of the page from a file on the broker's machine, which may be a container."""
        wanted = [definitions(system, self.vhost) for system in SYSTEMS]
        merged = {kind: [each for of_one in wanted for each in of_one[kind]] for kind in wanted[0]}
        text, path = ",".join(map(str, json.dumps(merged).encode())), self.folder / "definitions.json"
        self.server.control("eval", f'ok = filelib:ensure_dir("{path}"), ok = file:write_file("{path}", <<{text}>>).')
        self.server.control("import_definitions", str(path))

    def refusal(self, user: str, act: Act) -> int | None:
        """Do something as a user, on a channel of its own; returns the code with which the broker closed it."""
        if user not in self.connections:
            self.connections[user] = BlockingConnection(pika.URLParameters(f"{self.url(user)}?heartbeat=0"))
        channel = self.connections[user].channel()
        channel.confirm_delivery()
        try:
            act(channel)
        except ChannelClosedByBroker as exc:
            return exc.reply_code
        channel.close()
        return None

    def disconnect(self, user: str) -> None:
        """Close the connection of a user, whose channels remember its rights."""
        if user in self.connections:
            self.connections.pop(user).close()


@pytest.fixture(scope="module")
def broker(own_broker: LocalBroker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    folder = tmp_path_factory.mktemp("security")
    found = Broker(own_broker, f"security-{uuid4().hex[:8]}", folder)
    with ExitStack() as stack:
        own_broker.control("add_vhost", found.vhost)
        stack.callback(own_broker.control, "delete_vhost", found.vhost)
        own_broker.control("set_permissions", "-p", found.vhost, "guest", ".*", ".*", ".*")
        for user in ("operator", "worker", *SYSTEMS):
            create, rights, *limits = rabbitmqctl(user.replace("payroll", "billing"))
            found.run(create, user)
            stack.callback(own_broker.control, "delete_user", user)
            for command in (rights, *(limit for limit in limits if limit[0] == "set_user_limits")):
                found.run(command, user)
        declared = run_cli(
            "topology",
            folder=folder,
            AMQP_URL=found.url("operator"),
            WORKER_RETRY_DELAYS=",".join(map(str, RETRY_DELAYS_S)),
        )
        assert declared.returncode == 0, declared.stderr
        found.import_definitions()
        yield found
        for user in list(found.connections):
            found.disconnect(user)


@pytest.fixture
def own_queues(broker: Broker) -> Iterator[Broker]:
    """The rights of a system that declares queues of its own."""
    _, usual, _, *others = rabbitmqctl("billing")
    for command in others:
        broker.run(command)
    broker.disconnect("billing")
    yield broker
    broker.run(["clear_topic_permissions", "-p", broker.vhost, "billing"])
    broker.run(usual)
    broker.disconnect("billing")


@pytest.fixture
def site(broker: Broker, tmp_path: Path) -> Iterator[Deployment]:
    """All queues empty, and what the workers need; the test's own user may do everything."""
    upstream = Upstream(broker.url("guest", "guest"), TOPOLOGY)
    for queue in (*QUEUES, *(f"{system}.replies" for system in SYSTEMS)):
        if queue != TOPOLOGY.control_stream:  # a stream cannot be emptied
            upstream.channel.queue_purge(queue)
    with onenet() as simulator:
        yield Deployment(broker.url("worker"), tmp_path, TOPOLOGY, upstream, simulator)
    upstream.disconnect()


@pytest.fixture
def server(own_redis: LocalRedis) -> Iterator[RedisClient]:
    """Redis with the users of the page."""
    with redis.Redis.from_url(own_redis.url, decode_responses=True) as found:
        for user in ("worker", "operator", "another"):
            found.execute_command(*acl(user))
        yield found
        for user in ("worker", "operator", "another"):
            found.execute_command("ACL", "DELUSER", user)
        for key in found.scan_iter("{onenet}:*"):
            found.delete(key)


@pytest.fixture
def settings(own_redis: LocalRedis, server: object) -> dict[str, str]:
    """The settings of a worker that has the fewest rights."""
    limit = {"ONENET_RATE_LIMIT": "300/second"}  # through Redis too
    return {"AMQP_DECLARE": "false", "IDEMPOTENCY_URL": redis_url(own_redis, "worker"), **limit}


def redis_url(own_redis: LocalRedis, user: str, password: str = PASSWORD) -> str:
    return own_redis.url.replace("redis://", f"redis://{user}:{password}@")


def publishing(exchange: str, routing_key: str, body: Any = b"", **properties: Any) -> Act:
    """Publish one message, and wait for the confirm."""
    body = json.dumps(body).encode() if isinstance(body, dict) else body

    def publish(channel: BlockingChannel) -> None:
        channel.basic_publish(exchange, routing_key, body, pika.BasicProperties(**properties))

    return publish


def send(broker: Broker, user: str, body: Any, **properties: Any) -> None:
    """Publish a command as an upstream system; the broker takes it."""
    act = publishing(TOPOLOGY.commands_exchange, EXECUTE, body, delivery_mode=2, **properties)
    assert broker.refusal(user, act) is None


def consuming(queue: str) -> Act:
    return lambda channel: channel.basic_consume(queue, lambda *_: None)


def getting(queue: str) -> Act:
    return lambda channel: channel.basic_get(queue)


def refused(broker: Broker, user: str, *acts: Act) -> bool:
    """Tell whether the broker refuses each of several acts for want of a right."""
    return [broker.refusal(user, act) for act in acts] == [ACCESS_REFUSED] * len(acts)


def orders_before(site: Deployment, last: bytes) -> list[bytes]:
    """Return what is in the control stream before a message, which this publishes.

    The broker's count would not do: it lags behind by seconds.
    """
    site.upstream.channel.basic_publish(TOPOLOGY.control_exchange, ORDER, last)
    channel, found = site.upstream.connection.channel(), []
    channel.basic_qos(prefetch_count=PREFETCH)
    for method, _, body in channel.consume(TOPOLOGY.control_stream, arguments=beginning_at(FIRST)):
        assert method is not None
        assert body is not None
        channel.basic_ack(method.delivery_tag or 0)
        if body == last:
            break
        found.append(body)
    channel.close()
    return found


def replies(site: Deployment, system: str, count: int = 1) -> list[Message]:
    """Wait for replies in the queue of an upstream system."""
    return [site.upstream.get(f"{system}.replies") for _ in range(count)]


# --- what an upstream system may do ---


@tries("`billing`", "read commands: waiting, delayed or failed", "refused")
def test_an_upstream_system_reads_no_commands(broker: Broker) -> None:
    queues = [name for name in QUEUES if name != TOPOLOGY.unrouted_exchange]
    assert refused(broker, "billing", *map(getting, queues), *map(consuming, queues))
    for exchange in EXCHANGES:
        bind = partial(BlockingChannel.queue_bind, queue="billing.replies", exchange=exchange, routing_key="#")
        assert refused(broker, "billing", bind)


@tries("`billing`", "read replies to others", "refused")
def test_an_upstream_system_reads_no_replies_to_others(broker: Broker) -> None:
    for queue in ("payroll.replies", TOPOLOGY.unrouted_exchange):
        assert refused(broker, "billing", getting(queue), consuming(queue))
    for name in ("billing.more", "", "payroll.more"):  # "" is named amq.gen-… by the broker
        assert refused(broker, "billing", partial(BlockingChannel.queue_declare, queue=name, exclusive=True))
    for key in ("execute.*.billing", "billing.#", "#", "execute.*.payroll"):
        bind = partial(
            BlockingChannel.queue_bind, queue="billing.replies", exchange=TOPOLOGY.replies_exchange, routing_key=key
        )
        assert refused(broker, "billing", bind)
    assert broker.refusal("billing", getting("billing.replies")) is None


@tries("`billing`", "get its replies elsewhere than from `onenet.replies`", "refused")
def test_a_reply_goes_to_no_queue_by_its_name(broker: Broker, site: Deployment, settings: dict[str, str]) -> None:
    """Neither to a queue of the workers nor to the pseudo-queue of direct reply-to: both end as unrouted replies."""
    direct: list[bytes] = []

    def ask_directly(channel: BlockingChannel) -> None:
        channel.basic_consume("amq.rabbitmq.reply-to", lambda *got: direct.append(got[3]), auto_ack=True)
        act = publishing(TOPOLOGY.commands_exchange, EXECUTE, a_command(), reply_to="amq.rabbitmq.reply-to")
        act(channel)
        found.append(site.upstream.get(TOPOLOGY.unrouted_exchange))

    found: list[Message] = []
    with site.start_worker(**settings) as worker:
        worker.wait_for("consumer_started")
        send(broker, "billing", a_command(), reply_to=TOPOLOGY.dead_letters_exchange)
        found.append(site.upstream.get(TOPOLOGY.unrouted_exchange))
        assert broker.refusal("billing", ask_directly) is None
    assert [reply.json["status"] for reply in found] == ["accepted"] * 2
    assert not direct
    assert site.upstream.count(TOPOLOGY.dead_letters_exchange) == 0


@tries("`billing`", "write to another exchange, or straight to a queue", "refused")
def test_an_upstream_system_writes_to_the_exchange_of_commands_only(broker: Broker, site: Deployment) -> None:
    acts = [publishing(exchange, key) for exchange in CLOSED_EXCHANGES for key in (EXECUTE, "payroll.replies")]
    assert refused(broker, "billing", *acts)
    copies = ["execute.accepted.payroll", "payroll.replies", *EXCHANGES, *QUEUES]
    before = orders_before(site, b"before")
    send(broker, "billing", b"", headers={"CC": copies, "BCC": copies})
    wait_until(lambda: site.upstream.count(TOPOLOGY.execute_queue) == 1, PATIENCE_S, "the command")
    queues = [queue for queue in OTHERS_QUEUES if queue != TOPOLOGY.control_stream]
    counts = {queue: site.upstream.count(queue) for queue in queues}
    assert counts == {queue: int(queue == TOPOLOGY.execute_queue) for queue in queues}
    assert orders_before(site, b"after") == [*before, b"before"]


@tries("`billing`", "pass a command off as the worker's own copy", "refused")
def test_headers_of_an_upstream_system_are_not_believed(
    broker: Broker, site: Deployment, settings: dict[str, str]
) -> None:
    forged = {
        "x-onenet-attempt": 9,
        "x-onenet-in-doubt": "/4102444800000",  # a command in doubt would rest until then
        "x-onenet-crash-count": 4,
        "x-onenet-probe": "a probe is dropped",
        "x-death": [{"queue": TOPOLOGY.retry_queue(1), "reason": "expired", "exchange": TOPOLOGY.retry_exchange}],
    }
    assert refused(broker, "billing", publishing(TOPOLOGY.returns_exchange, EXECUTE, a_command(), headers=forged))
    with site.start_worker(**settings) as worker:
        worker.wait_for("consumer_started")
        send(broker, "billing", a_command(), app_id="billing", headers=forged)
        [reply] = replies(site, "billing")
    assert (reply.json["status"], reply.json["attempts"]) == ("accepted", 1)


@tries("`billing`", "delete, empty, bind or unbind a queue", "refused")
def test_an_upstream_system_changes_nothing_on_the_broker(broker: Broker) -> None:
    commands = TOPOLOGY.commands_exchange
    for queue in OTHERS_QUEUES:
        assert refused(
            broker,
            "billing",
            partial(BlockingChannel.queue_delete, queue=queue),
            partial(BlockingChannel.queue_purge, queue=queue),
            partial(BlockingChannel.queue_bind, queue=queue, exchange=commands, routing_key=EXECUTE),
            partial(BlockingChannel.queue_unbind, queue=queue, exchange=commands, routing_key=EXECUTE),
        )
    for exchange in EXCHANGES:
        assert refused(broker, "billing", partial(BlockingChannel.exchange_delete, exchange=exchange))
    for arguments in ({"alternate-exchange": TOPOLOGY.commands_exchange}, {}):
        declare = partial(BlockingChannel.exchange_declare, exchange="billing.x", arguments=arguments)
        assert refused(broker, "billing", declare)
    assert refused(broker, "billing", partial(BlockingChannel.queue_delete, queue="billing.replies"))


@tries("`billing`", "pause or resume the workers", "refused")
def test_an_upstream_system_gives_workers_no_orders(broker: Broker) -> None:
    read = partial(
        BlockingChannel.basic_consume,
        queue=TOPOLOGY.control_stream,
        on_message_callback=lambda *_: None,
        arguments=beginning_at(FIRST),
    )
    assert refused(broker, "billing", publishing(TOPOLOGY.control_exchange, ORDER), read)


@tries("worker", "pause or resume the others", "possible")
def test_a_worker_may_write_orders(broker: Broker) -> None:
    assert broker.refusal("worker", publishing(TOPOLOGY.control_exchange, ORDER)) is None


@tries("`billing`", "send under the `user_id` of another", "refused")
def test_the_broker_checks_the_user_id(broker: Broker) -> None:
    act = publishing(TOPOLOGY.commands_exchange, EXECUTE, user_id="payroll", app_id="payroll")
    assert broker.refusal("billing", act) == PRECONDITION_FAILED
    broker.run(["set_user_tags", "billing", "impersonator"])
    broker.disconnect("billing")
    try:
        assert broker.refusal("billing", act) is None
    finally:
        broker.run(["set_user_tags", "billing"])
        broker.disconnect("billing")
    assert broker.refusal("billing", act) == PRECONDITION_FAILED


@tries("`billing`", "send under the `app_id` of another", "refused with `isolated`")
def test_a_command_under_the_name_of_another_is_invalid(
    broker: Broker, site: Deployment, settings: dict[str, str]
) -> None:
    """And the reply to it does not reach the other one, who could take it for the outcome of a command of its own."""
    forged: list[dict[str, Any]] = [
        {"app_id": "payroll"},
        {"app_id": "payroll", "user_id": "billing"},
        {"app_id": "payroll", "user_id": "billing", "reply_to": "payroll"},
        {"app_id": "payroll", "reply_to": "payroll.replies"},
        {"user_id": "billing", "reply_to": "payroll"},
        {"reply_to": "execute.accepted.payroll"},
        {"app_id": "billing"},  # nobody vouches for it
        {},
    ]
    with site.start_worker(WORKER_TENANTS="isolated", **settings) as worker:
        worker.wait_for("consumer_started")
        for properties in forged:
            send(broker, "billing", a_command(), correlation_id="of payroll", **properties)
            send(broker, "billing", b"no command", correlation_id="of payroll", **properties)
        letters = [site.upstream.dead_letter() for _ in range(2 * len(forged))]
        send(broker, "payroll", a_command(command_id="last"), app_id="payroll", user_id="payroll")
        [reply] = replies(site, "payroll")
    assert {letter.headers["x-onenet-reason"] for letter in letters} <= {"invalid_command", "invalid_message"}
    assert (reply.json["command_id"], reply.json["status"]) == ("last", "accepted")
    assert site.upstream.count("payroll.replies") == 0
    assert len(site.simulator.platform.commands) == 1


@tries("`billing`", "forge a reply with `reply_to`", "refused with `isolated`")
def test_reply_to_leads_to_its_own_system_only(broker: Broker, site: Deployment, settings: dict[str, str]) -> None:
    own = {"app_id": "billing", "user_id": "billing"}
    good = ("billing", "billing.7", "billing.a.b")
    bad = ("payroll", "payroll.7", "execute.accepted.payroll", "billingx", "result.executed.payroll")
    with site.start_worker(WORKER_TENANTS="isolated", **settings) as worker:
        worker.wait_for("consumer_started")
        for routing_key in bad:
            send(broker, "billing", a_command(), reply_to=routing_key, correlation_id="of payroll", **own)
        letters = [site.upstream.dead_letter() for _ in bad]
        ids = [str(uuid4()) for _ in good]
        for command_id, routing_key in zip(ids, good, strict=True):
            send(broker, "billing", a_command(command_id=command_id), reply_to=routing_key, **own)
        accepted: list[Message] = []
        while len(accepted) < len(good):  # a refused command may have been answered under its app_id
            accepted += [reply for reply in replies(site, "billing") if reply.json["status"] == "accepted"]
    assert {letter.headers["x-onenet-reason"] for letter in letters} == {"invalid_command"}
    assert {(reply.json["command_id"], reply.routing_key) for reply in accepted} == set(zip(ids, good, strict=True))
    assert site.upstream.count("payroll.replies") == 0


@tries("`billing`", "learn, block or take the command ids of another", "refused with `isolated`")
def test_a_command_id_is_of_its_system(broker: Broker, site: Deployment, settings: dict[str, str]) -> None:
    """Whatever one sends, the other gets what it would get alone."""
    same = a_command(command_id="taken", args="on")
    other = a_command(command_id="taken", args="off")
    with site.start_worker(WORKER_TENANTS="isolated", **settings) as worker:
        worker.wait_for("consumer_started")
        found = []
        for system, command in (("billing", same), ("payroll", same), ("payroll", other), ("billing", same)):
            send(broker, system, command, app_id=system, user_id=system)
            found += replies(site, system)
    assert [reply.json["status"] for reply in found] == ["accepted", "accepted", "failed", "accepted"]
    assert found[2].json["error"]["code"] == "command_id_conflict"  # with its own command of before
    assert found[0].json == found[3].json
    assert found[0].json["uuid"] != found[1].json["uuid"]


@tries(
    "`billing`",
    "learn the outcome of another's command with a message that is delivered twice",
    "refused with `isolated`",
)
def test_a_redelivery_under_the_name_of_another_learns_nothing_of_its_command(
    broker: Broker, site: Deployment, settings: dict[str, str]
) -> None:
    """It may have been sent before ``isolated`` was turned on, but that is looked up nowhere."""
    command = a_command(command_id="of-payroll")
    isolated = {"WORKER_TENANTS": "isolated", **settings}
    with site.start_worker(**isolated) as worker:
        send(broker, "payroll", command, app_id="payroll", user_id="payroll")
        [accepted] = replies(site, "payroll")
        worker.process.signal(signal.SIGTERM)  # or it would be in progress there
        assert worker.process.wait() == 0
    forged: dict[str, Any] = {"app_id": "payroll", "reply_to": "payroll", "headers": {"x-onenet-user-id": "payroll"}}
    send(broker, "billing", command, user_id="billing", **forged)
    send(broker, "billing", command, **forged)
    site.upstream.take_and_return(TOPOLOGY.execute_queue, 2)
    with site.start_worker(**isolated) as worker:
        [reply] = replies(site, "billing")
        nobodys = site.upstream.get(TOPOLOGY.unrouted_exchange)
        send(broker, "payroll", command, app_id="payroll", user_id="payroll")
        [again] = replies(site, "payroll")
    for refusal in (reply, nobodys):
        assert (refusal.json["error"]["code"], refusal.json["uuid"]) == ("outcome_unknown", None)
        assert accepted.json["uuid"] not in refusal.body.decode()
    assert again.json == accepted.json
    assert site.upstream.count("payroll.replies") == 0
    assert len(site.simulator.platform.commands) == 1


@tries("`billing`", "have a command replayed as another's, with a forged `x-death`", "refused with `isolated`")
@pytest.mark.parametrize("reason", ["expired", "rejected"])
def test_a_dead_letter_with_a_forged_death_is_replayed_under_no_name(
    broker: Broker, site: Deployment, settings: dict[str, str], reason: str
) -> None:
    """RabbitMQ 3 adds to the record of deaths that a publisher wrote; it then looks like that of a worker's copy."""
    death = {
        "queue": TOPOLOGY.execute_queue,
        "reason": reason,
        "exchange": TOPOLOGY.returns_exchange,
        "routing-keys": [EXECUTE],
        "count": 0,
    }
    headers = {"x-death": [death], "x-onenet-user-id": "payroll", "x-onenet-attempt": 2}
    ttl = {"expiration": "1"} if reason == "expired" else {}
    send(broker, "billing", a_command(), app_id="payroll", reply_to="payroll", headers=headers, **ttl)
    if reason == "rejected":
        site.upstream.take_and_return(TOPOLOGY.execute_queue, is_requeued=False)
    dead = TOPOLOGY.dead_letters_exchange
    wait_until(lambda: site.upstream.count(dead) == 1, PATIENCE_S, "the broker's own dead letter")
    as_operator = partial(run_cli, folder=site.folder, AMQP_URL=broker.url("operator"))
    [listed] = as_operator("dead-letters", "list", "--json").stdout.splitlines()
    assert json.loads(listed)["reason"].startswith("broker: ")
    assert as_operator("dead-letters", "replay", "--all").returncode == 0
    with site.start_worker(WORKER_TENANTS="isolated", **settings):
        reply = site.upstream.get(TOPOLOGY.unrouted_exchange)
    assert (reply.routing_key, reply.json["error"]["code"]) == ("execute.failed.unknown", "outcome_unknown")
    assert site.upstream.count("payroll.replies") == 0
    assert not site.simulator.requests


@tries("`billing`", "stop the workers by not reading its replies", "only its own replies are lost")
def test_a_full_queue_of_replies_loses_its_oldest(broker: Broker, site: Deployment, settings: dict[str, str]) -> None:
    """Shown with a limit of 1,000 bytes instead of the page's."""
    channel, wanted = site.upstream.channel, definitions("billing", broker.vhost)
    [queue] = wanted["queues"]
    channel.queue_delete("billing.replies")
    try:
        limit = {"x-max-length-bytes": 1000}
        channel.queue_declare("billing.replies", durable=True, arguments=queue["arguments"] | limit)
        for binding in wanted["bindings"]:
            channel.queue_bind("billing.replies", TOPOLOGY.replies_exchange, binding["routing_key"])
        with site.start_worker(**settings) as worker:
            worker.wait_for("consumer_started")
            for number in range(20):
                send(broker, "billing", a_command(imei=str(865820030000100 + number)), app_id="billing")
            send(broker, "payroll", a_command(), app_id="payroll")
            [reply] = replies(site, "payroll")
            worker.wait_for("command_accepted", 21)
            events = {event["event"] for event in worker.events}
        assert reply.json["status"] == "accepted"
        assert "publish_refused" not in events
        assert 0 < site.upstream.count("billing.replies") < 10
    finally:
        channel.queue_delete("billing.replies")
        broker.import_definitions()


@tries("`billing`", "open very many connections", "refused")
def test_the_connections_of_an_upstream_system_are_limited(broker: Broker) -> None:
    [limits] = [json.loads(command[2]) for command in rabbitmqctl("billing") if command[0] == "set_user_limits"]
    broker.disconnect("billing")
    with ExitStack() as stack:
        for _ in range(limits["max-connections"]):
            stack.enter_context(BlockingConnection(pika.URLParameters(broker.url("billing"))))
        with pytest.raises(AMQPConnectionError):
            BlockingConnection(pika.URLParameters(broker.url("billing")))
    wait_until(partial(_can_connect, broker), PATIENCE_S, "the end of the connections")


def _can_connect(broker: Broker) -> bool:
    """The broker counts a closed connection for a moment."""
    try:
        BlockingConnection(pika.URLParameters(broker.url("billing"))).close()
    except AMQPConnectionError:
        return False
    return True


@tries("`billing`", "learn how many messages a queue holds", "possible")
def test_a_passive_declaration_needs_no_right(broker: Broker, site: Deployment) -> None:
    send(broker, "payroll", a_command())
    counts = []

    def count(channel: BlockingChannel) -> None:
        counts.append(channel.queue_declare(TOPOLOGY.execute_queue, passive=True).method.message_count)

    assert broker.refusal("billing", count) is None
    assert counts == [1]


@tries("`billing`", "delay others with very many commands", "possible")
def test_all_upstream_systems_share_one_queue(broker: Broker, site: Deployment) -> None:
    for _ in range(20):
        send(broker, "billing", a_command(), app_id="billing")
    send(broker, "payroll", a_command(), app_id="payroll")
    senders = [site.upstream.get(TOPOLOGY.execute_queue).properties.app_id for _ in range(21)]
    assert senders == ["billing"] * 20 + ["payroll"]


_POSTPONE = "have the commands of others postponed, with many large ones for many devices"


@tries("`billing`", _POSTPONE, "refused with `isolated`")
def test_the_sender_that_takes_most_memory_gives_way(
    broker: Broker, site: Deployment, settings: dict[str, str], tmp_path: Path
) -> None:
    """Though each of its devices has less than the one of the other; shown with a smaller bound."""
    smaller = run_at_startup(tmp_path, "import worker.flow.prefetch as p; replace(p, 'MAX_WAITING_BYTES', 150_000)")
    isolated = {"WORKER_TENANTS": "isolated", "ONENET_DEVICE_INTERVAL": "60"}

    def publish(channel: BlockingChannel, system: str, count: int, devices: int) -> None:
        for number in range(count):
            command = a_command(command_id=f"{system}-{number}", imei=str(865820030000000 + number % devices))
            body = json.dumps(command).ljust(5_000).encode()
            properties = pika.BasicProperties(delivery_mode=2, app_id=system, user_id=system)
            channel.basic_publish(TOPOLOGY.commands_exchange, EXECUTE, body, properties)

    with site.start_worker(**settings, **isolated, **smaller) as worker:
        worker.wait_for("consumer_started")
        assert broker.refusal("payroll", lambda channel: publish(channel, "payroll", 7, 1)) is None
        replies(site, "payroll")
        assert broker.refusal("billing", lambda channel: publish(channel, "billing", 120, 40)) is None
        worker.wait_for("command_postponed", 40)
        postponed = [line["command_id"] for line in worker.events if line["event"] == "command_postponed"]
    assert {command_id.partition("-")[0] for command_id in postponed} == {"billing"}


@tries("`billing`", "send a command to a device of another", "possible")
def test_a_device_belongs_to_no_upstream_system(broker: Broker, site: Deployment, settings: dict[str, str]) -> None:
    with site.start_worker(**settings) as worker:
        worker.wait_for("consumer_started")
        found = []
        for system in SYSTEMS:
            send(broker, system, a_command(), app_id=system)
            found += replies(site, system)
    assert [(reply.json["status"], reply.json["imei"]) for reply in found] == [("accepted", a_command()["imei"])] * 2


# --- what an upstream system with own queues may do ---


@tries("`billing` with own queues", "bind to the replies of others", "refused")
def test_topic_permissions_keep_bindings_to_own_replies(own_queues: Broker) -> None:
    exchange = TOPOLOGY.replies_exchange
    assert own_queues.refusal("billing", _declare_own) is None
    bind = partial(BlockingChannel.queue_bind, queue="billing.own", exchange=exchange)
    bind_exchange = partial(BlockingChannel.exchange_bind, destination="billing.x", source=exchange)
    for own in (
        *("execute.*.billing", "execute.failed.billing", "result.*.billing"),
        *("billing", "billing.#", "billing.7", "billing.*.b.#"),
    ):
        assert own_queues.refusal("billing", partial(bind, routing_key=own)) is None
        assert own_queues.refusal("billing", partial(bind_exchange, routing_key=own)) is None
    for others in (
        *("#", "*", "", "execute.#", "execute.*.*", "*.*.billing", "execute.#.billing", "execute.*.billing.#"),
        *("execute.*.payroll", "payroll", "payroll.#", "billingx", "x.billing", "execute.*.billing\n.#", "billing\n.#"),
        *("billing.#.#", "billing.#.a", "billing.a.#.#", "billing.#.*", "billing.#\n.#"),  # see _HANGING
    ):
        assert refused(own_queues, "billing", partial(bind, routing_key=others))
        assert refused(own_queues, "billing", partial(bind_exchange, routing_key=others))
    own_queues.run(["clear_topic_permissions", "-p", own_queues.vhost, "billing"])
    own_queues.disconnect("billing")
    assert own_queues.refusal("billing", partial(bind, routing_key="#")) is None  # so the topic permission comes first
    assert own_queues.refusal("billing", _delete_own) is None


def test_own_queues_lead_to_no_exchange_or_queue_of_the_workers(own_queues: Broker) -> None:
    """Dead-lettering, an alternate exchange and a binding need the right to write to where they lead."""
    assert own_queues.refusal("billing", _declare_own) is None
    for exchange in CLOSED_EXCHANGES:
        acts: list[Act] = [
            partial(
                BlockingChannel.queue_declare, queue="billing.dead", arguments={"x-dead-letter-exchange": exchange}
            ),
            publishing(exchange, EXECUTE),
        ]
        if exchange:
            alternate = {"alternate-exchange": exchange}
            acts += [
                partial(BlockingChannel.exchange_declare, exchange="billing.y", arguments=alternate),
                partial(BlockingChannel.exchange_bind, destination=exchange, source="billing.x", routing_key="#"),
            ]
        assert refused(own_queues, "billing", *acts)
    for queue in OTHERS_QUEUES:
        bind = partial(BlockingChannel.queue_bind, queue=queue, exchange="billing.x", routing_key="#")
        assert refused(own_queues, "billing", bind, getting(queue), partial(BlockingChannel.queue_purge, queue=queue))
    assert own_queues.refusal("billing", _delete_own) is None


_STOPPING = "stop the workers with a queue that refuses replies (`reject-publish`)"


@tries("`billing` with own queues", _STOPPING, "possible for half a minute")
@pytest.mark.parametrize("user_id", ["billing", None])
def test_replies_that_an_own_queue_refuses_are_diverted(
    own_queues: Broker, site: Deployment, settings: dict[str, str], tmp_path: Path, user_id: str | None
) -> None:
    """Shown with a second instead. A worker does not acknowledge a command before its reply is confirmed.

    For a user for whom the broker vouches nothing begins another half minute; else another app_id alone does not.
    """

    def fill(channel: BlockingChannel) -> None:
        full = {"x-max-length": 1, "x-overflow": "reject-publish"}
        channel.queue_declare("billing.own", arguments=full)
        channel.queue_bind("billing.own", TOPOLOGY.replies_exchange, "billing.#")

    sooner = "import worker.amqp.publisher_supervisor as s; replace(s, 'REFUSED_REPLY_S', 1.0)"
    assert own_queues.refusal("billing", fill) is None
    try:
        with site.start_worker(**settings, **run_at_startup(tmp_path, sooner)) as worker:
            worker.wait_for("consumer_started")
            for number in range(100):
                command = a_command(imei=str(865820030000100 + number))
                address = "billing.x" if user_id is None else f"billing.{number}"
                send(own_queues, "billing", command, app_id=f"any-{number}", user_id=user_id, reply_to=address)
            send(own_queues, "payroll", a_command(command_id="payroll"), app_id="payroll")
            [reply] = replies(site, "payroll")
            worker.wait_for("reply_diverted", 99)
            worker.wait_for("command_accepted", command_id="payroll")  # logged after its reply is confirmed
            events = [line["event"] for line in worker.events if line.get("command_id") == "payroll"]
        assert events == ["command_accepted"]
        assert reply.json["status"] == "accepted"
    finally:
        assert own_queues.refusal("billing", partial(BlockingChannel.queue_delete, queue="billing.own")) is None


_HANGING = "stop the workers with bindings that the broker compares with a reply for minutes"


@tries("`billing` with own queues", _HANGING, "possible for two minutes, ever more rarely")
def test_replies_in_whose_routing_the_broker_hangs_are_diverted(
    own_queues: Broker, site: Deployment, settings: dict[str, str], tmp_path: Path
) -> None:
    """The topic permission allows no such binding to the workers' exchange, but to an exchange that it leads to.

    Shown with half a minute.
    """
    sooner = run_at_startup(tmp_path, "import worker.amqp.publisher_supervisor as s; replace(s, 'HANG_ALONE_S', 10.0)")

    def bind(channel: BlockingChannel) -> None:
        _declare_own(channel)
        channel.exchange_bind("billing.x", TOPOLOGY.replies_exchange, "billing.#")
        channel.queue_bind("billing.own", "billing.x", ".".join(["#"] * 30 + ["never"]))

    own = {"app_id": "billing", "user_id": "billing"}
    assert own_queues.refusal("billing", bind) is None
    try:
        with site.start_worker(WORKER_TENANTS="isolated", **settings, **sooner) as worker:
            worker.wait_for("consumer_started")
            ids = {f"c{number}" for number in range(20)}
            for number, command_id in enumerate(sorted(ids)):
                command = a_command(command_id=command_id, imei=str(865820030000100 + number))
                send(own_queues, "billing", command, reply_to=f"billing.a.b.c.d.e.f.g.h.{number}", **own)
            send(own_queues, "payroll", a_command(), app_id="payroll", user_id="payroll")
            [reply] = replies(site, "payroll")
            assert reply.json["status"] == "accepted"
            diverted = [site.upstream.get(TOPOLOGY.unrouted_exchange).json["command_id"] for _ in ids]
            worker.wait_for("reply_diverted", len(ids))
            events = worker.events
            hung = [event for event in events if event["event"] == "publication_hung"]
        assert set(diverted) == ids
        assert 1 <= len(hung) <= 4  # then the others are not tried any more
        assert {(event["app_id"], event["exchange"]) for event in hung} == {("billing", TOPOLOGY.replies_exchange)}
        assert {event["command_id"] for event in events if event["event"] == "reply_diverted"} == ids
        assert "broker_connection_lost" not in {event["event"] for event in events}
    finally:
        assert own_queues.refusal("billing", _delete_own) is None


@tries("`billing` with own queues", "send on a message of another as a command", "possible")
def test_dead_lettering_keeps_the_user_id(own_queues: Broker, site: Deployment) -> None:
    """Of a message that the other one could send to ``billing``, which needs another right than those of the page."""
    routed = {"x-dead-letter-exchange": TOPOLOGY.commands_exchange, "x-dead-letter-routing-key": EXECUTE}

    def declare(channel: BlockingChannel) -> None:
        channel.queue_declare("billing.own", arguments={**routed, "x-message-ttl": 0})
        channel.exchange_declare("billing.x", "fanout")
        channel.queue_bind("billing.own", "billing.x", "")

    assert own_queues.refusal("billing", declare) is None
    as_payroll = publishing("billing.x", "", user_id="payroll", headers={"CC": ["payroll.replies"]})
    assert refused(own_queues, "payroll", as_payroll)
    _, usual, *_ = rabbitmqctl("billing")
    own_queues.server.control("set_permissions", "-p", own_queues.vhost, "payroll", "^$", r"^billing\.x$", "^$")
    own_queues.disconnect("payroll")
    try:
        assert own_queues.refusal("payroll", as_payroll) is None
        moved = site.upstream.get(TOPOLOGY.execute_queue)
        assert moved.properties.user_id == "payroll"
        assert site.upstream.count("payroll.replies") == 0
    finally:
        own_queues.run(usual, "payroll")
        own_queues.disconnect("payroll")
        own_queues.refusal("billing", _delete_own)


def _declare_own(channel: BlockingChannel) -> None:
    channel.queue_declare("billing.own")
    channel.exchange_declare("billing.x", "topic")


def _delete_own(channel: BlockingChannel) -> None:
    channel.queue_delete("billing.own")
    channel.exchange_delete("billing.x")


# --- what the worker and the operator may do ---


@tries("worker", "declare, delete, read dead letters, send commands", "refused")
def test_a_worker_has_the_rights_that_it_needs_and_no_others(
    broker: Broker, site: Deployment, settings: dict[str, str]
) -> None:
    code, faults = check(site, **settings)
    assert code == 0, faults
    with site.start_worker(**settings) as worker:
        worker.wait_for("consumer_started")
        send(broker, "billing", a_command(args="theArguments"), app_id="billing")
        send(broker, "billing", a_command(args="theArguments", imei="none"), app_id="billing")
        assert {reply.json["status"] for reply in replies(site, "billing", 2)} == {"accepted", "failed"}
        log = worker.process.output.read_text()
    assert not [secret for secret in ("theArguments", PASSWORD, API_KEY) if secret in log]
    dead, commands = TOPOLOGY.dead_letters_exchange, TOPOLOGY.commands_exchange
    assert refused(
        broker,
        "worker",
        *(getting(queue) for queue in (dead, TOPOLOGY.unrouted_exchange, "billing.replies", TOPOLOGY.retry_queue(1))),
        *(publishing(exchange, EXECUTE) for exchange in (commands, "", "amq.topic")),
        *(partial(BlockingChannel.queue_delete, queue=queue) for queue in QUEUES),
        *(partial(BlockingChannel.exchange_delete, exchange=exchange) for exchange in EXCHANGES),
        partial(BlockingChannel.queue_declare, queue="onenet.more"),
    )


def test_a_worker_with_more_rights_declares_the_topology(
    broker: Broker, site: Deployment, settings: dict[str, str]
) -> None:
    _, fewest, more = rabbitmqctl("worker")
    broker.run(more)
    try:
        declaring = {**settings, "AMQP_DECLARE": "true"}
        code, faults = check(site, **declaring)
        assert code == 0, faults
        site.upstream.channel.exchange_delete(TOPOLOGY.dead_letters_exchange)
        with site.start_worker(**declaring) as worker:
            worker.wait_for("consumer_started")
            send(broker, "billing", b"no command", app_id="billing")
            replies(site, "billing")
        assert site.upstream.dead_letter().body == b"no command"
    finally:
        broker.run(fewest)


@tries("operator", "reach beyond the namespace", "refused")
def test_an_operator_has_the_namespace_and_nothing_else(
    broker: Broker, site: Deployment, settings: dict[str, str]
) -> None:
    as_operator = partial(run_cli, folder=site.folder, AMQP_URL=broker.url("operator"))
    with site.start_worker(**settings) as worker:
        worker.wait_for("consumer_started")
        send(broker, "billing", b"no command", app_id="billing", message_id="bad")
        replies(site, "billing")
        for command in (("list", "--json"), ("show", "bad", "--json")):
            assert '"bad"' in as_operator("dead-letters", *command).stdout
        replayed = as_operator("dead-letters", "replay", "bad", "--wait")
        assert "failed    bad  invalid_message" in replayed.stdout, replayed.stderr
        replies(site, "billing")
    discarded = as_operator("dead-letters", "discard", "--all", "--yes")
    assert discarded.stdout == "discarded 1 dead letter\n", discarded.stderr
    broker.refusal("operator", publishing(TOPOLOGY.replies_exchange, "execute.accepted.nobody", b"{}"))
    for command, shown in (
        (("list", "--json"), "execute.accepted.nobody"),
        (("publish", "--all"), "published none of 1"),
    ):
        assert shown in as_operator("unrouted", *command).stdout
    assert as_operator("unrouted", "discard", "--all", "--yes").stdout == "discarded 1 unrouted reply\n"
    assert refused(
        broker,
        "operator",
        getting("billing.replies"),
        partial(BlockingChannel.queue_delete, queue="billing.replies"),
        partial(BlockingChannel.queue_declare, queue="billing.more"),
        publishing("", "billing.replies"),
        publishing("amq.topic", EXECUTE),
    )


# --- Redis ---


@pytest.fixture
def as_another(own_redis: LocalRedis, server: RedisClient) -> Iterator[RedisClient]:
    server.hset("{onenet}:command:secret", "reply", "of payroll")
    with redis.Redis.from_url(redis_url(own_redis, "another"), decode_responses=True) as found:
        assert found.set("another:own", "1") is True
        yield found
    server.delete("another:own", *server.scan_iter("another:filling:*"))


def noperm(client: RedisClient, *commands: str) -> bool:
    """Tell whether Redis refuses each of several commands for want of a right."""
    for command in commands:
        with pytest.raises(redis.exceptions.NoPermissionError):
            client.execute_command(*command.split())
    return True


@tries("another user of Redis", "read or change records", "refused")
def test_another_user_of_redis_has_no_record(as_another: RedisClient, server: RedisClient) -> None:
    key = "{onenet}:command:secret"
    assert noperm(
        as_another,
        *(f"HGETALL {key}", f"TYPE {key}", f"DEL {key}", f"HSET {key} reply x", f"RENAME {key} another:taken"),
        *(f"COPY {key} another:taken", f"DUMP {key}", f"EXPIRE {key} 1", "FLUSHDB", "FLUSHALL", "SWAPDB 0 1"),
        *("EVAL return{} 0", f"SORT another:own GET {key}", "CONFIG GET *", "ACL LIST", "MONITOR"),
    )
    assert server.hgetall(key) == {"reply": "of payroll"}


@tries("another user of Redis", "learn command ids from the names of keys", "refused")
def test_another_user_of_redis_sees_no_names(as_another: RedisClient) -> None:
    assert noperm(as_another, "KEYS *", "SCAN 0", "RANDOMKEY", "SLOWLOG GET", "OBJECT ENCODING {onenet}:command:secret")


@tries("another user of Redis", "fill the memory", "possible")
async def test_a_full_redis_refuses_claims(as_another: RedisClient, server: RedisClient, own_redis: LocalRedis) -> None:
    store = RedisStore(redis_url(own_redis, "worker"), "onenet", ttl_s=60, lease_s=LONG_S)
    await store.ping()
    server.config_set("maxmemory", server.info("memory")["used_memory"] + 4_000_000)
    try:
        for size in (1_000_000, 10_000):
            await asyncio.to_thread(_fill, as_another, size)
        with pytest.raises(StoreUnavailable, match="OOM"):
            await _ping_until_full(store, as_another)
        assert server.hgetall("{onenet}:command:secret") == {"reply": "of payroll"}
    finally:
        server.config_set("maxmemory", 0)
        await store.close()


async def _ping_until_full(store: RedisStore, client: RedisClient) -> None:
    """What a refused command itself took is free again afterwards, and the server frees more at times."""
    while True:
        await asyncio.to_thread(_fill, client, 100)
        await store.ping()


def _fill(client: RedisClient, size: int) -> None:
    """Write values until the server is full."""
    with suppress(redis.exceptions.OutOfMemoryError):
        while True:
            client.set(f"another:filling:{uuid4()}", "x" * size)


@tries("the worker's user of Redis", "read other keys, or administer the server", "refused")
def test_the_workers_user_of_redis_has_its_keys_only(own_redis: LocalRedis, server: RedisClient) -> None:
    """That its commands are enough, and each is needed, is tried in tests/idempotency/test_permissions.py too."""
    with redis.Redis.from_url(redis_url(own_redis, "worker"), decode_responses=True) as client:
        assert noperm(
            client,
            *("GET another:own", "SET another:own 1", "KEYS *", "SCAN 0", "FLUSHALL", "CONFIG GET requirepass"),
            *("ACL LIST", "MONITOR", "SHUTDOWN", "SCRIPT FLUSH", "CLIENT LIST", "REPLICAOF NO ONE", "PUBLISH a b"),
        )
        with pytest.raises(redis.ResponseError, match=r"(?i)permission|can't|NOPERM|ACL failure"):
            client.eval("return redis.call('GET', 'another:own')", 0)


@tries("the operator's user of Redis", "change or delete a record", "refused")
def test_an_operator_reads_records_and_changes_none(
    broker: Broker, site: Deployment, settings: dict[str, str], own_redis: LocalRedis, server: RedisClient
) -> None:
    """With the rights of the page ``status`` and ``device`` do their work, the rate limit of the workers included."""
    as_operator = partial(
        run_cli,
        folder=site.folder,
        AMQP_URL=broker.url("operator"),
        IDEMPOTENCY_URL=redis_url(own_redis, "operator"),
        ONENET_URL=site.simulator.url,
        ONENET_API_KEY=API_KEY,
        WORKER_RETRY_DELAYS=",".join(map(str, RETRY_DELAYS_S)),
        NO_PROXY="127.0.0.1",
    )
    command = a_command(command_id="of-billing")
    with site.start_worker(**settings) as worker:
        worker.wait_for("consumer_started")
        send(broker, "billing", command, app_id="billing")
        [reply] = replies(site, "billing")
        told = as_operator("status", "of-billing", "--json")
        assert told.returncode == 0, told.stderr
    assert json.loads(told.stdout)["records"][0]["reply"]["uuid"] == reply.json["uuid"]
    listed = as_operator(
        "device", command["imei"], "--json", ONENET_RATE_LIMIT="30/hour"
    )  # so slow that Redis keeps it
    assert listed.returncode == 0, listed.stderr
    assert json.loads(listed.stdout)["command_id"] == "of-billing"
    assert server.exists("{onenet}:rate:v1:gcra:default")
    with redis.Redis.from_url(redis_url(own_redis, "operator"), decode_responses=True) as client:
        name = "{onenet}:command:of-billing"
        assert noperm(client, f"DEL {name}", f"HSET {name} state free", f"SET {name} x", f"PEXPIRE {name} 1", "KEYS *")
        with pytest.raises(redis.ResponseError, match=r"(?i)permission|can't|NOPERM|ACL failure"):
            client.eval("return redis.call('SET', KEYS[1], 'x')", 1, name)


def test_without_the_default_user_redis_asks_for_a_password(own_redis: LocalRedis, server: RedisClient) -> None:
    server.execute_command(*acl("default"))
    try:
        with redis.Redis.from_url(own_redis.url) as anybody, pytest.raises(redis.exceptions.AuthenticationError):
            anybody.ping()
    finally:
        server.execute_command("ACL", "SETUSER", "default", "on")  # over a connection of before


# --- the network ---


@tries("the network", "read along", "possible without TLS")
@pytest.mark.parametrize(("scheme", "is_readable"), [("redis", True), ("rediss", False)])
async def test_only_tls_hides_a_password_from_the_network(scheme: str, is_readable: bool) -> None:
    seen = bytearray()

    def read(sock: Any) -> None:
        seen.extend(sock.recv(65536))

    with raw_server(read) as url:
        address = f"{scheme}://worker:theSecret@{urlsplit(url).netloc}/0"
        store = RedisStore(address, "onenet", ttl_s=60, lease_s=LONG_S)
        with pytest.raises(StoreUnavailable):
            await store.ping()
        await store.close()
    assert seen
    assert (b"theSecret" in seen) == is_readable


@tries("the network", "reach the metrics", "refused")
def test_metrics_are_on_loopback_by_default(site: Deployment, settings: dict[str, str]) -> None:
    port = free_port()
    with site.start_worker(HTTP_PORT=str(port), **settings) as worker:
        worker.wait_for("consumer_started")
        assert is_listening("127.0.0.1", port)
        assert not is_listening("127.0.0.2", port)  # another address of this machine


def test_the_network_policy_admits_the_connections_of_the_page() -> None:
    policy = yaml.safe_load((ROOT / "docker" / "kubernetes" / "network-policy.yaml").read_text())["spec"]
    admitted = {port["port"] for rule in policy["egress"] for port in rule["ports"]} - {53}
    ports = {target: set(map(int, re.findall("[0-9]+", text))) for _, target, text, _ in NETWORK}
    [of_workers] = [numbers for target, numbers in ports.items() if target == "workers"]
    assert admitted == set().union(*ports.values()) - of_workers
    assert of_workers == {Settings.model_fields["http_port"].default}


def test_each_line_of_the_table_is_tried() -> None:
    assert tried == THREATS.keys()
