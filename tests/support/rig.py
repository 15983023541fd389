"""What the tests are made of: a worker in a process of its own, an upstream system, a OneNET, a broker to break."""

import asyncio
import json
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit
from uuid import uuid4

import pika
from pika.exceptions import AMQPError, ConnectionClosedByBroker

from tests.support.certificates import Certificate
from worker.amqp.blocking import delete_on
from worker.amqp.field_table import preserve_raw_values
from worker.amqp.topology import Topology
from worker.dev.services.ports import wait_until
from worker.dev.services.processes import LocalProcess
from worker.simulator.faults import Fault, FaultPlan
from worker.simulator.platform import Platform
from worker.simulator.server import Simulator

API_KEY = "the-master-key"
ACCESS_KEY = "dGhlIGFjY2VzcyBrZXkgb2YgdGhlIHRlc3RzLg=="
PRODUCT_ID = "123123"
OFFLINE_IMEI = "865820039999999"
RETRY_DELAYS_S = (1, 2)
SETTLE_S = 2  # as long as the two timeouts together, which are 1 s each
LONG_SETTLE_S = 60  # for tests with a longer timeout
_INTERNAL_ERROR = 541
_ALL = "#"
PATIENCE_S = 40  # how long a test waits for something that must come; never how long it takes


def a_command(**changes: Any) -> dict[str, Any]:
    """Return a valid command with a new id; a change to None takes the field away."""
    fields: dict[str, Any] = {
        "command_id": str(uuid4()),
        "imei": "865820030000001",
        "obj_id": 3311,
        "obj_inst_id": 0,
        "res_id": 5850,
        "expired_time": in_hours(24),
    }
    return {name: value for name, value in (fields | changes).items() if value is not None}


def fields_of(value: Any) -> str:
    """Name a row by the fields that it changes; times among their values differ wherever tests are collected."""
    return ",".join(value) if isinstance(value, dict) else str(value)


def in_hours(hours: float) -> str:
    """Return a command's time, so many hours from now."""
    return (datetime.now(UTC) + timedelta(hours=hours)).strftime("%Y-%m-%dT%H:%M:%SZ")


@contextmanager
def onenet(
    *faults: Fault,
    latency_s: float = 0,
    port: int = 0,
    seed: int | None = None,
    certificate: Certificate | None = None,
) -> Iterator[Simulator]:
    """Run the simulator in a thread: a real HTTP server, or with a certificate HTTPS, with a memory to look into."""
    platform = Platform(API_KEY, PRODUCT_ID, ACCESS_KEY, frozenset({OFFLINE_IMEI}))
    tls = None if certificate is None else (certificate.cert, certificate.key)
    simulator = Simulator(platform, FaultPlan(list(faults), seed), latency_s=latency_s, port=port, tls=tls)
    thread = threading.Thread(target=lambda: asyncio.run(simulator.serve()), name="simulator")
    thread.start()
    try:
        yield simulator
    finally:
        simulator.stop()
        thread.join()


@dataclass
class Message:
    """What the broker delivered."""

    routing_key: str
    properties: pika.BasicProperties
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def headers(self) -> dict[str, Any]:
        """Return the headers, without the one that the broker adds to whatever a quorum queue delivers."""
        return {name: value for name, value in (self.properties.headers or {}).items() if name != "x-delivery-count"}


class Upstream:
    """An upstream system: publishes commands, reads the replies and the dead letters."""

    def __init__(self, url: str, topology: Topology) -> None:
        self.topology = topology
        self._url = url
        self._wants_all = True
        self.connect()

    def connect(self) -> None:
        """Connect, again if need be; what was read before stays."""
        preserve_raw_values()
        parameters = pika.URLParameters(self._url)
        parameters.blocked_connection_timeout = PATIENCE_S
        self.connection = pika.BlockingConnection(parameters)
        self.channel = self.connection.channel()
        self.channel.confirm_delivery()

    def close(self) -> None:
        """Delete everything below the namespace and go."""
        if not self.connection.is_open:
            self.connect()
        delete_on(self.channel, self.topology)
        self.channel.queue_delete(self._replies_queue)
        self.connection.close()

    @property
    def _replies_queue(self) -> str:
        return f"{self.topology.namespace}.test-replies"

    def bind_replies(self, routing_key: str = _ALL) -> None:
        """Read replies from a durable queue of our own, so that none is missed while the broker is away."""
        self._wants_all = routing_key == _ALL
        self.channel.queue_declare(self._replies_queue, durable=True)
        self.channel.queue_bind(self._replies_queue, self.topology.replies_exchange, routing_key)

    def publish(self, body: bytes | dict[str, Any], **properties: Any) -> None:
        """Publish one command; returns when the broker has it."""
        if isinstance(body, dict):
            body = json.dumps(body).encode()
        wanted = pika.BasicProperties(delivery_mode=pika.DeliveryMode.Persistent, **properties)
        self.channel.basic_publish(self.topology.commands_exchange, "execute", body, wanted, mandatory=True)

    def publish_as_returned(self, body: dict[str, Any], headers: dict[str, Any]) -> None:
        """Publish through the exchange that only the worker writes to."""
        wanted = pika.BasicProperties(delivery_mode=pika.DeliveryMode.Persistent, headers=headers)
        exchange = self.topology.returns_exchange
        self.channel.basic_publish(exchange, "execute", json.dumps(body).encode(), wanted, mandatory=True)

    def get(self, queue: str, patience_s: float = PATIENCE_S) -> Message:
        """Wait for the next message of a queue and take it."""
        return self._wait_for(partial(self.try_get, queue), queue, patience_s)

    def _wait_for(self, try_it: Callable[[], Message | None], what: str, patience_s: float) -> Message:
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            try:
                found = try_it()
            except ConnectionClosedByBroker as exc:
                if exc.reply_code != _INTERNAL_ERROR:
                    raise
                self.connect()  # right behind the broker's start a quorum queue may have no leader to ask yet
                continue
            if found is not None:
                return found
            self.connection.process_data_events(time_limit=0.02)
        raise AssertionError(f"nothing came to {what} within {patience_s} s")

    def try_get(self, queue: str) -> Message | None:
        """Take the next message of a queue if one is there."""
        method, properties, body = self.channel.basic_get(queue)
        if method is None or properties is None or body is None:
            return None
        # Not by auto_ack: a broker that is killed meanwhile would forget it. Where this fails it comes once more.
        with suppress(AMQPError):
            self.channel.basic_ack(method.delivery_tag or 0)
        return Message(str(method.routing_key), properties, body)

    def try_reply(self) -> Message | None:
        """Take the next reply if one is there.

        A broker that is killed may have forgotten a binding that was made a second before; what finds no queue then is
        kept for whoever did not bind one.
        """
        found = self.try_get(self._replies_queue)
        return self.try_get(self.topology.unrouted_exchange) if found is None and self._wants_all else found

    def reply(self, patience_s: float = PATIENCE_S) -> Message:
        """Wait for the next reply."""
        return self._wait_for(self.try_reply, self._replies_queue, patience_s)

    def replies(self, count: int) -> list[dict[str, Any]]:
        """Wait for so many replies."""
        return [self.reply().json for _ in range(count)]

    def is_empty(self) -> bool:
        """Tell whether no command waits or rests; while a worker runs it may hold one all the same."""
        queues = [self.topology.execute_queue, *map(self.topology.retry_queue, RETRY_DELAYS_S)]
        return not any(map(self.count, queues))

    def consumers(self) -> int:
        """Return how many consume commands; who went counts until the broker has back what it held."""
        frame = self.channel.queue_declare(self.topology.execute_queue, passive=True)
        return int(frame.method.consumer_count)

    def dead_letter(self) -> Message:
        """Wait for the next dead letter."""
        return self.get(self.topology.dead_letters_exchange)

    def count(self, queue: str) -> int:
        """Return how many messages a queue holds ready."""
        return int(self.channel.queue_declare(queue, passive=True).method.message_count)


@dataclass
class WorkerProcess:
    """``onenet-worker run`` as a process, and its log."""

    process: LocalProcess

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()  # how it stops in good order has tests of its own

    @property
    def events(self) -> list[dict[str, Any]]:
        """Return what it has logged; fails on a line that is not JSON, such as one of a traceback."""
        text = self.process.output.read_text()
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def wait_for(self, event: str, count: int = 1, **fields: Any) -> dict[str, Any]:
        """Wait until it has logged such an event so many times; returns the last."""
        found: list[dict[str, Any]] = []

        def is_there() -> bool:
            found[:] = [line for line in self.events if line["event"] == event and fields.items() <= line.items()]
            return len(found) >= count

        try:
            wait_until(is_there, PATIENCE_S, event)
        except TimeoutError as exc:
            raise AssertionError(f"no {event}, but {self.events}") from exc
        return found[count - 1]


@dataclass
class Rig:
    """One namespace on the broker, with everything that a test needs to drive a worker."""

    broker_url: str
    folder: Path
    topology: Topology
    upstream: Upstream
    simulator: Simulator

    @classmethod
    @contextmanager
    def set_up(
        cls, broker_url: str, folder: Path, simulator: Simulator, settle_s: int = LONG_SETTLE_S
    ) -> Iterator["Rig"]:
        """Yield a rig, and delete what it declared."""
        topology = Topology(f"test-{uuid4().hex[:8]}", (*RETRY_DELAYS_S, settle_s))
        upstream = Upstream(broker_url, topology)
        try:
            yield cls(broker_url, folder, topology, upstream, simulator)
        finally:
            upstream.close()

    def start_worker(self, **settings: str) -> WorkerProcess:
        """Start a worker without waiting for anything."""
        environment = {
            "AMQP_URL": self.broker_url,
            "ONENET_URL": self.simulator.url,
            "ONENET_API_KEY": API_KEY,
            "ONENET_CONNECT_TIMEOUT": "1",
            "ONENET_READ_TIMEOUT": "1",
            "WORKER_RECONCILE_DELAY": str(SETTLE_S),
            "WORKER_NAMESPACE": self.topology.namespace,
            "WORKER_RETRY_DELAYS": ",".join(map(str, RETRY_DELAYS_S)),
            "LOG_FORMAT": "json",
            "HTTP_PORT": "0",
        } | settings
        output = self.folder / f"worker-{uuid4().hex[:8]}"
        return WorkerProcess(LocalProcess(["run"], environment, output))

    def worker(self, **settings: str) -> WorkerProcess:
        """Start a worker and wait until it consumes."""
        worker = self.start_worker(**settings)
        try:
            worker.wait_for("consumer_started")
        except BaseException:
            worker.process.stop()
            raise
        self.upstream.bind_replies()
        return worker

    def finish(self, **settings: str) -> list[dict[str, Any]]:
        """Let workers run until there is a reply and no command is left; returns all replies.

        Empty queues do not tell that by themselves: the broker may be about to move a command, or to take it back.
        """
        replies: list[dict[str, Any]] = []
        is_over = False
        while not is_over:
            with self.worker(**settings) as worker:
                if not replies:
                    replies.append(self.upstream.reply(3 * PATIENCE_S).json)  # many rigs may be busy side by side
                wait_until(self.upstream.is_empty, PATIENCE_S, "the end of all commands")
                worker.process.signal(signal.SIGTERM)
                worker.process.wait()
            wait_until(lambda: self.upstream.consumers() == 0, PATIENCE_S, "the return of what they held")
            is_over = self.upstream.is_empty()
        while (message := self.upstream.try_reply()) is not None:
            replies.append(message.json)
        return replies

    def wait_for_request(self, simulator: Simulator | None = None) -> None:
        """Wait until the platform has been asked something."""
        asked = simulator or self.simulator
        wait_until(lambda: bool(asked.requests), PATIENCE_S, "a request")

    def cached(self, command_id: str) -> int:
        """Return how often the platform has cached a command whose args are its id."""
        return sum(1 for command in self.simulator.platform.commands if command.args == command_id)


def by_way_of(port: int, url: str) -> str:
    """Return a broker's URL with another port of this machine in it."""
    target = urlsplit(url)
    return target._replace(netloc=f"{target.username}:{target.password}@127.0.0.1:{port}").geturl()


class Proxy:
    """A TCP proxy in front of a broker, whose connections can be cut, silenced or garbled."""

    def __init__(self, url: str, port: int = 0) -> None:
        target = urlsplit(url)
        self._target = (str(target.hostname), target.port or 5672)
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port: int = self._listener.getsockname()[1]
        self.url = by_way_of(self.port, url)
        self._pairs: list[socket.socket] = []
        self._silent: set[socket.socket] = set()
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Reset every connection."""
        with self._lock:
            pairs, self._pairs = self._pairs, []
        for sock in pairs:
            _close(sock)

    def silence(self) -> None:
        """Let nothing through any more on the connections that are there, and say so to nobody."""
        with self._lock:
            self._silent |= set(self._pairs)

    def garble(self) -> None:
        """Say to every client what no broker says: a frame that does not end as it should."""
        with self._lock:
            for client in self._pairs[::2]:
                client.sendall(b"\x01\x00\x01\x00\x00\x00\x04none\x00")

    def close(self) -> None:
        _close(self._listener)
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(self._target)
            except OSError:
                _close(client)
                continue
            with self._lock:
                self._pairs += [client, server]
            for source, target in ((client, server), (server, client)):
                threading.Thread(target=self._pump, args=(source, target), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if source not in self._silent:
                    target.sendall(data)
        _close(source)
        _close(target)


def _close(sock: socket.socket) -> None:
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()


@contextmanager
def raw_server(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """Run a TCP server that does to each connection what the test says; yields its URL."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=_answer, args=(answer, client), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        _close(listener)


def _answer(answer: Callable[[socket.socket], None], client: socket.socket) -> None:
    with suppress(OSError):  # the other side went first
        answer(client)
    _close(client)
