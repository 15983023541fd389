"""The way of one command: claimed, sent once, recorded, and answered alike however often it is delivered."""

import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from tests.support.builders import in_hours
from tests.support.engine import (
    DELAYS_S,
    LONG_AGO,
    PAST_DOUBT,
    RECONCILE_DELAY_S,
    Engine,
    a_copy,
    a_likely,
    a_task,
    an_envelope,
    expect,
    expect_postpone,
    expect_reconciliation,
    expect_retry,
    failure_of,
    in_doubt,
    notes,
    redelivered,
    replaced,
    reply_of,
)
from worker.core.answer import InDoubt, NotSent
from worker.core.decide import InDoubtMode
from worker.core.doubt_window import DoubtWindow
from worker.core.envelope import Envelope, Replay
from worker.core.outcome import Accepted
from worker.core.resolution import Conclude, Duplicate
from worker.errors import HistoryUnreadable

EXPIRED = "2026-01-01T00:00:00"


async def test_an_outcome_is_recorded_before_anything_is_published(engine: Engine) -> None:
    """So that whatever fails from there on repeats the reply and never the request."""
    resolution = expect(Conclude, await engine.process(a_task()))
    assert resolution.outcome == Accepted("u")
    assert engine.steps == ["claim", "request", "complete"]


@pytest.mark.parametrize("is_omitted", [True, False])
async def test_a_reply_tells_whether_valid_time_was_part_of_the_request(engine: Engine, is_omitted: bool) -> None:
    engine.platform.valid_time_omitted = is_omitted
    assert reply_of(await engine.process(a_task())).valid_time_omitted is is_omitted


async def test_a_redelivered_command_with_an_outcome_gets_the_recorded_reply(engine: Engine) -> None:
    first = reply_of(await engine.process(a_task()))
    again = expect(Duplicate, await engine.process(a_task(redelivered())))
    assert again == Duplicate(first, repeats_all=True)
    assert engine.steps.count("request") == 1


async def test_a_redelivered_failure_is_dead_lettered_again_and_a_duplicate_message_is_not(engine: Engine) -> None:
    """Perhaps the dead letter of the redelivered message is the one that was not confirmed."""
    failed = expect(Conclude, await engine.process(a_task(expired_time=EXPIRED)))
    assert failure_of(failed).code == "expired"
    assert await engine.process(a_task(redelivered(), expired_time=EXPIRED)) == Duplicate(failed.reply, True)
    # Another message with the id: its dead letter is there already.
    assert await engine.process(a_task(expired_time=EXPIRED)) == Duplicate(failed.reply, False)


async def test_a_command_whose_answer_is_lost_awaits_reconciliation_with_the_window_of_its_request(
    engine: Engine,
) -> None:
    engine.platform.answers = [InDoubt("read timeout")]
    before = engine.now()
    waiting = expect_reconciliation(await engine.process(a_task()))
    assert waiting.doubt.since is not None
    assert before <= waiting.doubt.since <= waiting.doubt.until <= datetime.now(UTC)
    assert waiting.attempt == 1
    assert engine.copy_of(waiting).doubt == DoubtWindow.parse(str(waiting.doubt))


async def test_a_second_copy_of_a_command_in_doubt_waits_without_a_request(engine: Engine) -> None:
    """A retry that was known not sent and a copy in doubt may both be on their way: the later one must not send."""
    engine.platform.answers = [InDoubt("read timeout")]
    await engine.process(a_task())
    expect_reconciliation(await engine.process(a_task(a_copy(attempt=2))))
    assert engine.steps.count("request") == 1
    assert "history" not in engine.steps


async def test_a_command_that_was_not_sent_is_sent_when_its_retry_is_delivered(engine: Engine) -> None:
    engine.platform.answers = [NotSent("refused")]
    retry = expect_retry(await engine.process(a_task()))
    copy = engine.copy_of(retry)
    assert notes(copy) == {"attempt": 2}
    resolution = expect(Conclude, await engine.process(a_task(copy)))
    assert (resolution.reply.status, resolution.reply.attempts) == ("accepted", 2)
    assert engine.steps.count("request") == 2


async def test_a_redelivered_original_and_its_confirmed_retry_cause_one_request_between_them(engine: Engine) -> None:
    """The process was cut off between the retry's confirm and the acknowledgement, so both are delivered."""
    engine.platform.answers = [NotSent("refused")]
    retry = await engine.process(a_task())
    original = expect(Conclude, await engine.process(a_task(redelivered())))
    assert original.reply.status == "accepted"
    assert await engine.process(a_task(engine.copy_of(retry))) == Duplicate(original.reply, True)
    assert engine.steps.count("request") == 2  # the refused one, and one that got through


async def test_a_redelivered_command_without_a_record_awaits_reconciliation_first(engine: Engine) -> None:
    waiting = expect_reconciliation(await engine.process(a_task(redelivered())))
    copy = engine.copy_of(waiting)
    assert copy.doubt is not None
    assert (copy.doubt.since, copy.crash_count) == (None, 0)
    assert not {"request", "history"} & set(engine.steps)


async def test_a_delivery_that_was_not_started_raises_no_doubt_when_it_is_redelivered(engine: Engine) -> None:
    engine.unstarted.mark_not_sent(a_task())
    assert reply_of(await engine.process(a_task(redelivered()))).status == "accepted"


async def test_a_delivery_in_doubt_that_was_not_started_stays_in_doubt_when_it_is_redelivered(engine: Engine) -> None:
    engine.unstarted.mark_not_sent(a_task(redelivered()))
    expect_reconciliation(await engine.process(a_task(redelivered())))
    assert "request" not in engine.steps


async def test_a_delivery_of_a_command_in_progress_is_postponed(engine: Engine) -> None:
    resolutions = engine.process_during_request(lambda: a_task(redelivered()))
    assert reply_of(await engine.process(a_task())).status == "accepted"
    other = engine.copy_of(expect_postpone(resolutions[0]))
    assert other.doubt is not None  # all there is, should the record be lost
    assert other.doubt.since is None  # a process of which no record is left may have sent it
    assert engine.steps.count("request") == 1


async def test_nothing_is_sent_while_the_store_is_unavailable(engine: Engine) -> None:
    engine.store.failing = {"claim"}
    first = expect_postpone(await engine.process(a_task()))
    assert not first.is_unclaimed
    assert notes(engine.copy_of(first)) == {"attempt": 1}
    doubt = engine.copy_of(expect_postpone(await engine.process(a_task(redelivered())))).doubt
    assert doubt is not None  # a copy does not look redelivered
    assert doubt.since is None
    assert "request" not in engine.steps


async def test_a_command_whose_outcome_cannot_be_recorded_is_in_doubt(engine: Engine) -> None:
    engine.store.failing = {"complete"}
    before = engine.now()
    doubt = engine.copy_of(expect_postpone(await engine.process(a_task()))).doubt
    assert doubt is not None
    assert doubt.since is not None
    assert doubt.since >= before - timedelta(milliseconds=1)


async def test_a_command_that_was_not_sent_is_not_in_doubt_although_the_store_is_unavailable(engine: Engine) -> None:
    """A doubt where there is none would delay each command whenever the store is unavailable."""
    engine.store.failing = {"complete", "release"}
    expired = await engine.process(a_task(expired_time=in_hours(-1)))
    assert notes(engine.copy_of(expect_postpone(expired))) == {"attempt": 1}
    engine.platform.answers = [NotSent("refused")]
    not_sent = await engine.process(a_task(command_id="b"))
    assert notes(engine.copy_of(expect_postpone(not_sent))) == {"attempt": 1}


async def test_a_command_whose_answer_is_lost_stays_in_doubt_when_its_release_fails(engine: Engine) -> None:
    engine.platform.answers = [InDoubt("read timeout")]
    engine.store.failing = {"release"}
    before = engine.now()
    postpone = expect_postpone(await engine.process(a_task()))
    assert postpone.doubt is not None
    assert postpone.doubt.since is not None
    assert before <= postpone.doubt.since <= postpone.doubt.until
    engine.restart()  # its lease ends with the process
    copy = engine.copy_of(postpone)
    assert copy.doubt == DoubtWindow.parse(str(postpone.doubt))
    expect_reconciliation(await engine.process(a_task(copy)))
    assert engine.steps.count("request") == 1


async def test_a_redelivered_command_whose_release_fails_is_in_doubt_from_an_unknown_time(engine: Engine) -> None:
    """The copy that takes its place does not look redelivered."""
    engine.unstarted.mark_not_sent(a_task())
    engine.platform.answers = [InDoubt("read timeout")]
    engine.store.failing = {"release"}
    doubt = expect_postpone(await engine.process(a_task(redelivered()))).doubt
    assert doubt is not None
    assert doubt.since is None


async def test_an_accepted_command_that_was_not_recorded_is_found_in_the_history_and_not_sent_again(
    engine: Engine,
) -> None:
    engine.store.failing = {"complete"}
    noted = engine.copy_of(await engine.process(a_task())).doubt
    assert noted is not None
    assert noted.since is not None
    engine.restart()  # which ends the lease, as far as this process knows
    engine.platform.candidates = [a_likely("u")]
    long_since = DoubtWindow(noted.since - timedelta(hours=1), noted.until - timedelta(hours=1))
    found = reply_of(await engine.process(a_task(a_copy(doubt=long_since))))
    assert (found.uuid, found.recovered) == ("u", True)
    assert engine.steps.count("request") == 1


async def test_a_copy_keeps_doubt_and_crash_count_while_the_store_is_unavailable(
    engine: Engine,
) -> None:
    engine.store.failing = {"claim"}
    suspect = in_doubt(2, crash_count=3)
    copy = engine.copy_of(expect_postpone(await engine.process(a_task(suspect))))
    assert notes(copy) == notes(suspect) == {"attempt": 2, "doubt": PAST_DOUBT, "crash_count": 3}
    assert engine.steps == []


async def test_a_command_of_an_unknown_product_fails_unless_it_may_have_been_sent(engine: Engine) -> None:
    assert failure_of(await engine.process(a_task(product="gone"))).code == "unknown_product"
    engine.platform.candidates = None
    expect_reconciliation(await engine.process(a_task(in_doubt(), product="gone")))


async def test_a_command_in_doubt_of_an_unknown_product_ends_as_outcome_unknown(
    engine: Engine,
) -> None:
    """The code unknown_product would say that it was not sent."""
    engine.platform.candidates = None
    assert failure_of(await engine.process(a_task(in_doubt(3), product="gone"))).code == "outcome_unknown"
    assert engine.steps == ["claim", "history", "complete"]


async def test_expired_time_is_checked_before_each_request(engine: Engine) -> None:
    assert failure_of(await engine.process(a_task(expired_time=in_hours(-1)))).code == "expired"
    assert "request" not in engine.steps


async def test_a_command_that_can_never_succeed_is_not_recorded(engine: Engine) -> None:
    for envelope in (an_envelope(), redelivered()):
        resolution = expect(Conclude, await engine.process(a_task(envelope, retry=11)))
        assert failure_of(resolution).code == "invalid_command"
    assert engine.steps == []


async def test_a_doubt_that_only_the_record_knows_counts_as_much_as_a_noted_one(engine: Engine) -> None:
    """The retry of an attempt that was not sent says nothing of the copy whose answer was lost meanwhile."""
    engine.platform.answers = [NotSent("refused"), InDoubt("read timeout")]
    retry = engine.copy_of(await engine.process(a_task()))
    assert retry.doubt is None
    expect_reconciliation(await engine.process(a_task(redelivered())))
    waiting = expect_reconciliation(await engine.process(a_task(retry)))
    assert engine.copy_of(waiting).doubt is not None
    assert engine.steps.count("request") == 2


async def test_a_command_id_with_other_content_is_a_conflict_and_leaves_the_first_command_alone(engine: Engine) -> None:
    """Its reply must not be taken for the first one's, and its own is not recorded over it."""
    first = reply_of(await engine.process(a_task()))
    conflict = expect(Conclude, await engine.process(a_task(res_id=1, args="off")))
    failed = failure_of(conflict)
    assert failed.code == "command_id_conflict"
    assert failed.message == "the command_id belongs to a command with another content: res_id, args differ"
    assert [detail.field for detail in failed.details] == ["command_id", "res_id", "args"]
    assert (engine.steps.count("request"), engine.steps.count("complete")) == (1, 1)
    assert await engine.process(a_task()) == Duplicate(first, False)


async def test_dead_letter_mode_makes_a_lost_answer_and_an_unrecorded_redelivery_unknown() -> None:
    engine = Engine("dead-letter")
    engine.platform.answers = [InDoubt("read timeout")]
    assert failure_of(await engine.process(a_task())).code == "outcome_unknown"
    assert failure_of(await engine.process(a_task(redelivered(), command_id="b"))).code == "outcome_unknown"
    assert engine.steps.count("request") == 1


async def test_in_mode_dead_letter_the_outcome_of_a_redelivery_without_a_record_is_recorded() -> None:
    engine = Engine("dead-letter")
    failed = expect(Conclude, await engine.process(a_task(redelivered())))
    assert failure_of(failed).code == "outcome_unknown"
    assert engine.steps == ["claim", "complete"]
    assert await engine.process(a_task(redelivered())) == Duplicate(failed.reply, True)  # for its dead letter's sake
    assert engine.steps == ["claim", "complete", "claim"]


async def test_a_suspect_without_a_recorded_outcome_stays_a_suspect() -> None:
    engine = Engine("dead-letter")
    engine.store.failing = {"complete"}
    copy = engine.copy_of(expect_postpone(await engine.process(a_task(redelivered()))))
    assert copy.crash_count == 0
    assert copy.doubt is not None


async def test_in_mode_resend_a_command_in_doubt_is_sent_again_without_a_history_read() -> None:
    engine = Engine("resend")
    engine.platform.answers = [InDoubt("read timeout")]
    retry = expect_retry(await engine.process(a_task()))
    copy = engine.copy_of(retry)
    assert copy.attempt == 2
    assert copy.doubt is not None
    assert reply_of(await engine.process(a_task(copy))).status == "accepted"
    assert engine.steps.count("request") == 2
    assert "history" not in engine.steps


async def test_in_mode_resend_a_redelivery_without_a_record_is_announced_and_tried_at_once() -> None:
    """A command that may have crashed a worker is announced in every mode."""
    engine = Engine("resend")
    result = replaced(await engine.process(a_task(redelivered())))
    assert engine.steps == ["claim", "announce", "request", "complete"]
    assert engine.announcement().crash_count == 1
    assert result is not None
    assert await engine.process(a_task(engine.announcement())) == Duplicate(reply_of(result), True)


async def test_in_mode_resend_the_outcome_of_a_command_in_doubt_is_never_that_it_was_not_cached() -> None:
    engine = Engine("resend")
    late = a_task(in_doubt(2), expired_time=in_hours(-1))
    assert failure_of(await engine.process(late)).code == "outcome_unknown"
    assert "request" not in engine.steps


class TestForgottenCopies:
    """Copies of commands that first arrived before the records in memory begin."""

    async def test_a_copy_older_than_the_records_in_memory_awaits_reconciliation_before_it_is_sent(
        self, engine: Engine
    ) -> None:
        """The worker was killed between the copy's confirm and the acknowledgement of its original.

        The next process sent the original and was killed as well. Then the copy is delivered: no record tells of the
        request.
        """
        message = an_envelope()
        engine.platform.answers = [NotSent("throttled", is_throttled=True)]
        copy = engine.copy_of(expect_postpone(await engine.process(a_task(message))))
        assert notes(copy) == {"attempt": 1}  # nothing on it tells of a request
        engine.restart(began_at=engine.now())
        engine.seconds += 1
        second = engine.copy_of(await engine.process(a_task(redelivered(message))))
        engine.ahead_s += RECONCILE_DELAY_S + 1
        await engine.kill_during_request(a_task(second))
        engine.restart(began_at=engine.now())
        sent = engine.steps.count("request")
        waiting = expect_reconciliation(await engine.process(a_task(copy)))
        assert waiting.doubt.since is None
        assert waiting.doubt.until >= engine.now() - timedelta(seconds=10)
        assert engine.steps.count("request") == sent
        engine.ahead_s += RECONCILE_DELAY_S + 1
        engine.platform.candidates = [a_likely("its-own")]
        found = reply_of(await engine.process(a_task(engine.copy_of(waiting))))
        assert (found.uuid, found.recovered) == ("its-own", True)
        assert engine.steps.count("request") == sent

    @pytest.mark.parametrize("way", ["republished by this process", "republished for the next", "connection lost"])
    async def test_a_copy_older_than_the_records_stays_in_doubt_when_it_is_not_started(
        self, engine: Engine, way: str
    ) -> None:
        copy = a_copy()
        engine.restart(began_at=engine.now() + timedelta(seconds=1))
        task = a_task(copy)
        engine.unstarted.mark_not_sent(task)
        again = redelivered(copy) if way == "connection lost" else engine.republished(task, is_stopping=True)
        if way == "republished for the next":
            engine.restart(began_at=engine.now() + timedelta(seconds=2))
        expect_reconciliation(await engine.process(a_task(again)))
        assert "request" not in engine.steps

    async def test_only_what_a_stopping_process_returned_is_sent_at_once_by_the_next(self, engine: Engine) -> None:
        """One that goes on may send the original too, if that was not acknowledged."""
        paused, stopped = engine.republished(a_task()), engine.republished(a_task(), is_stopping=True)
        again = engine.republished(a_task(stopped))
        engine.ahead_s += 1
        engine.restart(began_at=engine.now())
        assert reply_of(await engine.process(a_task(replace(stopped, arrived_at=time.time() + 2)))).status == "accepted"
        engine.restart(began_at=engine.now())
        for copy in (paused, again):
            expect_reconciliation(await engine.process(a_task(copy)))
        assert engine.steps.count("request") == 1

    async def test_what_a_stopped_process_returned_and_a_paused_one_returned_again_is_sent_at_once_by_that(
        self, engine: Engine
    ) -> None:
        stopped = engine.republished(a_task(an_envelope(first_arrived_at=LONG_AGO.timestamp() - 1)), is_stopping=True)
        again = engine.republished(a_task(stopped))
        assert reply_of(await engine.process(a_task(again))).status == "accepted"
        assert "history" not in engine.steps

    async def test_a_copy_that_first_arrived_after_the_records_in_memory_begin_is_sent_at_once(
        self, engine: Engine
    ) -> None:
        assert reply_of(await engine.process(a_task(a_copy()))).status == "accepted"
        assert "history" not in engine.steps

    async def test_a_first_delivery_is_sent_at_once_however_long_ago_it_claims_to_have_arrived(
        self, engine: Engine
    ) -> None:
        old = an_envelope(first_arrived_at=LONG_AGO.timestamp() - 1)
        assert reply_of(await engine.process(a_task(old))).status == "accepted"
        assert "history" not in engine.steps


class TestReplays:
    """Failed commands that an operator replays."""

    FAILED_AT = LONG_AGO + timedelta(minutes=1)

    @staticmethod
    def replay(failed_at: datetime, doubt: DoubtWindow | None = None) -> Envelope:
        return a_copy(replay=Replay(failed_at, doubt), doubt=doubt, is_free_attempt=True)

    @staticmethod
    async def fail(engine: Engine) -> datetime:
        """Let a command fail for good; returns when it failed, as a dead letter has it."""
        envelope = await engine.last_attempt()
        await engine.process(a_task(command_id="another"))  # so that the platform is not down
        engine.platform.answers = [NotSent("refused")]
        failed = expect(Conclude, await engine.process(a_task(envelope)))
        assert failure_of(failed).code == "retries_exhausted"
        engine.steps.clear()
        return datetime.fromisoformat(failed.reply.completed_at.isoformat(timespec="milliseconds"))

    async def test_a_replay_sends_a_failed_command_once_and_no_other_message_does(self, engine: Engine) -> None:
        failed_at = await self.fail(engine)
        assert (await engine.recorded(a_task())).status == "failed"
        accepted = reply_of(expect(Conclude, await engine.process(a_task(self.replay(failed_at)))))
        assert (accepted.status, accepted.attempts) == ("accepted", 1)
        assert engine.steps.count("request") == 1
        assert await engine.recorded(a_task(self.replay(failed_at))) == accepted  # the order may arrive twice
        assert engine.steps.count("request") == 1

    async def test_a_replay_of_a_command_whose_product_is_still_unknown_fails_in_the_same_way(
        self, engine: Engine
    ) -> None:
        """It is replayed in doubt, because an earlier attempt may have known the product; nothing was sent since."""
        doubt = DoubtWindow(None, self.FAILED_AT)
        order = a_copy(replay=Replay(self.FAILED_AT, doubt, "unknown_product"), doubt=doubt, is_free_attempt=True)
        failed = expect(Conclude, await engine.process(a_task(order, product="heating")))
        assert failure_of(failed).code == "unknown_product"
        assert failure_of(failed).message == "product: heating is not configured"
        engine.platform.history_error = HistoryUnreadable("the product has no credentials any more")
        for unsure in (replace(order, is_redelivered=True), replace(order, replay=Replay(self.FAILED_AT, doubt))):
            expect_reconciliation(await engine.process(a_task(unsure, product="heating")))
        assert "request" not in engine.steps

    async def test_a_replay_for_an_unknown_product_that_arrives_twice_has_one_outcome(self, engine: Engine) -> None:
        """The product was there for the first of them, and has been removed since."""
        accepted = reply_of(await engine.process(a_task(command_id="c-1")))
        doubt = DoubtWindow(None, self.FAILED_AT)
        order = a_copy(replay=Replay(self.FAILED_AT, doubt, "unknown_product"), doubt=doubt, is_free_attempt=True)
        engine.platform.products.clear()
        for again in (order, an_envelope()):
            assert await engine.recorded(a_task(again, command_id="c-1")) == accepted
        engine.store.failing = {"is_known_not_sent"}
        expect_postpone(await engine.process(a_task(order, command_id="c-1")))
        assert engine.steps.count("request") == 1

    async def test_a_replay_whose_failure_is_not_recorded_awaits_reconciliation(self, engine: Engine) -> None:
        """It may be the second delivery of the order, and the record of the first be gone."""
        waiting = expect_reconciliation(await engine.process(a_task(self.replay(self.FAILED_AT))))
        copy = engine.copy_of(waiting)
        assert copy.doubt is not None
        assert copy.doubt.since == self.FAILED_AT
        assert "request" not in engine.steps

    @pytest.mark.parametrize("mode", ["reconcile", "dead-letter", "resend"])
    async def test_the_history_of_a_replay_in_doubt_is_read_in_every_mode(self, mode: InDoubtMode) -> None:
        engine = Engine(mode)
        failed_at = await self.fail(engine)
        accepted = reply_of(await engine.process(a_task(self.replay(failed_at, DoubtWindow(None, LONG_AGO)))))
        assert engine.steps == ["claim", "history", "request", "complete"]
        assert (accepted.status, accepted.attempts) == ("accepted", 1)

    async def test_a_postponed_replay_is_still_a_replay_when_its_copy_is_delivered(self, engine: Engine) -> None:
        failed_at = await self.fail(engine)
        engine.pause()
        copy = engine.copy_of(expect_postpone(await engine.process(a_task(self.replay(failed_at)))))
        assert copy.replay is not None
        assert copy.replay.failed_at == failed_at
        assert (copy.attempt, copy.is_free_attempt) == (1, True)


async def test_a_duplicate_message_that_was_not_started_is_in_doubt_once_its_original_was_claimed(
    engine: Engine,
) -> None:
    """Found by chaos tests: the original was accepted, the worker killed, and the copy that only waited was sent."""
    duplicate = a_task()
    assert engine.republished(duplicate).doubt is None
    engine.unstarted.mark_not_sent(duplicate)
    assert engine.republished(duplicate).doubt is None
    await engine.process(a_task())
    for copy in (engine.republished(duplicate), engine.postponed(duplicate)):
        engine.restart()
        expect_reconciliation(await engine.process(a_task(copy)))
    assert engine.steps.count("request") == 1


@pytest.mark.parametrize("doubt", [None, PAST_DOUBT])
async def test_a_copy_that_its_delay_queue_returned_early_rests_on_as_it_is(
    engine: Engine, doubt: DoubtWindow | None
) -> None:
    """A policy of the broker may give all queues a short time to live; that makes no doubt and uses up no attempt."""
    now = time.time()
    envelope = a_copy(attempt=2, doubt=doubt, arrived_at=now, delay=(now - 1, now + 59))
    postponed = expect_postpone(await engine.process(a_task(envelope)), DELAYS_S[-1])
    assert (postponed.attempt, postponed.doubt) == (2, doubt)
    assert engine.platform.steps == []
