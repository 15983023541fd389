"""Liveness and readiness, for the probes of an orchestrator.

Source: https://kubernetes.io/docs/concepts/configuration/liveness-readiness-startup-probes/
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from worker.errors import StoreError

MAX_SILENCE_S = 15.0  # without a heartbeat; the event loop sends one each second
STALL_S = 60.0


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """The answer to a probe, with the values that it is based on."""

    ok: bool
    details: Mapping[str, object]


class Health:
    """Computes liveness and readiness from what the event loop reports.

    Called from other threads than the event loop's, so that a blocked event loop is noticed.

    Most probes pass a worker that is running, connected and idle while commands wait in its queue. These do not: a
    worker that sees commands in its queue and takes none for a minute, without a known reason, has stalled.

    Args:
        stall_s: seconds without a delivery while commands wait, or spent on one delivery, after which a worker has
            stalled.
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
        self._heartbeat_at = self._active_at = clock()
        self._is_connected = False
        self._is_stopping = False
        self._ready_messages = 0
        self._must_take = False
        self._longest_handling_s = 0.0

    def heartbeat(self, *, is_connected: bool, is_stopping: bool) -> None:
        """Report that the event loop runs, and its state."""
        self._heartbeat_at = self._clock()
        self._is_connected = is_connected
        self._is_stopping = is_stopping

    def observe_queue(
        self, ready_messages: int, taken_at: float, longest_handling_s: float, *, idle_is_expected: bool
    ) -> None:
        """Report the state of the queue and of the deliveries taken from it.

        Args:
            ready_messages: messages that wait in the queue.
            taken_at: when the last delivery arrived, in monotonic seconds.
            longest_handling_s: the longest time that a delivery in flight has taken so far, in seconds.
            idle_is_expected: there is a known reason for taking no deliveries.
        """
        self._longest_handling_s = longest_handling_s
        self._ready_messages = ready_messages
        self._must_take = ready_messages > 0 and not idle_is_expected
        self._active_at = max(self._active_at, taken_at) if self._must_take else self._clock()

    def liveness(self) -> ProbeResult:
        """Tell whether the process works; if it does not, only a restart helps."""
        now = self._clock()
        silence_s, idle_s = now - self._heartbeat_at, now - self._active_at
        is_loop_blocked = silence_s > MAX_SILENCE_S
        is_stalled = self._must_take and idle_s > self._stall_s
        is_handling_stuck = self._longest_handling_s > self._stall_s
        is_live = not (is_loop_blocked or is_stalled or is_handling_stuck)
        details: dict[str, object] = {"live": is_live}
        if is_loop_blocked:
            details["event_loop_silent_s"] = round(silence_s, 1)
        if is_stalled:
            details |= {"ready_messages": self._ready_messages, "none_taken_s": round(idle_s, 1)}
        if is_handling_stuck:
            details["longest_handling_s"] = round(self._longest_handling_s, 1)
        return ProbeResult(is_live, details)

    def readiness(self) -> ProbeResult:
        """Tell whether this worker can process commands; a worker whose products are paused stays ready."""
        is_live = self.liveness().ok
        try:
            self._ping_store()
            is_store_reachable = True
        except StoreError:
            is_store_reachable = False
        is_ready = is_live and self._is_connected and is_store_reachable and not self._is_stopping
        details = {
            "ready": is_ready,
            "live": is_live,
            "broker_connected": self._is_connected,
            "store_reachable": is_store_reachable,
            "stopping": self._is_stopping,
        }
        return ProbeResult(is_ready, details)
