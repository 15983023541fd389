"""What is remembered of commands: the same promises in one process's memory and in a real Redis."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from schemas.reply import Reply, ReplyError
from tests.support.waiting import PATIENCE_S
from worker.core.claims import (
    Ambiguous,
    Assigned,
    Claim,
    Completed,
    IdempotencyStore,
    InProgress,
    Key,
    KeyReused,
    KnownNotSent,
    Lease,
    LookalikeInProgress,
    NoCandidate,
    Unresolved,
    Unseen,
)
from worker.core.doubt_window import DoubtWindow
from worker.core.envelope import Replay
from worker.dev.services.ports import wait_until
from worker.dev.services.redis import LocalRedis
from worker.errors import LeaseLost, StoreError, StoreUnavailable, UuidTaken
from worker.idempotency.memory import MemoryStore
from worker.idempotency.redis import RedisStore

NOW = datetime(2026, 8, 5, 12, tzinfo=UTC)
DOUBT = DoubtWindow(NOW, NOW + timedelta(seconds=13))
LONG_S, SHORT_S = 600, 0.2
U, U1, U2, V = (str(UUID(int=number)) for number in range(4))

Make = Callable[..., IdempotencyStore]


def key(command_id: str, content_hash: bytes = b"1" * 16, match_key: bytes = b"alike" * 3) -> Key:
    return Key(command_id, content_hash, match_key)


def reply(command_id: str, uuid: str | None = None) -> Reply:
    return Reply(
        command_id=command_id, status="accepted", uuid=uuid, imei="001234567890123", attempts=1, completed_at=NOW
    )


def failure(command_id: str, completed_at: datetime = NOW) -> Reply:
    error = ReplyError(code="outcome_unknown", message="nobody can tell")
    return Reply(command_id=command_id, status="failed", error=error, attempts=1, completed_at=completed_at)


def held(claim: Claim) -> Lease:
    assert isinstance(claim, Unseen | KnownNotSent | Unresolved)
    return claim.hold


def complete(store: IdempotencyStore, hold: Lease, told: Reply) -> None:
    """Record an outcome; raises what kept it from being recorded."""
    ends: list[StoreError | None] = []
    store.complete(hold, told, DOUBT, ends.append)
    [error] = ends  # nobody else is asking, so that it is over by now
    if error is not None:
        raise error


@pytest.fixture(params=["memory", "redis"])
def make(request: pytest.FixtureRequest) -> Iterator[Make]:
    """Makes stores; those on Redis share what they know, as the workers of a fleet do."""
    made: list[IdempotencyStore] = []
    url = request.getfixturevalue("redis_url") if request.param == "redis" else None
    namespace = uuid4().hex

    def build(lease_s: float = LONG_S, ttl_s: int = 60) -> IdempotencyStore:
        if url is None:
            store: IdempotencyStore = MemoryStore(ttl_s, lease_s, began_at=NOW)
        else:
            store = RedisStore(url, namespace, ttl_s=ttl_s, lease_s=lease_s, connections=16)
        made.append(store)
        return store

    yield build
    for store in made:
        store.close()


@pytest.fixture
def store(make: Make) -> IdempotencyStore:
    return make()


def when_lease_has_ended(store: IdempotencyStore, wanted: Key) -> Claim:
    """Claim again and again until nobody holds the command any more."""
    claims: list[Claim] = []

    def is_free() -> bool:
        claims.append(store.claim(wanted, NOW + timedelta(hours=1)))
        return not isinstance(claims[-1], InProgress)

    wait_until(is_free, PATIENCE_S, "the lease's end")
    return claims[-1]


def test_one_id_is_one_command(store: IdempotencyStore) -> None:
    first = store.claim(key("a"), NOW)
    assert isinstance(first, Unseen)
    assert store.claim(key("a"), NOW) == InProgress(NOW)
    assert isinstance(store.claim(key("b"), NOW), Unseen)
    store.release(first.hold, None)
    again = store.claim(key("a"), NOW)
    assert isinstance(again, KnownNotSent)
    complete(store, again.hold, reply("a", U))
    assert store.claim(key("a"), NOW) == Completed(reply("a", U))


def test_another_content_is_a_conflict_in_every_state(store: IdempotencyStore) -> None:
    other = key("a", content_hash=b"2" * 16)
    hold = held(store.claim(key("a"), NOW))
    assert store.claim(other, NOW) == KeyReused()
    store.release(hold, DOUBT)
    assert store.claim(other, NOW) == KeyReused()
    complete(store, held(store.claim(key("a"), NOW)), reply("a"))
    assert store.claim(other, NOW) == KeyReused()


def test_a_doubt_is_kept_as_it_was_left(store: IdempotencyStore) -> None:
    store.release(held(store.claim(key("a"), NOW)), DOUBT)
    claim = store.claim(key("a"), NOW)
    assert isinstance(claim, Unresolved)
    assert (claim.doubt, claim.holder_crashed) == (DOUBT, False)
    store.release(claim.hold, DoubtWindow(None, NOW), holder_crashed=True)
    claim = store.claim(key("a"), NOW)
    assert isinstance(claim, Unresolved)
    assert (claim.doubt, claim.holder_crashed) == (DoubtWindow(None, NOW), True)
    assert store.claim(key("a"), NOW) == InProgress(None)  # whoever is put off now has to be as careful
    store.release(claim.hold, None)
    assert isinstance(store.claim(key("a"), NOW), KnownNotSent)


def test_a_lease_that_ends_leaves_a_doubt(make: Make) -> None:
    """Its holder was killed, or its whole machine stopped: somebody else goes on, and does not send at once."""
    short = make(lease_s=SHORT_S)
    short.claim(key("a"), NOW)
    claim = when_lease_has_ended(short, key("a"))
    assert isinstance(claim, Unresolved)
    assert claim.holder_crashed
    assert claim.doubt == DoubtWindow(NOW, NOW + timedelta(seconds=SHORT_S))


def test_a_lease_that_ends_adds_to_the_doubt_that_was_there(make: Make) -> None:
    short = make(lease_s=SHORT_S)
    before = DoubtWindow(NOW - timedelta(hours=1), NOW - timedelta(minutes=59))
    short.release(held(short.claim(key("a"), NOW)), before)
    short.claim(key("a"), NOW)
    claim = when_lease_has_ended(short, key("a"))
    assert isinstance(claim, Unresolved)
    assert claim.doubt == DoubtWindow(before.since, NOW + timedelta(seconds=SHORT_S))


def test_what_a_former_holder_writes_late_is_refused(make: Make) -> None:
    """A fencing token: it may have been stopped for as long as you like, and knows nothing of what came after."""
    short = make(lease_s=SHORT_S)
    late = held(short.claim(key("a"), NOW))
    successor = when_lease_has_ended(short, key("a"))
    with pytest.raises(LeaseLost):
        complete(short, late, reply("a", "late"))
    with pytest.raises(LeaseLost):
        short.release(late, None)
    with pytest.raises(LeaseLost):
        short.own(late, [U], [])
    complete(short, held(successor), reply("a", U))
    with pytest.raises(LeaseLost):
        complete(short, late, reply("a", "late"))
    assert short.claim(key("a"), NOW) == Completed(reply("a", U))


def test_of_many_at_once_one_is_first(store: IdempotencyStore) -> None:
    with ThreadPoolExecutor(16) as threads:
        claims = list(threads.map(lambda _: store.claim(key("a"), NOW), range(200)))
    assert sum(isinstance(claim, Unseen) for claim in claims) == 1
    assert claims.count(InProgress(NOW)) == 199


def test_a_uuid_belongs_to_one_command(store: IdempotencyStore) -> None:
    """Its twin, alike in everything but the id, gets the other one, or none."""
    complete(store, held(store.claim(key("a"), NOW)), reply("a", U1))
    twin = held(store.claim(key("b"), NOW))
    assert store.own(twin, [U1], []) == NoCandidate()
    assert store.own(twin, [U1, U2], []) == Assigned(U2)
    complete(store, twin, reply("b", U2))
    assert store.own(held(store.claim(key("c"), NOW)), [U1, U2], []) == NoCandidate()


def test_a_uuid_once_chosen_stays_chosen(store: IdempotencyStore) -> None:
    """The worker may end between the choice and the record of it."""
    hold = held(store.claim(key("a"), NOW))
    assert store.own(hold, [U1], []) == Assigned(U1)
    store.release(hold, DOUBT)
    store.release(held(store.claim(key("b"), NOW)), DOUBT)
    hold = held(store.claim(key("a"), NOW))
    assert store.own(hold, [U2, U1], []) == Assigned(U1)


def test_twins_in_doubt_may_share_out_as_many_entries_as_they_are(store: IdempotencyStore) -> None:
    store.release(held(store.claim(key("b"), NOW)), DOUBT)
    first = held(store.claim(key("a"), NOW))
    assert store.own(first, [U1, U2], []) == Assigned(U1)
    complete(store, first, reply("a", U1))
    assert store.own(held(store.claim(key("b"), NOW)), [U1, U2], []) == Assigned(U2)


@pytest.mark.parametrize(("likely", "unlikely"), [([U1, U2], []), ([U1], [U2])])
def test_a_command_whose_entry_a_twin_may_have_been_given_is_not_known_to_be_absent(
    store: IdempotencyStore, likely: list[str], unlikely: list[str]
) -> None:
    """Its time fits one entry only, its twin's both: sent again, it would be cached twice."""
    store.release(held(store.claim(key("b"), NOW)), DOUBT)
    twin = held(store.claim(key("a"), NOW))
    assert store.own(twin, likely, unlikely) == Assigned(U1)
    complete(store, twin, reply("a", U1))
    assert store.owned_by_others(key("b"), [U1, U2]) == set()
    hold = held(store.claim(key("b"), NOW))
    assert store.own(hold, [U1], []) == Ambiguous()
    assert store.own(hold, [], []) == NoCandidate()


def test_a_guess_once_made_stays_one(store: IdempotencyStore) -> None:
    """The worker may end between the choice and the record of it, and by then there may be no other entry."""
    store.release(held(store.claim(key("b"), NOW)), DOUBT)
    hold = held(store.claim(key("a"), NOW))
    assert store.own(hold, [U1, U2], []) == Assigned(U1)
    assert store.own(hold, [U1], []) == Assigned(U1)
    complete(store, hold, reply("a", U1))
    assert store.own(held(store.claim(key("b"), NOW)), [U1], []) == Ambiguous()


def test_more_entries_than_commands_cannot_be_told_apart(store: IdempotencyStore) -> None:
    """One of them is a command's of which no record is left."""
    assert store.own(held(store.claim(key("a"), NOW)), [U1, U2], []) == Ambiguous()


def test_an_entry_that_only_clocks_far_apart_would_explain_decides_nothing(store: IdempotencyStore) -> None:
    hold = held(store.claim(key("a"), NOW))
    assert store.own(hold, [], [U1]) == Ambiguous()
    assert store.own(hold, [U2], [U1]) == Ambiguous()
    complete(store, held(store.claim(key("b"), NOW)), reply("b", U1))
    assert store.own(hold, [U2], [U1]) == Assigned(U2)


def test_nothing_is_chosen_while_a_twin_is_under_way(store: IdempotencyStore) -> None:
    """Its request may be the one that caused the entry, and its answer be about to come."""
    twin = held(store.claim(key("b"), NOW))
    hold = held(store.claim(key("a"), NOW))
    assert store.own(hold, [U], []) == LookalikeInProgress()
    complete(store, twin, reply("b", U))
    assert store.own(hold, [U], []) == NoCandidate()


def test_a_record_lasts_for_its_time(make: Make) -> None:
    brief = make(ttl_s=1)
    complete(brief, held(brief.claim(key("a"), NOW)), reply("a", U))
    assert brief.claim(key("a"), NOW) == Completed(reply("a", U))
    wait_until(lambda: not isinstance(brief.claim(key("a"), NOW), Completed), PATIENCE_S, "the record's end")


def test_a_replay_takes_back_the_failure_that_it_means_with_its_doubt(store: IdempotencyStore) -> None:
    complete(store, held(store.claim(key("a"), NOW)), failure("a", NOW + timedelta(microseconds=1_999)))
    meant = Replay(NOW + timedelta(milliseconds=1), DOUBT)
    assert isinstance(store.claim(key("a"), NOW), Completed)  # without an order it is the last word
    assert store.claim(key("a", content_hash=b"2" * 16), NOW, meant) == KeyReused()
    claim = store.claim(key("a"), NOW, meant)
    assert isinstance(claim, Unresolved)
    assert (claim.doubt, claim.holder_crashed) == (DOUBT, False)
    assert store.claim(key("a"), NOW, meant) == InProgress(DOUBT.since)  # whoever comes now learns of the doubt too
    store.release(claim.hold, None)
    assert isinstance(store.claim(key("a"), NOW), KnownNotSent)


def test_what_was_not_cached_is_replayed_without_a_doubt(store: IdempotencyStore) -> None:
    complete(store, held(store.claim(key("a"), NOW)), failure("a"))
    assert isinstance(store.claim(key("a"), NOW, Replay(NOW, None)), KnownNotSent)


def test_an_order_is_carried_out_once(store: IdempotencyStore) -> None:
    """It may be doubled, and its second copy come when the first has led to another failure."""
    later = NOW + timedelta(milliseconds=1)
    complete(store, held(store.claim(key("a"), NOW)), failure("a"))
    complete(store, held(store.claim(key("a"), NOW, Replay(NOW, None))), failure("a", later))
    assert store.claim(key("a"), NOW, Replay(NOW, None)) == Completed(failure("a", later))
    assert isinstance(store.claim(key("a"), NOW, Replay(later, None)), KnownNotSent)


def test_no_other_outcome_is_ever_taken_back(store: IdempotencyStore) -> None:
    complete(store, held(store.claim(key("a"), NOW)), reply("a", U))
    assert store.claim(key("a"), NOW, Replay(NOW, None)) == Completed(reply("a", U))
    complete(store, held(store.claim(key("b"), NOW)), failure("b"))
    complete(store, held(store.claim(key("b"), NOW, Replay(NOW, None))), reply("b", V))
    assert store.claim(key("b"), NOW, Replay(NOW, None)) == Completed(reply("b", V))


def test_a_replayed_command_is_a_twin_of_those_like_it_again(store: IdempotencyStore) -> None:
    complete(store, held(store.claim(key("a"), NOW)), failure("a"))
    replayed = held(store.claim(key("a"), NOW, Replay(NOW, DOUBT)))
    assert store.own(held(store.claim(key("b"), NOW)), [U], []) == LookalikeInProgress()
    store.release(replayed, DOUBT)


STANDARD = "0a1b2c3d-0000-4000-8000-00000000abcd"
OTHER_SPELLINGS = [
    STANDARD.upper(), STANDARD.replace("-", ""), STANDARD.replace("-", "").upper(), f"{{{STANDARD}}}",
    f"{{{STANDARD.upper()}}}", f" {STANDARD} ", "0A1b2c3d-0000-4000-8000-00000000abCD", f"urn:uuid:{STANDARD}",
]  # fmt: skip
FORMER_SPELLINGS = [STANDARD, *OTHER_SPELLINGS[:5]]  # of which a former version may have recorded an owner
SPELLINGS = [(STANDARD, shown) for shown in OTHER_SPELLINGS] + [(answered, STANDARD) for answered in OTHER_SPELLINGS]


@pytest.mark.parametrize(("answered", "shown"), SPELLINGS)
def test_a_uuid_that_the_history_writes_in_another_way_still_belongs_to_its_command(
    store: IdempotencyStore, answered: str, shown: str
) -> None:
    """Its twin in doubt would be told this uuid, and never be sent."""
    complete(store, held(store.claim(key("a"), NOW)), reply("a", answered))
    assert store.claim(key("a"), NOW) == Completed(reply("a", answered))  # as the platform gave it
    twin = held(store.claim(key("b"), NOW))
    assert store.owned_by_others(twin.key, [shown, U]) == {shown}
    assert store.own(twin, [shown], []) == NoCandidate()
    assert store.own(twin, [shown, U], []) == Assigned(U)
    with pytest.raises(UuidTaken):
        complete(store, twin, reply("b", shown))


@pytest.mark.parametrize(("chosen", "shown"), SPELLINGS)
def test_a_uuid_that_was_chosen_from_the_history_stays_chosen_however_it_is_written(
    store: IdempotencyStore, chosen: str, shown: str
) -> None:
    hold = held(store.claim(key("a"), NOW))
    assert store.own(hold, [chosen], []) == Assigned(chosen)
    store.release(hold, DOUBT)
    store.release(held(store.claim(key("b"), NOW)), DOUBT)
    hold = held(store.claim(key("a"), NOW))
    assert store.own(hold, [U, shown], []) == Assigned(shown)
    complete(store, hold, reply("a", shown))
    assert store.own(held(store.claim(key("b"), NOW)), [chosen], []) == NoCandidate()


@pytest.mark.parametrize(("chosen", "shown"), SPELLINGS)
def test_a_guess_stays_a_guess_however_the_uuid_is_written(store: IdempotencyStore, chosen: str, shown: str) -> None:
    store.release(held(store.claim(key("b"), NOW)), DOUBT)
    hold = held(store.claim(key("a"), NOW))
    assert store.own(hold, [chosen, U], []) == Assigned(chosen)
    complete(store, hold, reply("a", chosen))
    assert store.owned_by_others(key("b"), [shown]) == set()
    assert store.own(held(store.claim(key("b"), NOW)), [shown], []) == Ambiguous()


@pytest.mark.parametrize(
    ("answered", "shown"),
    [("Order-7x", "order-7x"), ("order-7x", "ORDER-7X"), ("ORDER-7X", "Order-7x"), ("a 7", "a7"), ("a7", "A 7")],
)
def test_a_difference_of_case_proves_nothing_in_a_uuid_of_another_form(
    store: IdempotencyStore, answered: str, shown: str
) -> None:
    """It may be the same or another: to say that it is the other command's could be to send this one twice."""
    complete(store, held(store.claim(key("a"), NOW)), reply("a", answered))
    twin = held(store.claim(key("b"), NOW))
    assert store.owned_by_others(twin.key, [answered, shown]) == {answered}
    assert store.own(twin, [answered], []) == NoCandidate()
    assert store.own(twin, [shown], []) == Ambiguous()


@pytest.mark.parametrize(
    "shown", ["order-8x", "order7x", STANDARD[:-1] + "e", STANDARD[:-1], STANDARD + "0", "{order-7x}"]
)
def test_another_uuid_belongs_to_nobody(store: IdempotencyStore, shown: str) -> None:
    complete(store, held(store.claim(key("a"), NOW)), reply("a", "order-7x"))
    complete(store, held(store.claim(key("c"), NOW)), reply("c", STANDARD))
    hold = held(store.claim(key("b"), NOW))
    assert store.owned_by_others(hold.key, [shown]) == set()
    assert store.own(hold, [shown], []) == Assigned(shown)


class TestMemory:
    """What only holds for one process."""

    def test_what_was_taken_and_not_sent_is_known_not_to_have_been_sent(self) -> None:
        store = MemoryStore(60, LONG_S, began_at=NOW)
        store.mark_not_sent(key("a"))
        again = store.claim(key("a"), NOW)
        assert isinstance(again, KnownNotSent)
        complete(store, again.hold, reply("a"))
        store.mark_not_sent(key("a"))
        assert store.claim(key("a"), NOW) == Completed(reply("a"))  # what is known is not forgotten for it

    def test_until_it_began_others_may_have_sent_what_it_knows_nothing_of(self) -> None:
        claim = MemoryStore(60, LONG_S, began_at=NOW).claim(key("a"), NOW + timedelta(hours=1))
        assert isinstance(claim, Unseen)
        assert claim.unrecorded_until == NOW

    def test_the_oldest_go_first_and_none_that_is_held(self) -> None:
        store = MemoryStore(60, LONG_S, began_at=NOW, max_others=3)
        hold = held(store.claim(key("held"), NOW))
        for command_id in ("a", "b", "c"):
            complete(store, held(store.claim(key(command_id), NOW)), failure(command_id))
        assert store.claim(key("held"), NOW) == InProgress(NOW)
        complete(store, hold, failure("held"))
        assert store.claim(key("c"), NOW) == Completed(failure("c"))

    def test_memory_does_not_grow_beyond_its_bound(self) -> None:
        store = MemoryStore(60, LONG_S, began_at=NOW, max_others=10)
        for number in range(1000):
            command_id = str(number)
            complete(store, held(store.claim(key(command_id), NOW)), failure(command_id))
        assert store.claim(key("990"), NOW) == Completed(failure("990"))
        assert isinstance(store.claim(key("0"), NOW), Unseen)

    def test_the_latest_accepted_commands_are_remembered(self) -> None:
        store = MemoryStore(60, LONG_S, began_at=NOW, max_accepted=10)
        keys = [Key(str(number), b"1" * 16, number.to_bytes(16, "big")) for number in range(1000)]
        for number, each in enumerate(keys):
            complete(store, held(store.claim(each, NOW)), reply(str(number), str(UUID(int=number))))
        for number in range(990, 1000):
            assert store.claim(keys[number], NOW) == Completed(reply(str(number), str(UUID(int=number))))
        assert isinstance(store.claim(keys[979], NOW), Unseen)

    @given(
        uuid=st.one_of(st.uuids().map(str), st.text(min_size=1)),
        imei=st.from_regex(r"[0-9]{15}", fullmatch=True),
        attempts=st.integers(1, 300),
        recovered=st.booleans(),
        omitted=st.booleans(),
        after_1970=st.timedeltas(timedelta(days=10_000), timedelta(days=50_000)),
    )
    def test_a_reply_is_repeated_to_the_letter(
        self, uuid: str, imei: str, attempts: int, recovered: bool, omitted: bool, after_1970: timedelta
    ) -> None:
        store = MemoryStore(60, LONG_S, began_at=NOW)
        told = Reply(
            command_id="a",
            status="accepted",
            uuid=uuid,
            imei=imei,
            attempts=attempts,
            recovered=recovered,
            valid_time_omitted=omitted,
            completed_at=datetime(1970, 1, 1, tzinfo=UTC) + after_1970,
        )
        complete(store, held(store.claim(key("a"), NOW)), told)
        found = store.claim(key("a"), NOW)
        assert isinstance(found, Completed)
        assert found.reply.model_dump_json() == told.model_dump_json()

    def test_a_command_that_was_accepted_is_not_noted_as_unsent(self) -> None:
        store = MemoryStore(60, LONG_S, began_at=NOW)
        complete(store, held(store.claim(key("a"), NOW)), reply("a", U))
        assert store.is_claimed_here(key("a"))
        store.mark_not_sent(key("a"))
        assert store.claim(key("a"), NOW) == Completed(reply("a", U))

    def test_an_accepted_command_is_forgotten_when_its_time_is_over(self) -> None:
        now = 0.0
        store = MemoryStore(60, LONG_S, began_at=NOW, clock=lambda: now)
        complete(store, held(store.claim(key("a"), NOW)), reply("a", U))
        now = 61.0
        assert isinstance(store.claim(key("a"), NOW), Unseen)

    @pytest.mark.parametrize("is_twin_first", [False, True])
    def test_whose_a_uuid_is_outlasts_the_ledger_where_twins_may_ask(self, is_twin_first: bool) -> None:
        """Else a command in doubt would be told the uuid of one just like it, and never be sent."""
        store = MemoryStore(60, LONG_S, began_at=NOW, max_accepted=10)

        def accept_the_twin() -> None:
            complete(store, held(store.claim(key("twin"), NOW)), reply("twin", U))

        if is_twin_first:
            accept_the_twin()
        store.release(held(store.claim(key("a"), NOW)), DOUBT)
        if not is_twin_first:
            accept_the_twin()
        for number in range(1, 100):
            other = Key(str(number), b"1" * 16, number.to_bytes(16, "big"))
            complete(store, held(store.claim(other, NOW)), reply(str(number), str(UUID(int=number))))
        hold = held(store.claim(key("a"), NOW))
        assert store.owned_by_others(hold.key, [U]) == {U}
        assert store.own(hold, [U], []) == NoCandidate()

    def test_a_doubt_that_is_forgotten_for_want_of_room_is_still_a_doubt(self) -> None:
        store = MemoryStore(60, LONG_S, began_at=NOW, max_others=1)
        store.release(held(store.claim(key("a"), NOW)), DOUBT)
        later = NOW + timedelta(hours=1)
        twin = held(store.claim(key("b"), later))
        assert store.own(twin, [U], []) == Assigned(U)  # and it is no twin any more
        complete(store, twin, reply("b", U))
        claim = store.claim(key("a"), later)
        assert isinstance(claim, Unseen)
        assert claim.unrecorded_until == later


class TestRedis:
    """What only holds for what the fleet shares."""

    @pytest.mark.parametrize(
        ("recorded", "shown", "is_certain"),
        [(answered, shown, True) for answered, shown in SPELLINGS if answered in FORMER_SPELLINGS]
        + [("0A1b" + STANDARD[4:], "0A1b" + STANDARD[4:], True), ("ORDER-7X", "order-7x", False)],
    )
    def test_an_owner_that_a_former_version_recorded_is_still_known(
        self, redis_url: str, recorded: str, shown: str, is_certain: bool
    ) -> None:
        """It recorded a uuid under the text that the platform gave, and no other."""
        namespace = uuid4().hex
        store = RedisStore(redis_url, namespace, ttl_s=60, lease_s=9, connections=1)
        with redis.Redis.from_url(redis_url) as raw:
            raw.set(f"{{{namespace}}}:uuid:{recorded}", "a", ex=60)
        twin = held(store.claim(key("b"), NOW))
        assert store.owned_by_others(twin.key, [shown]) == ({shown} if is_certain else set())
        assert store.own(twin, [shown], []) == (NoCandidate() if is_certain else Ambiguous())
        with pytest.raises(UuidTaken):
            complete(store, twin, reply("b", shown))
        owner = held(store.claim(key("a"), NOW))
        assert store.own(owner, [shown], []) == Assigned(shown)
        complete(store, owner, reply("a", shown))
        store.close()

    def test_a_former_version_finds_an_owner_under_the_text_that_the_platform_gave(self, redis_url: str) -> None:
        """Both versions run while a fleet is updated."""
        namespace = uuid4().hex
        store = RedisStore(redis_url, namespace, ttl_s=60, lease_s=9, connections=1)
        for command_id, answered in (("a", STANDARD.upper()), ("b", "Order-7x")):
            complete(store, held(store.claim(key(command_id), NOW)), reply(command_id, answered))
            with redis.Redis.from_url(redis_url, decode_responses=True) as raw:
                assert raw.get(f"{{{namespace}}}:uuid:{answered}") == command_id
        store.close()

    def test_what_one_worker_records_every_worker_knows(self, redis_url: str) -> None:
        namespace = uuid4().hex
        one, other = (RedisStore(redis_url, namespace, ttl_s=60, lease_s=9, connections=1) for _ in range(2))
        hold = held(one.claim(key("a"), NOW))
        assert other.claim(key("a"), NOW) == InProgress(NOW)
        complete(one, hold, reply("a", U))
        assert other.claim(key("a"), NOW) == Completed(reply("a", U))
        one.close()
        other.close()

    def test_that_nobody_claimed_it_is_no_proof(self, redis_url: str) -> None:
        """Redis may have lost its last writes, whoever has written to it since."""
        namespace = uuid4().hex
        one, other = (RedisStore(redis_url, namespace, ttl_s=60, lease_s=9, connections=1) for _ in range(2))
        claims = [store.claim(key(command_id), NOW) for store, command_id in ((one, "a"), (other, "b"))]
        assert [claim.unrecorded_until for claim in claims if isinstance(claim, Unseen)] == [NOW, NOW]
        one.close()
        other.close()

    def test_a_redis_that_is_away_is_said_and_one_that_came_back_empty_proves_nothing(
        self, own_redis: LocalRedis
    ) -> None:
        namespace = uuid4().hex
        founder = RedisStore(own_redis.url, namespace, ttl_s=60, lease_s=9, connections=1)
        founder.claim(key("a"), NOW)
        store = RedisStore(own_redis.url, namespace, ttl_s=60, lease_s=9, connections=1)
        hold = held(store.claim(key("b"), NOW))
        own_redis.kill()
        for change in (lambda: store.claim(key("c"), NOW), lambda: complete(store, hold, reply("b"))):
            with pytest.raises(StoreUnavailable):
                change()
        own_redis.start()
        claim = store.claim(key("a"), NOW)
        assert isinstance(claim, Unseen)
        assert claim.unrecorded_until == NOW
        with pytest.raises(LeaseLost):
            complete(store, hold, reply("b"))
        founder.close()
        store.close()

    def test_the_key_of_another_namespace_is_another_command(self, redis_url: str) -> None:
        for _ in range(2):
            store = RedisStore(redis_url, uuid4().hex, ttl_s=60, lease_s=9, connections=1)
            assert isinstance(store.claim(key("a"), NOW), Unseen)
            store.close()
