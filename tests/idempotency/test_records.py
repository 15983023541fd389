"""Records as people read them: what the store has written, without a claim, a script or a write."""

from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
import redis

from schemas.result import Result
from tests.support.stores import LONG_S, U1, U2, complete, failure, held, key, reply
from worker.core.claims import Key
from worker.core.doubt_window import DoubtWindow
from worker.core.records import CommandRecord, UuidOwner
from worker.core.redis_address import RedisAddress
from worker.dev.services.ports import free_port
from worker.errors import StoreRefused, StoreUnavailable
from worker.idempotency.records import RecordReader
from worker.idempotency.redis import RedisStore

NOW = datetime.now(UTC).replace(microsecond=0)
DOUBT = DoubtWindow(NOW - timedelta(minutes=2), NOW - timedelta(minutes=1))
TTL_S = 3600
BILLING, METERING, UNNAMED = (replace(key("a"), app_id=name) for name in ("billing", "metering", ""))


class Rig:
    """A store as workers use it, a reader as an operator does, and direct access to their Redis."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.namespace = uuid4().hex
        self.redis: Any = redis.Redis.from_url(url)
        self.store = self.new_store(LONG_S)
        self.reader = RecordReader(RedisAddress.parse(url), self.namespace)

    def new_store(self, lease_s: float) -> RedisStore:
        return RedisStore(self.url, self.namespace, ttl_s=TTL_S, lease_s=lease_s)

    async def look(self, source: str | None = None, *others: str) -> list[CommandRecord]:
        return [replace(found, kept_until=None) for found in await self.reader.look("a", source, others)]

    async def close(self) -> None:
        await self.store.close()
        await self.reader.close()
        self.redis.close()


@pytest.fixture
async def rig(redis_url: str) -> AsyncIterator[Rig]:
    made = Rig(redis_url)
    yield made
    await made.close()


async def finish(rig: Rig, of: Key, uuid: str) -> None:
    await complete(rig.store, held(await rig.store.claim(of, NOW)), reply("a", uuid))


async def test_nothing_is_known_of_a_command_without_a_record(rig: Rig) -> None:
    assert await rig.look() == await rig.look("billing") == []


async def test_a_claimed_command_is_in_progress(rig: Rig) -> None:
    await rig.store.claim(BILLING, NOW)
    assert await rig.look() == [CommandRecord("a", "billing", "in_progress", since=NOW)]


async def test_an_arrived_command_is_not_sent(rig: Rig) -> None:
    await rig.store.claim(replace(key("other"), match_key=b"other" * 3), NOW)  # begins the epoch
    await rig.store.note_arrival(BILLING, datetime.now(UTC) + timedelta(seconds=LONG_S))
    assert await rig.look() == [CommandRecord("a", "billing", "not_sent")]


async def test_a_released_command_is_not_sent_or_in_doubt(rig: Rig) -> None:
    await rig.store.release(held(await rig.store.claim(BILLING, NOW)), None)
    assert await rig.look() == [CommandRecord("a", "billing", "not_sent")]
    await rig.store.release(held(await rig.store.claim(BILLING, NOW)), DOUBT)
    assert await rig.look() == [CommandRecord("a", "billing", "in_doubt", DOUBT.since, DOUBT.until)]


async def test_a_command_whose_worker_died_is_in_doubt_from_its_claim_to_the_end_of_the_lease(rig: Rig) -> None:
    brief = rig.new_store(0.001)
    await brief.claim(BILLING, NOW)
    await brief.close()
    while (found := (await rig.look())[0]).state == "in_progress":
        pass  # only the clock of Redis ends a lease
    assert (found.state, found.since, found.was_abandoned) == ("in_doubt", NOW, True)
    assert found.until is not None
    assert found.until >= NOW


async def test_a_finished_command_has_its_reply_and_its_result(rig: Rig) -> None:
    await finish(rig, BILLING, U1)
    [found] = await rig.look()
    assert (found.state, found.reply, found.result) == ("finished", reply("a", U1), None)
    result = Result(
        command_id="a", uuid=U1, imei="001234567890123", result="executed", confirm_status="SUCCESS",
        sent_at=NOW, confirmed_at=NOW, observed_at=NOW,
    )  # fmt: skip
    await rig.store.first_results([("billing", result)])
    [found] = await rig.look()
    assert found.result == result


async def test_a_failed_command_has_its_error(rig: Rig) -> None:
    await complete(rig.store, held(await rig.store.claim(UNNAMED, NOW)), failure("a"))
    [found] = await rig.look()
    assert (found.source, found.state, found.reply) == ("", "finished", failure("a"))


async def test_each_record_says_until_when_it_is_kept(rig: Rig) -> None:
    await finish(rig, BILLING, U1)
    [found] = await rig.reader.look("a", None, [])
    assert found.kept_until is not None
    assert timedelta(0) < found.kept_until - datetime.now(UTC) <= timedelta(seconds=TTL_S + 5)


async def test_an_id_of_two_systems_has_two_records(rig: Rig) -> None:
    """The second one's is found by its name only: which systems there are is not recorded."""
    await finish(rig, BILLING, U1)
    await finish(rig, METERING, U2)
    for source, uuid in (("billing", U1), ("metering", U2)):
        [found] = await rig.look(source)
        assert (found.source, found.reply) == (source, reply("a", uuid))
    assert await rig.look("third") == []
    assert [found.source for found in await rig.look()] == ["billing"]
    assert [found.source for found in await rig.look(None, "metering", "third")] == ["billing", "metering"]


async def test_a_record_of_an_earlier_version_is_anyones(rig: Rig) -> None:
    await finish(rig, BILLING, U1)
    rig.redis.hdel(f"{{{rig.namespace}}}:command:a", "app")
    assert [(found.source, found.state) for found in await rig.look("metering")] == [(None, "finished")]


async def test_uuids_lead_to_their_commands(rig: Rig) -> None:
    await finish(rig, BILLING, U1)
    await finish(rig, METERING, U2)
    rig.redis.set(f"{{{rig.namespace}}}:uuid:42742677", "?guess")
    rig.redis.set(f"{{{rig.namespace}}}:uuid:odd", b"\xff no owner")
    rig.redis.rpush(f"{{{rig.namespace}}}:uuid:list", "x")
    found = await rig.reader.owners([U1.upper(), U2, "42742677", "odd", "list", "unknown"])
    assert found == {
        U1.upper(): UuidOwner("a", None, is_certain=True),
        U2: UuidOwner("a", "metering", is_certain=True),
        "42742677": UuidOwner("guess", None, is_certain=False),
    }


async def test_a_reply_that_is_too_large_is_not_loaded(rig: Rig) -> None:
    await finish(rig, BILLING, U1)
    rig.redis.hset(f"{{{rig.namespace}}}:command:a", "reply", "x" * 100_000)
    assert [found.state for found in await rig.look()] == ["unreadable"]


async def test_what_cannot_be_read_says_so(rig: Rig) -> None:
    gone = RecordReader(RedisAddress.parse(f"redis://127.0.0.1:{free_port()}/0"), "n")
    with pytest.raises(StoreUnavailable, match="Redis: "):
        await gone.look("a", None, [])
    await gone.close()
    rig.redis.execute_command("ACL", "SETUSER", "blind", "reset", "on", ">secret", "~other:*", "+@all")
    try:
        blind = RecordReader(RedisAddress.parse(rig.url.replace("redis://", "redis://blind:secret@")), rig.namespace)
        with pytest.raises(StoreRefused, match="NOPERM"):
            await blind.look("a", None, [])
        await blind.close()
    finally:
        rig.redis.execute_command("ACL", "DELUSER", "blind")
