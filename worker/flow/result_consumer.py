"""Takes accepted commands whose result is due, and looks each device up once for all of its commands."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from datetime import timedelta

from schemas.result import Result
from worker.amqp.broker import Broker
from worker.amqp.messages import Delivery, Publication
from worker.amqp.result_messages import ResultMessages
from worker.core.claims import IdempotencyStore
from worker.core.clock import utc_now
from worker.core.results import Awaited
from worker.core.uuids import canonical_uuid
from worker.errors import StoreError, WorkerError
from worker.flow.background import Background
from worker.processing.result_finder import ResultFinder
from worker.telemetry.logs import get_logger
from worker.telemetry.metrics import Metrics

PREFETCH = 500  # messages of about 3 KiB
_LOOKS_AT_ONCE = 4  # of one product
_GATHER_S = 1.0  # what arrives within it for one device is looked up at once; less where the delays are short
_COUNT_INTERVAL_S = 10.0
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
        self._next_at: dict[str | None, float] = {}  # on the loop's clock

    async def acquire(self, product: str | None) -> None:
        """Take one request, and wait until that is allowed."""
        now = self._loop.time()
        allowed_at = max(now, self._next_at.get(product, now))
        self._next_at[product] = allowed_at + self._interval_s
        await asyncio.sleep(allowed_at - now)
        await self._acquire(product)


class ResultConsumer:
    """Deliveries in, results out. Nothing is remembered here of what is not due: it waits in delay queues.

    Args:
        finder: looks at the platform.
        messages: builds the publications.
        broker: settles deliveries.
        queues: in which commands wait.
        store: records results.
        metrics: count results.
        delays_s: seconds before each look.
    """

    def __init__(
        self,
        finder: ResultFinder,
        messages: ResultMessages,
        broker: Broker,
        queues: Sequence[str],
        store: IdempotencyStore,
        metrics: Metrics,
        delays_s: Sequence[int],
    ) -> None:
        self._finder = finder
        self._messages = messages
        self._broker = broker
        self._queues = queues
        self._store = store
        self._metrics = metrics
        self._delay_s = delays_s[0]
        self._gather_s = min(_GATHER_S, delays_s[0] / 10)
        self._background = Background()
        self._due: dict[Device, list[tuple[Delivery, Awaited]]] = {}
        self._places: dict[str | None, asyncio.Semaphore] = {}
        self._looks: set[asyncio.Task[object]] = set()
        self.outstanding = 0
        """How many commands wait for their result, at the last look at the queues."""

    async def run(self) -> None:
        """Stay connected, and count what waits, until cancelled.

        Raises:
            TopologyMismatch: the broker has exchanges or queues of these names with other arguments.
        """
        await asyncio.gather(self._broker.run(self), self._count())

    def on_delivery(self, delivery: Delivery) -> None:
        """Take one delivery."""
        awaited = self._messages.read(delivery)
        if awaited is None:
            log.error("result_message_unreadable", hint="only workers may publish to this queue")
            self._background.start(self._broker.settle(delivery, []))
            return
        now = utc_now()
        if now < awaited.due_at - _EARLY:
            again = self._messages.later(delivery, awaited, now)
            self._background.start(self._broker.settle(delivery, [again]))
            return
        device = awaited.product, awaited.imei
        if device not in self._due:
            self._due[device] = []
            self._looks.add(task := self._background.start(self._look(device)))
            task.add_done_callback(self._looks.discard)
        self._due[device].append((delivery, awaited))

    def on_blocked(self, is_blocked: bool) -> None:
        """Publications wait by themselves while the broker takes none."""

    def on_lost(self) -> None:
        """Forget what was not looked up: the broker delivers it again."""
        self._due.clear()

    async def stop(self) -> None:
        """Take nothing new, and finish the looks that have begun; the rest is delivered to another worker."""
        with suppress(WorkerError):
            await self._broker.consume(0)
        self._due.clear()
        if self._looks:
            await asyncio.wait(self._looks)

    def abandon(self) -> None:
        """Give up what is in progress: it is delivered again."""
        self._background.cancel()

    async def _count(self) -> None:
        while True:
            ready = await self._broker.count_ready(self._queues)
            self.outstanding = 0 if ready is None else ready + self._broker.unacknowledged
            await asyncio.sleep(_COUNT_INTERVAL_S)

    async def _look(self, device: Device) -> None:
        product, imei = device
        await asyncio.sleep(self._gather_s)
        async with self._places.setdefault(product, asyncio.Semaphore(_LOOKS_AT_ONCE)):
            due = self._due.pop(device, [])
            if not due:
                return  # the session was lost
            found = await self._finder.find(product, imei, [awaited for _, awaited in due])
        known: set[tuple[str, str, str]] = set()
        settling = []
        for (delivery, awaited), each in zip(due, found, strict=True):
            key = awaited.command_id, delivery.envelope.app_id, canonical_uuid(awaited.uuid)
            is_twin = key in known  # its worker died after it was published again
            known.add(key)
            settling.append(self._settle(delivery, awaited, None if is_twin else each))
        await asyncio.gather(*settling)

    async def _settle(self, delivery: Delivery, awaited: Awaited, found: Result | Awaited | None) -> None:
        result: Result | None = None
        publications: list[Publication] = []
        now = utc_now()
        if isinstance(found, Result):
            try:
                result = await self._store.first_result(delivery.envelope.app_id, found)
                publications = [self._messages.result(delivery, result)]
            except StoreError:
                found = awaited.later(now, self._delay_s)
        if isinstance(found, Awaited):
            publications = [self._messages.later(delivery, found, now)]
        if await self._broker.settle(delivery, publications) and result is not None:
            self._metrics.count_result(result, awaited.accepted_at)
            log.info(
                "command_result",
                command_id=result.command_id,
                imei=result.imei,
                attempt=awaited.looks + 1,
                app_id=delivery.envelope.app_id or None,
                uuid=result.uuid,
                result=result.result,
                confirm_status=result.confirm_status,
            )
