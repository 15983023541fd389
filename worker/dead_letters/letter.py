"""Dead letters as people handle them: what one says, which of them are meant, and how one goes back. Pure."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property
from typing import Any
from zoneinfo import ZoneInfo

from pika import BasicProperties

from worker.amqp.field_table import RawFieldValue
from worker.amqp.messages import ERROR, FAILED_AT, REASON, Delivery
from worker.amqp.topology import EXECUTE
from worker.core.command import Command
from worker.core.doubt_window import DoubtWindow
from worker.core.envelope import Replay
from worker.core.parsing import read_command
from worker.errors import InvalidMessage, UnusableCommand

BROKER = "broker"
# Of these it is known that OneNET has not cached the command. Not of unknown_product: it may have been known before.
_NOT_CACHED = frozenset({"invalid_message", "invalid_command", "expired", "retries_exhausted", "command_id_conflict"})


@dataclass(frozen=True, eq=False)
class DeadLetter:
    """One dead letter; its tag is valid on the channel that it was taken from only.

    ``zone``: where a command's times without an offset are read.
    """

    tag: int
    exchange: str
    routing_key: str
    properties: BasicProperties
    body: bytes
    zone: ZoneInfo

    @property
    def headers(self) -> Mapping[str, Any]:
        return self.properties.headers or {}

    @property
    def is_workers(self) -> bool:
        """Tell whether a worker set it aside, so that its headers are believed; otherwise the broker did by itself.

        A worker's letter has none of the broker's record of deaths, and its reason for a routing key.
        """
        return "x-death" not in self.headers and self.routing_key == f"{EXECUTE}.{self.headers.get(REASON)}"

    @property
    def reason(self) -> str:
        if self.is_workers:
            return str(self.headers[REASON])
        return f"{BROKER}: {self.headers.get('x-first-death-reason') or 'unknown'}"

    @property
    def error(self) -> str | None:
        return str(self.headers[ERROR]) if self.is_workers and ERROR in self.headers else None

    @cached_property
    def failed_at(self) -> datetime | None:
        """When it was set aside, aware; None where nothing tells."""
        if self.is_workers:
            try:
                moment = datetime.fromisoformat(str(self.headers.get(FAILED_AT)))
            except ValueError:
                return None
            return moment if moment.tzinfo is not None else None
        deaths = self.headers.get("x-death")
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
        """When its command expires, None where that cannot be read."""
        return self._read.expires_at if isinstance(self._read, Command) else None

    @property
    def is_json(self) -> bool:
        """Tell whether the body is a JSON object that means the same to everybody."""
        return not isinstance(self._read, InvalidMessage)

    @property
    def source(self) -> str | None:
        """The upstream system that sent it."""
        return self.properties.app_id if isinstance(self.properties.app_id, str) else None

    @cached_property
    def fingerprint(self) -> bytes:
        """Return the same bytes for the same letter, from whichever channel it is taken."""
        lasting = {name: value for name, value in self.headers.items() if name != "x-delivery-count"}
        rest = {**vars(self.properties), "headers": None}
        return hashlib.blake2b(repr((self.routing_key, lasting, sorted(rest.items()), self.body)).encode()).digest()

    def replay(self, now: datetime) -> Replay:
        """Return what a replay has to say of it: what may have been sent goes back in doubt.

        ``now``: covers every try of a letter that does not tell when it was set aside, or by whom.
        """
        failed_at = self.failed_at if self.is_workers and self.failed_at is not None else now
        return Replay(failed_at, None if self.reason in _NOT_CACHED else DoubtWindow(None, failed_at))

    def delivery(self) -> Delivery:
        """Return it as one that came in; what only the worker may write on a message is believed of its own."""
        return Delivery(
            0, self.tag, is_redelivered=False, properties=self.properties, body=self.body,
            is_returned=self.is_workers,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Filter:
    """Which letters are meant: those that every given condition fits.

    ``reasons``: codes, or ``broker`` for whatever the broker set aside by itself.
    """

    ids: frozenset[str] = frozenset()
    reasons: frozenset[str] = frozenset()
    device: str | None = None
    source: str | None = None
    older_than: timedelta | None = None
    newer_than: timedelta | None = None

    @property
    def is_everything(self) -> bool:
        return self == Filter()

    def takes(self, letter: DeadLetter, now: datetime) -> bool:
        """Tell whether a letter is meant. One whose age nothing tells is neither older nor newer."""
        age = None if letter.failed_at is None else now - letter.failed_at
        return (
            (not self.ids or letter.command_id in self.ids)
            and (not self.reasons or letter.reason.partition(":")[0] in self.reasons)
            and (self.device is None or letter.imei == self.device)
            and (self.source is None or letter.source == self.source)
            and (self.older_than is None or (age is not None and age > self.older_than))
            and (self.newer_than is None or (age is not None and age < self.newer_than))
        )
