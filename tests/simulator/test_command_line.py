"""The options of ``onenet-worker simulator``."""

from pathlib import Path
from typing import Any

import pytest
import requests

from tests.support.simulator_client import IMEI, at
from tests.support.waiting import PATIENCE_S
from worker.dev.services.ports import free_port
from worker.dev.services.processes import LocalProcess

KEY = {"api-key": "simulator-key"}


def executed(url: str, **changes: Any) -> Any:
    query: dict[str, Any] = {"imei": IMEI, "obj_id": 1, "obj_inst_id": 2, "res_id": 3, "expired_time": at(3600)}
    return requests.post(
        f"{url}/nbiot/execute/offline", params=query | changes, json={}, headers=KEY, timeout=PATIENCE_S
    ).json()


def test_the_simulator_has_the_queue_of_the_platform_by_default(tmp_path: Path) -> None:
    port = free_port()
    simulator = LocalProcess(["simulator", "--port", str(port)], {}, tmp_path / "simulator")
    try:
        simulator.wait_for_port(port)
        url = f"http://127.0.0.1:{port}"
        assert [executed(url)["errno"] for _ in range(11)] == [0] * 10 + [5006]
        assert requests.get(f"{url}/control/devices", timeout=PATIENCE_S).json() == {"*": "down"}
    finally:
        simulator.stop()


def test_its_options_choose_what_it_does(tmp_path: Path) -> None:
    port = free_port()
    arguments = ["--errors", "api", "--queue", "1", "--queue-errno", "5006", "--clock-offset=-60"]
    arguments += ["--devices", "down", "--device", "865820030000002=up:BAD_REQUEST", "--offline", "865820030000003"]
    arguments += ["--body", "optional", "--cancel", "while-waiting", "--rate", "0", "--fault", "type_number=0.5"]
    simulator = LocalProcess(["simulator", "--port", str(port), *arguments], {}, tmp_path / "simulator")
    try:
        simulator.wait_for_port(port)
        url = f"http://127.0.0.1:{port}"
        assert [executed(url)["errno"] for _ in range(2)] == [0, 5006]
        assert executed(url, obj_id=None)["errno"] == 7
        assert executed(url, imei="865820030000003")["errno"] == 10
        assert requests.get(f"{url}/control/clock", timeout=PATIENCE_S).json()["offset_s"] == -60
        devices = {"*": "down", "865820030000002": "up:BAD_REQUEST", "865820030000003": "offline"}
        assert requests.get(f"{url}/control/devices", timeout=PATIENCE_S).json() == devices
        cancelled = requests.put(
            f"{url}/nbiot/offline/cancel/all", params={"imei": IMEI}, headers=KEY, timeout=PATIENCE_S
        )
        assert len(cancelled.json()["data"]["succ"]) == 1
        faults = requests.get(f"{url}/control/faults", timeout=PATIENCE_S).json()
        assert [(fault["kind"], fault["probability"], fault["endpoint"]) for fault in faults] == [
            ("type_number", 0.5, "history")
        ]
    finally:
        simulator.stop()


@pytest.mark.parametrize("option", ["--devices=asleep", f"--device={IMEI}", "--fault=nonsense"])
def test_a_behaviour_or_fault_that_does_not_exist_is_an_error(tmp_path: Path, option: str) -> None:
    simulator = LocalProcess(["simulator", "--port", str(free_port()), option], {}, tmp_path / "simulator")
    assert simulator.wait() != 0
    output = simulator.output.read_text()
    assert option.partition("=")[0] in output
    assert "Traceback" not in output
