"""How long one search of a history may take."""

import asyncio
import time
from collections.abc import Awaitable, Callable

from worker.errors import HistoryUnreadable

_LONGEST_S = 600.0  # and as much of waiting for the rate limit: the broker lets messages be held for 30 minutes


class SearchTime:
    """The deadline of one search, which each wait for the rate limit extends, and how long it may wait in all.

    With ``renew`` each of its requests has the time of one, for ``_LONGEST_S`` together.

    Args:
        request_s: seconds for what the platform answers.
        acquire: takes one request from the product's rate limit, and waits until that is allowed; None: no limit.
        rate_wait_s: longest wait for the limit, in all.
    """

    def __init__(self, request_s: float, acquire: Callable[[], Awaitable[None]] | None, rate_wait_s: float) -> None:
        self.deadline = time.monotonic() + request_s
        self._end = self.deadline + _LONGEST_S
        self._acquire = acquire
        self._rate_wait_s = rate_wait_s
        self._is_ahead = False

    async def acquire(self) -> None:
        """Take one request from the rate limit.

        Raises:
            HistoryUnreadable: the limit allows none soon.
        """
        if self._acquire is not None and not self._is_ahead:
            await self.wait(self._acquire())
        self._is_ahead = False

    async def acquire_ahead(self) -> None:
        """Take the first request from the rate limit before anything else is waited for.

        Raises:
            HistoryUnreadable: the limit allows none soon.
        """
        await self.acquire()
        self._is_ahead = True

    def renew(self, request_s: float) -> None:
        """Give the next request its own time, because the platform answers."""
        self.deadline = min(time.monotonic() + request_s, self._end)

    async def wait(self, allowed: Awaitable[object]) -> None:
        """Wait for what the rate limit allows; this time does not count towards the deadline.

        Raises:
            HistoryUnreadable: the limit does not allow it soon.
        """
        began = time.monotonic()
        try:
            async with asyncio.timeout(self._rate_wait_s):
                await allowed
        except TimeoutError as exc:
            raise HistoryUnreadable("the rate limit allows no further read for now", is_rate_limited=True) from exc
        waited_s = time.monotonic() - began
        self._rate_wait_s -= waited_s
        self.deadline += waited_s
        self._end += waited_s
