"""Tracing with the OpenTelemetry SDK, exported over OTLP; the SDK reads its other ``OTEL_*`` variables itself."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_INSTANCE_ID, SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from worker.telemetry.tracing import Answered


class OpenTelemetry:
    """Creates spans; a thread of the SDK exports them to a collector.

    Args:
        endpoint: the collector's base URL, OTLP over HTTP.
        version: of the worker.
        worker: name of this process.
        queue: name of the queue that commands are consumed from.
    """

    def __init__(self, endpoint: str, version: str, worker: str, queue: str) -> None:
        self._queue = queue
        resource = Resource.create({SERVICE_VERSION: version, SERVICE_INSTANCE_ID: worker})
        if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):  # OTEL_SERVICE_NAME is not set
            resource = resource.merge(Resource({SERVICE_NAME: "onenet-execute-worker"}))
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        exporter = OTLPSpanExporter(endpoint=f"{endpoint}/v1/traces")
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("onenet-execute-worker", version)
        self._propagator = TraceContextTextMapPropagator()

    @contextmanager
    def consuming(self, headers: Mapping[str, str], command_id: str | None, attempt: int) -> Iterator[None]:
        attributes: dict[str, str | int] = {
            "messaging.system": "rabbitmq",
            "messaging.operation.type": "process",
            "messaging.destination.name": self._queue,
            "onenet.attempt": attempt,
        }
        if command_id is not None:
            attributes["messaging.message.id"] = command_id
        parent = self._propagator.extract(headers, Context())
        with self._tracer.start_as_current_span(f"process {self._queue}", parent, SpanKind.CONSUMER, attributes):
            yield

    @contextmanager
    def requesting(self, method: str, url: str) -> Iterator[Answered]:
        attributes = {"http.request.method": method, "url.full": url}
        # The exception is not recorded: its message holds the whole URL, and with it the device's IMEI.
        with self._tracer.start_as_current_span(
            method,
            kind=SpanKind.CLIENT,
            attributes=attributes,
            record_exception=False,
            set_status_on_exception=False,
        ) as span:

            def answered(status: int) -> None:
                span.set_attribute("http.response.status_code", status)
                if status >= HTTPStatus.BAD_REQUEST:
                    span.set_status(Status(StatusCode.ERROR))

            try:
                yield answered
            except Exception as exc:  # of any kind: the span names its type, and it is raised again
                span.set_attribute("error.type", type(exc).__name__)
                span.set_status(Status(StatusCode.ERROR))
                raise

    def publishing(self, exchange: str, routing_key: str) -> tuple[Mapping[str, str], Callable[[], object]]:
        attributes = {
            "messaging.system": "rabbitmq",
            "messaging.operation.type": "send",
            "messaging.destination.name": exchange,
            "messaging.rabbitmq.destination.routing_key": routing_key,
        }
        span = self._tracer.start_span(f"send {exchange}", None, SpanKind.PRODUCER, attributes)
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, set_span_in_context(span))
        return carrier, span.end

    def close(self, timeout_s: float) -> None:
        # An unreachable collector must not delay the stop: the SDK's own timeouts exceed the shutdown grace.
        closing = threading.Thread(target=self._provider.shutdown, name="tracing-close", daemon=True)
        closing.start()
        closing.join(timeout_s)
