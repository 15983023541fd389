"""Reads the records of a fleet from Redis, for people. It claims nothing, writes nothing, and needs no script."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import redis
from pydantic import ValidationError

from schemas.result import Result
from worker.core.command import scoped_id
from worker.core.records import RECORD_FIELDS, CommandRecord, UuidOwner, judge_record
from worker.core.redis_address import RedisAddress
from worker.core.uuids import canonical_uuid, recorded_forms
from worker.idempotency.latest_address import LatestAddress
from worker.idempotency.redis import MAX_OWNER_BYTES, OWNER_ID, TIMEOUT_S, read_reply, unavailable
from worker.idempotency.redis_server import ERRORS, RedisServer
from worker.idempotency.round_trips import BatchedCalls

_MAX_BYTES = 65_536  # of a reply or a result; a longer one is none
_WRONG_TYPE = "WRONGTYPE"  # the key has something else than what is asked for
_NO_KEY = -2  # of PTTL
_AT_ONCE = 500  # commands of one round trip


class RecordReader:
    """Reads records by command id, and the owners of uuids.

    Args:
        address: of Redis.
        namespace: prefix of every key.
    """

    def __init__(self, address: RedisAddress, namespace: str) -> None:
        timeout_s = address.options.get("socket_timeout")
        call_s = timeout_s if isinstance(timeout_s, float) else TIMEOUT_S
        server = RedisServer(LatestAddress(address), call_s, lambda _identity: None)
        self._calls = BatchedCalls(server.connect, call_s, lambda: None)
        self._prefix = f"{{{namespace}}}:"

    async def look(self, command_id: str, source: str | None, others: Collection[str]) -> list[CommandRecord]:
        """Return the records of a command; several only if several upstream systems use its id.

        Args:
            command_id: the command.
            source: the upstream system that sent it; None: whichever did.
            others: where ``source`` is None: systems that may have sent it. A system whose id another one used first
                has its record in a place of its own, which cannot be found without its name.

        Raises:
            StoreUnavailable: Redis cannot be read.
        """
        sources = [source] if source is not None else sorted({*others})
        owner_ids = list(dict.fromkeys([command_id, *(f"{command_id}/{each}" for each in sources if each)]))
        found = [each for owner_id in owner_ids if (each := await self._record(command_id, owner_id)) is not None]
        if source is not None:
            own = [record for owner_id, record in found if owner_id != command_id]
            found_records = own or [record for _, record in found if record.source in {None, source}]
        else:
            found_records = [record for _, record in found]
        return [await self._with_result(record, source or "") for record in found_records]

    async def owners(self, uuids: Sequence[str]) -> dict[str, UuidOwner]:
        """Return the commands to which uuids belong, as far as that is recorded.

        Raises:
            StoreUnavailable: Redis cannot be read.
        """
        forms = [(uuid, form) for uuid in uuids for form in recorded_forms(uuid)]
        answers = await self._read(
            *(("GETRANGE", f"{self._prefix}uuid:{form.text}", 0, MAX_OWNER_BYTES) for _, form in forms)
        )
        owners: dict[str, UuidOwner] = {}
        for (uuid, form), answer in zip(forms, answers, strict=True):
            text = answer if isinstance(answer, str) else ""
            owner_id = text.removeprefix("?")
            if not OWNER_ID.fullmatch(owner_id):
                continue
            command_id, _, source = owner_id.partition("/")
            owner = UuidOwner(command_id, source or None, is_certain=form.is_certain and owner_id == text)
            if uuid not in owners or (owner.is_certain and not owners[uuid].is_certain):
                owners[uuid] = owner
        return owners

    async def close(self) -> None:
        """Close the connection."""
        await self._calls.close()

    async def _record(self, command_id: str, owner_id: str) -> tuple[str, CommandRecord] | None:
        name = f"{self._prefix}command:{owner_id}"
        values, length, left_ms, (seconds, microseconds) = await self._read(
            ("HMGET", name, *RECORD_FIELDS), ("HSTRLEN", name, "reply"), ("PTTL", name), ("TIME",)
        )
        if left_ms == _NO_KEY:
            return None
        now = datetime.fromtimestamp(int(seconds) + int(microseconds) / 1_000_000, UTC)
        if not isinstance(values, list):  # the key has something else than a record
            return owner_id, CommandRecord(command_id, None, "unreadable")
        reply = None
        if isinstance(length, int) and 0 < length <= _MAX_BYTES:
            [[text]] = await self._read(("HMGET", name, "reply"))
            reply = None if text is None else read_reply(text, command_id)
        record = judge_record(command_id, dict(zip(RECORD_FIELDS, values, strict=True)), reply, now)
        if isinstance(left_ms, int) and left_ms > 0:
            record = replace(record, kept_until=now + timedelta(milliseconds=left_ms))
        return owner_id, record

    async def _with_result(self, record: CommandRecord, source: str) -> CommandRecord:
        """Add the result that is recorded of an accepted command."""
        if record.reply is None or record.reply.uuid is None:
            return record
        scoped = scoped_id(record.command_id, source if record.source is None else record.source)
        name = f"{self._prefix}result:{scoped}:{canonical_uuid(record.reply.uuid)}"
        [text] = await self._read(("GETRANGE", name, 0, _MAX_BYTES))
        try:
            result = Result.model_validate_json(str(text).encode(errors=ERRORS), extra="ignore")
        except ValidationError:
            return record
        is_its_own = (result.command_id, canonical_uuid(result.uuid)) == (
            record.command_id,
            canonical_uuid(record.reply.uuid),
        )
        return replace(record, result=result) if is_its_own else record

    async def _read(self, *commands: tuple[Any, ...]) -> list[Any]:
        """Return the answers of commands; an error that concerns one key only is an answer too.

        Raises:
            StoreUnavailable: another error.
        """
        answers: list[Any] = []
        for at in range(0, len(commands), _AT_ONCE):
            answers += await self._calls.execute(*commands[at : at + _AT_ONCE])
        for answer in answers:
            is_of_one_key = isinstance(answer, redis.ResponseError) and str(answer).startswith(_WRONG_TYPE)
            if isinstance(answer, redis.RedisError) and not is_of_one_key:
                raise unavailable(answer) from answer
        return answers
