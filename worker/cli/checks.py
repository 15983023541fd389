"""What ``onenet-worker check`` looks at: each thing that a worker needs. Nothing is sent.

Nothing is changed but one key in Redis, which expires within seconds: only a write shows that writes are accepted.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from urllib.parse import urlsplit

from worker.amqp.blocking import check_topology, connect_blocking
from worker.amqp.connection import address
from worker.amqp.topology import Topology
from worker.app import client_of, store_of
from worker.errors import PlatformUnusable, SettingsError, WorkerError
from worker.idempotency.memory import MemoryStore
from worker.onenet.transport import Watch
from worker.settings import Credentials, Settings, load_products, load_settings
from worker.telemetry.tracing import NoTracing

_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What was found of one thing."""

    check: str
    is_well: bool
    detail: str


def check_all(imei: str) -> Iterator[CheckResult]:
    """Look at one thing after the other, each within a time of its own. ``imei``: whose history OneNET is asked for."""
    lines: list[str] = []
    try:
        settings = load_settings()
        products = load_products(settings)
    except SettingsError as exc:
        lines = exc.lines
    if lines:  # nothing else can be looked at
        for line in lines:
            yield CheckResult("settings", is_well=False, detail=line)
        return
    warning = "" if settings.readable_at is None else f"; the key travels readable to {settings.readable_at}: no https"
    yield CheckResult("settings", is_well=True, detail=f"usable; products: {len(products)}{warning}")
    yield from _broker(settings)
    yield from _store(settings)
    yield from _platform(settings, products, imei)


def _broker(settings: Settings) -> Iterator[CheckResult]:
    try:
        connection, parameters = connect_blocking(settings)
    except SettingsError as exc:
        yield from (CheckResult("settings", is_well=False, detail=line) for line in exc.lines)
        return
    except WorkerError as exc:
        yield CheckResult("broker", is_well=False, detail=str(exc))
        return
    yield CheckResult("broker", is_well=True, detail=address(parameters))
    try:
        faults = check_topology(
            connection, Topology(settings.worker_namespace, settings.delay_queues_s), may_declare=settings.amqp_declare
        )
    except WorkerError as exc:
        faults = [str(exc)]
    finally:
        if connection.is_open:
            connection.close()
    yield from (CheckResult("topology", is_well=False, detail=fault) for fault in faults)
    if not faults:
        yield CheckResult("topology", is_well=True, detail="exchanges and queues are there")


def _store(settings: Settings) -> Iterator[CheckResult]:
    try:
        store = store_of(settings)
    except SettingsError as exc:
        yield from (CheckResult("settings", is_well=False, detail=line) for line in exc.lines)
        return
    if isinstance(store, MemoryStore):
        yield CheckResult("idempotency", is_well=True, detail="in memory: good for one worker")
        return
    try:
        store.ping()
    except WorkerError as exc:
        yield CheckResult("idempotency", is_well=False, detail=str(exc))
        return
    finally:
        store.close()
    url = urlsplit(settings.idempotency_url.get_secret_value())
    yield CheckResult("idempotency", is_well=True, detail=f"Redis at {url.hostname}:{url.port or 6379}")


def _platform(settings: Settings, products: Mapping[str | None, Credentials], imei: str) -> Iterator[CheckResult]:
    watch = Watch(settings.request_s)
    try:
        client = client_of(settings, products, watch, NoTracing())
    except SettingsError as exc:
        watch.stop()
        yield from (CheckResult("settings", is_well=False, detail=line) for line in exc.lines)
        return

    def look(product: str | None) -> CheckResult:
        name = "OneNET" if product is None else f"OneNET, product {product}"
        try:
            return CheckResult(name, is_well=True, detail=client.check(product, imei))
        except PlatformUnusable as exc:
            return CheckResult(name, is_well=False, detail=str(exc))

    try:
        with ThreadPoolExecutor(_AT_ONCE) as threads:
            yield from threads.map(look, products)
    finally:
        client.close()
        watch.stop()
