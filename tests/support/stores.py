"""Keys, replies and short calls for the tests of the idempotency stores."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import TypeVar
from uuid import UUID

from schemas.reply import Reply, ReplyError
from tests.support.waiting import PATIENCE_S
from worker.core.claims import Claim, IdempotencyStore, Key, KnownNotSent, Lease, Unresolved, Unseen
from worker.core.doubt_window import DoubtWindow
from worker.core.ownership import Assigned, Assignment, assign_uuid

NOW = datetime(2026, 8, 5, 12, tzinfo=UTC)
DOUBT = DoubtWindow(NOW, NOW + timedelta(seconds=13))
LONG_S, SHORT_S = 600, 0.2
T = TypeVar("T")
U, U1, U2, V = (str(UUID(int=number)) for number in range(4))


def key(command_id: str, content_hash: bytes = b"1" * 16, match_key: bytes = b"match" * 3) -> Key:
    """Return a key; by default all of them are lookalikes."""
    return Key(command_id, content_hash, match_key)


def reply(command_id: str, uuid: str | None = None) -> Reply:
    return Reply(
        command_id=command_id, status="accepted", uuid=uuid, imei="001234567890123", attempts=1, completed_at=NOW
    )


def failure(command_id: str, completed_at: datetime = NOW) -> Reply:
    error = ReplyError(code="outcome_unknown", message="nobody can tell")
    return Reply(command_id=command_id, status="failed", error=error, attempts=1, completed_at=completed_at)


def rejection(command_id: str, text: str) -> Reply:
    error = ReplyError(code="onenet_rejected", message=text, errno=1)
    return Reply(command_id=command_id, status="rejected", error=error, attempts=1, completed_at=NOW)


def held(claim: Claim) -> Lease:
    """Return the lease that a claim granted."""
    assert isinstance(claim, Unseen | KnownNotSent | Unresolved)
    return claim.lease


async def until(is_wanted: Callable[[T], bool], call: Callable[[], Awaitable[T]]) -> T:
    """Repeat a call until its result is the wanted one; returns that."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            result = await call()
            if is_wanted(result):
                return result
            await asyncio.sleep(0.01)  # only the clock of the store can end a lease or a record


async def assign(
    store: IdempotencyStore, lease: Lease, likely: Sequence[str], unlikely: Sequence[str] = ()
) -> Assignment:
    """Assign one of the uuids to a command by the facts of its store, as the worker does."""
    facts = await store.ownership(lease, [*likely, *unlikely])
    return assign_uuid(lease.owner_id, likely, unlikely, facts)


async def complete(store: IdempotencyStore, lease: Lease, outcome: Reply, *, is_guess: bool = False) -> None:
    await store.complete(lease, outcome, DOUBT, is_guess=is_guess)


async def recover(
    store: IdempotencyStore, lease: Lease, likely: Sequence[str], unlikely: Sequence[str] = ()
) -> Assigned:
    """Assign one of the uuids to a command and record it as the outcome."""
    assignment = await assign(store, lease, likely, unlikely)
    assert isinstance(assignment, Assigned)
    await complete(store, lease, reply(lease.key.command_id, assignment.uuid), is_guess=assignment.is_guess)
    return assignment
