"""Builders of valid commands, in which a test changes what it is about."""

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4


def a_command(**changes: Any) -> dict[str, Any]:
    """Return a valid command with a new id; a change to None takes the field away."""
    fields: dict[str, Any] = {
        "command_id": str(uuid4()),
        "imei": "865820030000001",
        "obj_id": 3311,
        "obj_inst_id": 0,
        "res_id": 5850,
        "expired_time": in_hours(24),
    }
    return {name: value for name, value in (fields | changes).items() if value is not None}


def fields_of(value: Any) -> str:
    """Name a row by the fields that it changes; times among their values differ wherever tests are collected."""
    return ",".join(value) if isinstance(value, dict) else str(value)


def in_hours(hours: float) -> str:
    """Return a command's time, so many hours from now."""
    return (datetime.now(UTC) + timedelta(hours=hours)).strftime("%Y-%m-%dT%H:%M:%SZ")
