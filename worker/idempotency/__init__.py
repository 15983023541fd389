"""Stores for the records of commands: the memory of one process, or Redis for a fleet."""

from collections.abc import Callable
from datetime import datetime
from urllib.parse import urlsplit

from worker.core.claims import IdempotencyStore
from worker.core.redis_address import RedisAddress
from worker.errors import SettingsError
from worker.idempotency.memory import MemoryStore


def open_store(
    url: str,
    namespace: str,
    *,
    ttl_s: int,
    lease_s: float,
    began_at: datetime,
    reconcile_delay_s: float = 60.0,
    replicas: int = 0,
    read_address: Callable[[], RedisAddress] | None = None,
) -> IdempotencyStore:
    """Open the store that a URL names.

    Args:
        url: ``memory://``, ``redis://…``, ``rediss://…`` or ``redis+sentinel://…``.
        namespace: prefix of every key in a shared store.
        ttl_s: lifetime of a record after its last write, in seconds.
        lease_s: duration of a lease, in seconds.
        began_at: when this process started. Earlier attempts are not recorded in its memory.
        reconcile_delay_s: for which the effect of a request may stay invisible, in seconds.
        replicas: how many replicas must have a claim or an outcome before it counts.
        read_address: returns the address of Redis as the settings say by now; called, in a thread, before each
            connection.

    Raises:
        SettingsError: the URL names no store, or one of its options cannot be used.
    """
    match urlsplit(url).scheme:
        case "memory":
            return MemoryStore(ttl_s, lease_s, began_at=began_at)
        case "redis" | "rediss" | "redis+sentinel" | "rediss+sentinel":
            from worker.idempotency.redis import RedisStore  # an optional dependency

            return RedisStore(
                url,
                namespace,
                ttl_s=ttl_s,
                lease_s=lease_s,
                reconcile_delay_s=reconcile_delay_s,
                replicas=replicas,
                read_address=read_address,
            )
        case _:
            raise SettingsError(
                ["IDEMPOTENCY_URL: must begin with memory://, redis://, rediss:// or redis+sentinel://"]
            )
