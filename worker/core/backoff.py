"""Delays: before a command's next attempt, and before the next connection attempt."""

import random
from collections.abc import Callable, Sequence

Draw = Callable[[float, float], float]

_MIN_SPREAD_DELAY_S = 10
_SPREAD = 0.1


def retry_delay_s(attempt: int, delays_s: Sequence[int], at_least_s: float = 0) -> int:
    """Return the delay before the next attempt, in seconds; each configured delay has a queue.

    Args:
        attempt: the attempt that just failed; the first is 1.
        delays_s: the configured delays, ascending; the last repeats.
        at_least_s: the wait that the platform asked for; the longest delay if none is as long.

    Raises:
        ValueError: ``attempt`` is below 1.
    """
    if attempt < 1:
        raise ValueError("attempts count from 1")
    due = delays_s[min(attempt, len(delays_s)) - 1]
    return next((delay_s for delay_s in delays_s if delay_s >= max(due, at_least_s)), delays_s[-1])


def postponement_s(delays_s: Sequence[int], suggested_s: float) -> int:
    """Return the delay of a postponed command: the longest that does not exceed ``suggested_s``, else the shortest."""
    return next((delay_s for delay_s in reversed(delays_s) if delay_s <= suggested_s), delays_s[0])


def spread_ms(delay_s: int, draw: Draw = random.uniform) -> int | None:
    """Return the TTL of one message in a delay queue, in milliseconds: the queue's TTL minus up to a tenth of it.

    The jitter separates commands that failed together. It is small because RabbitMQ expires messages only at the head
    of a queue: a message waits for the one before it, here at most a tenth longer. None: no jitter for a short delay.
    Source: https://www.rabbitmq.com/docs/ttl#per-message-ttl-caveats
    """
    if delay_s < _MIN_SPREAD_DELAY_S:
        return None
    return int(draw(1 - _SPREAD, 1) * delay_s * 1000)


def backoff_s(attempt: int, base_s: float, cap_s: float, draw: Draw = random.uniform) -> float:
    """Return the wait before the next try, in seconds: exponential backoff with full jitter.

    Args:
        attempt: the try that just failed; the first is 1.
        base_s: ceiling of the first wait, in seconds, above 0.
        cap_s: longest wait ever returned, in seconds.
        draw: uniform random source ``(low, high) -> value``; replaced in tests.

    Raises:
        ValueError: ``attempt`` is below 1.
    Source: https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/ ("Full Jitter").
    """
    if attempt < 1:
        raise ValueError("attempts count from 1")
    return draw(0, min(cap_s, base_s * 2 ** min(attempt - 1, 30)))
