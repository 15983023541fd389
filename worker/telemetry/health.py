"""Whether a worker lives, and whether it is ready: what the probes of an orchestrator ask."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from worker.errors import StoreError

MAX_SILENCE_S = 15.0  # the event loop beats each second
STALL_S = 60.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """The answer to a probe, and what it rests on."""

    is_good: bool
    facts: Mapping[str, object]


class Health:
    """Judges by what the event loop tells; asked by other threads, so that a loop which hangs shows.

    A worker that is up, connected and idle while commands wait looks well to most probes. Here it does not: one that
    sees commands in its queue and takes none for a minute, though nothing keeps it from taking them, has stalled.

    Args:
        stall_s: seconds without a delivery, or in the handling of one, after which a worker has stalled.
        ping_store: raises StoreError if the idempotency store does not answer.
        clock: monotonic time in seconds; replaced in tests.
    """

    def __init__(
        self,
        stall_s: float,
        ping_store: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stall_s = stall_s
        self._ping_store = ping_store
        self._clock = clock
        self._beat_at = self._fine_at = clock()
        self._is_connected = False
        self._is_stopping = False
        self._ready_messages = 0
        self._should_take = False
        self._longest_handling_s = 0.0

    def beat(self, *, is_connected: bool, is_stopping: bool) -> None:
        """Tell that the event loop runs, and how it stands."""
        self._beat_at = self._clock()
        self._is_connected = is_connected
        self._is_stopping = is_stopping

    def look(self, ready_messages: int, taken_at: float, longest_handling_s: float, *, is_excused: bool) -> None:
        """Tell how it goes.

        Args:
            ready_messages: what the queue holds.
            taken_at: when a delivery last came.
            longest_handling_s: for how long one has been handled by now.
            is_excused: there is a reason for taking none.
        """
        self._longest_handling_s = longest_handling_s
        self._ready_messages = ready_messages
        self._should_take = ready_messages > 0 and not is_excused
        self._fine_at = max(self._fine_at, taken_at) if self._should_take else self._clock()

    def liveness(self) -> Verdict:
        """Judge whether the process should go on; one that should not is helped by a restart alone."""
        now = self._clock()
        silence_s, idle_s = now - self._beat_at, now - self._fine_at
        is_wedged = silence_s > MAX_SILENCE_S
        has_stalled = self._should_take and idle_s > self._stall_s
        hangs = self._longest_handling_s > self._stall_s
        is_live = not (is_wedged or has_stalled or hangs)
        facts: dict[str, object] = {"live": is_live}
        if is_wedged:
            facts["event_loop_silent_s"] = round(silence_s, 1)
        if has_stalled:
            facts |= {"ready_messages": self._ready_messages, "none_taken_s": round(idle_s, 1)}
        if hangs:
            facts["longest_handling_s"] = round(self._longest_handling_s, 1)
        return Verdict(is_live, facts)

    def readiness(self) -> Verdict:
        """Judge whether commands are handled here; a worker that is paused stays ready."""
        is_live = self.liveness().is_good
        try:
            self._ping_store()
            is_store_there = True
        except StoreError:
            is_store_there = False
        is_ready = is_live and self._is_connected and is_store_there and not self._is_stopping
        facts = {
            "ready": is_ready,
            "live": is_live,
            "broker_connected": self._is_connected,
            "store_reachable": is_store_there,
            "stopping": self._is_stopping,
        }
        return Verdict(is_ready, facts)
