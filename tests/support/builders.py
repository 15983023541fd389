"""Valid commands and tasks; a test changes what it is about."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4
from zoneinfo import ZoneInfo

from worker.core.envelope import Envelope, Task
from worker.core.parsing import read_command

AN_IMEI = "865820030000001"


def a_command(**changes: Any) -> dict[str, Any]:
    """Return the fields of a valid command with a new id; a change to None removes the field."""
    fields: dict[str, Any] = {
        "command_id": str(uuid4()),
        "imei": AN_IMEI,
        "obj_id": 3311,
        "obj_inst_id": 0,
        "res_id": 5850,
        "expired_time": in_hours(24),
    }
    return {name: value for name, value in (fields | changes).items() if value is not None}


def a_task(
    number: int, imei: str = AN_IMEI, *, app_id: str = "", user_id: str | None = None, size: int = 1, **changes: Any
) -> Task:
    """Return a valid command for a device as a task; ``number`` is its arrival in seconds."""
    command = read_command(json.dumps(a_command(imei=imei, **changes)).encode(), None, ZoneInfo("Asia/Shanghai"))
    return Task(Envelope(app_id=app_id, user_id=user_id), command, arrived_at=float(number), size=size)


def in_hours(hours: float) -> str:
    """Return the time in ``hours`` from now as a command has it."""
    return (datetime.now(UTC) + timedelta(hours=hours)).strftime("%Y-%m-%dT%H:%M:%SZ")


def fields_of(value: Any) -> str:
    """Return a test id: the names of the fields that a row changes.

    Not their values: times among them differ from one collection to the next, which pytest-xdist refuses.
    """
    return ",".join(value) if isinstance(value, dict) else str(value)
