"""While the platform is down or throttles: which commands wait, what a probe uses up, and what ends a pause."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.support.builders import in_hours
from tests.support.engine import (
    DEVICES,
    PAST_DOUBT,
    PAUSE_AFTER,
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
    reply_of,
)
from worker.core.answer import Answer, Cached, InDoubt, NotSent, Refused
from worker.core.claims import Claim
from worker.core.outcome import Accepted, Rejected
from worker.core.pauses import Order, Pauses
from worker.core.resolution import Conclude, Resolution
from worker.errors import HistoryUnreadable

AUTH_FAILED = Refused("onenet_rejected", "auth failed", 1, may_concern_all_devices=True)


async def test_a_command_of_a_paused_product_is_postponed_unclaimed(engine: Engine) -> None:
    engine.pause()
    postpone = expect_postpone(await engine.process(a_task(a_copy(attempt=2))))
    assert postpone.is_unclaimed
    assert notes(engine.copy_of(postpone)) == {"attempt": 2}
    assert engine.steps == []


async def test_a_command_that_was_claimed_before_its_product_was_paused_is_not_postponed_unclaimed(
    engine: Engine,
) -> None:
    """Its record tells that it was not sent: nothing has to be noted should the copy not be confirmed."""
    engine.pause()
    postpone = expect_postpone(await engine.process(a_task(in_doubt())))
    assert (postpone.is_unclaimed, postpone.has_jitter) == (False, True)
    assert engine.steps == ["claim", "history"]


async def test_a_pause_by_hand_holds_for_a_command_that_is_being_claimed(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its worker has said that it is paused; a claim in Redis may take seconds."""
    order = Order(id="1", kind="pause", by="alice", at=datetime.now(UTC))
    claim = engine.store.claim

    async def claim_while_paused(*args: Any, **options: Any) -> Claim:
        claimed = await claim(*args, **options)
        engine.breakers.pause_by_hand(Pauses((order,)))
        return claimed

    with monkeypatch.context() as patched:
        patched.setattr(engine.store, "claim", claim_while_paused)
        postpone = expect_postpone(await engine.process(a_task()))
    assert postpone.reason == "nothing is sent for now: paused by hand by alice"
    assert engine.steps == ["claim"]
    engine.breakers.pause_by_hand(Pauses())
    assert reply_of(await engine.process(a_task(engine.copy_of(postpone)))).status == "accepted"


def test_a_delivery_that_is_postponed_unclaimed_keeps_every_note_on_it(engine: Engine) -> None:
    suspect = in_doubt(2, crash_count=3, is_free_attempt=True)
    assert notes(engine.postponed(a_task(suspect))) == notes(suspect)
    assert notes(engine.republished(a_task(suspect))) == notes(suspect)


async def test_a_redelivered_command_in_doubt_stays_in_doubt_while_its_product_is_paused(engine: Engine) -> None:
    """The copy does not look redelivered: it has to say what the message itself would say."""
    engine.pause()
    before = datetime.now(UTC)
    waiting = expect_reconciliation(await engine.process(a_task(redelivered(in_doubt(crash_count=1)))))
    copy = engine.copy_of(waiting)
    assert copy.doubt is not None
    assert (copy.doubt.since, copy.crash_count) == (PAST_DOUBT.since, 1)
    assert copy.doubt.until >= before - timedelta(milliseconds=1)
    assert "request" not in engine.steps


async def test_a_command_that_was_not_sent_is_postponed_without_a_doubt(engine: Engine) -> None:
    """Its own record is no other delivery's: a doubt would use up an attempt that the outage has to spare."""
    engine.platform.answers = [NotSent("refused")]
    retry = engine.copy_of(await engine.process(a_task()))
    engine.pause()
    postpone = expect_postpone(await engine.process(a_task(retry)))
    assert notes(engine.copy_of(postpone)) == notes(retry) == {"attempt": 2}


async def test_an_invalid_command_is_concluded_even_while_its_product_is_paused(engine: Engine) -> None:
    engine.pause()
    assert failure_of(await engine.process(a_task(retry=11))).code == "invalid_command"


async def test_a_command_is_postponed_for_longer_the_longer_an_outage_lasts(engine: Engine) -> None:
    engine.pause()
    probe = await engine.probe(a_task(command_id="probe", expired_time=in_hours(-1)))
    assert failure_of(probe).code == "expired"
    engine.seconds += 30
    engine.platform.answers = [NotSent("refused")]
    await engine.process(a_task())
    expect_postpone(await engine.process(a_task(command_id="b")), 30)


@pytest.mark.parametrize("answer", [NotSent("refused"), AUTH_FAILED], ids=["not reachable", "credentials refused"])
async def test_a_probe_that_was_not_cached_uses_up_no_attempt(engine: Engine, answer: Answer) -> None:
    envelope = await engine.last_attempt()
    engine.pause()
    engine.platform.answers = [answer] * 9
    for _ in range(9):
        postpone = expect_postpone(await engine.probe(a_task(envelope)))
        assert not postpone.is_unclaimed
        envelope = engine.copy_of(postpone)
        assert notes(envelope) == {"attempt": 3}
    accepted = reply_of(await engine.probe(a_task(envelope)))
    assert (accepted.status, accepted.attempts) == ("accepted", 3)


async def test_a_probe_whose_answer_was_lost_awaits_reconciliation_and_uses_up_no_attempt(engine: Engine) -> None:
    """Neither its request nor the history that could not be read, however often, nor the request after that."""
    envelope = await engine.last_attempt()
    engine.pause()
    engine.platform.answers = [InDoubt("HTTP 503")]
    copy = engine.copy_of(expect_reconciliation(await engine.probe(a_task(envelope))))
    assert (copy.attempt, copy.is_free_attempt) == (3, True)
    copy = replace(copy, doubt=PAST_DOUBT)
    engine.restart()  # so that its record, by which it has not waited yet, is gone
    engine.pause()
    engine.pause_histories()
    engine.platform.candidates = None
    for _ in range(5):
        copy = engine.copy_of(expect_reconciliation(await engine.probe_histories(a_task(copy))))
        assert notes(copy) == {"attempt": 3, "is_free_attempt": True, "doubt": PAST_DOUBT}
    engine.platform.candidates = []
    accepted = reply_of(await engine.probe_histories(a_task(copy)))
    assert (accepted.status, accepted.attempts) == ("accepted", 3)


async def test_an_attempt_in_doubt_from_before_the_outage_is_used_up(engine: Engine) -> None:
    engine.pause_histories()
    engine.platform.candidates = None
    copy = engine.copy_of(expect_reconciliation(await engine.probe_histories(a_task(in_doubt(2)))))
    assert notes(copy) == {"attempt": 2, "doubt": PAST_DOUBT}
    engine.platform.candidates = []
    assert reply_of(await engine.probe_histories(a_task(copy))).attempts == 3


async def test_after_the_outage_an_unreadable_history_uses_up_the_attempt_that_was_free(engine: Engine) -> None:
    engine.platform.candidates = None
    waiting = expect_reconciliation(await engine.process(a_task(in_doubt(2, is_free_attempt=True))))
    assert notes(engine.copy_of(waiting)) == {"attempt": 2, "doubt": PAST_DOUBT}


async def test_a_free_attempt_stays_free_while_its_command_only_waits(engine: Engine) -> None:
    waiting = in_doubt(2, is_free_attempt=True)
    engine.pause_histories()
    copy = engine.copy_of(expect_reconciliation(await engine.process(a_task(waiting))))
    assert notes(copy) == notes(waiting) == {"attempt": 2, "is_free_attempt": True, "doubt": PAST_DOUBT}


async def test_a_refusal_that_may_concern_all_devices_is_a_rejection_until_it_pauses_the_product(
    engine: Engine,
) -> None:
    """One device's key may not match its product; several such answers in a row concern every device."""
    engine.platform.answers = [AUTH_FAILED] * PAUSE_AFTER
    resolutions = [
        await engine.process(a_task(command_id=f"command-{number}", imei=device))
        for number, device in enumerate(DEVICES[:PAUSE_AFTER])
    ]
    rejected = Rejected("onenet_rejected", "auth failed", 1)
    assert [expect(Conclude, each).outcome for each in resolutions[:-1]] == [rejected, rejected]
    assert notes(engine.copy_of(expect_postpone(resolutions[-1]))) == {"attempt": 1}


@pytest.mark.parametrize(
    "refused",
    [AUTH_FAILED, Refused("http_rejected", "HTTP 404", may_concern_all_devices=True)],
    ids=lambda refused: refused.code,
)
async def test_refusals_of_one_device_are_rejections_and_pause_nothing(engine: Engine, refused: Refused) -> None:
    """Its key does not match, or its gateway is wrong: one sender must not stop the others."""
    engine.platform.answers = [refused] * 50
    for number in range(50):
        resolution = expect(Conclude, await engine.process(a_task(command_id=f"command-{number}")))
        assert resolution.outcome == Rejected(refused.code, refused.message, refused.errno)
    assert engine.breakers.allows(None)
    other = reply_of(await engine.process(a_task(command_id="another", imei=DEVICES[1])))
    assert other.status == "accepted"


async def test_a_throttled_command_uses_up_no_attempt_and_delays_its_product_for_longer_each_time(
    engine: Engine,
) -> None:
    engine.platform.answers = [NotSent("errno 15: api freq out of limit", is_throttled=True)] * 9
    envelope = an_envelope()
    waits_s: list[float] = []
    for _ in range(9):
        postpone = expect_postpone(await engine.process(a_task(envelope)))
        waits_s.append(engine.breakers.retry_in_s())
        assert engine.history_breakers.allows(None)  # nothing would end its waits but a history that is read
        engine.seconds += waits_s[-1]
        envelope = engine.copy_of(postpone)
        assert notes(envelope) == {"attempt": 1}
    assert waits_s == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    accepted = reply_of(await engine.process(a_task(envelope)))
    assert (accepted.status, accepted.attempts) == ("accepted", 1)


@pytest.mark.parametrize("retry_after_s", [0, 7])
async def test_a_throttled_history_uses_up_no_attempt_and_delays_histories(
    engine: Engine, retry_after_s: float
) -> None:
    engine.platform.history_error = HistoryUnreadable("errno 15", is_throttled=True, retry_after_s=retry_after_s)
    for _ in range(9):
        waiting = expect_reconciliation(await engine.process(a_task(in_doubt(3))))
        assert engine.copy_of(waiting).attempt == 3
        assert engine.breakers.allows(None) == (retry_after_s == 0)  # a Retry-After holds for all requests
        assert engine.breakers.retry_in_s() == retry_after_s
        assert engine.history_breakers.retry_in_s() >= max(1, retry_after_s)
        engine.seconds += engine.history_breakers.retry_in_s()
    engine.platform.history_error = None
    engine.platform.candidates = [a_likely("found")]
    assert expect(Conclude, await engine.process(a_task(in_doubt(3)))).outcome == Accepted("found", recovered=True)


async def test_a_history_that_our_own_rate_limit_delays_uses_up_no_attempt_and_pauses_nothing(engine: Engine) -> None:
    engine.platform.history_error = HistoryUnreadable("the rate limit", is_rate_limited=True)
    for _ in range(3 * PAUSE_AFTER):
        waiting = expect_reconciliation(await engine.process(a_task(in_doubt(3))))
        assert engine.copy_of(waiting).attempt == 3
    assert engine.breakers.allows(None)
    assert engine.history_breakers.allows(None)
    assert engine.history_breakers.retry_in_s() == 0


async def test_a_throttled_request_with_a_retry_after_delays_histories_as_well(engine: Engine) -> None:
    engine.platform.answers = [NotSent("errno 15", 20, is_throttled=True)]
    postpone = expect_postpone(await engine.process(a_task()), 30)
    assert not postpone.has_jitter
    assert engine.breakers.retry_in_s() == engine.history_breakers.retry_in_s() == 20


async def test_histories_that_fail_pause_histories_and_no_requests(engine: Engine) -> None:
    engine.platform.candidates = None
    for number in range(3 * PAUSE_AFTER):
        expect_reconciliation(await engine.process(a_task(in_doubt(), command_id=f"command-{number}")))
    assert not engine.history_breakers.allows(None)
    assert engine.steps.count("history") == PAUSE_AFTER  # from there on only probes
    assert engine.breakers.allows(None)
    assert reply_of(await engine.process(a_task(command_id="new"))).status == "accepted"


@pytest.mark.parametrize(
    "error",
    [HistoryUnreadable("errno 3: auth failed", is_refused=True), HistoryUnreadable("HTTP 404", is_refused=True)],
    ids=str,
)
async def test_refused_histories_are_paused_once_two_devices_are_concerned(
    engine: Engine, error: HistoryUnreadable
) -> None:
    engine.platform.history_error = error
    for number in range(3 * PAUSE_AFTER):
        await engine.process(a_task(in_doubt(), command_id=f"command-{number}"))
    assert engine.history_breakers.allows(None)
    await engine.process(a_task(in_doubt(), command_id="another", imei=DEVICES[1]))
    assert not engine.history_breakers.allows(None)


async def test_a_history_that_is_read_ends_the_pause_of_histories(engine: Engine) -> None:
    engine.pause_histories()
    expect_reconciliation(await engine.process(a_task(in_doubt())))
    assert "history" not in engine.steps
    assert reply_of(await engine.probe_histories(a_task(in_doubt()))).status == "accepted"
    assert engine.history_breakers.allows(None)


async def test_while_histories_are_paused_a_command_in_doubt_waits_on_and_uses_up_no_attempt(engine: Engine) -> None:
    engine.pause_histories()
    envelope = in_doubt(2)
    for _ in range(9):
        envelope = engine.copy_of(expect_reconciliation(await engine.process(a_task(envelope))))
        assert notes(envelope) == {"attempt": 2, "doubt": PAST_DOUBT}
    assert not {"request", "history"} & set(engine.steps)


async def test_while_its_product_is_paused_a_cached_command_is_found(engine: Engine) -> None:
    engine.pause()
    engine.platform.candidates = [a_likely("found")]
    assert expect(Conclude, await engine.process(a_task(in_doubt()))).outcome == Accepted("found", recovered=True)
    assert not engine.breakers.allows(None)  # a history says nothing of requests


async def test_an_absent_command_of_a_paused_product_waits_as_the_next_attempt(
    engine: Engine,
) -> None:
    engine.pause()
    envelope = engine.copy_of(expect_postpone(await engine.process(a_task(in_doubt()))))
    assert notes(envelope) == {"attempt": 2}
    for _ in range(5):
        envelope = engine.copy_of(expect_postpone(await engine.process(a_task(envelope))))
        assert notes(envelope) == {"attempt": 2}
    assert "request" not in engine.steps
    accepted = reply_of(await engine.probe(a_task(envelope)))
    assert (accepted.status, accepted.attempts) == ("accepted", 2)


@pytest.mark.parametrize("known_by", ["its envelope", "its redelivery", "its record"])
async def test_a_command_in_doubt_is_no_probe_so_that_the_next_new_command_is(engine: Engine, known_by: str) -> None:
    """Although a history is being read, or cannot be."""
    await engine.process(a_task(command_id="before"))
    if known_by == "its record":
        engine.platform.answers = [InDoubt("read timeout")]
        await engine.process(a_task())
        engine.ahead_s = RECONCILE_DELAY_S + 1
    engine.pause()
    engine.seconds += engine.breakers.retry_in_s()
    engine.platform.answers = []
    new: list[Resolution] = []

    async def process_new() -> None:
        new.append(await engine.process(a_task(command_id="new")))

    engine.platform.on_history = process_new
    engine.platform.candidates = None
    envelope = {"its envelope": in_doubt(), "its redelivery": redelivered()}.get(known_by)
    task = a_task(envelope)
    expect_reconciliation(await engine.process(task))
    if known_by == "its redelivery":  # no record explains it: it waits before its history is read
        new.append(await engine.process(a_task(command_id="new")))
    assert [reply_of(each).status for each in new] == ["accepted"]
    assert engine.breakers.allows(None)
    assert engine.history_first == ([task] if known_by == "its record" else [])


@pytest.mark.parametrize(
    ("answer", "is_failure"),
    [
        (NotSent("refused"), True),
        (InDoubt("HTTP 503"), True),
        (Refused("http_rejected", "HTTP 401", may_concern_all_devices=True), True),
        (InDoubt("errno 5108: rpc response error", is_outage=False), False),
        (Refused("onenet_rejected", "device not online", 2001), False),
        (Cached("u"), False),
    ],
    ids=lambda each: each.reason if isinstance(each, InDoubt | NotSent) else None,
)
async def test_which_answers_count_as_failures_of_the_platform(
    engine: Engine, answer: Answer, is_failure: bool
) -> None:
    """A clear answer shows that it is reachable, be it a refusal, or trouble with one device."""
    for number in range(PAUSE_AFTER - 1):
        engine.platform.answers = [NotSent("refused")]
        await engine.process(a_task(command_id=f"before-{number}"))
    engine.platform.answers = [answer]
    await engine.process(a_task(command_id="it"))
    assert engine.breakers.allows(None) is not is_failure


async def test_a_probe_that_sent_nothing_is_followed_by_another_at_once(engine: Engine) -> None:
    """An hour's expired commands must not delay the first good one."""
    engine.pause()
    await engine.probe(a_task(expired_time=in_hours(-1)))
    assert engine.breakers.retry_in_s() == 0


async def test_a_retry_after_delays_the_product_and_uses_one_attempt_of_the_command(
    engine: Engine,
) -> None:
    engine.platform.answers = [NotSent("HTTP 429", 20)]
    retry = expect_retry(await engine.process(a_task()), 30)
    assert retry.honours_retry_after
    assert notes(engine.copy_of(retry)) == {"attempt": 2}
    postpone = expect_postpone(await engine.process(a_task(command_id="b")))
    assert notes(engine.copy_of(postpone)) == {"attempt": 1}
    assert engine.history_breakers.retry_in_s() == 20
    engine.seconds += 20
    assert reply_of(await engine.process(a_task(command_id="b"))).status == "accepted"
