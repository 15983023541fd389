"""Groups of dead letters with the same reason, and with errors that differ in numbers, ids and times only. Pure."""

import re
from dataclasses import dataclass
from datetime import datetime

from worker.dead_letters.letter import Listing

_MAX_GROUPS = 1_000
_MAX_CHARS = 300  # of an error: what follows makes no other group
_VARYING = re.compile(
    r"""[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}             # a uuid
    | \d{4}-\d\d-\d\d[T ]\d\d:\d\d(?::\d\d(?:\.\d+)?)?(?:Z|[+-]\d\d:?\d\d)?       # a time
    | (?<![0-9A-Za-z])(?=[a-z]*[0-9])(?=[0-9]*[a-f])[0-9a-f]{8,}(?![0-9A-Za-z])   # a digest
    | \d+(?:[.,:]\d+)*                                                            # a number
    """,
    re.VERBOSE | re.IGNORECASE | re.ASCII,
)


@dataclass(frozen=True, slots=True)
class Group:
    """Dead letters that failed alike.

    Args:
        reason: of all of them.
        count: how many they are.
        oldest: when the first of them failed; None if none says when.
        newest: when the last of them failed.
        error: of the newest one.
        example: digest of the newest one.
    """

    reason: str
    count: int
    oldest: datetime | None
    newest: datetime | None
    error: str | None
    example: str


class Groups:
    """Puts dead letters into groups, in bounded memory."""

    def __init__(self) -> None:
        self._groups: dict[tuple[str, str], Group] = {}

    def add(self, listing: Listing) -> None:
        """Count a dead letter in its group; those are offered the oldest first."""
        key = listing.reason, _VARYING.sub("#", (listing.error or "")[:_MAX_CHARS])
        if key not in self._groups and len(self._groups) >= _MAX_GROUPS:
            key = listing.reason, "other errors"
        before = self._groups.get(key)
        times = [listing.failed_at] if listing.failed_at else []
        count = 1
        if before is not None:
            times += [each for each in (before.oldest, before.newest) if each]
            count += before.count
        oldest, newest = min(times, default=None), max(times, default=None)
        self._groups[key] = Group(listing.reason, count, oldest, newest, listing.error, listing.digest)

    def largest_first(self) -> tuple[Group, ...]:
        """Return the groups."""
        return tuple(sorted(self._groups.values(), key=lambda group: -group.count))
