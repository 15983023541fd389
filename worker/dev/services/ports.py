"""Free ports for services of our own."""

import secrets
import socket
import time
from collections.abc import Callable

# Below the range from which the kernel takes ports for clients: there, a connection could take a port found free here.
_LOWEST, _HIGHEST = 15_000, 32_000


def free_port() -> int:
    """Return a port on which nobody listens."""
    while True:
        port = _LOWEST + secrets.randbelow(_HIGHEST - _LOWEST)
        with socket.socket() as sock:
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def is_listening(host: str, port: int) -> bool:
    """Tell whether a connection can be made."""
    with socket.socket() as sock:
        sock.settimeout(1)
        return sock.connect_ex((host, port)) == 0


def wait_until(condition: Callable[[], bool], timeout_s: float, what: str, every_s: float = 0.05) -> None:
    """Look again and again until a condition holds.

    Raises:
        TimeoutError: it did not hold in time.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {timeout_s:g} s")
        time.sleep(every_s)  # between two looks at another process, which has no way to tell us
