"""A store whose every call suspends before and after its effect, as a call over a network does."""

from collections.abc import Callable, Coroutine, Sequence
from datetime import datetime
from typing import Any, TypeVar

from schemas.reply import Reply
from schemas.result import Result
from tests.support.model_loop import suspend
from worker.core.claims import Claim, Key, Lease
from worker.core.doubt_window import DoubtWindow
from worker.core.envelope import Replay
from worker.core.ownership import OwnershipFacts
from worker.idempotency.memory import MemoryStore

T = TypeVar("T")


class SuspendingStore(MemoryStore):
    """The real store in memory."""

    async def claim(self, key: Key, now: datetime, replay: Replay | None = None, *, is_first: bool = True) -> Claim:
        return await self.suspended(self.suspended_claim, key, now, replay, is_first=is_first)

    async def suspended_claim(self, key: Key, now: datetime, replay: Replay | None, *, is_first: bool) -> Claim:
        """Claim, in one step."""
        return await super().claim(key, now, replay, is_first=is_first)

    async def release(self, lease: Lease, doubt: DoubtWindow | None, *, holder_crashed: bool = False) -> None:
        await self.suspended(super().release, lease, doubt, holder_crashed=holder_crashed)

    async def owned_by_others(self, owner_id: str, uuids: Sequence[str]) -> set[str]:
        return await self.suspended(super().owned_by_others, owner_id, uuids)

    async def ownership(self, lease: Lease, uuids: Sequence[str]) -> OwnershipFacts:
        return await self.suspended(super().ownership, lease, uuids)

    async def complete(self, lease: Lease, reply: Reply, doubt: DoubtWindow | None, *, is_guess: bool = False) -> None:
        await self.suspended(super().complete, lease, reply, doubt, is_guess=is_guess)

    async def first_results(self, found: Sequence[tuple[str, Result]]) -> list[Result]:
        return await self.suspended(super().first_results, found)

    async def suspended(self, call: Callable[..., Coroutine[Any, Any, T]], *args: Any, **options: Any) -> T:
        """Make a call, with a suspension before and after its effect."""
        await suspend()
        try:
            return await call(*args, **options)
        finally:
            await suspend()
