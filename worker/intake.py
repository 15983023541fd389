"""Passes deliveries to the handler's threads, and hands back what none of them has begun."""

import asyncio
import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial

from worker.amqp.broker import Broker
from worker.amqp.messages import Delivery, Outgoing, Publication
from worker.errors import WorkerError
from worker.handler import PASS_ON_S, Handler
from worker.telemetry.logs import get_logger

_BLOCKED, _STOPPING = "the broker takes no publications", "the worker is stopping"

log = get_logger()


class Intake:
    """A queue of waiting deliveries and the threads that take from it.

    Args:
        handler: handles one delivery.
        broker: settles it.
        outgoing: writes what hands one back.
        concurrency: how many threads.
        on_crash: is told, in the thread where it happened, of an error that nobody expected.
    """

    def __init__(
        self,
        handler: Handler,
        broker: Broker,
        outgoing: Outgoing,
        concurrency: int,
        on_crash: Callable[[BaseException], None],
    ) -> None:
        self._handler = handler
        self._broker = broker
        self._outgoing = outgoing
        self._on_crash = on_crash
        self._loop = asyncio.get_running_loop()
        self._waiting: queue.SimpleQueue[Delivery | None] = queue.SimpleQueue()
        self._pauses: set[str] = set()  # why nothing is taken at present
        self._not_started: list[Delivery] = []  # what came while paused
        self._flow = asyncio.Lock()  # one pause or resume at a time
        self._flow_tasks: set[asyncio.Task[None]] = set()
        self._threads = concurrency
        self._all_ended = asyncio.Event()
        for number in range(1, concurrency + 1):
            # Daemons: a request that outlasts the grace period must not keep the process.
            threading.Thread(target=self._work, name=f"handler-{number}", daemon=True).start()

    def on_delivery(self, delivery: Delivery) -> None:
        if self._pauses:
            self._not_started.append(delivery)
        else:
            self._waiting.put(delivery)

    def on_blocked(self, is_blocked: bool) -> None:
        """Take nothing new while the broker takes no publications: every outcome would have to wait here."""
        if is_blocked:
            log.warning("publishing_blocked")
            flow = self._pause(_BLOCKED)
        else:
            log.info("publishing_unblocked")
            flow = self._resume(_BLOCKED)
        task = self._loop.create_task(flow)
        self._flow_tasks.add(task)
        task.add_done_callback(self._flow_tasks.discard)

    def on_lost(self) -> None:
        not_started, self._not_started = [*self._not_started, *self._take_waiting()], []
        for delivery in not_started:
            self._handler.note_unsent(delivery)

    async def stop(self) -> None:
        """Take nothing new, hand back what has not been started, finish the rest, and see it acknowledged."""
        await self._pause(_STOPPING)
        for _ in range(self._threads):
            self._waiting.put(None)
        await self._all_ended.wait()
        try:
            await self._broker.drain()
        except WorkerError as exc:
            log.warning("broker_connection_lost", reason=str(exc))

    async def _pause(self, reason: str) -> None:
        async with self._flow:
            self._pauses.add(reason)
            self._not_started += self._take_waiting()
            try:
                await self._broker.pause()
            except WorkerError:
                return  # the session is over, and on_lost has taken what was here
            not_started, self._not_started = self._not_started, []
            for delivery in not_started:
                self._handler.note_unsent(delivery)  # it may come back redelivered all the same
                if self._broker.can_publish:
                    self._broker.settle(delivery, [self._outgoing.hand_back(delivery, datetime.now(UTC))])
                else:
                    self._broker.requeue(delivery)

    async def _resume(self, reason: str) -> None:
        async with self._flow:
            self._pauses.discard(reason)
            if self._pauses:
                return
            try:
                await self._broker.resume()
            except WorkerError:
                return  # the next session consumes by itself

    def _take_waiting(self) -> list[Delivery]:
        taken: list[Delivery | None] = []
        with suppress(queue.Empty):
            while True:
                taken.append(self._waiting.get_nowait())
        for _ in range(taken.count(None)):
            self._waiting.put(None)  # a thread's order to end stays in force
        return [delivery for delivery in taken if delivery is not None]

    def _pass_on(self, delivery: Delivery, publications: Sequence[Publication]) -> bool:
        """Publish, acknowledge once that is confirmed, and tell whether it was in time."""
        confirmed = threading.Event()
        self._broker.settle(delivery, publications, confirmed)
        return confirmed.wait(PASS_ON_S)

    def _work(self) -> None:
        try:
            while (delivery := self._waiting.get()) is not None:
                self._broker.settle(delivery, self._handler.handle(delivery, partial(self._pass_on, delivery)))
        except BaseException as exc:  # noqa: BLE001 - the outermost handler: what nobody expected ends the process
            self._on_crash(exc)
        else:
            self._loop.call_soon_threadsafe(self._on_thread_end)  # behind the last settlements

    def _on_thread_end(self) -> None:
        self._threads -= 1
        if not self._threads:
            self._all_ended.set()
