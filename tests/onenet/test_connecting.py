"""Connecting has one limit, from the look-up of the name to the end of TLS, for what is sent once and for the reads."""

import asyncio
import os
import resource
import select
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.support.onenet_client import NEVER_S, read_request, use_proxy
from tests.support.proxies import raw_server
from tests.support.waiting import PATIENCE_S, until
from worker.errors import TransportError
from worker.onenet.connecting import MAX_SOCKETS
from worker.onenet.history_reader import HistoryReader
from worker.onenet.response import Response
from worker.onenet.route import MAX_LOOK_UPS, Route
from worker.onenet.transport import HTTPTransport, Request
from worker.telemetry.tracing import NoTracing

HELLO = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
Send = Callable[[Route, float], Awaitable[Response]]


async def post(route: Route, connect_s: float) -> Response:
    transport = HTTPTransport(route, connect_timeout_s=connect_s, read_timeout_s=NEVER_S, tracing=NoTracing())
    try:
        return await transport.send(Request("/nbiot", {"api-key": "S3cret"}), time.monotonic() + NEVER_S)
    finally:
        transport.close()


async def get(route: Route, connect_s: float) -> Response:
    reader = HistoryReader(
        route, connect_timeout_s=connect_s, read_timeout_s=NEVER_S, concurrency=1, tracing=NoTracing()
    )
    try:
        return await reader.get("/nbiot", {"api-key": "S3cret"}, time.monotonic() + NEVER_S)
    finally:
        reader.close()


pytestmark = pytest.mark.parametrize("send", [post, get], ids=["POST", "GET"])


async def assert_too_late(send: Send, route: Route, connect_s: float = 0.5) -> None:
    """Check that the limit for connecting ends it; every other limit is far away."""
    with pytest.raises(TransportError, match="the connection was not made in time") as caught:
        await send(route, connect_s)
    assert not caught.value.may_have_been_sent


def dripping(sock: socket.socket) -> None:
    """Answer the CONNECT, or the handshake, byte by byte."""
    sock.recv(65536)
    with suppress(OSError):
        sock.sendall(b"HTTP/1.1 200 OK\r\nX: ")
        while not select.select([sock], [], [], 0.05)[0]:  # until the client closes the connection
            sock.sendall(b"x")


def silent(sock: socket.socket) -> None:
    while sock.recv(65536):
        pass


def greet(sock: socket.socket) -> None:
    read_request(sock)
    sock.sendall(HELLO)


@pytest.mark.parametrize("serve", [dripping, silent])
async def test_a_proxy_that_does_not_answer_in_time_ends_the_connection(
    send: Send, serve: Callable[[socket.socket], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with raw_server(serve) as proxy:
        use_proxy(monkeypatch, "https", proxy)
        await assert_too_late(send, Route("https://onenet.invalid", None))


async def test_a_tls_handshake_that_does_not_end_in_time_ends_the_connection(send: Send) -> None:
    with raw_server(silent) as url:
        await assert_too_late(send, Route(url.replace("http:", "https:"), None))


async def test_a_tls_handshake_in_a_tunnel_that_does_not_end_in_time_ends_the_connection(
    send: Send, monkeypatch: pytest.MonkeyPatch
) -> None:
    def serve(sock: socket.socket) -> None:
        read_request(sock)
        sock.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        silent(sock)

    with raw_server(serve) as proxy:
        use_proxy(monkeypatch, "https", proxy)
        await assert_too_late(send, Route("https://onenet.invalid", None))


async def test_all_steps_together_have_the_limit_of_one(send: Send, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes two thirds of it: the look-up of the name, and the proxy's answer."""
    look_up = socket.getaddrinfo

    def slow(*arguments: Any, **options: Any) -> Any:
        time.sleep(1)  # a slow name server: what the test is about
        return look_up(*arguments, **options)

    def serve(sock: socket.socket) -> None:
        read_request(sock)
        time.sleep(1)  # a slow proxy
        with suppress(OSError):
            sock.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            silent(sock)

    with raw_server(serve) as proxy:
        use_proxy(monkeypatch, "https", proxy)
        monkeypatch.setattr(socket, "getaddrinfo", slow)
        await assert_too_late(send, Route("https://onenet.invalid", None), connect_s=1.5)


async def test_a_look_up_that_hangs_ends_the_connection(send: Send, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends its own read only: the reader has one thread, and the name is known to the next look-up."""
    look_up, may_answer = socket.getaddrinfo, threading.Event()
    hosts: list[str] = []

    def hang_once(host: str, *rest: Any, **options: Any) -> Any:
        hosts.append(host)
        if len(hosts) == 1:
            assert may_answer.wait(PATIENCE_S)
        return look_up("127.0.0.1", *rest, **options)

    with raw_server(greet) as url:
        monkeypatch.setattr(socket, "getaddrinfo", hang_once)
        route = Route(f"http://onenet.invalid:{url.rpartition(':')[2]}", None)
        try:
            await assert_too_late(send, route)
            assert (await send(route, PATIENCE_S)).body == b"hello"
        finally:
            may_answer.set()


@contextmanager
def hanging_address() -> Iterator[tuple[str, int]]:
    """Yield an address that neither accepts nor refuses: its backlog is full, and the kernel drops what comes."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        yield listener.getsockname()


def found_at(*addresses: tuple[str, int]) -> Callable[..., object]:
    """Return a look-up that finds these addresses."""
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address) for address in addresses]
    return lambda *_, **__: found


@pytest.mark.parametrize("count", [1, 12])
async def test_addresses_that_hang_do_not_use_up_the_time_of_one_that_works(
    send: Send, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with raw_server(greet) as url, hanging_address() as dead:
        works = ("127.0.0.1", int(url.rpartition(":")[2]))
        monkeypatch.setattr(socket, "getaddrinfo", found_at(*[dead] * count, works))
        assert (await send(Route("http://onenet.invalid", None), NEVER_S)).body == b"hello"


def descriptors() -> int:
    """Return how many descriptors this process has open."""
    return len([*Path("/proc/self/fd").iterdir()])


async def test_connections_to_a_name_of_many_dead_addresses_take_no_more_sockets_than_the_limit_of_open_files_counts(
    send: Send, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each tries all fifteen of them, since only the last address works."""
    connections = 20
    before = descriptors()
    most = 0

    async def watch() -> None:
        nonlocal most
        while True:
            most = max(most, descriptors() - before)
            await asyncio.sleep(0.01)

    with raw_server(greet) as url, hanging_address() as dead:
        works = ("127.0.0.1", int(url.rpartition(":")[2]))
        monkeypatch.setattr(socket, "getaddrinfo", found_at(*[dead] * 15, works))
        route = Route("http://onenet.invalid", None)
        watching = asyncio.create_task(watch())
        answers = await asyncio.gather(*[send(route, NEVER_S) for _ in range(connections)])
        watching.cancel()
    assert [answer.body for answer in answers] == [b"hello"] * connections
    the_test_itself = 10 + 2 * connections  # of the servers
    assert connections * MAX_SOCKETS // 2 < most <= connections * MAX_SOCKETS + the_test_itself


async def test_look_ups_that_hang_hold_up_no_other_platform(send: Send, monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them than a platform has threads for."""
    look_up, may_answer = socket.getaddrinfo, threading.Event()

    def hang(host: str, *rest: Any, **options: Any) -> Any:
        if host == "hanging.invalid":
            assert may_answer.wait(PATIENCE_S)
        return look_up(host, *rest, **options)

    with raw_server(greet) as url:
        monkeypatch.setattr(socket, "getaddrinfo", hang)
        hanging = Route("http://hanging.invalid", None)
        sends = [asyncio.ensure_future(send(hanging, NEVER_S)) for _ in range(MAX_LOOK_UPS + 10)]
        await asyncio.sleep(0)
        try:
            assert (await send(Route(url, None), NEVER_S)).body == b"hello"
        finally:
            for each in sends:
                each.cancel()
            may_answer.set()


async def test_addresses_that_all_hang_have_one_limit(send: Send, monkeypatch: pytest.MonkeyPatch) -> None:
    with hanging_address() as dead:
        monkeypatch.setattr(socket, "getaddrinfo", found_at(*[dead] * 1_000))
        await assert_too_late(send, Route("http://onenet.invalid", None))


async def test_the_words_of_a_proxy_that_refuses_do_not_repeat_its_password(
    send: Send, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = threading.Event()

    def refuse(sock: socket.socket) -> None:
        read_request(sock)
        sock.sendall(b"HTTP/1.1 407 svc:S3cretPassword c3ZjOlMzY3JldFBhc3N3b3Jk\r\n\r\n")
        ended.set()

    with raw_server(refuse) as proxy:
        use_proxy(monkeypatch, "https", proxy.replace("://", "://svc:S3cretPassword@"))
        with pytest.raises(TransportError) as caught:
            await send(Route("https://onenet.invalid", None), PATIENCE_S)
        await until(ended.is_set)
    assert "407" in caught.value.reason
    assert "S3cret" not in caught.value.reason
    assert "c3Zj" not in caught.value.reason


async def test_without_a_descriptor_for_the_connection_nothing_is_sent(send: Send) -> None:
    """A read needs two: one to use, and one to cut it with."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        route = Route(f"http://127.0.0.1:{listener.getsockname()[1]}", None)
        "127.0.0.1".encode("idna")  # loads a module, which takes a descriptor
        taken: list[int] = []
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 1024), hard))
            with suppress(OSError):  # none is left
                while True:
                    taken.append(os.dup(listener.fileno()))
            if send is get:
                os.close(taken.pop())
            with pytest.raises(TransportError, match="this process has too many open files") as failed:
                await send(route, PATIENCE_S)
        finally:
            for descriptor in taken:
                os.close(descriptor)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert not failed.value.may_have_been_sent
