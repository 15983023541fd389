"""A further channel on a connection, for what nothing depends on.

The broker may refuse it, and all else goes on. It is tried again for as long as the connection lasts: rights may be
given, and a queue that was deleted may be declared again.
"""

from collections.abc import Callable
from typing import Any

from pika import BasicProperties
from pika.adapters.asyncio_connection import AsyncioConnection
from pika.channel import Channel
from pika.exceptions import ChannelClosedByBroker, ConnectionWrongStateError, NoFreeChannels

from schemas.command import MAX_BODY_BYTES
from worker.amqp.bodies import BoundedAssembler
from worker.amqp.connection import reason_of

AGAIN_S = 30.0  # from a refusal to the next try

OnMessage = Callable[[Channel, Any, BasicProperties, bytes], object]
"""Called with the channel, the method, the properties and at most the beginning of the body of each message."""


def open_side_channel(
    connection: AsyncioConnection, begin: Callable[[Channel], object], on_lost: Callable[[str], object]
) -> None:
    """Open a channel, and begin to use it; again whenever it is lost.

    Args:
        connection: open, or just ended.
        begin: called with the channel once it is open; what it asks for is done in turn, or the channel is lost.
        on_lost: called with the reason if the broker refuses or closes the channel, or cancels its consumer, once for
            the same reason in a row; not if the connection ends.
    """
    told = ""

    def lose(reason: str) -> None:
        nonlocal told
        if reason != told:
            on_lost(reason)
        told = reason
        connection.ioloop.call_later(AGAIN_S, open_channel)

    def on_cancelled(channel: Any) -> None:
        lose("the broker cancelled the consumer")
        if channel.is_open:
            channel.close()

    def on_open(channel: Any) -> None:
        # pika has no other way to bound what it holds of a body.
        channel._content_assembler = BoundedAssembler(channel._content_assembler, lambda: MAX_BODY_BYTES)  # noqa: SLF001
        channel.add_on_close_callback(
            lambda _channel, error: lose(reason_of(error)) if isinstance(error, ChannelClosedByBroker) else None
        )
        channel.add_on_cancel_callback(lambda _frame: on_cancelled(channel))
        begin(channel)

    def open_channel() -> None:
        try:
            connection.channel(on_open_callback=on_open)
        except NoFreeChannels as exc:
            lose(reason_of(exc))
        except ConnectionWrongStateError:
            return  # it has ended, which its owner learns in another way

    open_channel()
