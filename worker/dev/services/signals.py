"""Signals that end a program which has started servers: none of these may be left behind."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let the first of these signals raise KeyboardInterrupt or SystemExit, and ignore more of them.

    A closed terminal or an impatient user sends several, while the servers are already being stopped.
    """
    before = {number: signal.signal(number, _end) for number in _ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def signals_held_back() -> Iterator[None]:
    """Let these signals wait while something is started and handed to what will stop it.

    Only the main thread is ever interrupted by one, and only there can it be made to wait: elsewhere nothing is done.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[int] = []
    before = {number: signal.getsignal(number) for number in _ENDING}
    try:
        for number in _ENDING:
            signal.signal(number, lambda found, _: caught.append(found))
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for found in caught:
            signal.raise_signal(found)


def ignore_signals() -> None:
    """Ignore these signals from here on."""
    for number in _ENDING:
        signal.signal(number, _ignore)


def _end(number: int, _: FrameType | None) -> NoReturn:
    ignore_signals()
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + number)


def _ignore(_number: int, _frame: FrameType | None) -> None:
    """Do nothing; with ``SIG_IGN`` Python would complain of a signal that already waits for its handler."""
