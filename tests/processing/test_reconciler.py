"""Commands in doubt: when a device's history is read, and what each history means for the command."""

import sys
from datetime import timedelta
from typing import Any

import pytest

from tests.support.builders import in_hours
from tests.support.engine import (
    PAST_DOUBT,
    RECONCILE_DELAY_S,
    Engine,
    a_copy,
    a_likely,
    a_task,
    an_unclear,
    do_nothing,
    expect,
    expect_postpone,
    expect_reconciliation,
    expect_retry,
    failure_of,
    in_doubt,
    notes,
    redelivered,
    reply_of,
)
from worker.core.answer import Cached, InDoubt, NotSent
from worker.core.doubt_window import DoubtWindow
from worker.core.platform import Candidate
from worker.core.resolution import AwaitReconciliation, Conclude


async def test_a_command_that_its_history_has_is_accepted_without_a_request(engine: Engine) -> None:
    engine.platform.candidates = [a_likely("found")]
    found = reply_of(await engine.process(a_task(in_doubt())))
    assert (found.status, found.uuid, found.recovered, found.attempts) == ("accepted", "found", True, 1)
    assert "request" not in engine.steps


async def test_a_command_that_its_history_does_not_have_is_sent_as_the_next_attempt(engine: Engine) -> None:
    accepted = reply_of(await engine.process(a_task(in_doubt(2))))
    assert engine.steps == ["claim", "history", "request", "complete"]
    assert (accepted.status, accepted.attempts, accepted.recovered) == ("accepted", 3, False)


async def test_only_a_command_that_was_not_cached_can_expire(engine: Engine) -> None:
    late = a_task(in_doubt(), expired_time=in_hours(-1))
    engine.platform.candidates = [a_likely("found")]
    assert reply_of(await engine.process(late)).status == "accepted"
    engine.restart()
    engine.platform.candidates = []
    assert failure_of(await engine.process(late)).code == "expired"
    assert "request" not in engine.steps


async def test_the_history_is_still_read_after_the_last_attempt(engine: Engine) -> None:
    engine.platform.candidates = [a_likely("found")]
    assert reply_of(await engine.process(a_task(in_doubt(3)))).status == "accepted"
    engine.restart()
    engine.platform.candidates = []
    assert failure_of(await engine.process(a_task(in_doubt(3)))).code == "retries_exhausted"


async def test_a_command_that_is_found_after_its_last_attempt_and_its_expiry_is_accepted(engine: Engine) -> None:
    engine.platform.candidates = [a_likely("found")]
    found = reply_of(await engine.process(a_task(in_doubt(3), expired_time=in_hours(-1))))
    assert (found.status, found.uuid, found.attempts) == ("accepted", "found", 3)
    assert engine.steps == ["claim", "history", "complete"]


async def test_an_unreadable_history_uses_up_attempts_and_ends_as_outcome_unknown(engine: Engine) -> None:
    engine.platform.candidates = None
    waiting = expect_reconciliation(await engine.process(a_task(in_doubt())))
    assert notes(engine.copy_of(waiting)) == {"attempt": 2, "doubt": PAST_DOUBT}  # the window has not grown
    engine.restart()
    assert failure_of(await engine.process(a_task(in_doubt(3)))).code == "outcome_unknown"
    assert "request" not in engine.steps


@pytest.mark.parametrize(("attempts", "call"), [(1, "release"), (3, "complete")])
async def test_the_error_of_an_unreadable_history_is_gone_while_that_is_recorded(
    engine: Engine, attempts: int, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It keeps all entries that were read."""
    engine.platform.candidates = None
    write = getattr(engine.store, call)
    handled: list[BaseException | None] = []

    async def noting(*args: Any, **named: Any) -> None:
        handled.append(sys.exception())
        await write(*args, **named)

    monkeypatch.setattr(engine.store, call, noting)
    await engine.process(a_task(in_doubt(attempts)))
    assert handled == [None]


async def test_several_entries_for_one_command_mean_outcome_unknown(engine: Engine) -> None:
    engine.platform.candidates = [a_likely("one"), a_likely("other")]
    assert failure_of(await engine.process(a_task(in_doubt()))).code == "outcome_unknown"


async def test_the_uuid_of_an_accepted_lookalike_is_not_assigned_again(engine: Engine) -> None:
    await engine.process(a_task(command_id="lookalike"))
    engine.platform.candidates = [a_likely("u")]
    engine.platform.answers = [Cached("another")]
    assert reply_of(await engine.process(a_task(in_doubt()))).uuid == "another"


async def test_nothing_is_decided_while_a_lookalike_is_in_progress(engine: Engine) -> None:
    engine.platform.candidates = [a_likely("u")]
    resolutions = engine.process_during_request(lambda: a_task(in_doubt(2)))
    assert reply_of(await engine.process(a_task(command_id="lookalike"))).uuid == "u"
    [resolution] = resolutions
    assert notes(engine.copy_of(expect_postpone(resolution))) == {"attempt": 2, "doubt": PAST_DOUBT}


async def test_a_command_that_waited_for_its_lookalike_is_sent_if_the_entry_is_the_lookalikes(engine: Engine) -> None:
    engine.platform.candidates = [a_likely("u")]
    resolutions = engine.process_during_request(lambda: a_task(in_doubt(2)))
    await engine.process(a_task(command_id="lookalike"))
    engine.platform.on_request = do_nothing
    engine.platform.answers = [Cached("its-own")]
    [resolution] = resolutions
    assert reply_of(await engine.process(a_task(engine.copy_of(resolution)))).uuid == "its-own"


async def test_a_uuid_that_a_lookalike_could_equally_own_is_recorded_as_a_guess(engine: Engine) -> None:
    """So that the lookalike, for which no other entry is left, is neither found nor proven absent."""
    engine.platform.answers = [InDoubt("read timeout")]
    lookalike = expect_reconciliation(await engine.process(a_task(command_id="lookalike")))
    engine.platform.candidates = [a_likely("one"), a_likely("other")]
    assert reply_of(await engine.process(a_task(in_doubt()))).uuid == "one"
    assert engine.store.guesses == [True]
    engine.platform.candidates = [a_likely("one")]
    engine.ahead_s += RECONCILE_DELAY_S + 1
    copy = engine.copy_of(lookalike)
    assert failure_of(await engine.process(a_task(copy, command_id="lookalike"))).code == "outcome_unknown"
    assert engine.steps.count("request") == 1


async def test_the_only_entry_of_a_command_without_lookalikes_is_recorded_as_certain(engine: Engine) -> None:
    engine.platform.candidates = [a_likely("one")]
    expect(Conclude, await engine.process(a_task(in_doubt())))
    assert engine.store.guesses == [False]


@pytest.mark.parametrize("call", ["owned_by_others", "ownership", "complete"])
async def test_a_store_failure_during_reconciliation_keeps_doubt_and_attempt(engine: Engine, call: str) -> None:
    engine.store.failing = {call}
    engine.platform.candidates = [a_likely("found")]
    copy = engine.copy_of(expect_postpone(await engine.process(a_task(in_doubt(2)))))
    assert notes(copy) == {"attempt": 2, "doubt": PAST_DOUBT}
    assert "request" not in engine.steps


async def test_a_command_that_waits_for_reconciliation_waits_on_without_a_history_read(engine: Engine) -> None:
    """The platform may still be processing the request, so that a history without it proves nothing."""
    doubt = DoubtWindow(PAST_DOUBT.since, engine.now().replace(microsecond=0))
    engine.platform.candidates = [a_likely("found")]
    waiting = expect_reconciliation(await engine.process(a_task(a_copy(attempt=2, doubt=doubt))))
    assert notes(engine.copy_of(waiting)) == {"attempt": 2, "doubt": doubt}  # no attempt is used up
    assert engine.steps == ["claim"]


async def test_after_a_restart_the_history_is_read_before_a_later_attempt_is_sent(engine: Engine) -> None:
    await engine.process(a_task(a_copy(attempt=2)))
    assert engine.steps == ["claim", "history", "request", "complete"]


async def test_the_reply_of_a_recovered_command_is_recorded_and_repeated_unchanged(engine: Engine) -> None:
    engine.platform.candidates = [Candidate("found", is_within_clock_skew=True, valid_time_omitted=True)]
    first = reply_of(expect(Conclude, await engine.process(a_task(in_doubt()))))
    assert (first.recovered, first.valid_time_omitted) == (True, True)
    assert await engine.recorded(a_task(in_doubt())) == first
    assert engine.steps.count("history") == 1


async def test_an_entry_with_another_time_is_neither_assigned_nor_proof_of_absence(
    engine: Engine,
) -> None:
    """Either would be a guess about two clocks."""
    engine.platform.candidates = [Candidate("u", is_within_clock_skew=False, valid_time_omitted=False)]
    assert failure_of(await engine.process(a_task(in_doubt()))).code == "outcome_unknown"
    assert "request" not in engine.steps


async def test_unclear_entries_mean_outcome_unknown_and_are_named_in_the_message(engine: Engine) -> None:
    """The platform cached something that merely looks different; the message says where to look."""
    engine.platform.candidates = [an_unclear("odd", "obj_id", "args"), an_unclear("", "cmd_uuid")]
    failed = failure_of(await engine.process(a_task(in_doubt())))
    assert failed.code == "outcome_unknown"
    assert "odd (obj_id, args)" in failed.message
    assert "without a cmd_uuid" in failed.message
    assert "request" not in engine.steps


async def test_an_equal_entry_is_assigned_whatever_else_is_unclear(engine: Engine) -> None:
    """A platform writes one value in one way, so that the entry written in another way is another command's."""
    engine.platform.candidates = [an_unclear("odd", "args"), a_likely("found")]
    found = reply_of(await engine.process(a_task(in_doubt())))
    assert (found.uuid, found.recovered) == ("found", True)


async def test_an_unclear_entry_that_is_recorded_for_another_command_delays_nothing(engine: Engine) -> None:
    engine.platform.answers = [Cached("odd"), Cached("own")]
    await engine.process(a_task(command_id="other", args="ON"))
    engine.platform.candidates = [an_unclear("odd", "args")]
    assert reply_of(await engine.process(a_task(in_doubt()))).uuid == "own"


async def test_the_equal_entry_of_a_lookalike_does_not_hide_that_another_entry_is_unclear(engine: Engine) -> None:
    engine.platform.answers = [Cached("lookalike's")]
    await engine.process(a_task(command_id="lookalike"))
    engine.platform.candidates = [a_likely("lookalike's"), an_unclear("odd", "args")]
    assert failure_of(await engine.process(a_task(in_doubt()))).code == "outcome_unknown"


async def test_a_doubt_that_the_history_ended_is_not_carried_on(engine: Engine) -> None:
    """The history has proved that the command was not cached, so a request that is not sent leaves no doubt."""
    engine.platform.answers = [NotSent("refused")]
    retry = expect_retry(await engine.process(a_task(in_doubt())), 30)
    assert notes(engine.copy_of(retry)) == {"attempt": 3}


async def test_a_redelivered_copy_in_doubt_keeps_the_beginning_of_its_window(engine: Engine) -> None:
    """No request began before a noted window did."""
    waiting = expect(AwaitReconciliation, await engine.process(a_task(redelivered(in_doubt()))))
    assert waiting.doubt.since == PAST_DOUBT.since
    assert waiting.doubt.until >= engine.now() - timedelta(seconds=10)
