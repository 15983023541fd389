"""A RabbitMQ cluster of private nodes whose connections to each other can be interrupted."""

import os
import re
import secrets
import signal
import socket
import struct
import subprocess
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Self

from tests.support.proxies import Proxy
from tests.support.waiting import PATIENCE_S
from worker.dev.services.broker import PrivateNode, installed_script
from worker.dev.services.ports import is_listening, wait_until

_SIZE = 3
_HEALS_S = 60
_WHOLE_S = 3 * PATIENCE_S  # nodes that start wait for each other, and share the processors with other tests
_ANSWER_S = 10
# The recommendations of docs/operations.md; tests/cluster/test_recipes.py compares the two.
CONFIGURATION = """\
cluster_partition_handling = pause_minority
cluster_formation.peer_discovery_backend = classic_config
cluster_formation.classic_config.nodes.1 = rabbit1@localhost
cluster_formation.classic_config.nodes.2 = rabbit2@localhost
cluster_formation.classic_config.nodes.3 = rabbit3@localhost
"""
ADVANCED = """\
[
  {kernel, [{net_ticktime, 10}]},
  {rabbit, [{dead_letter_worker_publisher_confirm_timeout, 10000}]}
].
"""


class ClusterNode(PrivateNode):
    """One node. It reaches each other node through a proxy, so that a partition needs no rights on the machine.

    Each node has a port mapper of its own, in which the other nodes are registered with the ports of the proxies.
    """

    def __init__(self, script: Path, number: int, cookie: str) -> None:
        super().__init__(script)
        self.name = f"rabbit{number}@localhost"
        self.links: dict[str, Proxy] = {}
        self._registrations: list[socket.socket] = []
        with (self._folder / "rabbitmq.conf").open("a") as configuration:
            configuration.write(CONFIGURATION)
        (self._folder / "advanced.config").write_text(ADVANCED)
        cookie_file = self._folder / ".erlang.cookie"
        cookie_file.write_text(cookie)
        cookie_file.chmod(0o400)

    def link_to(self, other: "ClusterNode") -> None:
        """Open the proxy to another node; call this before the node is started."""
        self.links[other.name] = Proxy(f"tcp://127.0.0.1:{other.distribution_port}")

    def hang(self) -> None:
        """Stop the node's processes: its connections stay open, and nothing answers."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Continue the node's processes."""
        self._signal(signal.SIGCONT)

    def stop_gracefully(self) -> None:
        """Stop the node as an upgrade does; its data stays."""
        self.control("stop")
        self.kill()  # waits for the end of its processes

    def run(self, program: str, *arguments: str) -> str:
        """Run a command of RabbitMQ's on the node and return its output."""
        return subprocess.run(
            [str(self._script.with_name(program)), *arguments],
            env=self._environment(),
            cwd=self._folder,
            check=True,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        ).stdout

    def stop(self) -> None:
        with suppress(ProcessLookupError):
            self.resume()
        super().stop()
        for proxy in self.links.values():
            proxy.close()
        for registration in self._registrations:
            registration.close()

    def _signal(self, number: signal.Signals) -> None:
        if self._server is not None:
            os.killpg(self._server.pid, number)

    def _start_epmd(self) -> None:
        super()._start_epmd()
        if not self._registrations:
            wait_until(lambda: is_listening("127.0.0.1", self._epmd_port), PATIENCE_S, "epmd")
            self._registrations = [
                _register(self._epmd_port, name.partition("@")[0], proxy.port) for name, proxy in self.links.items()
            ]

    def _environment(self) -> dict[str, str]:
        return super()._environment() | {
            "RABBITMQ_NODENAME": self.name,
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(self._folder / "advanced.config"),
        }


def _register(epmd_port: int, name: str, port: int) -> socket.socket:
    """Register a node with epmd; the registration lasts as long as the connection that is returned.

    Source: https://www.erlang.org/doc/apps/erts/erl_dist_protocol.html ("Register a Node in EPMD")
    """
    normal_node, over_tcp, highest_version, lowest_version = 77, 0, 6, 5
    body = struct.pack(
        f">BHBBHHH{len(name)}sH",
        120, port, normal_node, over_tcp, highest_version, lowest_version, len(name), name.encode(), 0,
    )  # fmt: skip
    connection = socket.create_connection(("127.0.0.1", epmd_port))
    connection.sendall(struct.pack(">H", len(body)) + body)
    _, result = connection.recv(2, socket.MSG_WAITALL)
    assert result == 0, f"epmd refused {name}"
    return connection


class RabbitCluster:
    """Three nodes with data folders, ports, an Erlang cookie and an epmd of their own, on loopback only."""

    def __init__(self) -> None:
        script = installed_script()
        cookie = secrets.token_hex(16)
        self.nodes = [ClusterNode(script, number, cookie) for number in range(1, _SIZE + 1)]
        for node in self.nodes:
            for other in self.nodes:
                if other is not node:
                    node.link_to(other)

    def start(self) -> None:
        """Start all nodes at once, as after a loss of power; returns when they form a cluster."""
        try:
            self._with_each(ClusterNode.start)
            self.wait_until_whole()
        except BaseException:
            self.stop()
            raise

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def urls(self) -> list[str]:
        return [node.url for node in self.nodes]

    def leader_of(self, queue: str) -> ClusterNode:
        """Return the node that leads a quorum queue; all nodes must run."""
        # Each node tells of its own queues: the others could not reach rabbitmqctl, which is in one port mapper only.
        return next(
            node
            for node in self.nodes
            if queue in node.run("rabbitmqctl", "--silent", "list_queues", "--local", "name").split()
        )

    def describe_queues(self) -> str:
        """Return the numbers of messages in queues that are not empty.

        Not among them are those that a delay queue is handing on: nothing tells their number on 3.10.
        """
        columns = ("name", "messages_ready", "messages_unacknowledged")
        found = []
        for node in self.nodes:
            for line in node.run("rabbitmqctl", "--silent", "list_queues", "--local", *columns).splitlines():
                name, *counts = line.split("\t")
                if any(count not in ("", "0") for count in counts):
                    found.append(f"{node.name} {name}: ready, unacknowledged {', '.join(counts)}")
        return "; ".join(found)

    def isolate(self, node: ClusterNode) -> None:
        """Interrupt the connections between a node and the others; clients still reach all of them."""
        for proxy in self._links_of(node):
            proxy.hold()

    def heal(self, node: ClusterNode) -> None:
        """End what ``isolate`` began: what was sent meanwhile arrives."""
        for proxy in self._links_of(node):
            proxy.release()

    def wait_until_whole(self) -> None:
        """Wait until each node knows that all of them run."""
        wait_until(self._is_whole, _WHOLE_S, "the cluster of RabbitMQ nodes", every_s=1)

    def heals(self) -> bool:
        """Tell whether all nodes find each other within a minute."""
        try:
            wait_until(self._is_whole, _HEALS_S, "the cluster of RabbitMQ nodes", every_s=1)
        except TimeoutError:
            return False
        return True

    def stop(self) -> None:
        self._with_each(ClusterNode.stop)

    def _links_of(self, node: ClusterNode) -> list[Proxy]:
        return [*node.links.values(), *(other.links[node.name] for other in self.nodes if other is not node)]

    def _with_each(self, act: Callable[[ClusterNode], None]) -> None:
        with ThreadPoolExecutor(len(self.nodes)) as pool:
            list(pool.map(act, self.nodes))

    def _is_whole(self) -> bool:
        names = [node.name for node in self.nodes]
        # One command asks all of them, because each command starts an Erlang VM, which takes seconds on a busy machine.
        # Each node is asked what it knows itself; ``cluster_status`` would ask the others, and wait for them.
        nodes = ", ".join(f"'{name}'" for name in names)
        expression = f"rpc:multicall([{nodes}], rabbit_mnesia, cluster_nodes, [running], {_ANSWER_S * 1000})."
        try:
            answers = self.nodes[0].run("rabbitmqctl", "--silent", "eval", expression)
        except subprocess.SubprocessError:  # the node does not answer yet
            return False
        return Counter(re.findall(r"rabbit\d+@localhost", answers)) == dict.fromkeys(names, len(names))
