"""The time, as it is passed in."""

from collections.abc import Callable
from datetime import UTC, datetime

Clock = Callable[[], datetime]
"""Returns the time, aware."""


def utc_now() -> datetime:
    """Return the time in UTC."""
    return datetime.now(UTC)
