"""Blocking calls on the event loop: one of them holds up every command of the worker.

Calls that wait are recognised by their names, so that no test depends on how long one took. What has no such name, such
as a long computation, is found by asyncio's debug mode, far above what a loaded machine delays a callback by.
"""

import asyncio
import logging
import re
import sys
import threading
from asyncio import constants
from collections.abc import Callable

from blockbuster import BlockBuster, BlockBusterFunction, BlockingError

SLOW_CALLBACK_S = 10.0
_SLOW = re.compile(r"Executing .* took ([\d.]+) seconds", re.DOTALL)
_ALSO_WAITING = ("socket.getaddrinfo", "threading.Thread.join")
_NOT_WAITING = ("threading.Lock.acquire", "threading.Lock.acquire_lock")  # short critical sections, as of the log

# In debug mode asyncio records the calls that led to each callback and task. Recording ten of them takes more time than
# all else that a loop does; the last one still tells which callback was slow.
constants.__dict__["DEBUG_STACK_DEPTH"] = 1


def forbid_blocking_calls() -> BlockBuster:
    """Have every call of the worker that waits raise ``BlockingError`` where an event loop is running."""
    modules, others = "worker", ["worker.simulator", "worker.dev"]
    guard = BlockBuster(modules, excluded_modules=others)
    for name in _NOT_WAITING:
        del guard.functions[name]
    for name in _ALSO_WAITING:
        guard.functions[name] = BlockBusterFunction(None, name, scanned_modules=modules, excluded_modules=others)
    guard.functions["threading.Condition.wait"] = BlockBusterFunction(  # by which events, queues and futures wait
        None,
        "threading.Condition.wait",
        scanned_modules=modules,
        excluded_modules=others,
        can_block_predicate=lambda _condition, timeout=None: timeout == 0,
        can_block_functions=[("threading.py", ["start"])],  # until the thread is running
    )
    for function in guard.functions.values():
        function.can_block_in("worker/idempotency/redis.py", "load_script")  # small files, at the start
        function.can_block_in("importlib/metadata/__init__.py", "version")  # redis looks up its own version
        function.can_block_in("worker/onenet/route.py", "_tls_context")  # certificates, at the start
    guard.activate()
    return guard


class BlockedLoop(logging.Handler):
    """Passes on what asyncio logs of callbacks that took long, or that failed for a blocking call."""

    def __init__(self, report: Callable[[str], object]) -> None:
        super().__init__()
        self._report = report

    def emit(self, record: logging.LogRecord) -> None:
        if record.thread != threading.main_thread().ident:  # the simulator's loop, which some tests hold up
            return
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, BlockingError):
            self._report(f"{error!r} in {record.getMessage()}")
        elif (found := _SLOW.match(record.getMessage())) is not None and float(found[1]) > SLOW_CALLBACK_S:
            self._report(record.getMessage())


def watch_event_loop() -> None:
    """Forbid blocking calls in this process, and print what holds up its event loop to stderr."""
    forbid_blocking_calls()
    # Not asyncio's own logger: the worker turns that off.
    logger = logging.getLogger("tests.event_loop")
    logger.propagate = False
    logger.addHandler(BlockedLoop(lambda text: print(text, file=sys.stderr, flush=True)))
    asyncio.base_events.__dict__["logger"] = logger


def assert_nothing_blocked(output: str) -> None:
    """Fail if a process under ``watch_event_loop`` has printed or logged a blocking call."""
    found = [line for line in output.splitlines() if BlockingError.__name__ in line or line.startswith("Executing ")]
    assert not found, "\n".join(found)
