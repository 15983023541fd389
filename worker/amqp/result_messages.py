"""The messages of accepted commands: those that wait for their result, and the result."""

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta

from pika import BasicProperties, DeliveryMode
from pydantic import ValidationError

from schemas.reply import Reply
from schemas.result import Result
from worker.amqp.messages import RESULT_TYPE, USER_ID, Delivery, Publication, address, trace_of
from worker.amqp.topology import RESULT, Topology
from worker.core.command import Command
from worker.core.results import Awaited, await_result

# So much later, and one of so many parts of the delay, is not worth several shorter delays instead of one.
_LATE_S, _LATE_PART = 1.0, 20
ACCEPTED_TYPE = "execute.accepted"  # the AMQP property type of a command on its way to its result


class ResultMessages:
    """Builds and reads the messages of accepted commands.

    A command that waits is a message in a delay queue: no process has to remember it. A wait that is longer than the
    longest delay is several delays, one after the other.

    Args:
        topology: where to publish; it has queues for results.
        delays_s: seconds before each look; the last repeats.
        ahead: tells by how much the clock of a product's platform is ahead of ours.
        is_isolated: the upstream systems do not trust each other, so that none may choose where a result goes.
    """

    def __init__(
        self,
        topology: Topology,
        delays_s: Sequence[int],
        ahead: Callable[[str | None], timedelta],
        *,
        is_isolated: bool = False,
    ) -> None:
        self._topology = topology
        self._delays_s = delays_s
        self._ahead = ahead
        self._is_isolated = is_isolated

    def first(self, delivery: Delivery, command: Command, reply: Reply) -> Publication:
        """Return the message that brings an accepted command back when its result is to be looked up."""
        ahead = self._ahead(command.product)
        awaited = await_result(command, delivery.envelope.app_id, reply, ahead, self._delays_s)
        return self.later(delivery, awaited, reply.completed_at)

    def later(self, delivery: Delivery, awaited: Awaited, now: datetime) -> Publication:
        """Return the message that brings a command back when it is due, or on its way there.

        Args:
            delivery: the command's, or that of its last wait.
            awaited: the command.
            now: on our clock, aware.
        """
        wait_s = max(0.0, (awaited.due_at - now).total_seconds())
        soon_enough = (each for each in self._delays_s if each - each / _LATE_PART <= wait_s + _LATE_S)
        delay_s = max(soon_enough, default=min(self._delays_s))
        properties = self._waiting(delivery)
        if wait_s + _LATE_S < delay_s:
            properties.expiration = str(round(wait_s * 1000))
        queue = self._topology.result_delay_queue(delay_s)
        return Publication(self._topology.retry_exchange, queue, properties, awaited.model_dump_json().encode())

    def again(self, delivery: Delivery, delay_s: int) -> Publication:
        """Return what brings a message back unchanged after one of the delays."""
        queue = self._topology.result_delay_queue(delay_s)
        return Publication(self._topology.retry_exchange, queue, self._waiting(delivery), delivery.body)

    def read(self, delivery: Delivery) -> Awaited | None:
        """Return the command that a message brings back, or that an operator moved; None: it is no such message."""
        if not (delivery.is_returned or delivery.is_moved):
            return None
        try:
            return Awaited.model_validate_json(delivery.body)
        except ValidationError:
            return None

    def result(self, delivery: Delivery, result: Result) -> Publication:
        """Address a result as the reply was addressed."""
        usual = f"{RESULT}.{result.result}"
        properties = self._properties(delivery, RESULT_TYPE)
        properties.headers = trace_of(delivery.envelope) or None
        properties.correlation_id = properties.correlation_id or result.command_id
        properties.reply_to = properties.app_id = None
        return Publication(
            self._topology.replies_exchange,
            address(delivery.envelope, usual, is_isolated=self._is_isolated),
            properties,
            result.model_dump_json().encode(),
            plain_key=f"{usual}.unknown",
        )

    def _waiting(self, delivery: Delivery) -> BasicProperties:
        properties, user_id = self._properties(delivery, ACCEPTED_TYPE), delivery.envelope.user_id
        properties.headers = trace_of(delivery.envelope) | ({} if user_id is None else {USER_ID: user_id}) or None
        return properties

    def _properties(self, delivery: Delivery, kind: str) -> BasicProperties:
        sent = delivery.properties
        return BasicProperties(
            content_type="application/json",
            type=kind,
            delivery_mode=DeliveryMode.Persistent,
            correlation_id=sent.correlation_id,
            reply_to=sent.reply_to,
            app_id=sent.app_id,
        )
