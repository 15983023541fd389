"""The slots of a rate: evenly spaced, each product for itself, by one worker or by a fleet.

The algorithm is GCRA, in the library ``throttled-py``: a slot comes due every so many seconds, and a tenth of a
second's worth of them may be made up for, so that a late wake-up loses nothing and a burst stays small.
Source: https://brandur.org/rate-limiting
"""

from datetime import timedelta

from throttled import MemoryStore, RateLimiterType, RedisStore, Throttled, per_duration
from throttled.exceptions import StoreUnavailableError

from worker.settings import Rate

_MADE_UP_S = 0.1
_TIMEOUT_S = 2.0  # for one call to Redis


class Slots:
    """Gives out the slots of a rate.

    Args:
        rate: so many, in so many seconds, for each product.
        namespace: begins every key in Redis.
        redis_url: where workers share their slots; None: this process has them for itself.
    """

    def __init__(self, rate: Rate, namespace: str, redis_url: str | None) -> None:
        options = {"SOCKET_TIMEOUT": _TIMEOUT_S, "SOCKET_CONNECT_TIMEOUT": _TIMEOUT_S}
        burst = max(1, round(_MADE_UP_S * rate.count / rate.period_s))
        self._throttled = Throttled(
            using=RateLimiterType.GCRA.value,
            quota=per_duration(timedelta(seconds=rate.period_s), rate.count, burst),
            store=MemoryStore() if redis_url is None else RedisStore(redis_url, options),
            key_prefix=f"{{{namespace}}}:rate",
        )

    def take(self, product: str | None) -> float:
        """Take a product's slot; returns 0, or the seconds until there may be one."""
        try:
            result = self._throttled.limit("default" if product is None else f"product:{product}")
        except StoreUnavailableError:
            return 0  # nothing is sent without the store in any case: who goes on now is put off there
        return result.state.retry_after if result.limited else 0
