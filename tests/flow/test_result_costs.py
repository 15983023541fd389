"""The table of docs/results.md: how often commands are looked up that no device takes, counted in a model's time."""

import re
from collections.abc import Awaitable, Callable, Collection
from datetime import datetime, timedelta
from itertools import accumulate, chain, repeat, takewhile
from pathlib import Path
from uuid import uuid4

import pytest

from schemas.reply import Reply
from scripts.documents import between, looks_until_expired
from tests.support.results_model import BEGAN, ModelTime, ResultsModel
from worker.core.command import Command
from worker.core.platform import FoundStates
from worker.core.results import EntryState, await_result
from worker.idempotency.memory import MemoryStore
from worker.processing.circuit_breaker import CircuitBreakers
from worker.processing.result_finder import ResultFinder
from worker.settings import Settings

DELAYS_S: tuple[int, ...] = Settings.model_fields["worker_result_delays"].default
WAITS, EXPIRED = 1, 4
DEVICES = 5
LIFETIMES = {"10 minutes": 600, "1 hour": 3600, "1 day": 86_400, "7 days": 604_800}
Row = tuple[str, int, list[float]]


def rows() -> list[Row]:
    """Read the table: lifetime, looks, and calls in a second, in turn with one and with ten commands for a device."""
    table = between((Path(__file__).parents[2] / "docs" / "results.md").read_text(), "costs")[0]
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    return [
        (
            name,
            int(looks),
            [float(number.replace(",", "")) for cell in calls for number in re.findall(r"[\d.,]+", cell)],
        )
        for name, looks, *calls in found
    ]


class Histories:
    """The histories of devices that are down; counts the reads."""

    def __init__(self, time: ModelTime) -> None:
        self.expires_at: dict[str, dict[str, datetime]] = {}  # by IMEI and uuid
        self.reads = 0
        self.now = time.now

    def knows(self, _product: str | None) -> bool:
        return True

    async def find_states(
        self,
        _product: str | None,
        imei: str,
        _since: datetime | None,
        _uuids: Collection[str],
        _acquire: Callable[[], Awaitable[None]] | None,
    ) -> FoundStates:
        self.reads += 1
        entries = self.expires_at[imei].items()
        return FoundStates({uuid: EntryState(EXPIRED if self.now() >= at else WAITS) for uuid, at in entries})


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_a_command_is_looked_up_as_often_as_the_table_says(row: Row) -> None:
    """After each delay, of which the last repeats, as long as it has not expired; and once when it has."""
    name, looks, calls = row
    lifetime_s = LIFETIMES[name]
    before = takewhile(lambda at: at < lifetime_s, accumulate(chain(DELAYS_S, repeat(DELAYS_S[-1]))))
    assert looks == len(list(before)) + 1 == looks_until_expired(timedelta(seconds=lifetime_s), DELAYS_S)
    expected = [count * looks / lifetime_s / together for count in (10**4, 10**5, 10**6) for together in (1, 10)]
    assert calls == pytest.approx(expected, abs=0.051)


@pytest.mark.parametrize("each", [1, 10])
@pytest.mark.parametrize("row", [row for row in rows() if row[0] != "7 days"], ids=lambda row: row[0])
def test_a_run_costs_what_the_table_says(row: Row, each: int) -> None:
    """Ten commands for a device that were sent a second apart cost it one or two calls more than one command."""
    name, looks, _ = row
    time = ModelTime()
    histories = Histories(time)
    breakers = CircuitBreakers([None], 20, 5, time.loop.time)
    store = MemoryStore(60, 60, began_at=BEGAN)
    finder = ResultFinder(histories, store, breakers, breakers, DELAYS_S, lambda: 0.0, None, now=time.now)
    model = ResultsModel(time, finder, DELAYS_S)
    for number in range(each):
        for device in range(DEVICES):
            imei, uuid = str(865820030000000 + device), str(uuid4())
            expires_at = BEGAN + timedelta(seconds=LIFETIMES[name])
            command = Command(f"{device}-{number}", imei, 3311, 0, 5850, expires_at, None, None, None, None, None, None)
            reply = Reply(
                command_id=command.command_id, status="accepted", uuid=uuid, attempts=1, completed_at=time.now()
            )
            histories.expires_at.setdefault(imei, {})[uuid] = expires_at
            model.accept(await_result(command, "", reply, timedelta(0), DELAYS_S))
        model.pass_time(1)
    model.pass_time(LIFETIMES[name] + 3600, 1)
    assert model.results == {"expired": DEVICES * each}
    assert looks <= histories.reads / DEVICES <= looks + (0 if each == 1 else 2)
