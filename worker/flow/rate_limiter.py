"""Rate limit of each product, evenly spaced, for one worker or shared by all workers through Redis.

The algorithm is GCRA, from the library ``throttled-py``. The burst is a fiftieth of a second's worth of requests, so
that a late wake-up costs little throughput and requests stay evenly spaced. It is part of the limit: no period has more
requests than the rate allows, whenever the period begins.
Source: https://brandur.org/rate-limiting
"""

import asyncio
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from throttled.asyncio import MemoryStore, RateLimiterType, RedisStore, Throttled, per_duration
from throttled.asyncio.store.redis import RedisStoreBackend
from throttled.exceptions import StoreUnavailableError

from worker.core.rate import Rate
from worker.core.redis_address import RedisAddress
from worker.errors import StoreUnavailable
from worker.idempotency.latest_address import LatestAddress

if TYPE_CHECKING:
    from collections.abc import Callable

_BURST_S = 0.02
_TIMEOUT_S = 2.0  # for one call to Redis
_REFUSED_S = 1.0  # before another try, where Redis refuses the limit


class _Backend(RedisStoreBackend):
    """Uses a client of ours: throttled-py reads fewer forms of URLs, and gives Sentinels the password of the server."""

    client: Any

    def get_client(self) -> Any:
        return self.client


class _SharedStore(RedisStore):
    """The Redis store of throttled-py, with what it lacks for recovery."""

    _BACKEND_CLASS = _Backend
    _backend: _Backend

    def __init__(self, latest: LatestAddress) -> None:
        super().__init__()
        self._latest = latest
        self._connecting = asyncio.Lock()
        # One client for all time, because the scripts keep theirs; its connections are replaced before they are used.
        self._client = self._backend.client = _client(latest.address, *latest.address.nodes[0])
        self.connections: Any = None

    async def connect(self, former: Any) -> None:
        """Use new connections, for which the address is read and the server's name is resolved again.

        Args:
            former: the connections that failed, or None; if there are others by now, those stay.

        Raises:
            redis.RedisError: no Sentinel names a server.
        """
        async with self._connecting:
            if self.connections is not former:
                return
            from worker.idempotency.redis_server import primary_of  # of an optional dependency

            address = await self._latest.get()
            client = _client(address, *await primary_of(address))
            self.connections = self._client.connection_pool = client.connection_pool
            if former is not None:
                await former.disconnect(inuse_connections=False)

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    async def delete(self, key: str) -> None:
        """Delete a key, which resets its limit."""
        await self._client.delete(key)


class RateLimiter:
    """Limits the requests of each product to a rate.

    Args:
        rate: the limit of each product.
        namespace: prefix of every key in Redis.
        latest: the Redis through which workers share the limit; None: this process has the limit to itself.

    Attributes:
        on_refused: called when Redis refuses the keys of the limit until an administrator changes something.
    """

    def __init__(self, rate: Rate, namespace: str, latest: LatestAddress | None) -> None:
        burst = max(1, round(_BURST_S * rate.count / rate.period_s))
        self._store = None if latest is None else _SharedStore(latest)
        self.on_refused: Callable[[StoreUnavailable], object] = lambda _error: None
        self._prefix = f"{{{namespace}}}:rate"
        self._probe = f"#{uuid4().hex}"  # no product is called so
        count = rate.count - (burst - 1)
        self._longest_reset_s = (burst + 1) * rate.period_s / count
        self._throttled = Throttled(
            using=RateLimiterType.GCRA.value,
            quota=per_duration(timedelta(seconds=rate.period_s), count, burst),
            store=self._store or MemoryStore(),
            key_prefix=self._prefix,
        )

    async def acquire(self, product: str | None) -> float:
        """Try to take one request from a product's limit.

        Returns:
            0 if the request may be sent; otherwise the seconds until another try may succeed. Always 0 while Redis is
            unavailable: nothing is sent without a claim in the idempotency store, which postpones the command. Never 0
            while Redis refuses the keys of the limit to this user, to whom it may permit those of the store.
        """
        key = "default" if product is None else f"product:{product}"
        if self._store is None:
            return (await self._limit(key))[0]
        from redis import RedisError

        from worker.idempotency.redis import unavailable
        from worker.idempotency.redis_errors import LASTING, code_of

        try:
            return await self._take(self._store, key)
        except RedisError as exc:
            if code_of(exc) not in LASTING:
                return 0
            self.on_refused(unavailable(exc))
            return _REFUSED_S

    async def ping(self) -> None:
        """Do what the limit does with Redis, for a limit of its own.

        Raises:
            StoreUnavailable: Redis does not answer, or refuses it.
        """
        if self._store is None:
            return
        from redis import RedisError

        from worker.idempotency.redis import PING_S, unavailable

        try:
            async with asyncio.timeout(PING_S):
                await self._take(self._store, self._probe)
                await self._store.delete(self._name(self._probe))
        except TimeoutError as exc:
            raise StoreUnavailable("Redis: no answer in time") from exc
        except RedisError as exc:
            raise unavailable(exc) from exc

    async def _take(self, store: _SharedStore, key: str) -> float:
        """Try to take one request from a limit in Redis, once more if it may have moved or its value is unreadable.

        Raises:
            redis.RedisError: both tries failed.
        """
        from redis import RedisError, ResponseError
        from redis.exceptions import ConnectionError as NotConnected
        from redis.exceptions import TimeoutError as NoAnswer

        from worker.idempotency.redis_errors import code_of, is_other_server

        error = RedisError("the value of the rate limit cannot be replaced")
        for _ in range(2):
            connections = store.connections
            try:
                if connections is None:
                    await store.connect(connections)
                wait_s, is_plausible = await self._limit(key)
                if is_plausible:
                    return wait_s
                await store.delete(self._name(key))
            except StoreUnavailableError as exc:
                cause = exc.__cause__  # of any kind
                error = cause if isinstance(cause, RedisError) else RedisError("the rate limit cannot be asked for")
                if isinstance(error, NotConnected | NoAnswer) or is_other_server(error):
                    with suppress(RedisError):
                        await store.connect(connections)
                elif isinstance(error, ResponseError) and code_of(error) is None:
                    with suppress(RedisError):  # the key holds a value that GCRA cannot read
                        await store.delete(self._name(key))
                else:
                    break
        raise error

    async def close(self) -> None:
        """Close the connections to Redis."""
        if self._store is not None:
            await self._store.close()

    async def _limit(self, key: str) -> tuple[float, bool]:
        """Return the seconds to wait, and whether the stored value is one that this rate can produce."""
        result = await self._throttled.limit(key)
        return result.state.retry_after if result.limited else 0, result.state.reset_after <= self._longest_reset_s

    def _name(self, key: str) -> str:
        return f"{self._prefix}:v1:{RateLimiterType.GCRA.value}:{key}"


def _client(address: RedisAddress, host: str, port: int) -> Any:
    """Return a client of the server that workers share."""
    from redis.asyncio import Redis
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff

    once: dict[str, Any] = {"retry": Retry(NoBackoff(), 0), "ssl": address.is_encrypted}  # else it tries for long
    options = {"socket_timeout": _TIMEOUT_S, "socket_connect_timeout": _TIMEOUT_S, **address.options, **once}
    return Redis(host=host, port=port, **options)
