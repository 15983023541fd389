"""What excuses a worker that takes nothing from its queue."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from worker.pulse import Pulse

BUSY: dict[str, Any] = {
    "is_connected": True,
    "is_publishing_hindered": False,
    "is_any_open": True,
    "waits_for_slots": False,
    "is_stopping": False,
}


def pulse(**changes: bool) -> Pulse:
    facts = BUSY | changes
    parts = SimpleNamespace(**facts | {"is_any_open": lambda: facts["is_any_open"]})
    return Pulse(*cast("Any", [parts] * 4))


def test_nothing_excuses_a_worker_that_could_take_commands() -> None:
    assert not pulse()._is_excused()  # noqa: SLF001


@pytest.mark.parametrize("reason", BUSY)
def test_each_reason_for_taking_nothing_is_one(reason: str) -> None:
    assert pulse(**{reason: not BUSY[reason]})._is_excused()  # noqa: SLF001
