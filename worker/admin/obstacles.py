"""What keeps commands from being sent at this moment, as far as it can be seen from outside of the workers."""

from collections.abc import Collection

from worker.amqp.address import BrokerAddress
from worker.amqp.blocking import count_messages_and_consumers
from worker.amqp.topology import Topology


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
    del products  # not known yet which of them are paused
    _, consumers = count_messages_and_consumers(broker, topology.execute_queue)
    return [] if consumers else [f"no worker consumes {topology.execute_queue}: start one with onenet-worker run"]
