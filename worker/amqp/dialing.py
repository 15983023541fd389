"""Connects to the node of the broker that answers first, and remembers which ones did not answer.

A node that hangs accepts TCP connections and never answers, so that a dial to it ends with its time limit only. The
addresses are therefore raced: each gets a short head start, then the next one is dialled beside it.
Source: https://www.rfc-editor.org/rfc/rfc8305 ("Happy Eyeballs")
"""

import asyncio
import itertools
import socket
from collections.abc import Callable, Coroutine, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

from pika import URLParameters

from worker.amqp.channel import BrokerChannel
from worker.amqp.connection import printable_address
from worker.core.connection_faults import connection_fault
from worker.errors import BrokerUnavailable, UserRefused

HEAD_START_S = 0.5  # several times what a node takes that is well


@dataclass(frozen=True, slots=True)
class Node:
    """One address of the broker.

    Attributes:
        url: the URL that it belongs to.
        host: the address, where the URL may have a name.
    """

    url: URLParameters
    host: str

    def parameters(self, limit_s: float) -> URLParameters:
        """Return what connects to this address within a time limit; TLS still verifies the name in the URL."""
        parameters = copy(self.url)
        parameters.host = self.host
        parameters.socket_timeout = parameters.stack_timeout = limit_s
        return parameters

    def __str__(self) -> str:
        return printable_address(self.url)


@dataclass(frozen=True, slots=True)
class Dialled:
    """The outcome of one round of dials.

    Attributes:
        channel: open, to ``node``; None if no node could be reached.
        node: the one that answered first.
        failures: the other URLs, without secrets, and what is wrong with them.
        is_user_refused: a node does not let this user in.
    """

    channel: BrokerChannel | None
    node: Node | None
    failures: dict[str, str]
    is_user_refused: bool


class Dialler:
    """Dials the nodes of the broker; those that were slow, refused or lost come last, the latest of them at the end."""

    def __init__(self) -> None:
        self._demotions: dict[tuple[str, int], int] = {}
        self._numbers = itertools.count(1)

    def demote(self, node: Node) -> None:
        """Dial this node after all others from now on."""
        self._demotions[node.host, node.url.port] = next(self._numbers)

    def place(self, node: Node) -> int:
        """Return a node's place in the order of dials."""
        return self._demotions.get((node.host, node.url.port), 0)

    async def dial(self, urls: Sequence[URLParameters], name: str, limit_s: float) -> Dialled:
        """Open a connection, and a channel on it, to the node that answers first.

        Args:
            urls: the broker's.
            name: of the connection, in the broker's list of connections.
            limit_s: for each look-up of a name, and for each node, in seconds.
        """
        race = _Race(urls, name, limit_s, self.place)
        try:
            await race.run()
        finally:
            race.cancel()
        for node in race.beaten:
            self.demote(node)
        return Dialled(race.channel, race.node, race.failures, race.is_user_refused)


class _Race:
    """One round of dials; a late winner is closed again."""

    def __init__(self, urls: Sequence[URLParameters], name: str, limit_s: float, place: Callable[[Node], int]) -> None:
        self.channel: BrokerChannel | None = None
        self.node: Node | None = None
        self.is_user_refused = False
        self.beaten: list[Node] = []  # those that were slower or failed, in the order in which they were dialled
        self._name = name
        self._limit_s = limit_s
        self._place = place
        self._loop = asyncio.get_running_loop()
        # The look-ups get a head start, so that the first URL is dialled first.
        self._dial_next_at = self._loop.time() + HEAD_START_S
        self._waiting: list[Node] = []
        self._dialled: list[tuple[Node, float]] = []  # and when, on the loop's clock
        self._reasons: dict[str, str] = {}
        self._running: set[asyncio.Task[None]] = set()
        self._urls = list(urls)
        self._looked_up = 0
        for url in urls:
            self._start(self._look_up(url))

    async def run(self) -> None:
        """Dial until a node has answered, or none is left."""
        while self.channel is None and (self._running or self._waiting):
            now = self._loop.time()
            if self._waiting and now >= self._dial_next_at:
                self._dial_next_at = now + HEAD_START_S
                node = self._waiting.pop(0)
                self._dialled.append((node, now))
                self._start(self._dial(node))
            wait_s = self._dial_next_at - now if self._waiting else None
            await asyncio.wait(self._running, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
        late = self._loop.time() - HEAD_START_S
        self.beaten = [
            node
            for node, began in self._dialled
            if node is not self.node and (began < late or str(node) in self._reasons)
        ]

    def cancel(self) -> None:
        """End the dials that are still in progress."""
        for task in self._running:
            task.cancel()

    @property
    def failures(self) -> dict[str, str]:
        """What is wrong with the URLs that were dialled, without the one of the winner."""
        slow = {str(node): f"no answer within {HEAD_START_S} s" for node in self.beaten}
        failures = slow | self._reasons
        failures.pop(str(self.node), None)
        return failures

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _look_up(self, url: URLParameters) -> None:
        try:
            async with asyncio.timeout(self._limit_s):
                found = await self._loop.getaddrinfo(url.host, url.port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as exc:  # TimeoutError is an OSError
            is_late = isinstance(exc, TimeoutError)
            late = f"the name {url.host} could not be resolved within {self._limit_s:g} s"
            self._reasons[printable_address(url)] = late if is_late else connection_fault(exc, url.host)
            found = []
        for host in dict.fromkeys(str(address[0]) for _, _, _, _, address in found):
            self._waiting.append(Node(url, host))
        self._waiting.sort(key=lambda node: (self._place(node), self._urls.index(node.url)))
        self._looked_up += 1
        if self._looked_up == len(self._urls):
            self._dial_next_at = 0.0

    async def _dial(self, node: Node) -> None:
        channel = BrokerChannel()
        try:
            async with asyncio.timeout(self._limit_s):
                await channel.open(node.parameters(self._limit_s), self._name)
            if self.channel is None:
                self.channel, self.node = channel, node
        except TimeoutError:
            self._reasons[str(node)] = f"no answer within {self._limit_s:g} s"
        except BrokerUnavailable as exc:
            self.is_user_refused |= isinstance(exc, UserRefused)
            self._reasons[str(node)] = str(exc)
        finally:
            self._dial_next_at = 0.0
            if self.channel is not channel:
                channel.abandon()
