"""What to do next with a command, and what an answer or an unreadable history means for it.

Pure: no I/O, no clock, no randomness.
"""

from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import Enum, auto
from typing import Literal, assert_never

from worker.core.answer import Answer, Cached, InDoubt, NotSent, Refused
from worker.core.backoff import postponement_s, retry_delay_s
from worker.core.doubt_window import DoubtWindow
from worker.core.envelope import Envelope
from worker.core.outcome import Accepted, Failed, Outcome, Rejected, outcome_unknown
from worker.core.poison import crash_count, crash_count_of_copy, is_poison, may_read_history, poisoned
from worker.core.resolution import AwaitReconciliation, Postpone, Retry
from worker.core.times import as_understood

InDoubtMode = Literal["reconcile", "dead-letter", "resend"]
NO_RECORD = "no record tells what became of it"
MAX_ASKED_S = 60.0  # a longer wait holds the whole product, which is probed once a minute


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """When to try again.

    ``delays_s``: seconds before each next attempt, ascending, the last repeats. ``reconcile_delay_s``: seconds that a
    command in doubt waits before its device's history is read. ``in_doubt``: what becomes of a command that may have
    been cached; with ``resend`` a device may act twice.
    """

    delays_s: tuple[int, ...]
    max_attempts: int
    reconcile_delay_s: int = 60
    in_doubt: InDoubtMode = "reconcile"

    def wait_s(self, doubt: DoubtWindow, now: datetime) -> int:
        """Return the delay of a command in doubt whose history cannot tell yet, in seconds.

        After a loss of records its doubt ends in the future, so it takes a longer delay than the usual one.

        Args:
            doubt: when it may have been sent.
            now: the time, aware.
        """
        left_s = (doubt.until - now).total_seconds() + self.reconcile_delay_s
        return max(self.reconcile_delay_s, postponement_s(self.delays_s, left_s))

    def mode(self, envelope: Envelope) -> InDoubtMode:
        """Return what becomes of a command in doubt; for a replay its history is read."""
        return self.in_doubt if envelope.replay is None else "reconcile"


class Step(Enum):
    """What to do with a command whose lease is held."""

    WAIT = auto()  # the history cannot tell yet
    RECONCILE = auto()
    TRY_WITH_CARE = auto()  # it may have crashed a worker
    RECONCILE_WITH_CARE = auto()  # it has crashed too many to be sent once more
    SEND = auto()


def next_step(
    doubt: DoubtWindow | None, envelope: Envelope, policy: RetryPolicy, now: datetime, *, holder_crashed: bool
) -> Step | Failed:
    """Choose what to do with a command whose lease is held; ``Failed``: give it up with this outcome.

    Args:
        doubt: when it may have been sent.
        envelope: what its delivery says.
        policy: when to try again.
        now: the time, aware.
        holder_crashed: an earlier attempt may have crashed its worker.
    """
    mode = policy.mode(envelope)
    is_last = is_poison(envelope, holder_crashed=holder_crashed)
    if is_last and not (mode == "reconcile" and may_read_history(envelope, doubt)):
        return poisoned(envelope)
    if doubt is not None and mode == "dead-letter":
        return outcome_unknown(NO_RECORD)
    if doubt is not None and mode == "reconcile":
        if now < doubt.until + timedelta(seconds=policy.reconcile_delay_s):
            return Step.WAIT
        if is_last:  # not announced: the broker counts how often it returns
            return Step.RECONCILE_WITH_CARE
        if not holder_crashed:
            return Step.RECONCILE
    return Step.TRY_WITH_CARE if holder_crashed else Step.SEND


def decide(
    answer: Answer,
    attempt: int,
    policy: RetryPolicy,
    *,
    now: datetime,
    expires_at: datetime,
    doubt: DoubtWindow | None = None,
    is_paused: bool = False,
) -> Outcome | Retry | Postpone | AwaitReconciliation:
    """Choose what becomes of a command after a request.

    Args:
        answer: what became of the request.
        attempt: the attempt that the answer ended; the first is 1.
        policy: when to try again.
        now: the time of the answer on the platform's clock, aware.
        expires_at: when the command expires, aware; no attempt begins then or later.
        doubt: when the command may have been sent without a known result, this request included; unless it is None,
            nothing may be said that denies it.
        is_paused: the platform is down for all devices, so this attempt uses up none; nor does one that the platform
            throttled.
    """
    match answer:
        case Cached(uuid):
            return Accepted(uuid)
        case Refused(may_concern_all_devices=True) if is_paused:
            reason, asked_s = answer.cause, None
        case Refused(code, message, errno):
            return Rejected(code, message, errno)
        case InDoubt(reason) if policy.in_doubt == "reconcile":
            # Whatever the time and the attempt: the history may still know its uuid.
            assert doubt is not None  # it covers this request
            return AwaitReconciliation(policy.reconcile_delay_s, attempt, reason, doubt, is_free=is_paused)
        case InDoubt(reason) if policy.in_doubt == "dead-letter":
            return outcome_unknown(reason)
        case InDoubt(reason):
            asked_s = None
        case NotSent(reason, asked_s):
            pass
        case _:
            assert_never(answer)
    is_free = is_paused or (isinstance(answer, NotSent) and answer.is_throttled)
    delay_s = retry_delay_s(1 if is_free else attempt, policy.delays_s, min(asked_s or 0, MAX_ASKED_S))
    next_attempt = attempt if is_free else attempt + 1
    if next_attempt > policy.max_attempts:
        failed = Failed("retries_exhausted", f"given up after {attempt} attempts: {reason}")
    elif now + timedelta(seconds=delay_s) >= expires_at:
        expires = as_understood(expires_at)
        failed = Failed("expired", f"expired_time, {expires}, comes before the next attempt in {delay_s} s: {reason}")
    elif is_free:
        return Postpone(delay_s, attempt, reason, doubt, has_jitter=asked_s is None)
    else:
        return Retry(delay_s, next_attempt, reason, doubt, honours_retry_after=asked_s is not None)
    return failed if doubt is None else outcome_unknown(failed.message)


def decide_full(
    reason: str,
    attempt: int,
    policy: RetryPolicy,
    *,
    rested_s: float,
    now: datetime,
    expires_at: datetime,
    doubt: DoubtWindow | None,
) -> Failed | Postpone:
    """Choose how long a command rests for which its device's queue has no room; that uses up no attempt.

    Args:
        reason: what the platform said.
        attempt: the attempt that was refused.
        policy: its delays, of which a longer one is taken the longer the command has rested.
        rested_s: how long ago the command first arrived, in seconds.
        now: the time on the platform's clock, aware.
        expires_at: when the command expires, aware.
        doubt: when the command may have been sent before.
    """
    in_time = [delay_s for delay_s in policy.delays_s if now + timedelta(seconds=delay_s) < expires_at]
    if in_time:
        return Postpone(postponement_s(in_time, rested_s), attempt, reason, doubt, has_jitter=True)
    failed = Failed("expired", f"expired_time, {as_understood(expires_at)}, comes before the next look: {reason}")
    return failed if doubt is None else outcome_unknown(failed.message)


def decide_unreadable(
    reason: str, waiting: AwaitReconciliation, policy: RetryPolicy, *, is_paused: bool = False
) -> Failed | AwaitReconciliation:
    """Choose what becomes of a command in doubt whose device's history could not be read.

    Args:
        reason: why it could not be read.
        waiting: how the command waited for its history.
        policy: when to try again.
        is_paused: no history can be read for now, of whatever device; otherwise this uses up an attempt.
    """
    reason = f"the device's command history could not be read: {reason}"
    if is_paused:
        return replace(waiting, reason=reason)
    if waiting.attempts_used >= policy.max_attempts:
        return outcome_unknown(reason)
    return replace(waiting, attempt=waiting.attempts_used + 1, reason=reason, is_free=False)


def postponed(
    envelope: Envelope, policy: RetryPolicy, reason: str, doubt: DoubtWindow | None, *, holder_crashed: bool = False
) -> Postpone:
    """Return a short postponement of a command that cannot be processed now.

    Args:
        envelope: what its delivery says.
        policy: when to try again.
        reason: why it cannot be processed now.
        doubt: when it may have been sent.
        holder_crashed: an earlier attempt may have crashed its worker.
    """
    # The attempt announced last may be the one that is in progress elsewhere.
    is_suspected = holder_crashed or envelope.crash_count is not None
    return Postpone(
        policy.delays_s[0],
        envelope.attempt,
        reason,
        doubt,
        is_free=envelope.is_free_attempt,
        crash_count=crash_count(envelope) if is_suspected else None,
    )


def awaiting(
    envelope: Envelope,
    policy: RetryPolicy,
    reason: str,
    doubt: DoubtWindow,
    *,
    attempt: int,
    holder_crashed: bool = False,
) -> AwaitReconciliation:
    """Return the wait of a command in doubt for its device's history.

    Args:
        envelope: what its delivery says.
        policy: when to try again.
        reason: why it is in doubt.
        doubt: when it may have been sent.
        attempt: the attempt that is in doubt.
        holder_crashed: an earlier attempt may have crashed its worker.
    """
    return AwaitReconciliation(
        policy.reconcile_delay_s,
        attempt,
        reason,
        doubt,
        is_free=envelope.is_free_attempt,
        crash_count=crash_count_of_copy(envelope, holder_crashed=holder_crashed),
    )
