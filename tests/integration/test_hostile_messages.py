"""Messages made to do harm: each affects the reply to its own sender and nothing else."""

import json
import re
from pathlib import Path
from typing import Any

import pika
import pytest

from schemas.command import MAX_BODY_BYTES
from tests.support.builders import a_command
from tests.support.deployment import SOON_CERTAIN, Deployment
from tests.support.simulator import onenet
from tests.support.startup_code import run_at_startup
from tests.support.waiting import PATIENCE_S
from tests.support.worker_process import WorkerProcess
from worker.amqp.blocking import declare_on
from worker.amqp.bodies import MAX_KEPT_BYTES
from worker.amqp.consumer import MANY_RETURNS, SMALL_BYTES
from worker.dev.services.broker import LocalBroker
from worker.dev.services.ports import wait_until
from worker.simulator.faults import Fault

pytestmark = pytest.mark.broker_version

LARGE_BYTES = 15 * 1024 * 1024  # RabbitMQ 4 accepts at most 16 MiB by default
MIB = 1024 * 1024
# The broker compares the two for longer than any test lasts.
HANGING_BINDING = ".".join(["hostile", *["#"] * 30, "never"])
HANGING_KEY = ".".join(["hostile", *"abcdefghi"])

# Kills the process when it receives a large message, as the kernel does when memory is short.
_ENDED_BY_LARGE_BODIES = """
import os, signal
from worker.amqp.consumer import QueueConsumer
on_message = QueueConsumer._on_message
def end(self, channel, method, properties, body):
    if len(body) > 100_000:
        os.kill(os.getpid(), signal.SIGKILL)
    on_message(self, channel, method, properties, body)
replace(QueueConsumer, "_on_message", end)
"""


def memory_mib(worker: WorkerProcess, kind: str) -> float:
    """Return the resident memory of a process: ``VmRSS`` is the present one, ``VmHWM`` the peak."""
    status = Path(f"/proc/{worker.process.pid}/status").read_text()
    found = re.search(rf"^{kind}:\s+(\d+) kB", status, re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024


def good_commands(deployment: Deployment, count: int, first: int = 0, size: int = 0) -> set[str]:
    """Publish commands for as many devices, as a sender of their own; each body has at least ``size`` bytes."""
    ids = {f"good-{number}" for number in range(count)}
    for number, command_id in enumerate(sorted(ids), first):
        command = a_command(command_id=command_id, imei=str(865820030000000 + number), args=command_id)
        deployment.upstream.publish(json.dumps(command).encode().ljust(size), app_id="good")
    return ids


def wait_for_replies(deployment: Deployment, ids: set[str]) -> None:
    """Wait until all of these commands are accepted, whatever else is answered meanwhile."""
    missing = set(ids)
    while missing:
        reply = deployment.upstream.reply().json
        assert reply["status"] == "accepted"
        missing.discard(reply["command_id"])


def assert_nothing_but_accepted(worker: WorkerProcess, ids: set[str]) -> None:
    """No command was postponed, in doubt or tried again; the worker logs after its reply is confirmed."""

    def events() -> set[str]:
        return {line["event"] for line in worker.events if line.get("command_id") in ids}

    wait_until(lambda: bool(events()), PATIENCE_S, "a line about one of them")
    assert events() == {"command_accepted"}


def assert_all_accepted_once(deployment: Deployment, replies: list[dict[str, Any]], ids: set[str]) -> None:
    assert {reply["command_id"] for reply in replies if reply["status"] == "accepted"} == ids
    assert [deployment.cached(command_id) for command_id in ids] == [1] * len(ids)


def test_large_messages_are_held_one_at_a_time(deployment: Deployment) -> None:
    """Eight of them are queued ahead of commands, and the memory of the worker grows by less than four of them take."""
    body = b"x" * MAX_KEPT_BYTES
    with deployment.worker() as worker:
        deployment.upstream.publish(a_command(command_id="first"))
        deployment.upstream.reply()
        before = memory_mib(worker, "VmRSS")
        for _ in range(8):
            deployment.upstream.publish(body)
        ids = good_commands(deployment, 10)
        replies = deployment.upstream.replies(18)
        letters = [deployment.upstream.dead_letter() for _ in range(8)]
        most = memory_mib(worker, "VmHWM") - before
        assert_nothing_but_accepted(worker, ids)
    assert_all_accepted_once(deployment, replies, ids)
    assert [letter.body == body for letter in letters] == [True] * 8
    assert {letter.headers["x-onenet-reason"] for letter in letters} == {"invalid_message"}
    assert most < 4 * MAX_KEPT_BYTES / MIB


def test_a_body_too_large_to_be_held_is_dead_lettered_by_the_broker(deployment: Deployment) -> None:
    """The worker keeps only the beginning of it."""
    body = b"x" * LARGE_BYTES
    with deployment.worker() as worker:
        deployment.upstream.publish(a_command(command_id="first"))
        deployment.upstream.reply()
        before = memory_mib(worker, "VmRSS")
        for _ in range(3):
            deployment.upstream.publish(body, message_id="large")
        ids = good_commands(deployment, 10)
        replies = deployment.upstream.replies(13)
        letters = [deployment.upstream.dead_letter() for _ in range(3)]
        most = memory_mib(worker, "VmHWM") - before
        assert_nothing_but_accepted(worker, ids)
    assert_all_accepted_once(deployment, replies, ids)
    failed = [reply for reply in replies if reply["status"] == "failed"]
    assert [(reply["command_id"], reply["error"]["code"]) for reply in failed] == [("large", "invalid_message")] * 3
    assert [letter.body == body for letter in letters] == [True] * 3
    assert {letter.headers["x-first-death-reason"] for letter in letters} == {"rejected"}
    assert most < LARGE_BYTES / MIB


@pytest.mark.parametrize("size", [MAX_KEPT_BYTES, LARGE_BYTES])
def test_large_messages_during_an_alarm_take_bounded_memory(own_broker: LocalBroker, tmp_path: Path, size: int) -> None:
    """What is published for one of them cannot leave, and the others stay with the broker."""
    body = b"x" * size
    with onenet() as simulator, Deployment.set_up(own_broker.url, tmp_path, simulator) as deployment:
        upstream, queue = deployment.upstream, deployment.topology.execute_queue
        with deployment.worker() as worker:
            upstream.publish(a_command(command_id="first"))
            upstream.reply()
            before = memory_mib(worker, "VmRSS")
        for _ in range(8):
            upstream.publish(body)
        upstream.disconnect()  # the broker would block it
        upstream.connect()
        own_broker.control("set_vm_memory_high_watermark", "absolute", "1MB")
        try:
            with deployment.start_worker() as worker:
                worker.wait_for("publishing_blocked")
                wait_until(  # the reply to one or another may have left before the alarm
                    lambda: upstream.count(queue) + upstream.replies_waiting() >= 7,
                    PATIENCE_S,
                    "that the worker holds one message at most",
                )
                own_broker.control("set_vm_memory_high_watermark", "0.6")
                replies = upstream.replies(8)
                letters = [upstream.dead_letter() for _ in range(8)]
                most = memory_mib(worker, "VmHWM") - before
        finally:
            own_broker.control("set_vm_memory_high_watermark", "0.6")
    assert {reply["error"]["code"] for reply in replies} == {"invalid_message"}
    assert [letter.body == body for letter in letters] == [True] * 8
    assert most < 4 * MAX_KEPT_BYTES / MIB


def padded(**fields: Any) -> bytes:
    """Return a valid command that is as large as a command may be."""
    return json.dumps(a_command(**fields)).encode().ljust(MAX_BODY_BYTES)


FULL_HEADERS = {f"h{number}": "v" * 250 for number in range(450)}


def test_padded_commands_for_one_device_take_bounded_memory(deployment: Deployment) -> None:
    """They wait for each other: above a bound the broker keeps them, not the worker."""
    with deployment.worker(ONENET_DEVICE_INTERVAL="60") as worker:
        deployment.upstream.publish(a_command(command_id="first", imei="865820039999999"))
        deployment.upstream.reply()
        before = memory_mib(worker, "VmRSS")
        for number in range(700):  # 125 MiB
            deployment.upstream.publish(padded(command_id=f"padded-{number}"), headers=FULL_HEADERS)
        ids = good_commands(deployment, 10, first=2)
        wait_for_replies(deployment, ids)
        worker.wait_for("command_postponed", count=500)
        most = memory_mib(worker, "VmHWM") - before
        assert_nothing_but_accepted(worker, ids)
    assert most < 64


def test_two_commands_of_each_other_device_are_answered_while_a_backlog_waits(deployment: Deployment) -> None:
    """The second one waits for the first, beside padded commands that all wait for one device."""
    hostile, interval = "865820039999999", {"ONENET_DEVICE_INTERVAL": "1"}
    deployment.simulator.faults.replace([Fault(kind="late_caching", seconds=2 * PATIENCE_S, imei=hostile)])
    patient = {"ONENET_READ_TIMEOUT": "300", "WORKER_RECONCILE_DELAY": "315", "WORKER_CONCURRENCY": "4"}
    with deployment.worker(**patient, **interval) as worker:
        deployment.upstream.publish(padded(command_id="hostile", imei=hostile))
        deployment.wait_for_request()
        for number in range(150):  # 27 MiB
            deployment.upstream.publish(padded(command_id=f"hostile-{number}", imei=hostile), headers=FULL_HEADERS)
        wanted = []
        for number in range(40):
            device = str(865820030000000 + number // 2)
            wanted.append(f"{device}-{number % 2}")
            deployment.upstream.publish(a_command(command_id=wanted[-1], imei=device, args=wanted[-1]))
        answered = [deployment.upstream.reply().json for _ in wanted]
        asked = [request["query"]["imei"] for request in deployment.simulator.requests]
        assert not [event for event in worker.events if event["event"] == "broker_connection_lost"]
        assert_nothing_but_accepted(worker, set(wanted))
    assert {(reply["command_id"], reply["status"]) for reply in answered} == {(each, "accepted") for each in wanted}
    assert asked.count(hostile) == 1  # which has not been answered yet
    assert [deployment.cached(command_id) for command_id in wanted] == [1] * len(wanted)


def test_the_backlog_of_one_device_waits_beside_a_backlog_that_another_sender_spreads(
    deployment: Deployment, tmp_path: Path
) -> None:
    """Each of the hostile devices has less waiting than the good one, all of them together have more."""
    good = "865820030000001"
    smaller = run_at_startup(tmp_path, 'import worker.flow.prefetch as p; replace(p, "MAX_WAITING_BYTES", 500_000)')
    with deployment.worker(ONENET_DEVICE_INTERVAL="60", **smaller) as worker:
        waiting = {f"waiting-{number}" for number in range(20)}
        for command_id in ["first", *waiting]:
            body = json.dumps(a_command(command_id=command_id, imei=good, args=command_id)).encode().ljust(5_000)
            deployment.upstream.publish(body, app_id="good")
        deployment.upstream.reply()
        for number in range(160):  # three wait for each device
            imei = str(865820020000000 + number % 40)
            body = json.dumps(a_command(command_id=f"hostile-{number}", imei=imei)).encode().ljust(8_000)
            deployment.upstream.publish(body, app_id="hostile")
        worker.wait_for("command_postponed", count=60)
        ids = good_commands(deployment, 10, first=2, size=2 * SMALL_BYTES)
        wait_for_replies(deployment, ids)
        assert_nothing_but_accepted(worker, ids)
        assert_nothing_but_accepted(worker, {"first", *waiting})
        assert not [line for line in worker.events if line["event"] == "command_in_doubt"]


def test_large_commands_that_are_held_for_long_put_no_other_command_in_doubt(deployment: Deployment) -> None:
    """Their replies are refused, so that they stay with the worker; what is too much goes to a delay queue.

    The good ones are so large that they would have to make room too if it did not matter whose the others are.
    """
    topology, channel = deployment.topology, deployment.upstream.channel
    full = f"{topology.namespace}.full"
    with deployment.worker(WORKER_CONCURRENCY="200") as worker:
        deployment.upstream.publish(a_command(command_id="first", imei="865820039999999"))
        deployment.upstream.reply()
        channel.queue_declare(full, exclusive=True, arguments={"x-max-length": 1, "x-overflow": "reject-publish"})
        channel.queue_bind(full, topology.replies_exchange, "full")
        channel.basic_publish("", full, b"fills it")
        before = memory_mib(worker, "VmRSS")
        for number in range(150):  # 27 MiB
            body = padded(command_id=f"large-{number}", imei=str(865820020000000 + number))
            deployment.upstream.publish(body, headers=FULL_HEADERS, reply_to="full", app_id="hostile")
        ids = good_commands(deployment, 100, first=2, size=2 * SMALL_BYTES)
        wait_for_replies(deployment, ids)
        worker.wait_for("command_postponed", reason="too many large messages are held")
        most = memory_mib(worker, "VmHWM") - before
        assert_nothing_but_accepted(worker, ids)
    assert most < 64


# A header table that fills a frame of the size that both sides agree on: its own 8 bytes, and 19 of other properties.
TABLE_BYTES = 128 * 1024 - 8 - 19


def filled(table: bytes) -> bytes:
    """Return a header table that fills a frame, with a last field as large as that takes."""
    rest = TABLE_BYTES - len(table) - len(b"\x04restS") - 4
    return table + b"\x04restS" + rest.to_bytes(4) + b"x" * rest


def an_array(items: bytes) -> bytes:
    """Return a field that is an array."""
    return b"\x01nA" + len(items).to_bytes(4) + items


def nested_tables(depth: int) -> bytes:
    """Return tables within tables; each has one field without a name."""
    head = b"\x00F"
    step = len(head) + 4
    return b"".join(head + ((depth - level - 1) * step).to_bytes(4) for level in range(depth))


# Each item takes many times its bytes once it is decoded.
BOMBS = {
    "nothing": b"\x01nA" + (120_000).to_bytes(4) + b"V" * 120_000,
    "fields and tables": b"".join(b"\x03%03xt\x01" % each for each in range(4096)) + an_array(b"F\0\0\0\0" * 21_000),
    "empty arrays": an_array(b"A\0\0\0\0" * 26_000),
    "nested tables": nested_tables(2_000),  # the broker needs five seconds for 20,000 of them
}


@pytest.mark.parametrize("kind", BOMBS)
def test_header_tables_that_fill_a_frame_and_grow_when_decoded_take_bounded_memory(
    deployment: Deployment, kind: str
) -> None:
    """Up to thirty times their bytes; the commands behind them are sent, and no connection is lost."""
    with deployment.worker(ONENET_DEVICE_INTERVAL="60", WORKER_CONCURRENCY="200") as worker:
        deployment.upstream.publish(a_command(command_id="first", imei="865820039999999"))
        deployment.upstream.reply()
        before = memory_mib(worker, "VmRSS")
        for number in range(60):
            body = json.dumps(a_command(command_id=f"bomb-{number}")).encode()
            publish_with_table(deployment, body, filled(BOMBS[kind]))
        ids = good_commands(deployment, 10, first=2)
        wait_for_replies(deployment, ids)
        most = memory_mib(worker, "VmHWM") - before
        assert not [line for line in worker.events if line["event"] == "broker_connection_lost"]
        assert_nothing_but_accepted(worker, ids)
    assert most < 64


def test_a_message_that_crashes_every_worker_is_dead_lettered_alone(deployment: Deployment, tmp_path: Path) -> None:
    """Only this message reaches the broker's delivery limit; no worker lives long enough to dead-letter it."""
    with deployment.worker():
        pass
    deployment.upstream.publish(b"x" * 200_000)
    ids = good_commands(deployment, 10)
    deadly = SOON_CERTAIN | run_at_startup(tmp_path, _ENDED_BY_LARGE_BODIES)
    ends = 0
    while not deployment.upstream.count(deployment.topology.dead_letters_exchange):
        with deployment.start_worker(**deadly) as worker:

            def has_ended(worker: WorkerProcess = worker) -> bool:
                return not worker.process.is_running or bool(
                    deployment.upstream.count(deployment.topology.dead_letters_exchange)
                )

            wait_until(has_ended, PATIENCE_S, "the worker's end")
        ends += 1
    assert ends <= 23
    assert deployment.upstream.dead_letter().headers["x-first-death-reason"] == "delivery_limit"
    missing = set(ids)
    with deployment.worker(**deadly):
        while missing:
            reply = deployment.upstream.reply().json
            assert reply["status"] == "accepted"
            missing.discard(reply["command_id"])
    assert [deployment.cached(command_id) for command_id in ids] == [1] * len(ids)
    assert deployment.upstream.count(deployment.topology.dead_letters_exchange) == 0


_ROUTING_HEADERS: list[dict[str, Any]] = [
    {"CC": ["k" * 245] * 522},
    {"CC": ["nowhere"], "BCC": ["nowhere"]},
    {"cc": ["a"] * 9000, "Bcc": ["b"], " CC ": 1},
    {"CC": [], "bCC": {"no": "list"}},
    {f"h{number}": "v" * 250 for number in range(500)},  # as large as a frame allows
    {"traceparent": "t" * 4_000, "tracestate": "t" * 4_000},
    {"x-onenet-cc": ["k" * 245] * 250, "x-onenet-user-id": "u" * 60_000},
]


@pytest.mark.parametrize("frame_max", ["131072", "4096"])
def test_headers_that_fill_a_frame_or_route_copies_cost_no_connection(deployment: Deployment, frame_max: str) -> None:
    """The broker closes a connection for a frame above the negotiated size, and a channel for forbidden routing."""
    separator = "&" if "?" in deployment.broker_url else "?"
    with deployment.worker(AMQP_URL=f"{deployment.broker_url}{separator}frame_max={frame_max}") as worker:
        queue = f"{deployment.topology.namespace}.elsewhere"
        deployment.upstream.channel.queue_declare(queue, exclusive=True)
        for exchange in (deployment.topology.replies_exchange, deployment.topology.dead_letters_exchange):
            for key in ("nowhere", "a", "b", "k" * 245):
                deployment.upstream.channel.queue_bind(queue, exchange, key)
        sent = 0
        for headers in _ROUTING_HEADERS:
            # Two that are dead-lettered with their original headers, and one that is accepted.
            for body in (b"{}", a_command(expired_time="2020-01-01T00:00:00Z"), a_command()):
                deployment.upstream.publish(body, headers=headers)
                sent += 1
        replies = deployment.upstream.replies(sent)
        assert not [line for line in worker.events if line["event"] == "broker_connection_lost"]
        assert deployment.upstream.count(queue) == 0
    assert [reply["status"] for reply in replies].count("failed") == 2 * len(_ROUTING_HEADERS)
    letters = [deployment.upstream.dead_letter() for _ in range(2 * len(_ROUTING_HEADERS))]
    assert {letter.headers["x-onenet-reason"] for letter in letters} == {"invalid_command", "expired"}
    assert not any({"cc", "bcc"} & {name.strip().lower() for name in letter.headers} for letter in letters)


def test_headers_larger_than_a_frame_that_the_broker_made_smaller_cost_no_connection(
    own_broker: LocalBroker, tmp_path: Path
) -> None:
    """They were published before; the broker delivers them all the same, and refuses to take them back."""
    headers = {f"h{number}": "v" * 250 for number in range(400)}
    bodies: list[bytes | dict[str, Any]] = [b"{}", a_command(expired_time="2020-01-01T00:00:00Z"), a_command()]
    with onenet() as simulator, Deployment.set_up(own_broker.url, tmp_path, simulator) as deployment:
        declare_on(deployment.upstream.channel, deployment.topology)
        for body in bodies:
            deployment.upstream.publish(body, headers=headers)
        ids = good_commands(deployment, 10)
        simulator.faults.replace([Fault(kind="too_many_requests", seconds=0, count=1)])
        own_broker.control("eval", "application:set_env(rabbit, frame_max, 16384).")
        try:
            with deployment.worker() as worker:
                replies = deployment.upstream.replies(len(bodies) + len(ids))
                events = {line["event"] for line in worker.events}
        finally:
            own_broker.control("eval", "application:set_env(rabbit, frame_max, 131072).")
    assert events.isdisjoint({"broker_connection_lost", "publisher_replaced", "publication_refused"})
    assert [reply["status"] for reply in replies].count("failed") == 2


def test_a_second_bcc_header_routes_no_copy(deployment: Deployment) -> None:
    """The broker removes the first BCC header before it delivers a message, but not the second."""
    with deployment.worker() as worker:
        queue = f"{deployment.topology.namespace}.elsewhere"
        deployment.upstream.channel.queue_declare(queue, exclusive=True)
        deployment.upstream.channel.queue_bind(queue, deployment.topology.dead_letters_exchange, "stolen")
        publish_with_table(deployment, b"{}", (b"\x03BCCA" + array("stolen")) * 2)
        assert deployment.upstream.reply().json["error"]["code"] == "invalid_command"
        assert "BCC" not in deployment.upstream.dead_letter().headers
        assert deployment.upstream.count(queue) == 0
        assert not [line for line in worker.events if line["event"] == "broker_connection_lost"]


def array(*texts: str) -> bytes:
    items = b"".join(b"S" + len(text).to_bytes(4) + text.encode() for text in texts)
    return len(items).to_bytes(4) + items


def publish_with_table(deployment: Deployment, body: bytes, table: bytes) -> None:
    """Publish with a header table that no client library would encode."""

    class Raw(pika.BasicProperties):
        def encode(self) -> list[bytes]:
            flags = pika.BasicProperties.FLAG_HEADERS | pika.BasicProperties.FLAG_DELIVERY_MODE
            return [flags.to_bytes(2), len(table).to_bytes(4) + table, b"\x02"]

    deployment.upstream.channel.basic_publish(
        deployment.topology.commands_exchange, "execute", body, Raw(), mandatory=True
    )


def test_a_forbidden_reply_to_changes_the_routing_of_its_own_reply_only(
    deployment: Deployment, own_broker: LocalBroker
) -> None:
    """A topic permission refuses one reply_to: that reply alone is published with the default routing key."""
    allowed = "^(execute|allowed)[.].*"
    own_broker.control("set_topic_permissions", "-p", "/", "guest", deployment.topology.replies_exchange, allowed, ".*")
    try:
        with deployment.worker() as worker:
            missing = set()
            for number in range(100):
                message_id, key = f"m-{number}", "not.allowed" if number == 50 else f"allowed.{number}"
                body = b"{}" if number % 2 else json.dumps(a_command(command_id=message_id, args=message_id)).encode()
                deployment.upstream.publish(body, message_id=message_id, reply_to=key, headers={"tenant": "a"})
                missing.add("execute.accepted.unknown" if number == 50 else key)
            while missing:
                missing.discard(deployment.upstream.reply().routing_key)
            letters = [deployment.upstream.dead_letter() for _ in range(50)]
            refused = [line for line in worker.events if line["event"] == "publication_refused"]
            lost = [line for line in worker.events if line["event"] == "broker_connection_lost"]
        assert [letter.headers.get("tenant") for letter in letters] == ["a"] * 50
        assert [line["routing_key"] for line in refused] == ["not.allowed"]
        assert lost == []
    finally:
        own_broker.control("clear_topic_permissions", "-p", "/", "guest")


def test_many_forbidden_reply_tos_delay_no_other_reply(deployment: Deployment, own_broker: LocalBroker) -> None:
    """Each is found alone, and another may be refused meanwhile."""
    allowed = "^execute[.].*"
    own_broker.control("set_topic_permissions", "-p", "/", "guest", deployment.topology.replies_exchange, allowed, ".*")
    try:
        with deployment.worker():
            ids = {f"m-{number}" for number in range(120)}
            for number, command_id in enumerate(sorted(ids)):
                command = a_command(command_id=command_id, args=command_id)
                deployment.upstream.publish(command, reply_to=None if number % 6 else "evil")
            missing = set(ids)
            while missing:
                reply = deployment.upstream.reply()
                assert reply.routing_key == "execute.accepted.unknown"
                missing.discard(reply.json["command_id"])
    finally:
        own_broker.control("clear_topic_permissions", "-p", "/", "guest")


def test_a_refused_reply_to_an_often_returned_message_delays_no_other_reply(deployment: Deployment) -> None:
    """Such messages are processed one at a time, but not while a full queue refuses their replies."""
    channel, name = deployment.upstream.channel, f"{deployment.topology.namespace}.full"
    with deployment.worker():
        pass
    channel.queue_declare(name, arguments={"x-max-length": 1, "x-overflow": "reject-publish"})
    channel.queue_bind(name, deployment.topology.replies_exchange, "full")
    channel.basic_publish("", name, b"fills it")
    deployment.upstream.publish(b"{}", reply_to="full")
    for _ in range(MANY_RETURNS):
        with deployment.worker() as worker:
            worker.wait_for("publish_refused")
    ids = good_commands(deployment, 10)
    with deployment.worker():
        while ids:
            ids.discard(deployment.upstream.reply().json["command_id"])
    channel.queue_delete(name)


def test_replies_in_whose_routing_the_broker_hangs_stop_no_other_reply(deployment: Deployment, tmp_path: Path) -> None:
    """Each has a route of its own, and no sender is known: they are found one by one, beside what goes on.

    Found after five seconds instead of 90.
    """
    sooner = run_at_startup(tmp_path, "import worker.amqp.publisher_supervisor as s; replace(s, 'HANG_ALONE_S', 5.0)")
    topology, channel = deployment.topology, deployment.upstream.channel
    name = f"{topology.namespace}.hostile"
    with deployment.worker(**sooner) as worker:
        channel.queue_declare(name)
        channel.queue_bind(name, topology.replies_exchange, HANGING_BINDING)
        hostile = {f"hostile-{number}" for number in range(3)}
        for number, command_id in enumerate(hostile):
            deployment.upstream.publish(a_command(command_id=command_id), reply_to=f"{HANGING_KEY}{number}")
        missing = hostile | good_commands(deployment, 20)
        while missing:
            missing.discard(deployment.upstream.reply(2 * PATIENCE_S).json["command_id"])
        events = worker.events
        hung = [line for line in events if line["event"] == "publication_hung"]
        deployment.upstream.publish(a_command(command_id="later"))
        wait_for_replies(deployment, {"later"})
        channel.queue_delete(name)
    assert {line["command_id"] for line in hung} == hostile
    assert {line["routing_key"] for line in hung} == {f"{HANGING_KEY}{number}" for number in range(3)}
    assert len(hung) == len([line for line in events if line["event"] == "reply_diverted"]) == len(hostile)
    assert "broker_connection_lost" not in {line["event"] for line in events}
