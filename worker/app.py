"""Wiring: settings in, parts built, run, exit code; no decisions."""

import asyncio
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

from worker import __version__
from worker.amqp.broker import Broker
from worker.amqp.connection import connection_parameters
from worker.amqp.messages import MessageBuilder
from worker.amqp.topology import Topology
from worker.core.decide import RetryPolicy
from worker.core.task import Task
from worker.errors import EXIT_CONFIG, EXIT_SOFTWARE, SettingsError, TopologyMismatch
from worker.flow.consumer import Consumer
from worker.flow.device_queues import KeyedQueues
from worker.flow.pace import Pacer
from worker.idempotency.memory import MemoryStore
from worker.monitor import HealthMonitor
from worker.onenet.client import OneNETClient
from worker.onenet.route import Route
from worker.onenet.transport import HTTPTransport, Watch
from worker.processing.circuit_breaker import CircuitBreakers
from worker.processing.processor import HANDLING_S, Processor
from worker.settings import MEMORY, Credentials, Settings, load_products
from worker.telemetry.health import STALL_S, Health
from worker.telemetry.http_server import HealthServer
from worker.telemetry.logs import configure_logging, get_logger
from worker.telemetry.metrics import Metrics
from worker.telemetry.tracing import NoTracing, Tracing

# Shares of the grace: for what is under way, then for the connections to the broker, then for the spans; the rest is
# for the last lines of the log.
_FINISHING = 0.8
_CLOSING = 0.08
# Where the platform answers at once the fewest threads do most; those that ask Redis together wait for each other.
# Measured with `make bench`.
_FEW_THREADS = 3
_FEW_THREADS_WITH_REDIS = 8

if TYPE_CHECKING:
    from worker.idempotency.redis import RedisStore

log = get_logger()

NewPacer = Callable[[str | None, Callable[[Task], object]], Pacer]


def topology_of(settings: Settings) -> Topology:
    """Return the topology that the settings describe."""
    return Topology(settings.worker_namespace, settings.delay_queues_s)


def client_of(
    settings: Settings, products: Mapping[str | None, Credentials], watch: Watch, tracing: Tracing
) -> OneNETClient:
    """Return the client of the platform that the settings name."""
    ca_file = None if settings.onenet_ca_file is None else str(settings.onenet_ca_file)
    route = Route(settings.onenet_url, settings.onenet_connect_timeout, ca_file)
    return OneNETClient(
        settings.onenet_url,
        products,
        lambda: HTTPTransport(route, read_timeout_s=settings.onenet_read_timeout, watch=watch, tracing=tracing),
        settings.platform_zone,
        request_s=settings.request_s,
        latest_caching_s=settings.worker_settle,
        history_s=settings.idempotency_ttl,
    )


def lease_s(settings: Settings) -> float:
    """Return how long a command is held, in seconds.

    Long enough for a history and a request, so that a lease only ends under a worker that has stopped.
    """
    return 2 * settings.request_s + HANDLING_S


def store_of(settings: Settings) -> "MemoryStore | RedisStore":
    """Return the store that the settings name."""
    url = settings.idempotency_url.get_secret_value()
    if url == MEMORY:
        return MemoryStore(settings.idempotency_ttl, lease_s(settings), began_at=datetime.now(UTC))
    from worker.idempotency.redis import RedisStore

    return RedisStore(
        url,
        settings.worker_namespace,
        ttl_s=settings.idempotency_ttl,
        lease_s=lease_s(settings),
        connections=settings.worker_concurrency,
    )


def pacer_factory(settings: Settings, gates: CircuitBreakers) -> NewPacer | None:
    """Return what makes the pacer of each product, or None if there is no rate to keep."""
    if settings.rate is None:
        return None
    from worker.flow.rate_limiter import RateLimiter

    url = settings.idempotency_url.get_secret_value()
    slots = RateLimiter(settings.rate, settings.worker_namespace, None if url == MEMORY else url)
    return lambda product, let_go: Pacer(partial(slots.take, product), partial(gates.is_open, product), let_go)


def tracing_of(settings: Settings, worker: str) -> Tracing:
    """Return what makes spans, or makes none where no collector is named."""
    if settings.otel_exporter_otlp_endpoint is None:
        return NoTracing()
    from worker.telemetry.otel import OpenTelemetry

    queue = topology_of(settings).execute_queue
    endpoint = settings.otel_exporter_otlp_endpoint.get_secret_value()
    return OpenTelemetry(endpoint, __version__, worker, queue)


def run(settings: Settings) -> int:
    """Run the worker until it is told to stop; returns the exit code.

    Raises:
        SettingsError: a setting cannot be used.
    """
    products = load_products(settings)
    parameters = connection_parameters(settings)
    name = f"{socket.gethostname()}:{os.getpid()}"
    tracing = tracing_of(settings, name)
    watch = Watch(settings.request_s)
    client = client_of(settings, products, watch, tracing)
    store = store_of(settings)
    metrics = Metrics(__version__, settings.worker_concurrency)
    gates = CircuitBreakers(products, settings.worker_pause_after, settings.worker_pause_probe)
    history_gates = CircuitBreakers(
        products, settings.worker_pause_after, settings.worker_pause_probe, subject="history"
    )
    outgoing = MessageBuilder(topology_of(settings), name)
    handler = Processor(
        client,
        store,
        outgoing,
        gates,
        history_gates,
        RetryPolicy(
            settings.worker_retry_delays,
            settings.worker_max_attempts,
            settings.worker_settle,
            settings.worker_in_doubt,
        ),
        settings.platform_zone,
        metrics,
    )
    # A request may be under way for longer than a minute, and as many as may be at once.
    health = Health(max(STALL_S, lease_s(settings)), store.ping)

    def build() -> tuple[Broker, Consumer, HealthMonitor]:
        broker = Broker(
            parameters,
            topology_of(settings),
            name=f"onenet-execute-worker {name}",
            declare=settings.amqp_declare,
            prefetch=settings.prefetch,
            on_consumers_found=_warn_of_others if isinstance(store, MemoryStore) else _welcome_others,
        )
        consumer = Consumer(
            handler,
            broker,
            gates,
            KeyedQueues(by_device=settings.worker_ordering == "device"),
            pacer_factory(settings, gates),
            metrics,
            tracing,
            concurrency=settings.worker_concurrency,
            few_threads=_FEW_THREADS if isinstance(store, MemoryStore) else _FEW_THREADS_WITH_REDIS,
            prefetch=settings.prefetch,
            probe_s=settings.worker_pause_probe,
        )
        pulse = HealthMonitor(broker, consumer, gates, health)
        metrics.observe(pulse.state)
        return broker, consumer, pulse

    def reload() -> None:
        try:
            found = load_products(settings)
        except SettingsError as exc:
            log.warning("products_not_reloaded", reason="; ".join(exc.lines))  # the old ones go on
            return
        changed = client.replace_products(found)
        for each in (gates, history_gates):
            each.replace(found.keys(), changed)
        log.info("products_reloaded", products=len(found), changed=len(changed))

    endpoints = None
    writer = configure_logging(settings.log_level, settings.log_format)
    try:
        if settings.http_port:
            endpoints = HealthServer(settings.http_host, settings.http_port, health, metrics)
        log.info("worker_started", version=__version__, worker=name, namespace=settings.worker_namespace)
        if settings.readable_at is not None:
            log.warning("onenet_url_not_encrypted", host=settings.readable_at, hint="the key is readable on its way")
        # Not asyncio.run, which waits at its end for a name that is still being looked up.
        loop = asyncio.new_event_loop()
        asyncio.set_event_loop(loop)
        on_hangup = None if settings.onenet_products_file is None else reload
        return loop.run_until_complete(_serve(build, on_hangup, settings.worker_shutdown_grace))
    finally:
        if endpoints is not None:
            endpoints.close()
        client.close()
        watch.stop()
        store.close()
        tracing.close(_CLOSING * settings.worker_shutdown_grace)
        lost = writer.close()
        if lost and sys.stderr is not None:
            with suppress(OSError):  # which may be as full as stdout
                print(f"onenet-worker: {lost} lines of the log could not be written", file=sys.stderr)


async def _serve(
    build: Callable[[], tuple[Broker, Consumer, HealthMonitor]], on_hangup: Callable[[], None] | None, grace_s: float
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
    broker, consumer, pulse = build()
    running = asyncio.gather(broker.run(consumer), pulse.run())
    await asyncio.wait((running, stop, crash), return_when=asyncio.FIRST_COMPLETED)
    if stop.done():
        exit_code = await _finish(consumer, crash, stop.result(), grace_s)
    elif crash.done():
        exit_code = _crashed(crash.result())
    else:
        exit_code = _explain(running)
    running.cancel()
    await asyncio.wait((running,), timeout=_CLOSING * grace_s)
    log.info("worker_stopped", exit_code=exit_code)
    return exit_code


async def _finish(consumer: Consumer, crash: "asyncio.Future[BaseException]", reason: str, grace_s: float) -> int:
    log.info("worker_stopping", reason=reason, grace_s=grace_s)
    stopping = asyncio.ensure_future(consumer.stop())
    await asyncio.wait((stopping, crash), timeout=_FINISHING * grace_s, return_when=asyncio.FIRST_COMPLETED)
    if crash.done():
        return _crashed(crash.result())
    if not stopping.done():
        stopping.cancel()
        log.warning("shutdown_grace_exceeded", grace_s=grace_s)  # what is unacknowledged comes again
        return 0
    return 0 if stopping.exception() is None else _crashed(stopping.exception())


def _explain(running: "asyncio.Future[Any]") -> int:
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
