"""What is reported for each delivery: its log event and its metrics."""

from collections.abc import Mapping
from typing import Any
from unittest.mock import ANY

import pytest
from structlog.testing import capture_logs

from tests.support.builders import in_hours
from tests.support.engine import (
    RECONCILE_DELAY_S,
    Engine,
    a_copy,
    a_likely,
    a_task,
    an_envelope,
    in_doubt,
    redelivered,
)
from worker.core.answer import Cached, InDoubt, NotSent, Refused
from worker.core.envelope import Task
from worker.core.poison import MAX_RETURNS

ABOUT = {"command_id": "a", "imei": "865820030000001"}


async def lines(engine: Engine, task: Task) -> list[dict[str, Any]]:
    """Process a delivery; returns the lines about it, without how long it took."""
    with capture_logs() as logs:
        await engine.process(task)
    return [{name: value for name, value in line.items() if name != "duration_ms"} for line in map(dict, logs)]


def counted(engine: Engine) -> Mapping[str, float]:
    """Return every counter of the engine that has counted, with its labels."""
    counters: dict[str, float] = {}
    for family in engine.metrics.registry.collect():
        for sample in family.samples:
            name = sample.name.removeprefix("onenet_worker_").removesuffix("_total")
            if family.type == "counter" and sample.value and sample.name == f"onenet_worker_{name}_total":
                labels = ",".join(sample.labels.values())
                counters[f"{name}({labels})" if labels else name] = sample.value
    return counters


async def test_an_accepted_command_is_logged_and_counted_with_the_uuid_and_the_attempt(engine: Engine) -> None:
    line = {"event": "command_accepted", "log_level": "info", **ABOUT, "attempt": 1, "uuid": "u"}
    assert await lines(engine, a_task()) == [line]
    assert counted(engine) == {"commands(accepted,answered)": 1}


async def test_a_rejected_command_is_logged_and_counted_with_code_errno_and_reason(engine: Engine) -> None:
    engine.platform.answers = [Refused("onenet_rejected", "device not online", 2001)]
    assert await lines(engine, a_task(an_envelope(app_id="billing"))) == [
        {
            "event": "command_rejected",
            "log_level": "warning",
            **ABOUT,
            "app_id": "billing",
            "attempt": 1,
            "code": "onenet_rejected",
            "errno": 2001,
            "reason": "device not online",
        }
    ]
    assert counted(engine) == {"commands(rejected,onenet_rejected)": 1}


async def test_a_failed_command_is_logged_and_counted_with_its_dead_letter(engine: Engine) -> None:
    assert await lines(engine, a_task(an_envelope(app_id="billing"), expired_time=in_hours(-1))) == [
        {
            "event": "command_failed",
            "log_level": "warning",
            **ABOUT,
            "app_id": "billing",
            "attempt": 1,
            "code": "expired",
            "reason": ANY,
        }
    ]
    assert counted(engine) == {"commands(failed,expired)": 1, "dead_letters(expired)": 1}


async def test_a_failure_without_a_command_id_is_logged_without_one(engine: Engine) -> None:
    [line] = await lines(engine, a_task(body=b"no JSON"))
    assert (line["event"], line["code"], line["command_id"], line["imei"]) == (
        "command_failed",
        "invalid_message",
        None,
        None,
    )


async def test_a_recovered_command_is_logged_as_recovered_and_as_accepted_and_counted_once(engine: Engine) -> None:
    engine.platform.candidates = [a_likely("found")]
    recovered = {"event": "command_recovered", "log_level": "info", **ABOUT, "attempt": 1, "uuid": "found"}
    assert await lines(engine, a_task(in_doubt())) == [recovered, recovered | {"event": "command_accepted"}]
    assert counted(engine) == {"commands(accepted,recovered)": 1}


async def test_an_outcome_that_was_not_recorded_is_not_logged_as_an_outcome(engine: Engine) -> None:
    engine.platform.candidates = [a_likely("found")]
    engine.store.failing = {"complete"}
    [line] = await lines(engine, a_task(in_doubt()))
    assert line["event"] == "command_postponed"
    assert counted(engine) == {"postponements": 1}


async def test_a_duplicate_is_logged_with_its_recorded_status_and_counted(
    engine: Engine,
) -> None:
    await engine.process(a_task())
    [line] = await lines(engine, a_task(redelivered()))
    assert line == {"event": "duplicate_suppressed", "log_level": "info", **ABOUT, "attempt": 1, "status": "accepted"}
    assert counted(engine) == {"commands(accepted,answered)": 1, "duplicates": 1}


async def test_a_dead_letter_that_is_published_again_is_counted_again(engine: Engine) -> None:
    late = in_hours(-1)
    await engine.process(a_task(expired_time=late))
    await engine.process(a_task(redelivered(), expired_time=late))
    await engine.process(a_task(expired_time=late))  # a duplicate message has no dead letter of its own
    assert counted(engine) == {"commands(failed,expired)": 1, "dead_letters(expired)": 2, "duplicates": 2}


async def test_a_retry_is_logged_with_its_delay_and_the_next_attempt_and_counted_as_a_retry(engine: Engine) -> None:
    engine.platform.answers = [NotSent("refused")]
    assert await lines(engine, a_task()) == [
        {
            "event": "command_retry_scheduled",
            "log_level": "warning",
            **ABOUT,
            "attempt": 1,
            "next_attempt": 2,
            "delay_s": 5,
            "reason": "refused",
        }
    ]
    assert counted(engine) == {"retries": 1}


@pytest.mark.parametrize("cause", ["paused", "throttled", "in progress", "store"])
async def test_a_postponed_command_is_logged_and_counted_as_a_postponement_and_not_as_a_retry(
    engine: Engine, cause: str
) -> None:
    reasons = {
        "paused": "nothing is sent for now: 3 failures in a row, the latest: HTTP 503",
        "throttled": "errno 15",
        "in progress": "another delivery of it is being processed",
        "store": "Redis: ConnectionError",
    }
    task = a_task(a_copy(attempt=2))
    other: list[dict[str, Any]] = []
    match cause:
        case "paused":
            engine.pause()
        case "throttled":
            engine.unstarted.mark_not_sent(a_task())
            engine.platform.answers = [NotSent("errno 15", is_throttled=True)]
        case "store":
            engine.store.failing = {"claim"}
        case "in progress":

            async def process_other() -> None:
                other.extend(await lines(engine, task))

            engine.platform.on_request = process_other
            await engine.process(a_task())
    found = other or await lines(engine, task)
    line = {"event": "command_postponed", "log_level": "info", **ABOUT, "attempt": 2, "delay_s": 5}
    assert line | {"reason": reasons[cause]} in found
    counters = counted(engine)
    assert counters["postponements"] == 1
    assert "retries" not in counters


async def test_a_command_whose_answer_is_lost_is_logged_and_counted_as_in_doubt(engine: Engine) -> None:
    engine.platform.answers = [InDoubt("read timeout")]
    line = {"event": "command_in_doubt", "log_level": "warning", **ABOUT, "attempt": 1, "reason": "read timeout"}
    assert await lines(engine, a_task()) == [line | {"reconcile_delay_s": RECONCILE_DELAY_S}]
    assert counted(engine) == {"in_doubt": 1}


async def test_in_mode_dead_letter_a_lost_answer_is_logged_and_counted_as_in_doubt_and_as_a_failure() -> None:
    engine = Engine("dead-letter")
    engine.platform.answers = [InDoubt("read timeout")]
    doubt, failed = await lines(engine, a_task())
    line = {"event": "command_in_doubt", "log_level": "warning", **ABOUT, "attempt": 1, "reason": "read timeout"}
    assert doubt == line
    assert (failed["event"], failed["code"]) == ("command_failed", "outcome_unknown")
    assert counted(engine) == {
        "commands(failed,outcome_unknown)": 1,
        "dead_letters(outcome_unknown)": 1,
        "in_doubt": 1,
    }


async def test_in_mode_resend_a_lost_answer_is_logged_and_counted_as_in_doubt_and_as_a_retry() -> None:
    engine = Engine("resend")
    engine.platform.answers = [InDoubt("read timeout")]
    assert [line["event"] for line in await lines(engine, a_task())] == ["command_in_doubt", "command_retry_scheduled"]
    assert counted(engine) == {"in_doubt": 1, "retries": 1}


async def test_a_history_that_cannot_be_read_is_logged_and_counted_as_in_doubt(engine: Engine) -> None:
    engine.platform.candidates = None
    [line] = await lines(engine, a_task(in_doubt()))
    assert (line["event"], line["attempt"]) == ("command_in_doubt", 2)
    assert "HTTP 500" in line["reason"]
    assert counted(engine) == {"in_doubt": 1}


async def test_the_outcome_of_an_announced_attempt_is_logged_and_counted_when_it_is_recorded(engine: Engine) -> None:
    """The copy that returns for it is a duplicate."""
    [line] = await lines(engine, a_task(in_doubt(crash_count=0)))
    assert (line["event"], line["uuid"]) == ("command_accepted", "u")
    [line] = await lines(engine, a_task(engine.announcement()))
    assert line["event"] == "duplicate_suppressed"
    assert counted(engine) == {"commands(accepted,answered)": 1, "duplicates": 1}


async def test_an_unconfirmed_announcement_is_neither_logged_nor_counted(
    engine: Engine,
) -> None:
    engine.is_confirmed = False
    assert await lines(engine, a_task(in_doubt(crash_count=0))) == []
    assert counted(engine) == {}


@pytest.mark.parametrize("mode", ["reconcile", "resend"])
async def test_an_announced_attempt_with_a_foreign_uuid_is_logged_as_in_doubt_only(mode: Any) -> None:
    """No outcome is published, since the copy returns: one that was logged would be false."""
    engine = Engine(mode)
    await engine.process(a_task(command_id="other", args="ON"))
    engine.platform.answers = [Cached("u")]
    [line] = await lines(engine, a_task(in_doubt(2, crash_count=0)))
    assert (line["event"], line["attempt"]) == ("command_in_doubt", 2)
    assert counted(engine) == {"commands(accepted,answered)": 1, "in_doubt": 1}


async def test_an_unparsed_message_is_logged_as_postponed_without_a_command_id(engine: Engine) -> None:
    [line] = await lines(engine, a_task(redelivered(an_envelope(times_returned=MAX_RETURNS))))
    assert (line["event"], line["command_id"], line["imei"]) == ("command_postponed", None, None)
    assert counted(engine) == {"postponements": 1}
