"""A call of the worker that blocks the event loop fails the test in which it happens, and ends a process under test."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from blockbuster import BlockingError

from tests.support.blocking import SLOW_CALLBACK_S, BlockedLoop
from tests.support.builders import a_command, a_task
from tests.support.deployment import Deployment
from tests.support.startup_code import run_at_startup
from tests.support.waiting import PATIENCE_S
from worker.dev.services.ports import wait_until
from worker.flow.background import Background
from worker.flow.device_queues import KeyedQueues
from worker.flow.dispatcher import Dispatcher
from worker.flow.rate_limited_queue import Turns

BLOCKING_CALLS: list[Callable[[], object]] = [
    lambda: time.sleep(0),  # a blocking call, which the guard must refuse
    lambda: Path(__file__).read_text(),
    lambda: threading.Event().wait(0.001),
    lambda: threading.Thread().join(),
]
BLOCKED_EVENT_LOOP = """
import time
from worker.amqp.consumer import QueueConsumer
take = QueueConsumer._on_message
def take_late(*about):
    time.sleep(0)  # a blocking call, which must end the worker
    take(*about)
replace(QueueConsumer, "_on_message", take_late)
"""
SLOW_CALLBACK = f"""
import time
from worker.amqp.consumer import QueueConsumer
take = QueueConsumer._on_message
def take_late(*about):
    end = time.monotonic() + {SLOW_CALLBACK_S + 1}
    while time.monotonic() < end:
        pass
    take(*about)
replace(QueueConsumer, "_on_message", take_late)
"""


@pytest.mark.parametrize("call", BLOCKING_CALLS)
async def test_a_call_of_the_worker_that_may_wait_raises_on_the_event_loop(call: Callable[[], object]) -> None:
    """However short the wait: the call's name tells."""
    dispatcher = Dispatcher(
        lambda _task: call(),
        KeyedQueues(by_device=True, interval_s=0, clock=time.monotonic),
        None,
        lambda _product: True,
        concurrency=1,
        background=Background(),
        turns=Turns(),
    )
    with pytest.raises(BlockingError):
        dispatcher.submit(a_task(1))


async def test_a_blocking_call_in_a_callback_is_found_in_the_log_of_asyncio() -> None:
    """Nobody sees the error there."""
    found: list[str] = []
    handler = BlockedLoop(found.append)
    error = BlockingError("time.sleep")
    record = logging.LogRecord(
        "asyncio", logging.ERROR, "", 0, "Exception in callback", (), (BlockingError, error, None)
    )
    handler.emit(record)
    assert len(found) == 1
    assert asyncio.get_running_loop().get_debug()


@pytest.mark.parametrize(("seconds", "is_found"), [(SLOW_CALLBACK_S + 1, True), (SLOW_CALLBACK_S - 1, False)])
def test_a_slow_callback_is_found_in_the_log_of_asyncio(seconds: float, is_found: bool) -> None:
    """One that a loaded machine delayed is not."""
    found: list[str] = []
    about = ("<Handle>", seconds)
    record = logging.LogRecord("asyncio", logging.WARNING, "", 0, "Executing %s took %.3f seconds", about, None)
    BlockedLoop(found.append).emit(record)
    assert bool(found) == is_found


def hold_up(deployment: Deployment, code: str) -> None:
    """Deliver a command to a worker that runs startup code, and wait until its output tells of that."""
    with deployment.worker(**run_at_startup(deployment.folder, code)) as worker:
        deployment.upstream.publish(a_command())
        output = worker.process.output
        wait_until(
            lambda: "BlockingError" in (text := output.read_text()) or "Executing" in text, PATIENCE_S, "a report"
        )


@pytest.mark.usefixtures("watched_workers")
def test_a_blocking_call_of_a_worker_process_is_found_in_its_output(deployment: Deployment) -> None:
    with pytest.raises(AssertionError, match="BlockingError"):
        hold_up(deployment, BLOCKED_EVENT_LOOP)


@pytest.mark.usefixtures("watched_workers")
def test_a_slow_callback_of_a_worker_process_is_found_in_its_output(deployment: Deployment) -> None:
    with pytest.raises(AssertionError, match="Executing"):
        hold_up(deployment, SLOW_CALLBACK)
