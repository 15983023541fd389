"""Deliveries as the broker hands them to the worker."""

import json
from collections.abc import Mapping
from typing import Any

from pika import BasicProperties

from tests.support.builders import a_command, in_hours
from worker.amqp.messages import Delivery

TOMORROW = in_hours(24)  # the same for every delivery: with another time it would be another command


def a_delivery(*, redelivered: bool = False, headers: Mapping[str, Any] | None = None, **changes: Any) -> Delivery:
    """Return a delivery of command "a", with changes; one with headers came through the worker's own exchange."""
    body = json.dumps(a_command(**({"command_id": "a", "expired_time": TOMORROW} | changes))).encode()
    return Delivery(1, 1, redelivered, BasicProperties(headers=headers and dict(headers)), body, headers is not None)
