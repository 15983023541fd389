"""Wiring: settings in, parts built, run, exit code; no decisions."""

import asyncio
import os
import signal
import socket
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from typing import Any

from worker import __version__
from worker.amqp.broker import Broker
from worker.amqp.connecting import connection_parameters
from worker.amqp.messages import Outgoing
from worker.amqp.topology import Topology
from worker.decide import RetryPolicy
from worker.errors import EXIT_CONFIG, EXIT_SOFTWARE, SettingsError, TopologyMismatch
from worker.flow.gates import Gates
from worker.flow.lanes import Lanes
from worker.flow.pace import Pacer
from worker.handler import HANDLING_S, Handler
from worker.idempotency import Store
from worker.idempotency.memory import MemoryStore
from worker.intake import Intake
from worker.onenet.client import OneNETClient
from worker.onenet.http import BoundedHTTP, Watch
from worker.settings import MEMORY, Settings, load_products
from worker.task import Task
from worker.telemetry.logs import configure_logging, get_logger

log = get_logger()

NewPacer = Callable[[str | None, Callable[[Task], object]], Pacer]


def topology_of(settings: Settings) -> Topology:
    """Return the topology that the settings describe."""
    return Topology(settings.worker_namespace, settings.delays)


def store_of(settings: Settings) -> Store:
    """Return the store that the settings name."""
    url = settings.idempotency_url.get_secret_value()
    # Long enough for a history and a request, so that a lease only ends under a worker that has stopped.
    lease_s = 2 * settings.request_s + HANDLING_S
    if url == MEMORY:
        return MemoryStore(settings.idempotency_ttl, lease_s, began_at=datetime.now(UTC))
    from worker.idempotency.redis import RedisStore

    return RedisStore(
        url,
        settings.worker_namespace,
        ttl_s=settings.idempotency_ttl,
        lease_s=lease_s,
        connections=settings.worker_concurrency,
    )


def pacer_factory(settings: Settings, gates: Gates) -> NewPacer | None:
    """Return what makes the pacer of each product, or None if there is no rate to keep."""
    if settings.rate is None:
        return None
    from worker.flow.slots import Slots

    url = settings.idempotency_url.get_secret_value()
    slots = Slots(settings.rate, settings.worker_namespace, None if url == MEMORY else url)
    return lambda product, let_go: Pacer(partial(slots.take, product), partial(gates.is_open, product), let_go)


def run(settings: Settings) -> int:
    """Run the worker until it is told to stop; returns the exit code.

    Raises:
        SettingsError: a setting cannot be used.
    """
    products = load_products(settings)
    parameters = connection_parameters(
        settings.amqp_url,
        ca_file=settings.amqp_ca_file,
        cert_file=settings.amqp_cert_file,
        key_file=settings.amqp_key_file,
    )
    watch = Watch(settings.request_s)
    client = OneNETClient(
        settings.onenet_url,
        products,
        lambda: BoundedHTTP(
            settings.onenet_url,
            connect_timeout_s=settings.onenet_connect_timeout,
            read_timeout_s=settings.onenet_read_timeout,
            ca_file=None if settings.onenet_ca_file is None else str(settings.onenet_ca_file),
            connections=settings.worker_concurrency,
            watch=watch,
        ),
        settings.platform_zone,
        request_s=settings.request_s,
        latest_caching_s=settings.worker_settle,
        history_s=settings.idempotency_ttl,
    )
    store = store_of(settings)
    gates = Gates(products, settings.worker_pause_after, settings.worker_pause_probe)
    name = f"{socket.gethostname()}:{os.getpid()}"
    outgoing = Outgoing(topology_of(settings), name)
    handler = Handler(
        client,
        store,
        outgoing,
        gates,
        RetryPolicy(
            settings.worker_retry_delays,
            settings.worker_max_attempts,
            settings.worker_settle,
            settings.worker_in_doubt,
        ),
        settings.platform_zone,
    )

    def build() -> tuple[Broker, Intake]:
        broker = Broker(
            parameters,
            topology_of(settings),
            name=f"onenet-execute-worker {name}",
            declare=settings.amqp_declare,
            prefetch=settings.prefetch,
            on_consumers_found=_warn_of_others if isinstance(store, MemoryStore) else _welcome_others,
        )
        intake = Intake(
            handler,
            broker,
            gates,
            Lanes(by_device=settings.worker_ordering == "device"),
            pacer_factory(settings, gates),
            concurrency=settings.worker_concurrency,
            prefetch=settings.prefetch,
            probe_s=settings.worker_pause_probe,
        )
        return broker, intake

    def reload() -> None:
        try:
            found = load_products(settings)
        except SettingsError as exc:
            log.warning("products_not_reloaded", reason="; ".join(exc.lines))  # the old ones go on
            return
        changed = client.replace_products(found)
        gates.replace(found.keys(), changed)
        log.info("products_reloaded", products=len(found), changed=len(changed))

    writer = configure_logging(settings.log_level, settings.log_format)
    try:
        log.info("worker_started", version=__version__, worker=name, namespace=settings.worker_namespace)
        if settings.readable_at is not None:
            log.warning("onenet_url_not_encrypted", host=settings.readable_at, hint="the key is readable on its way")
        # Not asyncio.run, which waits at its end for a name that is still being looked up.
        loop = asyncio.new_event_loop()
        asyncio.set_event_loop(loop)
        on_hangup = None if settings.onenet_products_file is None else reload
        return loop.run_until_complete(_serve(build, on_hangup, settings.worker_shutdown_grace))
    finally:
        client.close()
        watch.stop()
        store.close()
        writer.close()


async def _serve(
    build: Callable[[], tuple[Broker, Intake]], on_hangup: Callable[[], None] | None, grace_s: float
) -> int:
    loop = asyncio.get_running_loop()
    stop: asyncio.Future[str] = loop.create_future()
    crash: asyncio.Future[BaseException] = loop.create_future()

    def on_signal(number: signal.Signals) -> None:
        if stop.done():
            os._exit(128 + number)  # the second one: at once, and everything unacknowledged comes again
        stop.set_result(number.name)

    def on_crash(error: BaseException) -> None:
        if not crash.done():
            crash.set_result(error)

    def on_loop_error(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        on_crash(context.get("exception") or RuntimeError(context["message"]))

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    loop.set_exception_handler(on_loop_error)

    def on_thread_crash(arguments: threading.ExceptHookArgs) -> None:
        loop.call_soon_threadsafe(on_crash, arguments.exc_value or RuntimeError(str(arguments.exc_type)))

    threading.excepthook = on_thread_crash
    if on_hangup is not None:
        loop.add_signal_handler(signal.SIGHUP, on_hangup)
    broker, intake = build()
    running = asyncio.create_task(broker.run(intake))
    await asyncio.wait((running, stop, crash), return_when=asyncio.FIRST_COMPLETED)
    if stop.done():
        exit_code = await _finish(intake, crash, stop.result(), grace_s)
    elif crash.done():
        exit_code = _crashed(crash.result())
    else:
        exit_code = _explain(running)
    running.cancel()
    await asyncio.wait((running,), timeout=3)
    log.info("worker_stopped", exit_code=exit_code)
    return exit_code


async def _finish(intake: Intake, crash: "asyncio.Future[BaseException]", reason: str, grace_s: float) -> int:
    log.info("worker_stopping", reason=reason, grace_s=grace_s)
    stopping = asyncio.ensure_future(intake.stop())
    # A tenth of the grace is kept for closing the connections and writing the last lines.
    await asyncio.wait((stopping, crash), timeout=0.9 * grace_s, return_when=asyncio.FIRST_COMPLETED)
    if crash.done():
        return _crashed(crash.result())
    if not stopping.done():
        stopping.cancel()
        log.warning("shutdown_grace_exceeded", grace_s=grace_s)  # what is unacknowledged comes again
        return 0
    return 0 if stopping.exception() is None else _crashed(stopping.exception())


def _explain(running: "asyncio.Task[None]") -> int:
    error = running.exception()
    if isinstance(error, TopologyMismatch):
        log.error("topology_mismatch", reason=str(error))
        return EXIT_CONFIG
    return _crashed(error)


def _crashed(error: BaseException | None) -> int:
    log.critical("worker_crashed", exc_info=error)
    return EXIT_SOFTWARE


def _welcome_others(_consumers: int) -> None:
    """Say nothing: they share what they remember."""


def _warn_of_others(consumers: int) -> None:
    log.warning("idempotency_not_shared", consumers=consumers, hint="several workers need IDEMPOTENCY_URL=redis://…")
