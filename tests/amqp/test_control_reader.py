"""How a worker learns what operators have ordered, over a real broker."""

import asyncio
from collections.abc import Iterator
from contextlib import suppress
from uuid import uuid4

import pytest
from pydantic import SecretStr
from structlog.testing import capture_logs

from tests.support.waiting import PATIENCE_S
from worker.admin.pauses import Operator
from worker.amqp.address import BrokerAddress
from worker.amqp.blocking import declare, delete
from worker.amqp.connection import connection_parameters
from worker.amqp.control_reader import ControlReader
from worker.amqp.topology import Topology
from worker.amqp.unrouted_watch import UnroutedWatch
from worker.core.pauses import Pauses, WorkerReport


@pytest.fixture
def operator(broker_url: str) -> Iterator[Operator]:
    broker, topology = BrokerAddress([SecretStr(broker_url)]), Topology(f"test-{uuid4().hex[:8]}", (1,))
    declare(broker, topology)
    yield Operator(broker, topology, "alice")
    delete(broker, topology)


def _report() -> WorkerReport:
    return WorkerReport(worker="w", version="1", is_blocked=False, is_store_available=True, products=())


async def test_each_pause_that_ended_while_the_stream_could_not_be_read_is_logged(operator: Operator) -> None:
    known = asyncio.Event()
    found = [Pauses()]

    def on_pauses(pauses: Pauses) -> None:
        found.append(pauses)
        known.set()

    watch = UnroutedWatch(operator.topology, declare=True)
    reader = ControlReader(operator.topology, on_pauses, lambda _order: None, _report, watch, declare=True)

    async def read_once() -> None:
        known.clear()
        following = asyncio.ensure_future(reader.follow(connection_parameters(operator.broker), "test"))
        async with asyncio.timeout(PATIENCE_S):
            await known.wait()
        following.cancel()
        with suppress(asyncio.CancelledError):
            await following

    for product in ("heating", "cooling"):
        await asyncio.to_thread(operator.pause, product)
    await read_once()
    assert {order.scope for order in found[-1].orders} == {"heating", "cooling"}
    await asyncio.to_thread(operator.resume, "heating")
    with capture_logs() as logs:
        await read_once()
    assert [(line["event"], line["product"]) for line in logs] == [("resumed_by_hand", "heating")]
