"""Crash points: a worker kills itself with SIGKILL before or after a named method runs."""

import functools
import inspect
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from tests.support.startup_code import run_at_startup


def crash_at(folder: Path, point: str, n: int) -> dict[str, str]:
    """Return the environment of a worker that is killed when it reaches a crash point for the nth time."""
    return run_at_startup(folder, f"from tests.support.crash_points import install\ninstall({point!r}, {n})\n")


def install(point: str, n: int) -> None:
    """Kill this process when it reaches the crash point for the nth time."""
    from worker.amqp.consumer import QueueConsumer
    from worker.amqp.publisher import Publisher
    from worker.flow.consumer import Consumer
    from worker.idempotency.memory import MemoryStore
    from worker.idempotency.redis import RedisStore
    from worker.onenet.client import OneNETClient
    from worker.processing.reporter import Reporter

    stores: list[type] = [MemoryStore, RedisStore]
    coroutines: dict[str, tuple[list[type], str]] = {
        "claim": (stores, "claim"),
        "history": ([OneNETClient], "find_candidates"),
        "ownership": (stores, "ownership"),
        "mark": ([Consumer], "_replace_with"),
        "request": ([OneNETClient], "execute"),
        "release": (stores, "release"),
        "record": (stores, "complete"),
        "look": ([OneNETClient], "find_states"),
        "result record": (stores, "first_results"),
    }
    functions: dict[str, tuple[list[type], str]] = {
        "recorded": ([Reporter], "_report_outcome"),
        "publish": ([Publisher], "publish"),
        "acknowledge": ([QueueConsumer], "acknowledge"),
        "acknowledgements": ([QueueConsumer], "_send_acknowledgements"),
    }
    moment, _, name = point.partition(" ")
    owners, method = (coroutines | functions)[name]
    left = [n]
    for owner in owners:
        wrapped = getattr(owner, method)
        # Only so is "after" the end of the work, and not of the call that begins it.
        assert inspect.iscoroutinefunction(wrapped) == (name in coroutines), wrapped
        kill_in = _kill_in_coroutine if name in coroutines else _kill_in_function
        setattr(owner, method, kill_in(wrapped, moment == "before", left))


def _kill_in_coroutine(wrapped: Callable[..., Awaitable[Any]], is_before: bool, left: list[int]) -> Callable[..., Any]:
    @functools.wraps(wrapped)
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        if is_before:
            _count_down(left)
        result = await wrapped(*args, **kwargs)
        if not is_before:
            _count_down(left)
        return result

    return wrapper


def _kill_in_function(wrapped: Callable[..., Any], is_before: bool, left: list[int]) -> Callable[..., Any]:
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
