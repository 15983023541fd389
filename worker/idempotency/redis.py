"""What the whole fleet remembers, in Redis. Each call is one Lua script, hence one atomic step.

Keys, all below the namespace: ``command:<id>`` is the record (a hash), ``uuid:<uuid>`` says whose a uuid is, under its
usual form and under the one that the platform gave,
``alike:<likeness>`` holds the ids of commands like each other that are held or in doubt, and ``ping`` is what a probe
writes. Any of them may hold anything, written by another version or by hand: a record that cannot be read proves
nothing, so that its command is in doubt.
"""

import re
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, get_args

import redis
from pydantic import ValidationError
from redis.backoff import NoBackoff
from redis.retry import Retry

from schemas.reply import FailureCode, RejectionCode, Reply
from worker.core.claims import (
    Ambiguous,
    Assigned,
    Assignment,
    Claim,
    Completed,
    InProgress,
    Key,
    KeyReused,
    KnownNotSent,
    Lease,
    LookalikeInProgress,
    NoCandidate,
    OnRecorded,
    Unresolved,
    Unseen,
    failed_ms,
)
from worker.core.doubt import DoubtWindow
from worker.core.replay import Replay
from worker.core.times import milliseconds
from worker.core.uuids import recorded_forms
from worker.errors import LeaseLost, SettingsError, StoreUnavailable, UuidTaken
from worker.idempotency.calls import MEANINGS, Calls, Script, code_of, is_other_server

TIMEOUT_S = 2.0  # for one call
PING_S = 0.5  # a probe itself has a second or two
_PING_LASTS_MS = 10_000
_ERRORS = "surrogateescape"  # what is no UTF-8 is read all the same, and written back as it was
_MAX_OWNER_BYTES = 200  # more than any id and a question mark
_COMMAND_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")

# The leases are on the clock of Redis, which all workers share; the times of a doubt are the workers' own.
_NOW = """
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
"""

_TYPES = """
local function is_type(key, wanted)
    return redis.call('TYPE', key).ok == wanted
end
local function forget_twin(key, id)
    if is_type(key, 'set') then redis.call('SREM', key, id) end
end
"""

# A time is in milliseconds since 1970; one in the future would keep its command waiting, maybe for ever.
_READ = """
local function is_time(text, latest)
    return string.find(text, '^%d+$') and #text <= 15 and tonumber(text) <= latest
end
local function is_readable(r, latest_doubt, latest_lease)
    local digest, state, lease, claimed, since, till, crashed, reply, token = unpack(r, 1, 9)
    if not digest or #digest ~= 32 or string.find(digest, '[^0-9a-f]') then return false end
    if not token or not string.find(token, '^%d+$') or #token > 16 or tonumber(token) > 9e15 then return false end
    if state == 'done' then return reply and reply ~= '' end
    if state == 'held' then
        if not lease or not is_time(lease, latest_lease) then return false end
        if not claimed or not is_time(claimed, latest_doubt) then return false end
        since, till, crashed = since or '', till or '', crashed or '0'
    elseif state ~= 'free' then
        return false
    end
    if not since or not till or (crashed ~= '0' and crashed ~= '1') then return false end
    if till == '' then return since == '' end
    if not is_time(till, latest_doubt) then return false end
    return since == '' or (is_time(since, latest_doubt) and tonumber(since) <= tonumber(till))
end
"""

# KEYS: record, alike. ARGV: command id, digest, time of the claim, lease, time to live; of a replay the time of the
# failure, and its doubt's since and until; a recorded reply that cannot be read.
_CLAIM = (
    _NOW
    + _TYPES
    + _READ
    + """
local lease, ttl = tonumber(ARGV[4]), tonumber(ARGV[5])
local hour = 3600000
local r, is_unreadable = {}, false
if is_type(KEYS[1], 'hash') and redis.call('HSTRLEN', KEYS[1], 'reply') <= 65536 then
    r = redis.call('HMGET', KEYS[1], 'digest', 'state', 'lease', 'claimed', 'since', 'until', 'crashed', 'reply',
        'token', 'failed')
    is_unreadable = not is_readable(r, tonumber(ARGV[3]) + lease + hour, now + lease + hour)
        or (r[2] == 'done' and r[8] == ARGV[9])
elseif not is_type(KEYS[1], 'none') then
    is_unreadable = true
end
local digest, state, since, till, crashed = r[1], r[2], r[5] or '', r[6] or '', r[7] or '0'
local answer, is_latest = 'first', state == 'held'
if is_unreadable then
    -- The token is higher than any that was counted, so that whatever a former holder writes is refused.
    local token = string.format('%.0f', t[1] * 1000000 + t[2])
    redis.call('DEL', KEYS[1])
    redis.call('HSET', KEYS[1], 'digest', ARGV[2], 'token', token)
    digest, state, since, till, crashed = ARGV[2], 'free', '', ARGV[3], '0'
end
if digest then
    if digest ~= ARGV[2] then return {'conflict'} end
    if state == 'done' then
        if ARGV[6] == '' or r[10] ~= ARGV[6] then return {'done', r[8]} end
        since, till, crashed = ARGV[7], ARGV[8], '0'
        redis.call('HDEL', KEYS[1], 'reply', 'failed')
    end
    if state == 'held' then
        if till == '' or (since ~= '' and tonumber(r[4]) < tonumber(since)) then since = r[4] end
        if now < tonumber(r[3]) then return {'busy', since} end
        local ended = tonumber(r[4]) + lease
        if till == '' or ended > tonumber(till) then till = string.format('%.0f', ended) end
        crashed = '1'
    end
    answer = till == '' and 'again' or 'in-doubt'
end
local token = 1
local ends = string.format('%.0f', now + lease)
if digest then
    token = redis.call('HINCRBY', KEYS[1], 'token', 1)
    redis.call('HSET', KEYS[1], 'state', 'held', 'lease', ends, 'claimed', ARGV[3],
        'since', since, 'until', till, 'crashed', crashed)
else
    redis.call('HSET', KEYS[1], 'digest', ARGV[2], 'state', 'held', 'lease', ends, 'claimed', ARGV[3],
        'token', token)
end
redis.call('PEXPIRE', KEYS[1], math.max(ttl, 2 * lease))
if not is_type(KEYS[2], 'set') then redis.call('DEL', KEYS[2]) end
redis.call('SADD', KEYS[2], ARGV[1])
redis.call('PEXPIRE', KEYS[2], math.max(ttl, 2 * lease))
return {answer, string.format('%.0f', token), since, till, crashed, is_latest and '1' or '0'}
"""
)

# A record that cannot be read any more is as good as lost: its next claim replaces it.
_HELD = (
    _TYPES
    + """
local r = is_type(KEYS[1], 'hash') and redis.call('HMGET', KEYS[1], 'token', 'state') or {}
if r[1] ~= ARGV[2] or r[2] ~= 'held' then return 'lost' end
"""
)

# KEYS: record, alike. ARGV: command id, token, time to live, since, until, crashed.
_RELEASE = (
    _HELD
    + """
redis.call('HSET', KEYS[1], 'state', 'free', 'since', ARGV[4], 'until', ARGV[5], 'crashed', ARGV[6])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
if ARGV[5] == '' then forget_twin(KEYS[2], ARGV[1]) end
return 'ok'
"""
)

# An owner behind a question mark was guessed: the uuid may as well belong to another command just like it. So may one
# whose owner cannot be read.
_OWNER = """
local function owner_of(key)
    if is_type(key, 'none') then return false end
    local owner = is_type(key, 'string') and redis.call('GETRANGE', key, 0, 199) or ''
    return #owner <= 129 and string.find(owner, '^%??[%w._:-]+$') and owner or '?'
end
-- A spelling is two digits, whether it is certain and whether it is written, and the key. A certain owner decides.
local function owner_by(spellings)
    local guess = false
    for _, spelling in ipairs(spellings) do
        local owner = owner_of(string.sub(spelling, 3))
        if owner and string.sub(spelling, 1, 1) == '0' and string.sub(owner, 1, 1) ~= '?' then owner = '?' .. owner end
        if owner and string.sub(owner, 1, 1) ~= '?' then return owner end
        guess = guess or owner
    end
    return guess
end
local function set_owner(spellings, owner, ttl)
    for _, spelling in ipairs(spellings) do
        local key = string.sub(spelling, 3)
        if string.sub(spelling, 2, 2) == '1' and is_type(key, 'none') then
            local is_guess = string.sub(spelling, 1, 1) == '0' and string.sub(owner, 1, 1) ~= '?'
            redis.call('SET', key, is_guess and '?' .. owner or owner, 'PX', ttl)
        end
    end
end
"""

# KEYS: record, alike. ARGV: command id, token, time to live, reply, time of the failure; the doubt's since and until;
# spellings of the uuid.
_COMPLETE = (
    _HELD
    + _OWNER
    + """
if #ARGV > 7 then
    local spellings = {unpack(ARGV, 8)}
    local owner = owner_by(spellings)
    if owner and owner ~= ARGV[1] and owner ~= '?' .. ARGV[1] then
        redis.call('HSET', KEYS[1], 'state', 'free', 'since', ARGV[6], 'until', ARGV[7], 'crashed', '0')
        redis.call('PEXPIRE', KEYS[1], ARGV[3])
        return 'taken'
    end
    set_owner(spellings, owner or ARGV[1], ARGV[3])
end
redis.call('HSET', KEYS[1], 'state', 'done', 'reply', ARGV[4])
redis.call('HDEL', KEYS[1], 'lease', 'claimed', 'since', 'until', 'crashed')
redis.call('PEXPIRE', KEYS[1], ARGV[3])
forget_twin(KEYS[2], ARGV[1])
if ARGV[5] ~= '' then redis.call('HSET', KEYS[1], 'failed', ARGV[5]) end
return 'ok'
"""
)

# KEYS: record, alike. ARGV: command id, token, time to live, what keys begin with, how many likely ones; of each uuid
# how many spellings it has, and those. Returns the number of a uuid.
_OWN = (
    _NOW
    + _HELD
    + _OWNER
    + """
local prefix, likely = ARGV[4], tonumber(ARGV[5])
local free, unlikely, guessed, mine = {}, 0, false, nil
local uuids, at = {}, 6
while at <= #ARGV do
    local last = at + tonumber(ARGV[at])
    uuids[#uuids + 1] = {unpack(ARGV, at + 1, last)}
    at = last + 1
end
for i, spellings in ipairs(uuids) do
    local owner = owner_by(spellings)
    if not owner or owner == ARGV[1] or owner == '?' .. ARGV[1] then
        if i <= likely then free[#free + 1] = i else unlikely = unlikely + 1 end
        if owner and i <= likely then mine = mine or i end
    elseif string.sub(owner, 1, 1) == '?' then
        guessed = true
    end
end
if #free == 0 and unlikely == 0 then return guessed and 'undecidable' or 'none' end
local open = 1
for _, twin in ipairs(is_type(KEYS[2], 'set') and redis.call('SMEMBERS', KEYS[2]) or {}) do
    local record = prefix .. 'command:' .. twin
    if twin ~= ARGV[1] and not is_type(record, 'none') then
        local state = is_type(record, 'hash') and redis.call('HMGET', record, 'state', 'lease') or {}
        local ends = tonumber(state[2] or '')
        if state[1] == 'held' and ends and now < ends and ends < now + 3600000 then return 'twin' end
        open = open + 1
    end
end
if #free == 0 or #free + unlikely > open then return 'undecidable' end
if not mine then
    mine = free[1]
    local owner = #free + unlikely > 1 and '?' .. ARGV[1] or ARGV[1]
    set_owner(uuids[mine], owner, ARGV[3])
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
        self._url = url
        self._max_connections = connections
        self._prefix = f"{{{namespace}}}:"  # in braces: a cluster keeps what belongs together on one node
        self._ttl_ms = ttl_s * 1000
        self._lease_s = lease_s
        self._claim = Script(_CLAIM)
        self._release = Script(_RELEASE)
        self._complete = Script(_COMPLETE)
        self._own = Script(_OWN)
        try:
            self._redis, self._pinging = self._new_clients()
            for client in (self._redis, self._pinging):  # which tells whether there are such options
                client.connection_pool.connection_class(**client.connection_pool.connection_kwargs)
            self._calls = Calls(self._redis.connection_pool.make_connection(), self._renew_clients)
        except (ValueError, TypeError, redis.RedisError) as exc:
            line = f"IDEMPOTENCY_URL: an option after ? cannot be used: {type(exc).__name__}"
            raise SettingsError([line]) from exc

    def claim(self, key: Key, now: datetime, replay: Replay | None = None) -> Claim:
        lease_ms = round(self._lease_s * 1000)
        meant = ["", "", ""] if replay is None else [milliseconds(replay.failed_at), *_interval(replay.doubt)]
        identity = [key.command_id, key.content_hash.hex(), milliseconds(now)]
        unreadable = b""
        while True:
            began = time.monotonic()
            arguments = [*identity, lease_ms, self._ttl_ms, *meant, unreadable]
            answer = self._call(self._claim, self._keys(key), arguments)
            match answer:
                case ["conflict"]:
                    return KeyReused()
                case ["done", text]:
                    reply = _read_reply(text, key.command_id)
                    if reply is not None:
                        return Completed(reply)
                    unreadable = text.encode(errors=_ERRORS)  # claimed again, it is replaced unless it has changed
                case ["busy", since]:
                    return InProgress(_moment(since) if since else None)
                case [granted, token, since, until, holder_crashed, is_latest]:
                    hold = Lease(key, int(token), began + self._lease_s)
                    # Redis may have lost its last writes, and never says so: then this is how it was before them.
                    unrecorded_until = None if is_latest == "1" else now
                    if granted == "first":
                        return Unseen(hold, now)
                    if granted == "again":
                        return KnownNotSent(hold, unrecorded_until)
                    doubt = DoubtWindow(_moment(since) if since else None, _moment(until))
                    return Unresolved(hold, doubt, holder_crashed == "1", unrecorded_until)
                case _:
                    raise AssertionError(answer)  # the script has no other

    def mark_not_sent(self, key: Key) -> None:
        """Do nothing: should Redis lose the later claim of another delivery, the note would deny its request."""

    def is_claimed_here(self, _key: Key, /) -> bool:
        """Return False: the record stays when this process goes."""
        return False

    def release(self, hold: Lease, doubt: DoubtWindow | None, *, holder_crashed: bool = False) -> None:
        self._change(self._release, hold, [*_interval(doubt), int(holder_crashed)])

    def owned_by_others(self, key: Key, uuids: Sequence[str]) -> set[str]:
        if not uuids:
            return set()
        spelled = [(uuid, spelling) for uuid in uuids for spelling in recorded_forms(uuid) if spelling.is_certain]
        try:
            with self._redis.pipeline(transaction=False) as pipeline:
                for _, spelling in spelled:
                    pipeline.getrange(self._owner_key(spelling.text), 0, _MAX_OWNER_BYTES)  # it may hold megabytes
                found = pipeline.execute(raise_on_error=False)
            for answer in found:
                if isinstance(answer, redis.RedisError) and is_other_server(answer):
                    raise answer
        except redis.RedisError as exc:
            raise self._unavailable(exc) from exc
        owners: dict[str, str] = {}
        for (uuid, _), owner in zip(spelled, found, strict=True):
            if isinstance(owner, str) and _COMMAND_ID.fullmatch(owner):
                owners.setdefault(uuid, owner)
        return {uuid for uuid, owner in owners.items() if owner != key.command_id}

    def own(self, hold: Lease, uuids: Sequence[str], unlikely: Sequence[str]) -> Assignment:
        named = [*uuids, *unlikely]
        arguments: list[object] = [self._prefix, len(uuids)]
        for uuid in named:
            spelled = self._spellings(uuid)
            arguments += [len(spelled), *spelled]
        match self._change(self._own, hold, arguments):
            case "none":
                return NoCandidate()
            case "twin":
                return LookalikeInProgress()
            case "undecidable":
                return Ambiguous()
            case [number]:
                return Assigned(named[int(number) - 1])
            case answer:
                raise AssertionError(answer)  # the script has no other

    def complete(self, hold: Lease, reply: Reply, doubt: DoubtWindow | None, on_end: OnRecorded) -> None:
        failed = failed_ms(reply)
        outcome = [reply.model_dump_json(), "" if failed is None else failed]
        spelled = self._spellings(reply.uuid) if reply.uuid else []
        arguments = [*self._identity(hold), *outcome, *_interval(doubt), *spelled]

        def on_answer(answer: Any) -> None:
            if isinstance(answer, redis.RedisError):
                on_end(unavailable(answer))
            elif answer == "taken":
                on_end(UuidTaken(hold.key.command_id))
            else:
                on_end(LeaseLost(hold.key.command_id) if answer == "lost" else None)

        self._calls.leave(self._complete, self._keys(hold.key), arguments, on_answer)

    def ping(self) -> None:
        """Write, since a server that may not be written to any more answers everything else as ever."""
        try:
            self._pinging.set(f"{self._prefix}ping", "1", px=_PING_LASTS_MS)
        except redis.RedisError as exc:
            raise self._unavailable(exc) from exc

    def close(self) -> None:
        """Close the connections."""
        self._calls.close()
        self._redis.close()
        self._pinging.close()

    def _new_clients(self) -> tuple[redis.Redis, redis.Redis]:
        """Return what looks for owners of uuids, and what pings; none has a connection yet."""
        retry = Retry(NoBackoff(), 0)  # a claim whose answer was lost may have been granted
        pool = redis.BlockingConnectionPool.from_url(
            self._url,
            max_connections=self._max_connections,
            timeout=TIMEOUT_S,
            socket_timeout=TIMEOUT_S,
            socket_connect_timeout=TIMEOUT_S,
            retry=retry,
            decode_responses=True,
            encoding_errors=_ERRORS,
        )
        # A connection of its own: a probe neither waits for the handlers' nor takes one from them.
        pinging = redis.Redis.from_url(
            self._url, socket_timeout=PING_S, socket_connect_timeout=PING_S, retry=retry, encoding_errors=_ERRORS
        )
        return redis.Redis(connection_pool=pool), pinging

    def _renew_clients(self) -> None:
        """Leave the connections to what is no primary any more; whoever is using one of them finishes first."""
        former = (self._redis, self._pinging)
        self._redis, self._pinging = self._new_clients()
        for client in former:
            client.connection_pool.disconnect(inuse_connections=False)

    def _unavailable(self, error: redis.RedisError) -> StoreUnavailable:
        """Say why Redis cannot be used; if it is another server's turn, have all connections made anew."""
        if is_other_server(error):
            self._calls.renew()
            self._renew_clients()
        return unavailable(error)

    def _keys(self, key: Key) -> list[str]:
        return [f"{self._prefix}command:{key.command_id}", f"{self._prefix}alike:{key.match_key.hex()}"]

    def _owner_key(self, spelling: str) -> str:
        return f"{self._prefix}uuid:{spelling}"

    def _spellings(self, uuid: str) -> list[str]:
        """Return the spellings of a uuid as the scripts read them."""
        return [f"{each.is_certain:d}{each.is_written:d}{self._owner_key(each.text)}" for each in recorded_forms(uuid)]

    def _identity(self, hold: Lease) -> list[object]:
        return [hold.key.command_id, hold.token, self._ttl_ms]

    def _change(self, script: Script, hold: Lease, arguments: Sequence[object]) -> Any:
        answer = self._call(script, self._keys(hold.key), [*self._identity(hold), *arguments])
        if answer == "lost":
            raise LeaseLost(hold.key.command_id)
        return answer

    def _call(self, script: Script, keys: Sequence[str], arguments: Sequence[Any]) -> Any:
        try:
            return self._calls.run(script, keys, arguments)
        except redis.RedisError as exc:
            raise unavailable(exc) from exc  # the calls have seen to the connections


def unavailable(error: redis.RedisError) -> StoreUnavailable:
    """Say that Redis cannot be used: its code or the type, and not its words, which may hold the URL."""
    code = code_of(error)
    return StoreUnavailable(f"Redis: {type(error).__name__}" if code is None else f"Redis: {code}: {MEANINGS[code]}")


def _read_reply(text: str, command_id: str) -> Reply | None:
    """Return a recorded reply, None where it is none of this command's; fields of a newer version are ignored."""
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


def _interval(doubt: DoubtWindow | None) -> tuple[int | str, int | str]:
    since = "" if doubt is None or doubt.since is None else milliseconds(doubt.since)
    return since, "" if doubt is None else milliseconds(doubt.until)


def _moment(ms: str) -> datetime:
    return datetime.fromtimestamp(int(ms) / 1000, UTC)
