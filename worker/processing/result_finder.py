"""Finds out at the platform what became of accepted commands. It reads only: nothing is ever sent."""

from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime

from schemas.result import Result
from worker.core.claims import IdempotencyStore
from worker.core.clock import Clock, utc_now
from worker.core.platform import FoundStates, ResultHistories
from worker.core.results import NO_STATE, Awaited, EntryState, decide_result
from worker.core.uuids import canonical_uuid
from worker.errors import HistoryUnreadable, StoreError
from worker.processing.circuit_breaker import CircuitBreakers, Permit, record_unreadable
from worker.processing.recent_reads import Read, RecentReads

Acquire = Callable[[str | None], Awaitable[None]]
"""Takes one request from a product's rate limit, and waits until that is allowed."""
_NOT_CONFIGURED = HistoryUnreadable("the product is not configured")


class ResultFinder:
    """Looks at the history of one device for all of its commands that are due.

    Args:
        client: reads the histories.
        store: records results.
        breakers: tell of which products the platform answers, or a probe is due; of others no result is looked up.
        history_breakers: tell of which products histories may be read.
        delays_s: seconds before each look; the last repeats.
        store_outage_s: tells for how long the store cannot be used, in seconds; 0: it can.
        acquire: takes the share of the rate limit that looks have; None: there is no limit.
        now: the time, aware.
    """

    def __init__(
        self,
        client: ResultHistories,
        store: IdempotencyStore,
        breakers: CircuitBreakers,
        history_breakers: CircuitBreakers,
        delays_s: Sequence[int],
        store_outage_s: Callable[[], float],
        acquire: Acquire | None,
        now: Clock = utc_now,
    ) -> None:
        self._client = client
        self._store = store
        self._breakers = breakers
        self._history_breakers = history_breakers
        self._delays_s = delays_s
        self._store_outage_s = store_outage_s
        self._acquire = acquire
        self._now = now
        self._recent = RecentReads()
        # Since the last call of was_hindered: products of which a look failed or was put off, and those that were read.
        self._hindered: set[str | None] = set()
        self._read_products: set[str | None] = set()

    def was_hindered(self) -> bool:
        """Tell whether no look at some product succeeded since the last call, though it was tried.

        Another worker may be able to look: it may reach the platform or the store, or know the product.
        """
        found = self._hindered - self._read_products
        self._hindered.clear()
        self._read_products.clear()
        return bool(found)

    async def find(self, product: str | None, imei: str, due: Sequence[Awaited]) -> list[Result | Awaited]:
        """Return for each command its result, which is recorded by then, or when to look again.

        Args:
            product: whose device it is.
            imei: the device.
            due: its commands.
        """
        if self._store_outage_s():  # nothing that is found could be recorded
            self._hindered.add(product)
            return [self._put_off(product, each) for each in due]
        read, now = self._recent.get(product, imei), self._client.now(product)
        known = [self._known(each, read, now) for each in due]
        others = [each for each, found in zip(due, known, strict=True) if found is None]
        looked_up = iter(await self._look(product, imei, others) if others else [])
        return await self._recorded(due, [next(looked_up) if found is None else found for found in known])

    async def _recorded(self, due: Sequence[Awaited], found: Sequence[Result | Awaited]) -> list[Result | Awaited]:
        """Record the results among what was found; where another delivery was first, its result is returned."""
        results = [(awaited.app_id, each) for awaited, each in zip(due, found, strict=True) if isinstance(each, Result)]
        if not results:
            return list(found)
        try:
            on_record = iter(await self._store.first_results(results))
        except StoreError:
            for awaited in due:
                self._hindered.add(awaited.product)
                self._read_products.discard(awaited.product)
            return [
                self._put_off(awaited.product, awaited) if isinstance(each, Result) else each
                for awaited, each in zip(due, found, strict=True)
            ]
        return [next(on_record) if isinstance(each, Result) else each for each in found]

    async def _look(self, product: str | None, imei: str, due: Sequence[Awaited]) -> list[Result | Awaited]:
        began_at, platform_began_at = self._now(), self._client.now(product)
        found, is_paused = FoundStates({}, _NOT_CONFIGURED), False
        if self._client.knows(product):  # otherwise it is unknown in the end
            # With no command to probe a paused product, looks go on: history breakers are opened by their own failures.
            permit = self._history_breakers.try_acquire(product) if self._breakers.allows_reading(product) else None
            if permit is None:
                self._hindered.add(product)
                return [self._put_off(product, each) for each in due]
            try:
                found = await self._read(product, imei, due)
                self._record(found.error, permit, product, imei)
                is_paused = permit.is_paused or not self._breakers.allows(product)
            finally:
                permit.release()
        (self._read_products if found.error is None else self._hindered).add(product)
        wanted = [canonical_uuid(each.uuid) for each in due]
        others = {uuid: state for uuid, state in found.states.items() if uuid not in wanted}
        self._recent.add(product, imei, Read(began_at, platform_began_at, self._now(), others))
        states = [found.states.get(uuid, NO_STATE) for uuid in wanted]
        platform_now = self._client.now(product)
        return [
            self._settle(product, each, state, found.error, platform_now, is_paused=is_paused)
            for each, state in zip(due, states, strict=True)
        ]

    def _known(self, awaited: Awaited, read: Read | None, platform_now: datetime) -> Result | Awaited | None:
        """Return what needs no look: its time has not come, or an earlier read says enough. None: a look is needed."""
        if awaited.valid_at is not None and platform_now < awaited.valid_at:  # by a clock that was not known before
            return awaited.later(self._now(), (awaited.valid_at - platform_now).total_seconds())
        state = None if read is None else read.states.get(canonical_uuid(awaited.uuid))
        if read is None or state is None:
            return None
        if not awaited.is_served_by(read.began_at, read.platform_began_at, platform_now, self._delays_s):
            return None
        result = decide_result(awaited, state, read.platform_began_at, read.observed_at)
        return result or awaited.after_look(self._now(), platform_now, self._delays_s)

    def _settle(
        self,
        product: str | None,
        awaited: Awaited,
        state: EntryState,
        error: HistoryUnreadable | None,
        platform_now: datetime,
        *,
        is_paused: bool,
    ) -> Result | Awaited:
        """Return what becomes of a command after a look, which may have failed before it came to its entry."""
        now = self._now()
        if state == NO_STATE and error is not None:
            if error.is_rate_limited:
                return self._put_off(product, awaited)
            uses_none_up = error.is_throttled or is_paused
            awaited = awaited.unread(now, platform_now, may_be_over_soon=uses_none_up or error.is_outage)
            if not awaited.is_given_up(now, self._delays_s):
                if uses_none_up:
                    return self._put_off(product, awaited)
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
        elif error.is_outage:  # perhaps of this history only, which is looked up again and again
            permit.record_failure(f"the command history: {error}", error.retry_after_s, device=imei)
        elif permit.is_paused or not error.is_refused:
            record_unreadable(error, permit, self._breakers, product, imei)

    def _put_off(self, product: str | None, awaited: Awaited) -> Awaited:
        """Look later, with no look used up: the platform, the rate limit or the store allows none now.

        The longer an outage lasts the later, as with commands: else all that wait would come again and again.
        """
        outages_s = (each.suggested_delay_s(product) for each in (self._breakers, self._history_breakers))
        outage_s = max(self._store_outage_s(), *outages_s)
        return awaited.later(self._now(), max(self._delays_s[0], min(outage_s, max(self._delays_s))))
