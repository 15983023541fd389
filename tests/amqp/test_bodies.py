"""Bodies that are too large to be held."""

from pika import BasicProperties, frame, spec
from pika.channel import ContentFrameAssembler

from schemas.command import MAX_BODY_BYTES
from worker.amqp.bodies import BoundedAssembler, TruncatedBody

METHOD: "frame.Method[spec.Basic.Deliver]" = frame.Method(1, spec.Basic.Deliver("tag", 1, False, "", ""))


def bounded() -> BoundedAssembler:
    return BoundedAssembler(ContentFrameAssembler(), lambda: 3 * MAX_BODY_BYTES)


def received(assembler: BoundedAssembler, body: bytes, fragment_bytes: int = 100_000) -> bytes:
    """Return the body that the assembler makes of one that comes in fragments."""
    assert assembler.process(METHOD) is None
    header = frame.Header(1, len(body), BasicProperties(app_id="billing"))
    assert assembler.process(header) is None
    for start in range(0, len(body), fragment_bytes):
        found = assembler.process(frame.Body(1, body[start : start + fragment_bytes]))
        assert (found is not None) == (start + fragment_bytes >= len(body))
    method, found_header, found_body = found
    assert (method, found_header) == (METHOD, header)
    return bytes(found_body) if type(found_body) is bytes else found_body


def test_only_the_beginning_of_a_body_above_the_limit_is_kept() -> None:
    assembler = bounded()
    large = bytes(range(256)) * 4096
    for _ in range(2):
        kept = received(assembler, large)
        assert isinstance(kept, TruncatedBody)
        assert MAX_BODY_BYTES < len(kept) < 3 * MAX_BODY_BYTES
        assert large.startswith(kept)
        assert received(assembler, b"{}") == b"{}"


def test_a_body_at_the_limit_is_kept_whole() -> None:
    body = b"x" * 3 * MAX_BODY_BYTES
    kept = received(bounded(), body)
    assert not isinstance(kept, TruncatedBody)
    assert kept == body


def test_the_limit_is_asked_for_when_more_of_a_body_has_arrived_than_comes_with_the_message_before() -> None:
    """Its header is read before the message before is settled, and before that there is no room for another."""
    room = 0
    assembler = BoundedAssembler(ContentFrameAssembler(), lambda: room)
    body = b"x" * 3 * MAX_BODY_BYTES
    assembler.process(METHOD)
    assembler.process(frame.Header(1, len(body), BasicProperties()))
    assert assembler.process(frame.Body(1, body[:8_000])) is None
    room = len(body)
    _, _, whole = assembler.process(frame.Body(1, body[8_000:]))
    assert type(whole) is bytes
    assert whole == body
