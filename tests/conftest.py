"""Fixtures: a real broker for the whole run, a simulator and a namespace for each test."""

from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from tests.rig import Rig, onenet
from worker.localservices.broker import LocalBroker, NamedBroker, OwnBroker, find_broker, start_own_broker


@pytest.fixture(scope="session")
def broker() -> Iterator[LocalBroker]:
    """The broker that all tests share; where AMQP_URL names one, they leave nothing behind on it."""
    found = find_broker()
    yield found
    found.stop()


@pytest.fixture(scope="session")
def own_broker(broker: LocalBroker) -> Iterator[OwnBroker]:
    """A broker that may be killed: the shared one, unless AMQP_URL names it."""
    if not isinstance(broker, NamedBroker):
        yield cast("OwnBroker", broker)
        return
    started = start_own_broker()
    yield started
    started.stop()


@pytest.fixture
def rig(broker: LocalBroker, tmp_path: Path) -> Iterator[Rig]:
    with onenet() as simulator, Rig.set_up(broker.url, tmp_path, simulator, (1, 2)) as found:
        yield found
