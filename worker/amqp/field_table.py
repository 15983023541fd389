"""Header values that pika cannot decode and encode without loss are kept as the bytes in which they arrived.

Pika decodes a timestamp to a datetime and closes the connection over one in milliseconds, as it does over a table with
a thousand levels: a single odd message would cut the consumer again and again. It also truncates a float to an integer,
and encodes a text that is not UTF-8 as an array of bytes. Pika has no hook for field values, so its two functions are
wrapped; they still decode and encode all other values.
"""

import struct
from datetime import UTC, datetime
from typing import Any

import pika.data

_PAYLOAD_BYTES = {b"T": 8, b"f": 4, b"d": 8, b"D": 5}  # timestamp, float, double, decimal
_TEXT = b"S"  # a length of four bytes, then the text
_NESTED_KINDS = (b"A", b"F")  # array, table: a length of four bytes, then the payload
_MAX_LEVELS = 20  # more deeply nested values stay encoded
_open_levels: list[int] = []  # where the values begin that are being decoded, each within the one before
_decode_value = pika.data.decode_value
_encode_value = pika.data.encode_value


class RawFieldValue:
    """A field value as it is encoded in the frame: its kind, one byte, and its payload."""

    __slots__ = ("encoded",)

    def __init__(self, encoded: bytes) -> None:
        self.encoded = encoded

    @property
    def moment(self) -> datetime | None:
        """The instant that a timestamp names, None for any other value."""
        if self.encoded[:1] != b"T":
            return None
        try:
            return datetime.fromtimestamp(struct.unpack(">Q", self.encoded[1:])[0], UTC)
        except (ValueError, OverflowError, OSError):  # in milliseconds, or meaningless
            return None

    @property
    def text(self) -> str | None:
        """The text of a text that is not UTF-8, its other bytes escaped; None for any other value."""
        return self.encoded[5:].decode(errors="backslashreplace") if self.encoded[:1] == _TEXT else None

    @property
    def is_nested(self) -> bool:
        """Whether it is an array or a table, below so many others that it was not decoded."""
        return self.encoded[:1] in _NESTED_KINDS

    def __repr__(self) -> str:
        return f"RawFieldValue({self.encoded!r})"


def _decode(encoded: bytes, offset: int) -> tuple[Any, int]:
    kind = encoded[offset : offset + 1]
    payload_bytes = _PAYLOAD_BYTES.get(kind)
    if kind in _NESTED_KINDS and len(_open_levels) >= _MAX_LEVELS:
        payload_bytes = 4 + struct.unpack_from(">I", encoded, offset + 1)[0]
    if payload_bytes is not None:
        end = offset + 1 + payload_bytes
        return RawFieldValue(encoded[offset:end]), end
    _open_levels.append(offset)
    try:
        value, end = _decode_value(encoded, offset)
    finally:
        _open_levels.pop()
    is_undecoded_text = kind == _TEXT and isinstance(value, bytes)
    return RawFieldValue(encoded[offset:end]) if is_undecoded_text else value, end


def _encode(pieces: list[bytes], value: Any) -> int:
    if isinstance(value, RawFieldValue):
        pieces.append(value.encoded)
        return len(value.encoded)
    return _encode_value(pieces, value)


def preserve_raw_values() -> None:
    """Have pika keep such values as ``RawFieldValue``, in the whole process; called before each connection is made."""
    pika.data.decode_value = _decode
    pika.data.encode_value = _encode
