"""A client of the simulator, as plain as the documented requests."""

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import requests

from tests.support.simulator import API_KEY
from tests.support.waiting import PATIENCE_S
from worker.simulator.server import Simulator

IMEI = "865820030000001"
CHINA_S = 8 * 3600


def at(seconds: float) -> str:
    """Return the time in a number of seconds, in the platform's time zone."""
    return (datetime.now(UTC) + timedelta(seconds=CHINA_S + seconds)).strftime("%Y-%m-%dT%H:%M:%S")


@dataclass
class SimulatorClient:
    """Calls of one generation of the platform; parameters of the value None are left out."""

    simulator: Simulator
    prefix: str = "/nbiot"
    headers: dict[str, str] = field(default_factory=lambda: {"api-key": API_KEY})

    def execute(self, body: Any = None, headers: dict[str, str] | None = None, **changes: Any) -> requests.Response:
        """Cache a command; without a body that of a command without args."""
        query: dict[str, Any] = {"imei": IMEI, "obj_id": 1, "obj_inst_id": 2, "res_id": 3, "expired_time": at(3600)}
        given: dict[str, Any] = {"data": body} if isinstance(body, bytes) else {"json": {} if body is None else body}
        url = f"{self.simulator.url}{self.prefix}/execute/offline"
        sent = self.headers if headers is None else headers
        return requests.post(url, params=query | changes, headers=sent, timeout=PATIENCE_S, **given)

    def cached(self, **changes: Any) -> str:
        """Cache a command; returns its uuid."""
        return str(self.execute({"args": "on"}, **changes).json()["data"]["uuid"])

    def history(self, **query: Any) -> Any:
        return self.call("GET", "history", {"start": at(-60)} | query)

    def detail(self, uuid: str, **query: Any) -> Any:
        return self.call("GET", f"history/{uuid}", query)

    def log(self, uuid: str) -> Any:
        return self.call("GET", f"history/{uuid}/piecewise", {})

    def cancel(self, uuid: str) -> Any:
        return self.call("PUT", f"cancel/{uuid}", {})

    def control(self, name: str, body: Any = None) -> requests.Response:
        method = "GET" if body is None else "PUT"
        return requests.request(method, f"{self.simulator.url}/control/{name}", json=body, timeout=PATIENCE_S)

    def call(self, method: str, path: str, query: dict[str, Any]) -> Any:
        url = f"{self.simulator.url}{self.prefix}/offline/{path}"
        return requests.request(
            method, url, params={"imei": IMEI} | query, headers=self.headers, timeout=PATIENCE_S
        ).json()
