"""A store that refuses claims or outcomes: what expires and is known not to have been sent ends all the same."""

from datetime import datetime

import pytest

from schemas.reply import Reply
from tests.support.engine import (
    Engine,
    RecordingStore,
    a_copy,
    a_task,
    an_envelope,
    expect,
    expect_postpone,
    failure_of,
    in_doubt,
    redelivered,
)
from worker.core.claims import Claim, Key, Lease
from worker.core.doubt_window import DoubtWindow
from worker.core.envelope import Envelope, Replay
from worker.core.resolution import Postpone
from worker.errors import StoreRefused

EXPIRED = "2026-01-01T00:00:00"


class RefusingStore(RecordingStore):
    """Refuses some calls; ``known`` is what it still tells of the command: see ``is_known_not_sent``."""

    refused: str = "claim"
    known: bool | None = None

    async def is_known_not_sent(self, _key: Key) -> bool | None:
        return self.known

    async def claim(self, key: Key, now: datetime, replay: Replay | None = None, *, is_first: bool = True) -> Claim:
        if self.refused == "claim":
            raise StoreRefused("Redis: OOM: out of memory")
        return await super().claim(key, now, replay, is_first=is_first)

    async def complete(self, lease: Lease, reply: Reply, doubt: DoubtWindow | None, *, is_guess: bool = False) -> None:
        if self.refused == "complete":
            raise StoreRefused("Redis: NOPERM: the user may not do this")
        await super().complete(lease, reply, doubt, is_guess=is_guess)


@pytest.fixture
def store() -> RefusingStore:
    return RefusingStore([])


@pytest.fixture
def engine(store: RefusingStore) -> Engine:
    return Engine(store=store)


@pytest.mark.parametrize(
    ("envelope", "known"),
    [(an_envelope(), None), (an_envelope(), True), (a_copy(), None), (a_copy(attempt=2), True)],
)
async def test_a_command_that_cannot_be_claimed_expires(
    engine: Engine, store: RefusingStore, envelope: Envelope, known: bool | None
) -> None:
    store.known = known
    assert failure_of(await engine.process(a_task(envelope, expired_time=EXPIRED))).code == "expired"
    assert "request" not in engine.steps


@pytest.mark.parametrize(
    ("envelope", "known"),
    [
        (an_envelope(), False),  # it has an outcome, or is in doubt, or another delivery has it
        (redelivered(), None),
        (redelivered(), True),
        (in_doubt(), True),
        (a_copy(attempt=2), None),
        (a_copy(crash_count=1), None),
    ],
)
async def test_a_command_that_may_have_been_sent_waits_for_the_store(
    engine: Engine, store: RefusingStore, envelope: Envelope, known: bool | None
) -> None:
    store.known = known
    expect(Postpone, await engine.process(a_task(envelope, expired_time=EXPIRED)))


async def test_a_command_that_has_not_expired_waits_for_the_store(engine: Engine) -> None:
    assert expect_postpone(await engine.process(a_task())).reason == "Redis: OOM: out of memory"


async def test_a_claimed_command_expires_though_its_outcome_cannot_be_recorded(
    engine: Engine, store: RefusingStore
) -> None:
    """It expires again however often it is delivered."""
    store.refused = "complete"
    assert failure_of(await engine.process(a_task(expired_time=EXPIRED))).code == "expired"


async def test_an_outcome_that_cannot_be_recorded_is_not_told(engine: Engine, store: RefusingStore) -> None:
    store.refused = "complete"
    postpone = expect_postpone(await engine.process(a_task()))
    assert postpone.doubt is not None
    assert engine.steps.count("request") == 1
