"""Faults of the broker and of the connections to it, and how the worker recovers."""

import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import pika
import pytest

from tests.support.builders import a_command
from tests.support.certificates import Authority
from tests.support.deployment import RECONCILE_DELAY_S, SOON_CERTAIN, Deployment
from tests.support.outcomes import assert_each_accepted_once, publish_many
from tests.support.proxies import Proxy, raw_server, with_local_port
from tests.support.simulator import answers_held, onenet
from tests.support.startup_code import run_at_startup
from tests.support.waiting import PATIENCE_S
from tests.support.worker_process import WorkerProcess
from worker.dev.services.broker import LocalBroker
from worker.dev.services.ports import free_port, wait_until
from worker.simulator.faults import Fault

CLOCKS_DIFFER_S = 2  # by which a message may come back early
# The worker suspects after a moment that the broker hangs in the routing of a publication, and logs what it finds.
SUSPICIOUS = """
import worker.amqp.publisher_supervisor as s
from worker.telemetry.logs import get_logger
for name in ("SLOW_CONFIRM_S", "HANG_S", "_LOOK_S"):
    replace(s, name, 0.1)
hangs = s.PublisherSupervisor._hangs
async def logged(self, publisher, limit_s):
    found = await hangs(self, publisher, limit_s)
    get_logger().info("looked", hangs=found)
    return found
replace(s.PublisherSupervisor, "_hangs", logged)
"""
pytestmark = [pytest.mark.broker_version, pytest.mark.usefixtures("watched_workers")]


@pytest.fixture
def breakable(own_broker: LocalBroker, tmp_path: Path) -> Iterator[Deployment]:
    """A deployment on a broker that may be killed, with a platform slow enough for a fault during a request."""
    with onenet(latency_s=0.05) as simulator, Deployment.set_up(own_broker.url, tmp_path, simulator) as deployment:
        yield deployment


@pytest.fixture
def proxied(deployment: Deployment) -> Iterator[tuple[Deployment, Proxy]]:
    """A deployment whose worker connects to the broker through a proxy."""
    proxy = Proxy(deployment.broker_url)
    yield deployment, proxy
    proxy.close()


def test_a_killed_broker_costs_no_command(breakable: Deployment, own_broker: LocalBroker) -> None:
    """The worker remembers which unacknowledged commands it had sent, and sends only the others."""
    with breakable.worker(WORKER_CONCURRENCY="4") as worker:
        ids = publish_many(breakable, 300)
        worker.wait_for("command_accepted", count=20)
        own_broker.kill()
        worker.wait_for("broker_connection_lost")
        own_broker.start()
        breakable.upstream.connect()
        worker.wait_for("consumer_started", count=2)
        assert_each_accepted_once(breakable, ids)


def test_reset_broker_connections_cost_no_command(proxied: tuple[Deployment, Proxy]) -> None:
    deployment, proxy = proxied
    with deployment.worker(AMQP_URL=proxy.url, WORKER_CONCURRENCY="4") as worker:
        ids = publish_many(deployment, 300)
        for number in range(1, 4):
            worker.wait_for("command_accepted", count=30 * number)
            proxy.cut()
            worker.wait_for("consumer_started", count=number + 1)
        assert_each_accepted_once(deployment, ids)


def test_the_worker_consumes_again_after_the_broker_cancels_its_consumer(deployment: Deployment) -> None:
    """Connection and channel stay open after basic.cancel, but nothing is delivered any more."""
    with deployment.worker() as worker:
        deployment.upstream.channel.queue_delete(deployment.topology.execute_queue)
        worker.wait_for("broker_connection_lost", reason="the broker cancelled the consumer")
        worker.wait_for("consumer_started", count=2)
        deployment.upstream.publish(a_command())
        assert deployment.upstream.reply().json["status"] == "accepted"


def test_a_silent_broker_connection_is_detected_by_missing_heartbeats(proxied: tuple[Deployment, Proxy]) -> None:
    deployment, proxy = proxied
    with deployment.worker(AMQP_URL=f"{proxy.url}?heartbeat=1") as worker:
        proxy.silence()
        worker.wait_for("broker_connection_lost")
        worker.wait_for("consumer_started", count=2)
        deployment.upstream.publish(a_command())
        assert deployment.upstream.reply().json["status"] == "accepted"


def test_a_node_that_hangs_later_is_left_before_the_time_limit_of_a_dial(
    deployment: Deployment, tmp_path: Path
) -> None:
    """Its connections stay open, and new ones are never answered; another node of the list is well."""
    long = run_at_startup(tmp_path, "import worker.amqp.broker\nreplace(worker.amqp.broker, 'CONNECT_S', 3600)\n")
    proxy = Proxy(deployment.broker_url)
    url = f"{proxy.url}?heartbeat=2"
    with deployment.worker(AMQP_URL=f"{url},{deployment.broker_url}", **long) as worker:
        began = worker.wait_for("broker_connected")
        assert began["broker"].endswith(f":{proxy.port}")
        proxy.hold()
        lost = worker.wait_for("broker_connection_lost")
        assert "missed heartbeats" in lost["reason"]
        worker.wait_for("consumer_started", count=2)
        deployment.upstream.publish(a_command())
        assert deployment.upstream.reply().json["status"] == "accepted"
    proxy.close()


def test_a_broker_that_takes_longer_than_usual_for_each_connection_is_used(
    deployment: Deployment, tmp_path: Path
) -> None:
    """The time limit grows while no node is in time, for all connections of a session."""
    proxy = Proxy(deployment.broker_url, delay_s=1.5)
    shorter = run_at_startup(tmp_path, "import worker.amqp.broker\nreplace(worker.amqp.broker, 'CONNECT_S', 1)\n")
    with deployment.worker(AMQP_URL=proxy.url, **shorter):
        deployment.upstream.publish(a_command())
        assert deployment.upstream.reply().json["status"] == "accepted"
    proxy.close()


def test_two_connections_are_enough(own_broker: LocalBroker, breakable: Deployment) -> None:
    """The broker may limit the number of a user's connections; the topology has one of its own where it can."""
    user = f"user-{uuid4().hex[:8]}"
    target = urlsplit(own_broker.url)
    own_broker.control("add_user", user, "password")
    own_broker.control("set_permissions", user, ".*", ".*", ".*")
    own_broker.control("set_user_limits", user, '{"max-connections": 2}')
    replies = breakable.topology.replies_exchange
    own_broker.control("set_topic_permissions", user, replies, "^execute[.].*", ".*")
    with breakable.worker(AMQP_URL=f"amqp://{user}:password@{target.hostname}:{target.port}/") as worker:
        for number, reply_to in enumerate([None, "evil", None]):
            breakable.upstream.publish(a_command(command_id=f"c{number}", args=f"c{number}"), reply_to=reply_to)
        missing = {"c0", "c1", "c2"}
        while missing:
            missing.discard(breakable.upstream.reply().json["command_id"])
        assert not [event for event in worker.events if event["event"] == "broker_connection_lost"]
    own_broker.control("delete_user", user)


def moment(event: dict[str, Any]) -> datetime:
    return datetime.fromisoformat(event["timestamp"])


def test_a_password_that_changes_on_disk_is_used_by_the_next_connection(
    own_broker: LocalBroker, breakable: Deployment, authority: Authority, tmp_path: Path
) -> None:
    """And a file that cannot be read for a while costs nothing, nor does one that has nothing to do with the broker."""
    user = f"user-{uuid4().hex[:8]}"
    target = urlsplit(own_broker.url)
    secret = tmp_path / "amqp-url"
    proxy = Proxy(own_broker.url)

    def set_password(password: str) -> None:
        own_broker.control("change_password", user, password)
        write(password)

    def write(password: str) -> None:
        secret.write_text(f"amqp://{user}:{password}@{target.hostname}:{proxy.port}/\n")

    own_broker.control("add_user", user, "first")
    own_broker.control("set_permissions", user, ".*", ".*", ".*")
    write("first")
    authority_file = tmp_path / "platform.pem"
    authority.issue("platform", tmp_path / "tls").ca.rename(authority_file)
    with breakable.worker(AMQP_URL="", AMQP_URL_FILE=str(secret), ONENET_CA_FILE=str(authority_file)) as worker:
        authority_file.unlink()
        set_password("second")
        proxy.cut()
        worker.wait_for("consumer_started", count=2)
        secret.unlink()
        proxy.cut()
        assert "AMQP_URL_FILE" in worker.wait_for("broker_settings_unusable")["reason"]
        worker.wait_for("consumer_started", count=3)
        own_broker.control("change_password", user, "third")
        proxy.cut()
        worker.wait_for("broker_unavailable", reason="the broker refused the user name or the password")
        write("third")
        worker.wait_for("consumer_started", count=4)
    proxy.close()
    own_broker.control("delete_user", user)


def test_rights_that_are_withdrawn_from_a_running_worker_are_waited_for(
    own_broker: LocalBroker, breakable: Deployment
) -> None:
    """At its start the worker ends instead: a setting may be wrong."""
    user = f"user-{uuid4().hex[:8]}"
    target = urlsplit(own_broker.url)
    proxy = Proxy(own_broker.url)
    own_broker.control("add_user", user, "password")
    own_broker.control("set_permissions", user, ".*", ".*", ".*")
    with breakable.worker(AMQP_URL=f"amqp://{user}:password@{target.hostname}:{proxy.port}/") as worker:
        own_broker.control("set_permissions", user, "^$", "^$", "^$")
        proxy.cut()
        assert "403" in wait_for_line(worker, "broker_connection_lost", "ACCESS_REFUSED")
        own_broker.control("set_permissions", user, "^$", ".*", ".*")
        worker.wait_for("consumer_started", count=2)
        assert "403" in worker.wait_for("topology_not_declared")["reason"]
        own_broker.control("clear_permissions", user)
        proxy.cut()
        assert wait_for_line(worker, "broker_unavailable", "530")
        own_broker.control("set_permissions", user, ".*", ".*", ".*")
        worker.wait_for("consumer_started", count=3)
        breakable.upstream.publish(a_command())
        assert breakable.upstream.reply().json["status"] == "accepted"
    proxy.close()
    own_broker.control("delete_user", user)


def test_a_right_to_publish_that_is_withdrawn_is_tried_ever_more_rarely(
    own_broker: LocalBroker, breakable: Deployment
) -> None:
    user = f"user-{uuid4().hex[:8]}"
    target = urlsplit(own_broker.url)
    own_broker.control("add_user", user, "password")
    own_broker.control("set_permissions", user, ".*", ".*", ".*")
    with breakable.worker(AMQP_URL=f"amqp://{user}:password@{target.hostname}:{target.port}/") as worker:
        own_broker.control("set_permissions", user, ".*", "^$", ".*")
        breakable.upstream.publish(a_command())
        sixth = worker.wait_for("publication_refused", count=6)
        assert (moment(worker.wait_for("publication_refused", count=7)) - moment(sixth)).total_seconds() > 1
        own_broker.control("set_permissions", user, ".*", ".*", ".*")
        assert breakable.upstream.reply().json["status"] == "accepted"
    own_broker.control("delete_user", user)


def test_a_right_to_publish_replies_that_is_withdrawn_costs_no_connection(
    own_broker: LocalBroker, breakable: Deployment
) -> None:
    """A reply looks first as if its sender had caused the refusal; without what that has chosen it is refused too."""
    user, target = f"user-{uuid4().hex[:8]}", urlsplit(own_broker.url)
    own_broker.control("add_user", user, "password")
    own_broker.control("set_permissions", user, ".*", ".*", ".*")
    with breakable.worker(AMQP_URL=f"amqp://{user}:password@{target.hostname}:{target.port}/") as worker:
        own_broker.control("set_permissions", user, ".*", "[.](retry|returns|dead-letters)$", ".*")
        breakable.upstream.publish(a_command(), app_id="billing", reply_to="billing.x")
        breakable.upstream.publish(b"{}", app_id="billing", headers={"tenant": "a"})
        worker.wait_for("publication_refused", count=6)  # each as it is and without its address, and one now and then
        breakable.upstream.dead_letter()
        own_broker.control("set_permissions", user, ".*", ".*", ".*")
        assert {reply["status"] for reply in breakable.upstream.replies(2)} == {"accepted", "failed"}
        assert "broker_connection_lost" not in {line["event"] for line in worker.events}
    own_broker.control("delete_user", user)


def test_a_topology_that_was_changed_under_a_running_worker_is_waited_for(proxied: tuple[Deployment, Proxy]) -> None:
    """Without consuming meanwhile: each session would give back what it held."""
    deployment, proxy = proxied
    topology, channel = deployment.topology, deployment.upstream.channel
    queue = topology.dead_letters_exchange
    with deployment.worker(AMQP_URL=proxy.url) as worker:
        channel.queue_delete(queue)
        channel.queue_declare(queue, durable=True, arguments={"x-queue-type": "quorum"})  # other arguments
        proxy.cut()
        worker.wait_for("broker_unavailable", count=3)
        begun = len([event for event in worker.events if event["event"] == "consumer_started"])
        worker.wait_for("broker_unavailable", count=5)
        assert len([event for event in worker.events if event["event"] == "consumer_started"]) == begun
        channel.queue_delete(queue)
        worker.wait_for("consumer_started", count=begun + 1)


@pytest.mark.parametrize(
    ("kind", "recovered"),
    [
        pytest.param("too_many_requests", False, id="a command known not to be sent is sent after its delay"),
        pytest.param("drop_after_caching", True, id="what is in doubt is recovered after its delay"),
    ],
)
def test_a_policy_that_shortens_the_delays_changes_nothing(
    own_broker: LocalBroker, tmp_path: Path, kind: Any, recovered: bool
) -> None:
    """What comes back early rests on."""
    delay_s = 8
    delays = {"WORKER_RETRY_DELAYS": str(delay_s), "WORKER_RECONCILE_DELAY": str(delay_s)}
    settings = SOON_CERTAIN | delays | {"LOG_LEVEL": "debug"}
    with (
        onenet(Fault(kind=kind, count=1)) as simulator,
        Deployment.set_up(own_broker.url, tmp_path, simulator, delay_s) as deployment,
        deployment.worker(**settings) as worker,
    ):
        name = f"policy-{uuid4().hex[:8]}"
        own_broker.control(
            "set_policy", name, rf"^{deployment.topology.namespace}\.execute\.retry\.", '{"message-ttl": 500}'
        )
        published_at = time.monotonic()
        deployment.upstream.publish(a_command())
        reply = deployment.upstream.reply(3 * PATIENCE_S).json
        assert time.monotonic() - published_at > delay_s - CLOCKS_DIFFER_S
        assert (reply["status"], reply["recovered"]) == ("accepted", recovered)
        assert len(simulator.platform.commands) == 1
        worker.wait_for("command_postponed", count=3, reason="its delay queue returned it early")
        assert len([event for event in worker.events if event["event"] == "delays_shortened"]) == 1
        assert recovered or not [event for event in worker.events if event["event"] == "command_in_doubt"]
        own_broker.control("clear_policy", name)


def wait_for_line(worker: WorkerProcess, event: str, words: str) -> str:
    """Wait for an event whose reason has these words; returns the reason."""
    found: list[str] = []

    def is_there() -> bool:
        found[:] = [line["reason"] for line in worker.events if line["event"] == event and words in line["reason"]]
        return bool(found)

    wait_until(is_there, PATIENCE_S, f"{event} with {words}")
    return found[-1]


def test_the_worker_reconnects_after_a_malformed_frame(proxied: tuple[Deployment, Proxy]) -> None:
    """A frame that cannot be decoded ends the connection, not the worker."""
    deployment, proxy = proxied
    with deployment.worker(AMQP_URL=proxy.url) as worker:
        proxy.garble()
        worker.wait_for("broker_connection_lost")
        worker.wait_for("consumer_started", count=2)
        deployment.upstream.publish(a_command())
        assert deployment.upstream.reply().json["status"] == "accepted"


def test_the_worker_waits_for_a_broker_that_is_not_running_yet(deployment: Deployment) -> None:
    port = free_port()
    with deployment.start_worker(AMQP_URL=with_local_port(deployment.broker_url, port)) as worker:
        worker.wait_for("broker_unavailable", count=3)
        proxy = Proxy(deployment.broker_url, port)
        worker.wait_for("consumer_started")
        proxy.close()


def test_of_several_brokers_the_one_that_answers_is_used(deployment: Deployment) -> None:
    dead = f"amqp://guest:guest@127.0.0.1:{free_port()}/"
    with deployment.worker(AMQP_URL=f"{dead},{deployment.broker_url}") as worker:
        assert worker.wait_for("broker_unavailable")["retry_in_s"] == 0
        assert worker.wait_for("broker_connected")["broker"].endswith(f":{urlsplit(deployment.broker_url).port}")


def test_a_wrong_broker_password_is_reported_and_not_logged(deployment: Deployment) -> None:
    target = urlsplit(deployment.broker_url)
    wrong = target._replace(netloc=f"guest:wrong-password@{target.hostname}:{target.port}").geturl()
    with deployment.start_worker(AMQP_URL=wrong) as worker:
        event = worker.wait_for("broker_unavailable")
        assert event["reason"] == "the broker refused the user name or the password"
        assert "wrong-password" not in json.dumps(worker.events)


def test_a_queue_with_other_arguments_stops_the_start_with_one_line_and_exit_code_78(deployment: Deployment) -> None:
    deployment.upstream.channel.queue_declare(
        deployment.topology.execute_queue, durable=True, arguments={"x-queue-type": "classic"}
    )
    with deployment.start_worker() as worker:
        assert worker.process.wait() == 78
        [line] = [event for event in worker.events if event["level"] == "error"]
        assert line["event"] == "topology_mismatch"
        assert deployment.topology.execute_queue in line["reason"]
        assert "exists with another " in line["reason"]


def test_with_declare_off_the_topology_is_only_checked(deployment: Deployment) -> None:
    """The worker waits until another client, which has the right, declares the topology."""
    with deployment.start_worker(AMQP_DECLARE="false") as worker:
        assert deployment.topology.commands_exchange in worker.wait_for("broker_unavailable")["reason"]
        with deployment.worker():
            worker.wait_for("consumer_started")


def test_a_command_is_not_acknowledged_before_its_retry_is_routed(deployment: Deployment) -> None:
    """An acknowledgement would lose a retry that is bound to no queue; it is published again until it is routed."""
    deployment.simulator.faults.replace([Fault(kind="too_many_requests", seconds=0, count=1)])
    with deployment.worker() as worker:
        deployment.upstream.channel.queue_delete(deployment.topology.retry_queue(1))
        deployment.upstream.publish(a_command())
        worker.wait_for("publish_refused", reason="unroutable", exchange=deployment.topology.retry_exchange)
        queue = next(
            queue for queue in deployment.topology.queues() if queue.name == deployment.topology.retry_queue(1)
        )
        deployment.upstream.channel.queue_declare(queue.name, durable=True, arguments=queue.arguments)
        deployment.upstream.channel.queue_bind(queue.name, deployment.topology.retry_exchange, queue.name)
        assert deployment.upstream.reply().json["attempts"] == 2


def test_a_reply_that_a_full_queue_refuses_is_published_again(deployment: Deployment) -> None:
    """The broker sends basic.nack for the reply, and accepts it once the queue has room."""
    with deployment.worker() as worker:
        channel, name = deployment.upstream.channel, f"{deployment.topology.namespace}.full"
        channel.queue_declare(name, arguments={"x-max-length": 1, "x-overflow": "reject-publish"})
        channel.queue_bind(name, deployment.topology.replies_exchange, "full")
        for number in range(2):
            deployment.upstream.publish(a_command(command_id=f"full-{number}"), reply_to="full")
        worker.wait_for("publish_refused", reason="refused by the broker")
        found = {deployment.upstream.get(name).json["command_id"] for _ in range(2)}
        assert found == {"full-0", "full-1"}
        channel.queue_delete(name)


def test_lasting_nacks_replace_the_publisher_and_delay_no_other_reply(proxied: tuple[Deployment, Proxy]) -> None:
    """A broker may refuse all publications of one channel and none of another (seen after a queue leader was lost).

    The consumer stays, so that nothing is redelivered; the new publisher connects to the other node of the list.
    """
    deployment, proxy = proxied
    with deployment.worker(AMQP_URL=f"{deployment.broker_url},{proxy.url}") as worker:
        channel, name = deployment.upstream.channel, f"{deployment.topology.namespace}.full"
        channel.queue_declare(name, arguments={"x-max-length": 1, "x-overflow": "reject-publish"})
        channel.queue_bind(name, deployment.topology.replies_exchange, "full")
        for number in range(2):
            deployment.upstream.publish(a_command(command_id=f"full-{number}"), reply_to="full")
        replaced = worker.wait_for("publisher_replaced")
        assert replaced["broker"].endswith(f":{proxy.port}")
        deployment.upstream.publish(a_command(command_id="other"))
        while deployment.upstream.reply().json["command_id"] != "other":
            pass  # a reply that one queue refused and another accepted is published again
        assert {deployment.upstream.get(name).json["command_id"] for _ in range(2)} == {"full-0", "full-1"}
        assert not [line for line in worker.events if line["event"] == "broker_connection_lost"]
        channel.queue_delete(name)


def test_a_node_that_hangs_is_passed_over(deployment: Deployment) -> None:
    """It accepts TCP connections and never answers, as a stopped process does."""
    with raw_server(_say_nothing) as url:
        hung = with_local_port(deployment.broker_url, urlsplit(url).port or 0)
        with deployment.worker(AMQP_URL=f"{hung},{deployment.broker_url}") as worker:
            passed_over = worker.wait_for("broker_unavailable")
            assert passed_over["reason"] == "no answer within 0.5 s"
            assert passed_over["broker"].endswith(f":{urlsplit(hung).port}")
            assert passed_over["retry_in_s"] == 0


def _say_nothing(client: socket.socket) -> None:
    while client.recv(4096):
        pass


@contextmanager
def publishing_blocked(
    broker: LocalBroker, deployment: Deployment, monkeypatch: pytest.MonkeyPatch, **settings: str
) -> Iterator[tuple[WorkerProcess, list[str]]]:
    """Yield a worker under load whose broker blocks publishing, and the ids of its commands.

    The broker blocks a connection when it publishes, so the platform delays all answers until the alarm is set.
    """
    with deployment.worker(WORKER_CONCURRENCY="2", **settings) as worker:
        try:
            with answers_held(monkeypatch):
                ids = publish_many(deployment, 40)
                deployment.wait_for_request()
                broker.control("set_vm_memory_high_watermark", "absolute", "1MB")
            worker.wait_for("publishing_blocked")
            yield worker, ids
        finally:  # otherwise every other test would be blocked
            broker.control("set_vm_memory_high_watermark", "0.6")


def test_a_broker_that_blocks_publishing_costs_no_command(
    breakable: Deployment, own_broker: LocalBroker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And it is not taken for one that hangs."""
    settings = run_at_startup(tmp_path, SUSPICIOUS)
    with publishing_blocked(own_broker, breakable, monkeypatch, **settings) as (worker, ids):
        assert worker.process.is_running
        own_broker.control("set_vm_memory_high_watermark", "0.6")
        worker.wait_for("publishing_unblocked")
        worker.wait_for("consumer_started", count=2)
        worker.wait_for("looked", hangs=False)
        assert_each_accepted_once(breakable, ids)
        assert "publisher_replaced" not in {line["event"] for line in worker.events}


@pytest.mark.parametrize("kind", ["classic", "quorum"])
def test_a_queue_that_confirms_late_is_not_taken_for_a_publication_that_hangs(
    breakable: Deployment, own_broker: LocalBroker, tmp_path: Path, kind: str
) -> None:
    """A classic one leaves the channel free; a quorum one holds it up, and others go on over another one.

    Tried at once, and not only after ten seconds.
    """
    channel, name = breakable.upstream.channel, f"{breakable.topology.namespace}.slow"
    resource = f'rabbit_misc:r(<<"/">>, queue, <<"{name}">>)'
    found = f"{{ok, Queue}} = rabbit_amqqueue:lookup({resource}), Pid = amqqueue:get_pid(Queue)"
    if kind == "quorum":
        found = found.replace("Pid", "{Name, _}") + ", Pid = whereis(Name)"
    with breakable.worker(**run_at_startup(tmp_path, SUSPICIOUS)) as worker:
        channel.queue_declare(name, durable=True, arguments={"x-queue-type": kind})
        channel.queue_bind(name, breakable.topology.replies_exchange, "slow")
        own_broker.control("eval", f"{found}, sys:suspend(Pid).")
        breakable.upstream.publish(a_command(), reply_to="slow")
        worker.wait_for("looked", hangs=kind == "quorum")
        publish_many(breakable, 20)
        assert {reply["status"] for reply in breakable.upstream.replies(21)} == {"accepted"}
        own_broker.control("eval", f"{found}, sys:resume(Pid).")
        assert breakable.upstream.get(name).json["status"] == "accepted"
        events = {line["event"] for line in worker.events}
        assert events.isdisjoint({"publication_hung", "reply_diverted", "broker_connection_lost"})
        assert ("publisher_replaced" in events) == (kind == "quorum")
        channel.queue_delete(name)


def test_the_worker_reconnects_to_a_broker_that_was_killed_while_it_blocked_publishing(
    breakable: Deployment, own_broker: LocalBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed broker sends no connection.unblocked: the state of the old connection must not outlive it."""
    with publishing_blocked(own_broker, breakable, monkeypatch) as (worker, ids):
        own_broker.kill()
        own_broker.start()
        breakable.upstream.connect()
        worker.wait_for("consumer_started", count=2)
        assert_each_accepted_once(breakable, ids)


def test_two_workers_with_memory_stores_log_a_warning(deployment: Deployment) -> None:
    with deployment.worker(), deployment.worker() as second:
        assert second.wait_for("idempotency_not_shared")["level"] == "warning"


@pytest.mark.parametrize("kind", ["hang", "late_caching"])
def test_a_redelivery_without_a_record_is_looked_up_in_the_history_before_it_is_sent(
    deployment: Deployment, kind: Any
) -> None:
    """The process that received it first was killed, and its memory store with it."""
    deployment.simulator.faults.replace([Fault(kind=kind, seconds=1, count=1)])
    with deployment.worker() as first:
        deployment.upstream.publish(a_command(command_id="orphan", args="orphan"))
        deployment.wait_for_request()
        first.process.kill()
    with deployment.worker(**SOON_CERTAIN):
        assert_each_accepted_once(deployment, ["orphan"])
    assert len(deployment.simulator.requests) == (2 if kind == "hang" else 1)


def test_a_second_attempt_without_a_record_is_looked_up_in_the_history_before_it_is_sent(
    deployment: Deployment,
) -> None:
    """The retry may be a duplicate of one that another process has sent already."""
    command = a_command(args="retried")
    with deployment.worker(**SOON_CERTAIN) as worker:
        deployment.upstream.publish_as_returned(command, {"x-onenet-attempt": 2})
        worker.wait_for("command_in_doubt", command_id=command["command_id"])
        assert deployment.upstream.reply().json["status"] == "accepted"
    assert len(deployment.simulator.requests) == 1


_MOVED_TO = {"by the default exchange": "", "through the worker's own exchange, but not by a worker": "returns"}


@pytest.mark.parametrize("way", _MOVED_TO)
def test_a_command_moved_by_a_shovel_is_looked_up_in_the_history_before_it_is_sent(
    deployment: Deployment, way: str
) -> None:
    """A shovel publishes a new message: neither ``redelivered`` nor a record of an earlier worker is left."""
    deployment.simulator.faults.replace([Fault(kind="drop_after_caching", count=1)])
    with deployment.worker() as first:
        resting = deployment.topology.retry_queue(RECONCILE_DELAY_S)
        deployment.upstream.publish(a_command(command_id="moved", args="moved"))
        first.wait_for("command_in_doubt", command_id="moved")
        message = deployment.upstream.get(resting)
        first.process.kill()
    if _MOVED_TO[way]:
        exchange, headers = deployment.topology.returns_exchange, None
        routing_key = "execute"
    else:
        exchange, headers, routing_key = "", message.headers, deployment.topology.execute_queue
    properties = pika.BasicProperties(delivery_mode=2, headers=headers)
    deployment.upstream.channel.basic_publish(exchange, routing_key, message.body, properties, mandatory=True)
    with deployment.worker(**SOON_CERTAIN) as second:
        second.wait_for("command_in_doubt", command_id="moved")
        assert_each_accepted_once(deployment, ["moved"])
    assert len(deployment.simulator.requests) == 1


def test_a_dead_letter_moved_by_a_shovel_is_looked_up_in_the_history_before_it_is_sent(deployment: Deployment) -> None:
    """Its headers do not say what may have been sent: only ``dead-letters replay`` adds that."""
    deployment.simulator.faults.replace([Fault(kind="drop_after_caching", count=1)])
    with deployment.worker(WORKER_IN_DOUBT="dead-letter"):
        deployment.upstream.publish(a_command(command_id="moved", args="moved"))
        assert deployment.upstream.reply().json["error"]["code"] == "outcome_unknown"
    letter = deployment.upstream.dead_letter()
    exchange = deployment.topology.returns_exchange
    deployment.upstream.channel.basic_publish(exchange, "execute", letter.body, letter.properties, mandatory=True)
    with deployment.worker(**SOON_CERTAIN) as worker:
        worker.wait_for("command_recovered", command_id="moved")
        assert_each_accepted_once(deployment, ["moved"])
    assert len(deployment.simulator.requests) == 1
