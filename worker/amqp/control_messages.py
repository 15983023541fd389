"""The messages by which operators and workers talk: orders in the control stream, and reports that answer them."""

from typing import Any

from pika import BasicProperties, DeliveryMode

from worker.amqp.messages import Publication
from worker.amqp.topology import ORDER, QUESTION, REPORT, Topology
from worker.core.pauses import Order, WorkerReport

FIRST, LAST = "first", "last"  # where reading the stream begins
NOTHING = -1  # the place of the last message of an empty stream
PREFETCH = 100  # a stream sends nothing to a consumer without one
_OFFSET = "x-stream-offset"


def order_publication(topology: Topology, order: Order) -> Publication:
    """Return the message of an order: what lasts goes into the stream, and the rest only to workers that run."""
    key = ORDER if order.is_lasting else QUESTION
    return Publication(topology.control_exchange, key, _properties("control.order"), order.model_dump_json().encode())


def report_publication(topology: Topology, order: Order, report: WorkerReport) -> Publication:
    """Return the message of a report; where nobody waits for it any more, the broker drops it."""
    properties = _properties("control.report")
    properties.delivery_mode = DeliveryMode.Transient.value
    return Publication(topology.control_exchange, report_key(order), properties, report.model_dump_json().encode())


def report_key(order: Order) -> str:
    """Return the routing key of the reports that answer an order."""
    return f"{REPORT}.{order.id}"


def offset_of(properties: BasicProperties) -> int:
    """Return the place of a message in the stream."""
    found = (properties.headers or {}).get(_OFFSET)
    return found if isinstance(found, int) else 0


def beginning_at(offset: str) -> dict[str, Any]:
    """Return the arguments of a consumer that reads the stream from a place on."""
    return {_OFFSET: offset}


def _properties(kind: str) -> BasicProperties:
    return BasicProperties(content_type="application/json", type=kind, delivery_mode=DeliveryMode.Persistent.value)
