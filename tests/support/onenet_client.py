"""A OneNET client for tests, and what servers on real sockets need to answer it."""

import json
import ssl
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Protocol, TypeVar
from zoneinfo import ZoneInfo

import pytest
import trustme
from pydantic import SecretStr

from tests.support.builders import a_command, in_hours
from tests.support.simulator import ACCESS_KEY, API_KEY, PRODUCT_ID
from tests.support.waiting import PATIENCE_S
from worker.core.answer import Answer
from worker.core.command import Command
from worker.core.credentials import AccessKey, ApiKey, Generation, Product
from worker.core.doubt_window import DoubtWindow
from worker.core.parsing import read_command
from worker.core.times import platform_time
from worker.onenet.account import Site
from worker.onenet.client import OneNETClient
from worker.onenet.clock import PlatformClock
from worker.onenet.device_histories import DeviceHistories
from worker.onenet.history_reader import HistoryReader
from worker.onenet.route import Route
from worker.onenet.transport import HTTPTransport
from worker.simulator.server import Simulator
from worker.telemetry.tracing import NoTracing

T = TypeVar("T")
NEVER = float("inf")
NEVER_S = 1_000.0  # so long that a test that waits for it fails
CACHING_DELAY_S = 2
HISTORY_WINDOW_S = 86_400
RATE_WAIT_S = 0.5
CHINA = ZoneInfo("Asia/Shanghai")


class Stream(Protocol):
    """What the servers of the tests use of a socket."""

    def sendall(self, data: bytes, /) -> None: ...
    def recv(self, size: int, /) -> bytes: ...
    def shutdown(self, how: int, /) -> None: ...


def accepting_response(uuid: str = "u") -> bytes:
    """Return the response that accepts a command under a uuid."""
    body = json.dumps({"errno": 0, "data": {"uuid": uuid}, "error": "succ"}, separators=(",", ":")).encode()
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


def read_request(sock: Stream) -> bytes:
    """Read one request; raises ConnectionError at the end of the connection."""
    data = b""
    while True:
        head, end, body = data.partition(b"\r\n\r\n")
        length = head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
        if end and len(body) >= int(length or 0):
            return data
        received = sock.recv(4096)
        if not received:
            raise ConnectionResetError
        data += received


def server_tls_context(folder: Path, host: str) -> ssl.SSLContext:
    """Return a server's TLS context for a host; the certificate authority is written to ``ca.pem``."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(host).configure_cert(context)
    return context


class InnerTLS:
    """The server's side of TLS within TLS, which Python supports only on sockets of the system."""

    def __init__(self, outer: ssl.SSLSocket, context: ssl.SSLContext) -> None:
        self._outer = outer
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._do(self._tls.do_handshake)

    def sendall(self, data: bytes) -> None:
        self._do(lambda: self._tls.write(data))

    def recv(self, size: int) -> bytes:
        return self._do(lambda: self._tls.read(size))

    def shutdown(self, how: int) -> None:
        self._outer.shutdown(how)

    def _do(self, step: Callable[[], T]) -> T:
        while True:
            try:
                return step()
            except ssl.SSLWantReadError:
                self._outer.sendall(self._outgoing.read())
                received = self._outer.recv(65536)
                if not received:
                    raise ConnectionResetError from None
                self._incoming.write(received)
            finally:
                self._outer.sendall(self._outgoing.read())


def https(url: str) -> str:
    """Return a URL with https for http."""
    return url.replace("http:", "https:")


def use_proxy(monkeypatch: pytest.MonkeyPatch, scheme: str, proxy: str) -> None:
    """Name a proxy in the environment for URLs of a scheme, without exceptions."""
    monkeypatch.setenv(f"{scheme}_proxy", proxy)
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.delenv("NO_PROXY", raising=False)


_TOMORROW = in_hours(24)[:-3] + "30Z"  # not near a full minute, which a history may show instead of the time


def command(**changes: Any) -> Command:
    """Return a valid command with args "on"; two of them differ only in their ids, whenever they are made."""
    return read_command(
        json.dumps(a_command(**{"args": "on", "expired_time": _TOMORROW, **changes})).encode(), None, CHINA
    )


@contextmanager
def onenet_client(
    url: str,
    connect_s: float = 1,
    read_s: float = 1,
    ca_file: str | None = None,
    api: Generation = "v1",
    acquire: Callable[[str | None], Awaitable[None]] | None = None,
) -> Iterator[OneNETClient]:
    """Yield a client of the platform at a URL, and close it."""
    v1_key, v2_key = (
        ApiKey(api_key=SecretStr(API_KEY)),
        AccessKey(product_id=PRODUCT_ID, access_key=SecretStr(ACCESS_KEY)),
    )
    times: dict[str, Any] = {"connect_timeout_s": connect_s, "read_timeout_s": read_s, "tracing": NoTracing()}

    def new_site(url: str) -> Site:
        route = Route(url, ca_file)
        return Site(
            lambda: HTTPTransport(route, **times), HistoryReader(route, concurrency=4, **times), PlatformClock(url)
        )

    histories = DeviceHistories(
        CHINA,
        request_s=connect_s + read_s,
        caching_delay_s=CACHING_DELAY_S,
        history_window_s=HISTORY_WINDOW_S,
        acquire=acquire,
        rate_wait_s=RATE_WAIT_S,
        searches_at_once=1,
    )
    client = OneNETClient(
        {None: Product(url, api, v1_key if api == "v1" else v2_key)},
        new_site,
        CHINA,
        histories,
        request_s=connect_s + read_s,
    )
    try:
        yield client
    finally:
        client.close()


async def execute_once(url: str, connect_s: float = PATIENCE_S) -> Answer:
    """Send one command to the platform at a URL; returns its answer."""
    with onenet_client(url, connect_s) as client:
        return (await client.execute(command(), NEVER)).answer


def in_seconds(seconds: float) -> datetime:
    """Return the instant in ``seconds`` from now."""
    return datetime.now(UTC) + timedelta(seconds=seconds)


def current_doubt() -> DoubtWindow:
    """Return a doubt window that covers everything the platform caches during a test."""
    return DoubtWindow(in_seconds(-60), in_seconds(60))


async def none_owned(_uuids: object) -> set[str]:
    """Say that no uuid belongs to another command."""
    return set()


def cache(simulator: Simulator, wanted: Command, args: str, **changes: str) -> str:
    """Have the platform cache a command for the same device; returns its uuid."""
    query = {
        "imei": wanted.imei,
        "obj_id": str(wanted.obj_id),
        "obj_inst_id": str(wanted.obj_inst_id),
        "res_id": str(wanted.res_id),
        "expired_time": platform_time(wanted.expires_at, CHINA),
    }
    return simulator.platform.execute(query | changes, json.dumps({"args": args}).encode()).uuid
