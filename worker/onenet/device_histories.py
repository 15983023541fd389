"""Reads the command history of a device: what may be a command in doubt, and what waits for the device."""

import asyncio
import itertools
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from urllib.parse import quote, urlencode
from zoneinfo import ZoneInfo

from schemas.onenet import HistoryDetail, HistoryItem, ResultItem
from worker.core.command import Command
from worker.core.doubt_window import DoubtWindow
from worker.core.platform import CachedCommand, Candidate, DeviceHistory, FoundStates, OwnedByOthers
from worker.core.times import platform_time
from worker.core.uuids import canonical_uuid
from worker.errors import HistoryUnreadable
from worker.onenet.account import Account
from worker.onenet.history import (
    MAX_SKEW,
    PER_PAGE,
    HistoryPages,
    Window,
    candidates,
    held_bytes,
    is_waiting,
    match,
    read_cancelling,
    read_detail,
    read_page,
    read_result_page,
)
from worker.onenet.history_memory import MAX_SEARCHES, DetailCache, EntryMemory, SearchMemory
from worker.onenet.results import cached_command, state_of
from worker.onenet.search_time import SearchTime

HISTORY = "/offline/history"
_CANCEL = "/offline/cancel"
START_MARGIN = timedelta(hours=1)  # `start` is on the platform's clock, whose offset may not be known yet
_RESULT_MARGIN = timedelta(days=1)  # for what is not known yet of the platform's clock
_KEPT = timedelta(days=179)  # the platform keeps a history for 180 days
_OWNERS_AT_ONCE = 100  # uuids that the store is asked about at once
_MAX_CANDIDATES = 100  # of one command: with so many nothing is ever decided
# Longest wait of one look for its share of the rate limit. Its messages are held meanwhile, at most 30 minutes of which
# the broker allows (its consumer_timeout).
_LOOK_RATE_WAIT_S = 600.0
_MAX_COMPARING_S = 5.0  # of processor time, for one search: the event loop does nothing else meanwhile


class DeviceHistories:
    """Reads histories, each search within the time of one request beside its waits for the rate limit.

    Args:
        platform_zone: the zone of the platform's local time.
        request_s: longest duration of one search, in seconds.
        caching_delay_s: how long after a request ended the platform may still cache it, in seconds.
        history_window_s: how long before its end a doubt window begins if its beginning is unknown, in seconds.
        acquire: takes one request from a product's rate limit before each read, and waits until that is allowed; None:
            there is no limit.
        rate_wait_s: longest wait of one search for the limit, in seconds.
        searches_at_once: how many searches of one product run at once while there is a limit.
    """

    def __init__(
        self,
        platform_zone: ZoneInfo,
        *,
        request_s: float,
        caching_delay_s: float,
        history_window_s: float,
        acquire: Callable[[str | None], Awaitable[None]] | None,
        rate_wait_s: float,
        searches_at_once: int,
    ) -> None:
        self._zone = platform_zone
        self._request_s = request_s
        self._caching_delay = timedelta(seconds=caching_delay_s)
        self._history_window = timedelta(seconds=history_window_s)
        self._acquire = acquire
        self._rate_wait_s = rate_wait_s
        self._searches_at_once = searches_at_once
        self._searches: dict[str | None, asyncio.Semaphore] = {}
        self._places = asyncio.Semaphore(MAX_SEARCHES)
        self._entries = EntryMemory()
        self._details = DetailCache()

    async def find_candidates(
        self, account: Account, command: Command, doubt: DoubtWindow, owned_by_others: OwnedByOthers
    ) -> list[Candidate]:
        """Return the entries of the device's command history that may be this command, the best first.

        Args:
            account: where the command was sent.
            command: what to look for.
            doubt: when it may have been sent.
            owned_by_others: returns the uuids that are known to belong to other commands; their entries are skipped.

        Raises:
            HistoryUnreadable: the history could not be read in full. An entry that was read, but cannot be told from
                the command, is a candidate with unclear fields.
        """
        async with self._search(command.product) as (search, memory):
            since = doubt.since or doubt.until - self._history_window
            entries, observed_s = await self._list(command, account, since, search, memory)
            # The clock may have been set since the command was cached, or be another node's: the window covers all.
            ahead_s, behind_s = max(account.clock.highest_s, observed_s), max(-account.clock.lowest_s, -observed_s)
            read_at = datetime.now(UTC) + timedelta(seconds=ahead_s)
            window = Window(doubt.since, doubt.until + self._caching_delay, read_at, ahead_s, behind_s)
            omitted_until = window.until + timedelta(seconds=ahead_s)
            items = candidates(entries, command, window, self._zone)
            uuids = [item.cmd_uuid for item in items if item.cmd_uuid]
            excluded: set[str] = set()
            for at in range(0, len(uuids), _OWNERS_AT_ONCE):
                excluded.update(await owned_by_others(uuids[at : at + _OWNERS_AT_ONCE]))
            found: list[Candidate] = []
            comparing_s = 0.0
            for item in items:
                if item.cmd_uuid not in excluded:
                    await asyncio.sleep(0)  # a detail may be known already, and odd ones take long to compare
                    detail = await self._detail(item.cmd_uuid, command, account, search)
                    began = time.thread_time()
                    candidate = match(item, detail, command, window, self._zone, omitted_until=omitted_until)
                    comparing_s += time.thread_time() - began
                    del detail  # nothing counts its objects: they are gone when this search waits again
                    if comparing_s > _MAX_COMPARING_S:
                        raise HistoryUnreadable("its entries take too long to compare")
                    if candidate is not None:
                        found.append(candidate)
                if len(found) > _MAX_CANDIDATES:
                    raise HistoryUnreadable(f"more than {_MAX_CANDIDATES} of its entries may be the command")
            return found

    async def find_states(
        self,
        account: Account,
        imei: str,
        since: datetime | None,
        uuids: Collection[str],
        acquire: Callable[[], Awaitable[None]] | None,
    ) -> FoundStates:
        """Return what the history of a device says of cached commands, and of some others.

        Args:
            account: where the commands were sent.
            imei: the device.
            since: when the first of them was cached, on our clock; None: unknown.
            uuids: of the commands.
            acquire: takes one request from the rate limit for each read, and waits until that is allowed.
        """
        begins, order = account.clock.now() - _KEPT, "DESC"
        if since is not None:
            begins = max(begins, since + timedelta(seconds=account.clock.lowest_s) - _RESULT_MARGIN)
            # Later on from the oldest entry: a device may have had thousands of commands since.
            order = "DESC" if datetime.now(UTC) - since < 2 * _RESULT_MARGIN else "ASC"
        # Commands cached during the read move an entry to a later page, on which it is found as well.
        query = {"imei": imei, "start": platform_time(begins, self._zone), "sort": order, "per_page": PER_PAGE}
        wanted = {canonical_uuid(uuid) for uuid in uuids}
        pages, found, found_bytes = HistoryPages(), defaultdict[str, list[ResultItem]](list), 0
        search = SearchTime(self._request_s, acquire, _LOOK_RATE_WAIT_S)
        error: HistoryUnreadable | None = None
        try:
            await search.acquire_ahead()  # a look that waits for it takes no place from the searches of others
            async with self._memory(search) as memory:
                for number in itertools.count(1):
                    path = f"{HISTORY}?{urlencode(query | {'page': number})}"
                    page, _ = await account.read(path, search, read_result_page)
                    for item in page.items:
                        uuid = canonical_uuid(item.cmd_uuid)
                        if uuid in wanted or uuid in found or len(found) < PER_PAGE:
                            found[uuid].append(item)
                            found_bytes += held_bytes(item)
                    has_new = pages.take(page)  # whatever its total says, and however often it has an entry
                    if wanted <= found.keys() or pages.is_complete or not has_new:
                        break
                    memory.hold(pages.held_bytes + found_bytes)
                    search.renew(self._request_s)
        except HistoryUnreadable as exc:
            error = exc
        return FoundStates({uuid: state_of(items, self._zone) for uuid, items in found.items()}, error)

    async def list_commands(
        self,
        account: Account,
        product: str | None,
        imei: str,
        *,
        newest_first: bool,
        is_enough: Callable[[Sequence[CachedCommand]], bool],
    ) -> DeviceHistory:
        """Return the cached commands of a device, page by page until they are enough.

        Args:
            account: where they were sent.
            product: whose device it is.
            imei: the device.
            newest_first: the order; else the oldest first.
            is_enough: tells whether what was read so far is.

        Raises:
            HistoryUnreadable: a page could not be read, or there are too many.
        """
        now = account.clock.now()
        order = "DESC" if newest_first else "ASC"
        query = {"imei": imei, "start": platform_time(now - _KEPT, self._zone), "sort": order, "per_page": PER_PAGE}
        pages, found = HistoryPages(), list[CachedCommand]()
        async with self._search(product) as (search, _):
            for number in itertools.count(1):
                path = f"{HISTORY}?{urlencode(query | {'page': number})}"
                page, _ = await account.read(path, search, read_result_page)
                new = pages.take(page)
                found += [cached_command(item, self._zone) for item in new if isinstance(item, ResultItem)]
                if is_enough(found) or pages.is_complete or not new:
                    break
                search.renew(self._request_s)
        return DeviceHistory(tuple(found), max(pages.total, len(found)), pages.is_complete)

    async def cancel(self, account: Account, product: str | None, imei: str, uuid: str) -> str | None:
        """Ask the platform to cancel one command of a device; returns why it refuses, if it says so.

        Args:
            account: where they were sent.
            product: whose device it is.
            imei: the device.
            uuid: of the command.

        Raises:
            HistoryUnreadable: no answer, or none that can be read. It may have been done.
        """
        path = f"{_CANCEL}/{quote(uuid, safe='')}?{urlencode({'imei': imei})}"
        async with self._search(product) as (search, _):
            return await account.put(path, search, read_cancelling)

    async def count_waiting(self, account: Account, command: Command, most: int) -> int:
        """Return how many commands wait at the platform for a command's device; counts no further than ``most``.

        Raises:
            HistoryUnreadable: the history could not be read far enough.
        """
        now = account.clock.now()
        query = {"imei": command.imei, "start": platform_time(now - _KEPT, self._zone), "per_page": PER_PAGE}
        pages, waiting = HistoryPages(), 0
        async with self._search(command.product) as (search, memory):
            for number in itertools.count(1):
                path = f"{HISTORY}?{urlencode(query | {'page': number})}"
                page, _ = await account.read(path, search, read_page)
                waiting += sum(is_waiting(item, now, self._zone) for item in pages.add(page))
                del page  # nothing counts its entries: they are gone when this search waits again
                if waiting >= most or pages.is_complete:
                    break
                memory.hold(pages.held_bytes)
        return min(waiting, most)

    async def read_clock(self, account: Account, command: Command) -> None:
        """Read a page of the device's history for the platform's time in its answer.

        Raises:
            HistoryUnreadable: it could not be read.
        """
        query = {"imei": command.imei, "start": platform_time(account.clock.now(), self._zone), "per_page": 1}
        async with self._search(command.product) as (search, _):
            await account.read(f"{HISTORY}?{urlencode(query)}", search, read_page)

    @asynccontextmanager
    async def _search(self, product: str | None) -> AsyncIterator[tuple[SearchTime, SearchMemory]]:
        """Begin a search: at a low rate few at once, or they would take each other's turns, and none would end.

        Raises:
            HistoryUnreadable: the rate limit, or the number of searches, allows none soon.
        """
        acquire = None if self._acquire is None else partial(self._acquire, product)
        search = SearchTime(self._request_s, acquire, self._rate_wait_s)
        async with AsyncExitStack() as stack:
            if acquire is not None:
                turns = self._searches.setdefault(product, asyncio.Semaphore(self._searches_at_once))
                await search.wait(turns.acquire())
                stack.callback(turns.release)
            yield search, await stack.enter_async_context(self._memory(search))

    @asynccontextmanager
    async def _memory(self, search: SearchTime) -> AsyncIterator[SearchMemory]:
        """Wait until one more search may hold entries, and count what it holds.

        Raises:
            HistoryUnreadable: that is not soon.
        """
        try:
            async with asyncio.timeout_at(search.deadline):
                await self._places.acquire()
        except TimeoutError as exc:
            raise HistoryUnreadable("too many histories are read at this moment", is_rate_limited=True) from exc
        try:
            with self._entries.of_one_search() as memory:
                yield memory
        finally:
            self._places.release()

    async def _detail(self, uuid: str, command: Command, account: Account, search: SearchTime) -> HistoryDetail:
        """Return the parameters of a cached command. They never change, so each detail is read once."""
        if not uuid:
            return HistoryDetail(args={})  # the platform cannot be asked for an entry without a uuid
        url = account.product.url
        known = self._details.get(url, uuid)
        if known is not None:
            return known
        path = f"{HISTORY}/{quote(uuid, safe='')}?{urlencode({'imei': command.imei})}"
        detail, _ = await account.read(path, search, read_detail)
        self._details.add(url, uuid, detail)
        return detail

    async def _list(
        self, command: Command, account: Account, since: datetime, search: SearchTime, memory: SearchMemory
    ) -> tuple[list[HistoryItem], float]:
        """Return a device's history from ``since`` on, and the seconds by which the platform's clock is ahead.

        Raises:
            HistoryUnreadable: it could not be read in full, or may have begun too late.
        """
        lowest_s = account.clock.lowest_s
        query = {
            "imei": command.imei,
            "start": platform_time(since + timedelta(seconds=lowest_s) - START_MARGIN, self._zone),
            "sort": "ASC",  # commands cached during the read are appended, and move no entry to another page
            "per_page": PER_PAGE,
        }
        pages, entries = HistoryPages(), list[HistoryItem]()
        entries_bytes = 0
        page, offset_s = await account.read(f"{HISTORY}?{urlencode(query)}", search, read_page)
        observed_s = account.clock.offset_s if offset_s is None else offset_s
        if lowest_s - observed_s > (START_MARGIN - MAX_SKEW).total_seconds():
            raise HistoryUnreadable(
                f"the platform's clock is {-observed_s:.0f} s behind ours, and not at most {-lowest_s:.0f} s"
            )
        new = pages.add(page)
        del page  # only its new entries are counted
        for number in itertools.count(2):
            entries += new
            entries_bytes += sum(map(held_bytes, new))
            memory.hold(pages.held_bytes + entries_bytes)
            if pages.is_complete:
                break
            path = f"{HISTORY}?{urlencode(query | {'page': number})}"
            new = pages.add((await account.read(path, search, read_page))[0])
        return entries, observed_s
