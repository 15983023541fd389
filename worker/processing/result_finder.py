"""Finds out at the platform what became of accepted commands. It reads only: nothing is ever sent."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import datetime

from schemas.result import Result
from worker.core.clock import Clock, utc_now
from worker.core.platform import ResultHistories
from worker.core.results import NO_STATE, UNKNOWN_AFTER, Awaited, EntryState, decide_result
from worker.core.uuids import canonical_uuid
from worker.errors import HistoryUnreadable
from worker.processing.circuit_breaker import CircuitBreakers, record_unreadable
from worker.processing.recent_reads import Read, RecentReads

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
        self._recent = RecentReads()

    async def find(self, product: str | None, imei: str, due: Sequence[Awaited]) -> list[Result | Awaited]:
        """Return for each command its result, or when to look again.

        Args:
            product: whose device it is.
            imei: the device.
            due: its commands.
        """
        read, now = self._recent.get(product, imei), self._client.now(product)
        known = [self._known(each, read, now) for each in due]
        others = [each for each, found in zip(due, known, strict=True) if found is None]
        looked_up = iter(await self._look(product, imei, others) if others else [])
        return [next(looked_up) if found is None else found for found in known]

    async def _look(self, product: str | None, imei: str, due: Sequence[Awaited]) -> list[Result | Awaited]:
        began_at = self._client.now(product)
        states: Mapping[str, EntryState] = {}
        is_outage = False
        if self._client.knows(product):  # otherwise it is unknown in the end
            # With no command to probe a paused product, looks go on: history breakers are opened by their own failures.
            permit = self._history_breakers.try_acquire(product) if self._breakers.allows_probe(product) else None
            if permit is None:
                return self._put_off(product, due)
            try:
                states = await self._read(product, imei, due)
                permit.record_success()
            except HistoryUnreadable as exc:
                record_unreadable(exc, permit, self._breakers, product, imei)
                if permit.is_paused or exc.is_throttled or exc.is_rate_limited:
                    return self._put_off(product, due)
                is_outage = exc.is_outage
            finally:
                permit.release()
        now, observed_at = self._client.now(product), self._now()
        wanted = {canonical_uuid(each.uuid) for each in due}
        others = {uuid: state for uuid, state in states.items() if uuid not in wanted}
        self._recent.add(product, imei, Read(began_at, observed_at, others))
        found: list[Result | Awaited] = []
        for each in due:
            may_end_soon = is_outage and now < each.unknown_at + UNKNOWN_AFTER
            state = states.get(canonical_uuid(each.uuid), NO_STATE)
            result = None if may_end_soon else decide_result(each, state, now, observed_at)
            found.append(result or each.after_look(now, self._delays_s))
        return found

    def _known(self, awaited: Awaited, read: Read | None, now: datetime) -> Result | Awaited | None:
        """Return what an earlier read says, None if it does not do for the look that is due."""
        state = None if read is None else read.states.get(canonical_uuid(awaited.uuid))
        if read is None or state is None or not awaited.is_served_by(read.began_at, now, self._delays_s):
            return None
        result = decide_result(awaited, state, read.began_at, read.observed_at)
        return result or awaited.after_look(now, self._delays_s)

    async def _read(self, product: str | None, imei: str, due: Sequence[Awaited]) -> dict[str, EntryState]:
        acquire = self._acquire
        since = min(each.accepted_at for each in due)
        return await self._client.find_states(
            product, imei, since, {each.uuid for each in due}, None if acquire is None else lambda: acquire(product)
        )

    def _put_off(self, product: str | None, due: Sequence[Awaited]) -> list[Result | Awaited]:
        """Look later, with no look used up: the platform, or the rate limit, allows none now.

        The longer an outage lasts the later, as with commands: else all that wait would come again and again.
        """
        now = self._client.now(product)
        outage_s = max(each.suggested_delay_s(product) for each in (self._breakers, self._history_breakers))
        delay_s = max(self._delays_s[0], min(outage_s, max(self._delays_s)))
        return [each.later(now, delay_s) for each in due]
