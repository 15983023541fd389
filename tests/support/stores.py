"""Keys, replies and short calls for the tests of the idempotency stores."""

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING
from uuid import UUID

from schemas.reply import Reply
from worker.core.claims import Claim, IdempotencyStore, Key, KnownNotSent, Lease, Unresolved, Unseen
from worker.core.doubt_window import DoubtWindow

if TYPE_CHECKING:
    from worker.errors import StoreError

NOW = datetime(2026, 8, 5, 12, tzinfo=UTC)
DOUBT = DoubtWindow(NOW, NOW + timedelta(seconds=13))
U, U1, U2, V = (str(UUID(int=number)) for number in range(4))


def key(command_id: str, content_hash: bytes = b"1" * 16, match_key: bytes = b"match" * 3) -> Key:
    """Return a key; by default all of them are lookalikes."""
    return Key(command_id, content_hash, match_key)


def reply(command_id: str, uuid: str | None = None) -> Reply:
    """Return the reply that accepts a command."""
    return Reply(
        command_id=command_id, status="accepted", uuid=uuid, imei="001234567890123", attempts=1, completed_at=NOW
    )


def held(claim: Claim) -> Lease:
    """Return the lease that a claim granted."""
    assert isinstance(claim, Unseen | KnownNotSent | Unresolved)
    return claim.hold


def complete(store: IdempotencyStore, lease: Lease, outcome: Reply) -> None:
    """Record an outcome; raises the error that prevented it."""
    results: list[StoreError | None] = []
    store.complete(lease, outcome, DOUBT, results.append)
    [error] = results  # no other thread calls the store, so this one has made the round trip
    if error is not None:
        raise error
