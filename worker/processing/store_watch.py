"""Notices when the store cannot be used, says so once, and asks it until it can."""

import asyncio
import time
from collections.abc import Awaitable, Callable

from worker.core.claims import IdempotencyStore
from worker.errors import StoreRefused, StoreUnavailable, StoreUnusable
from worker.telemetry.logs import get_logger

PROBE_INTERVAL_S = 1.0

log = get_logger()


class StoreWatch:
    """Tells whether commands can be claimed and recorded.

    A store that refuses all calls is unavailable from then on, any other once the probe fails too: a single lost
    connection, or one command with odd records, stops nothing.

    Args:
        store: to watch.
        ping: raises StoreUnavailable if the store, or whatever else a command needs of its server, cannot be used.

    Attributes:
        reason: why the store cannot be used; None: it can.
        on_change: called when the store becomes available or unavailable.
    """

    on_change: Callable[[], object]

    def __init__(self, store: IdempotencyStore, ping: Callable[[], Awaitable[object]]) -> None:
        self._ping = ping
        self._has_failed = asyncio.Event()
        store.on_unavailable = self.note
        self.reason: str | None = None
        self._unavailable_since = 0.0
        self.on_change = _do_nothing

    @property
    def outage_s(self) -> float:
        """For how long the store cannot be used, in seconds; 0: it can."""
        return 0.0 if self.reason is None else time.monotonic() - self._unavailable_since

    @property
    def is_available(self) -> bool:
        """Whether the store can be used."""
        return self.reason is None

    async def run(self) -> None:
        """Watch the store until cancelled.

        Raises:
            StoreUnusable: it will never be usable.
        """
        while True:
            self._has_failed.clear()
            await self._probe()
            while self.reason is not None:
                await asyncio.sleep(PROBE_INTERVAL_S)  # a refusal that lasts is asked about once a second
                await self._probe()
            await self._has_failed.wait()

    async def _probe(self) -> None:
        try:
            await self._ping()
        except StoreUnusable:
            raise
        except StoreUnavailable as exc:
            self._set_unavailable(str(exc))
        else:
            if self.reason is not None:
                self.reason = None
                log.info("store_available")
                self.on_change()

    def note(self, error: StoreUnavailable) -> None:
        """Note that a call for a command has failed."""
        if isinstance(error, StoreRefused) and error.concerns_all:
            self._set_unavailable(str(error))
        self._has_failed.set()

    def _set_unavailable(self, reason: str) -> None:
        is_news, self.reason = self.reason is None, reason
        if is_news:
            self._unavailable_since = time.monotonic()
            log.error("store_unavailable", reason=reason)
            self.on_change()


def _do_nothing() -> None:
    pass
