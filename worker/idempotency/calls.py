"""Scripts called in Redis by many threads, all that are wanted at a time in one journey.

A thread that finds nobody on the way goes; those that come meanwhile wait, and one of them goes for all when the first
is back. The fewer journeys, the fewer calls to the system, at each of which the interpreter changes hands.
"""

import hashlib
import math
import threading
import time
from collections.abc import Sequence
from typing import Any

import redis

_IDLE_S = 1.0  # after which a connection may have been closed, so that it is looked at before it is used


class Script:
    """A Lua script, which Redis knows by its hash."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


class _Call:
    __slots__ = ("answer", "arguments", "bell", "is_answered", "script")

    def __init__(self, script: Script, arguments: tuple[Any, ...]) -> None:
        self.script = script
        self.arguments = arguments
        self.answer: Any = None
        self.is_answered = False
        self.bell = threading.Lock()  # rings when it is answered, or when it is its turn to go
        self.bell.acquire()


class Calls:
    """Calls scripts; thread-safe.

    Args:
        connection: what to call them over, by nobody else.
    """

    def __init__(self, connection: Any) -> None:  # redis has no public name for all of its kinds
        self._connection = connection
        self._used_at = math.inf  # monotonic; as long as there is no connection, never
        self._lock = threading.Lock()
        self._waiting: list[_Call] = []
        self._is_somebody_on_the_way = False

    def run(self, script: Script, keys: Sequence[str], arguments: Sequence[Any]) -> Any:
        """Call a script and return its answer.

        Raises:
            redis.RedisError: nothing tells whether it ran.
        """
        call = _Call(script, (len(keys), *keys, *arguments))
        with self._lock:
            self._waiting.append(call)
            has_to_wait = self._is_somebody_on_the_way
            self._is_somebody_on_the_way = True
        if has_to_wait:
            call.bell.acquire()
        if not call.is_answered:
            self._go()
        if isinstance(call.answer, redis.RedisError):
            raise call.answer
        return call.answer

    def close(self) -> None:
        """Close the connection."""
        self._connection.disconnect()

    def _go(self) -> None:
        """Take along all that waits, and have the next one go, if there is one: each goes once, for its own call."""
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
            for call, answer in zip(calls, answers, strict=True):
                call.answer, call.is_answered = answer, True
                call.bell.release()
            with self._lock:
                self._is_somebody_on_the_way = bool(self._waiting)
                if self._waiting:
                    self._waiting[0].bell.release()

    def _ask(self, calls: Sequence[_Call]) -> list[Any]:
        if time.monotonic() - self._used_at > _IDLE_S and self._is_stale():
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
