"""The HTTP server for probes and metrics, asked by a real client."""

import random
import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from threading import Event
from typing import Any
from unittest.mock import create_autospec
from urllib.parse import urlsplit

import pytest
import requests
from prometheus_client import Metric
from prometheus_client.registry import Collector
from structlog.testing import capture_logs

from tests.support.waiting import PATIENCE_S
from worker.dev.services.ports import free_port, wait_until
from worker.telemetry import http_server
from worker.telemetry.health import Health, ProbeResult
from worker.telemetry.http_server import MAX_CONNECTIONS, MAX_HEAD_BYTES, HealthServer
from worker.telemetry.metrics import Metrics

CONCURRENCY = "onenet_worker_concurrency"


@pytest.fixture
def health() -> Any:
    found = create_autospec(Health, instance=True)
    found.liveness.return_value = ProbeResult(ok=True, details={"live": True})
    found.readiness.return_value = ProbeResult(ok=False, details={"ready": False})
    return found


@pytest.fixture
def url(health: Any) -> Iterator[str]:
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


def connect(url: str) -> socket.socket:
    return socket.create_connection(("127.0.0.1", urlsplit(url).port or 0), timeout=PATIENCE_S)


def open_files() -> int:
    return len([*Path("/proc/self/fd").iterdir()])


def is_open(client: socket.socket) -> bool:
    """Tell whether the server has not closed a connection; reads nothing of an answer."""
    client.setblocking(False)
    try:
        return client.recv(1, socket.MSG_PEEK) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False


def answer(url: str, request: bytes) -> bytes:
    """Send bytes on a connection of their own, and return all that comes back."""
    found = b""
    with connect(url) as client:
        try:
            client.sendall(request)
            while data := client.recv(65536):
                found += data
        except ConnectionError:
            pass  # closed with bytes unread
    return found


UNFINISHED = {
    "nothing": b"",
    "half a request line": b"GET /livez HT",
    "half a header": b"GET /livez HTTP/1.1\r\nHost: ",
    "endless headers": b"GET /livez HTTP/1.1\r\n" + b"A: b\r\n" * 1000,
    "an endless request line": b"GET /" + b"a" * 7000,
}


@pytest.mark.parametrize("sent", UNFINISHED.values(), ids=UNFINISHED.keys())
def test_a_thousand_unfinished_requests_take_few_connections_and_no_answer_from_others(url: str, sent: bytes) -> None:
    with ExitStack() as stack:
        clients = []
        for _ in range(1000):
            clients.append(stack.enter_context(connect(url)))
            clients[-1].sendall(sent)
        for path, status in (("/livez", 200), ("/readyz", 503), ("/metrics", 200)):
            assert get(url + path).status_code == status
        wait_until(lambda: sum(map(is_open, clients)) <= MAX_CONNECTIONS, PATIENCE_S, "the end of the oldest")


def test_answers_that_nobody_reads_take_no_answer_from_others(url: str, health: Any) -> None:
    health.liveness.return_value = ProbeResult(ok=True, details={"much": "x" * 8_000_000})  # more than a kernel buffers
    with ExitStack() as stack:
        for _ in range(MAX_CONNECTIONS + 10):
            stack.enter_context(connect(url)).sendall(b"GET /livez HTTP/1.1\r\n\r\n")
        assert answer(url, b"GET /readyz HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 503 ")
        assert len(answer(url, b"GET /livez HTTP/1.1\r\n\r\n")) > 8_000_000


def test_a_request_that_drips_ends_at_its_deadline(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "_REQUEST_S", 0.5)
    with connect(url) as client:

        def is_cut() -> bool:
            try:
                client.sendall(b"a")
            except OSError:
                return True
            return not is_open(client)

        wait_until(is_cut, PATIENCE_S, "the end of the connection")


def test_an_answer_that_is_not_read_ends_at_the_deadline_of_its_request(
    url: str, health: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "_REQUEST_S", 0.5)
    health.liveness.return_value = ProbeResult(ok=True, details={"much": "x" * 20_000_000})
    before = open_files()
    with connect(url) as client:
        client.sendall(b"GET /livez HTTP/1.1\r\n\r\n")
        assert client.recv(1) == b"H"
        wait_until(lambda: open_files() <= before + 1, PATIENCE_S, "the end of the connection")


def test_a_client_that_only_closes_its_half_is_closed(url: str) -> None:
    with connect(url) as client:
        client.sendall(b"GET /livez HTTP/1.1\r\n")
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""


def test_a_client_that_closes_its_half_after_its_request_is_answered(url: str) -> None:
    with connect(url) as client:
        client.sendall(b"GET /livez HTTP/1.0\n\n")
        client.shutdown(socket.SHUT_WR)
        assert client.recv(12) == b"HTTP/1.1 200"


def test_readiness_is_computed_once_for_all_that_ask_meanwhile(url: str, health: Any) -> None:
    """A flood of probes must not become a flood of calls to the store."""
    with ExitStack() as stack:
        may_end = Event()
        stack.callback(may_end.set)

        def readiness() -> ProbeResult:
            may_end.wait(PATIENCE_S)
            return ProbeResult(ok=True, details={})

        health.readiness.side_effect = readiness
        clients = [stack.enter_context(connect(url)) for _ in range(MAX_CONNECTIONS // 2)]
        for client in clients:
            client.sendall(b"GET /readyz HTTP/1.1\r\n\r\n")
        assert get(f"{url}/livez").status_code == 200  # accepted after them
        may_end.set()
        assert {client.recv(12) for client in clients} == {b"HTTP/1.1 200"}
        assert health.readiness.call_count <= 2  # a slow machine may read a request after the first was computed


def test_readiness_is_answered_while_metrics_are_computed(health: Any) -> None:
    may_end = Event()

    class Slow(Collector):
        def collect(self) -> list[Metric]:
            may_end.wait(PATIENCE_S)
            return []

    metrics, port = Metrics("a-worker", 7), free_port()
    with ExitStack() as stack:
        server = HealthServer("127.0.0.1", port, health, metrics)
        stack.callback(server.close)
        stack.callback(may_end.set)
        metrics.registry.register(Slow())
        url = f"http://127.0.0.1:{port}"
        for _ in range(5):
            stack.enter_context(connect(url)).sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        assert answer(url, b"GET /readyz HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 503 ")


ODD_REQUESTS = {
    b"GET http://[/livez HTTP/1.1": 400,
    b"GET http://127.0.0.1:9108/livez HTTP/1.1": 200,  # in absolute form, as a proxy may send it
    b"GET http://[::1]/livez?x HTTP/1.0": 200,
    b"GET //livez HTTP/1.1": 404,
    b"GET /../livez HTTP/1.1": 404,
    b"GET /%zz HTTP/1.1": 404,
    b"GET /metrics?name[]=%zz&name[]&=&&& HTTP/1.1": 200,
    b"GET /metrics?" + b"name[]=a&" * 800 + b" HTTP/1.1": 200,
    b"GET /metrics HTTP/1.1\r\nAccept: text/plain;version=abc": 200,
    b"GET /metrics HTTP/1.1\r\nAccept: application/openmetrics-text;version=\xb3": 200,
    b"GET /livez": 400,
    b"GET /livez HTTP/0.9": 400,
    b"GET /livez HTTP/2.0": 400,
    b"GET /livez HTTP/1.1\r\n folded: header": 400,
    b"GET /livez HTTP/1.1\r\nno header": 400,
    b"GET /livez HTTP/1.1\r\nA: \x1b[2J": 400,
    b"GET /li\0vez HTTP/1.1": 400,
    b"GET /livez\xff HTTP/1.1": 400,
    b"GET * HTTP/1.1": 400,
    b"get /livez HTTP/1.1": 400,
    b"POST /livez HTTP/1.1\r\nContent-Length: 9": 405,
    b"\x16\x03\x01\x02": 400,
    b"": 400,
    b"GET /" + b"a" * MAX_HEAD_BYTES: 400,
}


@pytest.mark.parametrize("request_head", ODD_REQUESTS, ids=lambda head: ascii(head[:50]))
def test_an_odd_request_has_one_answer_and_leaves_no_trace(
    url: str, request_head: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    found = answer(url, request_head + b"\r\n\r\n")
    assert found.startswith(f"HTTP/1.1 {ODD_REQUESTS[request_head]} ".encode())
    assert found.count(b"HTTP/1.1") == 1
    assert get(f"{url}/livez").status_code == 200
    assert capfd.readouterr() == ("", "")


def test_no_bytes_end_the_server_or_are_logged(url: str, capfd: pytest.CaptureFixture[str]) -> None:
    draw = random.Random(18)
    for _ in range(500):
        request = bytearray(draw.choice([*ODD_REQUESTS]) + b"\r\n\r\n")
        for _ in range(draw.randint(1, 5)):
            request[draw.randrange(len(request))] = draw.randrange(256)
        with closing(connect(url)) as client:
            client.sendall(request)
    assert get(f"{url}/livez").status_code == 200
    assert capfd.readouterr() == ("", "")


def test_an_error_of_the_worker_is_logged_once_a_minute(url: str, health: Any) -> None:
    health.liveness.side_effect = ZeroDivisionError
    with capture_logs() as events:
        for _ in range(5):
            assert answer(url, b"GET /livez HTTP/1.1\r\n\r\n") == b""
    assert [event["event"] for event in events] == ["http_request_failed"]
