"""A response that a server or a gateway sends twice: its duplicate is never the response to a later request."""

import asyncio
import itertools
import select
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.support.duplicating_server import DuplicatingServer
from tests.support.onenet_client import (
    NEVER,
    InnerTLS,
    Stream,
    accepting_response,
    command,
    current_doubt,
    https,
    none_owned,
    onenet_client,
    read_request,
    server_tls_context,
    use_proxy,
)
from tests.support.proxies import raw_server
from tests.support.waiting import PATIENCE_S, until
from worker.core.answer import Cached, InDoubt, NotSent, Refused
from worker.errors import HistoryUnreadable
from worker.onenet import transport
from worker.onenet.client import OneNETClient
from worker.onenet.tls import TLSLayer

TOO_MANY_REQUESTS = b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 0\r\n\r\n"
REFUSAL = b'HTTP/1.1 200 OK\r\nContent-Length: 34\r\n\r\n{"errno":2001,"error":"no device"}'
EMPTY_HISTORY = b'HTTP/1.1 200 OK\r\nContent-Length: 47\r\n\r\n{"errno":0,"data":{"total_count":0,"items":[]}}'
COMMANDS = 200


async def test_no_command_gets_the_uuid_of_another_whenever_a_duplicate_response_arrives() -> None:
    """Before the next request, while it is sent, or while its response is awaited."""
    server = DuplicatingServer()
    with raw_server(server.serve) as url, onenet_client(url) as client:
        answers = [(await client.execute(command(args=str(number)), NEVER)).answer for number in range(COMMANDS)]
    assert len(server.received) == len(set(server.received))
    for number, answer in enumerate(answers):
        assert answer == Cached(server.uuid(number)) or isinstance(answer, InDoubt)


def delayed_duplicates(responses: Sequence[bytes]) -> Callable[[socket.socket], None]:
    """Return a server of these responses, the last of them repeatedly.

    On each connection the previous response is sent once more as soon as the next request has arrived.
    """
    following = itertools.chain(responses, itertools.repeat(responses[-1]))

    def serve(sock: socket.socket) -> None:
        previous = b""
        while True:
            read_request(sock)
            response = next(following)
            sock.sendall(previous + response)
            previous = response

    return serve


async def test_a_command_that_gets_the_uuid_of_another_is_in_doubt() -> None:
    """The duplicate arrives after the last check of the connection, so that only its uuid tells."""
    server = delayed_duplicates([accepting_response("u0"), accepting_response("u1"), accepting_response("u2")])
    with raw_server(server) as url, onenet_client(url) as client:
        answers = [(await client.execute(command(), NEVER)).answer for _ in range(3)]
    assert answers[0] == Cached("u0")
    assert answers[1] == InDoubt("the response has the uuid of another command", is_outage=False)
    assert answers[2] == Cached("u2")  # over a new connection: the old one still holds the second command's response


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("0a1b2c3d-0000-4000-8000-00000000abcd", "0A1B2C3D-0000-4000-8000-00000000ABCD"),
        ("0A1B2C3D-0000-4000-8000-00000000ABCD", "{0a1b2c3d000040008000 00000000abcd}"),
        ("Order-7x", "order-7x"),
    ],
)
async def test_a_command_that_gets_the_uuid_of_another_in_a_different_spelling_is_in_doubt(
    first: str, second: str
) -> None:
    responses = iter([accepting_response(first), accepting_response(second)])

    def serve(sock: socket.socket) -> None:
        for response in responses:
            read_request(sock)
            sock.sendall(response)

    with raw_server(serve) as url, onenet_client(url) as client:
        assert (await client.execute(command(), NEVER)).answer == Cached(first)
        assert isinstance((await client.execute(command(), NEVER)).answer, InDoubt)


async def test_a_command_that_gets_its_own_uuid_again_is_accepted() -> None:
    wanted = command()
    server = delayed_duplicates([accepting_response("u0"), accepting_response("u1")])
    with raw_server(server) as url, onenet_client(url) as client:
        assert [(await client.execute(wanted, NEVER)).answer for _ in range(2)] == [Cached("u0")] * 2


@pytest.mark.parametrize("response", [TOO_MANY_REQUESTS, REFUSAL], ids=["429", "a refusal"])
async def test_a_connection_is_closed_after_a_response_that_any_command_may_get(response: bytes) -> None:
    """Its duplicate would say that the next command was not cached: it would be sent again, or rejected."""
    server = delayed_duplicates([response, accepting_response("u")])
    with raw_server(server) as url, onenet_client(url) as client:
        assert isinstance((await client.execute(command(), NEVER)).answer, NotSent | Refused)
        assert (await client.execute(command(), NEVER)).answer == Cached("u")


async def test_the_history_of_one_device_is_never_read_for_another() -> None:
    """The duplicate of an empty history would say that the next device's command was not cached."""
    server = delayed_duplicates([accepting_response("u"), EMPTY_HISTORY, TOO_MANY_REQUESTS])
    with raw_server(server) as url, onenet_client(url) as client:
        await client.execute(command(), NEVER)
        assert await client.find_candidates(command(imei="865820030000002"), current_doubt(), none_owned) == []
        with pytest.raises(HistoryUnreadable, match="429"):
            await client.find_candidates(command(imei="865820030000003"), current_doubt(), none_owned)


class UnsolicitedSender:
    """A server that sends bytes over an idle connection, or closes it, when the test says so."""

    def __init__(self, unsolicited: bytes | None) -> None:
        self._unsolicited = unsolicited
        self.may_send = threading.Event()
        self.connections = 0

    def serve(self, sock: Stream) -> None:
        self.connections += 1
        number = self.connections
        read_request(sock)
        sock.sendall(accepting_response(f"u{number}"))
        if number == 1:
            assert self.may_send.wait(PATIENCE_S)
            if self._unsolicited is None:
                sock.shutdown(socket.SHUT_RDWR)
            else:
                sock.sendall(self._unsolicited)
        with suppress(OSError):
            sock.recv(1)  # returns when the client closes the connection


LAYERS = pytest.mark.parametrize("layers", [0, 1, 2], ids=["plain", "TLS", "TLS within a proxy's TLS"])


class TLSLayers:
    """Runs servers behind zero, one or two layers of TLS, with clients for them; records the clients' connections."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened: list[socket.socket] = []
        self._context = server_tls_context(folder, "127.0.0.1")
        self._ca_file = str(folder / "ca.pem")
        self._monkeypatch = monkeypatch

    @contextmanager
    def client(self, serve: Callable[[Stream], None], layers: int) -> Iterator[OneNETClient]:
        def serve_tls(sock: socket.socket) -> None:
            with self._context.wrap_socket(sock, server_side=True) as outer:
                if layers == 1:
                    serve(outer)
                else:
                    read_request(outer)
                    outer.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                    serve(InnerTLS(outer, self._context))

        loop = asyncio.get_running_loop()
        connect = loop.sock_connect

        async def record(sock: socket.socket, address: Any) -> None:
            await connect(sock, address)
            self.opened.append(sock)

        self._monkeypatch.setattr(loop, "sock_connect", record)
        with raw_server(serve_tls if layers else serve) as url:
            if layers == 2:
                use_proxy(self._monkeypatch, "https", https(url))
            with onenet_client(https(url) if layers else url, ca_file=self._ca_file) as client:
                yield client


@pytest.fixture
def tls_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TLSLayers:
    return TLSLayers(tmp_path, monkeypatch)


@LAYERS
@pytest.mark.parametrize("unsolicited", [accepting_response("u1"), b"H", None], ids=["a response", "one byte", "EOF"])
async def test_an_idle_connection_that_received_anything_is_not_reused(
    tls_layers: TLSLayers, layers: int, unsolicited: bytes | None
) -> None:
    server = UnsolicitedSender(unsolicited)
    with tls_layers.client(server.serve, layers) as client:
        assert (await client.execute(command(), NEVER)).answer == Cached("u1")
        server.may_send.set()
        # It has arrived, and the event loop has not looked: only a look at the socket finds it.
        assert select.select([tls_layers.opened[0]], [], [], PATIENCE_S)[0]
        assert (await client.execute(command(), NEVER)).answer == Cached("u2")


@LAYERS
async def test_an_idle_connection_that_received_nothing_is_reused(tls_layers: TLSLayers, layers: int) -> None:
    responses = iter([accepting_response(f"u{number}") for number in range(5)])

    def serve(sock: Stream) -> None:
        while True:
            read_request(sock)
            sock.sendall(next(responses))

    with tls_layers.client(serve, layers) as client:
        assert [(await client.execute(command(), NEVER)).answer for _ in range(5)] == [
            Cached(f"u{at}") for at in range(5)
        ]
    assert len(tls_layers.opened) == 1


async def test_a_connection_with_decrypted_unread_bytes_is_not_reused(tmp_path: Path) -> None:
    """TLS has taken them from the socket, so that a check of the socket would not find them."""
    context = server_tls_context(tmp_path, "127.0.0.1")
    connections: list[int] = []

    def serve(sock: socket.socket) -> None:
        with context.wrap_socket(sock, server_side=True) as secure:
            connections.append(1)
            read_request(secure)
            response = accepting_response(f"u{len(connections)}")
            padding = b"X-Padding: " + b"x" * (4096 - len(response) - 13) + b"\r\n"
            head, _, body = response.partition(b"\r\n\r\n")
            padded = head + b"\r\n" + padding + b"\r\n" + body
            assert len(padded) == 4096  # as many bytes as one read takes
            secure.sendall(padded + accepting_response("another"))  # in one record
            with suppress(OSError):
                secure.recv(1)

    with raw_server(serve) as url, onenet_client(https(url), ca_file=str(tmp_path / "ca.pem")) as client:
        assert [(await client.execute(command(), NEVER)).answer for _ in range(2)] == [Cached("u1"), Cached("u2")]


async def test_a_connection_with_a_part_of_an_encrypted_record_is_not_reused(
    tls_layers: TLSLayers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rest may arrive after the next request was sent, and be taken for the response."""
    may_send = threading.Event()
    layers: list[TLSLayer] = []

    class RecordedLayer(TLSLayer):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            layers.append(self)

    monkeypatch.setattr(transport, "TLSLayer", RecordedLayer)
    connections: list[int] = []

    def serve(sock: Stream) -> None:
        assert isinstance(sock, ssl.SSLSocket)
        connections.append(1)
        read_request(sock)
        sock.sendall(accepting_response(f"u{len(connections)}"))
        if len(connections) == 1:
            assert may_send.wait(PATIENCE_S)
            socket.socket.sendall(sock, b"\x17\x03\x03\x01\x00")  # the beginning of a record of 256 bytes
        with suppress(OSError):
            sock.recv(1)

    with tls_layers.client(serve, 1) as client:
        assert (await client.execute(command(), NEVER)).answer == Cached("u1")
        may_send.set()
        await until(lambda: layers[0].has_part_of_a_record)  # the event loop has taken it from the socket
        assert (await client.execute(command(), NEVER)).answer == Cached("u2")
