"""The Prometheus metrics, under the names that dashboards and alerts use."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
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
from schemas.result import Result, ResultKind
from worker.core.answer import Answer, Cached, InDoubt, NotSent, Refused
from worker.core.outcome import Accepted, Failed, Outcome, Rejected

_PREFIX = "onenet_worker"
_REQUEST_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_COMMAND_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600, 6 * 3600)
_EXECUTION_BUCKETS_S = (1, 10, 60, 300, 900, 3600, 6 * 3600, 24 * 3600, 7 * 24 * 3600)
_RESULTS: Mapping[type[Answer], str] = {
    Cached: "cached",
    Refused: "refused",
    NotSent: "not_sent",
    InDoubt: "in_doubt",
}
_ACCEPTED = {False: "answered", True: "recovered"}  # True: the uuid was found in the command history
_OUTCOMES: tuple[Status, ...] = get_args(Status)
_REJECTIONS: tuple[RejectionCode, ...] = get_args(RejectionCode)
_FAILURES: tuple[FailureCode, ...] = get_args(FailureCode)
_RESULT_KINDS: tuple[ResultKind, ...] = get_args(ResultKind)


@dataclass(frozen=True, slots=True)
class State:
    """The state of a worker at one moment.

    ``outstanding_results``: accepted commands that wait for their result, if results are on.
    ``paused``, ``paused_by_hand`` and ``clock_offsets_s`` are keyed by product, with ``None`` for the default one.
    """

    is_connected: bool = False
    is_blocked: bool = False
    is_store_available: bool = False
    is_consuming: bool = False
    in_flight: int = 0
    unacknowledged: int = 0
    ready_messages: int = 0
    consumers: int = 0
    outstanding_results: int = 0
    paused: Mapping[str | None, bool] = field(default_factory=dict)
    paused_by_hand: Mapping[str | None, bool] = field(default_factory=dict)
    clock_offsets_s: Mapping[str | None, float] = field(default_factory=dict)


class Metrics:
    """Counters, histograms and gauges; every method may be called from any thread.

    Args:
        version: of the worker.
        concurrency: most commands processed at once.
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

        gauge("build_info", "Version of the worker; always 1.", "version").labels(version).set(1)
        gauge("concurrency", "Most commands processed at once.").set(concurrency)
        # Every series is created at the start: one that appears with its first event shows no increase.
        commands = counter("commands", "Commands with a final outcome, by outcome and reason.", "outcome", "reason")
        self._accepted = {found: commands.labels("accepted", _ACCEPTED[found]) for found in _ACCEPTED}
        self._rejected = {code: commands.labels("rejected", code) for code in _REJECTIONS}
        self._failed = {code: commands.labels("failed", code) for code in _FAILURES}
        dead_letters = counter("dead_letters", "Messages that were dead-lettered, by reason.", "reason")
        self._dead_letters: dict[FailureCode | RejectionCode, Counter] = {
            code: dead_letters.labels(code) for code in _FAILURES
        }
        self._duplicates = counter("duplicates", "Deliveries answered with a recorded reply, without a request.")
        self._retries = counter("retries", "Failed attempts after which another attempt was scheduled.")
        self._postponements = counter("postponements", "Deliveries sent to a delay queue without using up an attempt.")
        self._in_doubt = counter("in_doubt", "Times that a command was in doubt: it may or may not have been cached.")
        requests = histogram(
            "request_duration_seconds", "Duration of the requests to OneNET, by result.", "result", _REQUEST_BUCKETS_S
        )
        self._requests = {answer: requests.labels(result) for answer, result in _RESULTS.items()}
        durations = histogram(
            "command_duration_seconds",
            "Time from the publication of a command (or its first arrival) to the confirm of its reply, by outcome.",
            "outcome",
            _COMMAND_BUCKETS_S,
        )
        self._durations = {outcome: durations.labels(outcome) for outcome in _OUTCOMES}
        results = counter("results", "Results of accepted commands, by result.", "result")
        self._results = {kind: results.labels(kind) for kind in _RESULT_KINDS}
        self._execution = Histogram(
            f"{_PREFIX}_execution_duration_seconds",
            "Time from the reply that a command was accepted to the device's answer that it was executed.",
            buckets=_EXECUTION_BUCKETS_S,
            registry=self.registry,
        )
        self._last_success = gauge("last_success_timestamp_seconds", "Unix time of the last cached command; 0 if none.")

    def observe(self, state: Callable[[], State]) -> None:
        """Export a worker's state as gauges; ``state`` is called at every scrape."""
        self.registry.register(_StateMetrics(state))

    def count_outcome(self, outcome: Outcome) -> None:
        """Count a command's final outcome."""
        match outcome:
            case Accepted():
                self._accepted[outcome.recovered].inc()
                self._last_success.set_to_current_time()
            case Rejected(code):
                self._rejected[code].inc()
            case Failed(code):
                self._failed[code].inc()

    def count_dead_letter(self, reason: FailureCode | RejectionCode) -> None:
        """Count a message that was dead-lettered."""
        self._dead_letters[reason].inc()

    def count_result(self, result: Result, accepted_at: datetime) -> None:
        """Count the result of a command that was accepted at a time, aware."""
        self._results[result.result].inc()
        if result.result == "executed":
            executed_at = result.confirmed_at or result.observed_at
            self._execution.observe(max(0.0, (executed_at - accepted_at).total_seconds()))

    def count_duplicate(self) -> None:
        """Count a delivery that was answered with a recorded reply."""
        self._duplicates.inc()

    def count_retry(self) -> None:
        """Count a failed attempt after which another attempt was scheduled."""
        self._retries.inc()

    def count_postponement(self) -> None:
        """Count a delivery that was sent to a delay queue without using up an attempt."""
        self._postponements.inc()

    def count_doubt(self) -> None:
        """Count that a command was in doubt."""
        self._in_doubt.inc()

    def time_request(self, answer: Answer, began: float) -> None:
        """Observe the duration of a request that began at a monotonic time."""
        self._requests[type(answer)].observe(time.monotonic() - began)

    def time_command(self, outcome: Status, began_at: float) -> None:
        """Observe the duration of a command that began at a time in seconds of the epoch."""
        self._durations[outcome].observe(max(0.0, time.time() - began_at))


class _StateMetrics(Collector):
    """Gauges that are computed at each scrape, so that they cost nothing between scrapes."""

    def __init__(self, state: Callable[[], State]) -> None:
        self._state = state

    def collect(self) -> Iterable[Metric]:
        state = self._state()
        for name, text, value in (
            ("broker_connected", "1 while connected to the broker.", state.is_connected),
            ("broker_blocked", "1 while the broker blocks publications (connection.blocked).", state.is_blocked),
            ("store_available", "1 while the idempotency store accepts claims and outcomes.", state.is_store_available),
            ("consuming", "1 while commands are consumed from the queue, not only a probe.", state.is_consuming),
            ("in_flight", "Commands that are being processed.", state.in_flight),
            ("unacknowledged", "Deliveries that are not acknowledged yet.", state.unacknowledged),
            ("queue_ready_messages", "Messages ready in the queue, at the last poll.", state.ready_messages),
            (
                "results_outstanding",
                "Accepted commands that wait for their result, in the queues and held here, at the last poll.",
                state.outstanding_results,
            ),
            ("queue_consumers", "Consumers of the queue, at the last poll.", state.consumers),
        ):
            yield GaugeMetricFamily(f"{_PREFIX}_{name}", text, value)
        by_product: tuple[tuple[str, str, Mapping[str | None, float]], ...] = (
            ("paused", "1 while no commands of a product are sent", state.paused),
            ("paused_by_hand", "1 while a product is paused by an operator", state.paused_by_hand),
            (
                "platform_clock_offset_seconds",
                "Seconds by which the platform's clock is ahead of this machine's, by product",
                state.clock_offsets_s,
            ),
        )
        for name, text, values in by_product:
            family = GaugeMetricFamily(
                f"{_PREFIX}_{name}", f"{text}; the default product has an empty name.", labels=["product"]
            )
            for product, figure in values.items():
                family.add_metric([product or ""], figure)
            yield family
