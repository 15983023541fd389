"""The promises of the idempotency stores, for one process's memory and for a real Redis."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from schemas.reply import Reply
from schemas.result import Result, ResultKind
from tests.support.memory import retained_by
from tests.support.stores import (
    DOUBT,
    LONG_S,
    NOW,
    SHORT_S,
    U1,
    U2,
    U,
    V,
    assign,
    complete,
    failure,
    held,
    key,
    recover,
    rejection,
    reply,
    until,
)
from worker.core.claims import (
    Claim,
    Completed,
    IdempotencyStore,
    InProgress,
    Key,
    KeyReused,
    KnownNotSent,
    Loss,
    Unresolved,
    Unseen,
)
from worker.core.command import CONTENT_FIELDS, FIELD_DIGESTS_BYTES
from worker.core.doubt_window import DoubtWindow
from worker.core.envelope import Replay
from worker.core.ownership import Ambiguous, Assigned, LookalikeInProgress, NoCandidate, Owner
from worker.dev.services.redis import LocalRedis
from worker.errors import LeaseLost, SettingsError, StoreUnavailable, UuidTaken
from worker.idempotency import open_store
from worker.idempotency.memory import MemoryStore
from worker.idempotency.redis import RedisStore

Make = Callable[..., IdempotencyStore]


@pytest.fixture(params=["memory", "redis"])
async def make(request: pytest.FixtureRequest) -> AsyncIterator[Make]:
    """Makes stores; those on Redis share their records, as the workers of a fleet do."""
    made: list[IdempotencyStore] = []
    url = request.getfixturevalue("redis_url") if request.param == "redis" else None
    namespace = uuid4().hex

    def build(lease_s: float = LONG_S, ttl_s: int = 60) -> IdempotencyStore:
        if url is None:
            store: IdempotencyStore = MemoryStore(ttl_s, lease_s, began_at=NOW)
        else:
            store = RedisStore(url, namespace, ttl_s=ttl_s, lease_s=lease_s)
        made.append(store)
        return store

    yield build
    for store in made:
        await store.close()


@pytest.fixture
def store(make: Make) -> IdempotencyStore:
    return make()


async def claim_after_lease(store: IdempotencyStore, wanted: Key) -> Claim:
    """Claim repeatedly until no lease on the command is left."""
    return await until(
        lambda claim: not isinstance(claim, InProgress), lambda: store.claim(wanted, NOW + timedelta(hours=1))
    )


async def test_one_command_id_is_one_command(store: IdempotencyStore) -> None:
    first = await store.claim(key("a"), NOW)
    assert isinstance(first, Unseen)
    assert await store.claim(key("a"), NOW) == InProgress(NOW)
    assert isinstance(await store.claim(key("b"), NOW), Unseen)
    await store.release(first.lease, None)
    again = await store.claim(key("a"), NOW)
    assert isinstance(again, KnownNotSent)
    await complete(store, again.lease, reply("a", U))
    assert await store.claim(key("a"), NOW) == Completed(reply("a", U))


async def test_a_command_id_with_other_content_is_reused_in_every_state(store: IdempotencyStore) -> None:
    other = key("a", content_hash=b"2" * 16)
    lease = held(await store.claim(key("a"), NOW))
    assert await store.claim(other, NOW) == KeyReused()
    await store.release(lease, DOUBT)
    assert await store.claim(other, NOW) == KeyReused()
    await complete(store, held(await store.claim(key("a"), NOW)), reply("a"))
    assert await store.claim(other, NOW) == KeyReused()


async def test_a_reused_command_id_tells_which_fields_differ_in_every_state(make: Make) -> None:
    """Never their values; and nothing where the record has none, as those of earlier versions."""
    store, again = make(), make()
    again = again if again.is_shared else store
    first = replace(key("a"), field_digests=bytes(range(FIELD_DIGESTS_BYTES)))
    digests = bytearray(first.field_digests)
    digests[CONTENT_FIELDS.index("expired_time") * 2] ^= 1
    digests[CONTENT_FIELDS.index("args") * 2 + 1] ^= 1
    other = replace(first, content_hash=b"2" * 16, field_digests=bytes(digests))
    reused = KeyReused(("expired_time", "args"))
    await store.note_arrival(first, NOW)
    lease = held(await store.claim(first, NOW))
    assert await again.claim(other, NOW) == reused
    await store.release(lease, DOUBT)
    assert await again.claim(other, NOW) == reused
    await complete(store, held(await store.claim(first, NOW)), reply("a", U))
    assert await again.claim(other, NOW) == reused
    assert await again.claim(replace(other, field_digests=b""), NOW) == KeyReused()
    assert await again.claim(first, NOW) == Completed(reply("a", U))


async def test_a_claim_returns_the_doubt_that_the_last_release_recorded(store: IdempotencyStore) -> None:
    await store.release(held(await store.claim(key("a"), NOW)), DOUBT)
    claim = await store.claim(key("a"), NOW)
    assert isinstance(claim, Unresolved)
    assert (claim.doubt, claim.holder_crashed) == (DOUBT, False)
    await store.release(claim.lease, DoubtWindow(None, NOW), holder_crashed=True)
    claim = await store.claim(key("a"), NOW)
    assert isinstance(claim, Unresolved)
    assert (claim.doubt, claim.holder_crashed) == (DoubtWindow(None, NOW), True)
    assert await store.claim(key("a"), NOW) == InProgress(None)  # a postponed delivery needs the same window
    await store.release(claim.lease, None)
    assert isinstance(await store.claim(key("a"), NOW), KnownNotSent)


async def test_a_lease_that_ends_without_a_release_leaves_the_command_in_doubt(make: Make) -> None:
    """Its holder was killed, or its machine stopped: the next holder must not send at once."""
    short = make(lease_s=SHORT_S)
    await short.claim(key("a"), NOW)
    claim = await claim_after_lease(short, key("a"))
    assert isinstance(claim, Unresolved)
    assert claim.holder_crashed
    assert claim.doubt == DoubtWindow(NOW, NOW + timedelta(seconds=SHORT_S))


async def test_a_lease_that_ends_without_a_release_extends_the_recorded_doubt(make: Make) -> None:
    short = make(lease_s=SHORT_S)
    before = DoubtWindow(NOW - timedelta(hours=1), NOW - timedelta(minutes=59))
    await short.release(held(await short.claim(key("a"), NOW)), before)
    await short.claim(key("a"), NOW)
    claim = await claim_after_lease(short, key("a"))
    assert isinstance(claim, Unresolved)
    assert claim.doubt == DoubtWindow(before.since, NOW + timedelta(seconds=SHORT_S))


async def test_every_call_of_a_former_lease_holder_is_refused(make: Make) -> None:
    """The fencing token: the holder may have been stopped for any time, and cannot know of its successor."""
    short = make(lease_s=SHORT_S)
    late = held(await short.claim(key("a"), NOW))
    successor = await claim_after_lease(short, key("a"))
    with pytest.raises(LeaseLost):
        await complete(short, late, reply("a", "late"))
    with pytest.raises(LeaseLost):
        await short.release(late, None)
    with pytest.raises(LeaseLost):
        await short.ownership(late, [U])
    await complete(short, held(successor), reply("a", U))
    with pytest.raises(LeaseLost):
        await complete(short, late, reply("a", "late"))
    assert await short.claim(key("a"), NOW) == Completed(reply("a", U))


async def test_one_of_many_concurrent_claims_is_granted(store: IdempotencyStore) -> None:
    claims = await asyncio.gather(*(store.claim(key("a"), NOW) for _ in range(200)))
    assert sum(isinstance(claim, Unseen) for claim in claims) == 1
    assert claims.count(InProgress(NOW)) == 199


async def test_a_uuid_belongs_to_one_command_only(store: IdempotencyStore) -> None:
    """A lookalike gets another uuid, or none."""
    await complete(store, held(await store.claim(key("a"), NOW)), reply("a", U1))
    lookalike = held(await store.claim(key("b"), NOW))
    assert await assign(store, lookalike, [U1]) == NoCandidate()
    assert await recover(store, lookalike, [U1, U2]) == Assigned(U2, is_guess=False)
    assert await assign(store, held(await store.claim(key("c"), NOW)), [U1, U2]) == NoCandidate()


async def test_ownership_reports_the_owner_of_each_uuid_and_the_lookalikes(store: IdempotencyStore) -> None:
    await store.release(held(await store.claim(key("c"), NOW)), DOUBT)
    b, d = held(await store.claim(key("b"), NOW)), held(await store.claim(key("d"), NOW))
    await complete(store, b, reply("b", U1))
    await complete(store, d, reply("d", U2), is_guess=True)
    lease = held(await store.claim(key("a"), NOW))
    facts = await store.ownership(lease, [U, U1, U2])
    assert facts.owners == {U: None, U1: Owner(b.owner_id, is_certain=True), U2: Owner(d.owner_id, is_certain=False)}
    assert (facts.lookalikes, facts.is_lookalike_held) == (1, False)
    held(await store.claim(key("e"), NOW))
    facts = await store.ownership(lease, [])
    assert (facts.owners, facts.lookalikes, facts.is_lookalike_held) == ({}, 2, True)


async def test_a_lookalike_whose_lease_has_ended_is_counted_and_not_held(make: Make) -> None:
    short = make(lease_s=SHORT_S)
    await short.claim(key("b"), NOW)
    lease = held(await short.claim(key("a"), NOW))
    facts = await until(lambda facts: not facts.is_lookalike_held, lambda: short.ownership(lease, []))
    assert facts.lookalikes == 1


async def test_an_assignment_that_was_not_recorded_leaves_the_uuid_to_a_lookalike(store: IdempotencyStore) -> None:
    """Nothing is recorded before the outcome is, and the record of the outcome is what checks the owner."""
    lease = held(await store.claim(key("a"), NOW))
    assert await assign(store, lease, [U1]) == Assigned(U1, is_guess=False)
    await complete(store, held(await store.claim(key("b"), NOW)), reply("b", U1))
    with pytest.raises(UuidTaken):
        await complete(store, lease, reply("a", U1))
    claim = await store.claim(key("a"), NOW)
    assert isinstance(claim, Unresolved)
    assert (claim.doubt, claim.holder_crashed) == (DOUBT, False)
    assert await assign(store, claim.lease, [U1, U2]) == Assigned(U2, is_guess=False)


async def test_lookalikes_in_doubt_share_as_many_entries_as_there_are_lookalikes(store: IdempotencyStore) -> None:
    await store.release(held(await store.claim(key("b"), NOW)), DOUBT)
    assert await recover(store, held(await store.claim(key("a"), NOW)), [U1, U2]) == Assigned(U1, is_guess=True)
    assert await assign(store, held(await store.claim(key("b"), NOW)), [U1, U2]) == Assigned(U2, is_guess=False)


@pytest.mark.parametrize(("likely", "unlikely"), [([U1, U2], []), ([U1], [U2])])
async def test_a_command_whose_only_entry_was_guessed_for_a_lookalike_is_ambiguous(
    store: IdempotencyStore, likely: list[str], unlikely: list[str]
) -> None:
    """Its time fits one entry only, its lookalike's time both: sent again, it would be cached twice."""
    await store.release(held(await store.claim(key("b"), NOW)), DOUBT)
    assert await recover(store, held(await store.claim(key("a"), NOW)), likely, unlikely) == Assigned(U1, is_guess=True)
    assert await store.owned_by_others("b", [U1, U2]) == set()
    lease = held(await store.claim(key("b"), NOW))
    assert await assign(store, lease, [U1]) == Ambiguous()
    assert await assign(store, lease, []) == NoCandidate()


async def test_a_guessed_uuid_is_refused_to_every_other_command(store: IdempotencyStore) -> None:
    await store.release(held(await store.claim(key("b"), NOW)), DOUBT)
    await recover(store, held(await store.claim(key("a"), NOW)), [U1, U2])
    assert await store.claim(key("a"), NOW) == Completed(reply("a", U1))
    with pytest.raises(UuidTaken):
        await complete(store, held(await store.claim(key("b"), NOW)), reply("b", U1))


async def test_more_entries_than_commands_are_ambiguous(store: IdempotencyStore) -> None:
    """One of them belongs to a command without a record."""
    assert await assign(store, held(await store.claim(key("a"), NOW)), [U1, U2]) == Ambiguous()


async def test_an_entry_with_an_unlikely_time_is_ambiguous_until_another_command_owns_it(
    store: IdempotencyStore,
) -> None:
    lease = held(await store.claim(key("a"), NOW))
    assert await assign(store, lease, [], [U1]) == Ambiguous()
    assert await assign(store, lease, [U2], [U1]) == Ambiguous()
    await complete(store, held(await store.claim(key("b"), NOW)), reply("b", U1))
    assert await assign(store, lease, [U2], [U1]) == Assigned(U2, is_guess=False)


async def test_nothing_is_assigned_while_a_lookalike_is_held(store: IdempotencyStore) -> None:
    """Its request may have caused the entry, and its answer be about to arrive."""
    lookalike = held(await store.claim(key("b"), NOW))
    lease = held(await store.claim(key("a"), NOW))
    assert await assign(store, lease, [U]) == LookalikeInProgress()
    await complete(store, lookalike, reply("b", U))
    assert await assign(store, lease, [U]) == NoCandidate()


async def test_a_record_expires_after_its_time_to_live(make: Make) -> None:
    """On a slow machine a short one is over at once, so it is tried with longer ones."""
    for ttl_s in (1, 10, 60):
        brief, wanted = make(ttl_s=ttl_s), key(f"for-{ttl_s}-s")
        with suppress(LeaseLost):  # the record has expired already
            await complete(brief, held(await brief.claim(wanted, NOW)), reply(wanted.command_id, U))
            if await brief.claim(wanted, NOW) == Completed(reply(wanted.command_id, U)):
                break
    else:
        pytest.fail("no record was kept")
    await until(lambda claim: not isinstance(claim, Completed), lambda: brief.claim(wanted, NOW))


async def test_a_replay_discards_the_failure_that_it_names_and_restores_its_doubt(store: IdempotencyStore) -> None:
    await complete(store, held(await store.claim(key("a"), NOW)), failure("a", NOW + timedelta(microseconds=1_999)))
    replay = Replay(NOW + timedelta(milliseconds=1), DOUBT)
    assert isinstance(await store.claim(key("a"), NOW), Completed)  # without a replay the failure is final
    assert await store.claim(key("a", content_hash=b"2" * 16), NOW, replay) == KeyReused()
    claim = await store.claim(key("a"), NOW, replay)
    assert isinstance(claim, Unresolved)
    assert (claim.doubt, claim.holder_crashed) == (DOUBT, False)
    assert await store.claim(key("a"), NOW, replay) == InProgress(
        DOUBT.since
    )  # a second delivery needs the doubt as well
    await store.release(claim.lease, None)
    assert isinstance(await store.claim(key("a"), NOW), KnownNotSent)


async def test_a_replay_without_a_doubt_is_known_not_sent(store: IdempotencyStore) -> None:
    await complete(store, held(await store.claim(key("a"), NOW)), failure("a"))
    assert isinstance(await store.claim(key("a"), NOW, Replay(NOW, None)), KnownNotSent)


async def test_a_replay_discards_one_failure_however_often_it_is_delivered(store: IdempotencyStore) -> None:
    """Its duplicate may arrive when the first delivery has led to another failure."""
    later = NOW + timedelta(milliseconds=1)
    await complete(store, held(await store.claim(key("a"), NOW)), failure("a"))
    await complete(store, held(await store.claim(key("a"), NOW, Replay(NOW, None))), failure("a", later))
    assert await store.claim(key("a"), NOW, Replay(NOW, None)) == Completed(failure("a", later))
    assert isinstance(await store.claim(key("a"), NOW, Replay(later, None)), KnownNotSent)


async def test_a_replay_never_discards_an_accepted_outcome(store: IdempotencyStore) -> None:
    await complete(store, held(await store.claim(key("a"), NOW)), reply("a", U))
    assert await store.claim(key("a"), NOW, Replay(NOW, None)) == Completed(reply("a", U))
    await complete(store, held(await store.claim(key("b"), NOW)), failure("b"))
    await complete(store, held(await store.claim(key("b"), NOW, Replay(NOW, None))), reply("b", V))
    assert await store.claim(key("b"), NOW, Replay(NOW, None)) == Completed(reply("b", V))


async def test_a_replayed_command_is_a_lookalike_again(store: IdempotencyStore) -> None:
    await complete(store, held(await store.claim(key("a"), NOW)), failure("a"))
    replayed = held(await store.claim(key("a"), NOW, Replay(NOW, DOUBT)))
    assert await assign(store, held(await store.claim(key("b"), NOW)), [U]) == LookalikeInProgress()
    await store.release(replayed, DOUBT)


STANDARD = "0a1b2c3d-0000-4000-8000-00000000abcd"
OTHER_SPELLINGS = [
    STANDARD.upper(), STANDARD.replace("-", ""), STANDARD.replace("-", "").upper(), f"{{{STANDARD}}}",
    f"{{{STANDARD.upper()}}}", f" {STANDARD} ", "0A1b2c3d-0000-4000-8000-00000000abCD", f"urn:uuid:{STANDARD}",
]  # fmt: skip
FORMER_SPELLINGS = [STANDARD, *OTHER_SPELLINGS[:5]]  # under which a former version may have recorded an owner
SPELLINGS = [(STANDARD, shown) for shown in OTHER_SPELLINGS] + [(answered, STANDARD) for answered in OTHER_SPELLINGS]


@pytest.mark.parametrize(("answered", "shown"), SPELLINGS)
async def test_a_uuid_in_another_spelling_still_belongs_to_its_command(
    store: IdempotencyStore, answered: str, shown: str
) -> None:
    """Otherwise a lookalike in doubt would be assigned this uuid, and never be sent."""
    await complete(store, held(await store.claim(key("a"), NOW)), reply("a", answered))
    assert await store.claim(key("a"), NOW) == Completed(reply("a", answered))  # as the platform spelled it
    lookalike = held(await store.claim(key("b"), NOW))
    assert await store.owned_by_others(lookalike.owner_id, [shown, U]) == {shown}
    assert await assign(store, lookalike, [shown]) == NoCandidate()
    assert await assign(store, lookalike, [shown, U]) == Assigned(U, is_guess=False)
    with pytest.raises(UuidTaken):
        await complete(store, lookalike, reply("b", shown))


@pytest.mark.parametrize(("recorded", "shown"), SPELLINGS)
async def test_a_uuid_that_was_recovered_in_another_spelling_still_belongs_to_its_command(
    store: IdempotencyStore, recorded: str, shown: str
) -> None:
    await store.release(held(await store.claim(key("b"), NOW)), DOUBT)
    assert await recover(store, held(await store.claim(key("a"), NOW)), [recorded]) == Assigned(
        recorded, is_guess=False
    )
    lookalike = held(await store.claim(key("b"), NOW))
    assert await assign(store, lookalike, [shown]) == NoCandidate()
    assert await assign(store, lookalike, [shown, U]) == Assigned(U, is_guess=False)


@pytest.mark.parametrize(("recorded", "shown"), SPELLINGS)
async def test_a_guess_stays_a_guess_in_another_spelling_of_its_uuid(
    store: IdempotencyStore, recorded: str, shown: str
) -> None:
    await store.release(held(await store.claim(key("b"), NOW)), DOUBT)
    first = held(await store.claim(key("a"), NOW))
    assert await recover(store, first, [recorded, U]) == Assigned(recorded, is_guess=True)
    assert await store.owned_by_others("b", [shown]) == set()
    lookalike = held(await store.claim(key("b"), NOW))
    assert (await store.ownership(lookalike, [shown])).owners == {shown: Owner(first.owner_id, is_certain=False)}
    assert await assign(store, lookalike, [shown]) == Ambiguous()
    with pytest.raises(UuidTaken):
        await complete(store, lookalike, reply("b", shown))


@pytest.mark.parametrize(
    ("answered", "shown"),
    [("Order-7x", "order-7x"), ("order-7x", "ORDER-7X"), ("ORDER-7X", "Order-7x"), ("a 7", "a7"), ("a7", "A 7")],
)
async def test_an_owner_of_a_nonstandard_uuid_that_differs_in_case_or_blanks_is_a_guess(
    store: IdempotencyStore, answered: str, shown: str
) -> None:
    """It may be the same uuid or another: a certain owner could have the other command sent twice."""
    await complete(store, held(await store.claim(key("a"), NOW)), reply("a", answered))
    lookalike = held(await store.claim(key("b"), NOW))
    assert await store.owned_by_others(lookalike.owner_id, [answered, shown]) == {answered}
    assert await assign(store, lookalike, [answered]) == NoCandidate()
    assert await assign(store, lookalike, [shown]) == Ambiguous()


@pytest.mark.parametrize(
    "shown", ["order-8x", "order7x", STANDARD[:-1] + "e", STANDARD[:-1], STANDARD + "0", "{order-7x}"]
)
async def test_a_uuid_that_differs_in_more_than_its_spelling_has_no_owner(store: IdempotencyStore, shown: str) -> None:
    await complete(store, held(await store.claim(key("a"), NOW)), reply("a", "order-7x"))
    await complete(store, held(await store.claim(key("c"), NOW)), reply("c", STANDARD))
    lease = held(await store.claim(key("b"), NOW))
    assert await store.owned_by_others(lease.owner_id, [shown]) == set()
    assert (await store.ownership(lease, [shown])).owners == {shown: None}
    assert await assign(store, lease, [shown]) == Assigned(shown, is_guess=False)


def result_of(command_id: str, uuid: str, result: ResultKind) -> Result:
    return Result(command_id=command_id, uuid=uuid, imei="865820030000001", result=result, observed_at=NOW)


class TestMemory:
    """Properties of the store in one process."""

    def test_the_store_of_one_process_has_local_records_and_is_not_shared(self) -> None:
        store = open_store("memory://", "n", ttl_s=60, lease_s=LONG_S, began_at=NOW)
        assert isinstance(store, MemoryStore)
        assert store.local is store
        assert not store.is_shared

    async def test_a_command_that_was_marked_not_sent_is_known_not_sent(self) -> None:
        store = MemoryStore(60, LONG_S, began_at=NOW)
        store.mark_not_sent(key("a"))
        assert not store.was_claimed(key("a"))
        again = await store.claim(key("a"), NOW)
        assert isinstance(again, KnownNotSent)
        await complete(store, again.lease, reply("a"))
        store.mark_not_sent(key("a"))
        assert await store.claim(key("a"), NOW) == Completed(reply("a"))  # an existing record is kept

    async def test_an_unseen_command_may_have_been_sent_before_the_process_began(self) -> None:
        claim = await MemoryStore(60, LONG_S, began_at=NOW).claim(key("a"), NOW + timedelta(hours=1))
        assert isinstance(claim, Unseen)
        assert claim.unrecorded_until == NOW

    async def test_the_oldest_record_without_a_lease_is_removed_first(self) -> None:
        store = MemoryStore(60, LONG_S, began_at=NOW, max_others=3)
        lease = held(await store.claim(key("held"), NOW))
        for command_id in ("a", "b", "c"):
            await complete(store, held(await store.claim(key(command_id), NOW)), failure(command_id))
        assert await store.claim(key("held"), NOW) == InProgress(NOW)
        await complete(store, lease, failure("held"))
        assert await store.claim(key("c"), NOW) == Completed(failure("c"))

    async def test_memory_does_not_grow_beyond_its_limit(self) -> None:
        store = MemoryStore(60, LONG_S, began_at=NOW, max_others=10)
        for number in range(1000):
            command_id = str(number)
            await complete(store, held(await store.claim(key(command_id), NOW)), failure(command_id))
        assert await store.claim(key("990"), NOW) == Completed(failure("990"))
        assert isinstance(await store.claim(key("0"), NOW), Unseen)

    async def test_the_latest_accepted_commands_are_kept(self) -> None:
        store = MemoryStore(60, LONG_S, began_at=NOW, max_accepted=10)
        keys = [Key(str(number), b"1" * 16, number.to_bytes(16, "big")) for number in range(1000)]
        for number, each in enumerate(keys):
            await complete(store, held(await store.claim(each, NOW)), reply(str(number), str(UUID(int=number))))
        for number in range(990, 1000):
            assert await store.claim(keys[number], NOW) == Completed(reply(str(number), str(UUID(int=number))))
        assert isinstance(await store.claim(keys[979], NOW), Unseen)

    async def test_a_packed_reply_names_no_owner_but_another_command(self) -> None:
        store = MemoryStore(60, LONG_S, began_at=NOW)
        await complete(store, held(await store.claim(key("b", match_key=b"other" * 3), NOW)), reply("b", U))
        lease = held(await store.claim(key("a"), NOW))
        assert (await store.ownership(lease, [U])).owners == {U: Owner(None, is_certain=True)}

    @given(
        uuid=st.one_of(st.uuids().map(str), st.text(min_size=1)),
        imei=st.from_regex(r"[0-9]{15}|[0-9]{4}", fullmatch=True),
        attempts=st.integers(1, 300),
        recovered=st.booleans(),
        omitted=st.booleans(),
        after_1970=st.timedeltas(timedelta(days=10_000), timedelta(days=50_000)),
    )
    async def test_a_recorded_reply_is_returned_unchanged(
        self, uuid: str, imei: str, attempts: int, recovered: bool, omitted: bool, after_1970: timedelta
    ) -> None:
        store = MemoryStore(60, LONG_S, began_at=NOW)
        outcome = Reply(
            command_id="a",
            status="accepted",
            uuid=uuid,
            imei=imei,
            attempts=attempts,
            recovered=recovered,
            valid_time_omitted=omitted,
            completed_at=datetime(1970, 1, 1, tzinfo=UTC) + after_1970,
        )
        await complete(store, held(await store.claim(key("a"), NOW)), outcome)
        found = await store.claim(key("a"), NOW)
        assert isinstance(found, Completed)
        assert found.reply.model_dump_json() == outcome.model_dump_json()

    async def test_an_accepted_command_is_not_marked_not_sent(self) -> None:
        store = MemoryStore(60, LONG_S, began_at=NOW)
        await complete(store, held(await store.claim(key("a"), NOW)), reply("a", U))
        assert store.was_claimed(key("a"))
        store.mark_not_sent(key("a"))
        assert await store.claim(key("a"), NOW) == Completed(reply("a", U))

    async def test_the_record_of_an_accepted_command_expires(self) -> None:
        now = 0.0
        store = MemoryStore(60, LONG_S, began_at=NOW, clock=lambda: now)
        await complete(store, held(await store.claim(key("a"), NOW)), reply("a", U))
        now = 61.0
        assert isinstance(await store.claim(key("a"), NOW), Unseen)

    @pytest.mark.parametrize("is_lookalike_first", [False, True])
    async def test_the_owner_of_a_uuid_outlasts_the_packed_replies_while_a_lookalike_is_in_doubt(
        self, is_lookalike_first: bool
    ) -> None:
        """Otherwise a command in doubt would be assigned the uuid of its lookalike, and never be sent."""
        store = MemoryStore(60, LONG_S, began_at=NOW, max_accepted=10)

        async def accept_lookalike() -> None:
            await complete(store, held(await store.claim(key("lookalike"), NOW)), reply("lookalike", U))

        if is_lookalike_first:
            await accept_lookalike()
        await store.release(held(await store.claim(key("a"), NOW)), DOUBT)
        if not is_lookalike_first:
            await accept_lookalike()
        for number in range(1, 100):
            other = Key(str(number), b"1" * 16, number.to_bytes(16, "big"))
            await complete(store, held(await store.claim(other, NOW)), reply(str(number), str(UUID(int=number))))
        lease = held(await store.claim(key("a"), NOW))
        assert await store.owned_by_others(lease.owner_id, [U]) == {U}
        assert await assign(store, lease, [U]) == NoCandidate()

    async def test_the_owner_of_a_guessed_uuid_outlasts_the_packed_replies(self) -> None:
        """A guess is not packed, even if no lookalike is left when the outcome is recorded."""
        store = MemoryStore(60, LONG_S, began_at=NOW, max_accepted=1)
        await complete(store, held(await store.claim(key("a"), NOW)), reply("a", U), is_guess=True)
        for number in range(1, 10):
            other = Key(str(number), b"1" * 16, number.to_bytes(16, "big"))
            await complete(store, held(await store.claim(other, NOW)), reply(str(number), str(UUID(int=number))))
        assert await assign(store, held(await store.claim(key("b"), NOW)), [U]) == Ambiguous()

    @pytest.mark.parametrize("end", ["rejected", "in doubt", "not sent", "odd uuid"])
    def test_a_record_takes_little_memory_whatever_the_texts_in_it_are(
        self, end: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """One wide character makes each character of a text take four bytes."""
        monkeypatch.setattr("worker.idempotency.memory.MAX_LONG_BYTES", 100_000)
        store, records = MemoryStore(60, LONG_S, began_at=NOW), 500

        async def keep(number: int) -> None:
            command_id = f"{number:06}".ljust(128, "x")
            app_id = f"{number:06}\U0001f600".ljust(252, "a")
            each = Key(command_id, number.to_bytes(16, "big"), (number + 10**9).to_bytes(16, "big"), app_id)
            lease = held(await store.claim(each, NOW))
            match end:
                case "rejected":
                    await complete(store, lease, rejection(command_id, "\U0001f600" * 500))
                case "odd uuid":
                    await complete(store, lease, reply(command_id, f"{number:04}".ljust(64, "\U0001f600")))
                case _:
                    await store.release(lease, DOUBT if end == "in doubt" else None)

        async def keep_all() -> None:
            for number in range(records):
                await keep(number)

        assert retained_by(lambda: asyncio.run(keep_all())) < 100_000 + records * 1_500

    async def test_the_text_of_an_error_is_repeated_unless_too_many_are_long(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Then only its beginning is; the outcome stays."""
        monkeypatch.setattr("worker.idempotency.memory.MAX_LONG_BYTES", 10_000)
        store = MemoryStore(60, LONG_S, began_at=NOW)
        outcomes = {f"{number}": rejection(f"{number}", str(number) + "\U0001f600" * 500) for number in range(10)}
        for command_id, outcome in outcomes.items():
            await complete(store, held(await store.claim(key(command_id), NOW)), outcome)
        for command_id in ("7", "8", "9"):
            assert await store.claim(key(command_id), NOW) == Completed(outcomes[command_id])
        found = await store.claim(key("0"), NOW)
        assert isinstance(found, Completed)
        assert found.reply.error is not None
        whole = outcomes["0"].error
        assert whole is not None
        assert found.reply.error.message == whole.message[:50] + "\u2026"
        short = found.reply.error.model_copy(update={"message": whole.message})
        assert found.reply.model_copy(update={"error": short}) == outcomes["0"]

    async def test_removed_records_leave_room_for_the_texts_of_others(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("worker.idempotency.memory.MAX_LONG_BYTES", 10_000)
        store = MemoryStore(60, LONG_S, began_at=NOW, max_others=3)
        for number in range(100):
            outcome = rejection(f"{number}", "\U0001f600" * 500)
            await complete(store, held(await store.claim(key(f"{number}"), NOW)), outcome)
            assert await store.claim(key(f"{number}"), NOW) == Completed(outcome)

    async def test_a_doubt_that_was_removed_at_the_limit_is_still_a_doubt(self) -> None:
        store = MemoryStore(60, LONG_S, began_at=NOW, max_others=1)
        await store.release(held(await store.claim(key("a"), NOW)), DOUBT)
        later = NOW + timedelta(hours=1)
        lookalike = held(await store.claim(key("b"), later))
        assert await recover(store, lookalike, [U]) == Assigned(U, is_guess=False)
        claim = await store.claim(key("a"), later)
        assert isinstance(claim, Unseen)
        assert claim.unrecorded_until == later


class TestRedis:
    """Properties of the store that a fleet shares."""

    async def test_the_store_of_a_fleet_is_shared_and_has_no_local_records(self, redis_url: str) -> None:
        store = open_store(redis_url, uuid4().hex, ttl_s=60, lease_s=9, began_at=NOW)
        assert isinstance(store, RedisStore)
        assert store.is_shared
        assert store.local is None
        await store.close()

    @pytest.mark.parametrize(
        ("recorded", "shown", "is_certain"),
        [(answered, shown, True) for answered, shown in SPELLINGS if answered in FORMER_SPELLINGS]
        + [("0A1b" + STANDARD[4:], "0A1b" + STANDARD[4:], True), ("ORDER-7X", "order-7x", False)],
    )
    async def test_an_owner_that_a_former_version_recorded_is_found(
        self, redis_url: str, recorded: str, shown: str, is_certain: bool
    ) -> None:
        """It recorded a uuid only under the text that the platform gave."""
        namespace = uuid4().hex
        store = RedisStore(redis_url, namespace, ttl_s=60, lease_s=9)
        with redis.Redis.from_url(redis_url) as raw:
            raw.set(f"{{{namespace}}}:uuid:{recorded}", "a", ex=60)
        lookalike = held(await store.claim(key("b"), NOW))
        assert await store.owned_by_others(lookalike.owner_id, [shown]) == ({shown} if is_certain else set())
        assert await assign(store, lookalike, [shown]) == (NoCandidate() if is_certain else Ambiguous())
        with pytest.raises(UuidTaken):
            await complete(store, lookalike, reply("b", shown))
        assert await recover(store, held(await store.claim(key("a"), NOW)), [shown]) == Assigned(
            shown, is_guess=not is_certain
        )
        await store.close()

    @pytest.mark.parametrize(("recorded", "shown"), [(U1, U1), *SPELLINGS[: len(OTHER_SPELLINGS)]])
    @pytest.mark.parametrize("is_guess", [False, True])
    async def test_an_owner_that_was_recorded_before_its_outcome_keeps_its_uuid_and_its_certainty(
        self, redis_url: str, recorded: str, shown: str, is_guess: bool
    ) -> None:
        """A former version recorded the owner at the assignment, and may have been killed before the outcome."""
        namespace = uuid4().hex
        store = RedisStore(redis_url, namespace, ttl_s=60, lease_s=9)
        owner = "?a" if is_guess else "a"
        with redis.Redis.from_url(redis_url, decode_responses=True) as raw:
            raw.set(f"{{{namespace}}}:uuid:{recorded}", owner, ex=60)
            await store.release(held(await store.claim(key("b"), NOW)), DOUBT)
            lease = held(await store.claim(key("a"), NOW))
            assert await assign(store, lease, [shown]) == Assigned(shown, is_guess=is_guess)
            assert await assign(store, lease, [U2, shown]) == Assigned(shown, is_guess=is_guess)
            await complete(store, lease, reply("a", shown), is_guess=not is_guess)
            assert raw.get(f"{{{namespace}}}:uuid:{recorded}") == owner
        lookalike = held(await store.claim(key("b"), NOW))
        assert await assign(store, lookalike, [shown]) == (Ambiguous() if is_guess else NoCandidate())
        await store.close()

    async def test_a_former_version_finds_an_owner_under_the_text_that_the_platform_gave(self, redis_url: str) -> None:
        """Both versions run while a fleet is updated."""
        namespace = uuid4().hex
        store = RedisStore(redis_url, namespace, ttl_s=60, lease_s=9)
        for command_id, answered, is_guess in (
            ("a", STANDARD.upper(), False),
            ("b", "Order-7x", False),
            ("c", U, True),
        ):
            await complete(
                store, held(await store.claim(key(command_id), NOW)), reply(command_id, answered), is_guess=is_guess
            )
            with redis.Redis.from_url(redis_url, decode_responses=True) as raw:
                assert raw.get(f"{{{namespace}}}:uuid:{answered}") == (f"?{command_id}" if is_guess else command_id)
        await store.close()

    async def test_the_first_result_of_a_command_is_every_workers(self, redis_url: str) -> None:
        """Of each of its uuids, however that is written."""
        namespace = uuid4().hex
        one, other = (RedisStore(redis_url, namespace, ttl_s=60, lease_s=9) for _ in range(2))
        first, second = result_of("a", STANDARD, "unknown"), result_of("a", STANDARD.upper(), "executed")
        assert await one.first_results([("billing", first)]) == [first]
        another = result_of("a", U2, "executed")
        found = [("billing", second), ("billing", another), ("metering", second)]
        assert await other.first_results(found) == [first, another, second]
        await one.close()
        await other.close()

    @pytest.mark.parametrize("record", [b"", b"{}", b"\xff", b"other", None], ids=repr)
    async def test_a_recorded_result_that_cannot_be_read_concerns_its_command_only(
        self, redis_url: str, record: bytes | None
    ) -> None:
        namespace = uuid4().hex
        store = RedisStore(redis_url, namespace, ttl_s=60, lease_s=9)
        name = f"{{{namespace}}}:result:a/billing:{STANDARD}"
        with redis.Redis.from_url(redis_url) as raw:
            if record is None:
                raw.hset(name, "field", "of another type")
            else:
                raw.set(name, result_of("b", U2, "failed").model_dump_json() if record == b"other" else record)
            raw.expire(name, 60)
            assert raw.exists(name)
        found = result_of("a", STANDARD, "executed"), result_of("c", U, "expired")
        assert await store.first_results([("billing", each) for each in found]) == [*found]
        await store.close()

    async def test_every_worker_finds_the_records_of_every_other(self, redis_url: str) -> None:
        namespace = uuid4().hex
        one, other = (RedisStore(redis_url, namespace, ttl_s=60, lease_s=9) for _ in range(2))
        lease = held(await one.claim(key("a"), NOW))
        assert await other.claim(key("a"), NOW) == InProgress(NOW)
        await complete(one, lease, reply("a", U))
        assert await other.claim(key("a"), NOW) == Completed(reply("a", U))
        await one.close()
        await other.close()

    async def test_a_missing_record_does_not_prove_that_a_command_was_not_sent(self, redis_url: str) -> None:
        """Redis may have lost its last writes, even if it has accepted others since."""
        namespace = uuid4().hex
        one, other = (RedisStore(redis_url, namespace, ttl_s=60, lease_s=9) for _ in range(2))
        claims = [await store.claim(key(command_id), NOW) for store, command_id in ((one, "a"), (other, "b"))]
        for claim in claims:  # a worker that hangs may still use a lease that is lost
            assert isinstance(claim, Unseen)
            assert claim.unrecorded_until is not None
            assert NOW < claim.unrecorded_until <= NOW + timedelta(seconds=9)
        await one.close()
        await other.close()

    async def test_a_redis_that_stops_raises_and_one_that_returns_empty_proves_nothing(
        self, own_redis: LocalRedis
    ) -> None:
        namespace = uuid4().hex
        founder = RedisStore(own_redis.url, namespace, ttl_s=60, lease_s=9)
        await founder.claim(key("a"), NOW)
        store = RedisStore(own_redis.url, namespace, ttl_s=60, lease_s=9)
        lease = held(await store.claim(key("b"), NOW))
        own_redis.kill()
        for call in (
            lambda: store.claim(key("c"), NOW),
            lambda: store.ownership(lease, [U]),
            lambda: complete(store, lease, reply("b")),
        ):
            with pytest.raises(StoreUnavailable):
                await call()
        own_redis.start()
        claim = await store.claim(key("a"), NOW)
        assert isinstance(claim, Unseen)
        assert (claim.loss, claim.unrecorded_until) == (
            Loss.ANY,
            NOW + timedelta(seconds=9),
        )  # the lease of the founder
        with pytest.raises(LeaseLost):
            await complete(store, lease, reply("b"))
        await founder.close()
        await store.close()

    async def test_the_same_command_id_in_another_namespace_is_another_command(self, redis_url: str) -> None:
        for _ in range(2):
            store = RedisStore(redis_url, uuid4().hex, ttl_s=60, lease_s=9)
            assert isinstance(await store.claim(key("a"), NOW), Unseen)
            await store.close()


def test_a_url_with_an_unusable_option_opens_no_store() -> None:
    """It is known before the event loop runs, and the message does not contain the password."""
    with pytest.raises(
        SettingsError,
        match=r"^IDEMPOTENCY_URL: an option after \? is not known; there are [a-z_, ]+$",
    ):
        open_store("redis://user:secret@localhost/0?timeout=5s", "n", ttl_s=60, lease_s=9, began_at=NOW)


def test_a_url_of_another_scheme_opens_no_store() -> None:
    with pytest.raises(SettingsError, match="IDEMPOTENCY_URL"):
        open_store("postgresql://localhost", "n", ttl_s=60, lease_s=9, began_at=NOW)
