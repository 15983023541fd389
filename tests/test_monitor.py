"""Which states of a worker explain that it takes no deliveries from its queue."""

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from worker.monitor import HealthMonitor
from worker.telemetry.health import STALL_S, Health

ABLE_TO_CONSUME: dict[str, Any] = {
    "is_connected": True,
    "is_publishing_impaired": False,
    "allows_any": True,
    "is_rate_limiting": False,
    "is_stopping": False,
}


async def is_live(**changes: bool) -> bool:
    """Poll the queue once of a worker that has taken none of the waiting commands for longer than the limit."""
    state = ABLE_TO_CONSUME | changes
    now = [0.0]
    health = Health(STALL_S, lambda: None, lambda: now[0])
    now[0] = STALL_S + 1
    polled = asyncio.Event()

    async def look_at_queue() -> tuple[int, int]:
        asyncio.get_running_loop().call_soon(polled.set)  # runs after the monitor has used the result
        return 1, 1

    more = {"look_at_queue": look_at_queue, "taken_at": 0.0, "longest_processing_s": 0.0}
    parts = cast("Any", SimpleNamespace(**state | more | {"allows_any": lambda: state["allows_any"]}))
    running = asyncio.create_task(HealthMonitor(parts, parts, parts, health, dict).run())
    await polled.wait()
    running.cancel()
    return health.liveness().ok


async def test_a_worker_that_could_consume_but_takes_no_commands_is_not_live() -> None:
    assert not await is_live()


@pytest.mark.parametrize("state", ABLE_TO_CONSUME)
async def test_a_worker_with_a_reason_for_taking_no_commands_stays_live(state: str) -> None:
    assert await is_live(**{state: not ABLE_TO_CONSUME[state]})
