"""What each response of the platform means for the command."""

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from worker.core.answer import Answer, Cached, InDoubt, NotSent, Refused
from worker.onenet.answers import interpret
from worker.onenet.dialect import Dialect
from worker.onenet.response import Response
from worker.onenet.v1 import V1
from worker.onenet.v2 import V2

NOW = datetime(2026, 8, 5, 8, 0, tzinfo=UTC)
KEY, TOKEN = "S3cretMasterKey=", "version=2022-05-01&res=products%2F1&sign=S3cret%2Bsignature%3D"


def answer(status: int, body: object, retry_after: str | None = None) -> Answer:
    return of(V1, status, body, {} if retry_after is None else {"retry-after": retry_after})


def of(
    dialect: Dialect, status: int, body: object, headers: dict[str, str] | None = None, *, is_proven: bool = False
) -> Answer:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    names = {name.encode(): value.encode() for name, value in (headers or {}).items()}
    return interpret(Response(status, names, content, (KEY, TOKEN)), dialect, NOW, is_proven=is_proven)


def test_errno_0_with_a_uuid_means_cached() -> None:
    assert answer(200, {"errno": 0, "data": {"uuid": "42742677 "}, "error": "succ"}) == Cached("42742677")
    assert answer(200, {"errno": 0, "error": "succ", "data": {"uuid": "u", "more": 1}, "other": []}) == Cached("u")
    assert answer(200, {"errno": 0, "error": None, "data": {"uuid": "u"}}) == Cached("u")


@pytest.mark.parametrize(
    ("errno", "error"),
    [(3, "parameter required"), (2001, "device not online"),
     (5106, "METHOD_NOT_ALLOWED"), (5108, "invalid parameter"), (5108, "Invalid Parameter: imei"),
     (4242, "unheard of"), (-1, "")],
)  # fmt: skip
@pytest.mark.parametrize("status", [200, 400, 401, 403])
def test_a_permanent_error_is_a_refusal_with_any_http_status_below_500(status: int, errno: int, error: str) -> None:
    assert answer(status, {"errno": errno, "error": error}) == Refused("onenet_rejected", error, errno)


@pytest.mark.parametrize(
    ("errno", "error"), [(5006, "system logic limit"), (13, "system limit"), (13, ""), (4242, "命令数量超过上限")]
)
@pytest.mark.parametrize("status", [200, 400])
def test_a_limit_is_a_refusal_that_may_be_about_the_devices_queue(status: int, errno: int, error: str) -> None:
    assert answer(status, {"errno": errno, "error": error}) == Refused("onenet_rejected", error, errno, is_limit=True)


@pytest.mark.parametrize("status", [200, 401, 403])
def test_refused_credentials_may_concern_all_devices(status: int) -> None:
    """Refusals for several devices in a row show whether the key is wrong for all of them."""
    found = answer(status, {"errno": 1, "error": "auth failed"})
    assert found == Refused("onenet_rejected", "auth failed", 1, may_concern_all_devices=True)


@pytest.mark.parametrize(
    "data",
    ["", [], {}, {"uuid": ""}, {"uuid": None}, {"of": ["uuid"]}, None, 7],
    ids=str,
)
def test_a_refusal_with_malformed_data_is_still_a_refusal(data: Any) -> None:
    assert answer(200, {"errno": 3, "error": "no", "data": data}) == Refused("onenet_rejected", "no", 3)


@pytest.mark.parametrize("data", [{"uuid": 1}, {"uuid": ["u"]}, {"cmd_uuid": "u"}, [{"UUID": "u"}]], ids=str)
def test_a_refusal_with_a_uuid_in_another_form_leaves_the_command_in_doubt(data: Any) -> None:
    found = answer(200, {"errno": 3, "error": "no", "data": data})
    assert found == InDoubt("errno 3, with a uuid in an unknown form")


UUID = "42742677-adc3-54ca-83a1-5aaaf71482f8"


@pytest.mark.parametrize(
    "more",
    [{"uuid": UUID}, {"data": {}, "uuid": UUID}, {"data": None, "result": {"UUID": "u"}}, {"data": {"cmd_id": UUID}},
     {"data": {"cmdId": "u"}}, {"data": {"command_id": 7}}, {"data": json.dumps({"uuid": UUID})}, {"data": UUID},
     {"data": json.dumps(json.dumps([{"cmd_uuid": "u"}]))}, {"data": "{uuid=u}"}, {"data": "<uuid>u</uuid>"},
     {"data": ["x", UUID.upper()]},
     {"data": {"id": UUID.replace("-", "")}}, {"data": {"of": ["cmd_id: u"]}}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("dialect", [V1, V2])
@pytest.mark.parametrize("status", [200, 400, 429])
def test_a_refusal_with_a_uuid_anywhere_leaves_the_command_in_doubt(
    status: int, dialect: Dialect, more: dict[str, Any]
) -> None:
    """The platform gives a uuid only to a command that it has cached, and the rest of the answer is unclear."""
    body = {dialect.code_name: 5108, dialect.text_name: "invalid parameter", "request_id": "r"} | more
    assert isinstance(of(dialect, status, body), InDoubt)
    other = V1 if dialect is V2 else V2
    assert isinstance(of(other, status, body), InDoubt)  # nor is it a wrong setting


def test_the_id_of_a_request_is_no_uuid_of_a_command() -> None:
    refused = {"code": 10001, "msg": "parameter error", "request_id": UUID, "data": None}
    assert of(V2, 200, refused) == Refused("onenet_rejected", "parameter error", 10001)


@pytest.mark.parametrize(
    "body",
    ['{"errno":5108,"error":"invalid parameter","data":{"uuid":"u"},"data":null}',
     '{"errno":0,"data":{"uuid":"u"},"error":"invalid parameter","errno":5108,"data":{}}',
     '{"errno":5108,"errno":0,"error":"invalid parameter"}',
     '{"errno":5108,"Errno":0,"error":"invalid parameter"}',
     '{"errno":0,"data":{"uuid":"u"},"data":{"uuid":"v"}}', '{"errno":0,"data":{"uuid":"u","uuid":"v"}}',
     '{"errno":0,"data":{"uuid":"u","uuid":"u"}}', '{"errno":0,"data":{"uuid":"u","UUID":"v"}}',
     '{"errno":0,"data":{"uuid":"u","more":[{"a":1,"\\u0061":2}]}}'],
)  # fmt: skip
@pytest.mark.parametrize("dialect", [V1, V2])
@pytest.mark.parametrize("status", [200, 400, 401, 429])
def test_an_answer_with_a_name_twice_leaves_the_command_in_doubt(status: int, dialect: Dialect, body: str) -> None:
    """It is neither refused nor accepted: parsers do not agree about which of the two values is meant."""
    for name, own in ("errno", dialect.code_name), ("Errno", dialect.code_name.title()), ("error", dialect.text_name):
        body = body.replace(f'"{name}"', f'"{own}"')
    assert isinstance(of(dialect, status, body.encode()), InDoubt)
    assert isinstance(of(dialect, status, body.encode(), is_proven=True), InDoubt)


@pytest.mark.parametrize("dialect", [V1, V2])
def test_a_refusal_that_says_success_in_the_form_of_the_other_generation_leaves_the_command_in_doubt(
    dialect: Dialect,
) -> None:
    body = {"errno": 3, "error": "no", "code": 10001, "msg": "no"} | {
        {"v1": "code", "v2": "errno"}[dialect.generation]: 0
    }
    assert isinstance(of(dialect, 200, body), InDoubt)


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
    found = answer(status, body)
    assert isinstance(found, Refused)
    assert found == Refused("http_rejected", found.message, may_concern_all_devices=True)
    assert found.message.startswith(f"HTTP {status}, ")


@pytest.mark.parametrize(
    ("retry_after", "wait_s"),
    [(None, None), ("7", 7.0), (" 7 ", 7.0), ("-1", None), ("soon", None), ("", None),
     ("Wed, 05 Aug 2026 99999999999999999999:00:00 GMT", None), ("9" * 400, None),
     ("86400", 86_400.0), ("86401", None),
     ("Wed, 05 Aug 2026 08:00:30 GMT", 30.0), ("Wed, 05 Aug 2026 07:00:00 GMT", 0.0),
     ("Thu, 06 Aug 2026 08:00:00 GMT", 86_400.0), ("Thu, 06 Aug 2026 08:00:01 GMT", None)],
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
    ("errno", "error"),
    [(3, "auth failed"), (3, "token鉴权失败"), (2, "api-key required"), (1, ""), (10403, "鉴权失败")],
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


@pytest.mark.parametrize(("errno", "error"), [(7, "parameter required"), (10, "device not online")])
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


@pytest.mark.parametrize("status", [302, 400, 404, 429])
def test_a_body_that_may_say_success_is_never_a_refusal(status: int) -> None:
    """It is no answer of OneNET as documented; with another notation of its number, it may be one all the same."""
    for body in ({"errno": "0", "error": "succ"}, {"errno": 0.0}, {"code": "0"}, {"data": {"uuid": "u"}},
                 [{"uuid": "u"}], b'\xef\xbb\xbf{"errno":0,"data":{"uuid":"u"}}', b'cb({"data":{"cmd_uuid": "u"}})',
                 b'{"a":1,"a":2}', b'{"errno":0,"a":' + b"[" * 300 + b"]" * 300 + b"}", b'\n[{"errno":0'):  # fmt: skip
        assert isinstance(answer(status, body), InDoubt)
    for body in (
        b"<html>no such uuid",
        {"errno": "3"},
        {"code": "x"},
        {"data": {"uuid": ""}},
        {"message": "no route"},
    ):
        assert not isinstance(answer(status, body), InDoubt)


def test_success_of_the_other_generation_is_not_sent_again() -> None:
    """Not even with status 429: nothing says that it was not cached."""
    assert isinstance(of(V1, 429, {"code": 0, "msg": "succ", "request_id": "r"}), Refused)
    assert isinstance(of(V2, 429, {"errno": 0, "error": "succ"}), Refused)


def test_a_v2_answer_has_code_and_msg() -> None:
    assert of(V2, 200, {"code": 0, "msg": "succ", "data": {"uuid": "u"}, "request_id": "r"}) == Cached("u")
    refused = {"code": 10001, "msg": "parameter error", "request_id": "r"}
    assert of(V2, 200, refused) == Refused("onenet_rejected", "parameter error", 10001)
    wrong_key = {"code": 10403, "msg": "authentication failed", "request_id": "r"}
    assert of(V2, 200, wrong_key) == Refused(
        "onenet_rejected", "authentication failed", 10403, may_concern_all_devices=True
    )
    assert of(V2, 200, {"code": 500, "msg": "whatever", "request_id": "r"}) == InDoubt("code 500: whatever")
    assert of(V2, 200, {"code": 7, "msg": "calling too fast", "request_id": "r"}, {"retry-after": "7"}) == NotSent(
        "code 7: calling too fast", 7.0, is_throttled=True
    )
    assert isinstance(of(V2, 200, {"code": 0, "msg": "succ"}), InDoubt)
    assert isinstance(of(V2, 200, {"code": "0", "msg": "succ", "data": {"uuid": "u"}}), InDoubt)


@pytest.mark.parametrize("code", [1, 15, 503])
def test_an_answer_in_the_form_of_v2_that_a_gateway_may_have_sent_leaves_the_command_in_doubt(code: int) -> None:
    """It lacks the request_id; the gateway may have passed the command on."""
    assert isinstance(of(V2, 200, {"code": code, "msg": "upstream overloaded"}), InDoubt)


FOREIGN = [
    (V1, {"code": 10403, "msg": "authentication failed", "request_id": "r"}, 10403),
    (V1, {"code": 10410, "msg": "", "request_id": "r"}, 10410),
    (V1, {"code": 15, "msg": "calling too fast", "request_id": "r"}, 15),
    (V1, {"code": 10408, "msg": "no such product"}, 10408),
    (V2, {"errno": 3, "error": "token鉴权失败"}, 3),
    (V2, {"errno": 4242, "error": "unheard of", "data": {}}, 4242),
]


@pytest.mark.parametrize(("dialect", "body", "code"), FOREIGN, ids=str)
@pytest.mark.parametrize("status", [200, 400, 404])
def test_an_answer_of_the_other_generation_is_a_refusal_that_names_the_setting(
    dialect: Dialect, body: dict[str, Any], code: int, status: int
) -> None:
    """It concerns all devices of the product, and the product is paused before many commands are rejected."""
    found = of(dialect, status, body)
    assert isinstance(found, Refused)
    assert (found.errno, found.may_concern_all_devices) == (code, True)
    assert found.message.startswith("ONENET_API: the platform answers as v")
    assert found.cause == found.message


@pytest.mark.parametrize(
    ("dialect", "body"),
    [(V1, {"code": 0, "msg": "succ"}), (V2, {"errno": 0, "error": "succ"}), (V1, {"code": 10500, "msg": "internal"})],
    ids=str,
)
@pytest.mark.parametrize("code", ["as it is", 4242])
def test_an_answer_of_the_other_generation_with_a_uuid_means_cached(
    dialect: Dialect, body: dict[str, Any], code: object
) -> None:
    """Whoever made the answer has cached the command: it is not sent again."""
    if code == 4242:
        body = body | dict.fromkeys(body.keys() & {"code", "errno"}, code)
    assert of(dialect, 200, body | {"data": {"uuid": "u"}}) == Cached("u")


@pytest.mark.parametrize(
    ("dialect", "body"),
    [(V1, {"code": 0, "msg": "succ"}), (V2, {"errno": 0, "error": "succ"}), (V1, {"code": 10500, "msg": "internal"}),
     (V2, {"errno": 16, "error": "unsuccess: TIME_OUT null"})],
    ids=str,
)  # fmt: skip
def test_an_answer_of_the_other_generation_is_in_doubt_only_if_the_configured_one_has_accepted_a_command(
    dialect: Dialect, body: dict[str, Any]
) -> None:
    """Something in front of the platform has answered then; before, the settings are wrong and nothing is cached."""
    found = of(dialect, 200, body, is_proven=True)
    assert isinstance(found, InDoubt)
    assert found.reason.startswith("ONENET_API: ")
    for status in (200, 404, 500, 503):
        refused = of(dialect, status, body)
        assert isinstance(refused, Refused)
        assert refused.message.startswith("ONENET_API: the platform answers as v")
        assert refused.is_misconfigured
        assert not refused.may_concern_all_devices  # or it would be sent again while the product is paused


@pytest.mark.parametrize("code", [404, 500, 503, 504])
def test_the_json_of_a_gateway_is_no_answer_of_v2(code: int) -> None:
    """It says nothing about what the platform behind it did; a 429 of it is a 429."""
    assert isinstance(of(V1, 200, {"code": code, "msg": "upstream failed"}), InDoubt)
    assert of(V1, 429, {"code": 429, "msg": "Too Many Requests"}) == NotSent("HTTP 429: too many requests")
    foreign = {"code": 10001, "msg": "Too Many Requests", "request_id": "r"}
    assert of(V1, 429, foreign) == NotSent("HTTP 429: too many requests")


def test_an_answer_with_the_fields_of_both_generations_is_one_of_the_configured_generation() -> None:
    both = {"errno": 3, "error": "parameter required", "code": 10001, "msg": "parameter error"}
    assert of(V1, 200, both) == Refused("onenet_rejected", "parameter required", 3)
    assert of(V2, 200, both) == Refused("onenet_rejected", "parameter error", 10001)


@pytest.mark.parametrize(
    ("headers", "body", "description"),
    [
        ({"content-type": "text/html; charset=utf-8"}, b"<html>\r\n\x1b[31m<body>\tno such page</body></html>",
         "HTTP 200, text/html; charset=utf-8: <html> [31m<body> no such page</body></html>"),
        ({"content-type": "application/json", "content-encoding": "gzip"}, b"\x1f\x8b\x08\x00abc\xff",
         "HTTP 200, application/json, encoded as gzip: abc"),
        ({}, b"", "HTTP 200, no content type, without a printable body"),
        ({"content-type": "text/plain\x07\x1b"}, "登录\u2028\u202e页面".encode(), "HTTP 200, text/plain: 登录 页面"),
        ({}, b"x" * 5_000, f"HTTP 200, no content type: {'x' * 80}"),
        ({}, f"your key {KEY}, your header {TOKEN}".encode(),
         "HTTP 200, no content type: ***"),
        ({"content-type": KEY}, f"{'x' * 75} S3cret+signature=".encode(), "HTTP 200, ***: ***"),
    ],
)  # fmt: skip
def test_an_unreadable_answer_says_what_came(headers: dict[str, str], body: bytes, description: str) -> None:
    assert of(V1, 200, body, headers) == InDoubt(f"the response is not OneNET's JSON: {description}")
    at_404 = description.replace("HTTP 200", "HTTP 404")
    assert of(V1, 404, body, headers) == Refused("http_rejected", at_404, may_concern_all_devices=True)
    assert of(V1, 502, body, headers) == InDoubt(description.replace("HTTP 200", "HTTP 502"))


def test_a_text_of_the_platform_does_not_repeat_the_key() -> None:
    found = answer(200, {"errno": 3, "error": f"auth failed: {KEY}"})
    assert found == Refused("onenet_rejected", "***", 3, may_concern_all_devices=True)


def test_a_retry_after_date_is_measured_against_the_date_of_its_own_answer() -> None:
    """The platform's clock may be hours away from ours."""
    asked = {"retry-after": "Wed, 05 Aug 2026 16:00:05 GMT"}
    too_many = "HTTP 429: too many requests"
    assert of(V1, 429, b"", asked | {"date": "Wed, 05 Aug 2026 16:00:00 GMT"}) == NotSent(too_many, 5)
    for date in ({}, {"date": "yesterday"}):
        assert of(V1, 429, b"", asked | date) == NotSent(too_many, 8 * 3600 + 5)
