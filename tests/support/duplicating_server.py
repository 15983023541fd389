"""A server that sends each response twice."""

import itertools
import json
import socket
import threading
from collections.abc import Sequence
from contextlib import suppress

from tests.support.onenet_client import accepting_response, read_request

_DELAYS_S = [number / 10_000 for number in range(31)]  # 0 to 3 ms


class DuplicatingServer:
    """Sends each response twice, the duplicate after a delay; the commands' args are their numbers."""

    def __init__(self, delays_s: Sequence[float] = _DELAYS_S) -> None:
        self._delays_s = itertools.cycle(delays_s)
        self._lock = threading.Lock()
        self.received: list[int] = []

    def serve(self, sock: socket.socket) -> None:
        """Serve one connection."""
        writing = threading.Lock()
        while True:
            number = int(json.loads(read_request(sock).partition(b"\r\n\r\n")[2])["args"])
            response = accepting_response(self.uuid(number))
            with self._lock:
                self.received.append(number)
                delay_s = next(self._delays_s)
            with writing:
                sock.sendall(response)
            timer = threading.Timer(delay_s, self._send_again, (sock, writing, response))
            timer.daemon = True
            timer.start()

    @staticmethod
    def uuid(number: int) -> str:
        """Return the uuid under which command ``number`` is accepted."""
        return f"00000000-0000-4000-8000-{number:012}"

    @staticmethod
    def _send_again(sock: socket.socket, writing: threading.Lock, response: bytes) -> None:
        with suppress(OSError), writing:  # the client may have closed the connection
            sock.sendall(response)
