"""Connections to the Redis server that has the records: the one of the URL, or the primary that the Sentinels name."""

import asyncio
import ssl
from collections import Counter
from typing import Any

import redis
from redis.asyncio import Connection, Sentinel, SSLConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from worker.core.redis_address import RedisAddress
from worker.idempotency.latest_address import LatestAddress
from worker.idempotency.redis_errors import Unreachable

ERRORS = "surrogateescape"  # bytes that are not UTF-8 can be read, and written back unchanged
SENTINEL_S = 0.4  # for the answer of a Sentinel
_CONNECT_SHARE = 0.9  # of the caller's time limit, which would not tell what took so long


class RedisServer:
    """Opens connections to the server that has the records.

    Args:
        latest: the address of the server or of the Sentinels.
        timeout_s: of the caller; the URL may give a shorter one for connecting.
    """

    def __init__(self, latest: LatestAddress, timeout_s: float) -> None:
        self._latest = latest
        self._timeout_s = timeout_s

    async def connect(self) -> Any:  # redis has no public name for all kinds of its connections
        """Return a new connection.

        Raises:
            redis.RedisError: there is none, or the server is a node of Redis Cluster.
        """
        address = await self._latest.get()
        host, port = await _primary(address)
        kind: Any = SSLConnection if address.is_encrypted else Connection
        connection = kind(host=host, port=port, **self._options(address))
        try:
            await connection.connect()
            await _refuse_cluster(connection)
        except redis.ConnectionError as exc:
            await connection.disconnect(nowait=True)
            raise _without_secrets(exc) from exc
        except redis.TimeoutError as exc:
            await connection.disconnect(nowait=True)
            raise Unreachable(f"no connection{' with TLS' * address.is_encrypted} in time") from exc
        except BaseException:  # the caller's time limit too
            await connection.disconnect(nowait=True)
            raise
        return connection

    def _options(self, address: RedisAddress) -> dict[str, Any]:
        return {
            "socket_connect_timeout": _CONNECT_SHARE * self._timeout_s,
            **{name: value for name, value in address.options.items() if name != "socket_timeout"},
            # A claim whose answer was lost may have been granted.
            "retry": Retry(NoBackoff(), 0),
            "decode_responses": True,
            "encoding_errors": ERRORS,
        }


async def _primary(address: RedisAddress) -> tuple[str, int]:
    """Return the address of the server that most Sentinels name.

    One may be cut off from the others and still name the former primary, and one may hang. So all are asked at
    once, and the answer of more than half of them is enough.
    """
    if address.master is None:
        return address.nodes[0]
    asked = [asyncio.create_task(_ask(node, address, address.master)) for node in address.nodes]
    votes: Counter[tuple[str, int]] = Counter()
    try:
        for answer in asyncio.as_completed(asked):
            found = await answer
            if found is not None:
                votes[found] += 1
                if 2 * votes[found] > len(asked):
                    return found
    finally:
        for each in asked:
            each.cancel()
        await asyncio.gather(*asked, return_exceptions=True)  # they close their connections
    if not votes:
        raise Unreachable(f"no Sentinel names a primary {address.master}")
    return votes.most_common(1)[0][0]


async def _ask(node: tuple[str, int], address: RedisAddress, master: str) -> tuple[str, int] | None:
    """Return the primary that one Sentinel names; None if it does not answer, or takes the primary for dead."""
    options: dict[str, Any] = {"socket_timeout": SENTINEL_S, "socket_connect_timeout": SENTINEL_S}
    options |= {"retry": Retry(NoBackoff(), 0), "ssl": address.is_encrypted}
    kind: Any = Sentinel  # redis declares no types for it
    sentinel = kind([node], sentinel_kwargs=options | dict(address.sentinel_options))
    try:
        async with asyncio.timeout(SENTINEL_S):
            host, port = await sentinel.discover_master(master)
            return str(host), int(port)
    except (TimeoutError, redis.RedisError):
        return None
    finally:
        for client in sentinel.sentinels:
            await client.aclose()


def _without_secrets(error: redis.ConnectionError) -> redis.ConnectionError:
    """Return why there is no connection, in words of the operating system or of TLS, which know no secret."""
    origin = error.__context__
    if type(error) is not redis.ConnectionError or not isinstance(origin, OSError):
        return error  # an answer of Redis
    reason = origin.verify_message if isinstance(origin, ssl.SSLCertVerificationError) else origin.strerror
    return Unreachable(reason or type(origin).__name__)


async def _refuse_cluster(connection: Any) -> None:
    await connection.send_command("INFO", "server")
    try:
        facts = str(await connection.read_response())
    except redis.ResponseError:
        return  # the user may not ask; what matters is noticed by what the commands need
    if "redis_mode:cluster" in facts:
        raise redis.ResponseError("CLUSTER is refused")
