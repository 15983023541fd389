"""The exchanges, queues and bindings, defined once: they are declared, checked and exported from here."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

RESULT = "result"  # routing key of accepted commands whose result is due, and the first word of a result's
EXECUTE = "execute"  # routing key of commands, and the first word of the routing keys of replies and dead letters
# Of a queue that keeps the replies nobody waits for. It deletes itself when nothing was sent for a month.
KEPT_REPLIES = 1_000
_KEPT_MS = 24 * 3600 * 1000
_UNUSED_MS = 30 * _KEPT_MS
DELIVERY_LIMIT = 20  # a safety net, never logic; explicit, because the default differs between 3.10 and 4.x
# For queues that people read and requeue, which counts as a delivery: with its default 4.x drops a message at the 21st
# (measured). Not -1, which means unlimited on 4.x, but dead-letters at the first return on 3.10 (measured).
UNLIMITED_DELIVERIES = 2**31 - 1
SENT = "send"  # second word of the routing keys of replies to what the command line sent
ORDER = "order"  # routing key of orders to all workers that last
QUESTION = "question"  # routing key of what only those workers follow or answer that run
REPORT = "report"  # first word of the routing keys of what workers answer
_MAX_SAMPLES, _MAX_SAMPLES_BYTES = 100, 1_000_000  # of unrouted replies, of which only the routing keys are read
# Of orders, which have some hundred bytes each: more than people ever give. The newest segment is always kept.
_MAX_CONTROL_BYTES, _MAX_SEGMENT_BYTES = 20_000_000, 1_000_000


@dataclass(frozen=True, slots=True)
class Exchange:
    """A durable exchange."""

    name: str
    kind: str
    arguments: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Queue:
    """A durable queue: a quorum queue, or a stream."""

    name: str
    arguments: dict[str, object]


@dataclass(frozen=True, slots=True)
class Binding:
    """A binding of a queue to an exchange."""

    exchange: str
    queue: str
    routing_key: str


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a topology that is declared together."""

    exchanges: tuple[Exchange, ...] = ()
    queues: tuple[Queue, ...] = ()
    bindings: tuple[Binding, ...] = ()


@dataclass(frozen=True)
class Topology:
    """The exchanges, queues and bindings of one namespace.

    ``work`` is what the processing of commands needs. ``control`` and ``samples`` serve operators only: without them
    workers do the same work.

    Args:
        namespace: prefix of every name.
        delay_queues_s: the delay of each delay queue, in seconds.
        result_delays_s: the delay of each queue in which accepted commands wait for their result; none: they do not.
    """

    namespace: str
    delay_queues_s: tuple[int, ...]
    result_delays_s: tuple[int, ...] = ()

    @property
    def commands_exchange(self) -> str:
        return f"{self.namespace}.commands"

    @property
    def execute_queue(self) -> str:
        return f"{self.namespace}.execute"

    @property
    def results_queue(self) -> str:
        return f"{self.namespace}.results"

    @property
    def retry_exchange(self) -> str:
        return f"{self.namespace}.retry"

    @property
    def control_exchange(self) -> str:
        return f"{self.namespace}.control"

    @property
    def control_stream(self) -> str:
        return f"{self.namespace}.control"

    def questions_queue(self, name: str) -> str:
        """Return the name of the queue from which one worker takes questions, while it is connected."""
        return f"{self.control_stream}.{name}"

    @property
    def returns_exchange(self) -> str:
        return f"{self.namespace}.returns"

    @property
    def replies_exchange(self) -> str:
        return f"{self.namespace}.replies"

    @property
    def unrouted_exchange(self) -> str:
        return f"{self.namespace}.replies.unrouted"

    @property
    def unrouted_samples_queue(self) -> str:
        return f"{self.unrouted_exchange}.samples"

    @property
    def dead_letters_exchange(self) -> str:
        return f"{self.namespace}.dead-letters"

    def kept_replies_queue(self, app_id: str) -> str:
        """Return the name of the queue that keeps the latest replies to what the command line sent."""
        return f"{self.namespace}.sent.{app_id}"

    def kept_replies(self, app_id: str) -> tuple[Queue, Binding]:
        """Return the queue that keeps the latest replies to what ``onenet-worker send`` sent, for a day, and a binding.

        It is no part of the topology: ``send`` declares it, so that no reply stays unrouted, and asks for replies with
        a routing key of its own: those to the system itself are none of its business.
        """
        name = self.kept_replies_queue(app_id)
        arguments: dict[str, object] = {
            "x-queue-type": "quorum",
            "x-max-length": KEPT_REPLIES,
            "x-message-ttl": _KEPT_MS,
            "x-expires": _UNUSED_MS,
            "x-delivery-limit": UNLIMITED_DELIVERIES,
        }
        return Queue(name, arguments), Binding(self.replies_exchange, name, f"{app_id}.{SENT}.#")

    @cached_property
    def exchanges_closed_to_upstream(self) -> frozenset[str]:
        """All exchanges but commands and returns: a delivery by one of them was moved by an operator or a shovel."""
        open_exchanges = {self.commands_exchange, self.returns_exchange}
        return frozenset({"", *(exchange.name for exchange in self.exchanges())} - open_exchanges)

    def retry_queue(self, delay_s: int) -> str:
        """Return the name of the delay queue; it is also the routing key on the retry exchange."""
        return f"{self.execute_queue}.retry.{delay_s}s"

    def result_delay_queue(self, delay_s: int) -> str:
        """Return the name of a queue in which accepted commands wait; it is also the key on the retry exchange."""
        return f"{self.results_queue}.{delay_s}s"

    @property
    def parts(self) -> tuple[Part, ...]:
        return self.work, self.samples, self.control

    def exchanges(self) -> Iterable[Exchange]:
        return (each for part in self.parts for each in part.exchanges)

    def queues(self) -> Iterable[Queue]:
        return (each for part in self.parts for each in part.queues)

    def bindings(self) -> Iterable[Binding]:
        return (each for part in self.parts for each in part.bindings)

    @cached_property
    def work(self) -> Part:
        """What the processing of commands needs."""
        return Part(tuple(self._exchanges()), tuple(self._queues()), tuple(self._bindings()))

    @cached_property
    def samples(self) -> Part:
        """The queue from which workers learn which replies nobody has bound a queue for."""
        queue = Queue(
            self.unrouted_samples_queue,
            {
                "x-queue-type": "quorum",
                "x-max-length": _MAX_SAMPLES,
                "x-max-length-bytes": _MAX_SAMPLES_BYTES,
                "x-overflow": "drop-head",
            },
        )
        return Part(queues=(queue,), bindings=(Binding(self.unrouted_exchange, queue.name, ""),))

    @cached_property
    def control(self) -> Part:
        """How orders reach all workers: by a stream, so that one that starts later reads them too."""
        stream = Queue(
            self.control_stream,
            {
                "x-queue-type": "stream",
                "x-max-length-bytes": _MAX_CONTROL_BYTES,
                "x-stream-max-segment-size-bytes": _MAX_SEGMENT_BYTES,
            },
        )
        exchange = Exchange(self.control_exchange, "topic")
        return Part((exchange,), (stream,), (Binding(exchange.name, stream.name, ORDER),))

    def _exchanges(self) -> Iterable[Exchange]:
        yield Exchange(self.commands_exchange, "direct")
        yield Exchange(self.retry_exchange, "direct")
        yield Exchange(self.returns_exchange, "direct")
        yield Exchange(self.unrouted_exchange, "fanout")
        yield Exchange(self.replies_exchange, "topic", {"alternate-exchange": self.unrouted_exchange})
        yield Exchange(self.dead_letters_exchange, "topic")

    def _queues(self) -> Iterable[Queue]:
        yield Queue(
            self.execute_queue,
            {
                "x-queue-type": "quorum",
                "x-dead-letter-exchange": self.dead_letters_exchange,
                "x-dead-letter-strategy": "at-least-once",
                "x-overflow": "reject-publish",  # at-least-once requires it
                "x-delivery-limit": DELIVERY_LIMIT,
            },
        )
        for delay_s in sorted(set(self.delay_queues_s)):
            yield self._delay_queue(self.retry_queue(delay_s), delay_s, EXECUTE)
        if self.result_delays_s:
            # With one active consumer, who has all commands of a device, one look at the platform serves them all.
            once = {"x-single-active-consumer": True, "x-delivery-limit": UNLIMITED_DELIVERIES}
            yield Queue(self.results_queue, {"x-queue-type": "quorum", **once})
        for delay_s in sorted(set(self.result_delays_s)):
            yield self._delay_queue(self.result_delay_queue(delay_s), delay_s, RESULT)
        for name in (self.unrouted_exchange, self.dead_letters_exchange):
            yield Queue(name, {"x-queue-type": "quorum", "x-delivery-limit": UNLIMITED_DELIVERIES})

    def _delay_queue(self, name: str, delay_s: int, routing_key: str) -> Queue:
        return Queue(
            name,
            {
                "x-queue-type": "quorum",
                "x-message-ttl": delay_s * 1000,
                "x-dead-letter-exchange": self.returns_exchange,
                "x-dead-letter-routing-key": routing_key,
                "x-dead-letter-strategy": "at-least-once",
                "x-overflow": "reject-publish",
            },
        )

    def _bindings(self) -> Iterable[Binding]:
        yield Binding(self.commands_exchange, self.execute_queue, EXECUTE)
        yield Binding(self.returns_exchange, self.execute_queue, EXECUTE)
        for delay_s in sorted(set(self.delay_queues_s)):
            yield Binding(self.retry_exchange, self.retry_queue(delay_s), self.retry_queue(delay_s))
        if self.result_delays_s:
            yield Binding(self.returns_exchange, self.results_queue, RESULT)
        for delay_s in sorted(set(self.result_delays_s)):
            yield Binding(self.retry_exchange, self.result_delay_queue(delay_s), self.result_delay_queue(delay_s))
        yield Binding(self.unrouted_exchange, self.unrouted_exchange, "")
        yield Binding(self.dead_letters_exchange, self.dead_letters_exchange, "#")

    def definitions(self, vhost: str) -> dict[str, list[dict[str, object]]]:
        """Return the topology in the broker's definitions format.

        Source: https://www.rabbitmq.com/docs/definitions
        """
        return {
            "exchanges": [
                {
                    "name": exchange.name,
                    "vhost": vhost,
                    "type": exchange.kind,
                    "durable": True,
                    "auto_delete": False,
                    "internal": False,
                    "arguments": exchange.arguments,
                }
                for exchange in self.exchanges()
            ],
            "queues": [
                {
                    "name": queue.name,
                    "vhost": vhost,
                    "durable": True,
                    "auto_delete": False,
                    "arguments": queue.arguments,
                }
                for queue in self.queues()
            ],
            "bindings": [
                {
                    "source": binding.exchange,
                    "vhost": vhost,
                    "destination": binding.queue,
                    "destination_type": "queue",
                    "routing_key": binding.routing_key,
                    "arguments": {},
                }
                for binding in self.bindings()
            ],
        }
