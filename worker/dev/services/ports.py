"""Free ports for private servers, and waiting for them."""

import secrets
import socket
import time
from collections.abc import Callable
from contextlib import suppress

# Below the kernel's range of ephemeral ports: from that range, a connection could take a port that was free here.
_LOWEST, _HIGHEST = 15_000, 32_000


def free_port() -> int:
    """Return a port that is not in use, and that no other call returns while this process lives."""
    while True:
        port = _LOWEST + secrets.randbelow(_HIGHEST - _LOWEST)
        with socket.socket() as sock, suppress(OSError):
            sock.bind(("127.0.0.1", port))
            _reserve(port)
            return port


def _reserve(port: int) -> None:
    """Keep other processes from choosing a port before its server listens, or while that is restarted.

    Linux frees the name of an abstract socket with the process that bound it.
    """
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(f"\0onenet-worker-port-{port}")
        sock.detach()  # stays open until the end of this process


def is_listening(host: str, port: int) -> bool:
    """Tell whether a port accepts connections."""
    with socket.socket() as sock:
        sock.settimeout(1)
        return sock.connect_ex((host, port)) == 0


def wait_until(condition: Callable[[], bool], timeout_s: float, what: str, every_s: float = 0.05) -> None:
    """Poll until a condition holds.

    Raises:
        TimeoutError: it did not hold in time.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {timeout_s:g} s")
        time.sleep(every_s)  # another process cannot notify this one
