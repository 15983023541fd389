"""From an answer, or from what the history says, to an outcome. Pure: no I/O, no clock, no randomness."""

from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Literal, assert_never

from worker.core.answer import Answer, Cached, InDoubt, NotSent, Refused
from worker.core.backoff import retry_delay_s
from worker.core.outcome import Accepted, AwaitReconciliation, Failed, Outcome, Rejected, Retry

InDoubtMode = Literal["reconcile", "dead-letter", "resend"]


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """When to try again.

    ``delays_s``: seconds before each next attempt, ascending, the last repeats. ``settle_s``: seconds that a command in
    doubt rests before its device's history is read. ``in_doubt``: what becomes of a command that may have been cached;
    with ``resend`` a device may act twice.
    """

    delays_s: tuple[int, ...]
    max_attempts: int
    settle_s: int = 60
    in_doubt: InDoubtMode = "reconcile"


def decide(
    answer: Answer,
    attempt: int,
    policy: RetryPolicy,
    *,
    now: datetime,
    expires_at: datetime,
    was_in_doubt: bool = False,
    is_paused: bool = False,
) -> Outcome:
    """Choose what becomes of one delivery.

    Args:
        answer: what became of the request.
        attempt: the attempt that the answer ended; the first is 1.
        policy: when to try again.
        now: the time of the answer, aware.
        expires_at: when the command expires, aware; no attempt begins then or later.
        was_in_doubt: a former attempt may have been taken, so that nothing may be said any more that denies it.
        is_paused: the platform is down for all, so that what failed with it uses up no attempt. One that the platform
            throttled uses up none either.
    """
    match answer:
        case Cached(uuid):
            return Accepted(uuid)
        case Refused(may_concern_all_devices=True) if is_paused:
            reason, asked_s, is_in_doubt = answer.cause, None, was_in_doubt
        case Refused(code, message, errno):
            return Rejected(code, message, errno)
        case InDoubt(reason) if policy.in_doubt == "reconcile":
            # Whatever the time and the attempt: the history may still know its uuid.
            return AwaitReconciliation(attempt, reason, consumes_attempt=not is_paused)
        case InDoubt(reason) if policy.in_doubt == "dead-letter":
            return unknown(reason)
        case InDoubt(reason):
            asked_s, is_in_doubt = None, True
        case NotSent(reason, asked_s):
            is_in_doubt = was_in_doubt
        case _:
            assert_never(answer)
    is_free = is_paused or (isinstance(answer, NotSent) and answer.is_throttled)
    delay_s = retry_delay_s(1 if is_free else attempt, policy.delays_s, asked_s or 0)
    next_attempt = attempt if is_free else attempt + 1
    if next_attempt > policy.max_attempts:
        failed = Failed("retries_exhausted", f"given up after {attempt} attempts: {reason}")
    elif now + timedelta(seconds=delay_s) >= expires_at:
        failed = Failed("expired", f"expired_time comes before the next attempt, {delay_s} s from now: {reason}")
    else:
        return Retry(delay_s, next_attempt, reason, honours_retry_after=asked_s is not None)
    return unknown(failed.message) if is_in_doubt else failed


def decide_unreadable(
    reason: str, settled: AwaitReconciliation, policy: RetryPolicy, *, is_paused: bool = False
) -> Outcome:
    """Choose what becomes of a command in doubt whose device's history could not be read.

    Args:
        reason: why it could not.
        settled: how the command was put to rest.
        policy: when to try again.
        is_paused: histories cannot be read for now, of whatever device; otherwise this uses up an attempt.
    """
    reason = f"the device's command history could not be read: {reason}"
    if is_paused:
        return replace(settled, reason=reason)
    if settled.used >= policy.max_attempts:
        return unknown(reason)
    return AwaitReconciliation(settled.used + 1, reason)


def unknown(reason: str) -> Failed:
    """Return the outcome of a command of which nobody can tell."""
    return Failed("outcome_unknown", f"OneNET may or may not have cached the command: {reason}")
