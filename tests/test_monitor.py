"""What excuses a worker that takes nothing from its queue."""

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from worker.monitor import HealthMonitor
from worker.telemetry.health import STALL_S, Health

BUSY: dict[str, Any] = {
    "is_connected": True,
    "is_publishing_impaired": False,
    "is_any_open": True,
    "waits_for_slots": False,
    "is_stopping": False,
}


async def is_live(**changes: bool) -> bool:
    """Let the pulse look once at a worker with commands in its queue, which has taken none for longer than it may."""
    facts = BUSY | changes
    now = [0.0]
    health = Health(STALL_S, lambda: None, lambda: now[0])
    now[0] = STALL_S + 1
    looked = asyncio.Event()

    async def look_at_queue() -> tuple[int, int]:
        asyncio.get_running_loop().call_soon(looked.set)  # which is behind all that the pulse does with the answer
        return 1, 1

    others = {"look_at_queue": look_at_queue, "taken_at": 0.0, "longest_handling_s": 0.0}
    parts = cast("Any", SimpleNamespace(**facts | others | {"is_any_open": lambda: facts["is_any_open"]}))
    running = asyncio.create_task(HealthMonitor(broker=parts, consumer=parts, gates=parts, health=health).run())
    await looked.wait()
    running.cancel()
    return health.liveness().is_good


def test_nothing_excuses_a_worker_that_could_take_commands() -> None:
    assert not asyncio.run(is_live())


@pytest.mark.parametrize("reason", BUSY)
def test_each_reason_for_taking_nothing_is_one(reason: str) -> None:
    assert asyncio.run(is_live(**{reason: not BUSY[reason]}))
