"""The checks of ``onenet-worker check``: everything that a worker needs. No command is sent.

Nothing is changed except the record of a command of its own in Redis, which is deleted: only what the work does proves
that the work can be done. With AMQP_DECLARE=false probes go through the delay queues, and are gone afterwards. Workers
that run are asked over the control exchange.
"""

import asyncio
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from worker.admin.obstacles import faults_in, pauses_in
from worker.admin.pauses import Operator, this_person
from worker.admin.queues import count_queues
from worker.amqp.blocking import Connection, check_topology, connect_blocking, is_publishing_blocked
from worker.amqp.connection import ALARM, ALARM_REMEDY, printable_address
from worker.amqp.rights import delay_faults, missing_rights, missing_rights_to_answer
from worker.amqp.topology import Topology
from worker.app import client_of, limiter_of, rate_limit_address, store_of, tracing_of, try_store
from worker.core.claims import IdempotencyStore, Inspection
from worker.core.credentials import Product, plaintext_hosts
from worker.errors import BrokerUnavailable, PlatformUnusable, SettingsError, WorkerError
from worker.onenet.proxies import environment_proxy
from worker.printable import counted
from worker.settings import Settings, find_unknown_settings, load_products, load_settings
from worker.telemetry.tracing import NoTracing

if TYPE_CHECKING:
    from worker.flow.rate_limiter import RateLimiter

_BLOCKED_S = 1.0  # long enough: it counts from the moment at which the broker says that it blocks the connection


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The result of one check.

    ``obstacles``: what keeps commands from being sent now, though a worker could run.
    """

    check: str
    ok: bool
    detail: str
    obstacles: tuple[str, ...] = ()


def check_all(imei: str) -> Iterator[CheckResult]:
    """Run all checks, each with its own timeout. ``imei``: the device whose command history is read at OneNET."""
    unknown = find_unknown_settings()
    lines = [str(each) for each in unknown]
    is_usable = False
    try:
        settings = load_settings()
        products = load_products(settings)
        tracing_of(settings, "check").close(0)
        is_usable = True
    except SettingsError as exc:
        lines += exc.lines
    for line in lines:
        yield CheckResult("settings", ok=False, detail=line)
    if not is_usable:  # nothing else can be checked
        return
    hosts = plaintext_hosts(products)
    warning = f"; no https: the key is sent in clear to {', '.join(hosts)}" if hosts else ""
    if not unknown:
        yield CheckResult("settings", ok=True, detail=f"usable; products: {len(products)}{warning}")
    yield CheckResult("pace", ok=True, detail=_pace(settings))
    yield from _broker(settings)
    yield from _store(settings)
    yield from _platform(settings, products, imei)


def _pace(settings: Settings) -> str:
    """Return how fast the worker sends, in words."""
    sharing = "of each worker" if rate_limit_address(settings) is None else "shared through Redis"
    rate = "no rate limit" if settings.rate is None else f"{settings.rate} for each product, {sharing}"
    interval_s = settings.onenet_device_interval
    return f"{rate}; " + (f"{interval_s:g} s between two commands of a device" if interval_s else "no interval")


def _broker(settings: Settings) -> Iterator[CheckResult]:
    """Check the connection, the exchanges and queues, the user's rights and, with AMQP_DECLARE=false, the bindings.

    A worker that declares the topology adds what is missing.
    """
    try:
        connection, parameters = connect_blocking(settings.broker_address, _BLOCKED_S)
    except SettingsError as exc:
        yield from (CheckResult("settings", ok=False, detail=line) for line in exc.lines)
        return
    except WorkerError as exc:
        yield CheckResult("broker", ok=False, detail=str(exc))
        return
    yield CheckResult("broker", ok=True, detail=printable_address(parameters))
    try:
        yield from _topology(connection, settings)
    except WorkerError as exc:
        yield CheckResult("topology", ok=False, detail=str(exc))
    finally:
        if connection.is_open:
            connection.close()


def _topology(connection: Connection, settings: Settings) -> Iterator[CheckResult]:
    """Check what is declared and what this user may do; what publishes is not tried during an alarm, which blocks it.

    Raises:
        BrokerUnavailable: the connection was lost.
    """
    topology, may_declare = settings.topology, settings.amqp_declare
    faults, waiting = check_topology(connection, topology), _waiting(connection, topology)
    has_alarm = is_publishing_blocked(connection)
    detail = (
        f"{ALARM}: {ALARM_REMEDY}; free some, or raise the limit" if has_alarm else "no memory alarm and no disk alarm"
    )
    yield CheckResult("alarms", ok=not has_alarm, detail=detail)
    rights = [] if has_alarm else missing_rights(connection, topology, may_declare=may_declare)
    unknown: list[str] = []
    if not faults and not rights and not may_declare and not has_alarm:
        faults, unknown = delay_faults(connection, topology)
    yield from (CheckResult("topology", ok=False, detail=fault) for fault in faults)
    if not faults:
        yield CheckResult("topology", ok=True, detail="; ".join(["all exchanges and queues exist", *unknown]))
    yield waiting
    if not faults and not has_alarm:
        yield _workers(settings)
    yield from (CheckResult("permissions", ok=False, detail=line) for line in rights)
    if has_alarm:
        yield CheckResult("permissions", ok=False, detail="not tried, since nothing can be published during the alarm")
    elif not rights:
        unanswered = missing_rights_to_answer(connection, topology)
        detail = "this user may do all that a worker does"
        if unanswered:
            detail = f"enough to work, but not to take onenet-worker probe and to answer: {'; '.join(unanswered)}"
        yield CheckResult("permissions", ok=True, detail=detail)


def _waiting(connection: Connection, topology: Topology) -> CheckResult:
    """Say how many messages wait and who consumes them: facts, of which none is wrong before a worker runs."""
    try:
        found = count_queues(connection, topology)
    except BrokerUnavailable as exc:
        return CheckResult("queues", ok=False, detail=f"cannot be counted: {exc}")
    if found.commands is None:
        return CheckResult("queues", ok=True, detail=f"{topology.execute_queue} is not there yet")
    facts = [
        f"{counted(found.commands, 'command')} waiting in {topology.execute_queue}",
        counted(found.consumers, "consumer"),
        f"{counted(found.delayed, 'command')} waiting for another attempt",
        *([] if found.results is None else [f"{counted(found.results, 'command')} waiting for a result"]),
        counted(found.dead_letters, "dead letter"),
        counted(found.unrouted, "unrouted reply"),
    ]
    waits = found.commands and not found.consumers
    obstacles = (f"nothing consumes {topology.execute_queue}",) if waits else ()
    return CheckResult("queues", ok=True, detail="; ".join(facts), obstacles=obstacles)


def _workers(settings: Settings) -> CheckResult:
    """Ask the workers that run which products they send commands of: a pause is a fact, and not a fault."""
    try:
        answers = Operator(settings.broker_address, settings.topology, this_person()).state()
    except WorkerError as exc:
        return CheckResult("workers", ok=True, detail=f"cannot be asked: {exc}")
    running = f"{counted(len(answers.reports), 'worker')} answered" if answers.reports else "none answered"
    silent = f"workers that take commands and do not answer: {answers.silent} of {answers.consumers}"
    pauses = pauses_in(answers)
    state = [str(each) for each in pauses] or (["no product is paused"] if answers.reports else [])
    faults = faults_in(answers)
    obstacles = [*([silent] if answers.silent else []), *map(str, pauses)]
    detail = "; ".join([running, *([silent] if answers.silent else []), *state, *map(str, faults)])
    return CheckResult("workers", ok=not faults, detail=detail, obstacles=tuple(obstacles))


def _store(settings: Settings) -> Iterator[CheckResult]:
    try:
        store, limiter = store_of(settings), limiter_of(settings)
    except SettingsError as exc:
        yield from (CheckResult("settings", ok=False, detail=line) for line in exc.lines)
        return
    try:
        found = asyncio.run(_try(store, limiter))
    except WorkerError as exc:
        yield CheckResult("idempotency", ok=False, detail=str(exc))
        return
    address = rate_limit_address(settings)
    facts = "; ".join([*([] if address is None else [str(address)]), *found.facts])
    yield CheckResult("idempotency", ok=True, detail="; warning: ".join([facts, *found.warnings]))


async def _try(store: IdempotencyStore, limiter: "RateLimiter | None") -> Inspection:
    """Do what the work does, and look at what may cost records."""
    try:
        await try_store(store, limiter)
        return await store.inspect()
    finally:
        await store.close()
        if limiter is not None:
            await limiter.close()


def _platform(settings: Settings, products: Mapping[str | None, Product], imei: str) -> Iterator[CheckResult]:
    try:
        client = client_of(settings, products, NoTracing())
    except SettingsError as exc:
        yield from (CheckResult("settings", ok=False, detail=line) for line in exc.lines)
        return

    async def check(product: str | None) -> CheckResult:
        name = "OneNET" if product is None else f"OneNET, product {product}"
        place = _place(products[product].url)
        try:
            return CheckResult(name, ok=True, detail=f"{place}: {await client.check(product, imei)}")
        except PlatformUnusable as exc:
            return CheckResult(name, ok=False, detail=f"{place}: {exc}")

    async def check_all_products() -> list[CheckResult]:
        return await asyncio.gather(*map(check, products))

    yield from asyncio.run(check_all_products())
    client.close()


def _place(url: str) -> str:
    """Return what is asked: the platform's URL, which holds no secret, and host and port of the proxy before it."""
    proxy = environment_proxy(url)
    if proxy is None:
        return url
    parts = urlsplit(proxy)
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    return f"{url} by the proxy {host}" + (f":{parts.port}" if parts.port else "")
