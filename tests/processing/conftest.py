"""The engine that most tests of this package use."""

import pytest

from tests.support.engine import Engine


@pytest.fixture
def engine() -> Engine:
    return Engine()
