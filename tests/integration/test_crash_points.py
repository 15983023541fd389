"""The crash-point table: a worker is killed at each point between receive and acknowledge, on both stores.

Each row runs one worker that is killed by SIGKILL at its point and another that takes over. The rows mostly wait, so
they run concurrently, and each test reads the result of its row.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.builders import a_command
from tests.support.crash_points import crash_at
from tests.support.deployment import SOON_CERTAIN, Deployment
from tests.support.simulator import onenet
from worker.simulator.faults import Fault

LOST_BUT_CACHED = Fault(kind="drop_after_caching", count=1)
LOST_NOT_CACHED = Fault(kind="error_500", count=1)
TOO_MANY = Fault(kind="too_many_requests", count=1, seconds=0)

# The case, the fault of the first request, the crash point, and at which visit of the point the worker is killed.
ROWS: list[tuple[str, Fault | None, str, int]] = [
    ("first try", None, "before claim", 1),
    ("first try", None, "after claim", 1),
    ("first try", None, "before request", 1),
    ("first try", None, "after request", 1),
    ("first try", None, "before record", 1),
    ("first try", None, "after record", 1),
    ("first try", None, "after recorded", 1),
    ("first try", None, "before publish", 1),
    ("first try", None, "after publish", 1),
    ("first try", None, "before acknowledge", 1),
    ("first try", None, "after acknowledge", 1),
    ("first try", None, "before acknowledgements", 2),
    ("first try", None, "after acknowledgements", 2),
    ("to be tried again", TOO_MANY, "before release", 1),
    ("to be tried again", TOO_MANY, "after release", 1),
    ("to be tried again", TOO_MANY, "before acknowledge", 1),
    ("to be tried again", TOO_MANY, "after request", 2),
    ("answer lost, cached", LOST_BUT_CACHED, "after release", 1),
    ("answer lost, cached", LOST_BUT_CACHED, "before acknowledge", 1),
    ("answer lost, cached", LOST_BUT_CACHED, "before history", 1),
    ("answer lost, cached", LOST_BUT_CACHED, "after history", 1),
    ("answer lost, cached", LOST_BUT_CACHED, "before ownership", 1),
    ("answer lost, cached", LOST_BUT_CACHED, "after ownership", 1),
    ("answer lost, cached", LOST_BUT_CACHED, "after recorded", 1),
    ("answer lost, cached", LOST_BUT_CACHED, "before acknowledge", 2),
    ("answer lost, not cached", LOST_NOT_CACHED, "after history", 1),
    ("answer lost, not cached", LOST_NOT_CACHED, "before request", 2),
    ("answer lost, not cached", LOST_NOT_CACHED, "after request", 2),
    ("answer lost, not cached", LOST_NOT_CACHED, "before acknowledge", 2),
]
STORES = ["memory", "redis"]
AT_ONCE = 6
pytestmark = pytest.mark.xdist_group("crash points")  # all tests share one table


@dataclass
class RowResult:
    """The result of one row."""

    exit_code: int
    replies: list[dict[str, Any]]
    cached: list[str]


def play(broker_url: str, folder: Path, url: str, row: tuple[str, Fault | None, str, int]) -> RowResult:
    """Run one row: a worker that is killed at the crash point, and workers that finish its command."""
    _, fault, point, times = row
    folder.mkdir()
    with (
        onenet(*([fault] if fault else [])) as simulator,
        Deployment.set_up(broker_url, folder, simulator) as deployment,
    ):
        store = SOON_CERTAIN | {"IDEMPOTENCY_URL": url}  # a request that is late is in doubt once more, and is found
        with deployment.worker(**store, **crash_at(folder, point, times)) as first:
            deployment.upstream.publish(a_command(command_id="the-one", args="the-one"))
            exit_code = first.process.wait()
        replies = deployment.run_until_finished(**store)
        cached = [command.uuid for command in simulator.platform.commands if command.args == "the-one"]
        return RowResult(exit_code, replies, cached)


@pytest.fixture(scope="module")
def table(
    broker_url: str, redis_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[tuple[str, int], "Future[RowResult]"]]:
    urls = {"memory": "memory://", "redis": redis_url}
    folder = tmp_path_factory.mktemp("crashes")
    threads = ThreadPoolExecutor(AT_ONCE)
    try:
        yield {
            (store, number): threads.submit(play, broker_url, folder / f"{store}-{number}", urls[store], row)
            for number, row in enumerate(ROWS)
            for store in STORES
        }
    finally:
        threads.shutdown(cancel_futures=True)  # ctrl-C would otherwise play all rows first


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("number", range(len(ROWS)), ids=[f"{case}: {point} {times}" for case, _, point, times in ROWS])
def test_a_worker_killed_at_a_crash_point_loses_no_command_and_sends_none_twice(
    table: dict[tuple[str, int], "Future[RowResult]"], number: int, store: str
) -> None:
    result = table[store, number].result()
    assert result.exit_code == -9
    assert len(result.cached) == 1
    assert {(reply["status"], reply["uuid"]) for reply in result.replies} == {("accepted", result.cached[0])}, (
        result.replies
    )
