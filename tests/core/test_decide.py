"""What to do next with a command, and what answers and histories mean for it: rule by rule."""

from datetime import UTC, datetime, timedelta

import pytest

from worker.core.answer import Answer, Cached, InDoubt, NotSent, Refused
from worker.core.decide import (
    InDoubtMode,
    RetryPolicy,
    Step,
    awaiting,
    decide,
    decide_unreadable,
    next_step,
    postponed,
)
from worker.core.doubt_window import DoubtWindow
from worker.core.envelope import Envelope, Replay
from worker.core.outcome import Accepted, Failed, Outcome, Rejected
from worker.core.poison import MAX_CRASHES, MAX_HISTORY_READS
from worker.core.resolution import AwaitReconciliation, Postpone, Retry

NOW = datetime(2026, 8, 5, tzinfo=UTC)
POLICY = RetryPolicy((5, 30, 120), max_attempts=4)
RESEND = RetryPolicy((5, 30, 120), max_attempts=4, in_doubt="resend")
DEAD_LETTER = RetryPolicy((5, 30, 120), max_attempts=4, in_doubt="dead-letter")
DOUBT = DoubtWindow(NOW, NOW)  # of this request
RIPE = DoubtWindow(NOW - timedelta(hours=1), NOW - timedelta(seconds=60))  # the history can tell by now
POISON = Envelope(crash_count=MAX_CRASHES)
UNREADABLE_POISON = Envelope(crash_count=MAX_CRASHES, times_returned=MAX_HISTORY_READS)

Decision = Outcome | Retry | Postpone | AwaitReconciliation


def decision(
    answer: Answer,
    attempt: int = 1,
    policy: RetryPolicy = POLICY,
    left_s: float = 3600,
    doubt: DoubtWindow | None = None,
    *,
    is_paused: bool = False,
) -> Decision:
    if isinstance(answer, InDoubt):
        doubt = doubt or DOUBT
    expires_at = NOW + timedelta(seconds=left_s)
    return decide(answer, attempt, policy, now=NOW, expires_at=expires_at, doubt=doubt, is_paused=is_paused)


def code(found: Decision) -> str | None:
    return found.code if isinstance(found, Failed) else None


@pytest.mark.parametrize("attempt", [1, 4, 9])
def test_a_clear_answer_is_the_outcome_at_every_attempt(attempt: int) -> None:
    assert decision(Cached("u"), attempt) == Accepted("u")
    assert decision(Refused("onenet_rejected", "no", 3), attempt, left_s=-1) == Rejected("onenet_rejected", "no", 3)


@pytest.mark.parametrize("policy", [POLICY, DEAD_LETTER, RESEND], ids=lambda policy: policy.in_doubt)
def test_a_clear_answer_means_the_same_in_every_mode(policy: RetryPolicy) -> None:
    assert decision(Cached("u"), policy=policy) == Accepted("u")
    assert decision(Refused("http_rejected", "403"), policy=policy) == Rejected("http_rejected", "403")
    assert decision(NotSent("refused"), policy=policy) == Retry(5, 2, "refused")


@pytest.mark.parametrize(("attempt", "delay_s"), [(1, 5), (2, 30), (3, 120)])
def test_a_command_that_was_not_sent_is_retried_with_growing_delays(attempt: int, delay_s: int) -> None:
    assert decision(NotSent("refused"), attempt) == Retry(delay_s, attempt + 1, "refused")


@pytest.mark.parametrize(("asked_s", "delay_s"), [(0, 5), (5, 5), (6, 30), (31, 120), (9999, 120)])
def test_a_retry_waits_at_least_as_long_as_the_platform_asked(asked_s: float, delay_s: int) -> None:
    assert decision(NotSent("429", asked_s)) == Retry(delay_s, 2, "429", honours_retry_after=True)


def test_a_wait_of_hours_holds_the_product_and_not_the_command() -> None:
    """The product is probed once a minute; the command must not miss that it works again."""
    policy = RetryPolicy((5, 30, 120, 3600), max_attempts=4)
    assert decision(NotSent("429", 8 * 3600), policy=policy) == Retry(120, 2, "429", honours_retry_after=True)


@pytest.mark.parametrize("attempt", [1, 3, 4])
@pytest.mark.parametrize(("asked_s", "delay_s"), [(None, 5), (6, 30)])
def test_a_throttled_command_is_postponed_by_the_first_delay_and_uses_no_attempt(
    attempt: int, asked_s: float | None, delay_s: int
) -> None:
    """Not even the last attempt: the platform did not look at the command."""
    found = decision(NotSent("errno 15", asked_s, is_throttled=True), attempt)
    assert found == Postpone(delay_s, attempt, "errno 15", has_jitter=asked_s is None)


def test_a_throttled_command_can_expire() -> None:
    assert code(decision(NotSent("errno 15", is_throttled=True), left_s=5)) == "expired"


@pytest.mark.parametrize("attempt", [4, 5])
def test_a_command_fails_when_its_attempts_are_used_up(attempt: int) -> None:
    found = decision(NotSent("refused"), attempt)
    assert isinstance(found, Failed)
    assert found.code == "retries_exhausted"
    assert "refused" in found.message


@pytest.mark.parametrize(("left_s", "expected"), [(5, "expired"), (4, "expired"), (-1, "expired"), (6, None)])
def test_no_attempt_begins_at_expired_time_or_later(left_s: float, expected: str | None) -> None:
    assert code(decision(NotSent("refused"), left_s=left_s)) == expected


@pytest.mark.parametrize("attempt", [1, 4, 9])
@pytest.mark.parametrize("left_s", [3600, -1])
def test_a_command_in_doubt_awaits_its_history_at_every_attempt_and_time(attempt: int, left_s: float) -> None:
    """The history may still know its uuid, and only a command that was not cached can expire."""
    found = decision(InDoubt("read timeout"), attempt, left_s=left_s)
    assert found == AwaitReconciliation(60, attempt, "read timeout", DOUBT)


@pytest.mark.parametrize("left_s", [3600, -1])
def test_an_earlier_doubt_travels_with_a_command_that_awaits_its_history(left_s: float) -> None:
    found = decision(InDoubt("read timeout"), 4, left_s=left_s, doubt=RIPE)
    assert found == AwaitReconciliation(60, 4, "read timeout", RIPE)


@pytest.mark.parametrize("attempt", [1, 2, 4])
def test_a_command_in_doubt_fails_as_unknown_in_mode_dead_letter(attempt: int) -> None:
    assert code(decision(InDoubt("read timeout"), attempt, DEAD_LETTER)) == "outcome_unknown"


def test_a_command_in_doubt_is_sent_again_in_mode_resend() -> None:
    assert decision(InDoubt("read timeout"), policy=RESEND) == Retry(5, 2, "read timeout", DOUBT)


@pytest.mark.parametrize(("attempt", "left_s"), [(4, 3600), (1, 4)])
@pytest.mark.parametrize("answer", [InDoubt("read timeout"), NotSent("refused")])
def test_a_command_that_was_in_doubt_is_never_reported_as_not_cached(
    attempt: int, left_s: float, answer: Answer
) -> None:
    assert code(decision(answer, attempt, RESEND, left_s, doubt=RIPE)) == "outcome_unknown"


def test_reconciliation_is_the_default_mode() -> None:
    """The other modes lose commands or send them twice: they must be chosen explicitly."""
    assert RetryPolicy((5,), 1).in_doubt == "reconcile"


@pytest.mark.parametrize("attempt", [1, 4])
def test_a_platform_outage_uses_up_no_attempt(attempt: int) -> None:
    """Not even the last attempt: an outage is over some time, whatever its length."""

    def found(answer: Answer, policy: RetryPolicy = POLICY) -> Decision:
        return decision(answer, attempt, policy, is_paused=True)

    assert found(NotSent("refused")) == Postpone(5, attempt, "refused", has_jitter=True)
    assert found(NotSent("429", 30)) == Postpone(30, attempt, "429")
    assert found(InDoubt("timeout")) == AwaitReconciliation(60, attempt, "timeout", DOUBT, is_free=True)
    assert found(InDoubt("timeout"), RESEND) == Postpone(5, attempt, "timeout", DOUBT, has_jitter=True)
    no = Refused("onenet_rejected", "auth failed", 1, may_concern_all_devices=True)
    assert found(no) == Postpone(5, attempt, "authentication refused: auth failed", has_jitter=True)
    no = Refused("http_rejected", "HTTP 404", may_concern_all_devices=True)
    assert found(no) == Postpone(5, attempt, "refused by something in front of OneNET: HTTP 404", has_jitter=True)


def test_a_clear_answer_to_one_command_holds_during_an_outage() -> None:
    refused = Refused("onenet_rejected", "device not online", 2001)
    assert decision(Cached("u"), is_paused=True) == Accepted("u")
    assert decision(refused, is_paused=True) == Rejected("onenet_rejected", "device not online", 2001)


def test_a_command_can_expire_during_an_outage() -> None:
    assert code(decision(NotSent("refused"), left_s=5, is_paused=True)) == "expired"


@pytest.mark.parametrize(
    ("ended_s", "delay_s"),
    [
        pytest.param(0, 60, id="it has just been sent"),
        pytest.param(59, 60, id="the usual delay is never divided"),
        pytest.param(-31, 60, id="records were lost: the next longer delay would be too long"),
        pytest.param(-60, 120, id="records were lost: one long delay instead of two"),
        pytest.param(-3600, 600, id="no delay is longer"),
    ],
)
def test_a_history_that_cannot_tell_yet_is_awaited_in_few_delays(ended_s: float, delay_s: int) -> None:
    policy = RetryPolicy((5, 30, 120, 600), max_attempts=3, reconcile_delay_s=60)
    until = NOW - timedelta(seconds=ended_s)
    assert policy.wait_s(DoubtWindow(None, until), NOW) == delay_s


def waiting(attempt: int, *, is_free: bool = False, crash_count: int | None = None) -> AwaitReconciliation:
    return AwaitReconciliation(60, attempt, "answer lost", DOUBT, is_free=is_free, crash_count=crash_count)


def test_an_unreadable_history_uses_up_attempts() -> None:
    found = [decide_unreadable("HTTP 500", waiting(attempt), POLICY) for attempt in (1, 3, 4)]
    assert [each.attempt for each in found if isinstance(each, AwaitReconciliation)] == [2, 4]
    assert code(found[2]) == "outcome_unknown"


@pytest.mark.parametrize("attempt", [1, 4])
def test_the_reason_for_an_unreadable_history_is_reported(attempt: int) -> None:
    found = decide_unreadable("HTTP 500", waiting(attempt), POLICY)
    assert "HTTP 500" in (found.reason if isinstance(found, AwaitReconciliation) else found.message)


@pytest.mark.parametrize("is_free", [True, False])
def test_an_unreadable_history_uses_up_nothing_while_histories_are_paused(is_free: bool) -> None:
    found = decide_unreadable("HTTP 503", waiting(4, is_free=is_free, crash_count=2), POLICY, is_paused=True)
    assert isinstance(found, AwaitReconciliation)
    assert (found.attempt, found.is_free, found.crash_count) == (4, is_free, 2)


def test_an_unreadable_history_uses_up_a_free_attempt_first() -> None:
    found = decide_unreadable("HTTP 503", waiting(4, is_free=True), POLICY)
    assert isinstance(found, AwaitReconciliation)
    assert (found.attempt, found.is_free) == (4, False)


@pytest.mark.parametrize(
    ("mode", "doubt", "envelope", "holder_crashed", "expected"),
    [
        # Nothing is in doubt.
        ("reconcile", None, Envelope(), False, Step.SEND),
        ("dead-letter", None, Envelope(), False, Step.SEND),
        ("resend", None, Envelope(), False, Step.SEND),
        # In doubt: the history decides, once it can tell.
        ("reconcile", DOUBT, Envelope(), False, Step.WAIT),
        ("reconcile", RIPE, Envelope(), False, Step.RECONCILE),
        ("dead-letter", RIPE, Envelope(), False, "outcome_unknown"),
        ("resend", RIPE, Envelope(), False, Step.SEND),
        # For a replay the history is always read.
        ("dead-letter", RIPE, Envelope(replay=Replay(NOW, None)), False, Step.RECONCILE),
        ("resend", RIPE, Envelope(replay=Replay(NOW, None)), False, Step.RECONCILE),
        # A command that may have crashed a worker.
        ("reconcile", None, Envelope(), True, Step.TRY_WITH_CARE),
        ("reconcile", DOUBT, Envelope(), True, Step.WAIT),
        ("reconcile", RIPE, Envelope(), True, Step.TRY_WITH_CARE),
        ("resend", RIPE, Envelope(), True, Step.TRY_WITH_CARE),
        ("dead-letter", RIPE, Envelope(), True, "outcome_unknown"),
        # A poison message: its history may be read a few times, because an earlier attempt may have succeeded.
        ("reconcile", DOUBT, POISON, True, Step.WAIT),
        ("reconcile", RIPE, POISON, True, Step.RECONCILE_WITH_CARE),
        ("reconcile", RIPE, UNREADABLE_POISON, True, "poison_message"),
        ("reconcile", None, POISON, True, "poison_message"),
        ("resend", RIPE, POISON, True, "poison_message"),
        ("dead-letter", RIPE, POISON, True, "poison_message"),
        ("reconcile", None, POISON, False, Step.SEND),  # its last attempt is known to have ended well
    ],
)
def test_the_next_step_follows_from_doubt_mode_and_crashes(
    mode: InDoubtMode,
    doubt: DoubtWindow | None,
    envelope: Envelope,
    holder_crashed: bool,
    expected: Step | str,
) -> None:
    policy = RetryPolicy((5, 30, 120), max_attempts=4, in_doubt=mode)
    found = next_step(doubt, envelope, policy, NOW, holder_crashed=holder_crashed)
    assert (found.code if isinstance(found, Failed) else found) == expected


@pytest.mark.parametrize(
    ("announced", "holder_crashed", "expected"), [(None, False, None), (None, True, 0), (2, False, 2), (2, True, 2)]
)
def test_a_postponed_command_keeps_its_attempt_and_its_crash_count(
    announced: int | None, holder_crashed: bool, expected: int | None
) -> None:
    envelope = Envelope(attempt=3, is_free_attempt=True, crash_count=announced)
    found = postponed(envelope, POLICY, "busy", DOUBT, holder_crashed=holder_crashed)
    assert found == Postpone(5, 3, "busy", DOUBT, is_free=True, crash_count=expected)


def test_a_command_that_awaits_its_history_keeps_what_its_message_says() -> None:
    envelope = Envelope(attempt=3, is_free_attempt=True, crash_count=2)
    found = awaiting(envelope, POLICY, "lost", DOUBT, attempt=3, holder_crashed=True)
    assert found == AwaitReconciliation(60, 3, "lost", DOUBT, is_free=True, crash_count=2)
    assert found.attempts_used == 2
