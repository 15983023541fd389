"""Connections to the Redis server that has the records: the one of the URL, or the primary that the Sentinels name."""

import asyncio
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import redis
from redis.asyncio import Connection, Redis, SSLConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from worker.core.redis_address import RedisAddress
from worker.idempotency.latest_address import LatestAddress
from worker.idempotency.redis_errors import Unreachable, reason_of

ERRORS = "surrogateescape"  # bytes that are not UTF-8 can be read, and written back unchanged
SENTINEL_S = 0.4  # for the answer of a Sentinel
_CONNECT_SHARE = 0.9  # of the caller's time limit, which would not tell what took so long


class RedisServer:
    """Opens connections to the server that has the records.

    Args:
        latest: the address of the server or of the Sentinels.
        timeout_s: of the caller; the URL may give a shorter one for connecting.
        on_connected: called with what tells the server from others.
    """

    def __init__(self, latest: LatestAddress, timeout_s: float, on_connected: Callable[[str], object]) -> None:
        self._latest = latest
        self._timeout_s = timeout_s
        self._on_connected = on_connected

    async def connect(self) -> Any:  # redis has no public name for all kinds of its connections
        """Return a new connection.

        Raises:
            redis.RedisError: there is none, or the server is a node of Redis Cluster.
        """
        address = await self._latest.get()
        host, port = await primary_of(address)
        kind: Any = SSLConnection if address.is_encrypted else Connection
        connection = kind(host=host, port=port, **self._options(address))
        try:
            await connection.connect()
            self._on_connected(await _identity_of(connection) or f"{host}:{port}")
        except redis.TimeoutError as exc:
            await connection.disconnect(nowait=True)
            raise Unreachable(f"{host}:{port}: no connection{' with TLS' * address.is_encrypted} in time") from exc
        except redis.ConnectionError as exc:
            await connection.disconnect(nowait=True)
            if type(exc) is not redis.ConnectionError:  # a refusal, such as of the password
                raise
            raise Unreachable(f"{host}:{port}: {reason_of(exc, host)}") from exc
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


async def primary_of(address: RedisAddress) -> tuple[str, int]:
    """Return the address of the server that most Sentinels name.

    One may be cut off from the others and still name the former primary, and one may hang. So all are asked at
    once, and the answer of more than half of them is enough.

    Raises:
        Unreachable: none names one, or they disagree.
    """
    if address.master is None:
        return address.nodes[0]
    asked = [asyncio.create_task(_ask(node, address, address.master)) for node in address.nodes]
    votes: Counter[tuple[str, int]] = Counter()
    reasons: dict[str, None] = {}
    try:
        for answer in asyncio.as_completed(asked):
            match await answer:
                case str() as reason:
                    reasons[reason] = None
                case found:
                    votes[found] += 1
                    if 2 * votes[found] > len(asked):
                        return found
    finally:
        for each in asked:
            each.cancel()
        await asyncio.gather(*asked, return_exceptions=True)  # they close their connections
    if not votes:
        raise Unreachable(f"no Sentinel names a primary: {'; '.join(reasons)}")
    (found, most), *others = votes.most_common(2)
    if others and others[0][1] == most:
        raise Unreachable("the Sentinels disagree about the primary")
    return found


async def _ask(node: tuple[str, int], address: RedisAddress, master: str) -> tuple[str, int] | str:
    """Return the primary that one Sentinel names, or which Sentinel names none, and why."""
    place = f"{node[0]}:{node[1]}"
    options: dict[str, Any] = {"socket_timeout": SENTINEL_S, "socket_connect_timeout": SENTINEL_S}
    options |= {"retry": Retry(NoBackoff(), 0), "ssl": address.is_encrypted}
    sentinel: Any = Redis(host=node[0], port=node[1], **(options | dict(address.sentinel_options)))
    try:
        async with asyncio.timeout(SENTINEL_S):
            found = (await sentinel.sentinel_masters()).get(master)
        if found is None:
            return f"{place}: the name in IDEMPOTENCY_URL is not known"
        if not found["is_master"] or found["is_sdown"] or found["is_odown"]:
            return f"{place}: it is down"
        return str(found["ip"]), int(found["port"])
    except TimeoutError:
        return f"{place}: no answer in time"
    except redis.RedisError as exc:
        return f"{place}: {reason_of(exc, node[0])}"
    except (KeyError, TypeError, ValueError):
        return f"{place}: an unusable answer"
    finally:
        await sentinel.aclose()


async def _identity_of(connection: Any) -> str:
    """Return the server's ``run_id``; empty if it does not tell.

    Raises:
        redis.RedisError: the server is a node of Redis Cluster, or a Sentinel.
    """
    await connection.send_command("INFO", "server")
    try:
        facts = str(await connection.read_response())
    except redis.ResponseError:
        return ""  # the user may not ask; what matters is noticed by what the commands need
    if "redis_mode:cluster" in facts:
        raise redis.ResponseError("CLUSTER is refused")
    if "redis_mode:sentinel" in facts:
        raise Unreachable("this is a Sentinel: name it in redis+sentinel://")
    found = re.search(r"run_id:(\w+)", facts)
    return found[1] if found else ""
