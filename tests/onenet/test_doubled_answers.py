"""An answer that a server or a gateway sends twice: its second copy is never the answer to a later command."""

import itertools
import json
import select
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, TypeVar
from uuid import UUID, uuid4
from zoneinfo import ZoneInfo

import pytest
from urllib3.connection import HTTPConnection

from tests.idempotency.test_stores import DOUBT, NOW, U1, U2, complete, held, key, reply
from tests.onenet.test_client import NEVER, an_answer, client, command, just_now, nobody, secure_context
from tests.processing.test_processor import delivery
from tests.support.proxies import raw_server
from tests.support.waiting import PATIENCE_S
from worker.amqp.messages import Delivery, MessageBuilder, Publication
from worker.amqp.topology import Topology
from worker.core.answer import Cached, InDoubt, NotSent, Refused
from worker.core.claims import Assigned, Completed, IdempotencyStore, Key, NoCandidate, Unresolved, Unseen
from worker.core.command import Command, read_command
from worker.core.decide import InDoubtMode, RetryPolicy
from worker.core.doubt import DoubtWindow
from worker.core.platform import Candidate, OwnedByOthers, PlatformClient, Sent
from worker.errors import HistoryUnreadable, LeaseLost, UuidTaken
from worker.idempotency.memory import MemoryStore
from worker.idempotency.redis import RedisStore
from worker.onenet.client import OneNETClient
from worker.onenet.route import Route
from worker.processing.circuit_breaker import CircuitBreakers
from worker.processing.processor import Processor
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


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("0a1b2c3d-0000-4000-8000-00000000abcd", "0A1B2C3D-0000-4000-8000-00000000ABCD"),
        ("0A1B2C3D-0000-4000-8000-00000000ABCD", "{0a1b2c3d000040008000 00000000abcd}"),
        ("Order-7x", "order-7x"),
    ],
)
def test_a_uuid_of_another_command_leaves_a_doubt_however_it_is_written(first: str, second: str) -> None:
    answers = iter([an_answer(first), an_answer(second)])

    def serve(sock: socket.socket) -> None:
        for answer in answers:
            read_request(sock)
            sock.sendall(answer)

    with raw_server(serve) as url, client(url) as asking:
        assert asking.execute(command(), NEVER).answer == Cached(first)
        assert isinstance(asking.execute(command(), NEVER).answer, InDoubt)


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
        assert asking.find_candidates(command(imei="865820030000002"), just_now(), nobody) == []
        with pytest.raises(HistoryUnreadable, match="429"):
            asking.find_candidates(command(imei="865820030000003"), just_now(), nobody)


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


LAYERS = pytest.mark.parametrize("layers", [0, 1, 2], ids=["plain", "TLS", "TLS within a proxy's TLS"])


class Layered:
    """Runs servers behind no TLS, one, or two, and clients of theirs; notes the connections that these open."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened: list[HTTPConnection] = []
        self._context = secure_context(folder, "127.0.0.1")
        self._ca_file = str(folder / "ca.pem")
        self._monkeypatch = monkeypatch
        open_one = Route.open

        def note(route: Route) -> HTTPConnection:
            self.opened.append(open_one(route))
            return self.opened[-1]

        monkeypatch.setattr(Route, "open", note)

    @contextmanager
    def client(self, serve: Callable[[Stream], None], layers: int) -> Iterator[OneNETClient]:
        def serve_tls(sock: socket.socket) -> None:
            with self._context.wrap_socket(sock, server_side=True) as outer:
                if layers == 1:
                    serve(outer)
                else:
                    read_request(outer)
                    outer.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                    serve(Inner(outer, self._context))

        with raw_server(serve_tls if layers else serve) as url:
            if layers == 2:
                self._monkeypatch.setenv("https_proxy", secure(url))
                self._monkeypatch.delenv("NO_PROXY")
                self._monkeypatch.delenv("no_proxy")
            with client(secure(url) if layers else url, ca_file=self._ca_file) as asking:
                yield asking


@pytest.fixture
def layered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Layered:
    return Layered(tmp_path, monkeypatch)


@LAYERS
@pytest.mark.parametrize("unasked", [an_answer("u1"), b"H", None], ids=["an answer", "one byte", "the end"])
def test_a_connection_on_which_anything_came_unasked_is_not_used_again(
    layered: Layered, layers: int, unasked: bytes | None
) -> None:
    idle = Idle(unasked)
    with layered.client(idle.serve, layers) as asking:
        assert asking.execute(command(), NEVER).answer == Cached("u1")
        idle.may_send.set()
        assert select.select([layered.opened[0].sock], [], [], PATIENCE_S)[0]  # it has come
        assert asking.execute(command(), NEVER).answer == Cached("u2")


@LAYERS
def test_a_connection_on_which_nothing_came_unasked_is_used_again(layered: Layered, layers: int) -> None:
    answers = iter([an_answer(f"u{number}") for number in range(5)])

    def serve(sock: Stream) -> None:
        while True:
            read_request(sock)
            sock.sendall(next(answers))

    with layered.client(serve, layers) as asking:
        assert [asking.execute(command(), NEVER).answer for _ in range(5)] == [Cached(f"u{at}") for at in range(5)]
    assert len(layered.opened) == 1


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

    with raw_server(serve) as url, client(secure(url), ca_file=str(tmp_path / "ca.pem")) as asking:
        assert [asking.execute(command(), NEVER).answer for _ in range(2)] == [Cached("u1"), Cached("u2")]


def secure(url: str) -> str:
    return url.replace("http:", "https:")


@pytest.fixture(params=["memory", "redis"])
def store(request: pytest.FixtureRequest) -> Iterator[IdempotencyStore]:
    if request.param == "memory":
        yield MemoryStore(600, 600, began_at=NOW)
        return
    shared = RedisStore(request.getfixturevalue("redis_url"), uuid4().hex, ttl_s=600, lease_s=600, connections=2)
    yield shared
    shared.close()


class Engine:
    """Handles deliveries with a real client and a real store."""

    def __init__(self, asking: PlatformClient, store: IdempotencyStore, in_doubt: InDoubtMode = "reconcile") -> None:
        outgoing = MessageBuilder(Topology("onenet", (5, 30, 60)), "host:1")
        gates = CircuitBreakers([None], 3, 5, clock=lambda: 0.0)
        policy = RetryPolicy((5, 30), 3, 60, in_doubt)
        zone = ZoneInfo("Asia/Shanghai")
        self._handler = Processor(asking, store, outgoing, gates, gates, policy, zone, Metrics("0", 1))

    def handle(self, came: Delivery) -> list[Publication]:
        ends: list[Sequence[Publication] | None] = []
        self._handler.handle(self._handler.read(came, 0), lambda _: True, ends.append)
        [found] = ends
        return list(found or ())

    def rest_of(self, came: Delivery) -> str:
        """Handle a delivery that gets no reply; returns where it rests, and checks that it is in doubt."""
        [copy] = self.handle(came)
        doubt = DoubtWindow.parse(str((copy.properties.headers or {})["x-onenet-in-doubt"]))
        assert doubt.since is not None
        assert doubt.since <= doubt.until <= datetime.now(UTC)
        return copy.routing_key


def test_of_a_platform_that_answers_twice_no_reply_is_wrong(store: IdempotencyStore) -> None:
    doubling = Doubling()
    replies: dict[int, Any] = {}
    with raw_server(doubling.serve) as url, client(url) as asking:
        engine = Engine(asking, store)
        for number in range(COMMANDS):
            came = delivery(command_id=f"command-{number}", args=str(number))
            [publication] = engine.handle(came)
            if publication.exchange == "onenet.replies":
                replies[number] = json.loads(publication.body)
            else:
                assert publication.routing_key == "onenet.execute.retry.60s"
    assert len(doubling.asked) == len(set(doubling.asked))
    assert replies
    for number, told in replies.items():
        assert (told["status"], told["uuid"]) == ("accepted", doubling.uuid(number))


@dataclass
class Fixed:
    """A platform that accepts every command, and answers as it is told."""

    uuids: list[str]

    def knows(self, _product: str | None) -> bool:
        return True

    def execute(self, _command: Command, _not_after: float) -> Sent:
        return Sent(Cached(self.uuids.pop(0)), valid_time_omitted=False)

    def find_candidates(self, _command: Command, _doubt: DoubtWindow, _others: OwnedByOthers) -> list[Candidate]:
        return []


OWN = "00000000-0000-4000-8000-000000000000"


@pytest.mark.parametrize("uuid", [OWN, "42742677"], ids=["a UUID", "of another form"])
@pytest.mark.parametrize("is_alike", [True, False])
def test_a_uuid_that_another_command_owns_is_never_a_reply(store: IdempotencyStore, uuid: str, is_alike: bool) -> None:
    """Whatever told this worker or another one of it: the command settles as if its answer had been lost."""
    engine = Engine(Fixed([uuid, uuid, "its own"]), store)
    [reply] = engine.handle(delivery(command_id="a"))
    assert json.loads(reply.body)["uuid"] == uuid
    other = delivery(command_id="b", args="the same" if is_alike else "another")
    assert engine.rest_of(other) == "onenet.execute.retry.60s"
    assert engine.rest_of(other) == "onenet.execute.retry.60s"  # the record says so as well
    [reply] = engine.handle(delivery(command_id="a"))
    assert json.loads(reply.body)["uuid"] == uuid


@pytest.mark.parametrize("in_doubt", ["dead-letter", "resend"])
def test_in_the_other_modes_it_is_no_reply_either(store: IdempotencyStore, in_doubt: InDoubtMode) -> None:
    engine = Engine(Fixed([OWN, OWN, "its own"]), store, in_doubt)
    engine.handle(delivery(command_id="a"))
    [copy] = engine.handle(delivery(command_id="b"))
    reply, *_ = engine.handle(delivery(command_id="b", headers=copy.properties.headers))
    told = json.loads(reply.body)
    if in_doubt == "resend":
        assert (told["status"], told["uuid"]) == ("accepted", "its own")
    else:
        assert (told["status"], told["error"]["code"]) == ("failed", "outcome_unknown")


def test_resend_stops_at_max_attempts_when_every_answer_has_the_same_uuid(
    store: IdempotencyStore,
) -> None:
    engine = Engine(asking := Fixed([OWN] * 9), store, "resend")
    engine.handle(delivery(command_id="a"))
    published = engine.handle(delivery(command_id="b"))
    while published[0].exchange == "onenet.retry":
        published = engine.handle(delivery(command_id="b", headers=published[0].properties.headers))
    told = json.loads(published[0].body)
    assert (told["status"], told["error"]["code"], told["attempts"]) == ("failed", "outcome_unknown", 3)
    assert len(asking.uuids) == 9 - 1 - 3


def test_a_suspect_that_gets_the_uuid_of_another_is_left_in_doubt_for_its_marked_copy(store: IdempotencyStore) -> None:
    engine = Engine(Fixed([OWN, OWN]), store)
    engine.handle(delivery(command_id="a"))
    long_ago = str(DoubtWindow(NOW, NOW))
    suspect = {"x-onenet-attempt": 1, "x-onenet-in-doubt": long_ago, "x-onenet-unfinished": 0}
    # A record that is in doubt, as a crash leaves it, so that the time of its settling is over.
    task_key = key_of(delivery(command_id="b"))
    claim = store.claim(task_key, NOW)
    assert isinstance(claim, Unseen)
    store.release(claim.hold, DoubtWindow(NOW, NOW), holder_crashed=True)
    assert engine.handle(delivery(command_id="b", headers=suspect)) == []
    assert engine.rest_of(delivery(command_id="b")) == "onenet.execute.retry.60s"


def test_its_own_uuid_is_recorded_again(store: IdempotencyStore) -> None:
    """The worker may end between the choice and the record of it, and a guess is the command's own as well."""
    hold = held(store.claim(key("a"), NOW))
    assert store.own(hold, [OWN], []) == Assigned(OWN)
    complete(store, hold, reply("a", OWN))
    assert store.claim(key("a"), NOW) == Completed(reply("a", OWN))
    store.release(held(store.claim(key("c"), NOW)), DOUBT)
    hold = held(store.claim(key("b"), NOW))
    assert store.own(hold, [U1, U2], []) == Assigned(U1)  # a guess
    complete(store, hold, reply("b", U1))
    assert store.claim(key("b"), NOW) == Completed(reply("b", U1))


def test_a_refused_outcome_leaves_its_doubt_and_frees_the_command_in_one_step(store: IdempotencyStore) -> None:
    complete(store, held(store.claim(key("a"), NOW)), reply("a", OWN))
    hold = held(store.claim(key("b"), NOW))
    with pytest.raises(UuidTaken):
        complete(store, hold, reply("b", OWN))
    with pytest.raises(LeaseLost):
        store.release(hold, None)
    claim = store.claim(key("b"), NOW)
    assert isinstance(claim, Unresolved)
    assert (claim.doubt, claim.holder_crashed) == (DOUBT, False)
    assert store.owned_by_others(key("b"), [OWN]) == {OWN}
    assert store.own(claim.hold, [OWN], []) == NoCandidate()


def test_the_uuids_of_all_accepted_commands_in_memory_are_known() -> None:
    """Those of the older half too, and none that has been forgotten."""
    store = MemoryStore(600, 600, began_at=NOW, max_accepted=10)
    uuids = [str(UUID(int=number)) for number in range(40)]
    for number, uuid in enumerate(uuids):
        complete(store, held(store.claim(unlike(number), NOW)), reply(str(number), uuid))
    for number in range(30, 40):
        with pytest.raises(UuidTaken):
            complete(store, held(store.claim(unlike(100 + number), NOW)), reply(str(100 + number), uuids[number]))
    complete(store, held(store.claim(unlike(200), NOW)), reply("200", uuids[0]))


def unlike(number: int) -> Key:
    return Key(str(number), b"1" * 16, number.to_bytes(16, "little"))


def key_of(came: Delivery) -> Key:
    read = read_command(came.body, None, ZoneInfo("Asia/Shanghai"))
    return Key(read.command_id, read.content_hash(), read.match_key())
