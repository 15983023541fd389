"""One connection to the broker with one channel on it, from connecting to the first fault."""

import asyncio
import math
from collections.abc import Callable
from typing import Any

from pika import URLParameters
from pika.adapters.asyncio_connection import AsyncioConnection
from pika.channel import Channel
from pika.exceptions import AMQPError, ChannelClosedByBroker, ConnectionClosedByBroker

from schemas.command import MAX_BODY_BYTES
from worker.amqp.asyncio_io import AsyncioIOServices
from worker.amqp.bodies import BoundedAssembler
from worker.amqp.connection import CALL_S, abandon, connect, reason_of
from worker.amqp.refusals import refusal
from worker.errors import BrokerUnavailable, ChannelRefused, ConnectionRefused, WorkerError

_HEARTBEAT_MARGIN = 5  # a fifth of the heartbeat, for a broker that is late


class BrokerChannel:
    """A channel with a connection of its own; a fault of either one ends both.

    ``lost`` is done as soon as the channel can no longer be used, and holds the reason.
    """

    pika_channel: Channel

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.lost: asyncio.Future[WorkerError] = self._loop.create_future()
        self.most_body_bytes = MAX_BODY_BYTES  # of a larger body only the beginning is kept
        self._connection: AsyncioConnection | None = None
        self._io = AsyncioIOServices(self._loop)

    async def open(self, parameters: URLParameters, name: str) -> None:
        """Connect and open the channel.

        Args:
            parameters: the broker.
            name: of the connection, in the broker's list of connections.

        Raises:
            BrokerUnavailable: the broker cannot be reached.
        """
        self._connection = connection = await connect(parameters, name, self._io)
        if self.lost.done():  # it was closed meanwhile
            abandon(connection, self._io)
            raise self.lost.result()
        connection.add_on_close_callback(lambda _connection, error: self.fail(_as_fault(error)))
        self._watch_silence()
        channel = await self.call(lambda callback: connection.channel(on_open_callback=callback))
        # pika has no other way to bound what it holds of a body.
        bounded = BoundedAssembler(channel._content_assembler, lambda: self.most_body_bytes)  # noqa: SLF001
        channel._content_assembler = bounded  # noqa: SLF001
        self.pika_channel = channel
        self.pika_channel.add_on_close_callback(lambda _channel, error: self.fail(_as_fault(error)))
        cancelled = BrokerUnavailable("the broker cancelled the consumer")
        self.pika_channel.add_on_cancel_callback(lambda _frame: self.fail(cancelled))

    @property
    def pika_connection(self) -> AsyncioConnection:
        assert self._connection is not None  # open() comes first
        return self._connection

    @property
    def frame_max(self) -> int:
        """The negotiated size of the largest frame, in bytes."""
        return self.pika_connection.params.frame_max

    @property
    def heartbeat_s(self) -> float:
        """The negotiated heartbeat interval, in seconds; infinite where heartbeats are turned off."""
        heartbeat = self.pika_connection.params.heartbeat
        return heartbeat if isinstance(heartbeat, int) and heartbeat else math.inf

    @property
    def max_silence_s(self) -> float:
        """For how many seconds a peer that is well may send nothing."""
        return self.heartbeat_s + max(1.0, self.heartbeat_s / _HEARTBEAT_MARGIN)

    def pause_reading(self) -> None:
        """Stop reading from the connection, so that the broker has to wait; writing goes on."""
        self._io.pause_reading()

    def resume_reading(self) -> None:
        """Read from the connection again."""
        self._io.resume_reading()

    async def call(self, method: Callable[..., object], *args: object, **kwargs: object) -> Any:
        """Call one of pika's methods and wait for the broker's reply; without a reply in time the channel is lost.

        Raises:
            WorkerError: the channel is lost.
        """
        try:
            async with asyncio.timeout(CALL_S):
                return await self.call_untimed(method, *args, **kwargs)
        except TimeoutError as exc:
            error = BrokerUnavailable(f"no answer from the broker within {CALL_S} s")
            self.fail(error)  # it is unknown whether the broker did it: only a new channel is in a known state
            raise error from exc

    async def cancel(self, consumer_tag: str) -> None:
        """Cancel a consumer, which is still called with what arrives before the broker's reply.

        Pika itself would return that to the queue, and it would look as if it had been handled before.

        Raises:
            WorkerError: the channel is lost.
        """
        channel: Any = self.pika_channel

        def basic_cancel(*args: Any, **kwargs: Any) -> None:
            channel.basic_cancel(*args, **kwargs)
            channel._cancelled.discard(consumer_tag)  # noqa: SLF001 - pika has no other way

        await self.call(basic_cancel, consumer_tag)

    async def call_untimed(self, method: Callable[..., object], *args: object, **kwargs: object) -> Any:
        """Call one of pika's methods and wait for the broker's reply, without a time limit.

        Raises:
            WorkerError: the channel is lost.
        """
        reply: asyncio.Future[Any] = self._loop.create_future()
        self.invoke(method, *args, callback=lambda frame: None if reply.done() else reply.set_result(frame), **kwargs)
        return await self.until_lost(reply)

    def invoke(self, method: Callable[..., object], *args: object, **kwargs: object) -> None:
        """Call one of pika's methods, unless the channel is lost; if pika raises, it is."""
        if self.lost.done():
            return
        try:
            method(*args, **kwargs)
        except AMQPError as exc:
            self.fail(_as_fault(exc))

    async def until_lost(self, future: "asyncio.Future[Any]") -> Any:
        """Wait for a future, at most until the channel is lost.

        Raises:
            WorkerError: the channel is lost.
        """
        try:
            await asyncio.wait((future, self.lost), return_when=asyncio.FIRST_COMPLETED)
            if not future.done():
                raise self.lost.result()
            return future.result()
        finally:
            future.cancel()

    def fail(self, error: WorkerError) -> None:
        """Mark the channel as lost; the first reason stays."""
        if not self.lost.done():
            self.lost.set_result(error)

    def abandon(self) -> None:
        """Begin to close the connection, in whichever state it is."""
        self.fail(BrokerUnavailable("closed"))
        if self._connection is not None:
            abandon(self._connection, self._io)

    async def close(self) -> None:
        """Close the connection."""
        self.fail(BrokerUnavailable("closed"))
        connection = self._connection
        if connection is None or connection.is_closed:
            return
        self.resume_reading()  # or the broker's reply would not be read
        closed = asyncio.Event()
        connection.add_on_close_callback(lambda *_: closed.set())
        abandon(connection, self._io)
        await closed.wait()

    def abort(self) -> None:
        """End the connection at once: a channel that hangs in the broker does not answer that it is closed."""
        self.fail(BrokerUnavailable("closed"))
        self._io.abort()

    def _watch_silence(self) -> None:
        """End the connection once the peer has been silent for too long.

        Pika looks at whole intervals, and so notices a peer that hangs after up to 40 s at a heartbeat of 15 s. A peer
        that is well sends something within two halves of the heartbeat.
        Source: https://www.rabbitmq.com/docs/heartbeats
        """
        if self.pika_connection.is_closed or math.isinf(self.heartbeat_s):
            return
        left_s = self.max_silence_s - self._io.silence_s
        if left_s > 0:
            self._loop.call_later(left_s, self._watch_silence)
        else:
            self.fail(BrokerUnavailable(f"missed heartbeats: nothing arrived for {self.max_silence_s:g} s"))
            self._io.abort()  # a peer that hangs does not answer connection.close


def _as_fault(error: BaseException) -> WorkerError:
    if isinstance(error, ChannelClosedByBroker):
        return ChannelRefused(error.reply_code, refusal(error.reply_code, error.reply_text))
    if isinstance(error, ConnectionClosedByBroker):
        return ConnectionRefused(error.reply_code, refusal(error.reply_code, error.reply_text))
    return BrokerUnavailable(reason_of(error))
