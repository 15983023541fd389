"""A stand-in for OneNET that accepts every request after a fixed latency, and is fast enough not to be the limit."""

import asyncio
import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvloop

from worker.dev.services.ports import free_port, is_listening, wait_until

_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
_BODY = b'{"errno":0,"data":{"uuid":"42742677-adc3-54ca-83a1-%012x"},"error":"succ"}'


class _Protocol(asyncio.Protocol):
    """One connection: parses only as much HTTP as the two workers send."""

    def __init__(self, answered: Any, latency_s: float) -> None:
        self._answered = answered
        self._latency_s = latency_s
        self._loop = asyncio.get_running_loop()
        self._received = b""

    def connection_made(self, transport: Any) -> None:  # uvloop's transports are not asyncio.Transport
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, found, rest = self._received.partition(b"\r\n\r\n")
        if not found:
            return
        _, _, length = head.lower().partition(b"content-length:")
        if len(rest) < int(length.split(b"\r\n", 1)[0] or 0):
            return
        self._received = b""
        if self._latency_s:
            self._loop.call_later(self._latency_s, self._answer)
        else:
            self._answer()

    def _answer(self) -> None:
        self._answered.value += 1  # only this process writes it
        body = _BODY % self._answered.value
        self._transport.write(_HEAD % len(body) + body)


@dataclass(frozen=True)
class Platform:
    """The stand-in and the number of requests that it has answered."""

    url: str
    _answered: Any

    @property
    def answered(self) -> int:
        return int(self._answered.value)


@contextmanager
def platform(latency_s: float) -> Iterator[Platform]:
    """Run the stand-in in its own process."""
    context = multiprocessing.get_context("spawn")
    answered = context.RawValue("L", 0)
    port = free_port()
    process = context.Process(target=_serve, args=(port, latency_s, answered), daemon=True)
    process.start()
    try:
        wait_until(lambda: is_listening("127.0.0.1", port), 20, "the platform")
        yield Platform(f"http://127.0.0.1:{port}", answered)
    finally:
        process.terminate()
        process.join()


def _serve(port: int, latency_s: float, answered: Any) -> None:
    async def serve() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: _Protocol(answered, latency_s), "127.0.0.1", port, backlog=1024)
        await server.serve_forever()

    uvloop.run(serve())
