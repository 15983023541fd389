"""The contracts as documents: the JSON Schema of each message, and the AsyncAPI document of all channels.

Both are generated from the models and the topology that the worker itself uses, for the default namespace.
"""

from typing import Any, get_args

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonRef, JsonSchemaMode, JsonSchemaValue
from pydantic_core import core_schema
from typing_extensions import override

from schemas.command import COMMAND
from schemas.command import EXAMPLE as COMMAND_EXAMPLE
from schemas.headers import EXAMPLE as DEAD_LETTER_EXAMPLE
from schemas.headers import DeadLetterHeaders, TraceHeaders
from schemas.reply import EXAMPLES as REPLY_EXAMPLES
from schemas.reply import FailureCode, Reply, Status
from schemas.result import EXAMPLE as RESULT_EXAMPLE
from schemas.result import Result, ResultKind
from worker import __version__
from worker.amqp.topology import EXECUTE, RESULT, Topology
from worker.settings import Settings

_URN = "urn:onenet-execute-worker"
_AMQP_BINDING = {"bindingVersion": "0.3.0"}
_PUBLISHED = {"amqp": {"deliveryMode": 2, "mandatory": True, **_AMQP_BINDING}}


class _Generator(GenerateJsonSchema):
    """Generates schemas without additions of its own."""

    @override
    def field_title_should_be_set(self, schema: Any) -> bool:
        return False  # a title would only repeat the field's name

    @override
    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        return self.generate_inner(schema["schema"])  # defaults are for absent fields, and a reply has none

    @override
    def nullable_schema(self, schema: core_schema.NullableSchema) -> JsonSchemaValue:
        """Return one schema with two types: of `anyOf` most generators of code make a type that can be anything."""
        inner = self.generate_inner(schema["schema"])
        if "$ref" in inner:
            inner = self.get_schema_from_definitions(JsonRef(inner["$ref"])) or inner
        if not isinstance(inner.get("type"), str):
            return super().nullable_schema(schema)
        nullable = inner | {"type": [inner["type"], "null"]}
        if "not" in inner:  # what a text must not be says nothing of null
            nullable["not"] = inner["not"] | {"not": {"type": "null"}}
        return nullable

    @override
    def sort(self, value: JsonSchemaValue, parent_key: str | None = None) -> JsonSchemaValue:
        return value  # keep the order of the models, also in examples


def command_schema() -> dict[str, Any]:
    """Return the JSON Schema of a command."""
    return _schema("command", COMMAND, "validation")


def reply_schema() -> dict[str, Any]:
    """Return the JSON Schema of a reply."""
    return _schema("reply", TypeAdapter(Reply), "serialization")


def result_schema() -> dict[str, Any]:
    """Return the JSON Schema of a result."""
    return _schema("result", TypeAdapter(Result), "serialization")


def _schema(name: str, model: TypeAdapter[Any], mode: JsonSchemaMode) -> dict[str, Any]:
    found = model.json_schema(mode=mode, schema_generator=_Generator)
    return {"$schema": _Generator.schema_dialect, "$id": f"{_URN}:{name}", **found}


def asyncapi() -> dict[str, Any]:
    """Return the AsyncAPI document: channels and operations from the worker's point of view.

    Source: https://www.asyncapi.com/docs/reference/specification/v3.0.0
    """
    topology = Topology(Settings.model_fields["worker_namespace"].default, ())
    payloads, definitions = TypeAdapter[Any].json_schemas(
        [
            ("command", "validation", COMMAND),
            ("reply", "serialization", TypeAdapter(Reply)),
            ("result", "serialization", TypeAdapter(Result)),
            ("trace headers", "validation", TypeAdapter(TraceHeaders)),
            ("dead letter headers", "validation", TypeAdapter(DeadLetterHeaders)),
        ],
        ref_template="#/components/schemas/{model}",
        schema_generator=_Generator,
    )
    schemas = {name: schema for (name, _), schema in payloads.items()}
    _give_one_form_to_the_trigger(definitions["$defs"]["Command"]["properties"])
    return {
        "asyncapi": "3.0.0",
        "id": _URN,
        "info": {
            "title": "onenet-execute-worker",
            "version": __version__,
            "description": "Sends commands from RabbitMQ to devices on China Mobile's OneNET NB-IoT platform, and "
            f"reports the outcome of each. All names are in the default namespace, `{topology.namespace}`.",
            "license": {"name": "MIT"},
        },
        "channels": _channels(topology),
        "operations": _operations(),
        "components": {
            "messages": _messages(schemas),
            "schemas": definitions["$defs"],
            "correlationIds": {
                "correlation": {
                    "location": "$message.header#/correlation_id",
                    "description": "The AMQP property correlation_id; a reply and a result have that of their command, "
                    "or else the command_id.",
                }
            },
        },
    }


def _give_one_form_to_the_trigger(fields: dict[str, Any]) -> None:
    """Leave only the list of names: a field of two types is one of any type in the code that is generated for Java."""
    trigger = fields["trigger_msg"]
    [names] = [form for form in trigger["oneOf"] if form["type"] == "array"]
    description = f"{trigger['description']} This document has the names only; the JSON Schema has the sum too."
    fields["trigger_msg"] = names | {"description": description}


def _channels(topology: Topology) -> dict[str, Any]:
    exchanges = {exchange.name: exchange for exchange in topology.exchanges()}

    def channel(exchange: str, message: str, address: str | None, description: str, **more: Any) -> dict[str, Any]:
        name_and_kind = {"name": exchange, "type": exchanges[exchange].kind}
        binding = {"is": "routingKey", "exchange": name_and_kind | {"durable": True, "autoDelete": False}}
        return {
            "address": address,
            "description": description,
            "messages": {message: {"$ref": f"#/components/messages/{message}"}},
            **more,
            "bindings": {"amqp": binding | _AMQP_BINDING},
        }

    source = {
        "description": "The AMQP property app_id of the command: the name of the upstream system.",
        "default": "unknown",
        "examples": ["billing"],
    }
    return {
        "commands": channel(
            topology.commands_exchange,
            "command",
            EXECUTE,
            f"Publish here: persistent, mandatory, with publisher confirms. The queue is `{topology.execute_queue}`.",
        ),
        "replies": channel(
            topology.replies_exchange,
            "reply",
            f"{EXECUTE}.{{status}}.{{source}}",
            f"Bind a queue of your own; `{EXECUTE}.*.billing` receives all replies to `billing`. Replies without a "
            f"bound queue are kept in `{topology.unrouted_exchange}`.",
            parameters={
                "status": {"enum": list(get_args(Status)), "description": "The reply's status."},
                "source": source,
            },
        ),
        "results": channel(
            topology.replies_exchange,
            "result",
            f"{RESULT}.{{result}}.{{source}}",
            f"With WORKER_RESULTS=on. Bind a queue of your own; `{RESULT}.*.billing` receives all of `billing`. "
            f"Those without a bound queue are kept in `{topology.unrouted_exchange}`.",
            parameters={
                "result": {"enum": list(get_args(ResultKind)), "description": "What became of the command."},
                "source": source,
            },
        ),
        "requestedResults": channel(
            topology.replies_exchange,
            "result",
            None,
            "The routing key is the AMQP property reply_to of the command, as with its reply.",
        ),
        "requestedReplies": channel(
            topology.replies_exchange,
            "reply",
            None,
            "The routing key is the AMQP property reply_to of the command, never a queue on the default exchange: bind "
            "your queue to this exchange with it. A reply_to that is only the name of your queue is never answered.",
        ),
        "deadLetters": channel(
            topology.dead_letters_exchange,
            "deadLetter",
            f"{EXECUTE}.{{code}}",
            f"All are in queue `{topology.dead_letters_exchange}`. Messages that the broker itself dead-letters, as a "
            f"last resort, have routing key `{EXECUTE}` and none of the worker's headers.",
            parameters={"code": {"enum": list(get_args(FailureCode)), "description": "The error code of the reply."}},
        ),
    }


def _operations() -> dict[str, Any]:
    def operation(action: str, channel: str, message: str, summary: str, **more: Any) -> dict[str, Any]:
        return {"action": action, **_of(channel, message), "summary": summary, **more}

    return {
        "receiveCommand": operation(
            "receive",
            "commands",
            "command",
            "Receive a command; it is acknowledged after the broker has confirmed its reply and its dead letter.",
            bindings={"amqp": {"ack": True, **_AMQP_BINDING}},
            reply={
                "address": {
                    "location": "$message.header#/reply_to",
                    "description": "The AMQP property reply_to: a routing key that you have bound, not the name of a "
                    "queue. Without it the reply is sent to the channel replies.",
                },
                **_of("requestedReplies", "reply"),
            },
        ),
        "sendReply": operation(
            "send",
            "replies",
            "reply",
            "Send the outcome of a command; may be repeated, always with the same content.",
            bindings=_PUBLISHED,
        ),
        "sendResult": operation(
            "send",
            "results",
            "result",
            "Send what became of an accepted command; may be repeated, always with the same result.",
            bindings=_PUBLISHED,
        ),
        "sendDeadLetter": operation(
            "send", "deadLetters", "deadLetter", "Dead-letter a failed command.", bindings=_PUBLISHED
        ),
    }


def _of(channel: str, message: str) -> dict[str, Any]:
    reference = f"#/channels/{channel}"
    return {"channel": {"$ref": reference}, "messages": [{"$ref": f"{reference}/messages/{message}"}]}


def _messages(schemas: dict[str, JsonSchemaValue]) -> dict[str, Any]:
    correlation = {"correlationId": {"$ref": "#/components/correlationIds/correlation"}}
    return {
        "command": {
            "name": "execute.command",
            "title": "Execute command",
            "description": "AMQP properties that are honoured: message_id (may replace the command_id), "
            "correlation_id, reply_to, app_id, timestamp. All other properties are kept in retries and dead letters.",
            "contentType": "application/json",
            "headers": schemas["trace headers"],
            "payload": schemas["command"],
            **correlation,
            "examples": [{"name": "command", "payload": COMMAND_EXAMPLE}],
        },
        "reply": {
            "name": "execute.reply",
            "title": "Execute reply",
            "contentType": "application/json",
            "headers": schemas["trace headers"],
            "payload": schemas["reply"],
            **correlation,
            "bindings": {"amqp": {"messageType": "execute.reply", **_AMQP_BINDING}},
            "examples": [{"name": name, "payload": payload} for name, payload in REPLY_EXAMPLES.items()],
        },
        "result": {
            "name": "execute.result",
            "title": "Execute result",
            "contentType": "application/json",
            "payload": schemas["result"],
            **correlation,
            "bindings": {"amqp": {"messageType": "execute.result", **_AMQP_BINDING}},
            "examples": [{"name": "executed", "payload": RESULT_EXAMPLE}],
        },
        "deadLetter": {
            "name": "execute.dead-letter",
            "title": "Dead letter",
            "description": "The command as received, with its own AMQP properties. The payload is the body of the "
            "command, byte for byte: maybe invalid, maybe not JSON. So it has no schema.",
            "headers": schemas["dead letter headers"],
            **correlation,
            "examples": [
                {"name": "invalid", "headers": DEAD_LETTER_EXAMPLE, "payload": COMMAND_EXAMPLE | {"retry": 11}}
            ],
        },
    }
