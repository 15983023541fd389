"""Waiting for what must happen, in this process or in another."""

import asyncio
from collections.abc import Callable

PATIENCE_S = 90  # how long a test waits for an expected event: longer than the longest wait between two probes


async def until(condition: Callable[[], object]) -> None:
    """Let the event loop run until a condition holds.

    Raises:
        TimeoutError: it did not hold in time.
    """
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - other threads and servers change the condition
            await asyncio.sleep(0.001)
