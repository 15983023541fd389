"""The simulator over HTTP: it follows the platform's documented rules, and fails as configured."""

import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, get_args

import pytest
import requests

from tests.support.builders import fields_of
from tests.support.simulator import ACCESS_KEY, API_KEY, OFFLINE_IMEI, PRODUCT_ID, onenet
from tests.support.waiting import PATIENCE_S
from worker.cli.simulator import simulator
from worker.core.credentials import AccessKey
from worker.dev.services.ports import wait_until
from worker.onenet.authentication import sign
from worker.simulator.faults import Fault, Kind
from worker.simulator.server import Simulator

KEY = {"api-key": API_KEY}
CHINA_S = 8 * 3600


@pytest.fixture(scope="module")
def shared() -> Iterator[Simulator]:
    with onenet() as simulator:
        yield simulator


@pytest.fixture
def platform(shared: Simulator) -> Iterator[Simulator]:
    yield shared
    shared.faults.replace([])
    shared.platform.clear()


def at(seconds: float) -> str:
    """Return the time in a number of seconds, in the platform's time zone."""
    return (datetime.now(UTC) + timedelta(seconds=CHINA_S + seconds)).strftime("%Y-%m-%dT%H:%M:%S")


def execute(
    platform: Simulator, body: Any = None, headers: dict[str, str] | None = None, **changes: Any
) -> requests.Response:
    query = {"imei": "865820030000001", "obj_id": 1, "obj_inst_id": 2, "res_id": 3, "expired_time": at(3600)}
    url = f"{platform.url}/nbiot/execute/offline"
    return requests.post(
        url, params={**query, **changes}, json={} if body is None else body, headers=headers or KEY, timeout=PATIENCE_S
    )


def test_a_command_is_cached_under_a_new_uuid(platform: Simulator) -> None:
    first, second = (execute(platform, {"args": "ping"}, retry=0, timeout=5, trigger_msg=7).json() for _ in range(2))
    assert first == {"errno": 0, "error": "succ", "data": {"uuid": first["data"]["uuid"]}}
    assert [command.uuid for command in platform.platform.commands] == [first["data"]["uuid"], second["data"]["uuid"]]
    assert first != second  # the same request twice is two commands
    assert platform.platform.commands[0].args == "ping"


@pytest.mark.parametrize(
    ("changes", "errno"),
    [
        *(({name: None}, 3) for name in ("imei", "obj_id", "obj_inst_id", "res_id", "expired_time")),
        ({"imei": "1"}, 5108), ({"imei": "065820030000001"}, 5108), ({"imei": "12345"}, 5108),
        ({"obj_id": 65536}, 5108), ({"res_id": "x"}, 5108), ({"retry": 11}, 5108),
        ({"timeout": 4}, 5108), ({"timeout": 41}, 5108), ({"trigger_msg": 0}, 5108), ({"trigger_msg": 8}, 5108),
        ({"expired_time": "2099-01-01 00:00:00"}, 5108), ({"expired_time": "2099-02-30T00:00:00"}, 5108),
        ({"expired_time": "2099-01-01T00:00:00Z"}, 5108), ({"valid_time": "soon"}, 5108),
        ({"expired_time": at(-60)}, 5006), ({"valid_time": at(-60)}, 5006),
        ({"valid_time": at(600), "expired_time": at(600)}, 5006), ({"imei": OFFLINE_IMEI}, 2001),
    ],
    ids=fields_of,
)  # fmt: skip
def test_each_invalid_parameter_has_its_errno(platform: Simulator, changes: dict[str, Any], errno: int) -> None:
    assert execute(platform, **changes).json()["errno"] == errno
    assert not platform.platform.commands


@pytest.mark.parametrize("body", [{"args": 1}, [], {"args": "x" * 2049}])
def test_a_body_that_breaks_a_rule_is_refused(platform: Simulator, body: Any) -> None:
    assert execute(platform, body).json()["errno"] in {3, 5006}


def test_only_the_api_key_or_a_token_signed_with_the_access_key_is_accepted(platform: Simulator) -> None:
    good = AccessKey.model_validate({"product_id": PRODUCT_ID, "access_key": ACCESS_KEY})
    other = AccessKey.model_validate({"product_id": PRODUCT_ID, "access_key": "b3RoZXI="})
    later, earlier = int(datetime.now(UTC).timestamp()) + 60, int(datetime.now(UTC).timestamp()) - 60
    for headers, errno in (
        ({"api-key": API_KEY}, 0),
        ({"api-key": "other"}, 1),
        ({"x": "y"}, 1),
        ({"Authorization": sign(good, later, "2018-10-31")}, 0),
        ({"Authorization": sign(good, earlier, "2018-10-31")}, 1),
        ({"Authorization": sign(other, later, "2018-10-31")}, 1),
        ({"Authorization": "nonsense"}, 1),
    ):
        assert execute(platform, headers=headers).json()["errno"] == errno, headers


@pytest.mark.parametrize(
    ("fault", "status", "text", "cached"),
    [
        (Fault(kind="error_500"), 500, "upstream failed", 0),
        (Fault(kind="error_500_after_caching"), 500, "upstream failed", 1),
        (Fault(kind="error_503"), 503, "upstream failed", 0),
        (Fault(kind="too_many_requests", seconds=3), 429, "", 0),
        (Fault(kind="errno", errno=5117, error="rpc error"), 200, '{"errno":5117,"error":"rpc error"}', 0),
        (Fault(kind="errno_in_chinese"), 200, '{"errno":7,"error":"服务内部错误"}', 0),
        (Fault(kind="errno_after_caching"), 200, '{"errno":7,"error":"service internal error"}', 1),
        (Fault(kind="garbage"), 200, "\0<html>not the platform", 0),
        (Fault(kind="no_uuid"), 200, '{"errno":0,"error":"succ"}', 1),
        (Fault(kind="not_found"), 404, "no such page", 0),
        (Fault(kind="hang", seconds=0), 504, "", 0),
    ],
    ids=lambda value: value.kind if isinstance(value, Fault) else "",
)
def test_each_fault_has_its_documented_effect(
    platform: Simulator, fault: Fault, status: int, text: str, cached: int
) -> None:
    platform.faults.replace([fault])
    answer = execute(platform)
    assert (answer.status_code, answer.text, len(platform.platform.commands)) == (status, text, cached)


@pytest.mark.parametrize(("kind", "cached"), [("drop", 0), ("drop_after_caching", 1)])
def test_a_request_can_be_dropped_before_or_after_caching(platform: Simulator, kind: Any, cached: int) -> None:
    platform.faults.replace([Fault(kind=kind)])
    with pytest.raises(requests.ConnectionError):
        execute(platform)
    assert len(platform.platform.commands) == cached


@pytest.mark.parametrize("kind", ["drop_after_caching", "errno_after_caching", "no_uuid"])
def test_a_refused_request_is_answered_whatever_should_happen_after_caching(platform: Simulator, kind: Any) -> None:
    platform.faults.replace([Fault(kind=kind)])
    assert execute(platform, obj_id="x").json()["errno"] == 5108


def test_the_simulator_can_refuse_connections_for_some_time() -> None:
    with onenet(Fault(kind="refuse", seconds=0.2, count=1)) as platform:
        assert execute(platform).json()["errno"] == 0
        refused = 0
        while True:
            try:
                execute(platform)
            except requests.ConnectionError:
                refused += 1
            else:
                if refused:
                    break
        assert refused


def test_faults_can_be_replaced_while_the_simulator_runs(platform: Simulator) -> None:
    control = f"{platform.url}/control/faults"
    wanted = [{"kind": "error_500", "imei": "865820030000002", "count": 1}]
    assert requests.put(control, json=wanted, timeout=PATIENCE_S).json()[0]["kind"] == "error_500"
    assert execute(platform).status_code == 200
    assert execute(platform, imei="865820030000002").status_code == 500
    assert execute(platform, imei="865820030000002").status_code == 200
    assert requests.get(control, timeout=PATIENCE_S).json() == []
    assert requests.put(control, json=[{"kind": "nonsense"}], timeout=PATIENCE_S).status_code == 422


def test_the_control_endpoints_list_cached_commands_and_requests(platform: Simulator) -> None:
    execute(platform, {"args": "on"})
    [command] = requests.get(f"{platform.url}/control/commands", timeout=PATIENCE_S).json()
    assert (command["args"], command["query"]["obj_inst_id"]) == ("on", "2")
    asked = requests.get(f"{platform.url}/control/requests", timeout=PATIENCE_S).json()
    assert asked[-1]["headers"]["api-key"] == API_KEY


@pytest.mark.parametrize(
    ("text", "probability", "seconds"), [("hang", 1, 1), ("hang=0.5", 0.5, 1), ("hang=0.5,30", 0.5, 30)]
)
def test_a_fault_is_parsed_from_the_syntax_of_the_command_line(text: str, probability: float, seconds: float) -> None:
    fault = Fault.model_validate(text)
    assert (fault.kind, fault.probability, fault.seconds) == ("hang", probability, seconds)


def history(platform: Simulator, **query: Any) -> Any:
    wanted = {"imei": "865820030000001", "start": at(-60)} | query
    return requests.get(f"{platform.url}/nbiot/offline/history", params=wanted, headers=KEY, timeout=PATIENCE_S).json()


def test_the_history_lists_the_commands_of_a_device_page_by_page(platform: Simulator) -> None:
    uuids = [execute(platform).json()["data"]["uuid"] for _ in range(5)]
    execute(platform, imei="865820030000002")
    pages = [history(platform, sort="ASC", per_page=2, page=page)["data"] for page in (1, 2, 3, 4)]
    assert [page["total_count"] for page in pages] == [5] * 4
    assert [item["cmd_uuid"].strip() for page in pages for item in page["items"]] == uuids
    assert [item["cmd_uuid"].strip() for item in history(platform)["data"]["items"]] == uuids[::-1]
    assert history(platform, start=at(60))["data"]["total_count"] == 0
    assert history(platform, end=at(-30))["data"]["total_count"] == 0
    assert history(platform, start=None)["errno"] == 3


def test_the_history_has_the_documented_deviations(platform: Simulator) -> None:
    for _ in range(4):
        execute(platform)
    items = history(platform)["data"]["items"]
    assert all(" " in item["create_time"] and " " in item["expired_time"] for item in items)
    assert {item["create_time"].count(":") for item in items} == {2, 3}  # milliseconds follow a third colon
    assert {type(item["remain"]) for item in items} == {int, str}
    assert {item["cmd_uuid"].endswith(" ") for item in items} == {True, False}


def test_the_detail_of_a_command_contains_its_original_fields(platform: Simulator) -> None:
    [uuid, other] = [execute(platform, {"args": "ping"}, retry=0).json()["data"]["uuid"] for _ in range(2)]
    if platform.platform.commands[0].number % 2:
        uuid, other = other, uuid
    url = f"{platform.url}/nbiot/offline/history/{uuid}"
    found = requests.get(url, params={"imei": "865820030000001"}, headers=KEY, timeout=PATIENCE_S).json()["data"]
    assert found["content"] == {"args": "ping"}
    assert (found["args"]["obj_id"], found["args"]["retry"]) == ("1", "0")
    assert "timeout" not in found["args"]
    assert requests.get(url, params={"imei": "865820030000002"}, headers=KEY, timeout=PATIENCE_S).json()["errno"] != 0
    url = f"{platform.url}/nbiot/offline/history/{other}"
    found = requests.get(url, params={"imei": "865820030000001"}, headers=KEY, timeout=PATIENCE_S).json()["data"]
    assert (found["args"]["obj_id"], found["args"]["retry"], found["args"]["timeout"]) == (1, 0, 25)  # filled in


def test_a_waiting_command_can_be_cancelled_until_its_valid_time(platform: Simulator) -> None:
    waiting = execute(platform, valid_time=at(600)).json()["data"]["uuid"]
    valid = execute(platform).json()["data"]["uuid"]
    answers = [
        requests.put(
            f"{platform.url}/nbiot/offline/cancel/{uuid}",
            params={"imei": "865820030000001"},
            headers=KEY,
            timeout=PATIENCE_S,
        ).json()["errno"]
        for uuid in (waiting, waiting, valid)
    ]
    assert answers == [0, 5006, 5006]
    assert [item["send_status"] for item in history(platform)["data"]["items"]] == [1, 2]


def test_a_fault_affects_only_its_endpoint(platform: Simulator) -> None:
    platform.faults.replace([Fault(kind="errno", errno=7, endpoint="history")])
    assert execute(platform).json()["errno"] == 0
    assert history(platform)["errno"] == 7


def test_page_number_and_page_size_of_the_history_are_bounded(platform: Simulator) -> None:
    for _ in range(101):
        execute(platform)
    assert len(history(platform)["data"]["items"]) == 30
    assert len(history(platform, per_page=100)["data"]["items"]) == 100
    long_ago = at(-181 * 24 * 3600)
    for changes in (
        *({"page": 0}, {"per_page": "many"}, {"per_page": 101}, {"start": "2026-01-01 00:00:00"}, {"end": "soon"}),
        *({"sort": "UP"}, {"start": long_ago}),
    ):
        assert history(platform, **changes)["errno"] == 5108, changes
    assert history(platform, imei=None)["errno"] == 3


def test_the_history_requires_credentials(platform: Simulator) -> None:
    url = f"{platform.url}/nbiot/offline/history"
    query = {"imei": "865820030000001", "start": at(-60)}
    for path in (url, f"{url}/{execute(platform).json()['data']['uuid']}"):
        assert requests.get(path, params=query, headers={"api-key": "other"}, timeout=PATIENCE_S).json()["errno"] == 1


def test_the_detail_of_a_command_without_args_has_an_empty_content(platform: Simulator) -> None:
    uuid = execute(platform, valid_time=at(600)).json()["data"]["uuid"]
    url = f"{platform.url}/nbiot/offline/history/{uuid} "  # as some are listed
    found = requests.get(url, params={"imei": "865820030000001"}, headers=KEY, timeout=PATIENCE_S).json()["data"]
    assert found["content"] in ({}, None)
    given = {"imei", "obj_id", "obj_inst_id", "res_id", "expired_time", "valid_time"}
    assert set(found["args"]) - {"retry", "timeout"} == given


def test_a_command_can_be_cached_late_after_the_client_disconnected(platform: Simulator) -> None:
    """The platform may cache a request that it received completely before the connection was lost."""
    platform.faults.replace([Fault(kind="late_caching", seconds=1, count=1)])
    url = f"{platform.url}/nbiot/execute/offline"
    query = {"imei": "865820030000001", "obj_id": "1", "obj_inst_id": "2", "res_id": "3", "expired_time": at(3600)}
    with pytest.raises(requests.Timeout):
        requests.post(url, params=query, json={}, headers=KEY, timeout=(10, 0.1))
    wait_until(lambda: bool(platform.platform.commands), 10, "the command")
    assert history(platform)["data"]["total_count"] == 1


def test_a_fault_of_the_history_affects_details_but_no_other_endpoint(platform: Simulator) -> None:
    uuid = execute(platform, valid_time=at(600)).json()["data"]["uuid"]
    query = {"imei": "865820030000001"}
    platform.faults.replace([Fault(kind="error_500", endpoint="history")])
    detail = f"{platform.url}/nbiot/offline/history/{uuid}"
    assert requests.get(detail, params=query, headers=KEY, timeout=PATIENCE_S).status_code == 500
    cancel = f"{platform.url}/nbiot/offline/cancel/{uuid}"
    assert requests.put(cancel, params=query, headers=KEY, timeout=PATIENCE_S).json()["errno"] == 0
    platform.faults.replace([Fault(kind="error_500")])
    assert history(platform)["errno"] == 0


def test_the_help_of_the_command_simulator_names_every_kind_of_fault() -> None:
    [named] = re.findall(r"Kinds: ([a-z0-9_, ]+)\.", str(simulator.__annotations__["fault"].__metadata__[0].help))
    assert tuple(named.split(", ")) == get_args(Kind)
