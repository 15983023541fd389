"""One connection to the broker with one channel on it, from connecting to the first fault."""

import asyncio
import math
from collections.abc import Callable
from typing import Any

from pika import URLParameters
from pika.adapters.asyncio_connection import AsyncioConnection
from pika.channel import Channel
from pika.exceptions import AMQPError, ChannelClosedByBroker, ConnectionClosedByBroker

from worker.amqp.asyncio_io import AsyncioIOServices
from worker.amqp.connection import CALL_S, close, connect, without_user
from worker.errors import BrokerUnavailable, ChannelRefused, ConnectionRefused, WorkerError


class Link:
    """A connection and its channel; whatever breaks one of them ends both.

    ``lost`` is done as soon as the link is of no use any more, and holds the reason.
    """

    channel: Channel

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.lost: asyncio.Future[WorkerError] = self._loop.create_future()
        self._connection: AsyncioConnection | None = None
        self._streams = AsyncioIOServices(self._loop)

    async def open(self, parameters: URLParameters, name: str) -> None:
        """Connect and open the channel.

        Raises:
            BrokerUnavailable: the broker cannot be reached.
        """
        self._connection = connection = await connect(parameters, name, self._streams)
        connection.add_on_close_callback(lambda _connection, error: self.fail(_as_fault(error)))
        self.channel = await self.call(lambda callback: connection.channel(on_open_callback=callback))
        self.channel.add_on_close_callback(lambda _channel, error: self.fail(_as_fault(error)))

    @property
    def connection(self) -> AsyncioConnection:
        assert self._connection is not None  # open() comes first
        return self._connection

    @property
    def frame_max(self) -> int:
        """The size of the largest frame that both sides agreed on, in bytes."""
        return self.connection.params.frame_max

    @property
    def heartbeat_s(self) -> float:
        """The interval that both sides agreed on, in seconds; infinite where there are no heartbeats."""
        heartbeat = self.connection.params.heartbeat
        return heartbeat if isinstance(heartbeat, int) and heartbeat else math.inf

    def pause_reading(self) -> None:
        """Read nothing more from the broker, which then has to wait; writing goes on."""
        self._streams.pause_reading()

    def resume_reading(self) -> None:
        """Read again what the broker sends."""
        self._streams.resume_reading()

    async def call(self, method: Callable[..., object], *args: object, **kwargs: object) -> Any:
        """Call one of pika's methods and wait for the broker's answer; without an answer the link is lost.

        Raises:
            WorkerError: the link is lost.
        """
        try:
            async with asyncio.timeout(CALL_S):
                return await self.ask(method, *args, **kwargs)
        except TimeoutError as exc:
            error = BrokerUnavailable(f"no answer from the broker within {CALL_S} s")
            self.fail(error)  # half done is undone: the next link begins anew
            raise error from exc

    async def ask(self, method: Callable[..., object], *args: object, **kwargs: object) -> Any:
        """Call one of pika's methods and wait for the broker's answer, or for the end of the link.

        Raises:
            WorkerError: the link is lost.
        """
        answer: asyncio.Future[Any] = self._loop.create_future()
        self.do(method, *args, callback=lambda frame: None if answer.done() else answer.set_result(frame), **kwargs)
        return await self.or_lost(answer)

    def do(self, method: Callable[..., object], *args: object, **kwargs: object) -> None:
        """Call one of pika's methods; where pika cannot, the link is lost."""
        try:
            method(*args, **kwargs)
        except AMQPError as exc:
            self.fail(_as_fault(exc))

    async def or_lost(self, future: "asyncio.Future[Any]") -> Any:
        """Wait for a future.

        Raises:
            WorkerError: the link is lost.
        """
        try:
            await asyncio.wait((future, self.lost), return_when=asyncio.FIRST_COMPLETED)
            if not future.done():
                raise self.lost.result()
            return future.result()
        finally:
            future.cancel()

    def fail(self, error: WorkerError) -> None:
        """End the link."""
        if not self.lost.done():
            self.lost.set_result(error)

    async def close(self) -> None:
        """Close the connection."""
        self.fail(BrokerUnavailable("closed"))
        connection = self._connection
        if connection is None or connection.is_closed:
            return
        self.resume_reading()  # or the broker's answer would not be seen
        closed = asyncio.Event()
        connection.add_on_close_callback(lambda *_: closed.set())
        close(connection)
        await closed.wait()


def _as_fault(error: BaseException) -> WorkerError:
    if isinstance(error, ChannelClosedByBroker):
        return ChannelRefused(error.reply_code, without_user(error.reply_text))
    if isinstance(error, ConnectionClosedByBroker):
        return ConnectionRefused(error.reply_code, without_user(error.reply_text))
    return BrokerUnavailable(without_user(str(error)) or type(error).__name__)
