"""Bodies that are too large to be held: only their beginning is kept, and the broker dead-letters them itself.

RabbitMQ accepts bodies of up to 16 MiB from version 4 on, and of up to 128 MiB before, unless it is configured
otherwise. Source: https://www.rabbitmq.com/docs/configure, ``max_message_size``
"""

from typing import Any

from pika import frame

from schemas.command import MAX_BODY_BYTES

MAX_KEPT_BYTES = 16 * 1024 * 1024


class TruncatedBody(bytes):
    """The beginning of a body, more of it than a command may have."""

    __slots__ = ()


class BoundedAssembler:
    """Puts messages together from their frames, and drops the rest of a body that is too large.

    Args:
        assembler: pika's own, for all other messages.
    """

    def __init__(self, assembler: Any) -> None:
        self._assembler = assembler
        self._method: frame.Method[Any] | None = None
        self._header: frame.Header | None = None  # of the message whose body is dropped
        self._received = 0
        self._beginning = bytearray()

    def process(self, received: frame.Frame) -> Any:
        """Take one frame; returns a message's method, header and body with its last frame, None before."""
        if isinstance(received, frame.Header) and received.body_size > MAX_KEPT_BYTES:
            self._header, self._received = received, 0
            self._beginning.clear()
            return None
        if self._header is None or not isinstance(received, frame.Body):
            if isinstance(received, frame.Method):
                self._method = received
            return self._assembler.process(received)
        self._received += len(received.fragment)
        if len(self._beginning) <= MAX_BODY_BYTES:
            self._beginning += received.fragment
        if self._received < self._header.body_size:
            return None
        header, self._header = self._header, None
        return self._method, header, TruncatedBody(self._beginning)
