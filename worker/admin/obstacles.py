"""What keeps commands from being sent at this moment, as far as it can be seen from outside of the workers."""

from collections.abc import Collection

from worker.admin.pauses import Operator, pause_reasons, this_person
from worker.admin.queues import count_queues_of
from worker.amqp.address import BrokerAddress
from worker.amqp.control_client import Answers
from worker.amqp.topology import Topology
from worker.core.pauses import Pauses
from worker.errors import BrokerUnavailable, WorkerError


def find_obstacles(
    broker: BrokerAddress, topology: Topology, products: Collection[str | None] | None = None
) -> list[str]:
    """Return one line for each reason why commands that are published now are not sent soon; none is known if empty.

    Args:
        broker: to connect to.
        topology: of the workers.
        products: those of the commands; None stands for the default product. Without any: all.

    Raises:
        BrokerUnavailable: no node can be reached, or the connection was lost.
    """
    try:
        answers = Operator(broker, topology, this_person()).state()
    except BrokerUnavailable:
        raise
    except WorkerError:  # no control stream, or no right to it: what remains can be said all the same
        answers = Answers(Pauses(), ())
    lines = pause_reasons(answers, products)
    if not answers.reports and not count_queues_of(broker, topology).consumers:
        lines.append(f"no worker consumes {topology.execute_queue}: start one with onenet-worker run")
    if any(report.is_blocked for report in answers.reports):
        lines.append("the broker takes no publications: a memory or disk alarm (run rabbitmq-diagnostics alarms)")
    if answers.reports and not any(report.is_store_available for report in answers.reports):
        lines.append("no worker can use the idempotency store: look for store_unavailable in their logs")
    return lines
