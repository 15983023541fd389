"""Who takes how much of a memory that is bounded for all together. Pure."""

from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class Shares(Generic[K]):
    """Bytes by holder. A holder without any is forgotten."""

    def __init__(self) -> None:
        self.total = 0
        self._by_holder: dict[K, int] = {}

    def add(self, holder: K, size: int) -> int:
        """Add bytes, some, to a holder's share; returns what it takes by then."""
        self.total += size
        share = self._by_holder[holder] = self._by_holder.get(holder, 0) + size
        return share

    def remove(self, holder: K, size: int) -> None:
        """Take bytes that were added from a holder's share."""
        self.total -= size
        share = self._by_holder[holder] - size
        if share:
            self._by_holder[holder] = share
        else:
            del self._by_holder[holder]

    def largest(self) -> K:
        """Return the holder with the largest share; there is one."""
        return max(self._by_holder, key=self._by_holder.__getitem__)
