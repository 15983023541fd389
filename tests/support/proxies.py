"""TCP servers with faults: a proxy in front of a broker, and a server that the test scripts."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit


def with_local_port(url: str, port: int) -> str:
    """Return a broker's URL with its host and port replaced by a port of this machine."""
    target = urlsplit(url)
    credentials, at, _ = target.netloc.rpartition("@")
    return target._replace(netloc=f"{credentials}{at}127.0.0.1:{port}").geturl()


class Proxy:
    """A TCP proxy in front of a server that can reset, silence, hold or corrupt its connections.

    Args:
        url: of the server.
        port: to listen on; 0 takes a free one.
        delay_s: how long each connection forwards nothing at first, in seconds.
    """

    def __init__(self, url: str, port: int = 0, delay_s: float = 0) -> None:
        target = urlsplit(url)
        self._target = (str(target.hostname), target.port or 5672)
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port: int = self._listener.getsockname()[1]
        self.url = with_local_port(url, self.port)
        self._pairs: list[socket.socket] = []
        self._delay_s = delay_s
        self._silent: set[socket.socket] = set()
        self._is_open = threading.Event()
        self._is_open.set()
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Reset every connection."""
        with self._lock:
            pairs, self._pairs = self._pairs, []
        for sock in pairs:
            _close(sock)

    def silence(self) -> None:
        """Forward nothing more on the present connections, but keep them open."""
        with self._lock:
            self._silent |= set(self._pairs)

    def hold(self) -> None:
        """Forward nothing until ``release``, on new connections neither, as a stopped process or a partition does."""
        self._is_open.clear()

    def release(self) -> None:
        """Forward what was held, and go on."""
        self._is_open.set()

    def garble(self) -> None:
        """Send every client a malformed frame: one without its end octet."""
        with self._lock:
            for client in self._pairs[::2]:
                with suppress(OSError):  # closed by now
                    client.sendall(b"\x01\x00\x01\x00\x00\x00\x04none\x00")

    def close(self) -> None:
        _close(self._listener)
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(self._target)
            except OSError:
                _close(client)
                continue
            with self._lock:
                self._pairs += [client, server]
            for source, target in ((client, server), (server, client)):
                threading.Thread(target=self._pump, args=(source, target), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        time.sleep(self._delay_s)  # this is what it simulates
        with suppress(OSError):
            while data := source.recv(65536):
                self._is_open.wait()
                if source not in self._silent:
                    target.sendall(data)
        _close(source)
        _close(target)


def _close(sock: socket.socket) -> None:
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()


@contextmanager
def raw_server(answer: Callable[[socket.socket], None], address: str = "127.0.0.1") -> Iterator[str]:
    """Run a TCP server that calls ``answer`` with each connection; yields its URL."""
    is_ipv6 = ":" in address
    listener = socket.create_server((address, 0), family=socket.AF_INET6 if is_ipv6 else socket.AF_INET)

    def serve() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=_answer, args=(answer, client), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"http://{f'[{address}]' if is_ipv6 else address}:{listener.getsockname()[1]}"
    finally:
        _close(listener)


def _answer(answer: Callable[[socket.socket], None], client: socket.socket) -> None:
    with suppress(OSError):  # the client closed the connection first
        answer(client)
    _close(client)
