"""The OneNET client on real sockets: the lease, valid_time, and check."""

import json
import socket
import time

import pytest

from tests.support.builders import in_hours
from tests.support.onenet_client import (
    NEVER,
    command,
    onenet_client,
    read_request,
)
from tests.support.proxies import raw_server
from tests.support.simulator import onenet
from worker.core.answer import Cached, InDoubt, NotSent
from worker.errors import PlatformUnusable


def _never_answer(sock: socket.socket) -> None:
    read_request(sock)
    sock.recv(1)  # returns when the client closes the connection


async def test_nothing_is_sent_after_the_lease_has_ended() -> None:
    with onenet() as simulator, onenet_client(simulator.url) as client:
        assert isinstance((await client.execute(command(), time.monotonic() - 1)).answer, NotSent)
        assert not simulator.requests


async def test_nothing_is_sent_over_a_reused_connection_after_the_lease_has_ended() -> None:
    with onenet() as simulator, onenet_client(simulator.url) as client:
        assert isinstance((await client.execute(command(), NEVER)).answer, Cached)
        assert isinstance((await client.execute(command(), time.monotonic() - 1)).answer, NotSent)


async def test_a_request_is_cut_when_the_lease_ends() -> None:
    with raw_server(_never_answer) as url, onenet_client(url, connect_s=60, read_s=60) as client:
        began = time.monotonic()
        assert isinstance((await client.execute(command(), began + 0.3)).answer, InDoubt)
        assert time.monotonic() - began < 30


@pytest.mark.parametrize(("hours", "is_omitted"), [(-1, True), (1, False)])
async def test_a_valid_time_in_the_past_is_omitted_and_reported(hours: float, is_omitted: bool) -> None:
    """The platform refuses a valid_time in the past; without one it takes the current time."""
    with onenet() as simulator, onenet_client(simulator.url) as client:
        sent = await client.execute(command(valid_time=in_hours(hours)), NEVER)
        assert isinstance(sent.answer, Cached)
        assert sent.valid_time_omitted == is_omitted
        assert ("valid_time" in simulator.requests[0]["query"]) != is_omitted


NO_DEVICE = "000000000000000"


async def test_check_reads_a_history_and_caches_nothing() -> None:
    with onenet() as simulator, onenet_client(simulator.url) as client:
        assert (await client.check(None, NO_DEVICE)).startswith(simulator.url)
        assert simulator.platform.commands == []


@pytest.mark.parametrize(
    ("response", "words"),
    [
        (b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n", "refuses the credentials"),
        (b'HTTP/1.1 200 OK\r\nContent-Length: 12\r\n\r\n{"errno": 1}', "refuses the credentials"),
        (b'HTTP/1.1 200 OK\r\nContent-Length: 12\r\n\r\n{"errno": 7}', "is down"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", "not as OneNET does"),
        (b"HTTP/1.1 302 Found\r\nLocation: /\r\nContent-Length: 0\r\n\r\n", "not as OneNET does"),
        (b"", "cannot be reached"),
    ],
)
async def test_check_names_the_fault_of_the_platform(response: bytes, words: str) -> None:
    def serve(sock: socket.socket) -> None:
        sock.recv(65536)
        sock.sendall(response)

    with raw_server(serve) as url, onenet_client(url) as client, pytest.raises(PlatformUnusable, match=words):
        await client.check(None, NO_DEVICE)


@pytest.mark.parametrize(
    ("errno", "error", "words"),
    [
        (3, "token鉴权失败", ["refuses the credentials", "--imei", NO_DEVICE]),
        (2, "api-key required", ["refuses the credentials"]),
        (3, "auth failed", ["refuses the credentials", "--imei"]),
        (15, "api freq out of limit", ["too many requests"]),
        (1, "internal server error", ["is down"]),
        (17, "nbiot server error", ["is down"]),
        (14, "network latency", ["trouble with device", NO_DEVICE]),
        (8, "not found", ["does not find device", "--imei", NO_DEVICE]),
        (2001, "device not online", ["--imei", NO_DEVICE]),
        (7, "parameter required", ["refuses the request"]),
        (13, "system limit", ["limit"]),
        (4242, "unheard\nof", ["unknown error", "errno 4242: unheard of"]),
    ],
)
@pytest.mark.parametrize("status", ["200 OK", "400 Bad Request"])
async def test_check_succeeds_only_for_errno_0(errno: int, error: str, words: list[str], status: str) -> None:
    """Every other errno fails, in one line with the kind of error and the platform's own text."""
    body = json.dumps({"errno": errno, "error": error}).encode()

    def serve(sock: socket.socket) -> None:
        sock.recv(65536)
        sock.sendall(b"HTTP/1.1 %b\r\nContent-Length: %d\r\n\r\n%b" % (status.encode(), len(body), body))

    with raw_server(serve) as url, onenet_client(url) as client, pytest.raises(PlatformUnusable) as found:
        await client.check(None, NO_DEVICE)
    for word in [*words, f"errno {errno}", " ".join(error.split())]:
        assert word in str(found.value)
    assert len(str(found.value).splitlines()) == 1


def _swallow(sock: socket.socket) -> None:
    while sock.recv(65536):
        pass


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_check_of_a_platform_that_never_answers_times_out(scheme: str) -> None:
    swallowing = raw_server(_swallow)
    with (
        swallowing as url,
        onenet_client(url.replace("http", scheme), 0.2, 0.2) as client,
        pytest.raises(PlatformUnusable),
    ):
        await client.check(None, NO_DEVICE)
