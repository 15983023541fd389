"""Counts the messages over whose publications the broker closed a channel, so that they are published differently."""

import hashlib
from collections import OrderedDict

from worker.amqp.messages import Delivery
from worker.errors import ClosedByBroker, WorkerError

MAX_SUSPECTS = 1_000
# Not caused by a publication: the broker is shut down (320), an exchange does not exist (404).
# Source: https://www.rabbitmq.com/amqp-0-9-1-reference#constants
_OTHER_CODES = frozenset({320, 404})


def may_be_about_a_publication(error: WorkerError) -> bool:
    """Tell whether the broker may have closed a channel or a connection because of a publication."""
    return isinstance(error, ClosedByBroker) and error.code not in _OTHER_CODES


class Suspects:
    """The latest messages over whose publications the broker closed a channel; the oldest are forgotten."""

    def __init__(self) -> None:
        self._closures: OrderedDict[bytes, int] = OrderedDict()

    def note(self, delivery: Delivery) -> int:
        """Count one more closure; returns how many there have been over this message."""
        name = _fingerprint(delivery)
        closures = self._closures.pop(name, 0) + 1
        self._closures[name] = closures
        if len(self._closures) > MAX_SUSPECTS:
            self._closures.popitem(last=False)
        return closures

    def closures(self, delivery: Delivery) -> int:
        """Return how often the broker closed a channel over a publication for this message."""
        return self._closures.get(_fingerprint(delivery), 0) if self._closures else 0


def _fingerprint(delivery: Delivery) -> bytes:
    """Return the same bytes for each delivery of a message, and for each of its copies."""
    chosen = delivery.properties
    # With the user who sent it: another's message that is made to look like it must not change how it is published.
    named = (chosen.message_id, chosen.correlation_id, chosen.app_id, chosen.reply_to, delivery.envelope.user_id)
    return hashlib.blake2b(delivery.body, key=hashlib.blake2b(repr(named).encode()).digest(), digest_size=16).digest()
