"""Messages in these tests are encoded and decoded as on a connection."""

import pytest

from worker.amqp.field_table import preserve_raw_values


@pytest.fixture(autouse=True, scope="session")
def raw_values() -> None:
    """Have pika keep header values that it cannot decode and encode without loss."""
    preserve_raw_values()
