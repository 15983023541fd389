"""Reads, replays and discards dead letters. Reading loses none and keeps their order: see ``amqp/queue_reader``."""

from collections.abc import Callable
from datetime import datetime
from zoneinfo import ZoneInfo

from worker.amqp.address import BrokerAddress
from worker.amqp.blocking import publish
from worker.amqp.messages import MessageBuilder
from worker.amqp.queue_reader import QueueMessage, QueueReader
from worker.amqp.topology import Topology
from worker.dead_letters.letter import DeadLetter


class DeadLetterReader(QueueReader):
    """Holds all dead letters while it is open; those not discarded or replayed then return to their places.

    Args:
        broker: where to connect.
        topology: names the queue.
        zone: time zone of the commands' times without an offset.

    Raises:
        WorkerError: another reader is open.
        BrokerUnavailable: no broker answers, or the connection was lost.
    """

    def __init__(self, broker: BrokerAddress, topology: Topology, zone: ZoneInfo) -> None:
        super().__init__(broker, topology.dead_letters_exchange, "dead letters")  # the queue is named like the exchange
        self._outgoing = MessageBuilder(topology, "command line")
        self._zone = zone

    def fetch_all(self) -> list[DeadLetter]:
        """Return all messages that are in the queue now, the oldest first; see ``read``."""
        found: list[DeadLetter] = []
        self.read(found.append)
        return found

    def read(self, on_letter: Callable[[DeadLetter], object], *, cuts_bodies: bool = False) -> int:
        """Read all dead letters that are in the queue now, the oldest first; returns their number.

        Args:
            on_letter: called with each. What it does not keep takes no memory any more.
            cuts_bodies: whether only the beginning of a body is needed that is too large for a command.

        Raises:
            WorkerError: the queue is missing, or reading it is not permitted.
            BrokerUnavailable: the connection was lost.
        """

        def on_message(message: QueueMessage) -> None:
            on_letter(DeadLetter(message.tag, message.routing_key, message.properties, message.body, self._zone))

        return self.read_messages(on_message, cuts_bodies=cuts_bodies)

    def replay(self, dead_letter: DeadLetter, now: datetime) -> None:
        """Publish a dead letter to the workers again, and remove it from the queue after the broker's confirm.

        Raises:
            WorkerError: the broker did not accept it.
        """
        publish(self._publishing, self._outgoing.replay(dead_letter.delivery(), dead_letter.replay(now)))
        self.discard(dead_letter)

    def discard(self, dead_letter: DeadLetter) -> None:
        """Delete a dead letter.

        Raises:
            BrokerUnavailable: the connection was lost.
        """
        self.remove(dead_letter.tag)
