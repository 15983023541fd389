"""Pika's I/O services on asyncio's transports: the frames of one loop iteration leave in one system call.

Pika's asyncio adapter makes one system call per frame, four per command. ``AsyncioConnection`` accepts these services
as its ``custom_ioloop``.
"""

import asyncio
import socket
import ssl
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

from pika.adapters.utils.nbio_interface import (
    AbstractIOReference,
    AbstractIOServices,
    AbstractStreamProtocol,
    AbstractStreamTransport,
    AbstractTimerReference,
)

_CHUNK_BYTES = 8192  # pika copies the rest of a chunk for each frame in it, so larger chunks cost more
_WRITE_BYTES = 256 * 1024  # asyncio copies what the socket does not accept at once, so each write is limited


class AsyncioIOServices(AbstractIOServices):
    """The I/O services that pika needs, on an asyncio event loop; each connection needs its own."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self._protocol: _Protocol | None = None
        self._is_paired = False
        self._is_dropped = False
        self.on_fault: Callable[[OSError], object] = lambda _error: None
        """Called with an error that pika does not handle while it connects, such as a socket that cannot be made."""
        self._socket: socket.socket | None = None  # while it connects
        self._operation: _Reference | None = None

    @property
    def is_connected(self) -> bool:
        """Whether there is a transport."""
        return self._transport is not None

    @property
    def is_pairing(self) -> bool:
        """Whether there is a transport that pika has not been told of yet."""
        return self._transport is not None and not self._is_paired

    @property
    def silence_s(self) -> float:
        """For how many seconds nothing has arrived that would have been read; 0 while nothing is read."""
        if self._protocol is None or self._transport is None or not self._transport.is_reading():
            return 0.0
        return self._loop.time() - self._protocol.last_read_at

    def drop(self) -> None:
        """End connecting, before there is a transport; pika is told of nothing more.

        It could not be closed: without a transport it waits for the end of one, and fails (1.4.4).
        """
        self._is_dropped = True
        if self._operation is not None:
            self._operation.cancel()
        if self._protocol is not None:
            self._protocol.is_dropped = True
        if self._socket is not None:
            self._socket.close()

    def abort(self) -> None:
        """End the connection without a word to the peer; pika sees a lost connection."""
        if self._transport is not None and self._protocol is not None:
            self._protocol.error = ConnectionAbortedError("dropped by the worker")
            self._transport.abort()

    def pause_reading(self) -> None:
        """Stop reading until ``resume_reading``."""
        if self._transport is not None and self._transport.is_reading():
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Read again."""
        if self._transport is None or self._protocol is None or self._transport.is_closing():
            return
        if not self._transport.is_reading():
            self._protocol.last_read_at = self._loop.time()  # what came meanwhile is only read from now on
            self._transport.resume_reading()

    def get_native_ioloop(self) -> asyncio.AbstractEventLoop:
        return self._loop

    def close(self) -> None:
        self._loop.close()

    def run(self) -> None:
        self._loop.run_forever()

    def stop(self) -> None:
        self._loop.stop()

    def add_callback_threadsafe(self, callback: Callable[[], None]) -> None:
        self._loop.call_soon_threadsafe(callback)

    def call_later(self, delay: float, callback: Callable[[], None]) -> AbstractTimerReference:
        def call() -> None:
            if not self._is_dropped:
                callback()

        return _Timer(self._loop.call_later(delay, call))

    def getaddrinfo(
        self,
        host: str | bytes | None,
        port: str | bytes | int | None,
        on_done: Callable[[Any], None],
        family: int = 0,
        socktype: int = 0,
        proto: int = 0,
        flags: int = 0,
    ) -> AbstractIOReference:
        found = self._loop.getaddrinfo(host, port, family=family, type=socktype, proto=proto, flags=flags)
        return self._begin(found, on_done)

    def connect_socket(
        self, sock: socket.socket, resolved_addr: tuple[str, int], on_done: Callable[[Any], None]
    ) -> AbstractIOReference:
        self._socket = sock
        return self._begin(self._loop.sock_connect(sock, resolved_addr), on_done)

    def create_streaming_connection(
        self,
        protocol_factory: Callable[[], AbstractStreamProtocol],
        sock: socket.socket,
        on_done: Callable[[Any], None],
        ssl_context: ssl.SSLContext | None = None,
        server_hostname: str | None = None,
    ) -> AbstractIOReference:
        self._socket = None  # it belongs to the transport

        async def create() -> tuple[AbstractStreamTransport, AbstractStreamProtocol]:
            protocol = self._protocol = _Protocol(self._loop, protocol_factory())
            self._transport, _ = await self._loop.create_connection(
                lambda: protocol,
                sock=sock,
                ssl=ssl_context,
                server_hostname=server_hostname if ssl_context is not None else None,
            )
            return protocol.stream, protocol.wrapped

        def on_created(result: Any) -> None:
            self._is_paired = True
            on_done(result)

        return self._begin(create(), on_created)

    def _begin(self, work: Coroutine[Any, Any, Any], on_done: Callable[[Any], None]) -> "_Reference":
        self._operation = _Reference(work, on_done, self.on_fault)
        return self._operation


class _Timer(AbstractTimerReference):
    def __init__(self, handle: asyncio.TimerHandle) -> None:
        self._handle = handle

    def cancel(self) -> None:
        self._handle.cancel()


class _Reference(AbstractIOReference):
    """A running operation; pika receives its result or its error through the same callback."""

    def __init__(
        self,
        work: Coroutine[Any, Any, Any],
        on_done: Callable[[Any], None],
        on_fault: Callable[[OSError], object],
    ) -> None:
        self._task = asyncio.ensure_future(work)
        self._on_done = on_done
        self._on_fault = on_fault
        self._is_cancelled = False
        self._task.add_done_callback(self._report)

    def cancel(self) -> bool:
        self._is_cancelled = True  # it may have ended by now, and its report be due
        return self._task.cancel()

    def _report(self, task: "asyncio.Task[Any]") -> None:
        if self._is_cancelled or task.cancelled():
            return
        try:
            self._on_done(task.exception() or task.result())
        except OSError as exc:
            self._on_fault(exc)


class _Protocol(asyncio.BufferedProtocol):
    """Passes what the broker sends on to pika's protocol."""

    stream: "_Stream"

    def __init__(self, loop: asyncio.AbstractEventLoop, wrapped: AbstractStreamProtocol) -> None:
        self.wrapped = wrapped
        self._loop = loop
        self._buffer = memoryview(bytearray(_CHUNK_BYTES))
        self.error: Exception | None = None  # why the connection ends, where the transport does not know
        self.is_dropped = False  # pika is told of nothing more
        self.last_read_at = loop.time()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.stream = _Stream(self._loop, transport, self.wrapped)
        self.wrapped.connection_made(self.stream)

    def pause_writing(self) -> None:
        self.stream.pause_writing()

    def resume_writing(self) -> None:
        self.stream.resume_writing()

    def get_buffer(self, _sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.last_read_at = self._loop.time()
        try:
            self.wrapped.data_received(bytes(self._buffer[:nbytes]))
        except Exception as exc:  # noqa: BLE001 - as in pika's own adapters: unreadable data ends the connection
            self.error = exc
            self.stream.abort()

    def eof_received(self) -> bool | None:
        return self.wrapped.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.is_dropped:
            self.wrapped.connection_lost(self.error or exc)


class _Stream(AbstractStreamTransport):
    """Buffers what pika writes, and passes it to the transport only while the transport accepts more."""

    def __init__(self, loop: asyncio.AbstractEventLoop, transport: Any, protocol: AbstractStreamProtocol) -> None:
        self._loop = loop
        self._transport = transport
        self._protocol = protocol
        self._written: deque[bytes] = deque()
        self._written_bytes = 0
        self._is_flush_scheduled = False
        self._is_paused = False

    def abort(self) -> None:
        self._transport.abort()

    def get_protocol(self) -> AbstractStreamProtocol:
        return self._protocol

    def write(self, data: bytes) -> None:
        self._written.append(data)
        self._written_bytes += len(data)
        if not self._is_flush_scheduled and not self._is_paused:
            self._is_flush_scheduled = True
            self._loop.call_soon(self._flush)

    def get_write_buffer_size(self) -> int:
        return int(self._transport.get_write_buffer_size()) + self._written_bytes

    def pause_writing(self) -> None:
        self._is_paused = True

    def resume_writing(self) -> None:
        self._is_paused = False
        self._flush()

    def _flush(self) -> None:
        self._is_flush_scheduled = False
        while self._written and not self._is_paused:
            piece: list[bytes] = []
            size = 0
            while self._written and size < _WRITE_BYTES:
                piece.append(self._written.popleft())
                size += len(piece[-1])
            self._written_bytes -= size
            self._transport.write(b"".join(piece))
