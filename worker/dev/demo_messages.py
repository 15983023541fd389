"""The messages of the demo, of every kind that a worker meets, and the devices that make trouble."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

_FIRST_DEVICE = 865820030000000
GOOD = str(_FIRST_DEVICE + 1)
REFUSING = str(_FIRST_DEVICE + 7)  # gets good commands, and answers that it cannot do them
UNKNOWN, NOT_FOUND, BUSY_ONCE, BUSY, SILENT, DEAF, DARK = (str(_FIRST_DEVICE + 900 + n) for n in range(7))
FAULTS: list[dict[str, Any]] = [
    {"kind": "not_found", "imei": NOT_FOUND},
    {"kind": "too_many_requests", "imei": BUSY_ONCE, "count": 15, "seconds": 0},  # a Retry-After would pause all
    {"kind": "too_many_requests", "imei": BUSY, "seconds": 0},
    {"kind": "drop_after_caching", "imei": SILENT},
    {"kind": "error_503", "imei": DEAF, "count": 10},
    {"kind": "drop_after_caching", "imei": DARK},
    {"kind": "error_500", "imei": DARK, "endpoint": "history"},
]


@dataclass(frozen=True, slots=True)
class Message:
    """One message to send, and its expected outcome: a status and an error code."""

    kind: str
    body: bytes
    outcome: str


def demo_messages(count: int) -> Iterator[Message]:
    """Yield messages of every kind, frequent kinds more often."""
    kinds = ["good"] * (count - 145) + [
        *["valid_time passed"] * 15,
        *["busy once"] * 15,
        *["sent twice"] * 15,
        *["device unknown"] * 15,
        *["page not found"] * 5,
        *["no JSON"] * 10,
        *["field breaks its rule"] * 20,
        *["product unknown"] * 5,
        *["expired"] * 10,
        *["always busy"] * 5,
        *["answer lost, cached"] * 10,
        *["answer lost, not cached"] * 10,
        *["answer and history lost"] * 5,
        *["id used twice"] * 5,
    ]
    tomorrow = (datetime.now(UTC) + timedelta(days=1)).strftime("%Y-%m-%dT%H:%M:%SZ")
    yesterday = (datetime.now(UTC) - timedelta(days=1)).strftime("%Y-%m-%dT%H:%M:%SZ")
    for number, kind in enumerate(kinds):
        fields: dict[str, Any] = {
            "command_id": f"demo-{number}",
            "imei": str(_FIRST_DEVICE + number % 100),
            "obj_id": 3311,
            "obj_inst_id": 0,
            "res_id": 5850,
            "expired_time": tomorrow,
            "args": f"demo-{number}",  # identifies the command in the platform's list
        }
        outcome = "accepted"
        match kind:
            case "valid_time passed":
                fields["valid_time"] = yesterday
            case "busy once":
                fields["imei"] = BUSY_ONCE
            case "sent twice":
                yield Message(kind, json.dumps(fields).encode(), outcome)
            case "device unknown":
                fields["imei"] = UNKNOWN
                outcome = "rejected onenet_rejected"
            case "page not found":
                fields["imei"] = NOT_FOUND
                outcome = "rejected http_rejected"
            case "no JSON":
                yield Message(kind, b'{"imei": 8658', "failed invalid_message")
                continue
            case "field breaks its rule":
                fields["retry"] = "three"
                outcome = "failed invalid_command"
            case "product unknown":
                fields["product"] = "heating"
                outcome = "failed unknown_product"
            case "expired":
                fields["expired_time"] = yesterday
                outcome = "failed expired"
            case "always busy":
                fields["imei"] = BUSY
                outcome = "failed retries_exhausted"
            case "answer lost, cached":
                fields["imei"] = SILENT
            case "answer lost, not cached":
                fields["imei"] = DEAF
            case "answer and history lost":
                fields["imei"] = DARK
                outcome = "failed outcome_unknown"
            case "id used twice":
                yield Message(kind, json.dumps(fields).encode(), outcome)
                fields["args"] = f"demo-{number}, but another"  # the first of the two to be processed is accepted
                outcome = "failed command_id_conflict"
        yield Message(kind, json.dumps(fields).encode(), outcome)
