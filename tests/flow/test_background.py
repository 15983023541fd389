"""Coroutines that run beside their caller."""

import asyncio
import gc
from typing import Any

from tests.support.waiting import until
from worker.flow.background import Background


async def test_an_error_reaches_the_exception_handler_of_the_loop() -> None:
    """The worker ends over it: an error that nobody awaits would otherwise leave its delivery unsettled for ever."""
    reported: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: reported.append(context))
    error = ValueError("unforeseen")

    async def fail() -> None:
        raise error

    Background().start(fail())
    await until(lambda: reported)
    assert reported[0]["exception"] is error


async def test_a_coroutine_runs_to_its_end_though_nobody_keeps_it() -> None:
    """The event loop holds only weak references to tasks."""
    ended: list[bool] = []
    background = Background()

    async def run() -> None:
        waiter = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_soon(lambda: None if waiter.done() else waiter.set_result(None))
        await waiter
        ended.append(True)

    background.start(run())
    gc.collect()
    await until(lambda: ended)


async def test_cancelling_ends_every_coroutine_and_is_no_error() -> None:
    reported: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: reported.append(context))
    background = Background()
    tasks = [background.start(asyncio.sleep(60)) for _ in range(2)]
    background.cancel()
    await asyncio.wait(tasks)
    assert all(task.cancelled() for task in tasks)
    await asyncio.sleep(0)
    assert reported == []
