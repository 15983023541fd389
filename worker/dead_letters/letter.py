"""One dead letter: its fields, how it is filtered, and how it is replayed. Pure."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property
from typing import Any
from zoneinfo import ZoneInfo

from pika import BasicProperties

from schemas.command import MAX_BODY_BYTES
from worker.amqp.field_table import RawFieldValue, decoded
from worker.amqp.messages import ERROR, FAILED_AT, REASON, Delivery
from worker.amqp.topology import EXECUTE
from worker.core.command import Command
from worker.core.doubt_window import DoubtWindow
from worker.core.envelope import Replay
from worker.core.parsing import read_command
from worker.core.times import parse_instant
from worker.errors import InvalidMessage, UnusableCommand

BROKER = "broker"
# The broker counts in these how often a queue returned the message.
_COUNTED = frozenset({"x-delivery-count", "x-acquired-count"})
_DIGEST_BYTES = 16
SHORT_DIGEST = 8  # digits of a digest that usually tell it from all others
# With these reasons OneNET has certainly not cached the command. Not with unknown_product: an earlier attempt may have
# been sent while the product was still configured.
_NOT_CACHED = frozenset({"invalid_message", "invalid_command", "expired", "retries_exhausted", "command_id_conflict"})


@dataclass(frozen=True, slots=True)
class Listing:
    """What a list shows of a dead letter: little, however large its body and its headers are.

    ``cannot_succeed``: it has expired, and was certainly not sent before: a replay fails again at once.
    """

    digest: str
    command_id: str | None
    reason: str
    error: str | None
    failed_at: datetime | None
    imei: str | None
    source: str | None
    expires_at: datetime | None
    product: str | None = None
    cannot_succeed: bool = False

    @property
    def name(self) -> str:
        """What a person names it by: its command id, or its digest where it has none."""
        return self.command_id or self.digest[:SHORT_DIGEST]


@dataclass(frozen=True, eq=False)
class DeadLetter:
    """One message of the dead-letter queue.

    Args:
        tag: its delivery tag, valid only on the channel that received it.
        routing_key: what it was dead-lettered with.
        properties: its AMQP properties, headers included.
        body: the original body of the command.
        zone: time zone of the command's times without an offset.
    """

    tag: int
    routing_key: str
    properties: BasicProperties
    body: bytes
    zone: ZoneInfo

    @property
    def headers(self) -> Mapping[str, Any]:
        return self.properties.headers or {}

    @property
    def is_from_worker(self) -> bool:
        """Tell whether a worker dead-lettered it, so that its headers can be trusted; otherwise the broker did.

        A worker publishes without the broker's ``x-death`` header, and with the reason in the routing key.
        """
        return "x-death" not in self.headers and self.routing_key == f"{EXECUTE}.{self.headers.get(REASON)}"

    @property
    def reason(self) -> str:
        if self.is_from_worker:
            return str(self.headers[REASON])
        return f"{BROKER}: {self.headers.get('x-first-death-reason') or 'unknown'}"

    @property
    def error(self) -> str | None:
        return str(self.headers[ERROR]) if self.is_from_worker and ERROR in self.headers else None

    @cached_property
    def failed_at(self) -> datetime | None:
        """When it was dead-lettered, with time zone; None if the message does not say."""
        if self.is_from_worker:
            try:
                return parse_instant(str(self.headers.get(FAILED_AT)))
            except ValueError:
                return None
        deaths = decoded(self.headers.get("x-death"))
        times = [death.get("time") for death in deaths if isinstance(death, dict)] if isinstance(deaths, list) else []
        moments = [time.moment for time in times if isinstance(time, RawFieldValue)]
        return max((moment for moment in moments if moment is not None), default=None)

    @cached_property
    def _read(self) -> Command | UnusableCommand:
        try:
            return read_command(self.body, self.properties.message_id, self.zone)
        except UnusableCommand as exc:
            return exc

    @property
    def command_id(self) -> str | None:
        return self._read.command_id

    @property
    def imei(self) -> str | None:
        return self._read.imei

    @property
    def expires_at(self) -> datetime | None:
        """When its command expires; None if the command is invalid."""
        return self._read.expires_at if isinstance(self._read, Command) else None

    @property
    def product(self) -> str | None:
        """The product whose credentials its command uses; None: the default one, or the command is invalid."""
        return self._read.product if isinstance(self._read, Command) else None

    @property
    def is_valid(self) -> bool:
        """Tell whether the body is a valid command."""
        return isinstance(self._read, Command)

    def cannot_succeed(self, now: datetime) -> bool:
        """Tell whether a replay fails again at once: it has expired, and there is no doubt that a history could end."""
        return self.expires_at is not None and self.expires_at <= now and not self._is_in_doubt

    @property
    def is_json(self) -> bool:
        """Tell whether the body is one unambiguous JSON object."""
        return not isinstance(self._read, InvalidMessage)

    @property
    def source(self) -> str | None:
        """The upstream system that sent the command."""
        return self.properties.app_id if isinstance(self.properties.app_id, str) else None

    def listing(self, now: datetime) -> Listing:
        """Return what a list shows of it."""
        return Listing(
            self.digest, self.command_id, self.reason, self.error, self.failed_at, self.imei, self.source,
            self.expires_at, self.product, self.cannot_succeed(now),
        )  # fmt: skip

    @cached_property
    def _identity(self) -> bytes:
        """Everything but the body that stays the same however often the message is read."""
        # The broker sorts the headers when it adds its own: after the first read they come in another order.
        lasting = sorted(repr(item) for item in self.headers.items() if item[0] not in _COUNTED)
        properties = {**vars(self.properties), "headers": None}
        return repr((self.routing_key, lasting, sorted(properties.items()))).encode()

    @cached_property
    def digest(self) -> str:
        """32 hexadecimal digits that name the message, the same in every call and for every reader.

        Of a body that is too large for a command only the beginning counts, so that a reader that cuts it agrees.
        """
        digest = hashlib.blake2b(self._identity, digest_size=_DIGEST_BYTES)
        digest.update(self.body[:MAX_BODY_BYTES])
        return digest.hexdigest()

    @property
    def fingerprint(self) -> bytes:
        """A hash of the whole message: what was confirmed to be deleted is nothing but that."""
        fingerprint = hashlib.blake2b(self._identity)
        fingerprint.update(self.body)
        return fingerprint.digest()

    @property
    def _is_in_doubt(self) -> bool:
        """Whether OneNET may have cached the command."""
        return self.reason not in _NOT_CACHED

    def replay(self, now: datetime) -> Replay:
        """Describe its replay: a command that may have been cached is replayed in doubt.

        ``now`` ends the window of doubt of a message that does not say when it failed, or that no worker published.
        """
        failed_at = self.failed_at if self.is_from_worker and self.failed_at is not None else now
        doubt = DoubtWindow(None, failed_at) if self._is_in_doubt else None
        return Replay(failed_at, doubt, self.reason if self.is_from_worker else "")

    def delivery(self) -> Delivery:
        """Return it as a delivery; headers that only a worker may set are trusted if a worker set them."""
        return Delivery(
            0, self.tag, is_redelivered=False, properties=self.properties, body=self.body,
            is_returned=self.is_from_worker,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Filter:
    """The conditions that selected dead letters meet, all of them.

    ``reasons``: error codes, or ``broker`` for messages that the broker dead-lettered.
    """

    reasons: frozenset[str] = frozenset()
    device: str | None = None
    source: str | None = None
    older_than: timedelta | None = None
    newer_than: timedelta | None = None

    @property
    def is_empty(self) -> bool:
        return self == Filter()

    def matches(self, dead_letter: DeadLetter, now: datetime) -> bool:
        """Tell whether a dead letter is selected. One of unknown age is neither older nor newer."""
        age = None if dead_letter.failed_at is None else now - dead_letter.failed_at
        return (
            (not self.reasons or dead_letter.reason.partition(":")[0] in self.reasons)
            and (self.device is None or dead_letter.imei == self.device)
            and (self.source is None or dead_letter.source == self.source)
            and (self.older_than is None or (age is not None and age > self.older_than))
            and (self.newer_than is None or (age is not None and age < self.newer_than))
        )
