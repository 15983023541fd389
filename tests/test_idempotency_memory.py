"""What one process remembers."""

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

from schemas.reply import Reply
from worker.idempotency import Again, Busy, Conflict, Done, First
from worker.idempotency.memory import MemoryStore

REPLY = Reply(command_id="a", status="accepted", uuid="u", attempts=1, completed_at=datetime(2026, 8, 5, tzinfo=UTC))


def test_one_id_is_one_command() -> None:
    store = MemoryStore(ttl_s=60)
    assert store.claim("a", b"1") == First()
    assert store.claim("a", b"1") == Busy()
    assert store.claim("b", b"1") == First()
    store.release("a")
    assert store.claim("a", b"1") == Again()
    store.complete("a", REPLY)
    assert store.claim("a", b"1") == Done(REPLY)


def test_another_content_is_a_conflict_in_every_state() -> None:
    store = MemoryStore(ttl_s=60)
    store.claim("a", b"1")
    assert store.claim("a", b"2") == Conflict()
    store.release("a")
    assert store.claim("a", b"2") == Conflict()
    store.claim("a", b"1")
    store.complete("a", REPLY)
    assert store.claim("a", b"2") == Conflict()


def test_what_was_taken_and_not_sent_is_known_not_to_have_been_sent() -> None:
    store = MemoryStore(ttl_s=60)
    store.note_unsent("a", b"1")
    assert store.claim("a", b"1") == Again()
    store.complete("a", REPLY)
    store.note_unsent("a", b"1")
    assert store.claim("a", b"1") == Done(REPLY)  # what is known is not forgotten for it


def test_a_record_lasts_for_its_time_and_one_that_is_held_lasts_longer() -> None:
    now = [0.0]
    store = MemoryStore(ttl_s=60, clock=lambda: now[0])
    store.claim("done", b"1")
    store.complete("done", REPLY)
    store.claim("held", b"1")
    now[0] = 59
    assert store.claim("done", b"1") == Done(REPLY)
    now[0] = 60
    assert store.claim("done", b"1") == First()
    assert store.claim("held", b"1") == Busy()


def test_the_oldest_go_first_and_none_that_is_held() -> None:
    store = MemoryStore(ttl_s=60, max_records=3)
    store.claim("held", b"1")
    for command_id in ("a", "b", "c"):
        store.claim(command_id, b"1")
        store.complete(command_id, REPLY)
    assert store.claim("held", b"1") == Busy()
    store.complete("held", REPLY)
    assert store.claim("c", b"1") == Done(REPLY)


def test_memory_does_not_grow_beyond_its_bound() -> None:
    store = MemoryStore(ttl_s=60, max_records=10)
    for number in range(1000):
        store.claim(str(number), b"1")
        store.complete(str(number), REPLY)
    assert [store.claim(str(number), b"1") for number in (999, 990)] == [Done(REPLY)] * 2
    assert store.claim("0", b"1") == First()


def test_of_many_at_once_one_is_first() -> None:
    store = MemoryStore(ttl_s=60)
    with ThreadPoolExecutor(16) as threads:
        claims = list(threads.map(lambda _: store.claim("a", b"1"), range(200)))
    assert claims.count(First()) == 1
    assert claims.count(Busy()) == 199
