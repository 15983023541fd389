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
# With results on, and a device that executes the command: from the reply on.
RESULT_ROWS: list[tuple[str, Fault | None, str, int]] = [
    ("result", None, "after record", 1),
    ("result", None, "before publish", 1),
    ("result", None, "after publish", 1),  # the reply without what looks the result up
    ("result", None, "after publish", 2),
    ("result", None, "after acknowledge", 1),
    ("result", None, "before look", 1),
    ("result", None, "after look", 1),
    ("result", None, "before result record", 1),
    ("result", None, "after result record", 1),
    ("result", None, "before publish", 3),
    ("result", None, "after publish", 3),
    ("result", None, "before acknowledge", 2),
    ("result", None, "after acknowledge", 2),
    ("result", LOST_BUT_CACHED, "after record", 1),
    ("result", LOST_BUT_CACHED, "after publish", 2),
]
STORES = ["memory", "redis"]
AT_ONCE = 6
pytestmark = pytest.mark.xdist_group("crash points")  # all tests share one table


@dataclass
class RowResult:
    """The result of one row."""

    exit_code: int
    replies: list[dict[str, Any]]
    results: list[dict[str, Any]]
    cached: list[str]


def play(broker_url: str, folder: Path, url: str, row: tuple[str, Fault | None, str, int]) -> RowResult:
    """Run one row: a worker that is killed at the crash point, and workers that finish its command."""
    case, fault, point, times = row
    folder.mkdir()
    delays_s = (1, 2) if case == "result" else ()
    with (
        onenet(*([fault] if fault else [])) as simulator,
        Deployment.set_up(broker_url, folder, simulator, result_delays_s=delays_s) as deployment,
    ):
        simulator.platform.replace_devices({"*": "up"})
        store = SOON_CERTAIN | {"IDEMPOTENCY_URL": url}  # a request that is late is in doubt once more, and is found
        with deployment.worker(**store, **crash_at(folder, point, times)) as first:
            deployment.upstream.publish(a_command(command_id="the-one", args="the-one"))
            exit_code = first.process.wait()
        told = deployment.run_until_finished(**store)
        replies = [message for message in told if "status" in message]
        results = [message for message in told if "result" in message]
        cached = [command.uuid for command in simulator.platform.commands if command.args == "the-one"]
        return RowResult(exit_code, replies, results, cached)


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
            for number, row in enumerate([*ROWS, *RESULT_ROWS])
            for store in STORES
        }
    finally:
        threads.shutdown(cancel_futures=True)  # ctrl-C would otherwise play all rows first


def names(rows: list[tuple[str, Fault | None, str, int]]) -> list[str]:
    return [
        f"{case}{', answer lost' if fault and case == 'result' else ''}: {point} {times}"
        for case, fault, point, times in rows
    ]


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("number", range(len(ROWS)), ids=names(ROWS))
def test_a_worker_killed_at_a_crash_point_loses_no_command_and_sends_none_twice(
    table: dict[tuple[str, int], "Future[RowResult]"], number: int, store: str
) -> None:
    assert_accepted_once(table[store, number].result())


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("number", range(len(RESULT_ROWS)), ids=names(RESULT_ROWS))
def test_a_worker_killed_at_a_crash_point_loses_no_result_and_changes_none(
    table: dict[tuple[str, int], "Future[RowResult]"], number: int, store: str
) -> None:
    row = table[store, len(ROWS) + number].result()
    assert_accepted_once(row)
    assert {(result["result"], result["uuid"]) for result in row.results} == {("executed", row.cached[0])}
    if store == "redis":
        assert len({tuple(result.items()) for result in row.results}) == 1


def assert_accepted_once(row: RowResult) -> None:
    """Check that the command was cached once, and that all replies say so."""
    assert row.exit_code == -9
    assert len(row.cached) == 1
    assert {(reply["status"], reply["uuid"]) for reply in row.replies} == {("accepted", row.cached[0])}, row.replies
