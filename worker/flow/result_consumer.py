"""Takes accepted commands whose result is due, and looks each device up once for all of its commands."""

import asyncio
from collections.abc import Coroutine, Iterable, Sequence
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
_GATHER_S = 1.0  # what arrives within it for one device is looked up at once; less where the delays are short
_COUNT_INTERVAL_S = 10.0
# Messages that wait for a look are held, and with a full prefetch the broker delivers nothing more. So they go back to
# a delay queue: soon if their product fills the prefetch, otherwise later, but long before the broker closes the
# channel over messages that are held (its consumer_timeout of 30 minutes).
_SWEEP_S = 5.0
_PATIENCE_S = 10.0
_LONGEST_WAIT_S = 300.0
# A worker that cannot look lets another one take the queue as often. Rarely enough for looks that hang.
_HAND_OVER_S = 30.0
_SHORTEST_WAIT = timedelta(seconds=0.5)  # less is not worth another message

Device = tuple[str | None, str]  # product and IMEI

log = get_logger()


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
        looks_at_once: how many devices of one product are looked up at once.
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
        looks_at_once: int,
        now: Clock = utc_now,
    ) -> None:
        self._finder = finder
        self._messages = messages
        self._broker = broker
        self._queues = queues
        self._metrics = metrics
        self._delay_s = delays_s[0]
        self._longest_delay_s = max(delays_s)
        self._looks_at_once = looks_at_once
        self._is_stopping = False
        self._now = now
        self._gather_s = min(_GATHER_S, delays_s[0] / 10)
        self._background = Background()
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[Device, _Waiting] = {}  # the first to come first
        self._places: dict[str | None, asyncio.Semaphore] = {}  # of products that were configured once
        self._looking: dict[Device, asyncio.Event] = {}  # at which devices, until the look has ended
        self._looks: set[asyncio.Task[object]] = set()
        self._settling: set[asyncio.Task[object]] = set()
        self.outstanding = 0
        """How many commands wait for their result, in the queues and held here, at the last look at the queues."""

    async def run(self) -> None:
        """Stay connected, and count what waits, until cancelled.

        Raises:
            TopologyMismatch: the broker has exchanges or queues of these names with other arguments.
        """
        await asyncio.gather(self._broker.run(self), self._count(), self._sweep(), self._hand_over())

    def on_delivery(self, delivery: Delivery) -> None:
        """Take one delivery."""
        awaited = self._messages.read(delivery)
        if awaited is None:
            self._set_aside(delivery)
            return
        now = self._now()
        if awaited.due_at - now > _SHORTEST_WAIT:
            again = self._messages.later(delivery, awaited, now)
            self._background.start(self._broker.settle(delivery, [again]))
            return
        device = awaited.product, awaited.imei
        if device not in self._waiting:
            self._waiting[device] = _Waiting(self._loop.time(), self._start(self._look(device), self._looks))
        self._waiting[device].due.append((delivery, awaited))

    def on_blocked(self, is_blocked: bool) -> None:
        """Take nothing new while the broker takes no publications: every result would have to wait here."""
        if not self._is_stopping:
            self._background.start(self._consume(0 if is_blocked else PREFETCH))

    def on_lost(self) -> None:
        """Drop the deliveries of the lost session: the broker delivers them again."""
        self._waiting.clear()
        for look in list(self._looks):
            look.cancel()

    async def stop(self) -> None:
        """Take nothing new, and publish what was found out; the rest is delivered to another worker."""
        self._is_stopping = True
        await self._consume(0)
        self.on_lost()
        if self._settling:
            await asyncio.wait(self._settling)

    def abandon(self) -> None:
        """Give up what is in progress: it is delivered again."""
        self._background.cancel()

    async def _consume(self, prefetch: int) -> None:
        with suppress(WorkerError):  # the next session begins with this
            await self._broker.consume(prefetch)

    def _set_aside(self, delivery: Delivery) -> None:
        """Let a message that cannot be understood come back much later; what no worker published is dropped."""
        is_foreign = delivery.is_truncated or not (delivery.is_returned or delivery.is_moved)
        hint = "only workers may publish to this queue" if is_foreign else "it comes back: a newer version may read it"
        log.error("result_message_unreadable", hint=hint)
        publications = [] if is_foreign else [self._messages.again(delivery, self._longest_delay_s)]
        self._background.start(self._broker.settle(delivery, publications))

    async def _count(self) -> None:
        while True:
            ready = await self._broker.count_ready(self._queues)
            if ready is not None:
                self.outstanding = ready + self._broker.unacknowledged
            await asyncio.sleep(_COUNT_INTERVAL_S)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_S)
            self._give_back()

    async def _hand_over(self) -> None:
        """Let another worker take the queue if results could not be found out here: the fault may be this worker's.

        The broker gives the queue to the one that waits for the longest time; without another one it stays here. What
        is held stays here, so as much again may come.
        """
        while True:
            await asyncio.sleep(_HAND_OVER_S)
            was_hindered, has_room = self._finder.was_hindered(), self._broker.unacknowledged <= PREFETCH
            if was_hindered and has_room and not self._is_stopping:
                with suppress(WorkerError):  # the next session begins with a new consumer
                    await self._broker.renew_consumer()

    def _give_back(self) -> None:
        """Return what waits for too long to a delay queue, unchanged: a look at its device meanwhile does for it too.

        Of a product that fills what is held the newest half goes, so that its looks have enough to go on with.
        """
        now = self._loop.time()
        slow = {product for (product, _), waiting in self._waiting.items() if now - waiting.since > _PATIENCE_S}
        held = self._broker.unacknowledged
        for device, waiting in reversed(list(self._waiting.items())):
            product, _ = device
            is_crowding = product in slow and held > PREFETCH // 2
            if is_crowding or now - waiting.since > _LONGEST_WAIT_S:
                del self._waiting[device]
                waiting.look.cancel()
                held -= len(waiting.due)
                for delivery, _ in waiting.due:
                    again = self._messages.again(delivery, self._delay_s)
                    self._start(self._broker.settle(delivery, [again]), self._settling)

    async def _look(self, device: Device) -> None:
        product, imei = device
        await asyncio.sleep(self._gather_s)
        if device in self._looking:  # what is read there may do for these commands too
            await self._looking[device].wait()
        async with self._places.setdefault(product, asyncio.Semaphore(self._looks_at_once)):
            due = self._waiting.pop(device).due
            commands = [awaited for _, awaited in due]
            has_ended = self._looking[device] = asyncio.Event()
            try:
                found = await self._finder.find(product, imei, commands)
            except Exception as exc:  # noqa: BLE001 - a look sends nothing; one must not end the worker again and again
                # In a thread, because a traceback reads the lines of the source.
                await asyncio.to_thread(log.error, "result_look_failed", product=product, imei=imei, exc_info=exc)
                found = [awaited.later(self._now(), self._longest_delay_s) for awaited in commands]
            finally:
                del self._looking[device]
                has_ended.set()
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
