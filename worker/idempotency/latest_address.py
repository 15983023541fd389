"""The address of Redis as the settings' files say by now."""

import asyncio
from collections.abc import Callable

from worker.core.redis_address import RedisAddress
from worker.errors import SettingsError
from worker.telemetry.logs import get_logger

log = get_logger()


class LatestAddress:
    """Reads the address again before each connection; while it cannot be used, the former one goes on.

    Args:
        address: the one of the start.
        read: reads it; called in a thread. By default the address never changes.
    """

    def __init__(self, address: RedisAddress, read: Callable[[], RedisAddress] | None = None) -> None:
        self.address = address
        self._read = read
        self._reason = ""

    async def get(self) -> RedisAddress:
        """Return the address for a new connection."""
        if self._read is None:
            return self.address
        reason = ""
        try:
            self.address = await asyncio.get_running_loop().run_in_executor(None, self._read)
        except SettingsError as exc:
            reason = "; ".join(exc.lines)
        if reason and reason != self._reason:  # once, not at each try
            log.warning("store_settings_unusable", reason=reason, hint="the former ones are tried again")
        self._reason = reason
        return self.address
