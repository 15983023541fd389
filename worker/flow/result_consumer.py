"""Takes accepted commands whose result is due, and looks each device up once for all of its commands."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from schemas.result import Result
from worker.amqp.broker import Broker
from worker.amqp.messages import Delivery, Publication
from worker.amqp.result_messages import ResultMessages
from worker.core.clock import Clock, utc_now
from worker.core.results import Awaited
from worker.core.uuids import canonical_uuid
from worker.errors import WorkerError
from worker.flow.background import Background
from worker.processing.result_finder import ResultFinder
from worker.telemetry.logs import get_logger
from worker.telemetry.metrics import Metrics

PREFETCH = 500  # messages of about 3 KiB
_LOOKS_AT_ONCE = 4  # of one product
_GATHER_S = 1.0  # what arrives within it for one device is looked up at once; less where the delays are short
_COUNT_INTERVAL_S = 10.0
# What waits for its look is held, and while it is held the broker delivers nothing behind it. So what waits for longer
# goes back to a delay queue: soon where a product fills what is held, later where it does not; that is long before the
# broker closes the channel over what is held (its consumer_timeout of 30 minutes).
_SWEEP_S = 5.0
_PATIENCE_S = 10.0
_LONGEST_WAIT_S = 300.0
_EARLY = timedelta(seconds=0.5)  # not worth another message
_SHARE = 3  # one of so many requests of the rate limit, at most, is a look

Device = tuple[str | None, str]  # product and IMEI

log = get_logger()


class Share:
    """Gives looks a third of the rate limit at most, evenly spaced, so that commands have the rest.

    Args:
        interval_s: seconds between two requests that the rate limit allows.
        acquire: takes one request of a product from the rate limit, and waits until that is allowed.
    """

    def __init__(self, interval_s: float, acquire: Callable[[str | None], Awaitable[None]]) -> None:
        self._interval_s = _SHARE * interval_s
        self._acquire = acquire
        self._loop = asyncio.get_running_loop()
        self._turns: dict[str | None, asyncio.Lock] = {}  # of configured products
        self._next_at: dict[str | None, float] = {}  # on the loop's clock

    async def acquire(self, product: str | None) -> None:
        """Take one request, and wait until that is allowed; who gives up waiting has taken none."""
        async with self._turns.setdefault(product, asyncio.Lock()):
            await asyncio.sleep(self._next_at.get(product, 0.0) - self._loop.time())
            self._next_at[product] = self._loop.time() + self._interval_s
            await self._acquire(product)


@dataclass(slots=True)
class _Waiting:
    """The commands of one device that are due, until their look begins.

    Attributes:
        since: when the first of them came, on the loop's clock.
        look: waits for its turn.
    """

    since: float
    look: "asyncio.Task[object]"
    due: list[tuple[Delivery, Awaited]] = field(default_factory=list)


class ResultConsumer:
    """Deliveries in, results out. Nothing is remembered here of what is not due: it waits in delay queues.

    Args:
        finder: looks at the platform.
        messages: builds the publications.
        broker: settles deliveries.
        queues: in which commands wait.
        metrics: count results.
        delays_s: seconds before each look.
        now: the time, aware; replaced in tests.
    """

    def __init__(
        self,
        finder: ResultFinder,
        messages: ResultMessages,
        broker: Broker,
        queues: Sequence[str],
        metrics: Metrics,
        delays_s: Sequence[int],
        now: Clock = utc_now,
    ) -> None:
        self._finder = finder
        self._messages = messages
        self._broker = broker
        self._queues = queues
        self._metrics = metrics
        self._delay_s = delays_s[0]
        self._now = now
        self._gather_s = min(_GATHER_S, delays_s[0] / 10)
        self._background = Background()
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[Device, _Waiting] = {}  # the first to come first
        self._places: dict[str | None, asyncio.Semaphore] = {}  # of products that were configured once
        self._looks: set[asyncio.Task[object]] = set()
        self._settling: set[asyncio.Task[object]] = set()
        self.outstanding = 0
        """How many commands wait for their result, at the last look at the queues."""

    async def run(self) -> None:
        """Stay connected, and count what waits, until cancelled.

        Raises:
            TopologyMismatch: the broker has exchanges or queues of these names with other arguments.
        """
        await asyncio.gather(self._broker.run(self), self._count(), self._sweep())

    def on_delivery(self, delivery: Delivery) -> None:
        """Take one delivery."""
        awaited = self._messages.read(delivery)
        if awaited is None:
            log.error("result_message_unreadable", hint="only workers may publish to this queue")
            self._background.start(self._broker.settle(delivery, []))
            return
        now = self._now()
        if now < awaited.due_at - _EARLY:
            again = self._messages.later(delivery, awaited, now)
            self._background.start(self._broker.settle(delivery, [again]))
            return
        device = awaited.product, awaited.imei
        if device not in self._waiting:
            self._waiting[device] = _Waiting(self._loop.time(), self._start(self._look(device), self._looks))
        self._waiting[device].due.append((delivery, awaited))

    def on_blocked(self, is_blocked: bool) -> None:
        """Publications wait by themselves while the broker takes none."""

    def on_lost(self) -> None:
        """Forget what was not looked up: the broker delivers it again."""
        self._waiting.clear()
        for look in list(self._looks):
            look.cancel()

    async def stop(self) -> None:
        """Take nothing new, and publish what was found out; the rest is delivered to another worker."""
        with suppress(WorkerError):
            await self._broker.consume(0)
        self.on_lost()
        if self._settling:
            await asyncio.wait(self._settling)

    def abandon(self) -> None:
        """Give up what is in progress: it is delivered again."""
        self._background.cancel()

    async def _count(self) -> None:
        while True:
            ready = await self._broker.count_ready(self._queues)
            self.outstanding = 0 if ready is None else ready + self._broker.unacknowledged
            await asyncio.sleep(_COUNT_INTERVAL_S)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_S)
            self._give_back()

    def _give_back(self) -> None:
        """Return what waits for too long to a delay queue, with no look used up.

        Of a product that fills what is held the newest half goes, so that its looks have enough to go on with.
        """
        now = self._loop.time()
        slow = {product for (product, _), waiting in self._waiting.items() if now - waiting.since > _PATIENCE_S}
        held = sum(len(waiting.due) for waiting in self._waiting.values())
        for device, waiting in reversed(list(self._waiting.items())):
            product, _ = device
            is_crowding = product in slow and held > PREFETCH // 2
            if is_crowding or now - waiting.since > _LONGEST_WAIT_S:
                del self._waiting[device]
                waiting.look.cancel()
                held -= len(waiting.due)
                at = self._now()
                later = [(delivery, awaited, awaited.later(at, self._delay_s)) for delivery, awaited in waiting.due]
                self._start(self._settle_all(later), self._settling)

    async def _look(self, device: Device) -> None:
        product, imei = device
        await asyncio.sleep(self._gather_s)
        async with self._places.setdefault(product, asyncio.Semaphore(_LOOKS_AT_ONCE)):
            due = self._waiting.pop(device).due
            found = await self._finder.find(product, imei, [awaited for _, awaited in due])
        known: set[tuple[str, str, str]] = set()
        settled: list[tuple[Delivery, Awaited, Result | Awaited | None]] = []
        for (delivery, awaited), each in zip(due, found, strict=True):
            key = awaited.command_id, awaited.app_id, canonical_uuid(awaited.uuid)
            is_twin = key in known  # its worker died after it was published again
            known.add(key)
            settled.append((delivery, awaited, None if is_twin else each))
        self._start(self._settle_all(settled), self._settling)

    async def _settle_all(self, settled: Iterable[tuple[Delivery, Awaited, Result | Awaited | None]]) -> None:
        await asyncio.gather(*(self._settle(*each) for each in settled))

    def _start(
        self, coroutine: Coroutine[Any, Any, object], running: "set[asyncio.Task[object]]"
    ) -> "asyncio.Task[object]":
        task = self._background.start(coroutine)
        running.add(task)
        task.add_done_callback(running.discard)
        return task

    async def _settle(self, delivery: Delivery, awaited: Awaited, found: Result | Awaited | None) -> None:
        publications: list[Publication] = []
        if isinstance(found, Result):
            publications = [self._messages.result(delivery, found)]
        elif found is not None:
            publications = [self._messages.later(delivery, found, self._now())]
        if await self._broker.settle(delivery, publications) and isinstance(found, Result):
            self._metrics.count_result(found, awaited.accepted_at)
            log.info(
                "command_result",
                command_id=found.command_id,
                imei=found.imei,
                attempt=awaited.looks + 1,
                app_id=awaited.app_id or None,
                uuid=found.uuid,
                result=found.result,
                confirm_status=found.confirm_status,
            )
