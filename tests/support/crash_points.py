"""Ends a worker by SIGKILL at a named point, from outside of its code: by wrapping what stands at that point."""

import functools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.startup_code import run_at_startup


def crash_at(folder: Path, point: str, times: int) -> dict[str, str]:
    """Return the environment in which a worker ends when it comes to a point for the so-manieth time."""
    return run_at_startup(folder, f"from tests.support.crash_points import install\ninstall({point!r}, {times})\n")


def install(point: str, times: int) -> None:
    """Arm a point of this process."""
    from worker.amqp.consumer import QueueConsumer
    from worker.amqp.publisher import Publisher
    from worker.flow.consumer import Consumer
    from worker.idempotency.memory import MemoryStore
    from worker.idempotency.redis import RedisStore
    from worker.onenet.client import OneNETClient
    from worker.processing.processor import Processor

    stores: list[type] = [MemoryStore, RedisStore]
    places: dict[str, tuple[list[type], str]] = {
        "claim": (stores, "claim"),
        "history": ([OneNETClient], "find_candidates"),
        "ownership": (stores, "ownership"),
        "mark": ([Consumer], "_pass_on"),
        "request": ([OneNETClient], "execute"),
        "release": (stores, "release"),
        "record": (stores, "complete"),
        "recorded": ([Processor], "_recorded"),  # by whichever thread
        "publish": ([Publisher], "publish"),
        "acknowledge": ([QueueConsumer], "acknowledge"),
    }
    moment, _, name = point.partition(" ")
    owners, method = places[name]
    left = [times]
    for owner in owners:
        setattr(owner, method, _ending(getattr(owner, method), moment == "before", left))


def _ending(wrapped: Callable[..., Any], is_before: bool, left: list[int]) -> Callable[..., Any]:
    @functools.wraps(wrapped)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if is_before:
            _count_down(left)
        result = wrapped(*args, **kwargs)
        if not is_before:
            _count_down(left)
        return result

    return wrapper


def _count_down(left: list[int]) -> None:
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
