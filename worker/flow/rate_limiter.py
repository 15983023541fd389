"""The slots of a rate: evenly spaced, each product for itself, by one worker or by a fleet.

The algorithm is GCRA, in the library ``throttled-py``: a slot comes due every so many seconds, and a tenth of a
second's worth of them may be made up for, so that a late wake-up loses nothing and a burst stays small.
Source: https://brandur.org/rate-limiting
"""

from contextlib import suppress
from datetime import timedelta
from typing import Any

from throttled import MemoryStore, RateLimiterType, RedisStore, Throttled, per_duration
from throttled.exceptions import StoreUnavailableError

from worker.core.rate import Rate

_MADE_UP_S = 0.1
_TIMEOUT_S = 2.0  # for one call to Redis


class _SharedStore(RedisStore):
    """Where the workers of a fleet share their slots."""

    def disconnect(self) -> None:
        """Close the idle connections, so that the next call looks the server's name up again."""
        client: Any = self._backend.get_client()
        client.connection_pool.disconnect(inuse_connections=False)

    def delete(self, key: str) -> None:
        """Forget a key, so that its slots begin anew."""
        client: Any = self._backend.get_client()
        client.delete(key)


class RateLimiter:
    """Gives out the slots of a rate.

    Args:
        rate: so many, in so many seconds, for each product.
        namespace: begins every key in Redis.
        redis_url: where workers share their slots; None: this process has them for itself.
    """

    def __init__(self, rate: Rate, namespace: str, redis_url: str | None) -> None:
        options = {"SOCKET_TIMEOUT": _TIMEOUT_S, "SOCKET_CONNECT_TIMEOUT": _TIMEOUT_S}
        burst = max(1, round(_MADE_UP_S * rate.count / rate.period_s))
        self._store = None if redis_url is None else _SharedStore(redis_url, options)
        self._prefix = f"{{{namespace}}}:rate"
        self._longest_s = (burst + 1) * rate.period_s / rate.count
        self._throttled = Throttled(
            using=RateLimiterType.GCRA.value,
            quota=per_duration(timedelta(seconds=rate.period_s), rate.count, burst),
            store=self._store or MemoryStore(),
            key_prefix=self._prefix,
        )

    def take(self, product: str | None) -> float:
        """Take a product's slot; returns 0, or the seconds until there may be one."""
        key = "default" if product is None else f"product:{product}"
        if self._store is None:
            return self._take(key)[0]
        from redis import RedisError, ResponseError

        from worker.idempotency.calls import code_of, is_other_server

        for _ in range(2):
            try:
                wait_s, is_usable = self._take(key)
                if is_usable:
                    return wait_s
                self._store.delete(self._name(key))
            except StoreUnavailableError as exc:
                if is_other_server(exc.__cause__):
                    self._store.disconnect()
                elif isinstance(exc.__cause__, ResponseError) and code_of(exc.__cause__) is None:
                    with suppress(RedisError):  # its value is none of ours
                        self._store.delete(self._name(key))
                else:
                    break
            except RedisError:
                break
        return 0  # nothing is sent without the store in any case: who goes on now is put off there

    def _take(self, key: str) -> tuple[float, bool]:
        """Return the seconds to wait, and whether a value that the slots of this rate may have explains them."""
        result = self._throttled.limit(key)
        return result.state.retry_after if result.limited else 0, result.state.reset_after <= self._longest_s

    def _name(self, key: str) -> str:
        return f"{self._prefix}:v1:{RateLimiterType.GCRA.value}:{key}"
