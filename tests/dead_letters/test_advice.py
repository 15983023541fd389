"""What an operator is told to do with a dead letter."""

from datetime import UTC, datetime
from typing import Any, get_args

import pytest

from schemas.reply import FailureCode
from tests.support.a_dead_letter import DEATH, a_dead_letter
from worker.dead_letters.advice import Advice, advise

NOW = datetime(2026, 8, 5, 12, tzinfo=UTC)
REPLAY, DISCARD = (f"onenet-worker dead-letters {verb}" for verb in ("replay 8f6c1d0e --wait", "discard 8f6c1d0e"))
IN_TIME = "2026-08-06T00:00:00Z"


def advice_for(reason: str, routing_key: str | None = None, **changes: Any) -> Advice:
    letter = a_dead_letter(reason, routing_key, **({"expired_time": IN_TIME} | changes))
    return advise(letter.listing(NOW), "8f6c1d0e", is_valid=letter.is_valid)


@pytest.mark.parametrize("reason", get_args(FailureCode))
def test_every_reason_has_a_meaning_an_answer_and_a_command_to_type(reason: str) -> None:
    advice = advice_for(reason)
    assert "another version" not in advice.meaning
    assert advice.replay.startswith("yes" if advice.is_replay_useful else "no")
    assert advice.commands[-1] == (REPLAY if advice.is_replay_useful else DISCARD)


@pytest.mark.parametrize(
    ("reason", "is_useful"),
    [("invalid_command", False), ("expired", False), ("retries_exhausted", True), ("outcome_unknown", True)],
)
def test_a_replay_is_advised_where_it_can_succeed(reason: str, is_useful: bool) -> None:
    assert advice_for(reason).is_replay_useful is is_useful


def test_what_has_expired_is_replayed_only_if_a_history_may_contain_it() -> None:
    past = "2026-08-05T11:00:00Z"
    assert advice_for("retries_exhausted", expired_time=past).commands == (DISCARD,)
    assert "expired_time has passed" in advice_for("retries_exhausted", expired_time=past).replay
    assert advice_for("outcome_unknown", expired_time=past).is_replay_useful


def test_the_device_is_looked_at_before_a_doubtful_command_is_replayed() -> None:
    assert advice_for("outcome_unknown").commands == ("onenet-worker device 865820030000001", REPLAY)


def test_the_upstream_system_is_named_that_has_to_act() -> None:
    assert "the upstream system billing" in advice_for("invalid_command").replay


def test_what_the_broker_dead_lettered_has_its_reason_explained() -> None:
    advice = advice_for("expired", "execute", headers=DEATH)
    assert "20 times" in advice.meaning
    assert (advice.is_replay_useful, advice.commands) == (True, (REPLAY,))
    unreadable = advice_for("expired", "execute", headers=DEATH, body=b"\xff")
    assert (unreadable.is_replay_useful, unreadable.commands) == (False, (REPLAY, DISCARD))


def test_a_reason_of_another_version_is_replayed_with_care() -> None:
    assert "another version" in advice_for("a_reason_of_tomorrow").meaning
