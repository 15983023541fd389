"""Header tables, without a broker: what one delivers can be decoded, published again, shown, and is carried along."""

import json
import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

from pika import BasicProperties
from pika.frame import Header

from schemas.reply import Detail, Reply, ReplyError
from tests.fuzz.amqp_tables import INTEGERS, MAX_LEVELS, Read, encoded_properties, end_of_value, fields_of, read
from tests.fuzz.mutation import mutated
from tests.fuzz.target import Check, Servers, Target
from worker.amqp.field_table import preserve_raw_values
from worker.amqp.messages import Delivery, MessageBuilder, Publication, fitted, plain
from worker.amqp.suspects import Suspects
from worker.amqp.topology import Topology
from worker.core.doubt import doubt_of_copy
from worker.core.doubt_window import DoubtWindow
from worker.core.outcome import Failed
from worker.core.resolution import AwaitReconciliation, Conclude, Duplicate, Postpone, Resolution, Retry
from worker.dead_letters.letter import DeadLetter
from worker.dead_letters.view import details

NOW = datetime(2026, 8, 5, tzinfo=UTC)
ZONE = ZoneInfo("Asia/Shanghai")
BODY = b'{"command_id":"a"}'
DOUBT = DoubtWindow(NOW, NOW + timedelta(seconds=2))
MESSAGES = MessageBuilder(Topology("onenet", (5, 60)), "host:1")
FRAMES = (4_096, 131_072)
_WAYS = ((False, False), (True, False), (False, True))  # from upstream, as a copy, moved by an operator
_MAX_BYTES = 131_072 - 20  # of the properties of a message that a broker delivers
_MAX_NESTED = 1_000  # arrays and tables in a header that is copied
_NOT_COPIED = (b"x-death", b"x-first-death-", b"x-last-death-", b"x-delivery-count", b"x-onenet-")
_ROUTING = {b"cc", b"bcc"}
_FAILURE = Reply(
    command_id="a",
    status="failed",
    error=ReplyError(
        code="invalid_command", message="é" * 3_000, details=(Detail(field="f", message="y" * 1_000),) * 9
    ),
    attempts=1,
    completed_at=NOW,
)
_ACCEPTED = Reply(command_id="a", status="accepted", uuid="u", attempts=1, completed_at=NOW)
_COPIES: tuple[Resolution, ...] = (
    Retry(5, 2, "", DOUBT),
    AwaitReconciliation(60, 1, "", DOUBT, is_free=True, crash_count=3),
    Postpone(5, 1, "", None),
)
_OUTCOMES: tuple[Resolution, ...] = (Duplicate(_ACCEPTED), Conclude(Failed("invalid_command", ""), _FAILURE))


@contextmanager
def _open(_servers: Servers) -> Iterator[Check]:
    preserve_raw_values()
    yield _check


def _check(data: bytes) -> None:
    found = read(data)
    if found is None or len(data) > _MAX_BYTES:
        return  # the broker refuses it where it is published
    is_returned, is_moved = _WAYS[zlib.crc32(data) % len(_WAYS)]
    delivery = Delivery(1, 1, True, _decoded(data), BODY, is_returned, NOW.timestamp(), is_moved)
    envelope = delivery.envelope
    assert is_returned or (envelope.attempt, envelope.replay, envelope.crash_count) == (1, None, None)
    assert is_returned or is_moved or envelope.doubt is None
    Suspects().note(delivery)
    copies = [MESSAGES.publications(delivery, resolution)[0] for resolution in _COPIES]
    doubt = doubt_of_copy(envelope.doubt, envelope, NOW)
    copies += [MESSAGES.republish(delivery, doubt, is_stopping=is_stopping) for is_stopping in (False, True)]
    outcomes = [each for resolution in _OUTCOMES for each in MESSAGES.publications(delivery, resolution)]
    for publication in (*copies, *outcomes):
        _check_publication(publication)
        _check_publication(plain(publication))
    for copy in (*copies, outcomes[-1]):
        _check_carried_along(found, copy)
    _check_dead_letter(delivery, outcomes[-1])


def _decoded(data: bytes) -> BasicProperties:
    found = BasicProperties()
    found.decode(data)
    return found


def _encoded(found: BasicProperties) -> bytes:
    return b"".join(found.encode())


def _check_publication(publication: Publication) -> None:
    """A frame of it fits the connection, the broker can read it, and it routes nothing elsewhere."""
    assert len(publication.routing_key.encode()) <= 255
    for frame_max in FRAMES:
        sent = fitted(publication, frame_max)
        assert len(Header(1, len(sent.body), sent.properties).marshal()) <= frame_max
        again = read(_encoded(sent.properties))
        assert again is not None
        assert not any(name.strip().lower() in _ROUTING for name, _ in again.fields)


def _check_carried_along(original: Read, copy: Publication) -> None:
    """Each foreign header has the value that it had, or is nested too deeply; of two with one name, the last."""
    foreign = {
        name: value
        for name, value in original.fields
        if not name.startswith(_NOT_COPIED) and _text(name).strip().casefold() not in {"cc", "bcc"}
    }
    wanted = {name: _value(value) for name, value in foreign.items() if not _is_deep(value)}
    copied = read(_encoded(copy.properties))
    assert copied is not None
    assert any(name == b"x-onenet-headers-dropped" for name, _ in copied.fields) == (len(wanted) < len(foreign))
    found = {name: _value(value) for name, value in copied.fields if not name.startswith(b"x-onenet-")}
    assert found == wanted
    for name in original.values.keys() - {"headers", "delivery_mode", "expiration", "user_id"}:
        assert copied.values.get(name) == original.values[name], name


def _is_deep(encoded: bytes) -> bool:
    return encoded[:1] in {b"A", b"F"} and len(re.findall(rb"[AF]\0", encoded)) > _MAX_NESTED


def _text(name: bytes) -> str:
    return name.decode("utf-8", "replace")


def _value(encoded: bytes) -> object:
    """Return what an encoded value says: an integer says its number, however wide it is."""
    return _read_value(encoded, 0)[0]


def _read_value(data: bytes, at: int, levels: int = MAX_LEVELS) -> tuple[object, int]:
    end = end_of_value(data, at, levels)
    kind, payload = data[at : at + 1], data[at + 1 : end]
    if kind in INTEGERS:
        return struct.unpack(INTEGERS[kind], payload)[0], end
    if kind == b"t":
        return (kind, any(payload)), end
    if kind == b"F" and levels:
        return {name: _read_value(value, 0, levels - 1)[0] for name, value in fields_of(payload[4:], levels - 1)}, end
    if kind != b"A" or not levels:
        return (kind, payload), end
    items, inner = [], 4
    while inner < len(payload):
        item, inner = _read_value(payload, inner, levels - 1)
        items.append(item)
    return items, end


def _check_dead_letter(delivery: Delivery, publication: Publication) -> None:
    """The command line can list, show and replay it, no matter who published it."""
    for properties in (delivery.properties, _decoded(_encoded(publication.properties))):
        letter = DeadLetter(1, publication.routing_key, properties, BODY, ZONE)
        assert json.dumps(details(letter, NOW), allow_nan=False).encode()
        assert (len(letter.fingerprint), len(letter.digest)) == (64, 32)
        _check_publication(MESSAGES.replay(replace(letter.delivery(), is_returned=False), letter.replay(NOW)))
        _check_publication(MESSAGES.replay(letter.delivery(), letter.replay(NOW)))


INPUTS = mutated(encoded_properties(), [b"A", b"F", b"S", b"T", b"\xff", b"\0\0\0\0"], most=2)
TARGET = Target("tables", INPUTS, _open, neighbours=5)
