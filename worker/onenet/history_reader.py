"""HTTP requests that may be repeated: the pages and details of the command history, and cancelling, with requests.

Each read runs in a thread, over a connection of its own: a response that arrives twice is never that to the next read.
"""

import asyncio
import itertools
import socket
import ssl
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from http import HTTPStatus
from http.client import HTTPException
from http.cookiejar import DefaultCookiePolicy
from typing import Any, Literal, TypeVar

import requests
from requests.adapters import HTTPAdapter
from urllib3 import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError, SSLError

from worker.core.backoff import backoff_s
from worker.errors import HistoryUnreadable, TransportError
from worker.onenet.answers import asked_wait_s, http_history_error, is_json
from worker.onenet.clock import PlatformClock
from worker.onenet.connecting import connected_socket
from worker.onenet.dialect import Dialect
from worker.onenet.history_memory import MAX_BODY_BYTES
from worker.onenet.response import Response
from worker.onenet.route import Route
from worker.onenet.search_time import SearchTime
from worker.onenet.strict_response import StrictResponse
from worker.onenet.transport import COMMON_HEADERS, CONNECT_TOO_LATE, transport_error
from worker.telemetry.tracing import Tracing

Model = TypeVar("Model")
Method = Literal["GET", "PUT"]

_MAX_TRIES = 3  # per page, within the deadline; not by urllib3's Retry: each takes one request from the rate limit
_PIECE_BYTES = 4 * 1024  # http.client collects the chunks of a piece, each of which may be a few bytes


class HistoryReader:
    """Reads from the platform, each read within a deadline that also bounds a response that arrives byte by byte.

    Args:
        route: how the platform is reached.
        connect_timeout_s: longest duration of making a connection, from the look-up of the name to the end of TLS.
        read_timeout_s: longest wait for the next bytes.
        concurrency: how many reads may run at once; threads start when they are needed.
        tracing: makes a span for each request.
    """

    def __init__(
        self, route: Route, *, connect_timeout_s: float, read_timeout_s: float, concurrency: int, tracing: Tracing
    ) -> None:
        self._route = route
        self._timeouts_s = (connect_timeout_s, read_timeout_s)
        self._tracing = tracing
        self._threads = ThreadPoolExecutor(concurrency, thread_name_prefix="history-reader")
        self._session = _Session()
        self._session.trust_env = False  # the route has read the environment
        self._session.headers = {**COMMON_HEADERS, "Connection": "close"}
        if route.proxy_url is not None:
            self._session.proxies = dict.fromkeys(("http", "https"), route.proxy_url)
        self._session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, _Adapter(route.tls))

    def close(self) -> None:
        """Start no further read; those in progress end by their deadlines."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def read_page(
        self,
        path: str,
        headers: Mapping[str, str],
        search: SearchTime,
        dialect: Dialect,
        parse: Callable[[Response, Dialect], Model],
        clock: PlatformClock,
        method: Method = "GET",
    ) -> tuple[Model, float | None]:
        """Read one page, and the platform's clock by it; tried again if no answer comes, or none that can be read.

        Args:
            path: the path, relative to the platform's URL, with the query.
            headers: the credentials.
            search: its deadline, and the rate limit, from which each try takes one request.
            dialect: the generation of the platform.
            parse: reads the response; raises HistoryUnreadable.
            clock: the platform's clock.
            method: of HTTP; ``PUT`` only for what may be repeated.

        Returns:
            The page, and the seconds by which the platform's clock is ahead of ours; None if its response has no Date.

        Raises:
            HistoryUnreadable: every try failed.
        """
        for tries in itertools.count(1):
            await search.acquire()
            try:
                return await self._try_page(method, path, headers, search.deadline, dialect, parse, clock)
            except HistoryUnreadable as exc:
                wait_s = backoff_s(tries, base_s=0.1, cap_s=1)
                is_late = asyncio.get_running_loop().time() + wait_s >= search.deadline
                if tries == _MAX_TRIES or exc.retry_after_s is not None or is_late:
                    raise exc.with_traceback(None) from None  # traceback and cause would keep the answer
            await asyncio.sleep(wait_s)  # outside of the except block, so that the error is not kept meanwhile
        raise AssertionError  # itertools.count does not end

    async def _try_page(
        self,
        method: Method,
        path: str,
        headers: Mapping[str, str],
        deadline: float,
        dialect: Dialect,
        parse: Callable[[Response, Dialect], Model],
        clock: PlatformClock,
    ) -> tuple[Model, float | None]:
        sent_at = datetime.now(UTC)
        try:
            response = await self._request(method, path, headers, deadline)
        except TransportError as exc:
            reason = exc.reason
        else:
            return _observed(response, dialect, parse, clock, sent_at)
        raise HistoryUnreadable(reason, is_outage=True)  # without its cause, which keeps the bytes that were read

    async def get(self, path: str, headers: Mapping[str, str], deadline: float) -> Response:
        """Get one response; redirects are not followed. If it is cancelled or late, the connection is cut.

        Raises:
            TransportError: no complete response, or none that can be read.
        """
        return await self._request("GET", path, headers, deadline)

    async def _request(self, method: Method, path: str, headers: Mapping[str, str], deadline: float) -> Response:
        url = self._route.base_url + path
        with self._tracing.requesting(method, url.partition("?")[0]) as answered:
            try:
                async with asyncio.timeout_at(deadline):
                    response = await self._read(method, url, headers)
            except TimeoutError as exc:
                late = TimeoutError("no complete response within the deadline")
                raise transport_error(late, may_have_been_sent=True) from exc
            answered(response.status)
            return response

    async def _read(self, method: Method, url: str, headers: Mapping[str, str]) -> Response:
        loop = asyncio.get_running_loop()
        connect_by = loop.time() + self._timeouts_s[0]
        reading = await self._connected(connect_by)
        timer = loop.call_at(connect_by, reading.cut_unless_connected)
        try:
            return await loop.run_in_executor(self._threads, self._send, method, url, headers, reading)
        finally:
            timer.cancel()
            reading.cut()  # at its deadline the thread may still wait for bytes

    async def _connected(self, connect_by: float) -> "_Reading":
        try:
            async with asyncio.timeout_at(connect_by) as limit:
                sock = await connected_socket(self._route.first, self._route.look_ups, self._timeouts_s[0])
            return _Reading(sock)
        except (OSError, ValueError) as exc:  # ValueError: a host that cannot be encoded
            error = TimeoutError(CONNECT_TOO_LATE) if limit.expired() else exc
            raise transport_error(error, may_have_been_sent=False, host=self._route.first.host) from exc

    def _send(self, method: Method, url: str, headers: Mapping[str, str], reading: "_Reading") -> Response:
        _current.reading = reading
        secrets = (*headers.values(), *self._route.secrets)
        try:
            with self._session.request(
                method, url, headers=headers, timeout=self._timeouts_s, allow_redirects=False, stream=True
            ) as answer:
                names = {name.lower().encode(): value.encode("latin-1") for name, value in answer.headers.items()}
                return Response(answer.status_code, names, _body(answer.raw), secrets)
        # ValueError: what the libraries raise for a host or a header that they cannot encode.
        except (requests.RequestException, HTTPError, HTTPException, OSError, ValueError) as exc:
            if reading.is_cut:
                raise transport_error(TimeoutError(CONNECT_TOO_LATE), may_have_been_sent=False) from exc
            is_tls = isinstance(exc, requests.exceptions.SSLError | SSLError)
            raise transport_error(exc, may_have_been_sent=True, is_tls=is_tls, secrets=secrets) from exc


class _Reading:
    """One read in a thread. It can be cut: the libraries' timeouts bound only the wait for the next bytes.

    Args:
        sock: its connection to the platform or the proxy.

    Raises:
        OSError: no file descriptor is left for a second handle of the connection, which is closed.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.is_cut = False
        self._lock = threading.Lock()  # the event loop cuts, the thread takes the connection
        self._sock: socket.socket | None = sock
        try:
            self._to_cut = sock.dup()  # TLS takes the socket over
        except OSError:
            sock.close()
            raise
        self._is_connected = False

    def take(self) -> socket.socket:
        """Return the connection, which belongs to the caller from now on.

        Raises:
            TimeoutError: the read has been cut.
        """
        with self._lock:
            if self._sock is None:
                raise TimeoutError("the deadline passed before the read began")
            sock, self._sock = self._sock, None
            return sock

    def note_connected(self) -> None:
        """Record that tunnel and TLS, if there are any, are established."""
        self._is_connected = True

    def cut_unless_connected(self) -> None:
        """Cut the read if the proxy, or a server of TLS, has not done its part yet."""
        if not self._is_connected:
            self.cut()

    def cut(self) -> None:
        """Shut the connection down, so that the thread waits no longer."""
        with self._lock:
            if self.is_cut:
                return
            self.is_cut = True
            with suppress(OSError):  # the connection is closed already
                self._to_cut.shutdown(socket.SHUT_RDWR)
            self._to_cut.close()
            if self._sock is not None:
                self._sock.close()
                self._sock = None


class _Current(threading.local):
    """The read of the running thread."""

    reading: _Reading


_current = _Current()


class _Connection(HTTPConnection):
    """Uses the connection of the read."""

    response_class = StrictResponse

    def _new_conn(self) -> socket.socket:
        sock = _current.reading.take()
        sock.settimeout(self.timeout)
        return sock

    def connect(self) -> None:
        super().connect()
        _current.reading.note_connected()


class _TLSConnection(_Connection, HTTPSConnection):
    pass


class _HTTPPool(HTTPConnectionPool):
    ConnectionCls = _Connection


class _HTTPSPool(HTTPSConnectionPool):
    ConnectionCls = _TLSConnection


_POOLS = {"http": _HTTPPool, "https": _HTTPSPool}


class _Session(requests.Session):
    """Knows no redirects: the library reads the body of one whole and decoded, although it does not follow it."""

    def get_redirect_target(self, *args: Any) -> None:
        """Find none."""


class _Adapter(HTTPAdapter):
    """Uses the route's certificate authorities, and the connections of the reads."""

    def __init__(self, tls: ssl.SSLContext | None) -> None:
        self._tls = tls
        super().__init__()

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, ssl_context=self._tls, **kwargs)
        self.poolmanager.pool_classes_by_scheme = _POOLS

    def proxy_manager_for(self, proxy: str, **kwargs: Any) -> Any:
        manager = super().proxy_manager_for(proxy, ssl_context=self._tls, proxy_ssl_context=self._tls, **kwargs)
        manager.pool_classes_by_scheme = _POOLS
        return manager

    def cert_verify(self, *args: Any) -> None:
        """Add no authority: requests would load its own into the route's context."""


def _observed(
    response: Response,
    dialect: Dialect,
    parse: Callable[[Response, Dialect], Model],
    clock: PlatformClock,
    sent_at: datetime,
) -> tuple[Model, float | None]:
    """Read a response, and the platform's clock, which errors of the platform tell too."""
    received_at = datetime.now(UTC)
    try:
        parsed = _parsed(response, dialect, parse)
    except HistoryUnreadable:
        if is_json(response):
            clock.observe(response, sent_at, received_at)
        raise
    return parsed, clock.observe(response, sent_at, received_at)


def _parsed(response: Response, dialect: Dialect, parse: Callable[[Response, Dialect], Model]) -> Model:
    if response.status != HTTPStatus.OK:
        asked_s = asked_wait_s(response, datetime.now(UTC))
        raise http_history_error(response, dialect, asked_s)
    return parse(response, dialect)


def _body(raw: Any) -> bytes:
    body = b""
    while data := raw.read(_PIECE_BYTES, decode_content=False):
        body += data
        if len(body) > MAX_BODY_BYTES:
            raise ValueError(f"the response is longer than {MAX_BODY_BYTES} bytes")
    return body
