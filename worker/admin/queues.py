"""How many messages wait in the queues of the workers, and who consumes the commands."""

from dataclasses import dataclass

from worker.amqp.address import BrokerAddress
from worker.amqp.blocking import Connection, connect_blocking, count_on
from worker.amqp.topology import Topology


@dataclass(frozen=True, slots=True)
class QueueCounts:
    """Numbers of ready messages; what a worker or another consumer holds unacknowledged does not count.

    Attributes:
        commands: wait to be sent; None: the queue is not there.
        consumers: of the commands, one or more of each running worker.
        delayed: commands that wait for their next attempt, or until their outcome can be looked up.
        results: accepted commands that wait for their results; None: results are off.
        dead_letters: failed commands.
        unrouted: replies for which nobody had bound a queue.
    """

    commands: int | None
    consumers: int
    delayed: int
    results: int | None
    dead_letters: int
    unrouted: int


def count_queues(connection: Connection, topology: Topology) -> QueueCounts:
    """Count what waits in the queues; one that is not there counts as empty, except that of the commands.

    Raises:
        BrokerUnavailable: the connection was lost, or this user may not look at a queue.
    """

    def ready(*queues: str) -> int:
        return sum((count_on(connection, queue) or (0, 0))[0] for queue in queues)

    found = count_on(connection, topology.execute_queue)
    results = [topology.results_queue, *map(topology.result_delay_queue, topology.result_delays_s)]
    return QueueCounts(
        commands=None if found is None else found[0],
        consumers=0 if found is None else found[1],
        delayed=ready(*map(topology.retry_queue, topology.delay_queues_s)),
        results=ready(*results) if topology.result_delays_s else None,
        dead_letters=ready(topology.dead_letters_exchange),
        unrouted=ready(topology.unrouted_exchange),
    )


def count_queues_of(broker: BrokerAddress, topology: Topology) -> QueueCounts:
    """Connect, and count what waits in the queues; see ``count_queues``.

    Raises:
        BrokerUnavailable: no node can be reached, or this user may not look at a queue.
    """
    connection, _ = connect_blocking(broker)
    try:
        return count_queues(connection, topology)
    finally:
        if connection.is_open:
            connection.close()
