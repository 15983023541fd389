"""What is counted and measured, under the names that dashboards and alerts use."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from schemas.reply import FailureCode, RejectionCode, Status
from worker.core.answer import Answer, Cached, InDoubt, NotSent, Refused
from worker.core.outcome import Accepted, Failed, Final, Rejected

_PREFIX = "onenet_worker"
_REQUEST_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_COMMAND_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600, 6 * 3600)
_ANSWERS: Mapping[type[Answer], str] = {
    Cached: "cached",
    Refused: "refused",
    NotSent: "not_sent",
    InDoubt: "in_doubt",
}
_ACCEPTED = {False: "answered", True: "recovered"}  # by whether the uuid was found in the history
_OUTCOMES: tuple[Status, ...] = get_args(Status)
_REJECTIONS: tuple[RejectionCode, ...] = get_args(RejectionCode)
_FAILURES: tuple[FailureCode, ...] = get_args(FailureCode)


@dataclass(frozen=True, slots=True)
class State:
    """What a worker is like at one moment; ``paused`` is by product, the default one being ``None``."""

    is_connected: bool = False
    is_blocked: bool = False
    is_consuming: bool = False
    in_flight: int = 0
    unacknowledged: int = 0
    ready_messages: int = 0
    consumers: int = 0
    paused: Mapping[str | None, bool] = field(default_factory=dict)


class Metrics:
    """Counts and measures; every method may be called from any thread.

    Args:
        version: of the worker.
        concurrency: how many commands may be handled at once.
    """

    def __init__(self, version: str, concurrency: int) -> None:
        self.registry = CollectorRegistry()
        for collect in (ProcessCollector, PlatformCollector, GCCollector):
            collect(registry=self.registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"{_PREFIX}_{name}", text, labels, registry=self.registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"{_PREFIX}_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, label: str, buckets_s: tuple[float, ...]) -> Histogram:
            return Histogram(f"{_PREFIX}_{name}", text, (label,), buckets=buckets_s, registry=self.registry)

        gauge("info", "Which version this is.", "version").labels(version).set(1)
        gauge("concurrency", "Commands that may be handled at once.").set(concurrency)
        # Every series is there from the start: what appears with its first event shows no increase.
        commands = counter("commands", "Commands that came to their outcome.", "outcome", "reason")
        self._accepted = {found: commands.labels("accepted", _ACCEPTED[found]) for found in _ACCEPTED}
        self._rejected = {code: commands.labels("rejected", code) for code in _REJECTIONS}
        self._failed = {code: commands.labels("failed", code) for code in _FAILURES}
        dead_letters = counter("dead_letters", "Messages that were set aside.", "reason")
        self._dead_letters: dict[FailureCode | RejectionCode, Counter] = {
            code: dead_letters.labels(code) for code in _FAILURES
        }
        self._duplicates = counter("duplicates", "Deliveries that got a recorded reply again, and no request.")
        self._retries = counter("retries", "Deliveries that were sent to rest before they are handled again.")
        self._in_doubt = counter("in_doubt", "Times that a command may or may not have been cached.")
        requests = histogram(
            "request_duration_seconds", "Requests to OneNET, by their answer.", "answer", _REQUEST_BUCKETS_S
        )
        self._requests = {answer: requests.labels(name) for answer, name in _ANSWERS.items()}
        durations = histogram(
            "command_duration_seconds",
            "From the publishing of a command, or else its first arrival, to the confirm of its reply.",
            "outcome",
            _COMMAND_BUCKETS_S,
        )
        self._durations = {outcome: durations.labels(outcome) for outcome in _OUTCOMES}
        self._last_success = gauge("last_success_timestamp_seconds", "When OneNET last cached a command; 0: not yet.")

    def observe(self, state: Callable[[], State]) -> None:
        """Show a worker's state, asked for whenever the metrics are read."""
        self.registry.register(_StateMetrics(state))

    def count_outcome(self, outcome: Final) -> None:
        """Count a command that came to its outcome."""
        match outcome:
            case Accepted():
                self._accepted[outcome.recovered].inc()
                self._last_success.set_to_current_time()
            case Rejected(code):
                self._rejected[code].inc()
            case Failed(code):
                self._failed[code].inc()

    def count_dead_letter(self, reason: FailureCode | RejectionCode) -> None:
        """Count a message that was set aside."""
        self._dead_letters[reason].inc()

    def count_duplicate(self) -> None:
        """Count a delivery that got a recorded reply again."""
        self._duplicates.inc()

    def count_retry(self) -> None:
        """Count a delivery that goes to rest."""
        self._retries.inc()

    def count_doubt(self) -> None:
        """Count a command that is in doubt."""
        self._in_doubt.inc()

    def time_request(self, answer: Answer, began: float) -> None:
        """Measure a request from a monotonic time to now."""
        self._requests[type(answer)].observe(time.monotonic() - began)

    def time_command(self, outcome: Status, began_at: float) -> None:
        """Measure a command from a time in seconds of the epoch to now."""
        self._durations[outcome].observe(max(0.0, time.time() - began_at))


class _StateMetrics(Collector):
    """Gauges that are read when they are asked for, so that keeping them costs nothing."""

    def __init__(self, state: Callable[[], State]) -> None:
        self._state = state

    def collect(self) -> Iterable[Metric]:
        state = self._state()
        for name, text, value in (
            ("broker_connected", "Whether there is a connection to the broker.", state.is_connected),
            ("broker_blocked", "Whether the broker takes no publications for now.", state.is_blocked),
            ("consuming", "Whether commands are taken from the queue.", state.is_consuming),
            ("in_flight", "Commands that are being handled.", state.in_flight),
            ("unacknowledged", "Deliveries that are held.", state.unacknowledged),
            ("queue_ready_messages", "Commands that wait in the queue, as last seen.", state.ready_messages),
            ("queue_consumers", "Consumers of the queue, as last seen.", state.consumers),
        ):
            yield GaugeMetricFamily(f"{_PREFIX}_{name}", text, value)
        text = "Whether nothing of a product is sent; the default one has no name."
        paused = GaugeMetricFamily(f"{_PREFIX}_paused", text, labels=["product"])
        for product, is_paused in state.paused.items():
            paused.add_metric([product or ""], is_paused)
        yield paused
