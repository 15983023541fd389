"""Tells operators what becomes of each delivery: its log line and its metrics."""

import logging
import math
import time

from worker.core.answer import Answer
from worker.core.envelope import Task
from worker.core.outcome import Accepted, Failed, Rejected
from worker.core.resolution import AwaitReconciliation, Conclude, Duplicate, Postpone, Replaced, Resolution, Retry
from worker.errors import UnusableCommand
from worker.telemetry.logs import get_logger
from worker.telemetry.metrics import Metrics

_WARNING_INTERVAL_S = 60.0

log = get_logger()


class Reporter:
    """Logs and counts.

    Args:
        metrics: where to count.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._warned_at = -math.inf  # monotonic: of delays that are shortened

    def report(self, task: Task, resolution: Resolution, duration_s: float = 0.0) -> None:
        """Report what becomes of a delivery.

        Args:
            task: the delivery.
            resolution: what becomes of it, an outcome only once it is recorded.
            duration_s: how long it was processed, in seconds.
        """
        match resolution:
            case Conclude():
                self._report_outcome(task, resolution, duration_s)
            case Duplicate(reply, repeats_all):
                self._metrics.count_duplicate()
                if repeats_all and reply.status == "failed" and reply.error is not None:
                    self._metrics.count_dead_letter(reply.error.code)
                about = {"command_id": reply.command_id, "imei": reply.imei, "attempt": task.envelope.attempt}
                log.info("duplicate_suppressed", **about, status=reply.status)
            case Retry(delay_s, next_attempt, reason):
                self._metrics.count_retry()
                log.warning(
                    "command_retry_scheduled",
                    **_about(task, next_attempt - 1),
                    next_attempt=next_attempt,
                    delay_s=delay_s,
                    reason=reason,
                )
            case Postpone(delay_s, attempt, reason):
                self._metrics.count_postponement()
                is_early = bool(task.envelope.delay_left_s)
                if is_early:
                    self._warn_of_early_returns()
                level = logging.DEBUG if is_early else logging.INFO  # it may come back many times a second
                log.log(level, "command_postponed", **_about(task, attempt), delay_s=delay_s, reason=reason)
            case AwaitReconciliation(delay_s, attempt, reason):
                self._metrics.count_doubt()
                log.warning("command_in_doubt", **_about(task, attempt), reason=reason, reconcile_delay_s=delay_s)
            case Replaced(result):
                if result is not None:
                    self.report(task, result, duration_s)

    def _warn_of_early_returns(self) -> None:
        """Log, at most once a minute, that delay queues return messages early."""
        if time.monotonic() - self._warned_at > _WARNING_INTERVAL_S:
            self._warned_at = time.monotonic()
            log.warning("delays_shortened", hint="a policy of the broker shortens the delay queues' message-ttl")

    def report_doubt(self, task: Task, attempt: int, reason: str) -> None:
        """Report that a command may have been cached, where its history is not read."""
        self._metrics.count_doubt()
        log.warning("command_in_doubt", **_about(task, attempt), reason=reason)

    def time_request(self, answer: Answer, began: float) -> None:
        """Record how long a request took that began at a monotonic time."""
        self._metrics.time_request(answer, began)

    def _report_outcome(self, task: Task, conclude: Conclude, duration_s: float) -> None:
        reply, outcome = conclude.reply, conclude.outcome
        self._metrics.count_outcome(outcome)
        about = {"command_id": reply.command_id, "imei": reply.imei, "attempt": reply.attempts}
        sender = {"app_id": task.envelope.app_id or None}  # no label of a metric: senders choose it
        duration_ms = round(duration_s * 1000, 1)
        match outcome:
            case Accepted(uuid, recovered):
                if recovered:
                    log.info("command_recovered", **about, uuid=uuid)
                log.info("command_accepted", **about, duration_ms=duration_ms, uuid=uuid)
            case Rejected(code, message, errno):
                log.warning(
                    "command_rejected",
                    **about,
                    **sender,
                    duration_ms=duration_ms,
                    code=code,
                    errno=errno,
                    reason=message,
                )
            case Failed(code, message):
                self._metrics.count_dead_letter(code)
                log.warning("command_failed", **about, **sender, duration_ms=duration_ms, code=code, reason=message)


def _about(task: Task, attempt: int) -> dict[str, object]:
    """Return the fields of every line about a command, as far as they are known."""
    match task.parsed:
        case None:
            return {"command_id": None, "imei": None, "attempt": attempt}
        case UnusableCommand() | _ as known:
            return {"command_id": known.command_id, "imei": known.imei, "attempt": attempt}
