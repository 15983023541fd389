"""From an answer to an outcome, rule by rule."""

from datetime import UTC, datetime, timedelta

import pytest

from worker.core.answer import Answer, Cached, InDoubt, NotSent, Refused
from worker.core.decide import RetryPolicy, decide, decide_unreadable
from worker.core.outcome import Accepted, AwaitReconciliation, Failed, Outcome, Rejected, Retry

NOW = datetime(2026, 8, 5, tzinfo=UTC)
POLICY = RetryPolicy((5, 30, 120), max_attempts=4)
RESEND = RetryPolicy((5, 30, 120), max_attempts=4, in_doubt="resend")
DEAD_LETTER = RetryPolicy((5, 30, 120), max_attempts=4, in_doubt="dead-letter")


def outcome(answer: Answer, attempt: int = 1, policy: RetryPolicy = POLICY, left_s: float = 3600) -> Outcome:
    return decide(answer, attempt, policy, now=NOW, expires_at=NOW + timedelta(seconds=left_s))


@pytest.mark.parametrize("attempt", [1, 4, 9])
def test_an_answer_is_an_outcome_whatever_the_attempt(attempt: int) -> None:
    assert outcome(Cached("u"), attempt) == Accepted("u")
    assert outcome(Refused("onenet_rejected", "no", 3), attempt, left_s=-1) == Rejected("onenet_rejected", "no", 3)


@pytest.mark.parametrize(("attempt", "delay_s"), [(1, 5), (2, 30), (3, 120)])
def test_what_was_not_sent_is_tried_again_later_and_later(attempt: int, delay_s: int) -> None:
    assert outcome(NotSent("refused"), attempt) == Retry(delay_s, attempt + 1, "refused")


@pytest.mark.parametrize(("asked_s", "delay_s"), [(0, 5), (5, 5), (6, 30), (31, 120), (9999, 120)])
def test_the_platforms_wait_is_the_least(asked_s: float, delay_s: int) -> None:
    assert outcome(NotSent("429", asked_s)) == Retry(delay_s, 2, "429", honours_retry_after=True)


@pytest.mark.parametrize("attempt", [1, 3, 4])
@pytest.mark.parametrize(("asked_s", "delay_s"), [(None, 5), (6, 30)])
def test_what_was_throttled_uses_up_no_attempt_and_begins_with_the_first_delay(
    attempt: int, asked_s: float | None, delay_s: int
) -> None:
    """Not even the last: it was not looked at."""
    found = outcome(NotSent("errno 15", asked_s, is_throttled=True), attempt)
    assert found == Retry(delay_s, attempt, "errno 15", honours_retry_after=asked_s is not None)


def test_what_was_throttled_expires_all_the_same() -> None:
    found = outcome(NotSent("errno 15", is_throttled=True), left_s=5)
    assert isinstance(found, Failed)
    assert found.code == "expired"


@pytest.mark.parametrize("attempt", [4, 5])
def test_attempts_run_out(attempt: int) -> None:
    found = outcome(NotSent("refused"), attempt)
    assert isinstance(found, Failed)
    assert found.code == "retries_exhausted"
    assert "refused" in found.message


@pytest.mark.parametrize(("left_s", "code"), [(5, "expired"), (4, "expired"), (-1, "expired"), (6, None)])
def test_no_attempt_begins_at_expired_time_or_later(left_s: float, code: str | None) -> None:
    found = outcome(NotSent("refused"), left_s=left_s)
    assert (found.code if isinstance(found, Failed) else None) == code


@pytest.mark.parametrize("attempt", [1, 4, 9])
@pytest.mark.parametrize("left_s", [3600, -1])
def test_what_may_have_been_cached_rests_whatever_the_attempt_and_the_time(attempt: int, left_s: float) -> None:
    """Its history may still know the uuid, and only what was not cached can expire."""
    assert outcome(InDoubt("read timeout"), attempt, left_s=left_s) == AwaitReconciliation(attempt, "read timeout")


@pytest.mark.parametrize("attempt", [1, 2, 4])
def test_or_ends_as_unknown_where_the_operator_wants_that(attempt: int) -> None:
    found = outcome(InDoubt("read timeout"), attempt, DEAD_LETTER)
    assert isinstance(found, Failed)
    assert found.code == "outcome_unknown"


def test_a_history_that_cannot_be_read_uses_up_attempts() -> None:
    found = [
        decide_unreadable("HTTP 500", AwaitReconciliation(attempt, "answer lost"), POLICY) for attempt in (1, 3, 4)
    ]
    assert [each.attempt for each in found if isinstance(each, AwaitReconciliation)] == [2, 4]
    assert isinstance(found[2], Failed)
    assert found[2].code == "outcome_unknown"


def test_unless_the_operator_accepts_that() -> None:
    assert outcome(InDoubt("read timeout"), policy=RESEND) == Retry(5, 2, "read timeout")


@pytest.mark.parametrize(("attempt", "left_s"), [(4, 3600), (1, 4)])
@pytest.mark.parametrize("answer", [InDoubt("read timeout"), NotSent("refused")])
def test_what_was_in_doubt_once_is_never_said_not_to_have_been_cached(
    attempt: int, left_s: float, answer: Answer
) -> None:
    expires_at = NOW + timedelta(seconds=left_s)
    found = decide(answer, attempt, RESEND, now=NOW, expires_at=expires_at, was_in_doubt=True)
    assert isinstance(found, Failed)
    assert found.code == "outcome_unknown"


def test_by_default_the_history_decides_what_is_in_doubt() -> None:
    """The other modes lose commands or send them twice: nobody gets them unasked."""
    assert RetryPolicy((5,), 1).in_doubt == "reconcile"


@pytest.mark.parametrize("left_s", [3600, -1])
def test_a_former_doubt_does_not_keep_a_command_from_resting(left_s: float) -> None:
    expires_at = NOW + timedelta(seconds=left_s)
    found = decide(InDoubt("read timeout"), 4, POLICY, now=NOW, expires_at=expires_at, was_in_doubt=True)
    assert found == AwaitReconciliation(4, "read timeout")


@pytest.mark.parametrize("policy", [POLICY, DEAD_LETTER, RESEND], ids=lambda policy: policy.in_doubt)
def test_a_clear_answer_is_the_same_in_every_mode(policy: RetryPolicy) -> None:
    assert outcome(Cached("u"), policy=policy) == Accepted("u")
    assert outcome(Refused("http_rejected", "403"), policy=policy) == Rejected("http_rejected", "403")
    assert outcome(NotSent("refused"), policy=policy) == Retry(5, 2, "refused")


@pytest.mark.parametrize("attempt", [1, 4])
def test_why_a_history_could_not_be_read_is_told(attempt: int) -> None:
    found = decide_unreadable("HTTP 500", AwaitReconciliation(attempt, "answer lost"), POLICY)
    assert "HTTP 500" in (found.reason if isinstance(found, AwaitReconciliation) else str(found))


@pytest.mark.parametrize("attempt", [1, 4])
def test_while_the_platform_is_down_for_all_no_attempt_is_used_up(attempt: int) -> None:
    """Not even the last: an outage is over some time, whatever its length."""

    def found(answer: Answer, policy: RetryPolicy = POLICY) -> Outcome:
        return decide(answer, attempt, policy, now=NOW, expires_at=NOW + timedelta(hours=1), is_paused=True)

    assert found(NotSent("refused")) == Retry(5, attempt, "refused")
    assert found(NotSent("429", 30)) == Retry(30, attempt, "429", honours_retry_after=True)
    assert found(InDoubt("timeout")) == AwaitReconciliation(attempt, "timeout", consumes_attempt=False)
    assert found(InDoubt("timeout"), RESEND) == Retry(5, attempt, "timeout")
    no = Refused("onenet_rejected", "auth failed", 1, may_concern_all_devices=True)
    assert found(no) == Retry(5, attempt, "authentication refused: auth failed")
    no = Refused("http_rejected", "HTTP 404", may_concern_all_devices=True)
    assert found(no) == Retry(5, attempt, "refused by something in front of OneNET: HTTP 404")


def test_what_the_platform_says_to_one_command_holds_even_then() -> None:
    for answer, expected in (
        (Cached("u"), Accepted("u")),
        (Refused("onenet_rejected", "device not online", 2001), Rejected("onenet_rejected", "device not online", 2001)),
    ):
        assert decide(answer, 1, POLICY, now=NOW, expires_at=NOW + timedelta(hours=1), is_paused=True) == expected


def test_even_then_no_attempt_is_made_after_expired_time() -> None:
    found = decide(NotSent("refused"), 1, POLICY, now=NOW, expires_at=NOW + timedelta(seconds=5), is_paused=True)
    assert isinstance(found, Failed)
    assert found.code == "expired"


@pytest.mark.parametrize("consumes_attempt", [True, False])
def test_a_history_that_cannot_be_read_then_changes_nothing(consumes_attempt: bool) -> None:
    settled = AwaitReconciliation(4, "timeout", consumes_attempt=consumes_attempt)
    found = decide_unreadable("HTTP 503", settled, POLICY, is_paused=True)
    assert isinstance(found, AwaitReconciliation)
    assert (found.attempt, found.consumes_attempt) == (4, consumes_attempt)


def test_an_attempt_that_was_spared_is_used_up_first() -> None:
    found = decide_unreadable("HTTP 503", AwaitReconciliation(4, "timeout", consumes_attempt=False), POLICY)
    assert isinstance(found, AwaitReconciliation)
    assert (found.attempt, found.consumes_attempt) == (4, True)
