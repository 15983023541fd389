"""The records of a fleet, in Redis. Each call that writes is one Lua script, hence one atomic step.

Keys, all with the namespace as prefix: ``command:<id>`` is a command's record (a hash). ``uuid:<uuid>`` has the owner
of a uuid, under its usual form and under the one that the platform gave. ``alike:<match key>`` is the set of the ids of
lookalikes that are held or in doubt. ``ping`` is written by probes. Another version or a person may have written
anything into them: a record that cannot be read proves nothing, so its command is in doubt.
"""

import re
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.resources import files
from typing import Any, get_args

import redis
from pydantic import ValidationError
from redis.asyncio import ConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from schemas.reply import FailureCode, RejectionCode, Reply
from worker.core.claims import (
    Claim,
    Completed,
    InProgress,
    Key,
    KeyReused,
    KnownNotSent,
    Lease,
    Unresolved,
    Unseen,
    failed_ms,
)
from worker.core.doubt_window import DoubtWindow
from worker.core.envelope import Replay
from worker.core.ownership import Owner, OwnershipFacts
from worker.core.times import milliseconds
from worker.core.uuids import recorded_forms
from worker.errors import LeaseLost, SettingsError, StoreUnavailable, UuidTaken
from worker.idempotency.redis_errors import MEANINGS, code_of
from worker.idempotency.round_trips import BatchedCalls, Script

TIMEOUT_S = 2.0  # of one round trip
PING_S = 0.5  # a probe's own timeout is a second or two
_PING_LASTS_MS = 10_000
_ERRORS = "surrogateescape"  # bytes that are not UTF-8 can be read, and written back unchanged
_MAX_OWNER_BYTES = 200  # longer than any command id with a question mark
_COMMAND_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_SCRIPTS = files("worker.idempotency") / "scripts"


def load_script(name: str, *parts: str) -> Script:
    """Read ``scripts/<name>.lua``, preceded by the shared ``scripts/parts/<part>.lua`` that it needs."""
    paths = [*(_SCRIPTS / "parts" / f"{part}.lua" for part in parts), _SCRIPTS / f"{name}.lua"]
    return Script("".join(path.read_text("utf-8") for path in paths))


class RedisStore:
    """Records commands for every worker that uses the same Redis and the same namespace.

    Args:
        url: ``redis://…`` or ``rediss://…``.
        namespace: prefix of every key.
        ttl_s: lifetime of a record after its last write, in seconds.
        lease_s: duration of a lease, in seconds.

    Raises:
        SettingsError: an option of the URL cannot be used.
    """

    is_shared = True
    local = None

    def __init__(self, url: str, namespace: str, *, ttl_s: int, lease_s: float) -> None:
        self._prefix = f"{{{namespace}}}:"  # a hash tag: a cluster keeps all of these keys on one node
        self._ttl_ms = ttl_s * 1000
        self._lease_s = lease_s
        self._claim = load_script("claim", "clock", "types", "readable")
        self._release = load_script("release", "types", "lease")
        self._ownership = load_script("ownership", "clock", "types", "lease", "owners")
        self._complete = load_script("complete", "types", "lease", "owners")
        try:
            self._calls = self._new_calls(url, TIMEOUT_S)
            self._pings = self._new_calls(url, PING_S)  # a probe does not wait for a round trip of the commands
        except (ValueError, TypeError, redis.RedisError) as exc:
            line = f"IDEMPOTENCY_URL: an option after ? cannot be used: {type(exc).__name__}"
            raise SettingsError([line]) from exc

    async def claim(self, key: Key, now: datetime, replay: Replay | None = None) -> Claim:
        lease_ms = round(self._lease_s * 1000)
        discarded = ["", "", ""] if replay is None else [milliseconds(replay.failed_at), *_interval(replay.doubt)]
        identity = [key.command_id, key.content_hash.hex(), milliseconds(now)]
        unreadable = b""
        while True:
            began = time.monotonic()
            arguments = [*identity, lease_ms, self._ttl_ms, *discarded, unreadable]
            answer = await self._run(self._claim, self._keys(key), arguments)
            match answer:
                case ["key-reused"]:
                    return KeyReused()
                case ["completed", text]:
                    reply = _read_reply(text, key.command_id)
                    if reply is not None:
                        return Completed(reply)
                    unreadable = text.encode(errors=_ERRORS)  # the next claim replaces it unless it has changed
                case ["in-progress", since]:
                    return InProgress(_moment(since) if since else None)
                case [granted, token, since, until, holder_crashed, is_latest]:
                    lease = Lease(key, int(token), began + self._lease_s)
                    # Redis may have lost its last writes without a sign of it: then this is the record before them.
                    unrecorded_until = None if is_latest == "1" else now
                    if granted == "unseen":
                        return Unseen(lease, now)
                    if granted == "known-not-sent":
                        return KnownNotSent(lease, unrecorded_until)
                    doubt = DoubtWindow(_moment(since) if since else None, _moment(until))
                    return Unresolved(lease, doubt, holder_crashed == "1", unrecorded_until)
                case _:
                    raise AssertionError(answer)  # the script returns nothing else

    async def release(self, lease: Lease, doubt: DoubtWindow | None, *, holder_crashed: bool = False) -> None:
        arguments = [*_identity(lease), self._ttl_ms, *_interval(doubt), int(holder_crashed)]
        await self._run_with_lease(self._release, lease, arguments)

    async def owned_by_others(self, key: Key, uuids: Sequence[str]) -> set[str]:
        if not uuids:
            return set()
        spelled = [(uuid, spelling) for uuid in uuids for spelling in recorded_forms(uuid) if spelling.is_certain]
        # Not GET: another program's value may be megabytes long.
        names = (self._owner_key(spelling.text) for _, spelling in spelled)
        found = await self._calls.execute(*(("GETRANGE", name, 0, _MAX_OWNER_BYTES) for name in names))
        for answer in found:
            is_of_its_key = isinstance(answer, redis.ResponseError) and code_of(answer) is None
            if isinstance(answer, redis.RedisError) and not is_of_its_key:
                raise unavailable(answer) from answer
        owners: dict[str, str] = {}
        for (uuid, _), owner in zip(spelled, found, strict=True):
            if isinstance(owner, str) and _COMMAND_ID.fullmatch(owner):
                owners.setdefault(uuid, owner)
        return {uuid for uuid, owner in owners.items() if owner != key.command_id}

    async def ownership(self, lease: Lease, uuids: Sequence[str]) -> OwnershipFacts:
        arguments: list[object] = [*_identity(lease), self._prefix]
        for uuid in uuids:
            spelled = self._spellings(uuid)
            arguments += [len(spelled), *spelled]
        lookalikes, is_held, *owners = await self._run_with_lease(self._ownership, lease, arguments)
        return OwnershipFacts(dict(zip(uuids, map(_owner, owners), strict=True)), int(lookalikes), is_held == 1)

    async def complete(self, lease: Lease, reply: Reply, doubt: DoubtWindow | None, *, is_guess: bool = False) -> None:
        command_id = lease.key.command_id
        failed = failed_ms(reply)
        outcome = [reply.model_dump_json(), "" if failed is None else failed]
        owner = f"?{command_id}" if is_guess else command_id
        spelled = self._spellings(reply.uuid) if reply.uuid else []
        arguments = [*_identity(lease), self._ttl_ms, *outcome, *_interval(doubt), owner, *spelled]
        if await self._run_with_lease(self._complete, lease, arguments) == "taken":
            raise UuidTaken(command_id)

    async def ping(self) -> None:
        """Write a key: a server that no longer accepts writes still answers everything else."""
        [answer] = await self._pings.execute(("SET", f"{self._prefix}ping", "1", "PX", _PING_LASTS_MS))
        if isinstance(answer, redis.RedisError):
            raise unavailable(answer) from answer

    async def close(self) -> None:
        """Close the connections."""
        await self._calls.close()
        await self._pings.close()

    def _new_calls(self, url: str, timeout_s: float) -> BatchedCalls:
        pool = ConnectionPool.from_url(
            url,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 0),  # a claim whose answer was lost may have been granted
            decode_responses=True,
            encoding_errors=_ERRORS,
        )
        timeout_s = float(pool.connection_kwargs.pop("socket_timeout"))  # the URL may give another one
        connection = pool.connection_class(**pool.connection_kwargs)
        return BatchedCalls(connection, timeout_s, self._reconnect)

    def _reconnect(self) -> None:
        """Replace the connections to a former primary."""
        self._calls.reconnect()
        self._pings.reconnect()

    def _keys(self, key: Key) -> list[str]:
        return [f"{self._prefix}command:{key.command_id}", f"{self._prefix}alike:{key.match_key.hex()}"]

    def _owner_key(self, spelling: str) -> str:
        return f"{self._prefix}uuid:{spelling}"

    def _spellings(self, uuid: str) -> list[str]:
        """Return the spellings of a uuid in the form that ``scripts/parts/owners.lua`` reads."""
        return [f"{each.is_certain:d}{each.is_written:d}{self._owner_key(each.text)}" for each in recorded_forms(uuid)]

    async def _run_with_lease(self, script: Script, lease: Lease, arguments: Sequence[object]) -> Any:
        answer = await self._run(script, self._keys(lease.key), arguments)
        if answer == "lost":
            raise LeaseLost(lease.key.command_id)
        return answer

    async def _run(self, script: Script, keys: Sequence[str], arguments: Sequence[Any]) -> Any:
        try:
            return await self._calls.run(script, keys, arguments)
        except redis.RedisError as exc:
            raise unavailable(exc) from exc


def unavailable(error: redis.RedisError) -> StoreUnavailable:
    """Return why Redis cannot be used: its code or the error's type, not its text, which may contain the URL."""
    code = code_of(error)
    return StoreUnavailable(f"Redis: {type(error).__name__}" if code is None else f"Redis: {code}: {MEANINGS[code]}")


def _read_reply(text: str, command_id: str) -> Reply | None:
    """Parse a recorded reply; None if it is not a reply to this command. Fields of a newer version are ignored."""
    try:
        reply = Reply.model_validate_json(text.encode(errors=_ERRORS), extra="ignore")
    except ValidationError:
        return None
    code = None if reply.error is None else reply.error.code
    match reply.status:
        case "accepted":
            is_whole = code is None and bool(reply.uuid)
        case "rejected":
            is_whole = code in get_args(RejectionCode) and reply.uuid is None
        case "failed":
            is_whole = code in get_args(FailureCode) and reply.uuid is None
    return reply if is_whole and reply.command_id == command_id else None


def _identity(lease: Lease) -> list[object]:
    return [lease.key.command_id, lease.token]


def _owner(text: str) -> Owner | None:
    """Read an owner as ``scripts/parts/owners.lua`` writes it."""
    command_id = text.removeprefix("?")
    return Owner(command_id or None, is_certain=command_id == text) if text else None


def _interval(doubt: DoubtWindow | None) -> tuple[int | str, int | str]:
    since = "" if doubt is None or doubt.since is None else milliseconds(doubt.since)
    return since, "" if doubt is None else milliseconds(doubt.until)


def _moment(ms: str) -> datetime:
    return datetime.fromtimestamp(int(ms) / 1000, UTC)
