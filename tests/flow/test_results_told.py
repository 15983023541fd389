"""From deliveries of accepted commands to results: what is looked up at once, told once, and put off."""

import asyncio
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest
from pika import BasicProperties

from schemas.result import Result
from tests.support.waiting import PATIENCE_S, until
from worker.amqp.messages import Delivery, Publication
from worker.amqp.result_messages import ResultMessages
from worker.amqp.topology import Topology
from worker.core.results import Awaited
from worker.flow.result_consumer import PREFETCH, ResultConsumer
from worker.telemetry.metrics import Metrics

DELAYS_S = (1, 60)
UUID = "42742677-adc3-54ca-83a1-5aaaf71482f8"
IMEI, ANOTHER_IMEI = "865820030000001", "865820030000002"
METRICS = Metrics("0", 1)


def awaited(uuid: str = UUID, *, command_id: str = "c", imei: str = IMEI, due_in: timedelta = timedelta(0)) -> Awaited:
    now = datetime.now(UTC)
    return Awaited(
        command_id=command_id,
        app_id="billing",
        uuid=uuid,
        imei=imei,
        product=None,
        accepted_at=now,
        is_recovered=False,
        expires_at=now + timedelta(days=1),
        last_answer_at=now + timedelta(days=1),
        due_at=now + due_in,
    )


class Bench:
    """A consumer whose platform has executed every command, and what it publishes for each delivery."""

    def __init__(self) -> None:
        self.looks: list[tuple[str, list[str]]] = []
        self.settled: list[tuple[int, list[Publication]]] = []
        self.are_there = asyncio.Event()
        self.answers = asyncio.Event()
        self.answers.set()
        self.failing_imei = ""
        self.is_hindered = False
        self.asked = 0
        self.renewals = 0
        self.unacknowledged = 0
        self.prefetches: list[int] = []
        self._wanted = 0
        messages = ResultMessages(Topology("onenet", (5,), DELAYS_S), DELAYS_S, lambda _product: timedelta(0))
        parts: Any = self
        self.consumer = ResultConsumer(parts, messages, parts, [], METRICS, DELAYS_S, looks_at_once=4)

    async def find(self, _product: str | None, imei: str, due: Sequence[Awaited]) -> list[Result]:
        self.looks.append((imei, [each.command_id for each in due]))
        await self.answers.wait()
        if imei == self.failing_imei:
            raise RuntimeError("an error that nobody expects")
        return [
            Result(
                command_id=each.command_id,
                uuid=each.uuid,
                imei=imei,
                result="executed",
                observed_at=datetime.now(UTC),
            )
            for each in due
        ]

    async def settle(self, delivery: Delivery, publications: Sequence[Publication]) -> bool:
        self.settled.append((delivery.tag, list(publications)))
        if len(self.settled) >= self._wanted:
            self.are_there.set()
        return True

    async def run(self, _listener: object) -> None:
        await asyncio.Event().wait()  # the connection

    async def count_ready(self, _queues: object) -> None:
        """Tell nothing, as without a connection."""

    def was_hindered(self) -> bool:
        self.asked += 1
        return self.is_hindered

    async def renew_consumer(self) -> None:
        self.renewals += 1

    async def assert_no_renewal(self) -> None:
        """Check that there is no further renewal, however often the finder is asked."""
        renewals, asked = self.renewals, self.asked
        await until(lambda: self.asked >= asked + 5)
        assert self.renewals == renewals

    async def consume(self, prefetch: int) -> None:
        self.prefetches.append(prefetch)

    async def deliver(self, *bodies: bytes | Awaited, app_id: str = "billing") -> list[list[str]]:
        """Deliver messages; returns the routing keys of what is published for each of them."""
        self._wanted = len(bodies)
        for tag, body in enumerate(bodies):
            data = body.model_dump_json().encode() if isinstance(body, Awaited) else body
            self.consumer.on_delivery(Delivery(1, tag, False, BasicProperties(app_id=app_id), data, True))
        async with asyncio.timeout(PATIENCE_S):
            await self.are_there.wait()
        return [[each.routing_key for each in publications] for _, publications in sorted(self.settled, key=_tag)]


def deliver(bench: Bench, command: Awaited) -> None:
    body = command.model_dump_json().encode()
    bench.consumer.on_delivery(Delivery(1, 0, False, BasicProperties(app_id="billing"), body, True))


def _tag(settled: tuple[int, list[Publication]]) -> int:
    return settled[0]


TOLD, PUT_OFF = ["result.executed.billing"], ["onenet.results.1s"]


async def test_one_look_serves_all_commands_of_a_device_that_are_due() -> None:
    bench = Bench()
    due = [awaited(f"u{number}", command_id=f"c{number}") for number in range(3)]
    assert await bench.deliver(*due, awaited(imei=ANOTHER_IMEI)) == [TOLD] * 4
    assert sorted(bench.looks) == [(IMEI, ["c0", "c1", "c2"]), (ANOTHER_IMEI, ["c"])]


async def test_what_comes_during_a_look_waits_for_its_end() -> None:
    """What it reads may do for these commands too, so that the device costs one call."""
    bench = Bench()
    bench.answers.clear()
    deliver(bench, awaited("u"))
    await until(lambda: bench.looks)
    deliver(bench, awaited("v", command_id="d"))
    deliver(bench, awaited(imei=ANOTHER_IMEI))
    await until(lambda: len(bench.looks) == 2)
    assert [imei for imei, _ in bench.looks] == [IMEI, ANOTHER_IMEI]
    bench.answers.set()
    await until(lambda: len(bench.settled) == 3)
    assert bench.looks[2:] == [(IMEI, ["d"])]


@pytest.mark.parametrize("uuid", [UUID, UUID.upper()])
async def test_a_command_that_comes_twice_is_told_once(uuid: str) -> None:
    """Its worker died after it had published it again; a recovered uuid may be written in another way."""
    assert await Bench().deliver(awaited(), awaited(uuid)) == [TOLD, []]


@pytest.mark.parametrize("other", [{"uuid": "another"}, {"command_id": "another"}])
async def test_two_commands_are_never_taken_for_one(other: dict[str, str]) -> None:
    assert await Bench().deliver(awaited(), cast("Any", awaited)(**other)) == [TOLD, TOLD]


async def test_what_is_not_due_waits_on_without_a_look() -> None:
    bench = Bench()
    assert await bench.deliver(awaited(due_in=timedelta(seconds=30))) == [PUT_OFF]
    assert bench.looks == []


YEAR_1 = re.sub(rb'"due_at":"[^"]*"', b'"due_at":"0001-01-01T00:00:00Z"', awaited().model_dump_json().encode())


@pytest.mark.parametrize("body", [b"", b"{}", b"\xff", YEAR_1], ids=["empty", "no fields", "no text", "year 1"])
async def test_what_cannot_be_understood_comes_back_unchanged_after_the_longest_delay(body: bytes) -> None:
    """A newer version may have written it."""
    bench = Bench()
    assert await bench.deliver(body) == [["onenet.results.60s"]]
    [(_, [publication])] = bench.settled
    assert (publication.body, publication.properties.app_id, publication.properties.expiration) == (
        body,
        "billing",
        None,
    )


async def test_what_no_worker_published_is_dropped() -> None:
    bench = Bench()
    bench.consumer.on_delivery(Delivery(1, 0, False, BasicProperties(), awaited().model_dump_json().encode(), False))
    await until(lambda: bench.settled)
    assert bench.settled == [(0, [])]


async def test_an_unexpected_error_costs_the_looks_at_one_device_only() -> None:
    bench = Bench()
    bench.failing_imei = IMEI
    found = await bench.deliver(awaited("u"), awaited("v", command_id="d"), awaited(imei=ANOTHER_IMEI))
    assert found == [["onenet.results.60s"]] * 2 + [TOLD]


async def test_nothing_new_is_taken_while_the_broker_takes_no_publications() -> None:
    bench = Bench()
    for is_blocked, prefetch in ((True, 0), (False, PREFETCH)):
        bench.consumer.on_blocked(is_blocked)
        await until(lambda: bench.prefetches)
        assert bench.prefetches.pop() == prefetch
    await bench.consumer.stop()
    assert bench.prefetches == [0]
    bench.consumer.on_blocked(is_blocked=False)
    await asyncio.sleep(0)
    assert bench.prefetches == [0]


async def test_a_worker_that_cannot_look_lets_another_one_take_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.flow.result_consumer._HAND_OVER_S", 0.001)
    bench = Bench()
    running = asyncio.create_task(bench.consumer.run())
    await until(lambda: bench.asked >= 5)
    assert bench.renewals == 0
    bench.is_hindered = True
    await until(lambda: bench.renewals >= 2)
    bench.unacknowledged = PREFETCH + 1  # as much again would come with each renewal
    await bench.assert_no_renewal()
    bench.unacknowledged = 0
    await until(lambda: bench.renewals >= 4)
    await bench.consumer.stop()
    await bench.assert_no_renewal()
    running.cancel()


async def test_what_a_lost_session_had_delivered_is_not_looked_up() -> None:
    """The broker delivers it again."""
    bench = Bench()
    bench.consumer.on_delivery(Delivery(1, 7, False, BasicProperties(), awaited().model_dump_json().encode(), True))
    bench.consumer.on_lost()
    assert await bench.deliver(awaited(command_id="again")) == [["result.executed.billing"]]
    assert bench.looks == [(IMEI, ["again"])]
