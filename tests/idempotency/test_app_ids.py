"""Two upstream systems may use the same command id, and neither learns of the other's."""

from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
import redis

from tests.support.stores import DOUBT, LONG_S, NOW, U1, U2, U, assign, complete, held, key, reply
from worker.core.claims import Completed, IdempotencyStore, InProgress, Key, KeyReused, KnownNotSent, Unresolved, Unseen
from worker.core.ownership import Ambiguous, Assigned, LookalikeInProgress
from worker.idempotency.memory import MemoryStore
from worker.idempotency.redis import RedisStore

BILLING, METERING, UNNAMED = (replace(key("a"), app_id=name) for name in ("billing", "metering", ""))
OTHER_CONTENT = b"2" * 16


@pytest.fixture(params=["memory", "redis"])
async def store(request: pytest.FixtureRequest) -> AsyncIterator[IdempotencyStore]:
    made: IdempotencyStore
    if request.param == "memory":
        made = MemoryStore(60, LONG_S, began_at=NOW)
    else:
        made = RedisStore(request.getfixturevalue("redis_url"), uuid4().hex, ttl_s=60, lease_s=LONG_S)
    yield made
    await made.close()


@pytest.mark.parametrize("second", [METERING, UNNAMED, replace(METERING, content_hash=OTHER_CONTENT)], ids=str)
async def test_an_id_of_two_systems_is_two_commands(store: IdempotencyStore, second: Key) -> None:
    first = held(await store.claim(BILLING, NOW))
    other = await store.claim(second, NOW)
    assert isinstance(other, Unseen)
    assert isinstance(await store.claim(BILLING, NOW), InProgress)
    await store.complete(first, reply("a", U1), DOUBT)
    await store.complete(other.lease, reply("a", U2), DOUBT)
    for each, uuid in ((BILLING, U1), (second, U2)):
        assert await store.claim(each, NOW) == Completed(reply("a", uuid))
        assert isinstance(await store.claim(replace(each, content_hash=b"3" * 16), NOW), KeyReused)
    third = replace(key("a"), app_id="third")
    assert isinstance(await store.claim(third, NOW), Unseen)


async def test_a_released_command_stays_its_systems(store: IdempotencyStore) -> None:
    await store.release(held(await store.claim(BILLING, NOW)), DOUBT)
    await store.release(held(await store.claim(METERING, NOW)), None)
    again, other = await store.claim(BILLING, NOW), await store.claim(METERING, NOW)
    assert isinstance(again, Unresolved)
    assert isinstance(other, KnownNotSent)


async def test_the_same_id_of_another_system_is_another_owner_of_a_uuid(store: IdempotencyStore) -> None:
    await complete(store, held(await store.claim(BILLING, NOW)), reply("a", U))
    lease = held(await store.claim(METERING, NOW))
    assert await store.owned_by_others(lease.owner_id, [U]) == {U}
    facts = await store.ownership(lease, [U])
    assert not facts.is_available(U, lease.owner_id)


async def test_lookalikes_with_the_same_id_compete_for_a_uuid(store: IdempotencyStore) -> None:
    first = held(await store.claim(BILLING, NOW))
    second = held(await store.claim(METERING, NOW))
    assert isinstance(await assign(store, second, [U]), LookalikeInProgress)
    await store.release(first, DOUBT)
    assert isinstance(await assign(store, second, [U]), Assigned)
    assert isinstance(await assign(store, second, [U, U1, U2]), Ambiguous)


async def test_a_system_named_like_an_id_or_with_odd_characters_has_its_own_commands(store: IdempotencyStore) -> None:
    names = ("b", "/", "a/b", "{x}", "é\n\x00", "x" * 255, "?")
    leases = [held(await store.claim(replace(key("a"), app_id=name), NOW)) for name in names]
    for number, lease in enumerate(leases):
        await complete(store, lease, reply("a", str(UUID(int=number + 100))))
        assert await store.owned_by_others(lease.owner_id, [str(UUID(int=number + 100))]) == set()
    assert len({lease.owner_id for lease in leases}) == len(names)


class Upgraded:
    """A store of the present version over records as an earlier version left them, under the id alone."""

    def __init__(self, url: str) -> None:
        self.namespace = uuid4().hex
        self.redis = redis.Redis.from_url(url, decode_responses=True)
        self.store = RedisStore(url, self.namespace, ttl_s=60, lease_s=LONG_S)

    def forget_app(self) -> None:
        """Make the record one of an earlier version, which knew no system."""
        assert self.redis.hdel(self.record, "app") == 1

    @property
    def record(self) -> str:
        return f"{{{self.namespace}}}:command:a"


@pytest.fixture
async def upgraded(redis_url: str) -> AsyncIterator[Upgraded]:
    found = Upgraded(redis_url)
    yield found
    await found.store.close()
    found.redis.close()


async def test_an_earlier_versions_outcome_is_repeated_to_whichever_system_asks(upgraded: Upgraded) -> None:
    """Whose it is nobody can tell, and sending again would be worse."""
    await complete(upgraded.store, held(await upgraded.store.claim(UNNAMED, NOW)), reply("a", U))
    upgraded.forget_app()
    for each in (BILLING, METERING, UNNAMED):
        assert await upgraded.store.claim(each, NOW) == Completed(reply("a", U))
        assert isinstance(await upgraded.store.claim(replace(each, content_hash=OTHER_CONTENT), NOW), KeyReused)
        assert await upgraded.store.is_known_not_sent(each) is False


async def test_an_earlier_versions_lease_holds(upgraded: Upgraded) -> None:
    lease = held(await upgraded.store.claim(UNNAMED, NOW))
    upgraded.forget_app()
    assert isinstance(await upgraded.store.claim(BILLING, NOW), InProgress)
    await complete(upgraded.store, lease, reply("a", U))
    assert await upgraded.store.claim(BILLING, NOW) == Completed(reply("a", U))


@pytest.mark.parametrize(("doubt", "kind"), [(DOUBT, Unresolved), (None, KnownNotSent)])
async def test_what_an_earlier_version_left_without_an_outcome_is_continued(
    upgraded: Upgraded, doubt: Any, kind: type
) -> None:
    await upgraded.store.release(held(await upgraded.store.claim(UNNAMED, NOW)), doubt)
    upgraded.forget_app()
    assert await upgraded.store.is_known_not_sent(BILLING) is (doubt is None)
    claim = await upgraded.store.claim(BILLING, NOW)
    assert isinstance(claim, kind)
    await complete(upgraded.store, held(claim), reply("a", U))
    assert await upgraded.store.claim(METERING, NOW) == Completed(reply("a", U))  # it still names no system


async def test_an_earlier_version_finds_what_this_one_has_recorded(upgraded: Upgraded) -> None:
    """Both run at once during a rolling upgrade, and a doubled message may be in both."""
    held(await upgraded.store.claim(BILLING, NOW))
    assert upgraded.redis.hget(upgraded.record, "state") == "held"


async def test_an_unreadable_record_of_another_system_is_left_alone(upgraded: Upgraded) -> None:
    await upgraded.store.claim(BILLING, NOW)
    upgraded.redis.hset(upgraded.record, "state", "nonsense")
    assert isinstance(await upgraded.store.claim(METERING, NOW), Unseen)
    claim = await upgraded.store.claim(BILLING, NOW + timedelta(seconds=1))
    assert isinstance(claim, Unresolved)
    assert upgraded.redis.hget(upgraded.record, "app") == "billing"


async def test_a_recorded_arrival_is_its_systems(upgraded: Upgraded) -> None:
    await upgraded.store.claim(replace(key("first"), app_id="any"), NOW)  # an epoch begins with the first claim
    await upgraded.store.note_arrival(BILLING, NOW)
    await upgraded.store.note_arrival(METERING, NOW)
    for each in (BILLING, METERING):
        assert await upgraded.store.is_known_not_sent(each) is True
        assert isinstance(await upgraded.store.claim(each, NOW), KnownNotSent)
    assert await upgraded.store.is_known_not_sent(UNNAMED) is None
