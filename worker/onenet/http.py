"""HTTP for a request that must not be repeated: knows whether bytes left, and is over when its time is over.

Two things that requests does not offer, both hung into urllib3's connection classes, which are made to be replaced:
a connection says when it hands over the first byte of a request, and one that sat idle is not used again, because one
that the platform closed meanwhile would look like an answer lost.
"""

import contextlib
import socket
import threading
import time
from http import HTTPStatus
from http.client import HTTPResponse
from typing import Any, ClassVar

import requests
import urllib3
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import ConnectTimeoutError

from worker.telemetry.tracing import Tracing

MAX_IDLE_S = 4.0  # less than the 5 s after which common servers close an idle connection
MAX_ANSWER_BYTES = 1024 * 1024
_CHUNK_BYTES = 16 * 1024


class Exchange:
    """One request and its answer. ``request_left``: bytes of it may have reached the platform."""

    __slots__ = ("deadline", "request_left", "sock")

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self.request_left = False
        self.sock: object = None  # the connection forgets it when the answer is to be the last


_local = threading.local()  # urllib3 makes connections deep inside: the exchange reaches them by its thread


class _Response(HTTPResponse):
    """An answer that begins behind all interim ones; http.client takes any but "100 Continue" for the answer itself.

    The real one would be left in the connection, and be taken for the answer to the next request.
    """

    def begin(self) -> None:
        super().begin()
        while self.status != HTTPStatus.SWITCHING_PROTOCOLS and self.status < HTTPStatus.OK:
            self.headers = self.msg = None  # type: ignore[assignment]  # which makes it read the next one
            super().begin()


class _Connection(HTTPConnection):
    """A connection that tells its exchange when the first byte of a request leaves."""

    response_class = _Response
    _is_ready = False
    _used_at = 0.0

    def connect(self) -> None:
        super().connect()
        self._is_ready = True  # what was sent until here was a proxy's CONNECT, no request

    def close(self) -> None:
        self._is_ready = False
        super().close()

    @property
    def is_connected(self) -> bool:
        return super().is_connected and time.monotonic() - self._used_at < MAX_IDLE_S

    def send(self, data: Any) -> None:
        exchange: Exchange = _local.exchange
        if self.sock is None:
            self.connect()
        if self._is_ready:
            exchange.sock = self.sock
            if time.monotonic() >= exchange.deadline:
                raise ConnectTimeoutError(self, "the connection took all the time that the request had")
            exchange.request_left = True
        super().send(data)
        self._used_at = time.monotonic()


class _TLSConnection(_Connection, HTTPSConnection):
    """The same over TLS."""


class _Pool(urllib3.HTTPConnectionPool):
    ConnectionCls = _Connection


class _TLSPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _TLSConnection


class _Adapter(HTTPAdapter):
    """Requests' adapter, with connections of the kind above."""

    _pools: ClassVar = {"http": _Pool, "https": _TLSPool}

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = self._pools

    def proxy_manager_for(self, *args: Any, **kwargs: Any) -> urllib3.ProxyManager:
        manager: urllib3.ProxyManager = super().proxy_manager_for(*args, **kwargs)
        manager.pool_classes_by_scheme = self._pools
        return manager


class BoundedHTTP:
    """Sends requests, each once, and each within a time that bounds it as a whole, a dripping answer included.

    Args:
        base_url: where the platform is: decides once which proxy and which authorities of the environment hold.
        connect_timeout_s: longest wait for one connection.
        read_timeout_s: longest wait for the next bytes; both together bound the whole.
        ca_file: the authorities to trust instead of the usual ones.
        connections: how many are kept open for the next requests.
        watch: cuts what takes too long.
        tracing: spans each request.
    """

    def __init__(
        self,
        base_url: str,
        *,
        connect_timeout_s: float,
        read_timeout_s: float,
        ca_file: str | None,
        connections: int,
        watch: "Watch",
        tracing: Tracing,
    ) -> None:
        with requests.Session() as session:
            environment = session.merge_environment_settings(base_url, {}, None, ca_file, None)
        self._proxies = dict(environment["proxies"])
        self._verify: bool | str = environment["verify"] or True
        self._timeouts_s = (connect_timeout_s, read_timeout_s)
        self._adapter = _Adapter(pool_connections=4, pool_maxsize=connections, max_retries=0)
        self._watch = watch
        self._tracing = tracing

    def send(self, request: requests.PreparedRequest, exchange: Exchange) -> tuple[int, requests.Response, bytes]:
        """Send one request and read the whole answer.

        Raises:
            requests.RequestException, urllib3.exceptions.HTTPError, HTTPException, OSError, ValueError: no whole
                answer, or none that can be read; ``exchange.request_left`` tells what that means.
        """
        url = str(request.url).partition("?")[0]  # without the device
        with self._tracing.requesting(str(request.method), url) as answered:
            status, response, body = self._send(request, exchange)
            answered(status)
        return status, response, body

    def _send(self, request: requests.PreparedRequest, exchange: Exchange) -> tuple[int, requests.Response, bytes]:
        _local.exchange = exchange
        self._watch.begin(exchange)
        try:
            response = self._adapter.send(
                request, stream=True, timeout=self._timeouts_s, verify=self._verify, proxies=self._proxies
            )
            with response:
                if response.status_code < HTTPStatus.OK:
                    raise requests.ConnectionError(f"HTTP {response.status_code}")  # closes it, with what may follow
                body = b""
                for chunk in response.iter_content(_CHUNK_BYTES):
                    body += chunk
                    if len(body) > MAX_ANSWER_BYTES:
                        raise requests.ConnectionError(f"the answer is longer than {MAX_ANSWER_BYTES} bytes")
                return response.status_code, response, body
        finally:
            self._watch.end(exchange)

    def close(self) -> None:
        """Close the idle connections; what is under way goes on."""
        self._adapter.close()


class Watch:
    """Cuts every exchange whose time is over, from a thread of its own: a socket's timeout only bounds one read.

    Args:
        request_s: the longest that most exchanges may take, in seconds.
    """

    def __init__(self, request_s: float) -> None:
        self._request_s = request_s
        self._changed = threading.Condition()
        self._exchanges: set[Exchange] = set()
        self._wakes_at = time.monotonic()
        self._is_stopped = False
        threading.Thread(target=self._run, name="http-watch", daemon=True).start()

    def begin(self, exchange: Exchange) -> None:
        with self._changed:
            self._exchanges.add(exchange)
            if exchange.deadline < self._wakes_at:
                self._changed.notify()

    def end(self, exchange: Exchange) -> None:
        with self._changed:
            self._exchanges.discard(exchange)

    def stop(self) -> None:
        with self._changed:
            self._is_stopped = True
            self._changed.notify()

    def _run(self) -> None:
        with self._changed:  # what has ended is not in the set, so its connection is not cut under the next request
            while not self._is_stopped:
                now = time.monotonic()
                for exchange in [exchange for exchange in self._exchanges if exchange.deadline <= now]:
                    self._exchanges.discard(exchange)
                    _cut(exchange)
                # Most requests have all the time there is, so that none of them has to wake this thread.
                self._wakes_at = min([now + self._request_s, *(exchange.deadline for exchange in self._exchanges)])
                self._changed.wait(self._wakes_at - now)


def _cut(exchange: Exchange) -> None:
    sock = getattr(exchange.sock, "socket", exchange.sock)  # TLS within a proxy's TLS wraps it
    if isinstance(sock, socket.socket):
        with contextlib.suppress(OSError):  # it has just been closed: nothing is left to cut
            # The plain socket's method even under TLS: the thread that reads is using the TLS state.
            socket.socket.shutdown(sock, socket.SHUT_RDWR)
