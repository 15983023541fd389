"""What waits for a device at the platform and what became of it, and how commands that wait there are cancelled."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from urllib.parse import urlsplit

from worker.app import client_of, limiter_of
from worker.core.platform import CachedCommand
from worker.core.records import UuidOwner
from worker.core.redis_address import RedisAddress
from worker.core.uuids import canonical_uuid
from worker.errors import HistoryUnreadable, WorkerError
from worker.flow.rate_limited_queue import Turns
from worker.onenet.client import OneNETClient
from worker.printable import utc
from worker.settings import MEMORY, Settings, load_products
from worker.telemetry.tracing import NoTracing

if TYPE_CHECKING:
    from worker.idempotency.records import RecordReader

DeviceState = Literal["waiting", "cancelled", "sent", "expired", "executed", "failed", "no answer", "unknown"]
Found = TypeVar("Found")

_STATES: dict[int, DeviceState] = {
    1: "waiting",
    2: "cancelled",
    3: "sent",
    4: "expired",
    5: "executed",
    6: "failed",
    7: "no answer",
}
_MIN_CHARS = 8  # of a uuid's beginning: fewer may be a slip, such as a variable that is not set
_MAX_NAMED = 3  # of several commands that a text could mean
_LOOKS = 3  # at what was cancelled, until the history shows it
_LOOK_AGAIN_S = 1.0


@dataclass(frozen=True, slots=True)
class DeviceEntry:
    """One command that the platform has or had for a device, and the command of ours that it is.

    Attributes:
        cached: what the platform says of it.
        owner: the command of ours; None: none is recorded.
    """

    cached: CachedCommand
    owner: UuidOwner | None

    @property
    def state(self) -> DeviceState:
        """What became of it, in a word."""
        return state_of(self.cached)


@dataclass(frozen=True, slots=True)
class DeviceCommands:
    """The commands of a device.

    Attributes:
        imei: the device.
        entries: in the order that was asked for.
        total: how many the platform has; more than there are entries if only some were asked for.
        owners_unread: why it is not known which commands of ours they are; None: it is known.
    """

    imei: str
    entries: tuple[DeviceEntry, ...]
    total: int
    owners_unread: str | None


@dataclass(frozen=True, slots=True)
class Cancelling:
    """What became of a command that was to be cancelled.

    Attributes:
        before: as it was.
        after: as it is now; None: the history does not show it any more.
        refusal: why the platform refused, if it said so.
        unanswered: why its answer is not known: it may have been cancelled, or be cancelled later; None: it is known.
    """

    before: DeviceEntry
    after: DeviceEntry | None
    refusal: str | None
    unanswered: str | None

    @property
    def is_cancelled(self) -> bool:
        """Whether the platform says so now, whatever it answered."""
        return self.after is not None and self.after.state == "cancelled"


def state_of(command: CachedCommand) -> DeviceState:
    """Return what became of a command, in a word."""
    return _STATES.get(command.state.send_status or 0, "unknown")


def entry_document(entry: DeviceEntry, of: DeviceCommands) -> dict[str, Any]:
    """Return one command of a device as a JSON object, with times in UTC and null for what is unknown."""
    cached, owner = entry.cached, entry.owner
    return {
        "imei": of.imei,
        "uuid": cached.uuid or None,
        "state": entry.state,
        "send_status": cached.state.send_status,
        "confirm_status": cached.state.confirm_status,
        "kind": cached.kind,
        "created_at": utc(cached.created_at),
        "valid_at": utc(cached.valid_at),
        "expires_at": utc(cached.expires_at),
        "sent_at": utc(cached.state.sent_at),
        "confirmed_at": utc(cached.state.confirmed_at),
        "command_id": None if owner is None else owner.command_id,
        "source": None if owner is None else owner.source,
        "command_id_is_certain": None if owner is None else owner.is_certain,
        "command_id_unread": of.owners_unread,
    }


def cancelling_document(done: Cancelling, of: DeviceCommands) -> dict[str, Any]:
    """Return what became of a command that was to be cancelled, as a JSON object."""
    said = {"refusal": done.refusal, "unanswered": done.unanswered}
    if done.after is None:
        return entry_document(done.before, of) | {"state": "unknown"} | said
    return entry_document(done.after, of) | said


def list_device(
    settings: Settings, imei: str, product: str | None, *, limit: int, newest_first: bool
) -> DeviceCommands:
    """Return the commands that the platform has or had for a device. Nothing is changed and nothing is sent.

    Args:
        settings: of the deployment.
        imei: the device.
        product: whose device it is; None: the default product's.
        limit: how many at most.
        newest_first: the order; else the oldest first.

    Raises:
        WorkerError: the platform cannot be read, or the product is not configured.
    """
    reader = _record_reader(settings)

    async def read(client: OneNETClient) -> DeviceCommands:
        found = await client.list_commands(
            product, imei, newest_first=newest_first, is_enough=lambda commands: len(commands) >= limit
        )
        entries, unread = await _with_owners(reader, found.commands[:limit])
        return DeviceCommands(imei, entries, found.total, unread)

    return _ask(settings, product, read)


def find_waiting(settings: Settings, imei: str, product: str | None, beginnings: Sequence[str]) -> DeviceCommands:
    """Return the commands that wait for a device, or those of them that are named.

    Args:
        settings: of the deployment.
        imei: the device.
        product: whose device it is; None: the default product's.
        beginnings: uuids, or unique beginnings of them; none: all that wait.

    Raises:
        WorkerError: a beginning is that of no command, of several, or of one that does not wait any more; or the
            platform cannot be read, or the product is not configured.
    """
    reader = _record_reader(settings)

    async def read(client: OneNETClient) -> DeviceCommands:
        found = await client.list_commands(product, imei, newest_first=True, is_enough=lambda _commands: False)
        if not found.is_whole:
            raise WorkerError(
                f"OneNET says that device {imei} has {found.total:,} commands, and shows {len(found.commands):,} of "
                f"them: nothing was cancelled; look with onenet-worker device {imei}"
            )
        chosen = [command for command in found.commands if state_of(command) == "waiting" and command.uuid]
        if beginnings:
            chosen = list(dict.fromkeys(_named(found.commands, text, imei) for text in beginnings))
        entries, unread = await _with_owners(reader, chosen)
        for entry in entries:
            if entry.state not in {"waiting", "unknown"}:
                raise WorkerError(
                    f"{entry.cached.uuid} does not wait any more, so it cannot be cancelled: {entry.state}"
                )
        return DeviceCommands(imei, entries, found.total, unread)

    return _ask(settings, product, read)


def cancel(settings: Settings, imei: str, product: str | None, chosen: Sequence[DeviceEntry]) -> list[Cancelling]:
    """Ask the platform to cancel commands, and return what they are afterwards, whatever it answered.

    Each is cancelled alone: one request for all would take those too that have arrived since.

    Args:
        settings: of the deployment.
        imei: the device.
        product: whose device it is; None: the default product's.
        chosen: the commands.

    Raises:
        WorkerError: their states cannot be read afterwards, or the product is not configured.
    """

    async def act(client: OneNETClient) -> list[Cancelling]:
        refusals: dict[str, str | None] = {}
        unanswered: dict[str, str] = {}
        for entry in chosen:
            uuid = entry.cached.uuid
            try:
                refusals[uuid] = await client.cancel(product, imei, uuid)
            except HistoryUnreadable as exc:  # it may have been done
                refusals[uuid], unanswered[uuid] = None, str(exc)
        try:
            states = await _states_after(client, imei, product, [entry.cached.uuid for entry in chosen], refusals)
        except HistoryUnreadable as exc:
            raise WorkerError(
                f"cannot say what was cancelled: {exc}: look with onenet-worker device {imei} before you try again"
            ) from exc
        return [
            Cancelling(
                entry,
                DeviceEntry(after, entry.owner) if (after := states.get(canonical_uuid(entry.cached.uuid))) else None,
                refusals[entry.cached.uuid],
                unanswered.get(entry.cached.uuid),
            )
            for entry in chosen
        ]

    return _ask(settings, product, act)


async def _states_after(
    client: OneNETClient, imei: str, product: str | None, uuids: Sequence[str], refusals: dict[str, str | None]
) -> dict[str, CachedCommand]:
    """Read what became of commands, again if the history may not show yet what the platform has just done."""
    wanted = {canonical_uuid(uuid) for uuid in uuids}

    def is_enough(commands: Sequence[CachedCommand]) -> bool:
        return wanted <= {canonical_uuid(command.uuid) for command in commands}

    for look in range(1, _LOOKS + 1):
        found = await client.list_commands(product, imei, newest_first=True, is_enough=is_enough)
        states = {canonical_uuid(command.uuid): command for command in found.commands}
        granted = [canonical_uuid(uuid) for uuid in uuids if refusals[uuid] is None]
        if look == _LOOKS or not any(uuid in states and state_of(states[uuid]) == "waiting" for uuid in granted):
            return states
        await asyncio.sleep(_LOOK_AGAIN_S)
    raise AssertionError  # the last look returns


def _named(commands: Sequence[CachedCommand], beginning: str, imei: str) -> CachedCommand:
    """Return the only command whose uuid begins with a text.

    Raises:
        WorkerError: there is none, or there are several.
    """
    if len(beginning) < _MIN_CHARS:
        raise WorkerError(f"--cancel {beginning!r}: give a uuid, or at least its first {_MIN_CHARS} characters")
    folded = beginning.casefold()
    found = [command for command in commands if command.uuid and command.uuid.casefold().startswith(folded)]
    exact = [command for command in found if command.uuid.casefold() == folded]
    match exact or found:
        case [command]:
            return command
        case []:
            raise WorkerError(
                f"no command of device {imei} has a uuid that begins with {beginning}: "
                f"see onenet-worker device {imei} --limit 1000"
            )
        case several:
            named = ", ".join(command.uuid for command in several[:_MAX_NAMED])
            more = " and more" if len(several) > _MAX_NAMED else ""
            raise WorkerError(f"{beginning} is the beginning of {named}{more}: give more characters")


def _record_reader(settings: Settings) -> "RecordReader | None":
    """Return what reads the records of the fleet; None: they are in the memory of the workers."""
    url = settings.idempotency_url.get_secret_value()
    if url == MEMORY:
        return None
    from worker.idempotency.records import RecordReader  # an optional dependency

    return RecordReader(RedisAddress.parse(url), settings.worker_namespace)


async def _with_owners(
    reader: "RecordReader | None", commands: Sequence[CachedCommand]
) -> tuple[tuple[DeviceEntry, ...], str | None]:
    """Add to each command the one of ours that it is, and say why that is not known."""
    owners: dict[str, UuidOwner] = {}
    unread: str | None = None
    if reader is None:
        unread = "with IDEMPOTENCY_URL=memory:// command ids are in the memory of the workers"
    else:
        try:
            owners = await reader.owners([command.uuid for command in commands if command.uuid])
        except WorkerError as exc:
            unread = str(exc)
        finally:
            await reader.close()
    return tuple(DeviceEntry(command, owners.get(command.uuid)) for command in commands), unread


def _ask(settings: Settings, product: str | None, act: Callable[[OneNETClient], Awaitable[Found]]) -> Found:
    """Do something with a client of the platform, within the rate limit.

    Raises:
        WorkerError: the product is not configured, the platform cannot be read, or Redis does not let the rate limit be
            used.
    """
    products = load_products(settings)
    if product not in products:
        names = ", ".join(sorted(name for name in products if name is not None))
        if product is None:
            raise WorkerError(f"there is no default product: name one with --product: {names}")
        known = f"those of ONENET_PRODUCTS_FILE are {names}" if names else "ONENET_PRODUCTS_FILE names none"
        raise WorkerError(f"no product {product} is configured: {known}")

    limiter = limiter_of(settings)
    acquire = None if limiter is None else partial(Turns().acquire, acquire=limiter.acquire)
    client = client_of(settings, products, NoTracing(), acquire)

    async def run() -> Found:
        try:
            return await act(client)
        except HistoryUnreadable as exc:
            if exc.is_rate_limited and limiter is not None:
                await limiter.ping()  # which says so if Redis is the reason
            raise
        finally:
            if limiter is not None:
                await limiter.close()

    try:
        return asyncio.run(run())
    except HistoryUnreadable as exc:
        raise WorkerError(f"OneNET at {urlsplit(products[product].url).netloc}: {exc}: {_advice(exc)}") from exc
    finally:
        client.close()


def _advice(error: HistoryUnreadable) -> str:
    if error.is_rate_limited or error.is_throttled:
        return "try again in a moment"
    if error.is_refused:
        return "check the credentials with onenet-worker check"
    if error.is_outage:
        return "try again, or see what onenet-worker check says"
    return "see that the device is one of this product, or name another with --product"
