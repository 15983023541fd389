"""Remembers over which publications the broker closed a channel or hung, so that they are published differently."""

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable

from worker.amqp.messages import Delivery
from worker.errors import ClosedByBroker, WorkerError

MAX_SUSPECTS = 1_000
# Replies that would be routed like one in whose routing the broker hung are not routed for so long: twice as long each
# time, because each time holds up everything that is published over the same channel.
HUNG_BASE_S, HUNG_CAP_S = 60.0, 3600.0
# Not caused by a publication: the broker is shut down (320), an exchange does not exist (404).
# Source: https://www.rabbitmq.com/amqp-0-9-1-reference#constants
_OTHER_CODES = frozenset({320, 404})


def may_be_about_a_publication(error: WorkerError) -> bool:
    """Tell whether the broker may have closed a channel or a connection because of a publication."""
    return isinstance(error, ClosedByBroker) and error.code not in _OTHER_CODES


class Suspects:
    """The latest messages over whose publications the broker closed a channel; the oldest are forgotten.

    And the senders or routes of the replies in whose routing it hung.

    Args:
        clock: seconds that only go forward; replaced in tests.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._closures: OrderedDict[bytes, int] = OrderedDict()
        self._hung: OrderedDict[str, tuple[int, float]] = OrderedDict()  # how often, and until when it counts

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

    def note_hang(self, delivery: Delivery, routing_key: str) -> None:
        """Remember that the broker hung in the routing of a reply to this message."""
        name, now = sender_or_route(delivery, routing_key), self._clock()
        times, until = self._hung.get(name, (0, now))
        if now < until:  # a reply of the same time
            return
        times = 1 if now > until + HUNG_CAP_S else times + 1
        self._hung.pop(name, None)
        self._hung[name] = times, now + min(HUNG_CAP_S, HUNG_BASE_S * 2.0 ** min(times - 1, 10))
        if len(self._hung) > MAX_SUSPECTS:
            self._hung.popitem(last=False)

    def hangs(self, delivery: Delivery, routing_key: str) -> bool:
        """Tell whether the broker would probably hang in the routing of a reply to this message."""
        if not self._hung:
            return False
        _, until = self._hung.get(sender_or_route(delivery, routing_key), (0, 0.0))
        return self._clock() < until


def sender_or_route(delivery: Delivery, routing_key: str) -> str:
    """Return the user who sent a message, where the broker vouches for one: a sender may choose ever new routes."""
    user_id = delivery.envelope.user_id
    return f"to {routing_key}" if user_id is None else f"of {user_id}"


def _fingerprint(delivery: Delivery) -> bytes:
    """Return the same bytes for each delivery of a message, and for each of its copies."""
    chosen = delivery.properties
    # With the user who sent it: another's message that is made to look like it must not change how it is published.
    named = (chosen.message_id, chosen.correlation_id, chosen.app_id, chosen.reply_to, delivery.envelope.user_id)
    return hashlib.blake2b(delivery.body, key=hashlib.blake2b(repr(named).encode()).digest(), digest_size=16).digest()
