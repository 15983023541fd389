"""AMQP properties as bytes: generators of valid and broken ones, and a strict reader that knows no library.

Source: https://www.rabbitmq.com/amqp-0-9-1-errata#section_3, which has the kinds of field values of RabbitMQ.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

# The properties in the order of their flags, from the highest bit down.
PROPERTIES = (
    "content_type", "content_encoding", "headers", "delivery_mode", "priority", "correlation_id", "reply_to",
    "expiration", "message_id", "timestamp", "type", "user_id", "app_id", "cluster_id",
)  # fmt: skip
_BYTES = {"delivery_mode": 1, "priority": 1, "timestamp": 8}  # of those that are no short strings
_FIXED = {
    b"t": 1, b"b": 1, b"B": 1, b"s": 2, b"u": 2, b"I": 4, b"i": 4, b"l": 8, b"L": 8, b"f": 4, b"d": 8, b"D": 5, b"T": 8,
    b"V": 0,
}  # fmt: skip
INTEGERS = {b"b": ">b", b"B": ">B", b"s": ">h", b"u": ">H", b"I": ">i", b"i": ">I", b"l": ">q", b"L": ">q"}
_SIZED = (b"S", b"x", b"A", b"F")
MAX_LEVELS = 20


def short(text: bytes) -> bytes:
    """Encode a short string; its length is cut to what the length byte can say."""
    return bytes([min(len(text), 255)]) + text[:255]


def long(data: bytes) -> bytes:
    """Encode data with a length of four bytes."""
    return struct.pack(">I", len(data)) + data


def table(fields: Sequence[tuple[bytes, bytes]]) -> bytes:
    """Encode a table of names and encoded values."""
    return long(b"".join(short(name) + value for name, value in fields))


def nested(levels: int, kind: bytes, value: bytes) -> bytes:
    """Return a value within arrays or tables, one within the other."""
    for _ in range(levels):
        value = kind + (long(value) if kind == b"A" else table([(b"n", value)]))
    return value


def properties(given: dict[str, bytes]) -> bytes:
    """Encode the properties of a content header, flags first; the values are encoded already."""
    flags = sum(1 << (15 - number) for number, name in enumerate(PROPERTIES) if name in given)
    return struct.pack(">H", flags) + b"".join(given[name] for name in PROPERTIES if name in given)


@dataclass(frozen=True)
class Read:
    """Properties as a strict reader finds them. ``fields``: the headers' names and encoded values, in their order."""

    values: dict[str, bytes] = field(default_factory=dict)
    fields: tuple[tuple[bytes, bytes], ...] = ()


def read(data: bytes) -> Read | None:
    """Read encoded properties; None: a length or a kind is wrong, so that no broker delivers them."""
    try:
        return _read(data)
    except (IndexError, struct.error, ValueError):
        return None


def _read(data: bytes) -> Read:
    (flags,) = struct.unpack_from(">H", data)
    if flags & 3:
        raise ValueError("more flags follow, of properties that do not exist")
    values: dict[str, bytes] = {}
    at = 2
    for number, name in enumerate(PROPERTIES):
        if flags >> (15 - number) & 1:
            if name == "headers":
                end = at + 4 + struct.unpack_from(">I", data, at)[0]
            else:
                end = at + _BYTES[name] if name in _BYTES else at + 1 + data[at]
            values[name] = _slice(data, at, end)
            at = end
    if at != len(data):
        raise ValueError("bytes follow")
    return Read(values, tuple(fields_of(values["headers"][4:])) if "headers" in values else ())


def fields_of(data: bytes, levels: int = MAX_LEVELS) -> list[tuple[bytes, bytes]]:
    """Return the names and the encoded values of a table's content."""
    found, at = [], 0
    while at < len(data):
        name = _slice(data, at + 1, at + 1 + data[at])
        at += 1 + len(name)
        end = end_of_value(data, at, levels)
        found.append((name, data[at:end]))
        at = end
    return found


def end_of_value(data: bytes, at: int, levels: int = MAX_LEVELS) -> int:
    """Return where the value ends that begins at a position. More deeply nested values are not looked into."""
    kind = data[at : at + 1]
    if kind in _FIXED:
        end = at + 1 + _FIXED[kind]
        _slice(data, at, end)
        if kind in {b"f", b"d"} and not _is_finite(data[at + 1 : end]):
            raise ValueError("Erlang has no infinity")
        return end
    if kind not in _SIZED:
        raise ValueError("an unknown kind")
    end = at + 5 + int.from_bytes(_slice(data, at + 1, at + 5))
    content = _slice(data, at + 5, end)
    if kind == b"F" and levels:
        fields_of(content, levels - 1)
    elif kind == b"A" and levels:
        inner = 0
        while inner < len(content):
            inner = end_of_value(content, inner, levels - 1)
    return end


def _is_finite(data: bytes) -> bool:
    exponent = 0x7F80 if len(data) == 4 else 0x7FF0
    return int.from_bytes(data[:2]) & exponent != exponent


def _slice(data: bytes, start: int, end: int) -> bytes:
    if end > len(data):
        raise ValueError("the data ends early")
    return data[start:end]


_NAMES = (
    b"CC", b"BCC", b"cc", b" Bcc", b"x-death", b"x-first-death-queue", b"x-last-death-reason", b"x-delivery-count",
    b"x-delay", b"x-match", b"traceparent", b"tracestate", b"tenant", b"", b"\xff", b"\xed\xa0\x80", b"n\0", b"k" * 255,
    b"x-onenet-attempt", b"x-onenet-in-doubt", b"x-onenet-replay", b"x-onenet-delay", b"x-onenet-crash-count",
    b"x-onenet-first-arrived", b"x-onenet-unstarted", b"x-onenet-cc", b"x-onenet-probe", b"x-onenet-reason",
)  # fmt: skip
_TEXTS = (
    b"", b"a", b"execute", b"\xff\xfe", b"\xed\xa0\x80", b"\0", b"2026-08-05T12:00:00.000+00:00", b"1/2", b"x" * 300,
    b"00-" + b"a" * 32 + b"-" + b"b" * 16 + b"-01", b"\xe5\xbc\x80", b"expired", b"9" * 5_000,
)  # fmt: skip
_texts = st.sampled_from(_TEXTS) | st.binary(max_size=12)
_numbers = st.sampled_from([0, 1, -1, 2**31 - 1, 2**31, 2**53, 2**63 - 1, -(2**63), 1_786_176_000, 1_786_176_000_000])


@st.composite
def _scalars(draw: DrawFn) -> bytes:
    kind = draw(st.sampled_from([*_FIXED, b"S", b"S", b"x"]))
    if kind in {b"S", b"x"}:
        return kind + long(draw(_texts))
    size = _FIXED[kind]
    return (
        kind + (draw(_numbers) % 256**size).to_bytes(size)
        if draw(st.booleans())
        else kind + draw(st.binary(min_size=size, max_size=size))
    )


_values = st.recursive(
    _scalars(),
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda items: b"A" + long(b"".join(items)))
        | st.lists(st.tuples(st.sampled_from(_NAMES), inner), max_size=3).map(lambda items: b"F" + table(items))
    ),
    max_leaves=5,
) | st.builds(nested, st.sampled_from([19, 20, 21, 300, 3_000]), st.sampled_from([b"A", b"F"]), _scalars())
_fields_of_headers = st.lists(st.tuples(st.sampled_from(_NAMES) | st.binary(max_size=6), _values), max_size=5)


@st.composite
def _large(draw: DrawFn) -> list[tuple[bytes, bytes]]:
    """Return fields that need up to a whole frame, and a little more."""
    fields = draw(_fields_of_headers)
    names = draw(st.sampled_from([1, 50]))
    size = draw(st.sampled_from([3_900, 60_000, 122_000, 130_900])) // names
    return [*fields, *((b"h%d" % number, b"S" + long(b"x" * size)) for number in range(names))]


_HEADERS = (_fields_of_headers | _fields_of_headers | _fields_of_headers | _large()).map(table)
_PROPERTY_VALUES: dict[str, SearchStrategy[bytes]] = {
    name: st.binary(min_size=_BYTES[name], max_size=_BYTES[name])
    if name in _BYTES
    else (st.sampled_from([b"", b"a", b"0", b"guest", b"\xff", b"n" * 255]) | st.binary(max_size=8)).map(short)
    for name in PROPERTIES
    if name != "headers"
}


@st.composite
def encoded_properties(draw: DrawFn) -> bytes:
    """Return the properties of one message: headers and a few others."""
    given = {"headers": draw(_HEADERS)}
    for name in draw(st.lists(st.sampled_from([*_PROPERTY_VALUES]), max_size=2, unique=True)):
        given[name] = draw(_PROPERTY_VALUES[name])
    return properties(given)
