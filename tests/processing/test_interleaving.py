"""Deliveries that are processed at the same time: at each await of one, the other may do any number of its steps."""

import asyncio
from typing import Any

import pytest

from tests.support.engine import (
    LONG_AGO,
    Engine,
    a_likely,
    a_task,
    an_envelope,
    expect,
    expect_postpone,
    in_doubt,
    redelivered,
    replaced,
    reply_of,
)
from tests.support.model_loop import ModelLoop, suspend
from tests.support.suspending import SuspendingStore
from worker.core.answer import Cached
from worker.core.envelope import Envelope, Task
from worker.core.resolution import AwaitReconciliation, Conclude, Duplicate, Postpone, Resolution
from worker.processing.crash_guard import SUSPECT_WAIT_S

SUSPENSIONS = range(14)  # more than one delivery has

Processing = asyncio.Task[Resolution]


class Worker:
    """An engine each of whose calls to store and platform suspends, on an event loop that the test runs."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.loop = ModelLoop(lambda: self.seconds)
        store = SuspendingStore(600, 600, began_at=LONG_AGO, clock=lambda: self.seconds)
        self.engine = Engine(store=store)
        self.engine.platform.on_request = self.engine.platform.on_history = suspend

    def start(self, task: Task, steps: int = 0) -> Processing:
        """Process a delivery for so many steps."""
        processing = self.loop.start(self.engine.process(task))
        self.go_on(processing, steps)
        return processing

    def go_on(self, processing: Processing, steps: int = len(SUSPENSIONS)) -> None:
        """Resume a processing so many times, unless it ends before, or waits for another one."""
        while steps and self.loop.can_resume(processing):
            self.loop.resume(processing)
            steps -= 1

    def finish(self, *processings: Processing) -> list[Any]:
        """Process deliveries to their ends, the first one first; returns what becomes of them."""
        while not all(each.done() for each in processings):
            for processing in processings:
                self.go_on(processing)
        return [each.result() for each in processings]


@pytest.mark.parametrize("second", [an_envelope(), redelivered()], ids=["a second message", "the same message again"])
@pytest.mark.parametrize("steps_of_first", SUSPENSIONS)
def test_two_deliveries_of_a_command_cause_one_request_between_them(steps_of_first: int, second: Envelope) -> None:
    for steps_of_second in SUSPENSIONS:
        worker = Worker()
        first = worker.start(a_task(), steps_of_first)
        resolutions = worker.finish(first, worker.start(a_task(second), steps_of_second))
        if second.is_redelivered and isinstance(resolutions[1], AwaitReconciliation):
            assert worker.engine.steps.count("request") <= 1  # none if this delivery was the first to claim the command
            continue
        assert worker.engine.steps.count("request") == 1
        [concluded] = [each for each in resolutions if isinstance(each, Conclude)]
        [other] = [each for each in resolutions if each is not concluded]
        may_be_lost = second.is_redelivered and other is resolutions[1]  # what the first one had to publish
        assert isinstance(other, Postpone) or other == Duplicate(concluded.reply, repeats_all=may_be_lost)


@pytest.mark.parametrize("steps_of_first", SUSPENSIONS)
def test_two_lookalikes_in_doubt_are_never_given_the_same_entry_of_the_history(steps_of_first: int) -> None:
    for steps_of_second in SUSPENSIONS:
        worker = Worker()
        worker.engine.platform.candidates = [a_likely("found")]
        worker.engine.platform.answers = [Cached("own"), Cached("another")]
        first = worker.start(a_task(in_doubt()), steps_of_first)
        second = worker.start(a_task(in_doubt(), command_id="lookalike"), steps_of_second)
        resolutions = worker.finish(first, second)
        uuids = [each.reply.uuid for each in resolutions if isinstance(each, Conclude) and each.reply.uuid]
        assert len(uuids) == len(set(uuids))
        assert worker.engine.steps.count("request") <= 1


@pytest.mark.parametrize("steps_of_first", SUSPENSIONS)
def test_two_crash_suspects_are_tried_one_after_the_other(steps_of_first: int) -> None:
    """Two at a time would not tell which of them crashed the worker."""
    for steps_of_second in SUSPENSIONS:
        worker = Worker()
        first = worker.start(a_task(in_doubt(crash_count=0)), steps_of_first)
        second = worker.start(a_task(in_doubt(crash_count=0), command_id="b", args="b"), steps_of_second)
        results = [expect(Conclude, replaced(each)) for each in worker.finish(first, second)]
        assert [reply_of(each).status for each in results] == ["accepted", "accepted"]
        tried = [step for step in worker.engine.steps if step in {"announce", "history", "request"}]
        assert tried == ["announce", "history", "request"] * 2


def test_a_suspect_whose_store_call_hangs_holds_up_suspects_for_a_second_and_others_not_at_all() -> None:
    worker = Worker()
    hanging = worker.start(a_task(in_doubt(crash_count=0)))
    while "history" not in worker.engine.steps:
        worker.go_on(hanging, 1)
    second = worker.start(a_task(in_doubt(crash_count=2), command_id="b", args="b"))
    worker.go_on(second)
    assert not second.done()
    [other] = worker.finish(worker.start(a_task(command_id="c", args="c")))
    assert reply_of(other).status == "accepted"
    worker.seconds += SUSPECT_WAIT_S
    worker.loop.run()
    [postponed] = worker.finish(second)
    assert worker.engine.copy_of(expect_postpone(postponed)).crash_count == 2
    [result] = worker.finish(hanging)
    assert reply_of(expect(Conclude, replaced(result))).status == "accepted"
