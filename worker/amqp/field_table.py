"""Header values that pika cannot decode and encode without loss are kept as the bytes in which they arrived.

Pika decodes a timestamp to a datetime and closes the connection over one in milliseconds, as it does over a table with
a thousand levels: a single odd message would cut the consumer again and again. It also truncates a float to an integer,
and encodes a text that is not UTF-8 as an array of bytes. An array or a table in a message's headers may take thirty
times its bytes once it is decoded, and is read by nobody but the sender's receivers. Pika has no hook for any of this,
so its functions are wrapped; they still decode and encode all other values.
"""

import struct
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pika.data
from pika import BasicProperties

_PAYLOAD_BYTES = {b"T": 8, b"f": 4, b"d": 8, b"D": 5}  # timestamp, float, double, decimal
_TEXT = b"S"  # a length of four bytes, then the text
_NESTED_KINDS = (b"A", b"F")  # array, table: a length of four bytes, then the payload
_MAX_LEVELS = 20  # more deeply nested values stay encoded
_MAX_NESTED = 1_000  # arrays and tables in a value that the broker can read in no time, however they are nested
_decode_value = pika.data.decode_value
_encode_value = pika.data.encode_value
_decode_properties = BasicProperties.decode


@dataclass
class _Nesting:
    """How deeply the value is nested that is being decoded, and from which depth on arrays and tables stay encoded."""

    depth: int = 0
    limit: int = _MAX_LEVELS


_nesting = _Nesting()


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
        """Whether it is an array or a table."""
        return self.encoded[:1] in _NESTED_KINDS

    @property
    def is_deep(self) -> bool:
        """Whether its arrays and tables are so many that, one within the other, the broker would need long for them."""
        # Behind the kind comes a length of four bytes, which is far below 16 MiB: the first one is 0.
        return self.is_nested and self.encoded.count(b"A\0") + self.encoded.count(b"F\0") > _MAX_NESTED

    def __repr__(self) -> str:
        return f"RawFieldValue({self.encoded!r})"


def _decode(encoded: bytes, offset: int) -> tuple[Any, int]:
    kind = encoded[offset : offset + 1]
    payload_bytes = _PAYLOAD_BYTES.get(kind)
    if kind in _NESTED_KINDS and _nesting.depth >= _nesting.limit:
        payload_bytes = 4 + struct.unpack_from(">I", encoded, offset + 1)[0]
    if payload_bytes is not None:
        end = offset + 1 + payload_bytes
        return RawFieldValue(encoded[offset:end]), end
    _nesting.depth += 1
    try:
        value, end = _decode_value(encoded, offset)
    finally:
        _nesting.depth -= 1
    is_undecoded_text = kind == _TEXT and isinstance(value, bytes)
    return RawFieldValue(encoded[offset:end]) if is_undecoded_text else value, end


def _encode(pieces: list[bytes], value: Any) -> int:
    if isinstance(value, RawFieldValue):
        pieces.append(value.encoded)
        return len(value.encoded)
    return _encode_value(pieces, value)


def _decode_of_message(properties: BasicProperties, encoded: bytes, offset: int = 0) -> BasicProperties:
    _nesting.limit = 0
    try:
        return _decode_properties(properties, encoded, offset)
    finally:
        _nesting.limit = _MAX_LEVELS


def decoded(value: object) -> Any:
    """Return a header's value; an array or a table is decoded, as far as it is not nested too deeply."""
    return _decode(value.encoded, 0)[0] if isinstance(value, RawFieldValue) and value.is_nested else value


def preserve_raw_values() -> None:
    """Have pika keep such values as ``RawFieldValue``, in the whole process; called before each connection is made."""
    pika.data.decode_value = _decode
    pika.data.encode_value = _encode
    BasicProperties.decode = _decode_of_message  # type: ignore[method-assign, assignment]
