"""The records of a fleet, in Redis. Each call that writes is one Lua script, hence one atomic step.

Keys, all with the namespace as prefix, and in one hash slot: ``command:<owner id>`` is a command's record (a hash). The
owner id is the command id, or with a slash and the system that sent it, where another system has that id
(``scripts/parts/place.lua``). ``uuid:<uuid>`` has the owner of a uuid, under its usual form and under the one that the
platform gave. ``alike:<match key>`` is the set of the owner ids of lookalikes that are held or in doubt.
``result:<scoped id>:<uuid>`` is the result of a command. ``epoch`` tells since when no record can have been lost.
Another version or a person may have written anything into them: a record that cannot be read proves nothing, so its
command is in doubt.
"""

import asyncio
import math
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from typing import Any, Literal, get_args
from uuid import uuid4

import redis
from pydantic import ValidationError

from schemas.onenet import usable_uuid
from schemas.reply import FailureCode, RejectionCode, Reply
from schemas.result import Result
from worker.core.claims import (
    Claim,
    Completed,
    InProgress,
    Inspection,
    Key,
    KeyReused,
    KnownNotSent,
    Lease,
    Loss,
    Unresolved,
    Unseen,
    failed_ms,
)
from worker.core.command import FIELD_DIGESTS_BYTES, differing_fields, scoped_id
from worker.core.doubt_window import DoubtWindow
from worker.core.envelope import Replay
from worker.core.epoch import Epoch, Retention
from worker.core.ownership import Owner, OwnershipFacts
from worker.core.redis_address import RedisAddress
from worker.core.times import milliseconds
from worker.core.uuids import canonical_uuid, recorded_forms
from worker.errors import LeaseLost, SettingsError, StoreRefused, StoreUnavailable, StoreUnusable, UuidTaken
from worker.idempotency.latest_address import LatestAddress
from worker.idempotency.redis_errors import LASTING, NotReplicated, code_of, reason_of
from worker.idempotency.redis_facts import OPTIONS, SECTIONS, inspection
from worker.idempotency.redis_server import ERRORS, RedisServer
from worker.idempotency.round_trips import BatchedCalls, Script

TIMEOUT_S = 2.0  # of one round trip
PING_S = 0.8  # a probe's own timeout is a second or two
_WAIT_SHARE = 0.4  # of the time of a round trip: for the replicas, twice where scripts are not known
MAX_OWNER_BYTES = 386  # longer than any owner id with a question mark
_LONG_S = 10 * 365 * 24 * 3600.0  # stands for an infinite time
ClaimKind = Literal["claim", "wait", "probe"]
OWNER_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}(?:/.{0,255})?", re.DOTALL)
_SCRIPTS = files("worker.idempotency") / "scripts"


def load_script(name: str, *parts: str) -> Script:
    """Read ``scripts/<name>.lua``, preceded by the shared ``scripts/parts/<part>.lua`` that it needs."""
    paths = [*(_SCRIPTS / "parts" / f"{part}.lua" for part in parts), _SCRIPTS / f"{name}.lua"]
    return Script("".join(path.read_text("utf-8") for path in paths))


class RedisStore:
    """Records commands for every worker that uses the same Redis and the same namespace.

    Args:
        url: ``redis://…``, ``rediss://…`` or ``redis+sentinel://…``.
        namespace: prefix of every key.
        ttl_s: lifetime of a record after its last write, in seconds.
        lease_s: duration of a lease, in seconds.
        reconcile_delay_s: for which the effect of a request may stay invisible, in seconds.
        replicas: how many of them must have a claim or an outcome before it counts.
        read_address: returns the address as the settings say by now; called, in a thread, before each connection.

    Raises:
        SettingsError: the URL, or an option of it, cannot be used.
    """

    is_shared = True
    local = None

    def __init__(
        self,
        url: str,
        namespace: str,
        *,
        ttl_s: int,
        lease_s: float,
        reconcile_delay_s: float = 60.0,
        replicas: int = 0,
        read_address: Callable[[], RedisAddress] | None = None,
    ) -> None:
        self._prefix = f"{{{namespace}}}:"  # a hash tag: all keys of a namespace are in one slot
        self._ttl_ms = ttl_s * 1000
        self._lease_s = lease_s
        self._retention = Retention(lease_s, reconcile_delay_s, ttl_s)
        self._replicas = replicas
        self._epoch = ""  # the latest that this process has seen
        self._server = ""  # that the latest connection leads to
        self._young_until = math.inf  # monotonic: until then a redelivery without a record is in doubt
        self._probe = f"#{uuid4().hex}"  # no command id contains a #
        self._claim = load_script("claim", "clock", "types", "readable", "epoch", "place")
        self._arrive = load_script("arrive", "clock", "types", "readable", "epoch", "place")
        self._release = load_script("release", "types", "lease")
        self._ownership = load_script("ownership", "clock", "types", "lease", "owners")
        self._complete = load_script("complete", "types", "lease", "owners")
        self.on_unavailable: Callable[[StoreUnavailable], object] = lambda _error: None
        try:
            address = RedisAddress.parse(url)
        except ValueError as exc:
            raise SettingsError([f"IDEMPOTENCY_URL: {exc}"]) from exc
        timeout_s = address.options.get("socket_timeout")
        latest = LatestAddress(address, read_address)
        call_s = timeout_s if isinstance(timeout_s, float) else TIMEOUT_S
        self._wait_s = _WAIT_SHARE * min(call_s, PING_S)  # the same, or the probe would say what is not so
        self._calls = self._new_calls(latest, call_s)
        self._pings = self._new_calls(latest, PING_S)  # a probe does not wait for a round trip of the commands

    async def claim(self, key: Key, now: datetime, replay: Replay | None = None, *, is_first: bool = True) -> Claim:
        discarded = ["", "", ""] if replay is None else [milliseconds(replay.failed_at), *_interval(replay.doubt)]
        unreadable = b""
        while True:
            began = time.monotonic()
            names, arguments = self._claim_of(key, now, discarded, unreadable, is_first=is_first)
            try:
                answer = await self._calls.run(self._claim, names, arguments, is_durable=True)
            except redis.RedisError as exc:
                if isinstance(exc, NotReplicated):
                    await self._give_back(key, exc.answer)
                raise self._failed(exc) from exc
            epoch_facts, answer = answer[:3], answer[3:]
            epoch = self._read_epoch(epoch_facts, now)
            match answer:
                case ["key-reused", recorded]:
                    return KeyReused(differing_fields(_digests(recorded), key.field_digests))
                case ["completed", text]:
                    reply = read_reply(text, key.command_id)
                    if reply is not None:
                        return Completed(reply)
                    unreadable = text.encode(errors=ERRORS)  # the next claim replaces it unless it has changed
                case ["in-progress", since]:
                    return InProgress(_moment(since) if since else None)
                case ["unseen", token, *_, is_own]:
                    lease = Lease(key, int(token), began + self._lease_s, _owner_id(key, is_own))
                    return Unseen(lease, now) if epoch is None else epoch.unseen(lease, now, self._retention)
                case [granted, token, since, until, holder_crashed, is_of_epoch, is_own]:
                    lease = Lease(key, int(token), began + self._lease_s, _owner_id(key, is_own))
                    # A record of an earlier epoch may be the one before the writes that were lost.
                    loss, unrecorded_until = Loss.OF_REDELIVERIES, None
                    if epoch is not None:
                        loss = Loss.NONE if is_of_epoch == "1" else Loss.ANY
                        unrecorded_until = epoch.unrecorded_until(now, self._retention)
                    if granted == "known-not-sent":
                        return KnownNotSent(lease, loss, unrecorded_until)
                    doubt = DoubtWindow(_moment(since) if since else None, _moment(until))
                    return Unresolved(lease, doubt, holder_crashed == "1", loss, unrecorded_until)
                case _:
                    raise AssertionError(answer)  # the script returns nothing else

    @property
    def wants_arrivals(self) -> bool:
        return time.monotonic() < self._young_until

    async def note_arrival(self, key: Key, arrived_at: datetime) -> None:
        names = [*self._places(key), self._epoch_key]
        arguments = [key.content_hash.hex(), milliseconds(arrived_at), self._ttl_ms, self._epoch, *self._doubtful_ms]
        arguments += [key.app_id, key.field_digests.hex()]
        self._read_epoch(await self._run(self._arrive, names, arguments), datetime.now(UTC))

    async def is_known_not_sent(self, key: Key) -> bool | None:
        plain, own = await self._calls.execute(
            *(("HMGET", place, "digest", "state", "until", "app") for place in self._places(key))
        )
        is_elsewhere = isinstance(plain, list) and plain[3] not in {None, key.app_id}
        found = own if is_elsewhere or isinstance(own, redis.RedisError) or own[0] is not None else plain
        if isinstance(found, redis.RedisError):
            code = code_of(found)
            if code in LASTING:
                return None
            if code is None and isinstance(found, redis.ResponseError):
                return False  # the key holds something else
            raise self._failed(found) from found
        content_hash, state, until, _ = found
        return None if content_hash is None else (content_hash, state, until) == (key.content_hash.hex(), "free", "")

    async def release(self, lease: Lease, doubt: DoubtWindow | None, *, holder_crashed: bool = False) -> None:
        arguments = [*_identity(lease), self._ttl_ms, *_interval(doubt), int(holder_crashed)]
        await self._run_with_lease(self._release, lease, arguments)

    async def owned_by_others(self, owner_id: str, uuids: Sequence[str]) -> set[str]:
        if not uuids:
            return set()
        spelled = [(uuid, spelling) for uuid in uuids for spelling in recorded_forms(uuid) if spelling.is_certain]
        # Not GET: another program's value may be megabytes long.
        names = (self._owner_key(spelling.text) for _, spelling in spelled)
        found = await self._calls.execute(*(("GETRANGE", name, 0, MAX_OWNER_BYTES) for name in names))
        for answer in found:
            is_of_its_key = isinstance(answer, redis.ResponseError) and code_of(answer) is None
            if isinstance(answer, redis.RedisError) and not is_of_its_key:
                raise self._failed(answer) from answer
        owners: dict[str, str] = {}
        for (uuid, _), owner in zip(spelled, found, strict=True):
            if isinstance(owner, str) and OWNER_ID.fullmatch(owner):
                owners.setdefault(uuid, owner)
        return {uuid for uuid, owner in owners.items() if owner != owner_id}

    async def ownership(self, lease: Lease, uuids: Sequence[str]) -> OwnershipFacts:
        lookalikes: list[str] = []
        while True:  # ends: each turn knows the lookalikes of all before it
            names, arguments = self._ownership_of(lease, uuids, lookalikes)
            match await self._run_with_lease(self._ownership, lease, arguments, names):
                case ["more", found]:
                    lookalikes = sorted({*lookalikes, *found})
                case [number, is_held, *owners]:
                    return OwnershipFacts(dict(zip(uuids, map(_owner, owners), strict=True)), number, is_held == 1)

    async def complete(self, lease: Lease, reply: Reply, doubt: DoubtWindow | None, *, is_guess: bool = False) -> None:
        names, arguments = self._complete_of(lease, reply, doubt, is_guess=is_guess)
        if await self._run_with_lease(self._complete, lease, arguments, names, is_durable=True) == "taken":
            raise UuidTaken(lease.key.command_id)

    async def first_results(self, found: Sequence[tuple[str, Result]]) -> list[Result]:
        commands: list[tuple[str | int, ...]] = []
        for app_id, result in found:
            name = f"{self._prefix}result:{scoped_id(result.command_id, app_id)}:{canonical_uuid(result.uuid)}"
            commands += [("SET", name, result.model_dump_json(), "NX", "PX", self._ttl_ms), ("GET", name)]
        answers = await self._calls.execute(*commands)
        for answer in answers:
            is_of_one_key = isinstance(answer, redis.ResponseError) and code_of(answer) is None
            if isinstance(answer, redis.RedisError) and not is_of_one_key:
                raise self._failed(answer) from answer
        return [_result_on_record(record, result) for record, (_, result) in zip(answers[1::2], found, strict=True)]

    async def ping(self) -> None:
        """Claim, look up and complete a command that nobody has sent, over a connection of its own.

        PING succeeds on a server that refuses all of this: a full one, a demoted one, one whose disk is full, one whose
        user may not run scripts or has other keys.
        """
        now = datetime.now(UTC)
        key = Key(self._probe, b"", self._probe.encode())
        names, arguments = self._claim_of(key, now, ["", "", ""], b"", is_first=True, kind="probe")
        owner = self._owner_key(self._probe)
        delete = ("DEL", *names[:-1], owner)
        _, claim = await self._probed(
            self._pings.execute(delete), self._pings.run(self._claim, names, arguments, is_durable=True)
        )
        self._read_epoch(claim[:3], now)
        match claim[3:]:
            case ["unseen", token, *_]:
                lease = Lease(key, int(token), 0.0, key.command_id)
            case _:
                return  # another probe is under way
        reply = Reply(command_id="probe", status="accepted", uuid=self._probe, attempts=1, completed_at=now)
        await self._probed(
            self._pings.execute(("GETRANGE", owner, 0, MAX_OWNER_BYTES)),
            self._pings.run(self._ownership, *self._ownership_of(lease, [self._probe], [])),
            self._pings.run(self._complete, *self._complete_of(lease, reply, None), is_durable=True),
        )
        # Not in the same round trip: a script that Redis does not know yet runs after the rest of it.
        await self._probed(
            self._pings.run(self._claim, names, arguments),  # which reads the record
            self._pings.execute(delete),
        )

    async def inspect(self) -> Inspection:
        """Read what the server says of its memory, its persistence and its replicas. Call ``ping`` before."""
        answers = await self._pings.execute(
            *(("INFO", section) for section in SECTIONS), *(("CONFIG", "GET", name) for name in OPTIONS)
        )
        lost = next((each for each in answers if isinstance(each, redis.ConnectionError | redis.TimeoutError)), None)
        if lost is not None:
            raise unavailable(lost) from lost
        known = [None if isinstance(each, redis.RedisError) else each for each in answers]
        return inspection(known, self._replicas, has_epoch=bool(self._epoch))

    async def close(self) -> None:
        """Close the connections."""
        await self._calls.close()
        await self._pings.close()

    def _new_calls(self, latest: LatestAddress, timeout_s: float) -> BatchedCalls:
        server = RedisServer(latest, timeout_s, self._note_server)
        return BatchedCalls(server.connect, timeout_s, self._reconnect, self._replicas, self._wait_s)

    async def _give_back(self, key: Key, answer: Any) -> None:
        """Release a claim that too few replicas have: nothing was sent. If that fails, its lease ends by itself."""
        match answer:
            case [_, _, _, _, token, since, until, crashed, _, is_own]:
                lease = Lease(key, int(token), 0.0, _owner_id(key, is_own))
                arguments = [*_identity(lease), self._ttl_ms, since, until, crashed]
                with suppress(redis.RedisError):
                    await self._calls.run(self._release, self._keys(lease), arguments)

    def _note_server(self, identity: str) -> None:
        """Note which server a connection leads to: none may stay with another, which knows other epochs."""
        if self._server not in {"", identity}:
            self._reconnect()
        self._server = identity

    def _reconnect(self) -> None:
        """Replace the connections to a former primary."""
        self._calls.reconnect()
        self._pings.reconnect()

    def _places(self, key: Key) -> list[str]:
        """Return the keys under which a command's record may be."""
        return [self._record_key(key.command_id), self._record_key(_owner_id(key, "1"))]

    def _keys(self, lease: Lease) -> list[str]:
        return [self._record_key(lease.owner_id), self._lookalikes_key(lease.key)]

    def _record_key(self, owner_id: str) -> str:
        return f"{self._prefix}command:{owner_id}"

    def _lookalikes_key(self, key: Key) -> str:
        return f"{self._prefix}alike:{key.match_key.hex()}"

    def _owner_key(self, spelling: str) -> str:
        return f"{self._prefix}uuid:{spelling}"

    @property
    def _epoch_key(self) -> str:
        return f"{self._prefix}epoch"

    @property
    def _doubtful_ms(self) -> tuple[int, int]:
        """How long after a loss first deliveries are in doubt, and redeliveries."""
        retention = self._retention
        return round(retention.unsettled_s * 1000), round(min(retention.risky_s, _LONG_S) * 1000)

    def _read_epoch(self, facts: Sequence[str], now: datetime) -> Epoch | None:
        """Note the present epoch; None: the server does not tell who it is, and may have lost records at any time."""
        epoch_id, age_ms, follows_loss = facts
        if not epoch_id:
            self._young_until = -math.inf  # no record of an arrival would prove anything
            return None
        self._epoch = epoch_id
        epoch = Epoch(now - timedelta(milliseconds=int(age_ms)), follows_loss == "1")
        self._young_until = time.monotonic() + self._retention.risky_s - epoch.age_s(now)
        return epoch

    def _claim_of(
        self,
        key: Key,
        now: datetime,
        discarded: Sequence[object],
        unreadable: bytes,
        *,
        is_first: bool,
        kind: ClaimKind = "claim",
    ) -> tuple[list[str], list[object]]:
        identity = [key.command_id, key.content_hash.hex(), milliseconds(now)]
        arguments = [*identity, round(self._lease_s * 1000), self._ttl_ms, *discarded, unreadable, self._epoch]
        if kind == "claim" and self._replicas:
            kind = "wait"
        arguments += [kind, *self._doubtful_ms, int(is_first), key.app_id, key.field_digests.hex()]
        return [*self._places(key), self._lookalikes_key(key), self._epoch_key], arguments

    def _ownership_of(
        self, lease: Lease, uuids: Sequence[str], lookalikes: Sequence[str]
    ) -> tuple[list[str | bytes], list[object]]:
        ids = [each.encode(errors=ERRORS) for each in lookalikes]
        names: list[str | bytes] = [*self._keys(lease), *(f"{self._prefix}command:".encode() + each for each in ids)]
        arguments: list[object] = [*_identity(lease), len(ids), *ids]
        for uuid in uuids:
            forms, kinds = self._spellings(uuid)
            names += forms
            arguments += [len(kinds), *kinds]
        return names, arguments

    def _complete_of(
        self, lease: Lease, reply: Reply, doubt: DoubtWindow | None, *, is_guess: bool = False
    ) -> tuple[list[str], list[object]]:
        failed = failed_ms(reply)
        outcome = [reply.model_dump_json(), "" if failed is None else failed]
        owner = f"?{lease.owner_id}" if is_guess else lease.owner_id
        forms, kinds = self._spellings(reply.uuid) if reply.uuid else ([], [])
        arguments = [*_identity(lease), self._ttl_ms, *outcome, *_interval(doubt), owner, *kinds]
        return [*self._keys(lease), *forms], arguments

    def _spellings(self, uuid: str) -> tuple[list[str], list[str]]:
        """Return the keys of a uuid's spellings, and their kinds as ``scripts/parts/owners.lua`` reads them."""
        forms = recorded_forms(uuid)
        kinds = [f"{each.is_certain:d}{each.is_written:d}" for each in forms]
        return [self._owner_key(each.text) for each in forms], kinds

    async def _run_with_lease(
        self,
        script: Script,
        lease: Lease,
        arguments: Sequence[object],
        names: Sequence[str | bytes] | None = None,
        *,
        is_durable: bool = False,
    ) -> Any:
        answer = await self._run(script, names or self._keys(lease), arguments, is_durable=is_durable)
        if answer == "lost":
            raise LeaseLost(lease.key.command_id)
        return answer

    async def _run(
        self, script: Script, keys: Sequence[str | bytes], arguments: Sequence[Any], *, is_durable: bool = False
    ) -> Any:
        try:
            return await self._calls.run(script, keys, arguments, is_durable=is_durable)
        except redis.RedisError as exc:
            raise self._failed(exc) from exc

    async def _probed(self, *calls: Awaitable[Any]) -> list[Any]:
        """Make calls of a probe in one round trip, in this order; returns their answers.

        Raises:
            StoreUnavailable: one of them failed.
        """
        answers = await asyncio.gather(*calls, return_exceptions=True)
        for each in answers:
            for answer in each if isinstance(each, list) else [each]:
                if isinstance(answer, redis.RedisError):
                    raise unavailable(answer) from answer
                if isinstance(answer, BaseException):
                    raise answer
        return answers

    def _failed(self, error: redis.RedisError) -> StoreUnavailable:
        """Return why a call of a command failed, and tell who watches the store."""
        found = unavailable(error)
        self.on_unavailable(found)
        return found


def unavailable(error: redis.RedisError) -> StoreUnavailable:
    """Return why Redis cannot be used."""
    reason, code = f"Redis: {reason_of(error)}", code_of(error)
    if code is None and not isinstance(error, redis.ResponseError):
        return StoreUnavailable(reason)
    if code == "CLUSTER":
        return StoreUnusable(reason)
    return StoreRefused(reason, concerns_all=code is not None)


def read_reply(text: str, command_id: str) -> Reply | None:
    """Parse a recorded reply; None if it is not a reply to this command. Fields of a newer version are ignored."""
    try:
        reply = Reply.model_validate_json(text.encode(errors=ERRORS), extra="ignore")
    except ValidationError:
        return None
    code = None if reply.error is None else reply.error.code
    match reply.status:
        case "accepted":
            is_whole = code is None and bool(
                usable_uuid(reply.uuid)
            )  # with blanks around it, as former versions wrote it
        case "rejected":
            is_whole = code in get_args(RejectionCode) and reply.uuid is None
        case "failed":
            is_whole = code in get_args(FailureCode) and reply.uuid is None
    return reply if is_whole and reply.command_id == command_id else None


def _result_on_record(record: object, found: Result) -> Result:
    """Parse a recorded result; returns the one that was found if it is no result of this command."""
    if not isinstance(record, str):
        return found
    try:
        result = Result.model_validate_json(record.encode(errors=ERRORS), extra="ignore")
    except ValidationError:
        return found
    is_its_own = (result.command_id, canonical_uuid(result.uuid)) == (found.command_id, canonical_uuid(found.uuid))
    return result if is_its_own else found


def _digests(recorded: str) -> bytes:
    """Read the digests of a record's fields; empty if it has none, as those of earlier versions, or others."""
    return bytes.fromhex(recorded) if re.fullmatch(rf"[0-9a-f]{{{2 * FIELD_DIGESTS_BYTES}}}", recorded) else b""


def _identity(lease: Lease) -> list[object]:
    return [lease.owner_id, lease.token]


def _owner_id(key: Key, is_own: str) -> str:
    """Return the name of a command's record; ``is_own``: "1" where another system has its id."""
    return f"{key.command_id}/{key.app_id}" if is_own == "1" else key.command_id


def _owner(text: str) -> Owner | None:
    """Read an owner as ``scripts/parts/owners.lua`` writes it."""
    owner_id = text.removeprefix("?")
    return Owner(owner_id or None, is_certain=owner_id == text) if text else None


def _interval(doubt: DoubtWindow | None) -> tuple[int | str, int | str]:
    since = "" if doubt is None or doubt.since is None else milliseconds(doubt.since)
    return since, "" if doubt is None else milliseconds(doubt.until)


def _moment(ms: str) -> datetime:
    return datetime.fromtimestamp(int(ms) / 1000, UTC)
