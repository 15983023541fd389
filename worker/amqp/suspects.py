"""Remembers over which messages the broker closed a connection, so that the same bytes do not do that twice."""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable

from worker.amqp.messages import Delivery
from worker.errors import ClosedByBroker, WorkerError

MAX_SUSPECTS = 1_000
# Not about any message: the broker is told to stop (320), an exchange is gone (404).
# Source: https://www.rabbitmq.com/amqp-0-9-1-reference#constants
_INNOCENT_CODES = frozenset({320, 404})


class Suspects:
    """The messages that were being published for when the broker closed the connection or the channel."""

    def __init__(self) -> None:
        self._closures: OrderedDict[bytes, int] = OrderedDict()

    def note(self, error: WorkerError, deliveries: Iterable[Delivery]) -> None:
        """Remember what was being published for when a link was lost, if its end may be due to that."""
        if not isinstance(error, ClosedByBroker) or error.code in _INNOCENT_CODES:
            return
        for name in {_fingerprint(delivery) for delivery in deliveries}:
            self._closures[name] = self._closures.pop(name, 0) + 1
        while len(self._closures) > MAX_SUSPECTS:
            self._closures.popitem(last=False)

    def closures(self, delivery: Delivery) -> int:
        """Return how often the broker has closed a connection while publishing for this message."""
        return self._closures.get(_fingerprint(delivery), 0) if self._closures else 0


def _fingerprint(delivery: Delivery) -> bytes:
    """Return the same for the same message, however often it is delivered, and for its copies."""
    named = (delivery.message_id, delivery.properties.correlation_id, delivery.properties.app_id)
    return hashlib.blake2b(delivery.body, key=hashlib.blake2b(repr(named).encode()).digest(), digest_size=16).digest()
