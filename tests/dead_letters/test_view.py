"""Dead letters as JSON and as text for a terminal."""

import json
import struct
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

from pika import BasicProperties

from worker.amqp.bodies import TruncatedBody
from worker.amqp.field_table import RawFieldValue
from worker.dead_letters.letter import DeadLetter
from worker.dead_letters.view import details, summary

NOW = datetime(2026, 8, 6, tzinfo=UTC)
MOMENT = RawFieldValue(b"T" + struct.pack(">Q", int(datetime(2026, 8, 5, tzinfo=UTC).timestamp())))


def a_dead_letter(body: bytes, **headers: Any) -> DeadLetter:
    properties = BasicProperties(app_id="billing", headers=headers)
    return DeadLetter(1, "execute.invalid_message", properties, body, ZoneInfo("Asia/Shanghai"))


def test_the_summary_of_an_unreadable_dead_letter_has_null_for_unknown_fields() -> None:
    failed_at = "2026-08-05T12:00:00.000+08:00"
    headers = {"x-onenet-reason": "invalid_message", "x-onenet-error": "no JSON", "x-onenet-failed-at": failed_at}
    assert summary(a_dead_letter(b"{", **headers).listing(NOW)) == {
        "digest": "b5221b1951a75e5771183399f37e457e",
        "command_id": None,
        "reason": "invalid_message",
        "error": "no JSON",
        "failed_at": "2026-08-05T04:00:00Z",
        "imei": None,
        "source": "billing",
        "expires_at": None,
    }


def test_the_details_of_a_dead_letter_are_json_for_any_headers() -> None:
    headers = {
        "bytes": b"\xff",
        "list": [1, None, {"n": True}],
        "moment": MOMENT,
        "text": RawFieldValue(b"S" + (3).to_bytes(4) + b"a\xbf\xaa"),
    }
    found = details(a_dead_letter(b"{}", **headers, other=timedelta(1)), NOW)
    assert json.loads(json.dumps(found)) == found
    assert found["headers"] == {
        "bytes": "\\xff",
        "list": [1, None, {"n": True}],
        "moment": "2026-08-05T00:00:00Z",
        "text": "a\\xbf\\xaa",
        "other": "1 day, 0:00:00",
    }
    assert found["properties"] == {"app_id": "billing"}


def test_a_body_that_is_not_utf_8_is_shown_in_base64() -> None:
    found = details(a_dead_letter(b"\xff\x00"), NOW)
    assert (found["body_base64"], "body" in found) == ("/wA=", False)
    assert details(a_dead_letter(b"text"), NOW)["body"] == "text"


def test_a_body_that_was_cut_says_so_and_may_end_in_half_a_character() -> None:
    found = details(a_dead_letter(TruncatedBody("中文".encode()[:-1])), NOW)
    assert (found["body"], found["is_body_cut"]) == ("中", True)
