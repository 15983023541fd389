"""One delivery's way through: validate, recall, send, decide; what is left to do is to publish and acknowledge."""

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Protocol
from zoneinfo import ZoneInfo

from schemas.reply import Detail, Reply, ReplyError
from worker.amqp.messages import Delivery, Outgoing, Publication
from worker.answer import Answer, InDoubt
from worker.commands import ExecuteCommand, read_command
from worker.decide import RetryPolicy, decide
from worker.errors import UnusableCommand
from worker.idempotency import Again, Busy, Conflict, Done, First, Store
from worker.onenet.client import Sent
from worker.outcome import Accepted, Failed, Final, Outcome, Rejected, TryAgain
from worker.telemetry.logs import get_logger

log = get_logger()


class Client(Protocol):
    """What is asked of OneNET."""

    def knows(self, product: str | None) -> bool:
        """Tell whether there are credentials for a product."""

    def execute(self, command: ExecuteCommand) -> Sent:
        """Ask the platform to cache one command."""


class Handler:
    """Handles deliveries, each in the thread that calls.

    Args:
        client: asks OneNET.
        store: remembers commands.
        outgoing: writes the messages.
        policy: when to try again.
        platform_zone: where times without an offset are read.
    """

    def __init__(
        self, client: Client, store: Store, outgoing: Outgoing, policy: RetryPolicy, platform_zone: ZoneInfo
    ) -> None:
        self._client = client
        self._store = store
        self._outgoing = outgoing
        self._policy = policy
        self._zone = platform_zone

    def handle(self, delivery: Delivery) -> Sequence[Publication]:
        """Handle one delivery and return what must be confirmed before it is acknowledged."""
        began = time.monotonic()
        try:
            command = read_command(delivery.body, delivery.message_id, self._zone)
        except UnusableCommand as exc:
            failed = Failed(exc.code, exc.message, exc.details)
            return self._conclude(delivery, failed, began, command_id=exc.command_id, imei=exc.imei)
        known = {"command_id": command.command_id, "imei": command.imei}
        if not self._client.knows(command.product):
            message = "is not configured" if command.product is not None else "is required: there are no default ones"
            details = (Detail(field="product", message=message),)
            failed = Failed("unknown_product", f"product: {message}", details)
            return self._conclude(delivery, failed, began, **known)
        claim = self._store.claim(command.command_id, command.digest())
        match claim:
            case Done(reply):
                return self._repeat(delivery, reply)
            case Conflict():
                message = "the command_id belongs to a command with another content"
                failed = Failed("command_id_conflict", message, (Detail(field="command_id", message=message),))
                return self._conclude(delivery, failed, began, **known)
            case Busy():
                delay_s = self._policy.delays_s[0]
                _log_retry(delivery, command, delivery.attempt, delay_s, "another delivery of it is being handled")
                return [self._outgoing.put_off(delivery, delay_s, datetime.now(UTC))]
            case First() if delivery.may_have_been_sent:
                answer: Answer = InDoubt("it was delivered before, and no record tells what became of it")
                return self._carry_out(delivery, command, answer, began)
            case First() | Again():
                if command.expires_at <= datetime.now(UTC):
                    details = (Detail(field="expired_time", message="has passed"),)
                    failed = Failed("expired", "expired_time has passed", details)
                    return self._finish(delivery, command, failed, began)
                sent = self._client.execute(command)
                return self._carry_out(delivery, command, sent.answer, began, omitted=sent.valid_time_omitted)

    def note_unsent(self, delivery: Delivery) -> None:
        """Remember that a delivery which has become void was not started, so that its next one raises no doubt."""
        if delivery.may_have_been_sent:
            return  # something before this process may have sent it
        try:
            command = read_command(delivery.body, delivery.message_id, self._zone)
        except UnusableCommand:
            return  # it is never sent
        self._store.note_unsent(command.command_id, command.digest())

    def _carry_out(
        self, delivery: Delivery, command: ExecuteCommand, answer: Answer, began: float, *, omitted: bool = False
    ) -> Sequence[Publication]:
        if isinstance(answer, InDoubt):
            log.warning("command_in_doubt", **_about(delivery, command), reason=answer.reason)
        now = datetime.now(UTC)
        outcome: Outcome = decide(
            answer,
            delivery.attempt,
            self._policy,
            now=now,
            expires_at=command.expires_at,
            was_in_doubt=delivery.in_doubt_since is not None,
        )
        if isinstance(outcome, TryAgain):
            self._store.release(command.command_id)
            _log_retry(delivery, command, outcome.attempt, outcome.delay_s, outcome.reason)
            return [self._outgoing.retry(delivery, outcome, now)]
        return self._finish(delivery, command, outcome, began, omitted=omitted)

    def _finish(
        self, delivery: Delivery, command: ExecuteCommand, outcome: Final, began: float, *, omitted: bool = False
    ) -> Sequence[Publication]:
        """End a command that is held: record the outcome first, so that whatever fails from here on repeats it."""
        reply = _reply(outcome, delivery, command.command_id, command.imei, omitted=omitted)
        self._store.complete(command.command_id, reply)
        return self._publications(delivery, reply, outcome, began)

    def _conclude(
        self, delivery: Delivery, failed: Failed, began: float, *, command_id: str | None, imei: str | None
    ) -> Sequence[Publication]:
        """End a message that no record is kept of: it fails the same way however often it comes."""
        reply = _reply(failed, delivery, command_id, imei)
        return self._publications(delivery, reply, failed, began)

    def _repeat(self, delivery: Delivery, reply: Reply) -> Sequence[Publication]:
        log.info(
            "duplicate_suppressed",
            command_id=reply.command_id,
            imei=reply.imei,
            attempt=delivery.attempt,
            status=reply.status,
        )
        publications = [self._outgoing.reply(delivery, reply)]
        if reply.status == "failed" and delivery.may_have_been_sent:
            # Perhaps the very delivery that failed, back because its dead letter was not confirmed.
            publications.append(self._outgoing.dead_letter(delivery, reply))
        return publications

    def _publications(self, delivery: Delivery, reply: Reply, outcome: Final, began: float) -> Sequence[Publication]:
        publications = [self._outgoing.reply(delivery, reply)]
        fields = {
            "command_id": reply.command_id,
            "imei": reply.imei,
            "attempt": delivery.attempt,
            "duration_ms": round((time.monotonic() - began) * 1000, 1),
        }
        match outcome:
            case Accepted(uuid):
                log.info("command_accepted", **fields, uuid=uuid)
            case Rejected(code, message, errno):
                log.warning("command_rejected", **fields, code=code, errno=errno, reason=message)
            case Failed(code, message):
                log.warning("command_failed", **fields, code=code, reason=message)
                publications.append(self._outgoing.dead_letter(delivery, reply))
        return publications


def _reply(
    outcome: Final, delivery: Delivery, command_id: str | None, imei: str | None, *, omitted: bool = False
) -> Reply:
    error = None
    match outcome:
        case Rejected(code, message, errno):
            error = ReplyError(code=code, message=message, errno=errno)
        case Failed(failure, message, details):
            error = ReplyError(code=failure, message=message, details=details or None)
    return Reply(
        command_id=command_id,
        status=outcome.status,
        uuid=outcome.uuid if isinstance(outcome, Accepted) else None,
        imei=imei,
        error=error,
        attempts=delivery.attempt,
        valid_time_omitted=omitted,
        completed_at=datetime.now(UTC),
    )


def _about(delivery: Delivery, command: ExecuteCommand) -> dict[str, object]:
    return {"command_id": command.command_id, "imei": command.imei, "attempt": delivery.attempt}


def _log_retry(delivery: Delivery, command: ExecuteCommand, next_attempt: int, delay_s: int, reason: str) -> None:
    log.warning(
        "command_retry_scheduled",
        **_about(delivery, command),
        next_attempt=next_attempt,
        delay_s=delay_s,
        reason=reason,
    )
