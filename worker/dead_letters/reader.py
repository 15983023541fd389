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

    def read(self, on_letter: Callable[[DeadLetter], object], *, cuts_bodies: bool = False, expected: int = 0) -> int:
        """Read all messages that are in the queue now, the oldest first; see ``QueueReader.read_messages``.

        Raises:
            WorkerError: the queue is missing, or reading it is not permitted.
            BrokerUnavailable: the connection was lost.
        """

        def on_message(message: QueueMessage) -> None:
            on_letter(DeadLetter(message.tag, message.routing_key, message.properties, message.body, self._zone))

        return self.read_messages(on_message, cuts_bodies=cuts_bodies, expected=expected)

    def replay(self, dead_letter: DeadLetter, now: datetime, reply_copy: str | None = None) -> None:
        """Publish a dead letter to the workers again, and remove it from the queue after the broker's confirm.

        Args:
            dead_letter: of this reader.
            now: the present time.
            reply_copy: where a copy of the reply goes, see ``OutcomeWatcher.address``; None: nowhere.

        Raises:
            WorkerError: the broker did not accept it.
        """
        publish(self._publishing, self._outgoing.replay(dead_letter.delivery(), dead_letter.replay(now), reply_copy))
        self.remove(dead_letter.tag)
