"""Connects to the first address of a server that accepts; the limit in time is the caller's, and one for all of it.

An address that does not answer must not use up the time of the next one, so the addresses are raced.
Source: https://www.rfc-editor.org/rfc/rfc8305 (Happy Eyeballs)
"""

import asyncio
import os
import socket
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Executor
from functools import partial
from itertools import chain, groupby, zip_longest
from typing import Any

from worker.onenet.route import Server

_HEAD_START_S = 0.25  # of each address before the next one. Source: RFC 8305, section 5
_MAX_ADDRESSES = 16  # of one name
MAX_SOCKETS = 4  # of one connection that is being made; its oldest address gives way to the next one

# What getaddrinfo returns: family, kind, protocol, canonical name and address.
_Address = tuple[int, int, int, str, Any]


async def connected_socket(server: Server, look_ups: Executor, limit_s: float) -> socket.socket:
    """Return a non-blocking socket that is connected to a server.

    Args:
        server: where to.
        look_ups: runs the look-up of its name.
        limit_s: seconds after which the caller cancels this; the last address is tried well before.

    Raises:
        OSError: the name is unknown, or no address accepts; the error is that of the last one.
        ValueError: the name cannot be encoded.
    """
    loop = asyncio.get_running_loop()
    look_up = partial(socket.getaddrinfo, server.host, server.port, type=socket.SOCK_STREAM)
    waiting = deque(_in_turn(await loop.run_in_executor(look_ups, look_up))[:_MAX_ADDRESSES])
    head_start_s = min(_HEAD_START_S, limit_s / 2 / max(1, len(waiting)))
    running: list[asyncio.Task[socket.socket]] = []  # the oldest first
    error = OSError("the name has no address")
    try:
        while waiting or running:
            if waiting:
                if len(running) == MAX_SOCKETS:
                    _abandon(running.pop(0))  # it closes its socket before the next one is opened
                running.append(loop.create_task(_connect(*waiting.popleft())))
            await asyncio.wait(running, timeout=head_start_s if waiting else None, return_when=asyncio.FIRST_COMPLETED)
            for attempt in [each for each in running if each.done()]:
                running.remove(attempt)
                try:
                    return attempt.result()
                except OSError as exc:
                    error = exc
        raise error
    finally:
        for attempt in running:
            _abandon(attempt)


def _in_turn(addresses: Sequence[_Address]) -> list[_Address]:
    """Return the addresses with those of the two families in turn: often all of one family cannot be reached."""
    families = [list(group) for _, group in groupby(addresses, key=lambda address: address[0])]
    return [address for address in chain.from_iterable(zip_longest(*families)) if address is not None]


async def _connect(family: int, kind: int, protocol: int, _name: str, address: Any) -> socket.socket:
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await asyncio.get_running_loop().sock_connect(sock, address)
    except OSError as exc:
        sock.close()
        if exc.errno is None:
            raise
        raise OSError(exc.errno, os.strerror(exc.errno)) from exc  # asyncio's text has the address for the reason
    except BaseException:
        sock.close()
        raise
    return sock


def _abandon(attempt: "asyncio.Task[socket.socket]") -> None:
    """End an attempt, also one that has just succeeded."""
    attempt.cancel()
    attempt.add_done_callback(_close)


def _close(attempt: "asyncio.Task[socket.socket]") -> None:
    if not attempt.cancelled() and attempt.exception() is None:
        attempt.result().close()
