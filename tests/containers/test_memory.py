"""The image with 128 MiB of memory and 1,024 file descriptors, under attack: it is never killed.

While the attack lasts, the command of another sender for another device is answered, and sent once.
"""

import json
import resource
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import pytest

from tests.support.builders import a_command
from tests.support.docker_engine import Container, container, docker, inspect
from tests.support.hostile_platform import Harm, HostilePlatform
from tests.support.upstream import Upstream
from worker.amqp.topology import Topology
from worker.dev.services.ports import free_port, wait_until

LIMITS = ("--memory", "128m", "--memory-swap", "128m", "--ulimit", "nofile=1024:1024")  # the same: without swap
LONG_S = 900  # how long a test waits on a slow machine; nothing is judged by it
PADDED = 2_600
HEADERS = {f"h{number}": "v" * 250 for number in range(480)}  # nearly as large as a frame allows
BODY_BYTES = 60 * 1024
LARGE_BYTES = 15 * 1024 * 1024  # RabbitMQ 4 accepts at most 16 MiB by default
DEVICES = 40  # more than the worker sends to at once
CONNECTIONS = 1_200
RECONCILE_DELAY_S = 11  # the sum of both timeouts
# Of each version of control groups: how often the kernel has killed a process of the container.
KILLS = "cat /sys/fs/cgroup/memory.events 2>/dev/null || cat /sys/fs/cgroup/memory/memory.oom_control"
PEAK = "cat /sys/fs/cgroup/memory.peak 2>/dev/null || cat /sys/fs/cgroup/memory/memory.max_usage_in_bytes"


@dataclass
class Target:
    """A worker in a container, and those who attack it."""

    worker: Container
    upstream: Upstream
    platform: HostilePlatform
    http_port: int

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for a condition; fails at once when the worker was killed."""

        def is_met() -> bool:
            self.assert_alive()
            return condition()

        wait_until(is_met, LONG_S, what)

    def assert_alive(self) -> None:
        found = inspect(self.worker.identity)
        assert found["State"]["Running"], (
            f"exit code {found['State']['ExitCode']}, killed: {found['State']['OOMKilled']}"
        )
        assert (found["State"]["OOMKilled"], found["RestartCount"]) == (False, 0)

    def inside(self, command: str) -> str:
        return docker("exec", self.worker.identity, "sh", "-c", command)

    def send(self, body: bytes | dict[str, Any], headers: dict[str, Any] | None = None) -> None:
        self.upstream.publish(body, app_id="hostile", headers=headers)

    def wait_for_harm(self, harm: Harm, count: int) -> None:
        self.wait_until(lambda: self.platform.harmed[harm] >= count, f"{harm.name}, {count} times")

    def send_to_harmful_devices(self, harm: Harm) -> None:
        for number in range(DEVICES):
            imei = f"8658200{harm.value:02}{number:06}"
            self.platform.harms[imei] = harm
            self.send(a_command(imei=imei, args="on"))


@pytest.fixture
def target(image: str, broker_url: str) -> Iterator[Target]:
    topology = Topology(f"test-{uuid4().hex[:8]}", (1, 2, RECONCILE_DELAY_S))
    http_port = free_port()
    upstream = Upstream(broker_url, topology)
    with ExitStack() as stack:
        stack.callback(upstream.close)
        platform = stack.enter_context(HostilePlatform())
        settings = {
            "AMQP_URL": broker_url,
            "ONENET_URL": platform.url,
            "ONENET_API_KEY": "a-key",
            "ONENET_CONNECT_TIMEOUT": "1",
            "ONENET_READ_TIMEOUT": "10",
            "ONENET_RATE_LIMIT": "off",
            "WORKER_PAUSE_AFTER_FAILURES": "100000",  # so that the platform does all the harm that it can
            "WORKER_RECONCILE_DELAY": str(RECONCILE_DELAY_S),
            "WORKER_RETRY_DELAYS": "1,2",
            "WORKER_NAMESPACE": topology.namespace,
            "HTTP_HOST": "127.0.0.1",
            "HTTP_PORT": str(http_port),
        }
        environment = [option for name, value in settings.items() for option in ("--env", f"{name}={value}")]
        worker = stack.enter_context(container(image, "--network", "host", *LIMITS, *environment))
        worker.wait_for("consumer_started")
        upstream.bind_replies("execute.*.innocent")
        yield Target(worker, upstream, platform, http_port)


def padded_commands_of_one_device(target: Target) -> None:
    """The platform keeps the first one waiting, and so all that are behind it."""
    imei = "865820040000001"
    target.platform.harms[imei] = Harm.HOLD
    for number in range(PADDED):
        body = json.dumps(a_command(command_id=f"padded-{uuid4().hex}-{number}", imei=imei, args="on")).encode()
        target.send(body.ljust(BODY_BYTES), HEADERS)


def endless_histories(target: Target) -> None:
    target.send_to_harmful_devices(Harm.ENDLESS_HISTORY)
    target.wait_for_harm(Harm.ENDLESS_HISTORY, 2 * DEVICES)


def endless_pages(target: Target) -> None:
    target.send_to_harmful_devices(Harm.ENDLESS_PAGE)
    target.wait_for_harm(Harm.ENDLESS_PAGE, DEVICES)


def endless_redirects(target: Target) -> None:
    target.send_to_harmful_devices(Harm.ENDLESS_REDIRECT)
    target.wait_for_harm(Harm.ENDLESS_REDIRECT, DEVICES)


def large_details(target: Target) -> None:
    target.send_to_harmful_devices(Harm.LARGE_DETAILS)
    target.wait_for_harm(Harm.LARGE_DETAILS, 4 * DEVICES)


def large_uuids(target: Target) -> None:
    for harm in (Harm.LARGE_UUID, Harm.LARGE_UUIDS):
        target.send_to_harmful_devices(harm)
    for harm in (Harm.LARGE_UUID, Harm.LARGE_UUIDS):
        target.wait_for_harm(harm, DEVICES)


def large_answers(target: Target) -> None:
    target.send_to_harmful_devices(Harm.LARGE_ANSWER)
    target.wait_for_harm(Harm.LARGE_ANSWER, DEVICES)


def tables_in_answers(target: Target) -> None:
    target.send_to_harmful_devices(Harm.TABLES)
    target.wait_for_harm(Harm.TABLES, DEVICES)


def tables_in_pages(target: Target) -> None:
    target.send_to_harmful_devices(Harm.TABLES_IN_PAGES)
    target.wait_for_harm(Harm.TABLES_IN_PAGES, 3 * DEVICES)


def tables_in_details(target: Target) -> None:
    target.send_to_harmful_devices(Harm.TABLES_IN_DETAILS)
    target.wait_for_harm(Harm.TABLES_IN_DETAILS, 4 * DEVICES)


def large_bodies(target: Target) -> None:
    for _ in range(8):
        target.send(b"x" * LARGE_BYTES)


def invalid_commands(target: Target) -> None:
    """Each field of each of them is wrong, so that there is much to say about it."""
    for _ in range(300):
        target.send(json.dumps({f"f{number:04}": number for number in range(4_000)}).encode())
        target.send(b'{"command_id": "c", ' + b'"imei": 1, ' * 5_000 + b'"imei": 1}')
        target.send(b"[" * BODY_BYTES)
        target.send(b"\xff" * BODY_BYTES, HEADERS)


@contextmanager
def half_open_requests(target: Target) -> Iterator[None]:
    """More connections to the port of the probes than there are descriptors, each with a part of a request."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(8_192, hard), hard))
    with ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        for _ in range(CONNECTIONS):
            with suppress(OSError):  # the worker may take no more
                sock = stack.enter_context(socket.create_connection(("127.0.0.1", target.http_port), timeout=5))
                sock.sendall(b"GET /metrics HTTP/1.1\r\nHost: worker\r\nX-")
        yield


ATTACKS = [
    padded_commands_of_one_device,
    endless_histories,
    endless_pages,
    endless_redirects,
    large_details,
    large_uuids,
    large_answers,
    tables_in_answers,
    tables_in_pages,
    tables_in_details,
    large_bodies,
    invalid_commands,
]


def everything(target: Target) -> None:
    for attack in ATTACKS:
        attack(target)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("attack", [*ATTACKS, half_open_requests, everything], ids=lambda attack: attack.__name__)
def test_an_attack_kills_no_worker_and_holds_up_no_other_command(
    target: Target, attack: Callable[[Target], Any]
) -> None:
    with ExitStack() as stack:
        if attack in {half_open_requests, everything}:
            stack.enter_context(half_open_requests(target))
        if attack is not half_open_requests:
            attack(target)
        target.upstream.publish(
            a_command(command_id="innocent", imei="865820050000001", args="innocent"), app_id="innocent"
        )
        # It was the last in the queue: all that was sent before has reached the worker. The queue need not be empty,
        # because what is postponed comes back after two seconds.
        target.wait_until(lambda: target.upstream.replies_waiting() > 0, "the reply to another sender")
        target.assert_alive()
    assert "oom_kill 0" in target.inside(KILLS).splitlines()
    reply = target.upstream.reply()
    assert (reply.json["command_id"], reply.json["status"]) == ("innocent", "accepted")
    assert target.platform.cached == {"innocent": 1}
    print(f"{attack.__name__}: at most {int(target.inside(PEAK)) / 2**20:.0f} MiB", flush=True)
