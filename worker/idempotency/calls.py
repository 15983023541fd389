"""Scripts called in Redis by many threads, all that are wanted at a time in one journey.

A thread that finds nobody on the way goes; those that come meanwhile wait, or leave their call and do something else,
and one of them goes for all when the first is back. The fewer journeys and the fewer waits, the fewer calls to the
system, at each of which the interpreter changes hands.
"""

import hashlib
import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import redis

from worker.idempotency.redis_errors import is_other_server

_IDLE_S = 1.0  # after which a connection may have been closed, so that it is looked at before it is used


class Script:
    """A Lua script, which Redis knows by its hash."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


class _Call:
    __slots__ = ("answer", "arguments", "bell", "is_answered", "on_answer", "script")

    def __init__(
        self, script: Script, keys: Sequence[str], arguments: Sequence[Any], on_answer: Callable[[Any], object] | None
    ) -> None:
        self.script = script
        self.arguments = (len(keys), *keys, *arguments)
        self.on_answer = on_answer  # None: somebody waits for the bell
        self.answer: Any = None
        self.is_answered = False
        self.bell = threading.Lock()  # rings when it is answered, or when it is its turn to go
        self.bell.acquire()


class Calls:
    """Calls scripts; thread-safe.

    Args:
        connection: what to call them over, by nobody else.
        on_other_server: is told when Redis says that another server has to be asked.
    """

    def __init__(
        self,
        connection: Any,  # redis has no public name for all of its kinds
        on_other_server: Callable[[], object] = lambda: None,
    ) -> None:
        self._connection = connection
        self._on_other_server = on_other_server
        self._must_renew = False
        self._used_at = math.inf  # monotonic; as long as there is no connection, never
        self._lock = threading.Lock()
        self._waiting: list[_Call] = []
        self._is_somebody_on_the_way = False

    def run(self, script: Script, keys: Sequence[str], arguments: Sequence[Any]) -> Any:
        """Call a script and return its answer.

        Raises:
            redis.RedisError: nothing tells whether it ran.
        """
        call = _Call(script, keys, arguments, None)
        if self._is_taken_along(call):
            call.bell.acquire()
        if not call.is_answered:
            self._go()
        if isinstance(call.answer, redis.RedisError):
            raise call.answer
        return call.answer

    def leave(
        self, script: Script, keys: Sequence[str], arguments: Sequence[Any], on_answer: Callable[[Any], object]
    ) -> None:
        """Have a script called by whoever is the next to go.

        Args:
            script: what to call.
            keys: its KEYS.
            arguments: its ARGV.
            on_answer: is told the answer, or the ``redis.RedisError``, by the thread that went: this one, before it
                returns, or another. It must not call any script itself.
        """
        if not self._is_taken_along(_Call(script, keys, arguments, on_answer)):
            self._go()

    def renew(self) -> None:
        """Connect anew before the next journey; the thread that is on the way has the connection to itself."""
        self._must_renew = True

    def close(self) -> None:
        """Close the connection."""
        self._connection.disconnect()

    def _is_taken_along(self, call: _Call) -> bool:
        """Tell whether another thread sees to a call; otherwise this one has to go."""
        with self._lock:
            self._waiting.append(call)
            is_somebody_on_the_way, self._is_somebody_on_the_way = self._is_somebody_on_the_way, True
        return is_somebody_on_the_way

    def _go(self) -> None:
        """Take along all that waits, and have another go for the rest: each goes once, for its own call.

        Where nobody waits for the rest this thread goes again, until somebody does.
        """
        has_to_go = True
        while has_to_go:
            with self._lock:
                calls, self._waiting = self._waiting, []
            answers: list[Any] = [redis.ConnectionError("the journey was broken off")] * len(calls)
            try:
                answers = self._ask(calls)
            except redis.RedisError as exc:  # for one of them as for all: what was sent may have run
                self._connection.disconnect()
                self._used_at = math.inf
                answers = [exc] * len(calls)
            finally:
                is_elsewhere = any(map(is_other_server, answers))
                self._must_renew |= is_elsewhere
                for call, answer in zip(calls, answers, strict=True):
                    call.answer, call.is_answered = answer, True
                    call.bell.release()
                with self._lock:
                    self._is_somebody_on_the_way = bool(self._waiting)
                    others = (call for call in self._waiting if call.on_answer is None)
                    following = next(others, None)
                    has_to_go = self._is_somebody_on_the_way and following is None
                if following is not None:
                    following.bell.release()
            if is_elsewhere:
                self._on_other_server()
            for call in calls:
                if call.on_answer is not None:
                    call.on_answer(call.answer)

    def _ask(self, calls: Sequence[_Call]) -> list[Any]:
        must_renew, self._must_renew = self._must_renew, False
        if must_renew or (time.monotonic() - self._used_at > _IDLE_S and self._is_stale()):
            self._connection.disconnect()  # which makes it connect again
        wanted = [("EVALSHA", call.script.sha, *call.arguments) for call in calls]
        self._connection.send_packed_command(self._connection.pack_commands(wanted))
        answers = [self._read() for _ in calls]
        for number, answer in enumerate(answers):
            if isinstance(answer, redis.exceptions.NoScriptError):  # it did not run: Redis does not know it yet
                self._connection.send_command("EVAL", calls[number].script.text, *calls[number].arguments)
                answers[number] = self._read()
        self._used_at = time.monotonic()
        return answers

    def _is_stale(self) -> bool:
        """Tell whether Redis has closed the connection meanwhile."""
        try:
            return bool(self._connection.can_read())  # nobody has asked for anything
        except redis.ConnectionError:
            return True

    def _read(self) -> Any:
        try:
            return self._connection.read_response()
        except redis.ResponseError as exc:
            return exc
