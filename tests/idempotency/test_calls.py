"""Many threads ask Redis in one journey: each gets its own answer, and none travels for the others for ever."""

import queue
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import redis

from tests.support.waiting import PATIENCE_S
from worker.dev.services.redis import LocalRedis
from worker.idempotency.calls import Calls, Script

ECHO = Script("return ARGV[1]")


class Journeys:
    """A connection whose answers come when the test lets them; each command's is its last argument."""

    def __init__(self) -> None:
        self.begun: queue.Queue[int] = queue.Queue()
        self.may_end: queue.Queue[BaseException | None] = queue.Queue()
        self._answers: list[object] = []

    def pack_commands(self, commands: Sequence[Sequence[object]]) -> Sequence[Sequence[object]]:
        return commands

    def send_packed_command(self, commands: Sequence[Sequence[object]]) -> None:
        self._answers = [command[-1] for command in commands]
        self.begun.put(len(commands))
        error = self.may_end.get(timeout=PATIENCE_S)
        if error is not None:
            raise error

    def read_response(self) -> object:
        return self._answers.pop(0)

    def can_read(self) -> bool:
        return False

    def disconnect(self) -> None:
        self._answers = []


class Asking(threading.Thread):
    """Asks once."""

    def __init__(self, calls: Calls, argument: str) -> None:
        super().__init__(daemon=True)
        self.answer: Any = None
        self._calls = calls
        self._argument = argument
        self.start()

    def run(self) -> None:
        try:
            self.answer = self._calls.run(ECHO, [], [self._argument])
        except redis.RedisError as exc:
            self.answer = exc

    def answered(self) -> object:
        self.join(PATIENCE_S)
        assert not self.is_alive()
        return self.answer


def test_whoever_has_its_answer_goes_home_and_another_goes_for_those_who_wait() -> None:
    """Else one command would stand still, with its lease and its device, for as long as there is much to do."""
    journeys = Journeys()
    calls = Calls(journeys)
    first = Asking(calls, "first")
    assert journeys.begun.get(timeout=PATIENCE_S) == 1
    others = [Asking(calls, str(number)) for number in range(8)]
    journeys.may_end.put(None)
    journeys.begun.get(timeout=PATIENCE_S)  # one of the others is on the way, and is not let back yet
    assert first.answered() == "first"
    for _ in others:
        journeys.may_end.put(None)
    assert [other.answered() for other in others] == [str(number) for number in range(8)]


def test_a_journey_that_fails_fails_for_all_that_were_on_it_and_no_others() -> None:
    journeys = Journeys()
    calls = Calls(journeys)
    first = Asking(calls, "first")
    journeys.begun.get(timeout=PATIENCE_S)
    journeys.may_end.put(redis.TimeoutError("too late"))
    assert isinstance(first.answered(), redis.TimeoutError)
    journeys.may_end.put(None)
    assert Asking(calls, "second").answered() == "second"


def test_a_call_that_is_left_where_nobody_is_on_the_way_is_over_when_its_thread_goes_on() -> None:
    journeys = Journeys()
    journeys.may_end.put(None)
    answers: list[object] = []
    Calls(journeys).leave(ECHO, [], ["left"], answers.append)
    assert answers == ["left"]


def test_calls_that_are_left_go_together_even_if_nobody_waits_for_anything() -> None:
    journeys = Journeys()
    calls = Calls(journeys)
    answers: list[object] = []
    first = Asking(calls, "first")
    assert journeys.begun.get(timeout=PATIENCE_S) == 1
    for each in ("one", "two"):
        calls.leave(ECHO, [], [each], answers.append)
    assert not answers  # and this thread does not wait for them
    for _ in range(2):
        journeys.may_end.put(None)
    assert first.answered() == "first"
    assert answers == ["one", "two"]
    assert journeys.begun.get(timeout=PATIENCE_S) == 2


def test_a_call_that_is_left_is_told_that_its_journey_failed() -> None:
    journeys = Journeys()
    error = redis.TimeoutError("too late")
    journeys.may_end.put(error)
    answers: list[object] = []
    Calls(journeys).leave(ECHO, [], ["left"], answers.append)
    assert answers == [error]


@pytest.fixture
def calls(redis_url: str) -> Calls:
    return Calls(redis.Redis.from_url(redis_url, decode_responses=True).connection_pool.make_connection())


def test_a_script_that_redis_does_not_know_yet_is_given_to_it(calls: Calls) -> None:
    new = Script(f"return '{threading.get_ident()}' .. ARGV[1]")
    assert [calls.run(new, [], ["!"]) for _ in range(2)] == [f"{threading.get_ident()}!"] * 2


def test_each_of_many_gets_its_own_answer(calls: Calls) -> None:
    asking = [Asking(calls, str(number)) for number in range(200)]
    assert [each.answered() for each in asking] == [str(number) for number in range(200)]


def test_an_error_in_one_script_is_its_own(calls: Calls) -> None:
    with pytest.raises(redis.ResponseError):
        calls.run(Script("return redis.call('NONSENSE')"), [], [])
    assert calls.run(ECHO, [], ["goes on"]) == "goes on"


def test_a_connection_that_redis_closed_is_made_anew(own_redis: LocalRedis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.idempotency.calls._IDLE_S", 0.0)
    calls = Calls(redis.Redis.from_url(own_redis.url, decode_responses=True).connection_pool.make_connection())
    assert calls.run(ECHO, [], ["before"]) == "before"
    own_redis.kill()
    own_redis.start()
    assert calls.run(ECHO, [], ["after"]) == "after"
