"""The platform's simulator, run in a thread of the test."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.support.certificates import Certificate
from tests.support.waiting import PATIENCE_S
from worker.simulator.faults import Fault, FaultPlan
from worker.simulator.platform import Platform
from worker.simulator.server import Simulator

API_KEY = "the-master-key"
ACCESS_KEY = "dGhlIGFjY2VzcyBrZXkgb2YgdGhlIHRlc3RzLg=="
PRODUCT_ID = "123123"
OFFLINE_IMEI = "865820039999999"


@contextmanager
def answers_held(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let no platform answer a command until the end of the block; it is cached then."""
    may_answer, execute = threading.Event(), Platform.execute

    def execute_late(*about: Any) -> Any:
        assert may_answer.wait(PATIENCE_S)
        return execute(*about)

    monkeypatch.setattr(Platform, "execute", execute_late)
    try:
        yield
    finally:
        may_answer.set()


@contextmanager
def onenet(
    *faults: Fault,
    latency_s: float = 0,
    port: int = 0,
    seed: int | None = None,
    certificate: Certificate | None = None,
) -> Iterator[Simulator]:
    """Run the simulator as an HTTP server, with a certificate as an HTTPS server; yields it for inspection."""
    platform = Platform(
        API_KEY,
        {f"products/{PRODUCT_ID}": ACCESS_KEY},
        {OFFLINE_IMEI: "offline"},
        queue_limit=None,  # many tests send more than ten commands to one device
        rate=None,
    )
    tls = None if certificate is None else (certificate.cert, certificate.key)
    simulator = Simulator(platform, FaultPlan(list(faults), seed), latency_s=latency_s, port=port, tls=tls)
    thread = threading.Thread(target=lambda: asyncio.run(simulator.serve()), name="simulator")
    thread.start()
    try:
        yield simulator
    finally:
        simulator.stop()
        thread.join()
