"""What the whole fleet remembers, in Redis. Each call is one Lua script, hence one atomic step.

Keys, all below the namespace: ``command:<id>`` is the record (a hash), ``uuid:<uuid>`` says whose a uuid is,
``alike:<likeness>`` holds the ids of commands like each other that are held or in doubt, and ``epoch`` tells a store
that has lost its records from one that never had any.
"""

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from schemas.reply import Reply
from worker.doubt import Doubt
from worker.errors import LeaseLost, SettingsError, StoreUnavailable
from worker.idempotency import (
    Again,
    Busy,
    Choice,
    Claim,
    Conflict,
    Done,
    First,
    Hold,
    InDoubtSince,
    Key,
    NoneLeft,
    OnRecorded,
    Owned,
    TwinUnderWay,
    Undecidable,
    failed_ms,
)
from worker.idempotency.calls import Calls, Script
from worker.replay import Replay
from worker.times import milliseconds

TIMEOUT_S = 2.0  # for one call
PING_S = 0.5  # a probe itself has a second or two

# The leases are on the clock of Redis, which all workers share; the times of a doubt are the workers' own.
_NOW = """
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
"""

# KEYS: record, alike, epoch. ARGV: command id, digest, time of the claim, lease, time to live, a new epoch; of a replay
# the time of the failure, and its doubt's since and until.
_CLAIM = (
    _NOW
    + """
local lease, ttl = tonumber(ARGV[4]), tonumber(ARGV[5])
local epoch = redis.call('GET', KEYS[3])
if not epoch then
    epoch = ARGV[6]
    redis.call('SET', KEYS[3], epoch)
end
local r = redis.call('HMGET', KEYS[1], 'digest', 'state', 'lease', 'claimed', 'since', 'until', 'crashed', 'reply',
    'failed')
local digest, state, since, till, crashed = r[1], r[2], r[5] or '', r[6] or '', r[7] or '0'
local answer = 'first'
if digest then
    if digest ~= ARGV[2] then return {'conflict'} end
    if state == 'done' then
        if ARGV[7] == '' or r[9] ~= ARGV[7] then return {'done', r[8]} end
        since, till = ARGV[8], ARGV[9]
        redis.call('HDEL', KEYS[1], 'reply', 'failed')
    end
    if state == 'held' then
        if till == '' or (since ~= '' and tonumber(r[4]) < tonumber(since)) then since = r[4] end
        if now < tonumber(r[3]) then return {'busy', since} end
        local ended = tonumber(r[4]) + lease
        if till == '' or ended > tonumber(till) then till = string.format('%d', ended) end
        crashed = '1'
    end
    answer = till == '' and 'again' or 'in-doubt'
end
local token = 1
if digest then
    token = redis.call('HINCRBY', KEYS[1], 'token', 1)
    redis.call('HSET', KEYS[1], 'state', 'held', 'lease', now + lease, 'claimed', ARGV[3],
        'since', since, 'until', till, 'crashed', crashed)
else
    redis.call('HSET', KEYS[1], 'digest', ARGV[2], 'state', 'held', 'lease', now + lease, 'claimed', ARGV[3],
        'token', token)
end
redis.call('PEXPIRE', KEYS[1], math.max(ttl, 2 * lease))
redis.call('SADD', KEYS[2], ARGV[1])
redis.call('PEXPIRE', KEYS[2], math.max(ttl, 2 * lease))
return {answer, token, epoch, since, till, crashed}
"""
)

_HELD = """
local r = redis.call('HMGET', KEYS[1], 'token', 'state')
if r[1] ~= ARGV[2] or r[2] ~= 'held' then return 'lost' end
"""

# KEYS: record, alike. ARGV: command id, token, time to live, since, until, crashed.
_RELEASE = (
    _HELD
    + """
redis.call('HSET', KEYS[1], 'state', 'free', 'since', ARGV[4], 'until', ARGV[5], 'crashed', ARGV[6])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
if ARGV[5] == '' then redis.call('SREM', KEYS[2], ARGV[1]) end
return 'ok'
"""
)

# KEYS: record, alike, owner of the uuid. ARGV: command id, token, time to live, reply, uuid, time of the failure.
_COMPLETE = (
    _HELD
    + """
redis.call('HSET', KEYS[1], 'state', 'done', 'reply', ARGV[4])
redis.call('HDEL', KEYS[1], 'lease', 'claimed', 'since', 'until', 'crashed')
redis.call('PEXPIRE', KEYS[1], ARGV[3])
redis.call('SREM', KEYS[2], ARGV[1])
if ARGV[6] ~= '' then redis.call('HSET', KEYS[1], 'failed', ARGV[6]) end
if ARGV[5] ~= '' then redis.call('SET', KEYS[3], ARGV[1], 'NX', 'PX', ARGV[3]) end
return 'ok'
"""
)

# KEYS: record, alike. ARGV: command id, token, time to live, what keys begin with, how many likely ones, uuids.
# An owner behind a question mark was guessed: the uuid may as well belong to another command just like it.
_OWN = (
    _NOW
    + _HELD
    + """
local prefix, likely = ARGV[4], tonumber(ARGV[5])
local free, unlikely, guessed, mine = {}, 0, false, nil
for i = 6, #ARGV do
    local owner = redis.call('GET', prefix .. 'uuid:' .. ARGV[i])
    if not owner or owner == ARGV[1] or owner == '?' .. ARGV[1] then
        if i - 5 <= likely then free[#free + 1] = ARGV[i] else unlikely = unlikely + 1 end
        if owner and i - 5 <= likely then mine = mine or ARGV[i] end
    elseif string.sub(owner, 1, 1) == '?' then
        guessed = true
    end
end
if #free == 0 and unlikely == 0 then return guessed and 'undecidable' or 'none' end
local open = 1
for _, twin in ipairs(redis.call('SMEMBERS', KEYS[2])) do
    if twin ~= ARGV[1] then
        local state = redis.call('HMGET', prefix .. 'command:' .. twin, 'state', 'lease')
        if state[1] == 'held' and now < tonumber(state[2]) then return 'twin' end
        if state[1] then open = open + 1 end
    end
end
if #free == 0 or #free + unlikely > open then return 'undecidable' end
if not mine then
    mine = free[1]
    local owner = #free + unlikely > 1 and '?' .. ARGV[1] or ARGV[1]
    redis.call('SET', prefix .. 'uuid:' .. mine, owner, 'PX', ARGV[3])
end
return {mine}
"""
)


class RedisStore:
    """Remembers commands for every worker that uses the same Redis and the same namespace.

    Args:
        url: ``redis://…`` or ``rediss://…``.
        namespace: begins every key.
        ttl_s: seconds for which a record lasts after it was last written.
        lease_s: seconds for which a claim is good.
        connections: how many may look for owners of uuids at once; all other calls share one connection.

    Raises:
        SettingsError: an option of the URL cannot be used.
    """

    def __init__(self, url: str, namespace: str, *, ttl_s: int, lease_s: float, connections: int) -> None:
        try:
            pool = redis.BlockingConnectionPool.from_url(
                url,
                max_connections=connections,
                timeout=TIMEOUT_S,
                socket_timeout=TIMEOUT_S,
                socket_connect_timeout=TIMEOUT_S,
                retry=Retry(NoBackoff(), 0),  # a claim whose answer was lost may have been granted
                decode_responses=True,
            )
            self._redis = redis.Redis(connection_pool=pool)
            # A connection of its own: a probe neither waits for the handlers' nor takes one from them.
            self._pinging = redis.Redis.from_url(
                url, socket_timeout=PING_S, socket_connect_timeout=PING_S, retry=Retry(NoBackoff(), 0)
            )
            for each in (pool, self._pinging.connection_pool):
                each.connection_class(**each.connection_kwargs)  # which tells whether there are such options
            self._calls = Calls(self._redis.connection_pool.make_connection())
        except (ValueError, TypeError, redis.RedisError) as exc:
            line = f"IDEMPOTENCY_URL: an option after ? cannot be used: {type(exc).__name__}"
            raise SettingsError([line]) from exc
        self._prefix = f"{{{namespace}}}:"  # in braces: a cluster keeps what belongs together on one node
        self._ttl_ms = ttl_s * 1000
        self._lease_s = lease_s
        self._claim = Script(_CLAIM)
        self._release = Script(_RELEASE)
        self._complete = Script(_COMPLETE)
        self._own = Script(_OWN)
        self._epoch = uuid4().hex
        self._known_epoch: str | None = None

    def claim(self, key: Key, now: datetime, replay: Replay | None = None) -> Claim:
        began = time.monotonic()
        keys = [*self._keys(key), f"{self._prefix}epoch"]
        lease_ms = round(self._lease_s * 1000)
        meant = ["", "", ""] if replay is None else [milliseconds(replay.failed_at), *_interval(replay.doubt)]
        identity = [key.command_id, key.digest.hex(), milliseconds(now)]
        answer = self._call(self._claim, keys, [*identity, lease_ms, self._ttl_ms, self._epoch, *meant])
        match answer:
            case ["conflict"]:
                return Conflict()
            case ["done", reply]:
                return Done(Reply.model_validate_json(reply))
            case ["busy", since]:
                return Busy(_moment(since) if since else None)
        granted, token, epoch, since, until, has_crashed = answer
        if self._known_epoch is None:
            self._known_epoch = epoch
        hold = Hold(key, token, began + self._lease_s)
        if granted == "first":
            # What this process began itself it may have begun because everything before was lost.
            is_complete = epoch == self._known_epoch != self._epoch
            return First(hold, None if is_complete else now)
        if granted == "again":
            return Again(hold)
        doubt = Doubt(_moment(since) if since else None, _moment(until))
        return InDoubtSince(hold, doubt, has_crashed == "1")

    def note_unsent(self, key: Key) -> None:
        """Do nothing: that nobody has claimed it says the same."""

    def is_claimed_here(self, _key: Key, /) -> bool:
        """Return False: the record stays when this process goes."""
        return False

    def release(self, hold: Hold, doubt: Doubt | None, *, has_crashed: bool = False) -> None:
        self._change(self._release, hold, [*_interval(doubt), int(has_crashed)])

    def owned_by_others(self, key: Key, uuids: Sequence[str]) -> set[str]:
        if not uuids:
            return set()
        try:
            owners: Any = self._redis.mget([f"{self._prefix}uuid:{uuid}" for uuid in uuids])
        except redis.RedisError as exc:
            raise _unavailable(exc) from exc
        known = zip(uuids, owners, strict=True)
        return {uuid for uuid, owner in known if owner not in {None, key.command_id} and not owner.startswith("?")}

    def own(self, hold: Hold, uuids: Sequence[str], unlikely: Sequence[str]) -> Choice:
        match self._change(self._own, hold, [self._prefix, len(uuids), *uuids, *unlikely]):
            case "none":
                return NoneLeft()
            case "twin":
                return TwinUnderWay()
            case "undecidable":
                return Undecidable()
            case [uuid]:
                return Owned(str(uuid))
            case answer:
                raise AssertionError(answer)  # the script has no other

    def complete(self, hold: Hold, reply: Reply, on_end: OnRecorded) -> None:
        uuid = reply.uuid or ""
        failed = failed_ms(reply)
        keys = [*self._keys(hold.key), f"{self._prefix}uuid:{uuid}"]
        arguments = [*self._identity(hold), reply.model_dump_json(), uuid, "" if failed is None else failed]

        def on_answer(answer: Any) -> None:
            if isinstance(answer, redis.RedisError):
                on_end(_unavailable(answer))
            else:
                on_end(LeaseLost(hold.key.command_id) if answer == "lost" else None)

        self._calls.leave(self._complete, keys, arguments, on_answer)

    def ping(self) -> None:
        try:
            self._pinging.ping()
        except redis.RedisError as exc:
            raise _unavailable(exc) from exc

    def close(self) -> None:
        """Close the connections."""
        self._calls.close()
        self._redis.close()
        self._pinging.close()

    def _keys(self, key: Key) -> list[str]:
        return [f"{self._prefix}command:{key.command_id}", f"{self._prefix}alike:{key.likeness.hex()}"]

    def _identity(self, hold: Hold) -> list[object]:
        return [hold.key.command_id, hold.token, self._ttl_ms]

    def _change(self, script: Script, hold: Hold, arguments: Sequence[object]) -> Any:
        answer = self._call(script, self._keys(hold.key), [*self._identity(hold), *arguments])
        if answer == "lost":
            raise LeaseLost(hold.key.command_id)
        return answer

    def _call(self, script: Script, keys: Sequence[str], arguments: Sequence[Any]) -> Any:
        try:
            return self._calls.run(script, keys, arguments)
        except redis.RedisError as exc:
            raise _unavailable(exc) from exc


def _unavailable(error: redis.RedisError) -> StoreUnavailable:
    """Say that Redis cannot be used: the type and not the words, which may hold the URL."""
    return StoreUnavailable(f"Redis: {type(error).__name__}")


def _interval(doubt: Doubt | None) -> tuple[int | str, int | str]:
    since = "" if doubt is None or doubt.since is None else milliseconds(doubt.since)
    return since, "" if doubt is None else milliseconds(doubt.until)


def _moment(ms: str) -> datetime:
    return datetime.fromtimestamp(int(ms) / 1000, UTC)
