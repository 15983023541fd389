"""The composition root: builds the parts of a worker from its settings, serves, stops, and returns an exit code."""

import asyncio
import gc
import os
import signal
import socket
import sys
import threading
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

from worker import __version__, open_files
from worker.amqp.broker import Broker
from worker.amqp.connection import connection_parameters
from worker.amqp.consumer import Source
from worker.amqp.control_reader import ControlReader
from worker.amqp.messages import MessageBuilder
from worker.amqp.result_messages import ResultMessages
from worker.amqp.unrouted_watch import UnroutedWatch
from worker.core.claims import IdempotencyStore
from worker.core.clock import utc_now
from worker.core.credentials import Product, plaintext_hosts
from worker.core.decide import RetryPolicy
from worker.core.pauses import Order, WorkerReport
from worker.core.redis_address import RedisAddress
from worker.errors import (
    EXIT_CONFIG,
    EXIT_SOFTWARE,
    SettingsError,
    StoreUnavailable,
    StoreUnusable,
    TopologyMismatch,
)
from worker.flow.consumer import Consumer
from worker.flow.device_queues import KeyedQueues
from worker.flow.rate_limited_queue import Share, Turns
from worker.flow.result_consumer import PREFETCH as RESULT_PREFETCH
from worker.flow.result_consumer import ResultConsumer
from worker.idempotency import open_store
from worker.idempotency.latest_address import LatestAddress
from worker.monitor import HealthMonitor
from worker.onenet.account import Site
from worker.onenet.client import OneNETClient
from worker.onenet.clock import PlatformClock
from worker.onenet.device_histories import DeviceHistories
from worker.onenet.history_memory import MAX_SEARCHES
from worker.onenet.history_reader import HistoryReader
from worker.onenet.proxies import environment_proxy
from worker.onenet.route import Route
from worker.onenet.transport import HTTPTransport
from worker.processing.circuit_breaker import CircuitBreakers, Subject
from worker.processing.engine import PROCESSING_S, Engine
from worker.processing.result_finder import ResultFinder
from worker.processing.store_watch import StoreWatch
from worker.settings import (
    MEMORY,
    Settings,
    find_unknown_settings,
    load_broker_address,
    load_products,
    load_settings,
    load_store_url,
)
from worker.telemetry.health import STALL_S, Health
from worker.telemetry.http_server import HealthServer
from worker.telemetry.logs import configure_logging, get_logger
from worker.telemetry.metrics import Metrics
from worker.telemetry.otel_variables import checked_variables
from worker.telemetry.tracing import NoTracing, Tracing

if TYPE_CHECKING:
    from worker.flow.rate_limiter import RateLimiter

# Shares of the shutdown grace: for commands in progress, then for closing the broker's connections, then for exporting
# spans; the remainder is for the last lines of the log.
_FINISHING = 0.8
_CLOSING = 0.08
_MIN_RATE_WAIT_S, _MAX_RATE_WAIT_S = 10.0, 120.0
_READS, _FEWEST_READS = 30, 4  # of one search at a low rate: what it may wait for, and at the least
_FEWEST_LOOKS = 4  # of one product at once
_PING_S = 1.0  # for a probe that asks for the store while the event loop is busy

log = get_logger()


def run(settings: Settings) -> int:
    """Run a worker until it is stopped, and return the exit code.

    Raises:
        SettingsError: a setting is unusable.
    """
    worker = Worker(settings)
    writer = configure_logging(settings.log_level, settings.log_format)
    try:
        # Not asyncio.run: on exit it waits for pending name look-ups.
        loop = asyncio.new_event_loop()
        asyncio.set_event_loop(loop)
        return loop.run_until_complete(worker.serve())
    finally:
        worker.close()
        lost = writer.close()
        if lost and sys.stderr is not None:
            with suppress(OSError):  # stderr may be redirected to a full disk
                print(f"onenet-worker: {lost} lines of the log could not be written", file=sys.stderr)


class Worker:
    """One worker process: builds its parts, serves, and stops.

    Args:
        settings: settings of the deployment.

    Raises:
        SettingsError: a setting is unusable.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._name = f"{socket.gethostname()}:{os.getpid()}"
        products: Mapping[str | None, Product] = load_products(settings)
        self._products = products
        self._unknown_settings = find_unknown_settings()  # here: reading a file would block the event loop
        self._plaintext_hosts = plaintext_hosts(products)
        self._broker_urls = connection_parameters(settings.broker_address)
        self._tracing = tracing_of(settings, self._name)
        self._limiter = limiter_of(settings)
        self._turns = Turns()
        acquire = None if self._limiter is None else partial(self._turns.acquire, acquire=self._limiter.acquire)
        self._client = client_of(settings, products, self._tracing, acquire)
        self._store = store_of(settings)
        self._metrics = Metrics(__version__, settings.worker_concurrency)
        self._breakers = self._new_breakers(products, "product")
        self._history_breakers = self._new_breakers(products, "history")
        self._http_server: HealthServer | None = None
        self._reload_asked = asyncio.Event()

    async def serve(self) -> int:
        """Process commands until a signal or an error ends the worker, and return the exit code."""
        settings, loop = self._settings, asyncio.get_running_loop()
        # With long timeouts one command may take longer than a minute, and all commands in flight may be such ones.
        health = Health(max(STALL_S, lease_s(settings)), lambda: self._ping_store(loop))
        if settings.http_port:
            self._http_server = HealthServer(settings.http_host, settings.http_port, health, self._metrics)
        log.info("worker_started", version=__version__, worker=self._name, namespace=settings.worker_namespace)
        for unknown in self._unknown_settings:
            hint = "it has no effect"
            log.warning("setting_unknown", name=unknown.name, suggestion=unknown.suggestion, hint=hint)
        platforms = {product.url for product in self._products.values()}
        needed = open_files.needed(settings.worker_concurrency, len(platforms))
        limit = open_files.raise_limit(needed)
        if limit < needed:
            log.warning("open_files_limited", limit=limit, needed=needed, hint="raise ulimit -n: connections may fail")
        for host in self._plaintext_hosts:
            log.warning("onenet_url_not_encrypted", host=host, hint="the credentials are sent in plaintext")
        ending = _Ending(loop)
        if settings.onenet_products_file is not None:
            loop.add_signal_handler(signal.SIGHUP, self._reload_asked.set)
        store_watch = StoreWatch(self._store, partial(try_store, self._store, self._limiter))
        if self._limiter is not None:
            self._limiter.on_refused = store_watch.note
        broker, consumer, results, monitor = self._build(health, store_watch)
        gc.freeze()  # what exists by now stays: no collection needs to look at it again
        running = asyncio.gather(
            broker.run(consumer),
            monitor.run(),
            store_watch.run(),
            self._watch_credentials(),
            *(() if results is None else (results.run(),)),
        )
        await asyncio.wait((running, ending.stop, ending.crash), return_when=asyncio.FIRST_COMPLETED)
        if ending.stop.done():
            exit_code = await self._stop([consumer, *([] if results is None else [results])], ending)
        elif ending.crash.done():
            exit_code = _crashed(ending.crash.result())
        else:
            exit_code = _explain(running)
        running.cancel()
        consumer.abandon()  # cuts the requests in flight, and sends nothing more
        if results is not None:
            results.abandon()
        self._client.close()
        await asyncio.wait((running,), timeout=_CLOSING * settings.worker_shutdown_grace)
        await self._store.close()
        if self._limiter is not None:
            await self._limiter.close()
        log.info("worker_stopped", exit_code=exit_code)
        return exit_code

    async def _watch_credentials(self) -> None:
        """Read the credentials again when a SIGHUP asks for it and, while a product is paused, before each probe.

        Wrong ones may be the reason of the pause. While a file cannot be used, the former ones go on.
        """
        loop = asyncio.get_running_loop()
        logged = ""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._settings.worker_probe_interval):
                    await self._reload_asked.wait()
            is_asked = self._reload_asked.is_set()
            self._reload_asked.clear()
            if not is_asked and not any(self._breakers.paused().values()):
                continue
            reason = ""
            try:
                found = await loop.run_in_executor(None, lambda: load_products(load_settings()))
                if is_asked or found != self._products:
                    self._use(found)
            except SettingsError as exc:
                reason = "; ".join(exc.lines)
            if reason and (is_asked or reason != logged):  # once, not at each probe
                log.warning("products_not_reloaded", reason=reason)
            logged = reason

    def _use(self, products: Mapping[str | None, Product]) -> None:
        """Use other products from now on.

        Raises:
            SettingsError: a platform cannot be reached as the environment says; the products stay as they were.
        """
        changed = self._client.replace_products(products)
        self._products = products
        for breakers in (self._breakers, self._history_breakers):
            breakers.replace(products.keys(), changed)
        log.info("products_reloaded", products=len(products), changed=len(changed))

    def close(self) -> None:
        """Stop the HTTP server, and export the last spans."""
        if self._http_server is not None:
            self._http_server.close()
        self._tracing.close(_CLOSING * self._settings.worker_shutdown_grace)

    def _build(
        self, health: Health, store_watch: StoreWatch
    ) -> tuple[Broker, Consumer, ResultConsumer | None, HealthMonitor]:
        """Build the parts that run on the event loop."""
        settings, store = self._settings, self._store
        policy = RetryPolicy(
            settings.worker_retry_delays,
            settings.worker_max_attempts,
            settings.worker_reconcile_delay,
            settings.worker_in_doubt,
        )
        interval_s = settings.onenet_device_interval
        is_isolated = settings.worker_tenants == "isolated"
        by_device = settings.worker_ordering == "device" or interval_s > 0  # one at a time, to be an interval apart
        queues = KeyedQueues(by_device=by_device, interval_s=interval_s, clock=asyncio.get_running_loop().time)
        engine = Engine(
            self._client,
            store,
            self._breakers,
            self._history_breakers,
            policy,
            self._metrics,
            on_send=queues.note_sent,
        )
        topology = settings.topology

        def on_order(order: Order) -> None:
            if order.kind in {"probe", "resume"}:
                for breakers in (self._breakers, self._history_breakers):
                    breakers.probe_at_once(order)
                consumer.look_at_once()

        def report() -> WorkerReport:
            return WorkerReport(
                worker=self._name,
                version=__version__,
                is_blocked=broker.is_blocked,
                is_store_available=store_watch.is_available,
                products=self._breakers.states(),
            )

        broker = self._new_broker(
            Source(topology.execute_queue, is_cautious=True),
            "",
            settings.prefetch,
            on_other_consumers=None if store.is_shared else _warn_of_others,
            control=ControlReader(
                topology,
                self._breakers.pause_by_hand,
                on_order,
                report,
                UnroutedWatch(topology, declare=settings.amqp_declare),
                declare=settings.amqp_declare,
            ),
        )
        result_messages = None
        if settings.result_delays_s:
            result_messages = ResultMessages(
                topology,
                settings.result_delays_s,
                lambda product: self._client.now(product) - utc_now(),
                is_isolated=is_isolated,
            )
        consumer = Consumer(
            engine,
            MessageBuilder(
                topology,
                self._name,
                is_isolated=is_isolated,
                await_result=None if result_messages is None else result_messages.first,
            ),
            broker,
            self._breakers,
            store_watch,
            queues,
            None if self._limiter is None else self._limiter.acquire,
            self._turns,
            self._metrics,
            self._tracing,
            settings.platform_zone,
            concurrency=settings.worker_concurrency,
            usual_prefetch=settings.prefetch,
            probe_interval_s=settings.worker_probe_interval,
            is_isolated=is_isolated,
        )
        results = None if result_messages is None else self._new_result_consumer(result_messages, store_watch)
        monitor = HealthMonitor(
            broker, consumer, results, self._breakers, store_watch, health, self._client.clock_offsets_s
        )
        self._metrics.observe(monitor.state)
        return broker, consumer, results, monitor

    def _new_broker(
        self,
        source: Source,
        purpose: str,
        prefetch: int,
        on_other_consumers: Callable[[int], object] | None = None,
        control: ControlReader | None = None,
    ) -> Broker:
        return Broker(
            self._broker_urls,
            lambda: connection_parameters(load_broker_address()),
            self._settings.topology,
            source,
            name=f"onenet-execute-worker {self._name}{purpose}",
            declare=self._settings.amqp_declare,
            prefetch=prefetch,
            on_other_consumers=on_other_consumers,
            control=control,
        )

    def _new_result_consumer(self, messages: ResultMessages, store_watch: StoreWatch) -> ResultConsumer:
        settings, topology, delays_s = self._settings, self._settings.topology, self._settings.result_delays_s
        share = None
        if self._limiter is not None and settings.rate is not None:
            interval_s = settings.rate.period_s / settings.rate.count
            share = Share(interval_s, partial(self._turns.acquire, acquire=self._limiter.acquire)).acquire
        finder = ResultFinder(
            self._client,
            self._store,
            self._breakers,
            self._history_breakers,
            delays_s,
            lambda: store_watch.outage_s,
            share,
        )
        return ResultConsumer(
            finder,
            messages,
            # Looks send nothing, and one that hangs must not keep the queue waiting.
            self._new_broker(Source(topology.results_queue, is_cautious=False), " results", RESULT_PREFETCH),
            [topology.results_queue, *map(topology.result_delay_queue, sorted(set(delays_s)))],
            self._metrics,
            delays_s,
            # One product may use most of the places that all searches have; of many each has a few.
            max(_FEWEST_LOOKS, MAX_SEARCHES * 3 // 4 // max(1, len(self._products))),
        )

    def _ping_store(self, loop: asyncio.AbstractEventLoop) -> None:
        """Ping the store from another thread.

        Raises:
            StoreUnavailable: the store, or the event loop, does not answer.
        """
        ping = asyncio.run_coroutine_threadsafe(try_store(self._store, self._limiter), loop)
        try:
            ping.result(_PING_S)
        except TimeoutError as exc:
            ping.cancel()
            raise StoreUnavailable("no answer") from exc

    async def _stop(self, consumers: Iterable[Consumer | ResultConsumer], ending: "_Ending") -> int:
        grace_s = self._settings.worker_shutdown_grace
        log.info("worker_stopping", reason=ending.stop.result(), grace_s=grace_s)
        stopping = asyncio.gather(*(consumer.stop() for consumer in consumers))
        await asyncio.wait((stopping, ending.crash), timeout=_FINISHING * grace_s, return_when=asyncio.FIRST_COMPLETED)
        if ending.crash.done():
            return _crashed(ending.crash.result())
        if not stopping.done():
            stopping.cancel()
            log.warning("shutdown_grace_exceeded", grace_s=grace_s)  # unacknowledged deliveries are redelivered
            return 0
        return 0 if stopping.exception() is None else _crashed(stopping.exception())

    def _new_breakers(self, products: Mapping[str | None, Product], subject: Subject) -> CircuitBreakers:
        settings = self._settings
        return CircuitBreakers(
            products, settings.worker_pause_after_failures, settings.worker_probe_interval, subject=subject
        )


class _Ending:
    """The reasons to end the worker: a signal, or an unhandled error on the event loop or in a thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.stop: asyncio.Future[str] = loop.create_future()
        self.crash: asyncio.Future[BaseException] = loop.create_future()
        self._loop = loop
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        loop.set_exception_handler(self._on_loop_error)
        threading.excepthook = self._on_thread_error

    def _on_signal(self, number: signal.Signals) -> None:
        if self.stop.done():
            os._exit(128 + number)  # the second signal ends it at once: what is unacknowledged is redelivered
        self.stop.set_result(number.name)

    def _on_crash(self, error: BaseException) -> None:
        if not self.crash.done():
            self.crash.set_result(error)

    def _on_loop_error(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self._on_crash(context.get("exception") or RuntimeError(context["message"]))

    def _on_thread_error(self, arguments: threading.ExceptHookArgs) -> None:
        error = arguments.exc_value or RuntimeError(str(arguments.exc_type))
        self._loop.call_soon_threadsafe(self._on_crash, error)


def client_of(
    settings: Settings,
    products: Mapping[str | None, Product],
    tracing: Tracing,
    acquire: Callable[[str | None], Awaitable[None]] | None = None,
) -> OneNETClient:
    """Return a client of the platform; ``acquire`` waits for the rate limit of its reads."""
    ca_file = None if settings.onenet_ca_file is None else str(settings.onenet_ca_file)
    connect_s, read_s = settings.onenet_connect_timeout, settings.onenet_read_timeout

    def new_site(url: str) -> Site:
        route = Route(url, ca_file)
        return Site(
            lambda: HTTPTransport(route, connect_timeout_s=connect_s, read_timeout_s=read_s, tracing=tracing),
            HistoryReader(
                route,
                connect_timeout_s=connect_s,
                read_timeout_s=read_s,
                concurrency=min(settings.worker_concurrency, MAX_SEARCHES),
                tracing=tracing,
            ),
            PlatformClock(url),
        )

    rate = settings.rate
    histories = DeviceHistories(
        settings.platform_zone,
        request_s=settings.request_s,
        caching_delay_s=settings.worker_reconcile_delay,
        history_window_s=settings.idempotency_ttl,
        acquire=acquire,
        rate_wait_s=rate_wait_s(settings),
        searches_at_once=1 if rate is None else max(1, rate.count // rate.period_s),
    )
    return OneNETClient(products, new_site, settings.platform_zone, histories, request_s=settings.request_s)


def rate_wait_s(settings: Settings) -> float:
    """Return how long one search of a history may wait for the rate limit in all, in seconds.

    Long enough for many reads, or at a low rate for a few; what it cannot read by then is tried later.
    """
    rate = settings.rate
    if rate is None:
        return 0
    request_s = rate.period_s / rate.count
    return max(_FEWEST_READS * request_s, min(_MAX_RATE_WAIT_S, max(_MIN_RATE_WAIT_S, _READS * request_s)))


def lease_s(settings: Settings) -> float:
    """Return the duration of a lease, in seconds.

    Long enough to read a history at the rate limit and to send a request. After it nothing is sent, and the next claim
    takes the command for one in doubt.
    """
    return 2 * settings.request_s + rate_wait_s(settings) + PROCESSING_S


def store_of(settings: Settings) -> IdempotencyStore:
    """Open the idempotency store."""
    return open_store(
        settings.idempotency_url.get_secret_value(),
        settings.worker_namespace,
        ttl_s=settings.idempotency_ttl,
        lease_s=lease_s(settings),
        began_at=datetime.now(UTC),
        reconcile_delay_s=settings.worker_reconcile_delay,
        replicas=settings.idempotency_wait_replicas,
        read_address=_read_redis_address,
    )


async def try_store(store: IdempotencyStore, limiter: "RateLimiter | None") -> None:
    """Do what commands do with the store, and with the rate limit, which may be in the same Redis.

    Raises:
        StoreUnavailable: one of them cannot be used.
    """
    pings = [store.ping(), *([] if limiter is None else [limiter.ping()])]  # at once: a probe waits for a second
    for result in await asyncio.gather(*pings, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result


def rate_limit_address(settings: Settings) -> RedisAddress | None:
    """Return the Redis through which workers share the rate limit: the idempotency store's, if that is Redis."""
    return _redis_address(settings.idempotency_url.get_secret_value())


def _redis_address(url: str) -> RedisAddress | None:
    return None if url == MEMORY else RedisAddress.parse(url)


def _read_redis_address() -> RedisAddress:
    """Return the address of Redis as the settings say by now.

    Raises:
        SettingsError: they are unusable, or name no Redis.
    """
    address = _redis_address(load_store_url())
    if address is None:
        raise SettingsError([f"IDEMPOTENCY_URL: is {MEMORY} by now: another kind of store needs a restart"])
    return address


def limiter_of(settings: Settings) -> "RateLimiter | None":
    """Return the rate limiter, or None if there is no rate limit."""
    if settings.rate is None:
        return None
    from worker.flow.rate_limiter import RateLimiter  # 7 MiB with its library: only where it is used

    address = rate_limit_address(settings)
    latest = None if address is None else LatestAddress(address, _read_redis_address)
    return RateLimiter(settings.rate, settings.worker_namespace, latest)


def tracing_of(settings: Settings, worker: str) -> Tracing:
    """Return the tracing: none, or OpenTelemetry if a collector is set.

    Raises:
        SettingsError: the environment names an unusable proxy for the collector, or an ``OTEL_*`` is unusable.
    """
    if settings.otel_exporter_otlp_endpoint is None:
        return NoTracing()
    endpoint = settings.otel_exporter_otlp_endpoint.get_secret_value()
    environment_proxy(endpoint)  # checked here: the exporter would log an unusable proxy with its password
    with checked_variables():
        from worker.telemetry.otel import OpenTelemetry  # some variables are read when the SDK is imported

        return OpenTelemetry(endpoint, __version__, worker, settings.topology.execute_queue)


def _explain(running: "asyncio.Future[Any]") -> int:
    error = running.exception()
    if isinstance(error, TopologyMismatch):
        log.error("topology_mismatch", reason=str(error))
        return EXIT_CONFIG
    if isinstance(error, StoreUnusable):
        log.error("store_unusable", reason=str(error))
        return EXIT_CONFIG
    return _crashed(error)


def _crashed(error: BaseException | None) -> int:
    log.critical("worker_crashed", exc_info=error)
    return EXIT_SOFTWARE


def _warn_of_others(consumers: int) -> None:
    log.warning("idempotency_not_shared", consumers=consumers, hint="several workers need IDEMPOTENCY_URL=redis://HOST")
