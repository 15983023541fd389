"""Calls to Redis share round trips: each gets its own answer, waits for two of them at most, and is never repeated."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import pytest
import redis

from tests.support.stores import LONG_S, NOW, U1, U, complete, held, key, reply
from tests.support.waiting import PATIENCE_S, until
from worker.core.claims import Completed, KnownNotSent
from worker.core.redis_address import RedisAddress
from worker.dev.services.redis import LocalRedis
from worker.errors import StoreUnavailable
from worker.idempotency.latest_address import LatestAddress
from worker.idempotency.redis import RedisStore
from worker.idempotency.redis_server import RedisServer
from worker.idempotency.round_trips import BatchedCalls, Script

ECHO = Script("return ARGV[1]")
COUNT = Script("return redis.call('INCR', KEYS[1])")


class Gate:
    """A proxy in front of Redis that holds back requests or answers until the test lets them pass."""

    def __init__(self, url: str) -> None:
        target = urlsplit(url)
        self._target = (str(target.hostname), target.port or 6379)
        self._writers: list[asyncio.StreamWriter] = []
        self._pumps: set[asyncio.Task[None]] = set()
        self.holds_requests = self.holds_answers = False
        self._requests: list[tuple[asyncio.StreamWriter, bytes]] = []
        self._answers: list[tuple[asyncio.StreamWriter, bytes]] = []

    async def open(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port: int = self._server.sockets[0].getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"

    def waiting(self) -> int:
        """Return the number of scripts in the requests that are held back."""
        return sum(data.count(b"EVAL") for _, data in self._requests)

    def is_holding(self) -> bool:
        """Tell whether requests or answers are held back."""
        return bool(self._requests or self._answers)

    def let_pass(self) -> None:
        """Forward what is held back; what comes later is still held back."""
        held_back = [*self._requests, *self._answers]
        self._requests, self._answers = [], []
        for writer, data in held_back:
            writer.write(data)

    def cut(self) -> None:
        """Reset every connection."""
        for writer in self._writers:
            writer.transport.abort()
        self._requests, self._answers = [], []

    async def close(self) -> None:
        self._server.close()
        self.cut()
        await asyncio.wait(self._pumps)

    async def _accept(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        server, to_server = await asyncio.open_connection(*self._target)
        self._writers += [to_client, to_server]
        for source, target, is_request in ((client, to_server, True), (server, to_client, False)):
            self._pumps.add(asyncio.create_task(self._pump(source, target, is_request=is_request)))

    async def _pump(self, source: asyncio.StreamReader, target: asyncio.StreamWriter, *, is_request: bool) -> None:
        with suppress(ConnectionError):
            while data := await source.read(65536):
                if self.holds_requests if is_request else self.holds_answers:
                    (self._requests if is_request else self._answers).append((target, data))
                else:
                    target.write(data)
        target.close()


@pytest.fixture
async def gate(redis_url: str) -> AsyncIterator[Gate]:
    made = Gate(redis_url)
    await made.open()
    yield made
    await made.close()


Connect = Callable[..., BatchedCalls]


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    """Makes connections to a URL."""
    made: list[BatchedCalls] = []

    def to(url: str, timeout_s: float = PATIENCE_S) -> BatchedCalls:
        server = RedisServer(LatestAddress(RedisAddress.parse(url)), timeout_s, lambda _identity: None)
        made.append(BatchedCalls(server.connect, timeout_s, lambda: None))
        return made[-1]

    yield to
    for calls in made:
        await calls.close()


@pytest.fixture
async def calls(connect: Connect, gate: Gate) -> BatchedCalls:
    """Calls over a connection that exists, whose requests are held back from now on."""
    made = connect(gate.url)
    await made.run(ECHO, [], ["connected"])
    gate.holds_requests = True
    return made


@pytest.fixture
async def store(gate: Gate) -> AsyncIterator[RedisStore]:
    made = RedisStore(gate.url, uuid4().hex, ttl_s=60, lease_s=LONG_S)
    yield made
    await made.close()


def start(*calls: Awaitable[Any]) -> "asyncio.Future[list[Any]]":
    """Make calls in the next turn of the loop; their errors are among the answers."""
    return asyncio.gather(*calls, return_exceptions=True)


def echoes(calls: BatchedCalls, *texts: str) -> "asyncio.Future[list[Any]]":
    return start(*(calls.run(ECHO, [], [text]) for text in texts))


async def test_calls_of_one_turn_of_the_loop_share_one_round_trip(calls: BatchedCalls, gate: Gate) -> None:
    texts = [str(number) for number in range(20)]
    answers = echoes(calls, *texts)
    await until(lambda: gate.waiting() == 20)  # before any of them is answered
    gate.let_pass()
    assert await answers == texts


async def test_calls_that_are_made_during_a_round_trip_share_the_next(calls: BatchedCalls, gate: Gate) -> None:
    """Each of them waits for the round trip under way and for its own, however many calls there are."""
    first = echoes(calls, "first")
    await until(lambda: gate.waiting() == 1)
    second = echoes(calls, *"abcdefgh")
    await asyncio.sleep(0)
    gate.let_pass()
    assert await first == ["first"]
    await until(lambda: gate.waiting() == 8)
    third = echoes(calls, "x", "y")
    await asyncio.sleep(0)
    gate.let_pass()
    assert await second == list("abcdefgh")
    await until(lambda: gate.waiting() == 2)
    gate.let_pass()
    assert await third == ["x", "y"]


async def test_outcomes_and_claims_that_come_during_a_round_trip_are_recorded_with_the_next(
    store: RedisStore, gate: Gate
) -> None:
    leases = [held(await store.claim(key(command_id), NOW)) for command_id in "abc"]
    gate.holds_requests = True
    first = start(store.claim(key("d"), NOW))
    await until(lambda: gate.waiting() == 1)
    second = start(
        complete(store, leases[0], reply("a", U)),
        complete(store, leases[1], reply("b", U1)),
        store.release(leases[2], None),
        store.claim(key("e"), NOW),
    )
    await asyncio.sleep(0)
    gate.let_pass()
    await first
    await until(lambda: gate.waiting() == 4)
    gate.holds_requests = False
    gate.let_pass()
    assert (await second)[:3] == [None] * 3
    assert await store.claim(key("b"), NOW) == Completed(reply("b", U1))
    assert isinstance(await store.claim(key("c"), NOW), KnownNotSent)


async def test_a_ping_does_not_wait_for_a_round_trip_of_commands(store: RedisStore, gate: Gate) -> None:
    gate.holds_requests = True
    claim = start(store.claim(key("a"), NOW))
    await until(gate.is_holding)
    gate.holds_requests = False
    await store.ping()
    assert not claim.done()
    gate.let_pass()
    await claim


async def test_each_of_many_calls_gets_its_own_answer(connect: Connect, redis_url: str) -> None:
    calls = connect(redis_url)
    texts = [str(number) * 100 for number in range(200)]
    assert await echoes(calls, *texts) == texts


async def test_a_call_that_is_cancelled_before_it_leaves_is_not_sent(calls: BatchedCalls, gate: Gate) -> None:
    first = echoes(calls, "first")
    await until(lambda: gate.waiting() == 1)
    cancelled = asyncio.create_task(calls.run(ECHO, [], ["cancelled"]))
    second = echoes(calls, "second")
    await asyncio.sleep(0)
    cancelled.cancel()
    gate.let_pass()
    await first
    await until(lambda: gate.waiting() == 1)
    gate.let_pass()
    assert await second == ["second"]


async def test_a_call_that_is_cancelled_under_way_leaves_the_others_their_answers(
    calls: BatchedCalls, gate: Gate
) -> None:
    cancelled = asyncio.create_task(calls.run(ECHO, [], ["cancelled"]))
    others = echoes(calls, "a", "b")
    await until(lambda: gate.waiting() == 3)
    cancelled.cancel()
    gate.let_pass()
    assert await others == ["a", "b"]
    assert cancelled.cancelled()


async def test_calls_whose_connection_is_cut_fail_and_are_not_repeated(
    connect: Connect, gate: Gate, redis_url: str
) -> None:
    """Redis has run them, and their answers are lost: a second run could grant a claim to nobody."""
    calls = connect(gate.url)
    name = f"test-{uuid4()}"
    await calls.run(COUNT, [name], [])
    gate.holds_answers = True
    under_way = start(*(calls.run(COUNT, [name], []) for _ in range(3)))
    await until(gate.is_holding)
    waiting = start(calls.run(COUNT, [name], []))
    await asyncio.sleep(0)
    gate.cut()
    assert [type(error) for error in await under_way] == [redis.ConnectionError] * 3
    gate.holds_answers = False
    gate.let_pass()
    assert await waiting == [5]  # over a new connection, after the four that were run
    assert await connect(redis_url).execute(("GET", name), ("DEL", name)) == ["5", 1]


async def test_a_store_whose_connection_is_cut_is_unavailable_to_the_calls_under_way_only(
    store: RedisStore, gate: Gate
) -> None:
    lease = held(await store.claim(key("a"), NOW))
    gate.holds_requests = True
    under_way = start(store.release(lease, None), store.claim(key("b"), NOW))
    await until(lambda: gate.waiting() == 2)
    gate.holds_requests = False
    gate.cut()
    assert [type(error) for error in await under_way] == [StoreUnavailable] * 2
    await complete(store, lease, reply("a", U))  # the release was never run


async def test_an_answer_that_comes_too_late_is_not_read_by_a_later_call(connect: Connect, gate: Gate) -> None:
    calls = connect(gate.url, timeout_s=0.3)

    async def answer_in_time(text: str) -> object:
        while True:  # a slow machine may need longer to connect
            [answer] = await echoes(calls, text)
            if not isinstance(answer, redis.TimeoutError):
                return answer

    assert await answer_in_time("before") == "before"
    gate.holds_answers = True
    [late] = await echoes(calls, "late")
    assert isinstance(late, redis.TimeoutError)
    await until(gate.is_holding)
    gate.holds_answers = False
    gate.let_pass()
    assert await answer_in_time("after") == "after"


async def test_only_scripts_that_redis_does_not_know_are_sent_as_text(connect: Connect, own_redis: LocalRedis) -> None:
    calls = connect(own_redis.url)
    await calls.run(ECHO, [], ["known"])
    new = [Script(f"return '{uuid4()}' .. ARGV[1]") for _ in range(2)]
    with redis.Redis.from_url(own_redis.url) as raw:
        raw.config_resetstat()
        answers = await start(*(calls.run(script, [], [str(turn)]) for script in (ECHO, *new) for turn in range(2)))
        assert [answer[-1] for answer in answers] == ["0", "1"] * 3
        stats: Any = raw.info("commandstats")
    assert (stats["cmdstat_evalsha"]["calls"], stats["cmdstat_eval"]["calls"]) == (6, 4)
    assert await start(calls.run(new[0], [], ["!"])) == [f"{answers[2][:-1]}!"]


async def test_an_error_of_one_script_is_its_own(connect: Connect, redis_url: str) -> None:
    calls = connect(redis_url)
    failing = calls.run(Script("return redis.call('NONSENSE')"), [], [])
    no_text = calls.run(ECHO, [], [object()])
    error, type_error, answer = await start(failing, no_text, calls.run(ECHO, [], ["goes on"]))
    assert isinstance(error, redis.ResponseError)
    assert isinstance(type_error, TypeError)
    assert answer == "goes on"


async def test_an_idle_connection_that_redis_has_closed_is_replaced_before_it_is_used(
    connect: Connect, own_redis: LocalRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.idempotency.round_trips._IDLE_S", 0.0)
    calls = connect(own_redis.url)
    assert await calls.run(ECHO, [], ["before"]) == "before"
    await asyncio.to_thread(own_redis.kill)
    await asyncio.to_thread(own_redis.start)
    assert await calls.run(ECHO, [], ["after"]) == "after"


async def test_calls_without_an_answer_fail_when_the_connection_is_closed(calls: BatchedCalls, gate: Gate) -> None:
    under_way = echoes(calls, "under way")
    await until(lambda: gate.waiting() == 1)
    waiting = echoes(calls, "waiting")
    await asyncio.sleep(0)
    await calls.close()
    assert [type(error) for error in await under_way + await waiting] == [redis.ConnectionError] * 2
