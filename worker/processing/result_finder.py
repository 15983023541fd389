"""Finds out at the platform what became of accepted commands. It reads only: nothing is ever sent."""

from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime

from schemas.result import Result
from worker.core.clock import Clock, utc_now
from worker.core.platform import FoundStates, ResultHistories
from worker.core.results import NO_STATE, UNKNOWN_AFTER, Awaited, EntryState, decide_result
from worker.errors import HistoryUnreadable
from worker.processing.circuit_breaker import CircuitBreakers, Permit, record_unreadable

Acquire = Callable[[str | None], Awaitable[None]]
"""Takes one request from a product's rate limit, and waits until that is allowed."""


class ResultFinder:
    """Looks at the history of one device for all of its commands that are due.

    Args:
        client: reads the histories.
        breakers: tell of which products commands may be sent, or a probe is due; of others no result is looked up.
        history_breakers: tell of which products histories may be read.
        delays_s: seconds before each look; the last repeats.
        acquire: takes the share of the rate limit that looks have; None: there is no limit.
        now: the time, aware.
    """

    def __init__(
        self,
        client: ResultHistories,
        breakers: CircuitBreakers,
        history_breakers: CircuitBreakers,
        delays_s: Sequence[int],
        acquire: Acquire | None,
        now: Clock = utc_now,
    ) -> None:
        self._client = client
        self._breakers = breakers
        self._history_breakers = history_breakers
        self._delays_s = delays_s
        self._acquire = acquire
        self._now = now

    async def find(self, product: str | None, imei: str, due: Sequence[Awaited]) -> list[Result | Awaited]:
        """Return for each command its result, or when to look again.

        Args:
            product: whose device it is.
            imei: the device.
            due: its commands.
        """
        found, is_paused = FoundStates({}), False
        if self._client.knows(product):  # otherwise it is unknown in the end
            # With no command to probe a paused product, looks go on: history breakers are opened by their own failures.
            permit = self._history_breakers.try_acquire(product) if self._breakers.allows_probe(product) else None
            if permit is None:
                return [self._put_off(each) for each in due]
            try:
                found = await self._read(product, imei, due)
                self._record(found.error, permit, product, imei)
                is_paused = permit.is_paused
            finally:
                permit.release()
        platform_now = self._client.now(product)
        return [
            self._settle(each, found.states.get(each.uuid, NO_STATE), found.error, platform_now, is_paused=is_paused)
            for each in due
        ]

    def _settle(
        self,
        awaited: Awaited,
        state: EntryState,
        error: HistoryUnreadable | None,
        platform_now: datetime,
        *,
        is_paused: bool,
    ) -> Result | Awaited:
        """Return what becomes of a command after a look, which may have failed before it came to its entry."""
        now, is_over = self._now(), platform_now >= awaited.unknown_at + UNKNOWN_AFTER
        if state == NO_STATE and error is not None:
            if error.is_throttled or error.is_rate_limited or (is_paused and not is_over):
                return self._put_off(awaited)
            if error.is_outage and not is_over:  # the platform may only be down at this moment
                return awaited.after_look(now, platform_now, self._delays_s)
        result = decide_result(awaited, state, platform_now, now)
        return result or awaited.after_look(now, platform_now, self._delays_s)

    async def _read(self, product: str | None, imei: str, due: Sequence[Awaited]) -> FoundStates:
        acquire = self._acquire
        since = [each.cached_since for each in due]
        known = [moment for moment in since if moment is not None]
        return await self._client.find_states(
            product,
            imei,
            min(known) if len(known) == len(since) else None,
            {each.uuid for each in due},
            None if acquire is None else lambda: acquire(product),
        )

    def _record(self, error: HistoryUnreadable | None, permit: Permit, product: str | None, imei: str) -> None:
        """Tell the breakers what a look says of the platform.

        A device that was deleted may be refused like a wrong key. That begins no pause, which would hold up other
        devices: a wrong key is refused for commands too.
        """
        if error is None:
            permit.record_success()
        elif permit.is_paused or not error.is_refused:
            record_unreadable(error, permit, self._breakers, product, imei)

    def _put_off(self, awaited: Awaited) -> Awaited:
        """Look later, with no look used up: the platform, or the rate limit, allows none now."""
        return awaited.later(self._now(), self._delays_s[0])
