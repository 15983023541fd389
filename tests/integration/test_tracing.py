"""Traces: the spans of a command, and the trace headers of replies, retries and dead letters."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.support.builders import a_command
from tests.support.deployment import Deployment
from tests.support.simulator import OFFLINE_IMEI, onenet
from worker.dev.services.ports import free_port
from worker.simulator.faults import Fault

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"
TRACED = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=value"}


@contextmanager
def collector() -> Iterator[tuple[str, list[Span]]]:
    """Run a trace collector; yields its URL and the spans it received."""
    spans: list[Span] = []

    class Processor(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path == "/v1/traces":
                export = ExportTraceServiceRequest.FromString(body)
                spans.extend(
                    span for resource in export.resource_spans for scope in resource.scope_spans for span in scope.spans
                )
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Processor)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", spans
    finally:
        server.shutdown()
        server.server_close()


def test_a_trace_continues_through_consume_request_and_publish_to_the_reply(deployment: Deployment) -> None:
    with collector() as (url, spans), deployment.worker(OTEL_EXPORTER_OTLP_ENDPOINT=url) as worker:
        deployment.upstream.publish(a_command(command_id="a"), headers=TRACED, app_id="billing")
        reply = deployment.upstream.reply()
        worker.process.stop()  # exports the remaining spans
        assert {span.trace_id.hex() for span in spans} == {TRACE}
        queue, exchange = deployment.topology.execute_queue, deployment.topology.replies_exchange
        found = {span.name: span for span in spans}
        assert found.keys() == {f"process {queue}", "POST", f"send {exchange}"}
        consume, request, publish = found[f"process {queue}"], found["POST"], found[f"send {exchange}"]
        assert consume.parent_span_id.hex() == PARENT
        assert request.parent_span_id == publish.parent_span_id == consume.span_id
        assert (consume.kind, request.kind, publish.kind) == (
            Span.SPAN_KIND_CONSUMER,
            Span.SPAN_KIND_CLIENT,
            Span.SPAN_KIND_PRODUCER,
        )
        assert reply.headers == {
            "traceparent": f"00-{TRACE}-{publish.span_id.hex()}-01",
            "tracestate": "vendor=value",
        }
        values = {attribute.key: attribute.value for span in spans for attribute in span.attributes}
        assert values["messaging.message.id"].string_value == "a"
        assert values["http.response.status_code"].int_value == 200
        assert values["url.full"].string_value == f"{deployment.simulator.url}/nbiot/execute/offline"
        assert values["messaging.rabbitmq.destination.routing_key"].string_value == "execute.accepted.billing"


def test_retries_and_dead_letters_keep_the_trace_headers_unchanged(tmp_path: Path, broker_url: str) -> None:
    busy = Fault(kind="too_many_requests", seconds=0)
    with (
        collector() as (url, spans),
        onenet(busy) as simulator,
        Deployment.set_up(broker_url, tmp_path, simulator) as deployment,
        deployment.worker(OTEL_EXPORTER_OTLP_ENDPOINT=url, WORKER_MAX_ATTEMPTS="2") as worker,
    ):
        deployment.upstream.publish(a_command(), headers=TRACED)
        letter = deployment.upstream.dead_letter()
        assert {name: letter.headers[name] for name in TRACED} == TRACED
        worker.process.stop()
        consumed = [span for span in spans if span.name == f"process {deployment.topology.execute_queue}"]
        assert [span.parent_span_id.hex() for span in consumed] == [PARENT, PARENT]


def test_a_command_without_a_trace_starts_one(deployment: Deployment) -> None:
    with collector() as (url, spans), deployment.worker(OTEL_EXPORTER_OTLP_ENDPOINT=url) as worker:
        deployment.upstream.publish(a_command(imei=OFFLINE_IMEI), headers={"traceparent": "nonsense"})
        reply = deployment.upstream.reply()
        worker.process.stop()
        consume = next(span for span in spans if span.name.startswith("process"))
        assert not consume.parent_span_id
        assert consume.trace_id.hex() in reply.headers["traceparent"]


def test_an_unreachable_collector_delays_no_command_and_no_shutdown(deployment: Deployment) -> None:
    with deployment.worker(OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{free_port()}") as worker:
        deployment.upstream.publish(a_command())
        assert deployment.upstream.reply().json["status"] == "accepted"
        worker.process.stop()
        assert worker.wait_for("worker_stopped")["exit_code"] == 0
