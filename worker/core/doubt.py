"""The time within which a command may have been sent although nobody knows what became of it."""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Self

_OPEN = ".."  # an open end as in ISO 8601-2


@dataclass(frozen=True, slots=True)
class DoubtWindow:
    """Between these two moments a request may have been under way; outside of them none was that is in doubt.

    ``since``: not before this, aware; None where nothing tells. ``until``: not after this, aware.
    """

    since: datetime | None
    until: datetime

    def union(self, other: "DoubtWindow | None") -> "DoubtWindow":
        """Return the shortest doubt that covers both."""
        if other is None:
            return self
        since = None if self.since is None or other.since is None else min(self.since, other.since)
        return DoubtWindow(since, max(self.until, other.until))

    def __str__(self) -> str:
        """Write it as it travels: an ISO 8601 interval, ``..`` for an open beginning."""
        return f"{_OPEN if self.since is None else _text(self.since)}/{_text(self.until)}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what ``str`` wrote.

        Raises:
            ValueError: it is not such a text.
        """
        since, _, until = text.partition("/")
        return cls(None if since == _OPEN else _moment(since), _moment(until))


def _text(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="milliseconds")


def _moment(text: str) -> datetime:
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        raise ValueError("must have an offset")
    return moment
