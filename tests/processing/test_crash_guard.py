"""Commands that may have crashed a worker: announced before each attempt, counted, and given up in the end."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from tests.support.engine import (
    PAST_DOUBT,
    RECONCILE_DELAY_S,
    Engine,
    a_copy,
    a_likely,
    a_task,
    an_envelope,
    do_nothing,
    expect,
    expect_postpone,
    expect_reconciliation,
    failure_of,
    in_doubt,
    notes,
    redelivered,
    replaced,
    reply_of,
)
from worker.core.answer import Cached, InDoubt
from worker.core.doubt_window import DoubtWindow
from worker.core.outcome import Accepted
from worker.core.poison import MAX_CRASHES, MAX_HISTORY_READS, MAX_RETURNS
from worker.core.resolution import AwaitReconciliation, Conclude, Duplicate, Replaced


async def test_a_crash_suspect_is_not_tried_before_the_attempt_is_announced(engine: Engine) -> None:
    """Should it crash the worker again, the copy that was published before counts the crash."""
    result = replaced(await engine.process(a_task(in_doubt(crash_count=0))))
    assert engine.steps == ["claim", "announce", "history", "request", "complete"]
    copy = engine.announcement()
    assert (copy.attempt, copy.crash_count) == (1, 1)
    assert expect(Conclude, result).outcome == Accepted("u")
    assert (await engine.recorded(a_task(copy))).uuid == "u"  # the copy gets the recorded reply
    assert engine.steps.count("request") == 1


async def test_the_announcement_of_a_suspect_covers_the_attempt_that_follows(engine: Engine) -> None:
    """Should the attempt crash the worker, its request is in doubt, and only this copy tells."""
    before = datetime.now(UTC)
    await engine.process(a_task(in_doubt(crash_count=0)))
    doubt = engine.announcement().doubt
    assert doubt is not None
    assert doubt.since == PAST_DOUBT.since
    assert doubt.until >= before - timedelta(milliseconds=1)


async def test_an_announcement_delivered_during_its_attempt_is_postponed(engine: Engine) -> None:
    """While another delivery holds the lease the copy must not forget how often the command was tried."""
    resolutions = engine.process_during_request(lambda: a_task(engine.announcement()))
    await engine.process(a_task(in_doubt(crash_count=2)))
    [resolution] = resolutions
    assert engine.copy_of(expect_postpone(resolution)).crash_count == 3


async def test_a_redelivered_command_that_awaits_reconciliation_stays_a_suspect_by_its_record(engine: Engine) -> None:
    """Another message with its id must not try it unannounced."""
    expect_reconciliation(await engine.process(a_task(redelivered())))
    engine.ahead_s += RECONCILE_DELAY_S + 1
    engine.steps.clear()
    expect(Replaced, await engine.process(a_task()))
    assert engine.steps == ["claim", "announce", "history", "request", "complete"]


async def test_a_suspect_is_postponed_with_its_crash_count_while_another_suspect_is_tried(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two at a time would not tell which of them crashed the worker."""
    monkeypatch.setattr("worker.processing.crash_guard.SUSPECT_WAIT_S", 0.01)
    resolutions = engine.process_during_request(lambda: a_task(in_doubt(crash_count=2), command_id="b", args="b"))
    expect(Replaced, await engine.process(a_task(in_doubt(crash_count=0))))
    [resolution] = resolutions
    copy = engine.copy_of(expect_postpone(resolution))
    assert notes(copy) == {"attempt": 1, "crash_count": 2, "doubt": PAST_DOUBT}
    assert len(engine.announced) == 1
    engine.platform.on_request = do_nothing
    # Its record says the same, should another message with its id be delivered.
    expect(Replaced, await engine.process(a_task(command_id="b", args="b")))


async def test_a_suspect_is_not_tried_if_its_announcement_is_not_confirmed(engine: Engine) -> None:
    engine.is_confirmed = False
    assert await engine.process(a_task(in_doubt(crash_count=0))) == Replaced(None)
    assert not {"request", "history"} & set(engine.steps)


async def test_a_suspect_whose_announcement_is_not_confirmed_stays_one_and_no_attempt_is_counted(
    engine: Engine,
) -> None:
    """The copy may still be confirmed late, or never: nothing else may take the message's place here."""
    engine.is_confirmed = False
    assert await engine.process(a_task(in_doubt(crash_count=3))) == Replaced(None)
    assert engine.steps == ["claim", "announce"]
    engine.is_confirmed = True
    engine.announced.clear()
    result = replaced(await engine.process(a_task(in_doubt(crash_count=3))))
    assert isinstance(result, Conclude)
    assert engine.announcement().crash_count == 4
    assert engine.steps == ["claim", "announce", "claim", "announce", "history", "request", "complete"]


async def test_without_a_confirmed_announcement_a_store_that_fails_publishes_no_second_copy(engine: Engine) -> None:
    engine.is_confirmed = False
    engine.store.failing = {"release"}
    assert await engine.process(a_task(in_doubt(crash_count=0))) == Replaced(None)


async def test_the_announcement_of_a_suspect_repeats_what_its_history_has(engine: Engine) -> None:
    engine.platform.candidates = [a_likely("found")]
    result = replaced(await engine.process(a_task(in_doubt(2, crash_count=0))))
    assert expect(Conclude, result).outcome == Accepted("found", recovered=True)
    assert engine.steps == ["claim", "announce", "history", "complete"]
    copy = engine.announcement()
    assert (copy.crash_count, copy.attempt) == (1, 2)
    found = await engine.recorded(a_task(copy))
    assert (found.uuid, found.recovered, found.attempts) == ("found", True, 2)


async def test_the_failure_of_a_suspect_is_dead_lettered_when_its_announcement_is_delivered(engine: Engine) -> None:
    """The delivery that failed was acknowledged with the announcement, so that nothing else would dead-letter it."""
    engine.platform.candidates = [a_likely("one"), a_likely("other")]
    result = replaced(await engine.process(a_task(in_doubt(crash_count=0))))
    failed = expect(Conclude, result)
    assert failure_of(failed).code == "outcome_unknown"
    assert await engine.process(a_task(engine.announcement())) == Duplicate(failed.reply, True)


async def test_a_suspect_that_did_not_crash_its_worker_is_none_any_more(engine: Engine) -> None:
    engine.platform.answers = [InDoubt("read timeout")]
    result = replaced(await engine.process(a_task(in_doubt(crash_count=2))))
    assert isinstance(result, AwaitReconciliation)
    announcement = engine.announcement()
    assert announcement.crash_count == 3
    waiting = expect_reconciliation(await engine.process(a_task(announcement)))  # its request has just been made
    assert engine.copy_of(waiting).crash_count is None
    assert engine.steps.count("request") == 1


async def test_an_announcement_without_a_record_awaits_reconciliation_before_it_is_tried_again(engine: Engine) -> None:
    """The attempt crashed its worker: its request may still be in progress."""
    await engine.process(a_task(in_doubt(crash_count=0)))
    announcement = engine.announcement()
    engine.restart()
    engine.steps.clear()
    waiting = expect_reconciliation(await engine.process(a_task(announcement)))
    assert engine.copy_of(waiting).crash_count == 1
    assert engine.steps == ["claim"]


async def test_a_suspect_whose_outcome_cannot_be_recorded_leaves_everything_to_its_announcement(engine: Engine) -> None:
    """Its delivery is acknowledged, so that one more publication would be a second copy."""
    engine.store.failing = {"complete"}
    expect(Replaced, await engine.process(a_task(in_doubt(crash_count=0))))
    expect_postpone(await engine.process(a_task(engine.announcement())))  # the lease has not ended
    assert engine.steps.count("request") == 1


async def test_a_suspect_that_was_not_cached_uses_up_no_attempt(engine: Engine) -> None:
    """It is unknown whether that attempt was made; commands that crash workers are bounded by the crash count."""
    expect(Replaced, await engine.process(a_task(in_doubt(3, crash_count=0))))  # the last attempt
    accepted = await engine.recorded(a_task(engine.announcement()))
    assert (accepted.status, accepted.attempts) == ("accepted", 3)
    assert engine.steps.count("request") == 1


async def test_a_command_that_crashes_every_worker_is_poison_unless_its_history_has_it(engine: Engine) -> None:
    """A command that was accepted, and whose record ended with the worker, looks the same."""
    assert failure_of(await engine.process(a_task(in_doubt(crash_count=MAX_CRASHES)))).code == "poison_message"
    assert "request" not in engine.steps
    engine.restart()
    engine.platform.candidates = [a_likely("u")]
    found = reply_of(await engine.process(a_task(in_doubt(crash_count=MAX_CRASHES))))
    assert (found.status, found.uuid) == ("accepted", "u")


async def test_a_command_that_crashes_workers_even_when_its_history_is_read_is_poison_in_the_end(
    engine: Engine,
) -> None:
    returned = in_doubt(crash_count=MAX_CRASHES, times_returned=MAX_HISTORY_READS)
    assert failure_of(await engine.process(a_task(returned))).code == "poison_message"
    assert not {"request", "history"} & set(engine.steps)


async def test_a_copy_of_a_poison_message_counts_crashes_during_its_history_read(
    engine: Engine,
) -> None:
    """The broker starts its own count again for each copy, so that the message would circulate for ever."""
    now = datetime.now(UTC)
    poison = redelivered(a_copy(crash_count=MAX_CRASHES, times_returned=1, doubt=DoubtWindow(now, now)))
    waiting = expect_reconciliation(await engine.process(a_task(poison)))
    assert engine.copy_of(waiting).crash_count == MAX_CRASHES + 1


async def test_poison_is_recorded_and_has_a_reply_and_a_dead_letter(engine: Engine) -> None:
    resolution = expect(Conclude, await engine.process(a_task(in_doubt(2, crash_count=MAX_CRASHES))))
    assert failure_of(resolution).code == "poison_message"
    assert (resolution.reply.command_id, resolution.reply.attempts) == ("a", 2)
    assert resolution.reply.error is not None
    assert resolution.reply.error.code == "poison_message"
    assert engine.steps == ["claim", "history", "complete"]
    assert await engine.process(a_task()) == Duplicate(resolution.reply, False)


async def test_a_command_with_an_outcome_is_never_poison_however_often_it_was_tried(engine: Engine) -> None:
    """The crash count of a message includes attempts that finished: the record comes first."""
    first = reply_of(await engine.process(a_task()))
    assert await engine.recorded(a_task(in_doubt(crash_count=MAX_CRASHES))) == first


async def test_a_message_that_is_returned_too_often_is_postponed_before_the_broker_dead_letters_it(
    engine: Engine,
) -> None:
    first = expect_postpone(await engine.process(a_task(redelivered(a_copy(times_returned=MAX_RETURNS)))))
    assert engine.copy_of(first).crash_count == 1
    assert engine.steps == []
    worse = redelivered(a_copy(times_returned=MAX_RETURNS, crash_count=MAX_CRASHES))
    assert failure_of(await engine.process(a_task(worse))).code == "poison_message"


async def test_a_message_that_is_returned_too_often_is_not_even_parsed(engine: Engine) -> None:
    """Parsing it may crash the worker; and the reply must not depend on the message's content."""
    body = b"\xff no JSON"
    envelope = redelivered(an_envelope(times_returned=MAX_RETURNS, message_id="a"))
    postpone = expect_postpone(await engine.process(a_task(envelope, body=body)))
    copy = engine.copy_of(postpone)
    assert (copy.attempt, copy.crash_count, copy.message_id) == (1, 1, "a")
    assert copy.doubt is not None
    assert copy.doubt.since is None
    worse = redelivered(replace(copy, times_returned=MAX_RETURNS, crash_count=MAX_CRASHES))
    resolution = expect(Conclude, await engine.process(a_task(worse, body=body)))
    assert failure_of(resolution).code == "poison_message"
    assert resolution.reply.command_id == "a"  # as far as it can be told without parsing
    assert engine.steps == []


async def test_an_unparsed_message_whose_message_id_is_no_command_id_has_none_in_its_reply(engine: Engine) -> None:
    """A reply with it would break the reply's own rule, and the error crash the worker: poison again."""
    envelope = a_copy(times_returned=MAX_RETURNS, crash_count=MAX_CRASHES, message_id="no id: it has blanks")
    assert reply_of(await engine.process(a_task(redelivered(envelope), body=b""))).command_id is None


@pytest.mark.parametrize(("is_redelivered", "times_returned"), [(True, MAX_RETURNS - 1), (False, MAX_RETURNS)])
async def test_a_message_that_was_returned_less_often_or_is_a_new_copy_is_parsed(
    engine: Engine, is_redelivered: bool, times_returned: int
) -> None:
    await engine.process(a_task(a_copy(is_redelivered=is_redelivered, times_returned=times_returned)))
    assert engine.steps[0] == "claim"


async def test_an_unparsed_command_keeps_the_doubt_that_it_had(engine: Engine) -> None:
    before = datetime.now(UTC)
    postpone = expect_postpone(await engine.process(a_task(redelivered(in_doubt(times_returned=MAX_RETURNS)))))
    doubt = engine.copy_of(postpone).doubt
    assert doubt is not None
    assert doubt.since == PAST_DOUBT.since
    assert doubt.until >= before - timedelta(milliseconds=1)


async def test_an_unparsed_message_is_postponed_until_the_last_of_its_attempts(engine: Engine) -> None:
    envelope = redelivered(a_copy(times_returned=MAX_RETURNS, crash_count=MAX_CRASHES - 1))
    postpone = expect_postpone(await engine.process(a_task(envelope)))
    assert notes(engine.copy_of(postpone))["crash_count"] == MAX_CRASHES


async def test_a_suspect_whose_uuid_belongs_to_another_command_ends_in_nothing_but_a_doubt() -> None:
    """Even where its attempts are used up: its announcement returns and goes on, so nothing is concluded yet."""
    engine = Engine("resend")
    await engine.process(a_task(command_id="other", args="ON"))
    engine.platform.answers = [Cached("u"), Cached("its-own")]
    result = replaced(await engine.process(a_task(redelivered(a_copy(attempt=3)))))
    waiting = expect_reconciliation(result)
    assert waiting.attempt == 3
    assert reply_of(await engine.process(a_task(engine.announcement()))).uuid == "its-own"


async def test_the_outcome_of_a_last_reconciliation_is_published_before_the_next_suspect_is_tried(
    engine: Engine,
) -> None:
    """Otherwise commands tried along with a poison message are returned as often as it, and taken for poison too."""
    engine.platform.candidates = [a_likely("u")]
    result = await engine.process(a_task(in_doubt(crash_count=MAX_CRASHES)))
    assert reply_of(result).uuid == "u"
    assert engine.published is result
    assert (await engine.recorded(a_task())).uuid == "u"
    assert "announce" not in engine.steps


async def test_a_last_reconciliation_waits_while_another_suspect_is_tried(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.processing.crash_guard.SUSPECT_WAIT_S", 0.0)
    last = in_doubt(crash_count=MAX_CRASHES)
    resolutions = engine.process_during_request(lambda: a_task(last, command_id="b"))
    await engine.process(a_task(in_doubt(crash_count=0)))
    [resolution] = resolutions
    assert engine.copy_of(expect_postpone(resolution)).crash_count == MAX_CRASHES
    assert engine.steps.count("history") == 1
