"""Both generations of the platform, and both tables of errno of the first, as public material documents them."""

import base64
import hashlib
import hmac
import time
from collections.abc import Callable, Iterator
from email.utils import parsedate_to_datetime
from typing import Any, Literal
from urllib.parse import urlencode

import pytest
import requests

from tests.support.simulator import ACCESS_KEY, API_KEY, OFFLINE_IMEI, PRODUCT_ID, onenet
from tests.support.simulator_client import IMEI, SimulatorClient, at
from tests.support.waiting import PATIENCE_S
from worker.simulator.dialects import V1, V2
from worker.simulator.faults import Fault
from worker.simulator.platform import Platform
from worker.simulator.server import Simulator

USER_KEY = "720e323b10d54d3a8cdbe5dd4e641052"
USER_TOKEN = "version=2022-05-01&res=userid%2F511932&et=1770000000&method=sha1&sign=xRvkt1q2HU7quic8C8xb28%2BdrQ4%3D"


@pytest.fixture(scope="module")
def shared() -> Iterator[Simulator]:
    with onenet() as found:
        found.platform.keys = {f"products/{PRODUCT_ID}": ACCESS_KEY, "userid/511932": USER_KEY, "projects/9": "a2V5"}
        yield found


@pytest.fixture
def simulator(shared: Simulator) -> Iterator[Simulator]:
    yield shared
    shared.platform.clear()
    shared.platform.errors = "service"
    shared.platform.queue_limit = shared.platform.queue_errno = shared.platform.rate = None
    shared.platform.clock_offset_s = 0
    shared.faults.replace([])


@pytest.fixture
def v1(simulator: Simulator) -> SimulatorClient:
    return SimulatorClient(simulator)


@pytest.fixture
def v2(simulator: Simulator) -> SimulatorClient:
    return SimulatorClient(simulator, "/nb-iot", {"Authorization": token(f"products/{PRODUCT_ID}", ACCESS_KEY)})


def token(resource: str, key: str, version: str = "2022-05-01", lasts_s: int = 600, method: str = "sha256") -> str:
    """Sign a token by the documented rule."""
    et = str(int(time.time()) + lasts_s)
    text = f"{et}\n{method}\n{resource}\n{version}"
    sign = hmac.new(base64.b64decode(key), text.encode(), getattr(hashlib, method)).digest()
    fields = {"version": version, "res": resource, "et": et, "method": method, "sign": base64.b64encode(sign).decode()}
    return urlencode(fields)


def test_v1_answers_errno_error_and_data(v1: SimulatorClient) -> None:
    answer = v1.execute({"args": "on"}).json()
    assert answer == {"errno": 0, "error": "succ", "data": {"uuid": answer["data"]["uuid"]}}


def test_v2_answers_code_msg_data_and_request_id(v2: SimulatorClient) -> None:
    answer, other = v2.execute({"args": "on"}).json(), v2.execute({"args": "on"}).json()
    assert set(answer) == {"code", "msg", "data", "request_id"}
    assert (answer["code"], answer["msg"]) == (0, "succ")
    assert answer["request_id"] != other["request_id"]
    refused = v2.execute({"args": "on"}, obj_id=None)
    assert (refused.status_code, refused.json()["code"]) == (200, 10001)
    assert set(refused.json()) == {"code", "msg", "request_id"}


def test_both_generations_show_the_same_commands(v1: SimulatorClient, v2: SimulatorClient) -> None:
    uuid = v2.cached()
    assert v1.history()["data"]["items"][0]["cmd_uuid"].strip() == uuid
    assert v2.detail(uuid)["data"]["content"] == {"args": "on"}
    assert v2.cancel(uuid)["code"] == 10407  # it is valid at once


def test_the_public_test_vector_of_a_token_is_accepted(v2: SimulatorClient) -> None:
    v2.headers = {"Authorization": USER_TOKEN}
    v2.simulator.platform.clock_offset_s = 1769999000 - v2.simulator.platform.now().timestamp()
    assert v2.execute(expired_time="2099-01-01T00:00:00").json()["code"] == 0


def test_a_token_is_expired_by_the_clock_of_the_platform(v2: SimulatorClient) -> None:
    v2.simulator.platform.clock_offset_s = 601
    assert v2.execute(expired_time=at(7200)).json()["code"] == 10403


@pytest.mark.parametrize("method", ["md5", "sha1", "sha256"])
def test_each_method_of_signing_is_accepted(v1: SimulatorClient, method: str) -> None:
    resource = f"products/{PRODUCT_ID}"
    v1.headers = {"Authorization": token(resource, ACCESS_KEY, "2018-10-31", method=method)}
    assert v1.execute().json()["errno"] == 0


@pytest.mark.parametrize(
    ("resource", "key", "version", "v1_accepts", "v2_accepts"),
    [
        (f"products/{PRODUCT_ID}", ACCESS_KEY, "2018-10-31", True, False),
        (f"products/{PRODUCT_ID}", ACCESS_KEY, "2022-05-01", False, True),
        ("userid/511932", USER_KEY, "2022-05-01", False, True),
        ("userid/511932", USER_KEY, "2018-10-31", False, False),
        ("projects/9", "a2V5", "2022-05-01", False, True),
        (f"products/{PRODUCT_ID}", USER_KEY, "2022-05-01", False, False),  # a key of another kind
        ("userid/511932", ACCESS_KEY, "2022-05-01", False, False),
        ("products/1", ACCESS_KEY, "2022-05-01", False, False),
    ],
)
def test_version_resource_and_key_of_a_token_fit_together(
    v1: SimulatorClient, v2: SimulatorClient, resource: str, key: str, version: str, v1_accepts: bool, v2_accepts: bool
) -> None:
    v1.headers = v2.headers = {"Authorization": token(resource, key, version)}
    assert v1.execute().json()["errno"] == (0 if v1_accepts else 1)
    assert v2.execute().json()["code"] == (0 if v2_accepts else 10403)


def test_the_master_key_is_of_v1_only(v1: SimulatorClient, v2: SimulatorClient) -> None:
    v2.headers = {"api-key": API_KEY}
    assert v1.execute().json()["errno"] == 0
    assert v2.execute().json()["code"] == 10403


WRONG_TOKEN = {"Authorization": "version=2018-10-31&res=products%2F1&et=9999999999&method=md5&sign=eA%3D%3D"}
Call = Callable[[SimulatorClient], Any]
# What is refused, and its answer: by the service, by the API layer, and by v2.
REFUSALS: dict[str, tuple[Call, tuple[int, str], tuple[int, str], int]] = {
    "wrong token": (lambda c: c.execute(headers=WRONG_TOKEN).json(), (1, "auth failed"), (3, "token鉴权失败"), 10403),
    "no credentials": (lambda c: c.execute(headers={}).json(), (1, "auth failed"), (2, "api-key required"), 10403),
    "parameter missing": (
        lambda c: c.execute(obj_id=None).json(),
        (3, "parameter required: obj_id"), (7, "parameter required: obj_id"), 10001,
    ),
    "parameter out of range": (
        lambda c: c.execute(retry=11).json(),
        (5108, "invalid parameter: retry"), (6, "invalid parameter: retry"), 10001,
    ),
    "valid_time in the past": (
        lambda c: c.execute(valid_time=at(-60)).json(), (5006, "system logic limit:"), (6, "invalid parameter:"), 10001,
    ),
    "no body": (lambda c: c.execute(b"").json(), (3, "parameter required:"), (9, "entity data required:"), 10001),
    "no JSON": (
        lambda c: c.execute(b"{", headers=c.headers | {"Content-Type": "application/json"}).json(),
        (3, "parameter required:"), (4, "invalid JSON:"), 10001,
    ),
    "no content type": (
        lambda c: c.execute(b"{}").json(),
        (3, "parameter required: Content-Type"), (4, "invalid JSON: Content-"), 10001,
    ),
    "body too large": (
        lambda c: c.execute({"args": "x" * 2049}).json(),
        (5006, "system logic limit:"), (5, "request entity too large:"), 10001,
    ),
    "device not online": (
        lambda c: c.execute(imei=OFFLINE_IMEI).json(), (2001, "device not online"), (10, "device not online"), 10421,
    ),
    "no such command": (lambda c: c.detail("x"), (5108, "invalid parameter:"), (8, "not found:"), 10407),
    "not cancellable": (lambda c: c.cancel(c.cached()), (5006, "system logic limit:"), (16, "unsuccess:"), 10407),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
@pytest.mark.parametrize("table", ["service", "api"])
def test_every_refusal_is_answered_from_the_chosen_table(
    v1: SimulatorClient, name: str, table: Literal["service", "api"]
) -> None:
    call, service, api, _ = REFUSALS[name]
    v1.simulator.platform.errors = table
    errno, text = service if table == "service" else api
    answer = call(v1)
    assert answer["errno"] == errno
    assert answer["error"].startswith(text)


@pytest.mark.parametrize("name", REFUSALS)
def test_every_refusal_of_v2_has_a_code_of_v2(v2: SimulatorClient, name: str) -> None:
    call, _, _, code = REFUSALS[name]
    assert call(v2)["code"] == code


@pytest.mark.parametrize(
    ("table", "chosen", "errno", "text"),
    [
        ("service", None, 5006, "system logic limit"),
        ("api", None, 13, "system limit"),
        ("service", 13, 13, "system limit"),
        ("api", 5006, 5006, "system logic limit"),
    ],
)
def test_the_eleventh_waiting_command_of_a_device_is_refused(
    v1: SimulatorClient, table: Literal["service", "api"], chosen: int | None, errno: int, text: str
) -> None:
    """The errno is not documented; the older commands stay."""
    platform = v1.simulator.platform
    platform.queue_limit, platform.errors, platform.queue_errno = 10, table, chosen
    uuids = [v1.cached() for _ in range(10)]
    answer = v1.execute().json()
    assert answer["errno"] == errno
    assert answer["error"].startswith(text)
    assert [item["cmd_uuid"].strip() for item in v1.history(sort="ASC")["data"]["items"]] == uuids
    assert v1.execute(imei="865820030000002").json()["errno"] == 0


def test_the_full_queue_of_v2_is_an_operation_that_failed_by_a_limit(v2: SimulatorClient) -> None:
    v2.simulator.platform.queue_limit = 1
    v2.cached()
    answer = v2.execute().json()
    assert (answer["code"], "limit" in answer["msg"]) == (10407, True)


def test_too_many_calls_in_a_second_are_answered_15(v1: SimulatorClient, v2: SimulatorClient) -> None:
    """Reads of the history count too."""
    v1.simulator.platform.rate = 2
    assert [v1.execute().json()["errno"], v1.history()["errno"]] == [0, 0]
    throttled = v1.history()
    assert throttled == {"errno": 15, "error": "api freq out of limit"}
    assert "freq out of limit" in v2.execute().json()["msg"]


def test_every_answer_has_the_date_of_the_platform(v1: SimulatorClient) -> None:
    v1.control("clock", {"offset_s": 3600})
    for answer in (v1.execute(), v1.control("clock"), requests.get(f"{v1.simulator.url}/none", timeout=PATIENCE_S)):
        ahead = parsedate_to_datetime(answer.headers["Date"]) - v1.simulator.platform.now()
        assert 3590 < ahead.total_seconds() < 3610
    assert v1.execute(valid_time=at(1800)).json()["errno"] == 5006  # has passed on the platform's clock
    assert v1.control("clock", {"offset": 1}).status_code == 422


def test_a_command_is_created_at_the_time_of_the_platform(v1: SimulatorClient) -> None:
    v1.simulator.platform.clock_offset_s = -3600
    v1.cached()
    assert v1.history(start=at(-3660))["data"]["total_count"] == 1
    assert v1.history(start=at(-60))["data"]["total_count"] == 0


def test_a_retry_after_can_be_a_date_on_the_clock_of_the_platform(v1: SimulatorClient) -> None:
    v1.simulator.platform.clock_offset_s = 8 * 3600
    v1.simulator.faults.replace([Fault(kind="too_many_requests_date", seconds=5)])
    answer = v1.execute()
    wait = parsedate_to_datetime(answer.headers["Retry-After"]) - parsedate_to_datetime(answer.headers["Date"])
    assert answer.status_code == 429
    assert 4 <= wait.total_seconds() <= 6


def test_a_missing_body_is_accepted_if_configured(v1: SimulatorClient) -> None:
    """The page calls the body optional; an errno is documented for its absence."""
    v1.simulator.platform.needs_body = False
    try:
        assert v1.execute(b"").json()["errno"] == 0
        assert v1.execute(b"{}").json()["errno"] == 3  # without a content type
    finally:
        v1.simulator.platform.needs_body = True


def test_a_content_type_may_have_a_charset(v1: SimulatorClient) -> None:
    headers = v1.headers | {"Content-Type": "application/json; charset=utf-8"}
    assert v1.execute(b'{"args":"on"}', headers=headers).json()["errno"] == 0


def test_a_test_device_has_four_digits(v1: SimulatorClient) -> None:
    assert v1.execute(imei="0001").json()["errno"] == 0


def test_parameters_that_are_not_documented_are_ignored(v1: SimulatorClient) -> None:
    """A public client sends ``mode`` with Execute."""
    assert v1.execute(mode="1").json()["errno"] == 0


def test_the_command_line_has_the_limits_of_the_platform() -> None:
    platform = Platform("key")
    assert (platform.queue_limit, platform.rate, platform.needs_body) == (10, 300, True)
    assert (V1.prefix, V2.prefix, IMEI[0]) == ("/nbiot", "/nb-iot", "8")
