"""From an answer, or from what the history says, to an outcome. Pure: no I/O, no clock, no randomness."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal, assert_never

from worker.answer import Answer, Cached, InDoubt, NotSent, Refused
from worker.backoff import retry_delay_s
from worker.outcome import Accepted, Failed, Outcome, Rejected, Settle, TryAgain

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
) -> Outcome:
    """Choose what becomes of one delivery.

    Args:
        answer: what became of the request.
        attempt: the attempt that the answer ended; the first is 1.
        policy: when to try again.
        now: the time of the answer, aware.
        expires_at: when the command expires, aware; no attempt begins then or later.
        was_in_doubt: a former attempt may have been taken, so that nothing may be said any more that denies it.
    """
    match answer:
        case Cached(uuid):
            return Accepted(uuid)
        case Refused(code, message, errno):
            return Rejected(code, message, errno)
        case InDoubt(reason) if policy.in_doubt == "reconcile":
            return Settle(attempt, reason)  # whatever the time and the attempt: the history may still know its uuid
        case InDoubt(reason) if policy.in_doubt == "dead-letter":
            return unknown(reason)
        case InDoubt(reason):
            asked_s, is_in_doubt = None, True
        case NotSent(reason, asked_s):
            is_in_doubt = was_in_doubt
        case _:
            assert_never(answer)
    delay_s = retry_delay_s(attempt, policy.delays_s, asked_s or 0)
    if attempt >= policy.max_attempts:
        failed = Failed("retries_exhausted", f"given up after {attempt} attempts: {reason}")
    elif now + timedelta(seconds=delay_s) >= expires_at:
        failed = Failed("expired", f"expired_time comes before the next attempt, {delay_s} s from now: {reason}")
    else:
        return TryAgain(delay_s, attempt + 1, reason, is_least=asked_s is not None, is_in_doubt=is_in_doubt)
    return unknown(failed.message) if is_in_doubt else failed


def decide_unreadable(reason: str, attempt: int, policy: RetryPolicy) -> Outcome:
    """Choose what becomes of a command in doubt whose device's history could not be read, which uses up an attempt."""
    if attempt >= policy.max_attempts:
        return unknown(f"the device's command history could not be read: {reason}")
    return Settle(attempt + 1, f"the device's command history could not be read: {reason}")


def unknown(reason: str) -> Failed:
    """Return the outcome of a command of which nobody can tell."""
    return Failed("outcome_unknown", f"OneNET may or may not have cached the command: {reason}")
