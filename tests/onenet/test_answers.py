"""What each response of the platform means for the command."""

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from worker.core.answer import Answer, Cached, InDoubt, NotSent, Refused
from worker.onenet.answers import answered_at, interpret, retry_after_s

NOW = datetime(2026, 8, 5, 8, 0, tzinfo=UTC)


def answer(status: int, body: object, retry_after: str | None = None) -> Answer:
    return interpret(status, body if isinstance(body, bytes) else json.dumps(body).encode(), retry_after, NOW)


def test_errno_0_with_a_uuid_means_cached() -> None:
    assert answer(200, {"errno": 0, "data": {"uuid": "42742677 "}, "error": "succ"}) == Cached("42742677")
    assert answer(200, {"errno": 0, "error": "succ", "data": {"uuid": "u", "more": 1}, "other": []}) == Cached("u")
    assert answer(200, {"errno": 0, "error": None, "data": {"uuid": "u"}}) == Cached("u")


@pytest.mark.parametrize(
    ("errno", "error"),
    [(3, "parameter required"), (2001, "device not online"), (5006, "system logic limit"),
     (5106, "METHOD_NOT_ALLOWED"), (5108, "invalid parameter"), (5108, "Invalid Parameter: imei"),
     (4242, "unheard of"), (-1, "")],
)  # fmt: skip
@pytest.mark.parametrize("status", [200, 400, 401, 403])
def test_a_permanent_error_is_a_refusal_with_any_http_status_below_500(status: int, errno: int, error: str) -> None:
    assert answer(status, {"errno": errno, "error": error}) == Refused("onenet_rejected", error, errno)


@pytest.mark.parametrize("status", [200, 401, 403])
def test_refused_credentials_may_concern_all_devices(status: int) -> None:
    """Refusals for several devices in a row show whether the key is wrong for all of them."""
    found = answer(status, {"errno": 1, "error": "auth failed"})
    assert found == Refused("onenet_rejected", "auth failed", 1, may_concern_all_devices=True)


@pytest.mark.parametrize(
    "data",
    ["", [], {}, {"uuid": 1}, None, 7],
    ids=str,
)
def test_a_refusal_with_malformed_data_is_still_a_refusal(data: Any) -> None:
    assert answer(200, {"errno": 3, "error": "no", "data": data}) == Refused("onenet_rejected", "no", 3)


def test_a_refusal_with_a_missing_non_utf8_or_too_long_text_is_still_a_refusal() -> None:
    assert answer(200, {"errno": 3}) == answer(200, {"errno": 3, "error": None}) == Refused("onenet_rejected", "", 3)
    assert isinstance(answer(200, '{"errno": 3, "error": "参数"}'.encode("gbk")), Refused)
    found = answer(200, {"errno": 3, "error": "x" * 200_000})
    assert isinstance(found, Refused)
    assert len(found.message) == 500


@pytest.mark.parametrize(
    ("errno", "error", "is_outage"),
    [
        (7, "service internal error", True),
        (5117, "rpc error", True),
        (5108, "rpc response error", False),
        (5108, "", False),
        (5108, "invalid parameter / rpc response error", False),
    ],
)
def test_a_transient_error_leaves_the_command_in_doubt(errno: int, error: str, is_outage: bool) -> None:
    """The platform may have cached the command before it failed, by its own fault or the device's."""
    assert answer(200, {"errno": errno, "error": error}) == InDoubt(f"errno {errno}: {error}", is_outage)


@pytest.mark.parametrize(
    "body",
    [b"", b"\xff", b"<html>", b"[]", b"null", b'{"errno": 0', {"errno": "0"}, {"errno": True}, {"error": "succ"},
     {"errno": 0}, {"errno": 0, "data": None}, {"errno": 0, "data": {}}, {"errno": 0, "data": {"uuid": ""}},
     {"errno": 0, "data": {"uuid": "  "}}, {"errno": 0, "data": {"uuid": 7}}, {"errno": 0, "data": "u"}],
    ids=str,
)  # fmt: skip
def test_an_unreadable_200_leaves_the_command_in_doubt(body: Any) -> None:
    assert isinstance(answer(200, body), InDoubt)


@pytest.mark.parametrize("status", [500, 502, 503, 504, 599])
def test_status_5xx_leaves_the_command_in_doubt_with_any_body(status: int) -> None:
    assert isinstance(answer(status, {"errno": 3, "error": "parameter required"}), InDoubt)


@pytest.mark.parametrize("status", [301, 302, 307, 400, 401, 403, 404, 407, 408, 413])
@pytest.mark.parametrize("body", [b"", b"<html>", b"{}", b'{"errno": "3"}', b'{"error": "no such page"}'], ids=str)
def test_a_refusal_without_onenets_json_may_concern_all_devices(status: int, body: bytes) -> None:
    """A gateway or a portal in front of the platform refuses every command alike."""
    assert answer(status, body) == Refused("http_rejected", f"HTTP {status}", may_concern_all_devices=True)


@pytest.mark.parametrize(
    ("retry_after", "wait_s"),
    [(None, None), ("7", 7.0), (" 7 ", 7.0), ("-1", None), ("soon", None), ("", None),
     ("Wed, 05 Aug 2026 99999999999999999999:00:00 GMT", None), ("9" * 400, float("inf")),
     ("Wed, 05 Aug 2026 08:00:30 GMT", 30.0), ("Wed, 05 Aug 2026 07:00:00 GMT", 0.0)],
)  # fmt: skip
def test_status_429_means_not_sent_with_the_retry_after_of_its_header(
    retry_after: str | None, wait_s: float | None
) -> None:
    found = answer(429, b"", retry_after)
    assert found == NotSent("HTTP 429: too many requests", wait_s)
    assert answer(429, {"errno": 13, "error": "system limit"}, retry_after) == found


@pytest.mark.parametrize("status", [200, 400, 429])
@pytest.mark.parametrize(("errno", "error"), [(15, "api freq out of limit"), (15, ""), (13, "调用频率超限\uff1a300/s")])
def test_a_throttling_error_means_not_sent_and_throttled(status: int, errno: int, error: str) -> None:
    reason = f"errno {errno}: {error}"
    assert answer(status, {"errno": errno, "error": error}) == NotSent(reason, is_throttled=True)
    assert answer(status, {"errno": errno, "error": error}, "7") == NotSent(reason, 7.0, is_throttled=True)


@pytest.mark.parametrize(
    ("errno", "error"), [(3, "auth failed"), (3, "token鉴权失败"), (2, "api-key required"), (1, ""), (10403, "")]
)
def test_a_credentials_error_is_recognized_under_every_errno(errno: int, error: str) -> None:
    found = answer(200, {"errno": errno, "error": error})
    assert found == Refused("onenet_rejected", error, errno, may_concern_all_devices=True)


@pytest.mark.parametrize(
    ("errno", "error", "is_outage"),
    [
        (1, "internal server error", True),
        (17, "nbiot server error", True),
        (14, "network latency", False),
        (16, "unsuccess: TIME_OUT null", False),
    ],
)
@pytest.mark.parametrize("status", [200, 400, 429])
def test_an_error_after_which_the_command_may_be_cached_leaves_it_in_doubt(
    errno: int, error: str, is_outage: bool, status: int
) -> None:
    assert answer(status, {"errno": errno, "error": error}) == InDoubt(f"errno {errno}: {error}", is_outage)


@pytest.mark.parametrize(
    ("errno", "error"), [(7, "parameter required"), (13, "system limit"), (10, "device not online")]
)
def test_an_errno_with_two_meanings_is_interpreted_by_its_text(errno: int, error: str) -> None:
    assert answer(200, {"errno": errno, "error": error}) == Refused("onenet_rejected", error, errno)


@pytest.mark.parametrize(
    ("errno", "error"), [(0, "succ"), (15, "api freq out of limit"), (3, "auth failed"), (13, ""), (-1, "unheard of")]
)
def test_a_response_with_a_uuid_is_never_a_refusal(errno: int, error: str) -> None:
    """With status 2xx the command was cached, whatever errno says; with any other status it is in doubt."""
    body = {"errno": errno, "error": error, "data": {"uuid": "u"}}
    assert answer(200, body) == answer(201, body) == Cached("u")
    for status in (302, 400, 404, 429, 500):
        assert isinstance(answer(status, body), InDoubt)


def test_a_retry_after_date_is_measured_against_the_date_of_its_own_answer() -> None:
    """The platform's clock may be hours away from ours."""
    made_at = answered_at("Wed, 05 Aug 2026 16:00:00 GMT", NOW)
    assert retry_after_s("Wed, 05 Aug 2026 16:00:05 GMT", made_at) == 5
    assert answered_at(None, NOW) == answered_at("yesterday", NOW) == NOW
