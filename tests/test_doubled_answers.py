"""An answer that a server or a gateway sends twice: the second copy is never taken for the answer to a later command."""

import itertools
import json
import select
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol, TypeVar
from uuid import uuid4
from zoneinfo import ZoneInfo

import pytest
from pika import BasicProperties
from urllib3.connection import HTTPConnection

from tests.rig import PATIENCE_S, a_command, raw_server
from tests.test_handler import delivery
from tests.test_idempotency import NOW
from tests.test_onenet_client import NEVER, an_answer, client, command, just_now, nobody, secure_context
from worker.amqp.messages import Outgoing, Publication
from worker.amqp.topology import Topology
from worker.answer import Cached, InDoubt, NotSent, Refused
from worker.decide import RetryPolicy
from worker.errors import HistoryUnreadable
from worker.flow.gates import Gates
from worker.handler import Handler
from worker.idempotency import Store
from worker.idempotency.memory import MemoryStore
from worker.idempotency.redis import RedisStore
from worker.onenet.route import Route
from worker.telemetry.metrics import Metrics

T = TypeVar("T")
TOO_MANY = b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 0\r\n\r\n"
NO = b'HTTP/1.1 200 OK\r\nContent-Length: 34\r\n\r\n{"errno":2001,"error":"no device"}'
EMPTY = b'HTTP/1.1 200 OK\r\nContent-Length: 47\r\n\r\n{"errno":0,"data":{"total_count":0,"items":[]}}'
COMMANDS = 200
DELAYS_S = [number / 10_000 for number in range(31)]  # 0 to 3 ms


class Stream(Protocol):
    """What the servers use of a socket."""

    def sendall(self, data: bytes, /) -> None: ...
    def recv(self, size: int, /) -> bytes: ...
    def shutdown(self, how: int, /) -> None: ...


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


class Doubling:
    """A server that sends each answer twice, the second copy after a delay; the commands' args are their numbers."""

    def __init__(self, delays_s: Sequence[float] = DELAYS_S) -> None:
        self._delays_s = itertools.cycle(delays_s)
        self._lock = threading.Lock()
        self.asked: list[int] = []

    def serve(self, sock: socket.socket) -> None:
        writing = threading.Lock()
        while True:
            number = int(json.loads(read_request(sock).partition(b"\r\n\r\n")[2])["args"])
            answer = an_answer(self.uuid(number))
            with self._lock:
                self.asked.append(number)
                delay_s = next(self._delays_s)
            with writing:
                sock.sendall(answer)
            timer = threading.Timer(delay_s, self._send_again, (sock, writing, answer))
            timer.daemon = True
            timer.start()

    @staticmethod
    def uuid(number: int) -> str:
        return f"00000000-0000-4000-8000-{number:012}"

    @staticmethod
    def _send_again(sock: socket.socket, writing: threading.Lock, answer: bytes) -> None:
        with suppress(OSError), writing:  # the client may have closed the connection
            sock.sendall(answer)


def test_no_command_gets_the_uuid_of_another_whenever_the_second_copy_comes() -> None:
    """Before the next request, while it leaves, or while its answer is awaited."""
    doubling = Doubling()
    with raw_server(doubling.serve) as url, client(url) as asking:
        answers = [asking.execute(command(args=str(number)), NEVER).answer for number in range(COMMANDS)]
    assert len(doubling.asked) == len(set(doubling.asked))
    for number, answer in enumerate(answers):
        assert answer == Cached(doubling.uuid(number)) or isinstance(answer, InDoubt)


def late_copies(answers: Sequence[bytes]) -> Callable[[socket.socket], None]:
    """Return what serves these answers, the last of them for ever.

    On each connection the former answer comes once more as soon as the next request has arrived.
    """
    following = itertools.chain(answers, itertools.repeat(answers[-1]))

    def serve(sock: socket.socket) -> None:
        former = b""
        while True:
            read_request(sock)
            answer = next(following)
            sock.sendall(former + answer)
            former = answer

    return serve


def test_a_uuid_that_was_the_answer_to_another_command_leaves_a_doubt() -> None:
    """The second copy arrived behind the last look at the connection, where nothing else can tell."""
    with raw_server(late_copies([an_answer("u0"), an_answer("u1"), an_answer("u2")])) as url, client(url) as asking:
        answers = [asking.execute(command(), NEVER).answer for _ in range(3)]
    assert answers[0] == Cached("u0")
    assert answers[1] == InDoubt("its answer has the uuid of another command", is_outage=False)
    assert answers[2] == Cached("u2")  # over another connection: on that one the second command's answer was to come


def test_a_command_that_is_answered_with_its_own_uuid_again_is_accepted() -> None:
    wanted = command()
    with raw_server(late_copies([an_answer("u0"), an_answer("u1")])) as url, client(url) as asking:
        assert [asking.execute(wanted, NEVER).answer for _ in range(2)] == [Cached("u0")] * 2


@pytest.mark.parametrize("no", [TOO_MANY, NO], ids=["429", "a refusal"])
def test_an_answer_that_any_command_may_get_is_the_last_on_its_connection(no: bytes) -> None:
    """Its second copy would say of the next command that it was not cached: it would be sent again, or rejected."""
    with raw_server(late_copies([no, an_answer("u")])) as url, client(url) as asking:
        assert isinstance(asking.execute(command(), NEVER).answer, NotSent | Refused)
        assert asking.execute(command(), NEVER).answer == Cached("u")


def test_the_history_of_one_device_is_never_read_for_another() -> None:
    """A second copy of an empty history would say that the next device's command was not cached."""
    with raw_server(late_copies([an_answer("u"), EMPTY, TOO_MANY])) as url, client(url) as asking:
        asking.execute(command(), NEVER)
        assert asking.look_up(command(imei="865820030000002"), just_now(), nobody) == []
        with pytest.raises(HistoryUnreadable, match="429"):
            asking.look_up(command(imei="865820030000003"), just_now(), nobody)


class Inner:
    """The server's side of TLS within TLS, which Python has for sockets of the system alone."""

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


class Idle:
    """A server that sends something over an idle connection when the test says so."""

    def __init__(self, unasked: bytes | None) -> None:
        self._unasked = unasked
        self.may_send = threading.Event()
        self.connections = 0

    def serve(self, sock: Stream) -> None:
        self.connections += 1
        number = self.connections
        read_request(sock)
        sock.sendall(an_answer(f"u{number}"))
        if number == 1:
            assert self.may_send.wait(PATIENCE_S)
            if self._unasked is None:
                sock.shutdown(socket.SHUT_RDWR)
            else:
                sock.sendall(self._unasked)
        with suppress(OSError):
            sock.recv(1)  # returns when the client closes the connection


@pytest.mark.parametrize("unasked", [an_answer("u1"), b"H", None], ids=["an answer", "one byte", "the end"])
@pytest.mark.parametrize("layers", [0, 1, 2], ids=["plain", "TLS", "TLS within a proxy's TLS"])
def test_a_connection_on_which_anything_came_unasked_is_not_used_again(
    layers: int, unasked: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    idle = Idle(unasked)
    opened: list[HTTPConnection] = []
    open_one = Route.open

    def note(route: Route) -> HTTPConnection:
        opened.append(open_one(route))
        return opened[-1]

    monkeypatch.setattr(Route, "open", note)
    context = secure_context(tmp_path, "127.0.0.1")

    def serve(sock: socket.socket) -> None:
        with context.wrap_socket(sock, server_side=True) as secure:
            idle.serve(secure)

    def serve_by_proxy(sock: socket.socket) -> None:
        with context.wrap_socket(sock, server_side=True) as outer:
            read_request(outer)
            outer.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            idle.serve(Inner(outer, context))

    with raw_server([idle.serve, serve, serve_by_proxy][layers]) as url:
        secure_url = url.replace("http:", "https:")
        if layers == 2:
            monkeypatch.setenv("https_proxy", secure_url)
            monkeypatch.delenv("NO_PROXY")
            monkeypatch.delenv("no_proxy")
        with client(secure_url if layers else url, ca_file=str(tmp_path / "ca.pem")) as asking:
            assert asking.execute(command(), NEVER).answer == Cached("u1")
            idle.may_send.set()
            assert select.select([opened[0].sock], [], [], PATIENCE_S)[0]  # it has come
            assert asking.execute(command(), NEVER).answer == Cached("u2")


def test_what_tls_has_decrypted_but_nobody_has_read_yet_came_unasked(tmp_path: Path) -> None:
    """It is in no buffer of the system any more, where a look would find it."""
    context = secure_context(tmp_path, "127.0.0.1")
    connections: list[int] = []

    def serve(sock: socket.socket) -> None:
        with context.wrap_socket(sock, server_side=True) as secure:
            connections.append(1)
            read_request(secure)
            answer = an_answer(f"u{len(connections)}")
            padding = b"X-Padding: " + b"x" * (4096 - len(answer) - 13) + b"\r\n"
            head, _, body = answer.partition(b"\r\n\r\n")
            whole = head + b"\r\n" + padding + b"\r\n" + body
            assert len(whole) == 4096  # as much as is read at once
            secure.sendall(whole + an_answer("another"))  # in one record
            with suppress(OSError):
                secure.recv(1)

    with raw_server(serve) as url:
        with client(url.replace("http:", "https:"), ca_file=str(tmp_path / "ca.pem")) as asking:
            assert [asking.execute(command(), NEVER).answer for _ in range(2)] == [Cached("u1"), Cached("u2")]
