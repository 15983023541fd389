"""How much of all command histories is held at once, in bytes, whatever the platform answers: about 16 MiB.

The bodies of MAX_SEARCHES reads are 8 MiB, what each search may always hold of entries another 2 MiB, what the searches
may hold beyond that 4 MiB, and the details that are kept 2 MiB.
"""

import sys
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

from pydantic_core import from_json, to_json

from schemas.onenet import HistoryDetail
from worker.errors import HistoryUnreadable

MAX_BODY_BYTES = 256 * 1024  # five times a full page
MAX_SEARCHES = 32
_SHARE_BYTES = 64 * 1024  # about a page of entries
_COMMON_BYTES = 4 * 1024 * 1024
_MAX_SEARCH_BYTES = 3 * 1024 * 1024  # 5,000 entries as the platform documents them, or the keys of 25,000
_DETAILS_BYTES = 2 * 1024 * 1024
_RECORD_BYTES = 300  # what one detail takes beside its JSON


class EntryMemory:
    """What all searches hold of entries. Each has a share of its own, so that long histories hinder no short one."""

    def __init__(self) -> None:
        self.free_bytes = _COMMON_BYTES

    @contextmanager
    def of_one_search(self) -> Iterator["SearchMemory"]:
        """Count what one search holds, until it ends."""
        memory = SearchMemory(self)
        try:
            yield memory
        finally:
            self.free_bytes += memory.borrowed_bytes


class SearchMemory:
    """What one search holds of entries."""

    def __init__(self, common: EntryMemory) -> None:
        self.borrowed_bytes = 0
        self._common = common

    def hold(self, held_bytes: int) -> None:
        """Record how much the search holds by now.

        Raises:
            HistoryUnreadable: that is too much, for one history or together with the others.
        """
        if held_bytes > _MAX_SEARCH_BYTES:
            raise HistoryUnreadable(f"its entries take more than {_MAX_SEARCH_BYTES} bytes")
        more_bytes = max(0, held_bytes - _SHARE_BYTES) - self.borrowed_bytes
        if more_bytes > self._common.free_bytes:
            raise HistoryUnreadable("too many other histories are long at this moment", is_rate_limited=True)
        self._common.free_bytes -= more_bytes
        self.borrowed_bytes += more_bytes


class DetailCache:
    """The details of entries, which never change. They are kept as JSON, whose size is known; the oldest go first."""

    def __init__(self) -> None:
        self._details: OrderedDict[tuple[str, str], bytes] = OrderedDict()
        self._held_bytes = 0

    def get(self, url: str, uuid: str) -> HistoryDetail | None:
        """Return the details of an entry at a platform, None if they are not known."""
        found = self._details.get((url, uuid))
        return None if found is None else HistoryDetail(**from_json(found))

    def add(self, url: str, uuid: str, detail: HistoryDetail) -> None:
        """Keep the details of an entry, in the place of those that another search has read meanwhile."""
        data = to_json({"args": detail.args, "content": detail.content}, inf_nan_mode="constants")
        former = self._details.pop((url, uuid), None)
        self._held_bytes -= 0 if former is None else _size(former)
        self._details[url, uuid] = data
        self._held_bytes += _size(data)
        while self._held_bytes > _DETAILS_BYTES:
            _, oldest = self._details.popitem(last=False)
            self._held_bytes -= _size(oldest)


def _size(data: bytes) -> int:
    return sys.getsizeof(data) + _RECORD_BYTES
