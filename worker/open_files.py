"""How many files and connections this process may have open at once; with too few, commands wait."""

import resource
from contextlib import suppress

from worker.onenet.connecting import MAX_SOCKETS
from worker.onenet.route import MAX_LOOK_UPS
from worker.telemetry.http_server import MAX_CONNECTIONS

# Sockets and files of the event loops, connections to the broker and to Redis while they are replaced, log, libraries.
_ALWAYS = 50
_PER_COMMAND = MAX_SOCKETS  # while it connects; then a request needs one, and a read of the history two
_PER_LOOK_UP = 3  # the resolver keeps a socket for each name server that it has asked, of at most three


def needed(concurrency: int, platforms: int) -> int:
    """Return how many a worker needs that processes so many commands at once, and keeps idle connections.

    Look-ups that hang are counted by platform: they outlast the commands that needed them.
    """
    look_ups = platforms * MAX_LOOK_UPS * _PER_LOOK_UP
    return _ALWAYS + MAX_CONNECTIONS + (_PER_COMMAND + platforms) * concurrency + look_ups


def raise_limit(wanted: int) -> int:
    """Raise this process's soft limit to what is wanted, as far as the hard limit allows; returns what it may use."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted
    reachable = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    with suppress(OSError, ValueError):  # more than the system allows
        resource.setrlimit(resource.RLIMIT_NOFILE, (reachable, hard))
        return reachable
    return soft
