"""Outcomes with uuids: recorded again for the command that owns the uuid, refused for any other."""

from uuid import UUID

import pytest

from tests.support.stores import DOUBT, NOW, U1, U2, U, assign, complete, held, key, reply
from worker.core.claims import Completed, IdempotencyStore, Key, Unresolved
from worker.core.ownership import Assigned, NoCandidate
from worker.errors import LeaseLost, UuidTaken
from worker.idempotency.memory import MemoryStore


async def test_an_outcome_with_an_assigned_uuid_is_recorded_even_if_the_assignment_was_a_guess(
    store: IdempotencyStore,
) -> None:
    """A worker may crash between the assignment and the record."""
    lease = held(await store.claim(key("a"), NOW))
    assert await assign(store, lease, [U]) == Assigned(U, is_guess=False)
    await complete(store, lease, reply("a", U))
    assert await store.claim(key("a"), NOW) == Completed(reply("a", U))
    await store.release(held(await store.claim(key("c"), NOW)), DOUBT)
    lease = held(await store.claim(key("b"), NOW))
    assert await assign(store, lease, [U1, U2]) == Assigned(U1, is_guess=True)
    await complete(store, lease, reply("b", U1), is_guess=True)
    assert await store.claim(key("b"), NOW) == Completed(reply("b", U1))


async def test_a_refused_outcome_records_the_doubt_and_ends_the_lease_in_one_step(store: IdempotencyStore) -> None:
    await complete(store, held(await store.claim(key("a"), NOW)), reply("a", U))
    lease = held(await store.claim(key("b"), NOW))
    with pytest.raises(UuidTaken):
        await complete(store, lease, reply("b", U))
    with pytest.raises(LeaseLost):
        await store.release(lease, None)
    claim = await store.claim(key("b"), NOW)
    assert isinstance(claim, Unresolved)
    assert (claim.doubt, claim.holder_crashed) == (DOUBT, False)
    assert await store.owned_by_others("b", [U]) == {U}
    assert await assign(store, claim.lease, [U]) == NoCandidate()


async def test_the_memory_store_knows_the_uuids_of_all_accepted_commands_that_it_has_not_forgotten() -> None:
    """Those of both generations of packed replies."""
    store = MemoryStore(600, 600, began_at=NOW, max_accepted=10)
    uuids = [str(UUID(int=number)) for number in range(40)]
    for number, uuid in enumerate(uuids):
        await complete(store, held(await store.claim(_distinct_key(number), NOW)), reply(str(number), uuid))
    for number in range(30, 40):
        other = 100 + number
        with pytest.raises(UuidTaken):
            await complete(store, held(await store.claim(_distinct_key(other), NOW)), reply(str(other), uuids[number]))
    await complete(store, held(await store.claim(_distinct_key(200), NOW)), reply("200", uuids[0]))


def _distinct_key(number: int) -> Key:
    """Return a key that is no lookalike of another one."""
    return Key(str(number), b"1" * 16, number.to_bytes(16, "little"))
