"""The HTTP server for probes and metrics, asked by a real client."""

from collections.abc import Iterator
from unittest.mock import create_autospec

import pytest
import requests

from tests.support.waiting import PATIENCE_S
from worker.dev.services.ports import free_port
from worker.telemetry.health import Health, ProbeResult
from worker.telemetry.http_server import HealthServer
from worker.telemetry.metrics import Metrics

CONCURRENCY = "onenet_worker_concurrency"


@pytest.fixture
def url() -> Iterator[str]:
    health = create_autospec(Health, instance=True)
    health.liveness.return_value = ProbeResult(ok=True, details={"live": True})
    health.readiness.return_value = ProbeResult(ok=False, details={"ready": False})
    port = free_port()
    server = HealthServer("127.0.0.1", port, health, Metrics("a-worker", 7))
    yield f"http://127.0.0.1:{port}"
    server.close()


def get(url: str, accept: str = "*/*", encoding: str = "identity") -> requests.Response:
    return requests.get(url, headers={"Accept": accept, "Accept-Encoding": encoding}, timeout=PATIENCE_S)


def test_the_status_of_a_probe_is_200_or_503_and_its_body_is_json(url: str) -> None:
    live, ready = get(f"{url}/livez"), get(f"{url}/readyz?verbose")
    assert (live.status_code, live.json(), live.headers["Content-Type"]) == (200, {"live": True}, "application/json")
    assert (ready.status_code, ready.json()) == (503, {"ready": False})


def test_metrics_are_served_in_the_text_format_by_default(url: str) -> None:
    page = get(f"{url}/metrics")
    assert (page.status_code, page.headers["Content-Type"].partition(";")[0]) == (200, "text/plain")
    assert f"{CONCURRENCY} 7.0\n" in page.text


def test_metrics_are_served_as_openmetrics_if_the_client_accepts_it(url: str) -> None:
    page = get(f"{url}/metrics", accept="application/openmetrics-text; version=1.0.0,text/plain;q=0.5")
    assert page.headers["Content-Type"].partition(";")[0] == "application/openmetrics-text"
    assert page.text.endswith("# EOF\n")


def test_metrics_are_compressed_if_the_client_accepts_gzip(url: str) -> None:
    assert "Content-Encoding" not in get(f"{url}/metrics").headers
    page = get(f"{url}/metrics", encoding="gzip")
    assert page.headers["Content-Encoding"] == "gzip"
    assert f"{CONCURRENCY} 7.0\n" in page.text


def test_the_parameter_name_selects_metrics(url: str) -> None:
    lines = get(f"{url}/metrics?name[]={CONCURRENCY}").text.splitlines()
    assert [line for line in lines if not line.startswith("#")] == [f"{CONCURRENCY} 7.0"]


@pytest.mark.parametrize(("path", "status"), [("/livez", 200), ("/readyz", 503), ("/metrics", 200), ("/", 404)])
def test_head_returns_the_status_without_a_body(url: str, path: str, status: int) -> None:
    answer = requests.head(url + path, timeout=PATIENCE_S)
    assert (answer.status_code, answer.content) == (status, b"")


def test_an_unknown_path_is_answered_with_the_known_ones(url: str) -> None:
    page = get(f"{url}/health")
    assert (page.status_code, page.text) == (404, "there are /livez, /readyz, /metrics\n")
