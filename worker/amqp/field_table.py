"""Header values that pika cannot carry unchanged are passed on as the bytes they came as.

Pika reads a timestamp into a datetime, and loses the whole connection over one in milliseconds, as it does over a table
that is nested a thousand times, so that a single odd message would cut the consumer again and again; it also cuts a
float to its integer part. It has no hook for values, so its two functions are wrapped: what they make of every other
value stays theirs.
"""

import struct
import threading
from datetime import UTC, datetime
from typing import Any

import pika.data

_PAYLOAD_BYTES = {b"T": 8, b"f": 4, b"d": 8, b"D": 5}  # timestamp, float, double, decimal
_NESTING = (b"A", b"F")  # array, table: a length of four bytes, then that much
_MAX_LEVELS = 20
_decode_value = pika.data.decode_value
_encode_value = pika.data.encode_value


class RawFieldValue:
    """A value as it stands in the frame: its kind and its payload."""

    __slots__ = ("encoded",)

    def __init__(self, encoded: bytes) -> None:
        self.encoded = encoded

    @property
    def moment(self) -> datetime | None:
        """The instant that it names, None for anything else."""
        if self.encoded[:1] != b"T":
            return None
        try:
            return datetime.fromtimestamp(struct.unpack(">Q", self.encoded[1:])[0], UTC)
        except (ValueError, OverflowError, OSError):  # in milliseconds, or nonsense
            return None

    def __repr__(self) -> str:
        return f"Opaque({self.encoded!r})"


class _Depth(threading.local):
    levels = 0


_depth = _Depth()


def _decode(encoded: bytes, offset: int) -> tuple[Any, int]:
    kind = encoded[offset : offset + 1]
    payload_bytes = _PAYLOAD_BYTES.get(kind)
    if kind in _NESTING and _depth.levels >= _MAX_LEVELS:
        payload_bytes = 4 + struct.unpack_from(">I", encoded, offset + 1)[0]
    if payload_bytes is not None:
        end = offset + 1 + payload_bytes
        return RawFieldValue(encoded[offset:end]), end
    _depth.levels += 1
    try:
        return _decode_value(encoded, offset)
    finally:
        _depth.levels -= 1


def _encode(pieces: list[bytes], value: Any) -> int:
    if isinstance(value, RawFieldValue):
        pieces.append(value.encoded)
        return len(value.encoded)
    return _encode_value(pieces, value)


def install() -> None:
    """Wrap pika's functions, once for the process."""
    pika.data.decode_value = _decode
    pika.data.encode_value = _encode
