"""The consumer of results between a model of the broker and a platform, in a model's time: an hour passes at once."""

import asyncio
import itertools
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from heapq import heappop, heappush
from typing import Any, Protocol, TypeVar, cast

from pika import BasicProperties

from schemas.result import Result
from tests.support.model_loop import ModelLoop
from worker.amqp.messages import RESULT_TYPE, Delivery, Publication
from worker.amqp.result_messages import ResultMessages
from worker.amqp.topology import Topology
from worker.core.results import Awaited
from worker.flow.result_consumer import PREFETCH, ResultConsumer

BEGAN = datetime(2026, 11, 22, 8, 0, tzinfo=UTC)
T = TypeVar("T")


class ModelTime:
    """A loop whose time the test passes."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.loop = ModelLoop(self._clock)

    def now(self, _product: str | None = None) -> datetime:
        return BEGAN + timedelta(seconds=self.seconds)

    def make(self, make: Callable[[], T]) -> T:
        """Call what has to be called in the loop."""

        async def made() -> T:
            return make()

        return self.loop.start(made()).result()

    def start(self, coroutine: Any) -> asyncio.Task[Any]:
        return self.loop.start(coroutine)

    def pass_time(self, seconds: float) -> None:
        self.seconds += seconds
        self.loop.run()

    def _clock(self) -> float:
        return self.seconds


class Finder(Protocol):
    """What looks at the platform: the real one, or a double."""

    def was_hindered(self) -> bool: ...

    async def find(self, product: str | None, imei: str, due: Sequence[Awaited]) -> list[Result | Awaited]: ...


class ResultsModel:
    """A result consumer and its broker, which delivers what is due as far as the prefetch allows.

    Args:
        time: the model's.
        finder: looks at the platform.
        delays_s: WORKER_RESULT_DELAYS.
        looks_at_once: how many devices of one product are looked up at once.
    """

    def __init__(self, time: ModelTime, finder: Finder, delays_s: Sequence[int], looks_at_once: int = 4) -> None:
        self.time = time
        self.queue: deque[Awaited] = deque()
        self.held: dict[int, float] = {}  # since when each delivery is held, by tag
        self.longest_s = 0.0
        self.returned: list[Awaited] = []
        self.results: Counter[str] = Counter()
        self._numbers = itertools.count(1)
        self._delayed: list[tuple[float, int, Awaited]] = []  # a heap, by the time in seconds
        self.messages = ResultMessages(Topology("test", (1,), tuple(delays_s)), delays_s, lambda _product: timedelta(0))
        broker = metrics = cast("Any", self)
        self.consumer: ResultConsumer = time.make(
            lambda: ResultConsumer(
                cast("Any", finder), self.messages, broker, [], metrics, delays_s, looks_at_once, time.now
            )
        )
        time.start(self.consumer.run())

    def put(self, commands: Iterable[Awaited]) -> None:
        """Deliver commands whose result is due."""
        self.queue += commands
        self._deliver_soon()

    def accept(self, awaited: Awaited) -> None:
        """Let a command that was just accepted wait for its first look."""
        delivery = Delivery(1, 0, False, BasicProperties(), b"", True)
        self._delay(self.messages.later(delivery, awaited, self.time.now()))

    def pass_time(self, seconds: float, step_s: float = 0.5) -> None:
        """Let time pass, and what was delayed come back."""
        end = self.time.seconds + seconds
        while self.time.seconds < end:
            self.time.pass_time(step_s)
            while self._delayed and self._delayed[0][0] <= self.time.seconds:
                self.queue.append(heappop(self._delayed)[2])
            self._deliver_soon()

    def _delay(self, publication: Publication) -> None:
        [queue_s] = re.findall(r"results\.([0-9]+)s$", publication.routing_key)
        expiration = publication.properties.expiration
        delay_s = min(float(queue_s), float(queue_s) if expiration is None else float(expiration) / 1000)
        awaited = Awaited.model_validate_json(publication.body)
        self.returned.append(awaited)
        heappush(self._delayed, (self.time.seconds + delay_s, next(self._numbers), awaited))

    def _deliver_soon(self) -> None:
        if self.queue:
            self.time.start(self._deliver())

    async def _deliver(self) -> None:
        while self.queue and len(self.held) < PREFETCH:
            tag = next(self._numbers)
            self.held[tag] = self.time.seconds
            body = self.queue.popleft().model_dump_json().encode()
            self.consumer.on_delivery(Delivery(1, tag, False, BasicProperties(), body, True))

    # What the consumer asks of its broker and its metrics.

    async def run(self, _listener: object) -> None:
        await asyncio.Event().wait()  # the connection

    async def count_ready(self, _queues: object) -> int:
        return len(self.queue)

    async def renew_consumer(self) -> None:
        """Do nothing, as without another worker."""

    async def consume(self, _prefetch: int) -> None:
        self.queue.clear()

    @property
    def unacknowledged(self) -> int:
        return len(self.held)

    async def settle(self, delivery: Delivery, publications: Sequence[Publication]) -> bool:
        self.longest_s = max(self.longest_s, self.time.seconds - self.held.pop(delivery.tag))
        for publication in publications:
            if publication.properties.type == RESULT_TYPE:
                self.results[Result.model_validate_json(publication.body).result] += 1
            else:
                self._delay(publication)
        await self._deliver()
        return True

    def count_result(self, _result: Result, _accepted_at: datetime) -> None:
        """Count nothing."""
