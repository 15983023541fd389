"""How far the platform's clock is from ours, by the Date of its answers.

The platform compares a command's times with its own clock, so what has passed is decided on that clock.
Source: https://www.rfc-editor.org/rfc/rfc9110#field.date
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from worker.onenet.answers import http_date
from worker.onenet.response import Response
from worker.telemetry.logs import get_logger

NOTABLE_S = 5.0  # two synchronized clocks never differ by so much
_LATEST = 5
_RECENT_S = 60.0

log = get_logger()


class PlatformClock:
    """Estimates the offset of one platform's clock.

    It is the middle one of the latest answers' offsets, of two the smaller, so that one odd Date, such as that of a
    stale page, changes nothing once there are others.

    Args:
        platform: the platform's URL, for the log.
    """

    def __init__(self, platform: str) -> None:
        self.offset_s = 0.0
        """Seconds by which the platform's clock is ahead of ours."""
        self.highest_s = 0.0
        """The highest offset so far, at least 0: a command may have been sent while it held."""
        self.lowest_s = 0.0
        """The lowest offset so far, at most 0."""
        self.asking = asyncio.Lock()
        """Held while the platform is asked for its time."""
        self.asked_at = -math.inf
        """When the platform was last asked for its time, on the monotonic clock."""
        self._platform = platform
        self._offsets_s: deque[float] = deque(maxlen=_LATEST)
        self._observed_at = -math.inf  # monotonic
        self._epoch = 0.0  # of the monotonic clock on ours, when last observed: it changes if ours is set
        self._reported_s = 0.0
        self._last_date: tuple[str, datetime | None] = "", None  # most answers have the Date of the one before

    def now(self) -> datetime:
        """Return the time on the platform's clock, aware."""
        return datetime.now(UTC) + timedelta(seconds=self.offset_s)

    def earliest_now(self) -> datetime:
        """Return the time on the platform's clock, or on ours if that is earlier and the platform's is not certain."""
        ours = datetime.now(UTC)
        offset_s = self.offset_s if self.is_certain else min(0.0, self.offset_s)
        return ours + timedelta(seconds=offset_s)

    @property
    def is_agreed(self) -> bool:
        """Whether the last two answers agree, and our clock was not set since."""
        return self._is_known and _agree([*self._offsets_s][-2:])

    @property
    def is_certain(self) -> bool:
        """Whether the last two answers agree, and the last one is recent."""
        return self.is_agreed and time.monotonic() - self._observed_at < _RECENT_S

    @property
    def _is_known(self) -> bool:
        return bool(self._offsets_s) and abs(_epoch() - self._epoch) < NOTABLE_S

    def observe(self, response: Response, sent_at: datetime, received_at: datetime) -> float | None:
        """Take the Date of an answer into account.

        Args:
            response: an answer of the platform, and not of something in front of it.
            sent_at: when its request was sent, aware.
            received_at: when it was received, aware.

        Returns:
            The offset by this answer alone, in seconds; None if it has no Date.
        """
        offset_s = self.offset_by(response, sent_at, received_at)
        if offset_s is None:
            return None
        if not self._is_known:
            self._offsets_s.clear()
        self._offsets_s.append(offset_s)
        self._observed_at, self._epoch = time.monotonic(), _epoch()
        if offset_s != self.offset_s or self._reported_s:
            self.offset_s = sorted(self._offsets_s, key=abs)[(len(self._offsets_s) - 1) // 2]
            self.highest_s = max(self.highest_s, self.offset_s)
            self.lowest_s = min(self.lowest_s, self.offset_s)
            self._report()
        return offset_s

    def offset_by(self, response: Response, sent_at: datetime, received_at: datetime) -> float | None:
        """Return the offset by one answer alone, in seconds; None if it has no Date. Arguments as for ``observe``."""
        date = self._date_of(response)
        return None if date is None else least_offset_s(date, sent_at, received_at)

    def _date_of(self, response: Response) -> datetime | None:
        text = response.header("date") or ""
        if text != self._last_date[0]:
            self._last_date = text, http_date(text)
        return self._last_date[1]

    def _report(self) -> None:
        """Log that the clocks differ, and again when they differ by much more or less, or agree."""
        is_notable = abs(self.offset_s) > NOTABLE_S
        change_s = abs(self.offset_s - self._reported_s)
        if change_s <= max(NOTABLE_S, abs(self._reported_s) / 2) or not (is_notable or self._reported_s):
            return
        if not is_notable and any(abs(offset_s) > NOTABLE_S for offset_s in self._offsets_s):
            return  # two machines of the platform differ: it would be said in turn
        offset_s = round(self.offset_s, 1)
        self._reported_s = self.offset_s if is_notable else 0.0
        if is_notable:
            hint = "times of commands are compared with the platform's clock; synchronize this machine's"
            log.warning("platform_clock_differs", platform=self._platform, offset_s=offset_s, hint=hint)
        else:
            log.info("platform_clock_agrees", platform=self._platform, offset_s=offset_s)


def _epoch() -> float:
    return time.time() - time.monotonic()


def _agree(offsets_s: Sequence[float]) -> bool:
    return len(offsets_s) > 1 and max(offsets_s) - min(offsets_s) <= NOTABLE_S


def least_offset_s(date: datetime, sent_at: datetime, received_at: datetime) -> float:
    """Return by how many seconds a clock is ahead of ours at least, or behind if negative; 0 if the two may agree.

    Args:
        date: what the clock showed when the answer was made, without its fraction of a second.
        sent_at: when the request was sent; the answer was made later.
        received_at: when the answer was received.
    """
    least_s = (date - received_at).total_seconds()
    most_s = (date - sent_at).total_seconds() + 1
    return min(max(0.0, least_s), most_s)
