"""Calls to Redis over one connection: all that are made during one round trip share the next (group commit)."""

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

import hiredis
import redis

from worker.idempotency.redis_errors import NotReplicated, is_other_server

_IDLE_S = 1.0  # after which the server may have closed the connection, so that it is checked before it is used


class Script:
    """A Lua script, which Redis knows by its hash."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


class _Call:
    __slots__ = ("answer", "fallback", "is_durable", "packed")

    def __init__(
        self, command: tuple[Any, ...], fallback: tuple[Any, ...] | None = None, *, is_durable: bool = False
    ) -> None:
        self.is_durable = is_durable  # counts only once enough replicas have it
        self.packed = hiredis.pack_command(command)
        self.fallback = fallback  # the command to send if Redis does not know the script
        self.answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def end(self, answer: object) -> None:
        """Give the answer, or the error, to the caller, unless it has one or was cancelled."""
        if self.answer.done():
            return
        if isinstance(answer, redis.RedisError):
            self.answer.set_exception(answer)
        else:
            self.answer.set_result(answer)


class BatchedCalls:
    """Sends calls in batches, one batch after the other, each in one pipeline.

    A call waits for the round trip under way and for its own, never for another one. No call is repeated: one whose
    answer was lost may have been carried out.

    Args:
        connect: returns a new connection of ``redis.asyncio``, for these calls only.
        timeout_s: of a round trip, connecting included. After it the connection is closed: a late answer would be
            taken for that of a later call.
        on_other_server: called when Redis says that another server has to be asked.
        replicas: how many of them must confirm the durable calls of a round trip, with one ``WAIT`` for all of them.
        wait_s: longest wait for them; a round trip may have it twice, where scripts are not known.
    """

    def __init__(
        self,
        connect: Callable[[], Awaitable[Any]],  # redis has no public name for all kinds of its connections
        timeout_s: float,
        on_other_server: Callable[[], object],
        replicas: int = 0,
        wait_s: float = 0.0,
    ) -> None:
        self._connect = connect
        self._connection: Any = None
        self._timeout_s = timeout_s
        self._on_other_server = on_other_server
        self._replicas = replicas
        wait: tuple[Any, ...] = ("WAIT", replicas, round(wait_s * 1000))
        self._packed_wait = hiredis.pack_command(wait)
        self._must_reconnect = False
        self._used_at = 0.0  # monotonic
        self._waiting: list[_Call] = []
        self._sender: asyncio.Task[None] | None = None

    async def run(
        self, script: Script, keys: Sequence[str | bytes], arguments: Sequence[Any], *, is_durable: bool = False
    ) -> Any:
        """Run a script and return its answer.

        Args:
            script: the script.
            keys: all keys that it uses.
            arguments: all others.
            is_durable: it counts only once enough replicas have what it wrote.

        Raises:
            NotReplicated: it ran, and too few replicas have it.
            redis.RedisError: nothing tells whether it ran.
        """
        rest = (len(keys), *keys, *arguments)
        return await self._add(
            _Call(("EVALSHA", script.sha, *rest), ("EVAL", script.text, *rest), is_durable=is_durable)
        )

    async def execute(self, *commands: tuple[Any, ...]) -> list[Any]:
        """Execute commands; returns the answer of each, or its ``redis.RedisError``."""
        return await asyncio.gather(*(self._add(_Call(command)) for command in commands), return_exceptions=True)

    def reconnect(self) -> None:
        """Connect again before the next round trip, which resolves the server's name again."""
        self._must_reconnect = True

    async def close(self) -> None:
        """Close the connection; calls without an answer fail."""
        if self._sender is not None:
            self._sender.cancel()
            await asyncio.wait([self._sender])
            self._end([])  # the sender may not have begun
        await self._disconnect()

    def _add(self, call: _Call) -> asyncio.Future[Any]:
        self._waiting.append(call)
        if self._sender is None:  # it begins in the next turn of the loop, and takes along all calls of this one
            self._sender = asyncio.create_task(self._send_all())
        return call.answer

    async def _send_all(self) -> None:
        calls: list[_Call] = []
        try:
            while self._waiting:
                calls = [call for call in self._waiting if not call.answer.done()]  # done: its caller was cancelled
                self._waiting = []
                try:
                    async with asyncio.timeout(self._timeout_s):
                        await self._make_round_trip(calls)
                except TimeoutError:
                    await self._fail(calls, redis.TimeoutError("no answer in time"))
                except redis.RedisError as exc:
                    await self._fail(calls, exc)
        finally:
            self._end(calls)

    def _end(self, calls: Sequence[_Call]) -> None:
        self._sender = None
        for call in (*calls, *self._waiting):
            call.end(redis.ConnectionError("closed"))
        self._waiting = []

    async def _make_round_trip(self, calls: Sequence[_Call]) -> None:
        if self._must_reconnect or (time.monotonic() - self._used_at > _IDLE_S and await self._is_stale()):
            self._must_reconnect = False
            await self._disconnect()
        if self._connection is None:
            self._connection = await self._connect()
        unknown = await self._exchange(calls)
        if unknown:
            await self._exchange(unknown)
        self._used_at = time.monotonic()

    async def _exchange(self, calls: Sequence[_Call]) -> list[_Call]:
        """Send calls and give each its answer; returns those to send again, which Redis did not run."""
        must_wait = self._replicas > 0 and any(call.is_durable for call in calls)
        await self._connection.send_packed_command(
            [*(call.packed for call in calls), *([self._packed_wait] if must_wait else [])]
        )
        answers = [await self._read() for _ in calls]
        confirmed = await self._read() if must_wait else 0  # an error if the user may not wait
        is_replicated = not must_wait or (isinstance(confirmed, int) and confirmed >= self._replicas)
        cause = confirmed if isinstance(confirmed, redis.ResponseError) else None
        unknown = []
        for call, answer in zip(calls, answers, strict=True):
            if isinstance(answer, redis.exceptions.NoScriptError) and call.fallback is not None:
                call.packed, call.fallback = hiredis.pack_command(call.fallback), None
                unknown.append(call)
            elif isinstance(answer, redis.RedisError):
                self._note_other_server(answer)
                call.end(answer)
            else:
                call.end(NotReplicated(answer, cause) if call.is_durable and not is_replicated else answer)
        return unknown

    async def _read(self) -> Any:
        """Return the next answer, or the error of its call."""
        try:
            return await self._connection.read_response()
        except redis.ResponseError as exc:
            return exc

    async def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.disconnect(nowait=True)

    async def _is_stale(self) -> bool:
        """Tell whether Redis has closed the connection meanwhile."""
        await asyncio.sleep(0)  # so that the loop handles what has arrived
        try:
            return self._connection is not None and bool(await self._connection.can_read_destructive())
        except redis.ConnectionError:
            return True

    async def _fail(self, calls: Iterable[_Call], error: redis.RedisError) -> None:
        """Fail all calls without an answer: each of them may have been carried out."""
        await self._disconnect()
        self._note_other_server(error)
        for call in calls:
            call.end(error)

    def _note_other_server(self, error: redis.RedisError) -> None:
        if is_other_server(error):
            self._on_other_server()
