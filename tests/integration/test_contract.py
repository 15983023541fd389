"""Each rule of the contract from outside: the command, the request to the platform, the reply and the dead letter."""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl
from uuid import uuid4

import pika.data
import pytest

from schemas.reply import Reply
from tests.support.builders import a_command, in_hours
from tests.support.deployment import SOON_CERTAIN, Deployment
from tests.support.simulator import ACCESS_KEY, API_KEY, OFFLINE_IMEI, PRODUCT_ID, onenet
from tests.support.upstream import Message, Upstream
from tests.support.worker_process import WorkerProcess
from worker.amqp.field_table import RawFieldValue
from worker.dev.services.ports import free_port
from worker.simulator.faults import Fault
from worker.simulator.server import Simulator

pytestmark = [
    pytest.mark.broker_version,
    pytest.mark.xdist_group("contract"),  # all tests share one worker
]


@dataclass
class SharedWorker:
    """The worker that all tests of this module share."""

    deployment: Deployment
    worker: WorkerProcess

    @property
    def upstream(self) -> Upstream:
        return self.deployment.upstream

    @property
    def simulator(self) -> Simulator:
        return self.deployment.simulator

    def ask(self, body: bytes | dict[str, Any], **properties: Any) -> Message:
        """Publish a command and wait for its reply."""
        self.upstream.publish(body, **properties)
        return self.upstream.reply()


@pytest.fixture(scope="module")
def module_worker(broker_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedWorker]:
    folder = tmp_path_factory.mktemp("contract")
    products = folder / "products.json"
    products.write_text(
        json.dumps(
            {"heating": {"api_key": "no-such-key"}, "safe": {"product_id": PRODUCT_ID, "access_key": ACCESS_KEY}}
        )
    )
    with onenet() as simulator, Deployment.set_up(broker_url, folder, simulator) as deployment:
        settings = SOON_CERTAIN | {
            "WORKER_MAX_ATTEMPTS": "3",
            "ONENET_PRODUCTS_FILE": str(products),
        }
        with deployment.worker(**settings) as worker:
            yield SharedWorker(deployment, worker)


@pytest.fixture
def running(module_worker: SharedWorker) -> Iterator[SharedWorker]:
    yield module_worker
    module_worker.simulator.faults.replace([])
    module_worker.simulator.requests.clear()
    module_worker.upstream.channel.queue_purge(module_worker.deployment.topology.dead_letters_exchange)


def test_an_accepted_command_is_answered_with_its_uuid(running: SharedWorker) -> None:
    command = a_command(args="on", command_id="order-1")
    reply = running.ask(command, app_id="billing", correlation_id="call-7")

    [cached] = [kept for kept in running.simulator.platform.commands if kept.args == "on"]
    assert reply.json | {"completed_at": None} == {
        "command_id": "order-1",
        "status": "accepted",
        "uuid": cached.uuid,
        "imei": command["imei"],
        "error": None,
        "attempts": 1,
        "recovered": False,
        "valid_time_omitted": False,
        "completed_at": None,
    }
    assert abs(datetime.fromisoformat(reply.json["completed_at"]) - datetime.now(UTC)) < timedelta(minutes=1)
    assert reply.routing_key == "execute.accepted.billing"
    assert reply.properties.correlation_id == "call-7"
    assert reply.properties.type == "execute.reply"
    assert reply.properties.content_type == "application/json"
    assert reply.properties.delivery_mode == 2
    Reply.model_validate_json(reply.body)
    logged = running.worker.wait_for("command_accepted", command_id="order-1")
    assert logged["imei"] == command["imei"]
    assert logged["attempt"] == 1
    assert logged["uuid"] == cached.uuid


def test_a_request_has_the_form_that_the_platform_documents(running: SharedWorker) -> None:
    running.ask(
        a_command(
            imei="865820030000002",
            obj_id=0,
            obj_inst_id=65535,
            res_id=5850,
            valid_time="2098-12-31T23:00:00Z",
            expired_time="2099-01-01T08:00:00",
            retry=0,
            timeout=40,
            trigger_msg=["UPDATE", "NOTIFY"],
            args='开 "on" é',
        )
    )
    [request] = running.simulator.requests
    assert request["query"] == {
        "imei": "865820030000002",
        "obj_id": "0",
        "obj_inst_id": "65535",
        "res_id": "5850",
        "valid_time": "2099-01-01T07:00:00",
        "expired_time": "2099-01-01T08:00:00",
        "retry": "0",
        "timeout": "40",
        "trigger_msg": "6",
    }
    assert json.loads(request["body"]) == {"args": '开 "on" é'}
    assert request["headers"]["api-key"] == API_KEY
    assert request["headers"]["content-type"] == "application/json"


def test_absent_optional_fields_are_left_out_of_the_request(running: SharedWorker) -> None:
    """The platform uses its own defaults; without args the body is an empty object."""
    running.ask(a_command())
    [request] = running.simulator.requests
    assert set(request["query"]) == {"imei", "obj_id", "obj_inst_id", "res_id", "expired_time"}
    assert request["body"] == "{}"
    assert request["headers"]["content-type"] == "application/json"


def test_a_past_valid_time_is_left_out_and_the_reply_says_so(running: SharedWorker) -> None:
    reply = running.ask(a_command(valid_time=in_hours(-1)))
    assert reply.json["status"] == "accepted"
    assert reply.json["valid_time_omitted"] is True
    assert "valid_time" not in running.simulator.requests[0]["query"]


def test_reply_to_is_the_routing_key_of_the_reply(running: SharedWorker) -> None:
    command = a_command()
    reply = running.ask(command, reply_to="my.own.key", app_id="billing")
    assert reply.routing_key == "my.own.key"
    assert reply.properties.correlation_id == command["command_id"]


def test_without_app_id_the_routing_key_of_the_reply_ends_in_unknown(running: SharedWorker) -> None:
    assert running.ask(a_command()).routing_key == "execute.accepted.unknown"


def test_an_app_id_too_long_for_a_routing_key_is_truncated(running: SharedWorker) -> None:
    """A routing key has at most 255 bytes; a long app_id must not fail the command."""
    assert running.ask(a_command(), app_id="é" * 127).routing_key.startswith("execute.accepted.éé")


def test_the_property_message_id_serves_as_command_id(running: SharedWorker) -> None:
    assert running.ask(a_command(command_id=None), message_id="from-the-property").json["command_id"] == (
        "from-the-property"
    )


def test_the_reply_carries_the_trace_context_of_the_command(running: SharedWorker) -> None:
    trace = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "tracestate": "a=b"}
    assert running.ask(a_command(), headers={**trace, "other": "stays"}).headers == trace


def test_a_command_that_onenet_refuses_is_rejected_with_its_errno(running: SharedWorker) -> None:
    reply = running.ask(a_command(imei=OFFLINE_IMEI), app_id="billing")
    assert reply.json["status"] == "rejected"
    assert reply.json["error"] == {
        "code": "onenet_rejected",
        "message": "device not online",
        "errno": 2001,
        "details": None,
    }
    assert reply.routing_key == "execute.rejected.billing"
    assert running.upstream.count(running.deployment.topology.dead_letters_exchange) == 0


@pytest.mark.parametrize("kind", ["not_found", "redirect"])
def test_a_refusal_without_onenets_json_is_http_rejected(running: SharedWorker, kind: Any) -> None:
    """A redirect is never followed: the target is not the configured platform."""
    running.simulator.faults.replace([Fault(kind=kind)])
    reply = running.ask(a_command())
    assert (reply.json["status"], reply.json["error"]["code"]) == ("rejected", "http_rejected")
    assert len(running.simulator.requests) == 1


@pytest.mark.parametrize(
    "fault",
    [
        Fault(kind="error_500"),
        Fault(kind="error_500_after_caching"),
        Fault(kind="error_503"),
        Fault(kind="errno", errno=7, error="service internal error"),
        Fault(kind="errno_after_caching", errno=5117, error="rpc error"),
        Fault(kind="errno", errno=5108, error="rpc response error"),
        Fault(kind="no_uuid"),
        Fault(kind="garbage"),
        Fault(kind="garbage_after_caching"),
        Fault(kind="drop"),
        Fault(kind="drop_after_caching"),
        Fault(kind="hang", seconds=30),
        Fault(kind="slow_drip", seconds=0.5),
        Fault(kind="late_caching", seconds=5),
    ],
    ids=lambda fault: f"{fault.kind}-{fault.error}" if "errno" in fault.kind else fault.kind,
)
def test_after_a_lost_answer_the_history_is_read_and_the_command_is_cached_once(
    running: SharedWorker, fault: Fault
) -> None:
    """The platform may have cached the command; it is sent again only if the history does not contain it."""
    running.simulator.faults.replace([fault.model_copy(update={"count": 1})])
    command = a_command(args=str(uuid4()))
    reply = running.ask(command).json
    [cached] = [kept for kept in running.simulator.platform.commands if kept.args == command["args"]]
    assert (reply["status"], reply["uuid"]) == ("accepted", cached.uuid)
    assert reply["recovered"] == (len(running.simulator.requests) == 1)
    assert reply["attempts"] == len(running.simulator.requests)
    running.worker.wait_for("command_in_doubt", command_id=command["command_id"])
    if reply["recovered"]:
        running.worker.wait_for("command_recovered", command_id=command["command_id"], uuid=cached.uuid)


def test_a_command_that_the_history_cannot_decide_is_outcome_unknown_and_not_sent_again(running: SharedWorker) -> None:
    running.simulator.faults.replace([Fault(kind="drop_after_caching"), Fault(kind="error_500", endpoint="history")])
    reply = running.ask(a_command())
    assert (reply.json["status"], reply.json["error"]["code"]) == ("failed", "outcome_unknown")
    assert len(running.simulator.requests) == 1
    assert running.upstream.dead_letter().headers["x-onenet-reason"] == "outcome_unknown"


def test_a_command_that_expires_while_in_doubt_is_still_looked_up_in_the_history(running: SharedWorker) -> None:
    running.simulator.faults.replace([Fault(kind="drop_after_caching", count=1)])
    soon = (datetime.now(UTC) + timedelta(seconds=2)).strftime("%Y-%m-%dT%H:%M:%SZ")
    assert running.ask(a_command(expired_time=soon)).json["status"] == "accepted"


def test_a_command_in_doubt_that_was_not_cached_expires_without_a_second_request(running: SharedWorker) -> None:
    running.simulator.faults.replace([Fault(kind="drop", count=1)])
    soon = (datetime.now(UTC) + timedelta(seconds=2)).strftime("%Y-%m-%dT%H:%M:%SZ")
    assert running.ask(a_command(expired_time=soon)).json["error"]["code"] == "expired"
    assert len(running.simulator.requests) == 1
    running.upstream.dead_letter()


@pytest.mark.parametrize("kind", ["drop", "drop_after_caching"])
@pytest.mark.parametrize("lost", ["first", "second"])
def test_lookalike_commands_get_a_uuid_each_when_an_answer_is_lost(running: SharedWorker, kind: Any, lost: str) -> None:
    """They differ only in the id; neither gets the uuid of the other, whichever answer was lost."""
    lookalikes = [
        a_command(command_id=f"{name}-{uuid4()}", args=f"lookalikes of {kind} {lost}") for name in ("first", "second")
    ]
    for lookalike in lookalikes:
        struck = [Fault(kind=kind, count=1)] if lookalike["command_id"].startswith(lost) else []
        running.simulator.faults.replace(struck)
        running.upstream.publish(lookalike)
        if struck:
            running.worker.wait_for("command_in_doubt", command_id=lookalike["command_id"])
        else:
            running.worker.wait_for("command_accepted", command_id=lookalike["command_id"])
    replies = {reply["command_id"]: reply["uuid"] for reply in running.upstream.replies(2)}
    cached = {kept.uuid for kept in running.simulator.platform.commands if kept.args == lookalikes[0]["args"]}
    assert replies.keys() == {lookalike["command_id"] for lookalike in lookalikes}
    assert set(replies.values()) == cached
    assert len(cached) == 2


def test_a_throttled_command_is_retried_after_retry_after(running: SharedWorker) -> None:
    """Retry-After asks for 2 s, so the delay queue of 1 s is skipped."""
    running.simulator.faults.replace([Fault(kind="too_many_requests", seconds=2, count=1)])
    command = a_command()
    reply = running.ask(command)
    assert (reply.json["status"], reply.json["attempts"]) == ("accepted", 2)
    scheduled = running.worker.wait_for("command_retry_scheduled", command_id=command["command_id"])
    assert (scheduled["attempt"], scheduled["next_attempt"], scheduled["delay_s"]) == (1, 2, 2)


def test_a_command_whose_attempts_are_used_up_is_retries_exhausted(running: SharedWorker) -> None:
    running.simulator.faults.replace([Fault(kind="too_many_requests", seconds=0)])
    reply = running.ask(a_command())
    assert (reply.json["status"], reply.json["error"]["code"]) == ("failed", "retries_exhausted")
    assert reply.json["attempts"] == 3
    letter = running.upstream.dead_letter()
    assert letter.headers["x-onenet-reason"] == "retries_exhausted"
    assert letter.headers["x-onenet-attempt"] == 3
    assert not [name for name in letter.headers if name.startswith(("x-death", "x-first-death", "x-last-death"))]


def test_a_command_is_not_retried_after_its_expired_time(running: SharedWorker) -> None:
    running.simulator.faults.replace([Fault(kind="too_many_requests", seconds=0)])
    soon = (datetime.now(UTC) + timedelta(seconds=1)).strftime("%Y-%m-%dT%H:%M:%SZ")
    reply = running.ask(a_command(expired_time=soon))
    assert reply.json["error"]["code"] == "expired"
    assert running.upstream.dead_letter().headers["x-onenet-reason"] == "expired"


def test_a_command_that_arrives_after_its_expired_time_is_not_sent(running: SharedWorker) -> None:
    """The error shows how the time was read: mostly it was meant in another zone."""
    reply = running.ask(a_command(expired_time="2026-08-05T08:00:00.5"))
    error = reply.json["error"]
    assert error["code"] == "expired"
    read_as = "2026-08-05T08:00:00 was read as 2026-08-05 08:00:00 +08:00 (ONENET_TIMEZONE Asia/Shanghai)"
    assert error["message"].startswith(f"expired_time has passed: {read_as}; it was ")
    assert error["message"].endswith(" +08:00 by the platform's clock")
    assert error["details"] == [{"field": "expired_time", "message": error["message"].removeprefix("expired_time ")}]
    assert not running.simulator.requests
    running.upstream.dead_letter()


def test_an_invalid_command_is_dead_lettered_unchanged_with_the_reason(running: SharedWorker) -> None:
    body = json.dumps(a_command(command_id="bad-1", retry="three"), indent=3).encode()
    timestamp = 1_700_000_000
    reply = running.ask(
        body,
        app_id="billing",
        content_type="application/json",
        content_encoding="identity",
        correlation_id="call-8",
        message_id="bad-1",
        priority=3,
        timestamp=timestamp,
        type="execute",
        headers={"tenant": "a", "nested": {"list": [1, "two"]}},
    )
    assert reply.json["status"] == "failed"
    assert reply.json["error"] == {
        "code": "invalid_command",
        "message": "retry: must be a whole number from 0 to 10, not a string",
        "errno": None,
        "details": [{"field": "retry", "message": "must be a whole number from 0 to 10, not a string"}],
    }
    letter = running.upstream.dead_letter()
    assert letter.body == body
    assert letter.routing_key == "execute.invalid_command"
    kept = letter.properties
    assert (kept.app_id, kept.content_type, kept.content_encoding) == ("billing", "application/json", "identity")
    assert (kept.correlation_id, kept.message_id, kept.priority) == ("call-8", "bad-1", 3)
    assert (kept.timestamp, kept.type, kept.delivery_mode) == (timestamp, "execute", 2)
    headers = letter.headers
    assert headers["tenant"] == "a"
    assert headers["nested"] == {"list": [1, "two"]}
    assert headers["x-onenet-reason"] == "invalid_command"
    assert headers["x-onenet-error"] == "retry: must be a whole number from 0 to 10, not a string"
    assert json.loads(headers["x-onenet-details"]) == reply.json["error"]["details"]
    assert headers["x-onenet-attempt"] == 1
    assert datetime.fromisoformat(headers["x-onenet-failed-at"]).utcoffset() == timedelta(0)
    assert headers["x-onenet-worker"]
    assert not running.simulator.requests


@pytest.mark.parametrize(
    ("body", "code", "field"),
    [
        (b"", "invalid_message", ""),
        (b"\xff\xfe", "invalid_message", ""),
        (b'["not", "an", "object"]', "invalid_message", ""),
        (b'{"imei": ', "invalid_message", ""),
        (b'{"retry": 1, "retry": 2}', "invalid_message", "retry"),
        (b'{"retry": NaN}', "invalid_message", "retry"),
        (b" " * 65_537, "invalid_message", ""),
        (b"{}", "invalid_command", "imei"),
        (json.dumps(a_command(command_id="the-id", colour="red")).encode(), "invalid_command", "colour"),
        (json.dumps(a_command(command_id="the-id", obj_id=True)).encode(), "invalid_command", "obj_id"),
    ],
    ids=["empty", "no-utf8", "array", "cut-off", "twice", "nan", "too-large", "missing", "unknown", "bool"],
)
def test_an_unreadable_message_gets_a_reply_and_is_dead_lettered(
    running: SharedWorker, body: bytes, code: str, field: str
) -> None:
    reply = running.ask(body, message_id="the-id")
    assert reply.json["command_id"] == "the-id"
    assert reply.json["error"]["code"] == code
    assert field in [detail["field"] for detail in reply.json["error"]["details"]]
    letter = running.upstream.dead_letter()
    assert letter.body == body
    assert letter.headers["x-onenet-reason"] == code


def test_the_reply_to_a_message_without_an_id_has_no_command_id(running: SharedWorker) -> None:
    reply = running.ask(b"nothing")
    assert reply.json["command_id"] is None
    assert reply.properties.correlation_id is None
    running.upstream.dead_letter()


def test_a_command_for_an_unknown_product_is_not_sent_with_another_products_key(running: SharedWorker) -> None:
    reply = running.ask(a_command(product="cooling"))
    assert reply.json["error"]["code"] == "unknown_product"
    assert reply.json["error"]["details"][0]["field"] == "product"
    assert not running.simulator.requests
    running.upstream.dead_letter()


def test_commands_of_a_product_are_sent_with_its_own_key(running: SharedWorker) -> None:
    reply = running.ask(a_command(product="heating"))
    assert running.simulator.requests[0]["headers"]["api-key"] == "no-such-key"
    assert reply.json["error"]["errno"] == 1  # auth failed


def test_a_token_signed_with_an_access_key_is_accepted_by_the_platform(running: SharedWorker) -> None:
    reply = running.ask(a_command(product="safe"))
    assert reply.json["status"] == "accepted"
    [request] = running.simulator.requests
    assert "api-key" not in request["headers"]
    token = dict(parse_qsl(request["headers"]["authorization"]))
    assert (token["version"], token["res"], token["method"]) == ("2018-10-31", "products/123123", "sha256")


def test_a_repeated_command_id_gets_the_recorded_reply_and_no_request(running: SharedWorker) -> None:
    command = a_command()
    first = running.ask(command, app_id="a")
    again = running.ask(
        json.dumps(command, indent=2).encode(), app_id="a", reply_to="elsewhere", correlation_id="call-9"
    )
    assert again.body == first.body
    assert (again.routing_key, again.properties.correlation_id) == ("elsewhere", "call-9")
    assert len(running.simulator.requests) == 1
    running.worker.wait_for("duplicate_suppressed", command_id=command["command_id"])


def test_a_repeated_command_id_with_other_content_is_a_conflict(running: SharedWorker) -> None:
    command = a_command(args="open")
    running.ask(command)
    reply = running.ask(command | {"args": "shut"})
    assert (reply.json["status"], reply.json["error"]["code"]) == ("failed", "command_id_conflict")
    assert len(running.simulator.requests) == 1
    assert running.upstream.dead_letter().headers["x-onenet-reason"] == "command_id_conflict"
    assert running.ask(command).json["status"] == "accepted"  # the record of the first command is unchanged


def test_the_workers_headers_are_ignored_on_a_message_from_upstream(running: SharedWorker) -> None:
    reply = running.ask(
        a_command(command_id="forged", retry=99), headers={"x-onenet-attempt": 9, "x-onenet-forged": "yes"}
    )
    assert reply.json["attempts"] == 1
    letter = running.upstream.dead_letter()
    assert letter.headers["x-onenet-attempt"] == 1
    assert "x-onenet-forged" not in letter.headers


def test_other_properties_and_headers_are_kept_through_retries(running: SharedWorker) -> None:
    """Republished as properties, a foreign user_id closes the channel and an expiration shortens the delay."""
    running.simulator.faults.replace([Fault(kind="too_many_requests", seconds=0)])
    command = a_command()
    running.ask(
        command,
        user_id="guest",
        expiration="3600000",
        app_id="billing",
        correlation_id="call-10",
        headers={"tenant": "a", "x-death": "not the broker's", "x-delivery-count": 7},
    )
    letter = running.upstream.dead_letter()
    kept = letter.properties
    assert (kept.app_id, kept.correlation_id, kept.user_id, kept.expiration) == ("billing", "call-10", None, None)
    assert letter.headers["tenant"] == "a"
    assert letter.headers["x-onenet-user-id"] == "guest"
    assert letter.headers["x-onenet-expiration"] == "3600000"
    assert "x-death" not in letter.headers


def nested(levels: int) -> bytes:
    """Return ``levels`` nested arrays, encoded as in a frame."""
    value = b"V"
    for _ in range(levels):
        value = b"A" + len(value).to_bytes(4) + value
    return value


def encoded(value: Any) -> bytes:
    pieces: list[bytes] = []
    pika.data.encode_value(pieces, value)
    return b"".join(pieces)


@pytest.mark.parametrize(
    "value",
    [RawFieldValue(b"T" + (1_790_000_000_000).to_bytes(8)), RawFieldValue(b"d" + struct.pack(">d", 3.75)),
     [{"a": [None]}], -1, b"\xff"],
    ids=["milliseconds", "double", "nested", "negative", "bytes"],
)  # fmt: skip
def test_headers_of_unusual_types_are_kept_and_cost_no_connection(running: SharedWorker, value: object) -> None:
    """pika fails on a timestamp in milliseconds, which would end the connection at each redelivery."""
    odd = {"odd": value, b"\xff": "a name that is no text"}
    assert running.ask(a_command(), headers=odd, app_id=b"\xff", correlation_id=b"\xfe").json["status"] == "accepted"
    running.ask(a_command(retry=11), headers=odd)
    kept = running.upstream.dead_letter().headers
    assert encoded(kept["odd"]) == encoded(value)
    assert not [event for event in running.worker.events if event["event"] == "broker_connection_lost"]


def test_a_header_with_thousands_of_levels_is_left_out_and_costs_no_connection(running: SharedWorker) -> None:
    """The broker would need seconds to read it again, and confirm nothing else meanwhile."""
    sent = {"deep": {"in": [RawFieldValue(nested(2_000))]}, "odd": [{"a": [None]}]}
    assert running.ask(a_command(), headers=sent).json["status"] == "accepted"
    running.ask(a_command(retry=11), headers=sent)
    kept = running.upstream.dead_letter().headers
    assert "deep" not in kept
    assert kept["odd"] == sent["odd"]
    assert kept["x-onenet-headers-dropped"] == "those of the message's own headers that are nested too deeply"
    assert not [event for event in running.worker.events if event["event"] == "broker_connection_lost"]


def test_a_trace_context_too_large_for_a_frame_is_dropped_from_the_reply(running: SharedWorker) -> None:
    reply = running.ask(a_command(command_id="x" * 128), headers={"traceparent": "t" * 130_000, "tracestate": "a=b"})
    assert reply.headers == {"tracestate": "a=b"}


def test_a_cc_header_does_not_duplicate_retries(running: SharedWorker) -> None:
    """The broker routes each publication by its CC header too."""
    topology = running.deployment.topology
    running.simulator.faults.replace([Fault(kind="too_many_requests", seconds=0)])
    running.ask(a_command(), headers={"CC": [topology.retry_queue(1), topology.retry_queue(2)]})
    letter = running.upstream.dead_letter()
    assert len(running.simulator.requests) == 3
    assert letter.headers["x-onenet-cc"] == [topology.retry_queue(1), topology.retry_queue(2)]
    assert "CC" not in letter.headers


def test_an_error_message_of_200_kb_is_truncated_in_the_reply(running: SharedWorker) -> None:
    running.simulator.faults.replace([Fault(kind="errno", errno=5106, error="错" * 70_000)])
    reply = running.ask(a_command())
    assert reply.json["error"]["errno"] == 5106
    assert len(reply.body) < 4096


def test_headers_too_large_for_a_frame_are_dropped_from_the_dead_letter(running: SharedWorker) -> None:
    """Together with the worker's headers they exceed the frame, and the broker would close the connection."""
    running.ask(b"nothing", headers={"large": "x" * 125_000})
    letter = running.upstream.dead_letter()
    assert "large" not in letter.headers
    assert letter.headers["x-onenet-reason"] == "invalid_message"
    assert not [event for event in running.worker.events if event["event"] == "broker_connection_lost"]


def test_a_reply_without_a_bound_queue_is_kept_as_unrouted(running: SharedWorker) -> None:
    upstream = running.upstream
    upstream.channel.queue_unbind(
        f"{upstream.topology.namespace}.test-replies", upstream.topology.replies_exchange, "#"
    )
    upstream.publish(a_command(command_id="unrouted"))
    kept = upstream.get(upstream.topology.unrouted_exchange)
    upstream.bind_replies()
    assert kept.json["command_id"] == "unrouted"
    assert kept.json["status"] == "accepted"


def test_a_command_is_retried_after_a_refused_connection(deployment: Deployment) -> None:
    """Nothing was sent, so a retry is safe."""
    port = free_port()
    with deployment.worker(ONENET_URL=f"http://127.0.0.1:{port}", WORKER_MAX_ATTEMPTS="2") as worker:
        command = a_command()
        deployment.upstream.publish(command)
        worker.wait_for("command_retry_scheduled", command_id=command["command_id"])
        with onenet(port=port) as back:
            assert deployment.upstream.reply().json["status"] == "accepted"
            assert len(back.platform.commands) == 1


def test_in_doubt_resend_sends_a_command_a_second_time(deployment: Deployment) -> None:
    deployment.simulator.faults.replace([Fault(kind="drop_after_caching", count=1)])
    with deployment.worker(WORKER_IN_DOUBT="resend"):
        deployment.upstream.publish(a_command(args="twice", command_id="twice"))
        assert deployment.upstream.reply().json["status"] == "accepted"
        assert deployment.cached("twice") == 2


def test_no_secret_reaches_a_log_or_a_process_listing(deployment: Deployment, tmp_path: Path) -> None:
    secret = tmp_path / "key"
    secret.write_text("the-master-key\n")
    deployment.simulator.faults.replace([Fault(kind="error_500", count=1)])
    with deployment.worker(
        **SOON_CERTAIN, ONENET_API_KEY="", ONENET_API_KEY_FILE=str(secret), LOG_LEVEL="debug"
    ) as worker:
        for _ in range(2):
            deployment.upstream.publish(a_command())
            deployment.upstream.reply()
        listing = Path(f"/proc/{worker.process.pid}/cmdline").read_text()
    output = worker.process.output.read_text()
    assert len(deployment.simulator.platform.commands) == 2  # so the key in the file was used
    assert "the-master-key" not in output + listing
    assert "guest" not in output + listing  # the broker's password
