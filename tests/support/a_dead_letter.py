"""Dead letters as a worker, or the broker, publishes them."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

from pika import BasicProperties

from tests.support.builders import a_command
from worker.dead_letters.letter import DeadLetter

NOW = datetime(2026, 8, 5, 12, tzinfo=UTC)
FAILED_AT = NOW - timedelta(hours=3)
ZONE = ZoneInfo("Asia/Shanghai")
DEATH: dict[str, Any] = {"x-death": [], "x-first-death-reason": "delivery_limit"}


def a_dead_letter(reason: str = "outcome_unknown", routing_key: str | None = None, **changes: Any) -> DeadLetter:
    own = {"x-onenet-reason": reason, "x-onenet-failed-at": FAILED_AT.isoformat(timespec="milliseconds")}
    properties = BasicProperties(app_id="billing", headers=own | changes.pop("headers", {}))
    body = changes.pop("body", None) or json.dumps(a_command(**({"command_id": "a"} | changes))).encode()
    key = routing_key or f"execute.{reason}"
    return DeadLetter(1, key, properties, body, ZONE)
