"""Coroutines that run beside their caller, and whose errors end the worker."""

import asyncio
from collections.abc import Coroutine
from typing import Any


class Background:
    """Starts coroutines and keeps them until they end: the event loop itself holds only weak references.

    An error of one is passed to the event loop's exception handler.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[object]] = set()

    def start(self, coroutine: Coroutine[Any, Any, object]) -> "asyncio.Task[object]":
        """Start a coroutine."""
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._on_end)
        return task

    def cancel(self) -> None:
        """Cancel all that run."""
        for task in self._tasks:
            task.cancel()

    def _on_end(self, task: "asyncio.Task[object]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._loop.call_exception_handler({"message": "a background task failed", "exception": error})
