"""Bodies that are too large to be held: only their beginning is kept, and the broker dead-letters them itself.

RabbitMQ accepts bodies of up to 16 MiB from version 4 on, and of up to 128 MiB before, unless it is configured
otherwise. Source: https://www.rabbitmq.com/docs/configure, ``max_message_size``
"""

import base64
import codecs
from collections.abc import Callable
from typing import Any

from pika import frame

from schemas.command import MAX_BODY_BYTES

MAX_KEPT_BYTES = 4 * 1024 * 1024  # of all bodies together that are too large for a command


class TruncatedBody(bytes):
    """The beginning of a body, more of it than a command may have."""

    __slots__ = ()


def body_document(body: bytes) -> dict[str, Any]:
    """Return a body ready for JSON: ``body``, or ``body_base64`` if it is not UTF-8.

    A body of which only the beginning was kept says so: ``is_body_cut``.
    """
    cut = {"is_body_cut": True} if isinstance(body, TruncatedBody) else {}
    try:
        # Of a body that was cut, half a character may be the end.
        text = codecs.getincrementaldecoder("utf-8")().decode(body, final=not cut)
    except UnicodeDecodeError:
        return {"body_base64": base64.b64encode(body).decode(), **cut}
    return {"body": text, **cut}


class BoundedAssembler:
    """Puts messages together from their frames, and drops the rest of a body that is too large.

    Args:
        assembler: pika's own, for the messages whose bodies a command may have.
        most_bytes: tells how large a larger body may be. Asked once for each, when more of it has arrived than one read
            takes: its header may have come with the end of the message before, during which nothing more is read.
    """

    def __init__(self, assembler: Any, most_bytes: Callable[[], int]) -> None:
        self._assembler = assembler
        self._most_bytes = most_bytes
        self._method: frame.Method[Any] | None = None
        self._header: frame.Header | None = None  # of the message whose large body arrives
        self._fragments: list[bytes] = []
        self._received = 0
        self._is_truncated = False

    def process(self, received: frame.Frame) -> Any:
        """Take one frame; returns a message's method, header and body with its last frame, None before."""
        if isinstance(received, frame.Header) and received.body_size > MAX_BODY_BYTES:
            self._header, self._fragments, self._received, self._is_truncated = received, [], 0, False
            return None
        if self._header is None or not isinstance(received, frame.Body):
            if isinstance(received, frame.Method):
                self._method = received
            return self._assembler.process(received)
        is_beginning = self._received <= MAX_BODY_BYTES
        self._received += len(received.fragment)
        if not self._is_truncated:
            self._fragments.append(received.fragment)
            if is_beginning and self._received > MAX_BODY_BYTES:
                self._is_truncated = self._header.body_size > self._most_bytes()
        if self._received < self._header.body_size:
            return None
        header, self._header = self._header, None
        body, self._fragments = b"".join(self._fragments), []
        return self._method, header, TruncatedBody(body) if self._is_truncated else body
