"""How much memory a call takes, measured alone: other threads and coverage allocate in the tests' process too."""

import gc
import os
import sys
import traceback
import tracemalloc
import warnings
from collections.abc import Callable


def peak_of(call: Callable[[], object]) -> int:
    """Return the most bytes that a call holds at any time."""
    return _measured(call)[1]


def retained_by(call: Callable[[], object]) -> int:
    """Return how many bytes are held after a call, its result among them."""
    return _measured(call)[0]


def _measured(call: Callable[[], object]) -> tuple[int, int]:
    """Make a call in a fork of this process, which has no other thread; returns what it held at its end and at most.

    What only a cycle of references holds counts too.

    Raises:
        AssertionError: the call raised an exception; the message is its traceback.
    """
    gc.collect()  # no finalizer of what was made before runs within the call
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # no call needs a lock that another thread may hold
        child = os.fork()
    if not child:
        _measure(call, writer)
    os.close(writer)
    with os.fdopen(reader) as results:
        text = results.read()
    os.waitpid(child, 0)
    assert text.startswith("bytes "), text
    _, held, most = text.split()
    return int(held), int(most)


def _measure(call: Callable[[], object], writer: int) -> None:
    """Write what a call holds into a pipe, and end this process."""
    sys.settrace(None)  # that of coverage allocates too, and what it notes is lost with this process
    gc.disable()
    tracemalloc.start()
    try:
        result = call()
        found = "bytes {} {}".format(*tracemalloc.get_traced_memory())
        del result
    except BaseException:  # noqa: BLE001 - it is raised in the parent
        found = traceback.format_exc()
    with os.fdopen(writer, "w") as results:
        results.write(found)
    os._exit(0)
