"""Liveness and readiness, for the probes of an orchestrator.

Liveness judges what the worker itself can do: its event loop runs, what it holds gets further, it takes what it is
given. Where it fails, a restart helps. Readiness judges what the worker needs from others: broker, store, platform.
Source: https://kubernetes.io/docs/concepts/configuration/liveness-readiness-startup-probes/
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from worker.errors import StoreError

MAX_SILENCE_S = 15.0  # without a report; the event loop sends one each second
STALL_S = 60.0
REFUSED_S = 300.0  # a password that is being changed is refused for a while
UNANSWERED_S = 300.0  # a cluster that elects leaders answers late
GRACE_S = 15.0  # short waits, such as after a throttled request, leave a worker ready


@dataclass(frozen=True, slots=True)
class Condition:
    """What a worker knows of itself at one moment; durations in seconds, 0 where there is nothing to report.

    Attributes:
        is_connected: to the broker.
        is_stopping: it takes nothing new and ends.
        is_blocked: the broker takes no publications, because it is short of memory or disk.
        is_paused: no command of any product may be sent.
        longest_handling_s: how long the delivery that takes longest has been processed.
        unanswered_s: how long a publication has waited that the broker neither confirmed nor rejected.
        none_settled_s: how long outcomes have waited for the broker's confirms, while it confirmed none.
        not_consuming_s: how long it has consumed nothing, or only probes, for whatever reason.
        unexplained_s: how long it has had no consumer, though nothing keeps it from consuming.
        ready_messages: how many commands wait in the queue.
        none_taken_s: how long it has taken none of them, though nothing keeps it from consuming and, if it holds no
            delivery, although it has reconnected.
        is_standby: it has a consumer and holds nothing, and other consumers are there that the broker may prefer.
        refused_s: from the first to the latest of the connections in a row that the broker refused to this user.
    """

    is_connected: bool = False
    is_stopping: bool = False
    is_blocked: bool = False
    is_paused: bool = False
    longest_handling_s: float = 0
    unanswered_s: float = 0
    none_settled_s: float = 0
    not_consuming_s: float = math.inf
    unexplained_s: float = 0
    ready_messages: int = 0
    none_taken_s: float = 0
    is_standby: bool = False
    refused_s: float = 0


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """The answer to a probe, with the values that it is based on."""

    ok: bool
    details: Mapping[str, object]


class Health:
    """Computes liveness and readiness from what the event loop reports.

    Called from other threads than the event loop's, so that a blocked event loop is noticed.

    Args:
        stall_s: seconds without a delivery while commands wait, without a consumer, or spent on one delivery, after
            which a worker has stalled.
        check_store: raises StoreError, with the reason, if the idempotency store cannot do its work.
        clock: monotonic time in seconds; replaced in tests.
    """

    def __init__(
        self,
        stall_s: float,
        check_store: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stall_s = stall_s
        self._check_store = check_store
        self._clock = clock
        self._reported_at = clock()
        self._condition = Condition()

    def report(self, condition: Condition) -> None:
        """Report that the event loop runs, and the worker's condition."""
        self._condition = condition
        self._reported_at = self._clock()

    def liveness(self) -> ProbeResult:
        """Tell whether the process works; if it does not, only a restart helps."""
        found, stall_s = self._condition, self.stall_s
        silence_s = self._clock() - self._reported_at
        faults: dict[str, object] = {}
        if silence_s > MAX_SILENCE_S:
            faults["event_loop_silent_s"] = round(silence_s, 1)
        if found.longest_handling_s > stall_s:
            faults["longest_handling_s"] = round(found.longest_handling_s, 1)
        if found.unanswered_s > UNANSWERED_S and not found.is_blocked:
            faults["publication_unanswered_s"] = round(found.unanswered_s, 1)
        if found.unexplained_s > stall_s:
            faults["without_consumer_s"] = round(found.unexplained_s, 1)
        if found.none_taken_s > stall_s and not found.is_standby:
            faults |= {"ready_messages": found.ready_messages, "none_taken_s": round(found.none_taken_s, 1)}
        if found.refused_s > REFUSED_S:
            faults["refused_by_broker_s"] = round(found.refused_s, 1)
        return ProbeResult(not faults, {"live": not faults, **faults})

    def readiness(self) -> ProbeResult:
        """Tell whether this worker has all that it needs to process commands."""
        is_live, found = self.liveness().ok, self._condition
        store_error = ""
        try:
            self._check_store()
        except StoreError as exc:
            store_error = str(exc) or "no reason given"
        is_consuming = found.is_connected and found.not_consuming_s <= GRACE_S
        is_publishing = not found.is_blocked and found.none_settled_s <= GRACE_S
        is_ready = is_live and is_consuming and is_publishing and not store_error and not found.is_stopping
        details: dict[str, object] = {
            "ready": is_ready,
            "live": is_live,
            "broker_connected": found.is_connected,
            "consuming": is_consuming,
            "publishing": is_publishing,
            "paused": found.is_paused,
            "store_reachable": not store_error,
            "stopping": found.is_stopping,
        }
        if store_error:
            details["store_error"] = store_error
        return ProbeResult(is_ready, details)
