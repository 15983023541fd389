"""Each way in which a history can be written, as a fault: what is changed, and that nothing else is."""

from collections.abc import Callable, Iterator
from typing import Any, get_args

import pytest

from tests.support.simulator import onenet
from tests.support.simulator_client import IMEI, SimulatorClient
from worker.simulator.faults import Fault
from worker.simulator.writings import Writing

ARGS = 'say "hi" \U0001f600 '
Seen = dict[str, Any]
Check = Callable[[Seen, Seen], bool]


@pytest.fixture(scope="module")
def client() -> Iterator[SimulatorClient]:
    with onenet() as simulator:
        found = SimulatorClient(simulator)
        for args in (ARGS, ""):
            found.execute({"args": args}, expired_time="2099-01-01T00:00:00", valid_time="2098-01-01T00:00:00")
        yield found


# How the list and the detail of the first command look.
OF_FIRST: dict[Writing, Check] = {
    "ids_decimal": lambda _, detail: detail["args"]["obj_id"] == 1.0 and isinstance(detail["args"]["res_id"], float),
    "ids_text": lambda _, detail: detail["args"]["obj_id"] == "1",
    "ids_number": lambda _, detail: detail["args"]["obj_id"] == 1 and isinstance(detail["args"]["obj_id"], int),
    "defaults_filled": lambda _, detail: (detail["args"]["retry"], detail["args"]["timeout"]) == (3, 25),
    "emoji_as_question_marks": lambda _, detail: detail["content"] == {"args": 'say "hi" ???? '},
    "quotes_escaped": lambda _, detail: detail["content"] == {"args": "say &quot;hi&quot; \U0001f600 "},
    "blank_cut": lambda _, detail: detail["content"] == {"args": ARGS[:-1]},
    "blank_added": lambda _, detail: detail["content"] == {"args": ARGS + " "},
    "seconds_dropped": lambda item, detail: (
        (item["expired_time"], detail["valid_time"]) == ("2099-01-01 00:00", "2098-01-01 00:00")
    ),
    "milliseconds_added": lambda item, detail: (
        item["expired_time"] == detail["expired_time"] == "2099-01-01 00:00:00:000"
    ),
    "times_utc": lambda item, detail: (
        (item["expired_time"], detail["args"]["expired_time"]) == ("2098-12-31 16:00:00", "2098-12-31T16:00:00")
    ),
    "time_placeholder": lambda item, detail: item["create_time"] == detail["create_time"] == "1970-01-01 08:00:00",
    "type_number": lambda item, detail: item["type"] == detail["type"] == 2,
    "content_object": lambda _, detail: detail["content"] == {"args": ARGS},
    "content_empty_object": lambda _, detail: detail["content"] == {},
    "content_text": lambda _, detail: detail["content"] == '{"args": "say \\"hi\\" \U0001f600 "}',
    "content_empty": lambda _, detail: detail["content"] == "",
    "content_null": lambda _, detail: detail["content"] is None,
    "remain_text": lambda item, detail: item["remain"] == detail["remain"] == "3",
    "uuid_blank": lambda item, _: item["cmd_uuid"].endswith(" ") and not item["cmd_uuid"].endswith("  "),
}


@pytest.mark.parametrize("writing", OF_FIRST)
def test_a_writing_changes_how_a_command_looks(client: SimulatorClient, writing: Writing) -> None:
    uuid = client.simulator.platform.commands[0].uuid
    client.simulator.faults.replace([Fault(kind=writing, imei=IMEI)])
    item = client.history(sort="ASC")["data"]["items"][0]
    assert OF_FIRST[writing](item, client.detail(uuid)["data"])


def test_an_empty_text_is_written_as_null(client: SimulatorClient) -> None:
    client.simulator.faults.replace([Fault(kind="empty_as_null")])
    assert client.detail(client.simulator.platform.commands[1].uuid)["data"]["content"] == {"args": None}


def test_the_total_is_called_count(client: SimulatorClient) -> None:
    """As in the documentation of 2018."""
    client.simulator.faults.replace([Fault(kind="count_for_total")])
    data = client.history()["data"]
    assert (data["count"], len(data["items"]), "total_count" in data) == (2, 2, False)


def test_items_are_absent_where_the_total_is_0(client: SimulatorClient) -> None:
    client.simulator.faults.replace([Fault(kind="items_absent")])
    assert client.history(imei="865820030000009")["data"] == {"total_count": 0}
    assert len(client.history()["data"]["items"]) == 2


def test_a_page_has_fewer_entries_than_it_says(client: SimulatorClient) -> None:
    client.simulator.faults.replace([Fault(kind="short_page")])
    data = client.history()["data"]
    assert (data["total_count"], len(data["items"])) == (2, 1)


def test_an_entry_of_the_log_is_itself_a_list(client: SimulatorClient) -> None:
    client.simulator.faults.replace([Fault(kind="nested_log")])
    [[line]] = client.log(client.simulator.platform.commands[0].uuid)["data"]
    assert set(line) == {"log", "time"}


def test_a_writing_can_be_set_by_the_control_path_and_affects_no_execute(client: SimulatorClient) -> None:
    [set_] = client.control("faults", [{"kind": "type_number", "count": 1}]).json()
    assert set_["endpoint"] == "history"
    client.execute(imei="865820030000005")
    assert [client.history()["data"]["items"][0]["type"] for _ in range(2)] == [2, "EXECUTE"]


def test_every_writing_has_a_test() -> None:
    named = {"empty_as_null", "count_for_total", "items_absent", "short_page", "nested_log"}
    assert set(OF_FIRST) | named == set(get_args(Writing))
