"""A command that meets a limit of the platform: it rests if its device's queue is full, and is rejected otherwise."""

from datetime import timedelta
from time import time

import pytest

from tests.support.builders import in_hours
from tests.support.engine import (
    DELAYS_S,
    MAX_ATTEMPTS,
    Engine,
    a_task,
    an_envelope,
    expect,
    failure_of,
    reply_of,
)
from worker.core.answer import InDoubt, Refused
from worker.core.outcome import Accepted, Rejected
from worker.core.platform import DEVICE_QUEUE
from worker.core.resolution import Conclude, Postpone

LIMIT = Refused("onenet_rejected", "system limit", 13, is_limit=True)


async def test_a_command_for_a_full_queue_rests_and_goes_when_there_is_room(engine: Engine) -> None:
    engine.platform.answers = [LIMIT]
    engine.platform.waiting = DEVICE_QUEUE
    resting = expect(Postpone, await engine.process(a_task()))
    assert resting.reason == "the device's queue at OneNET is full: 10 commands wait (system limit)"
    assert (resting.delay_s, resting.attempt, resting.doubt) == (DELAYS_S[0], 1, None)
    reply = reply_of(await engine.process(a_task(engine.copy_of(resting))))
    assert (reply.status, reply.attempts) == ("accepted", 1)
    assert engine.steps == ["claim", "request", "queue", "claim", "request", "complete"]


async def test_a_limit_without_a_full_queue_is_a_rejection(engine: Engine) -> None:
    engine.platform.answers = [LIMIT]
    engine.platform.waiting = DEVICE_QUEUE - 1
    concluded = expect(Conclude, await engine.process(a_task()))
    assert concluded.outcome == Rejected("onenet_rejected", "system limit", 13)


async def test_resting_uses_no_attempt_however_often(engine: Engine) -> None:
    envelope = an_envelope()
    for _ in range(2 * MAX_ATTEMPTS):
        engine.platform.answers = [LIMIT]
        engine.platform.waiting = DEVICE_QUEUE
        envelope = engine.copy_of(await engine.process(a_task(envelope)))
        assert envelope.attempt == 1
    assert expect(Conclude, await engine.process(a_task(envelope))).outcome == Accepted("u7")


@pytest.mark.parametrize(("rested_s", "delay_s"), [(0, DELAYS_S[0]), *((delay_s, delay_s) for delay_s in DELAYS_S)])
async def test_the_longer_a_command_has_rested_the_longer_it_rests(
    engine: Engine, rested_s: float, delay_s: int
) -> None:
    engine.platform.answers = [LIMIT]
    engine.platform.waiting = DEVICE_QUEUE
    envelope = an_envelope(first_arrived_at=time() - rested_s - 0.5, is_copy=True)
    assert expect(Postpone, await engine.process(a_task(envelope))).delay_s == delay_s


async def test_a_command_whose_device_cannot_be_looked_at_rests_too(engine: Engine) -> None:
    """It is known not to have been cached, and nobody knows whether there will be room."""
    engine.platform.answers = [LIMIT]
    engine.platform.waiting = None
    resting = expect(Postpone, await engine.process(a_task()))
    assert resting.doubt is None
    assert "its command history could not be read: HTTP 500" in resting.reason


async def test_a_command_rests_without_a_look_while_histories_are_paused(engine: Engine) -> None:
    engine.pause_histories()
    engine.platform.answers = [LIMIT]
    resting = expect(Postpone, await engine.process(a_task()))
    assert "histories are not read for now" in resting.reason
    assert "queue" not in engine.steps


async def test_a_full_queue_is_no_failure_of_the_platform(engine: Engine) -> None:
    for number in range(10):
        engine.platform.answers = [LIMIT]
        engine.platform.waiting = DEVICE_QUEUE
        expect(Postpone, await engine.process(a_task(command_id=f"command-{number}")))
    assert engine.breakers.allows(None)


async def test_a_command_that_would_rest_beyond_its_expired_time_takes_a_shorter_delay(engine: Engine) -> None:
    engine.platform.answers = [LIMIT]
    engine.platform.waiting = DEVICE_QUEUE
    long_ago = an_envelope(first_arrived_at=time() - 3600, is_copy=True)
    left_s = DELAYS_S[0] + 2
    resting = await engine.process(a_task(long_ago, expired_time=in_hours(left_s / 3600)))
    assert expect(Postpone, resting).delay_s == DELAYS_S[0]


async def test_a_command_that_cannot_rest_any_more_has_expired(engine: Engine) -> None:
    engine.platform.answers = [LIMIT]
    engine.platform.waiting = DEVICE_QUEUE
    concluded = await engine.process(a_task(expired_time=in_hours(2 / 3600)))
    assert failure_of(concluded).code == "expired"


async def test_a_command_in_doubt_from_before_stays_in_doubt_while_it_rests() -> None:
    engine = Engine("resend")
    engine.platform.answers = [InDoubt("read timeout"), LIMIT]
    engine.platform.waiting = DEVICE_QUEUE
    again = engine.copy_of(await engine.process(a_task()))
    resting = expect(Postpone, await engine.process(a_task(again)))
    assert resting.doubt is not None


async def test_what_has_expired_is_decided_on_the_platforms_clock(engine: Engine) -> None:
    engine.platform.clock_offset_s = timedelta(hours=2).total_seconds()
    assert failure_of(await engine.process(a_task(expired_time=in_hours(1)))).code == "expired"
    engine.platform.clock_offset_s = -engine.platform.clock_offset_s
    task = a_task(command_id="b", valid_time=None, expired_time=in_hours(-1))
    assert reply_of(await engine.process(task)).status == "accepted"
    assert engine.steps.count("request") == 1
