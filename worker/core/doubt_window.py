"""The window of time within which a command may have been sent without a known result."""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Self

from worker.core.times import parse_instant

_OPEN = ".."  # an open end as in ISO 8601-2


@dataclass(frozen=True, slots=True)
class DoubtWindow:
    """A request may have been in flight between these two times; outside of them no request is in doubt.

    ``since``: not before this, aware; None: nothing tells. ``until``: not after this, aware.
    """

    since: datetime | None
    until: datetime

    def union(self, other: "DoubtWindow | None") -> "DoubtWindow":
        """Return the shortest window that covers both."""
        if other is None:
            return self
        since = None if self.since is None or other.since is None else min(self.since, other.since)
        return DoubtWindow(since, max(self.until, other.until))

    def __str__(self) -> str:
        """Format the window for a header: an ISO 8601 interval, ``..`` for an open beginning."""
        return f"{_OPEN if self.since is None else _format(self.since)}/{_format(self.until)}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse what ``str`` formatted.

        Raises:
            ValueError: the text is not of that form.
        """
        since, _, until = text.partition("/")
        return cls(None if since == _OPEN else parse_instant(since), parse_instant(until))


def _format(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="milliseconds")
