"""The exchanges, queues and bindings: said once, declared, checked and exported from here."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

DELIVERY_LIMIT = 20  # a last net, never logic; explicit, because its default differs between 3.10 and 4.x

# For queues that people look into, since each look counts: by itself 4.x forgets a message on the 21st (measured). A
# number, because -1 is no limit on 4.x, and on 3.10 the first look (measured).
NO_LIMIT = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Exchange:
    """A durable exchange."""

    name: str
    kind: str
    arguments: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Queue:
    """A durable quorum queue."""

    name: str
    arguments: dict[str, object]


@dataclass(frozen=True, slots=True)
class Binding:
    """From an exchange to a queue."""

    exchange: str
    queue: str
    routing_key: str


@dataclass(frozen=True)
class Topology:
    """Everything below one namespace.

    Args:
        namespace: begins every name.
        retry_delays_s: one delay queue for each.
    """

    namespace: str
    retry_delays_s: tuple[int, ...]

    @property
    def commands_exchange(self) -> str:
        return f"{self.namespace}.commands"

    @property
    def execute_queue(self) -> str:
        return f"{self.namespace}.execute"

    @property
    def retry_exchange(self) -> str:
        return f"{self.namespace}.retry"

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
    def dead_letters_exchange(self) -> str:
        return f"{self.namespace}.dead-letters"

    @cached_property
    def exchanges_upstream_never_uses(self) -> frozenset[str]:
        """The worker's other exchanges, and the default one: what comes by one of them was moved by other means."""
        returned = {self.commands_exchange, self.returns_exchange}
        return frozenset({"", *(exchange.name for exchange in self.exchanges())} - returned)

    def retry_queue(self, delay_s: int) -> str:
        """Return the name of the delay queue; it is also the routing key on the retry exchange."""
        return f"{self.execute_queue}.retry.{delay_s}s"

    def exchanges(self) -> Iterable[Exchange]:
        yield Exchange(self.commands_exchange, "direct")
        yield Exchange(self.retry_exchange, "direct")
        yield Exchange(self.returns_exchange, "direct")
        yield Exchange(self.unrouted_exchange, "fanout")
        yield Exchange(self.replies_exchange, "topic", {"alternate-exchange": self.unrouted_exchange})
        yield Exchange(self.dead_letters_exchange, "topic")

    def queues(self) -> Iterable[Queue]:
        yield Queue(
            self.execute_queue,
            {
                "x-queue-type": "quorum",
                "x-dead-letter-exchange": self.dead_letters_exchange,
                "x-dead-letter-strategy": "at-least-once",
                "x-overflow": "reject-publish",  # at-least-once needs it
                "x-delivery-limit": DELIVERY_LIMIT,
            },
        )
        for delay_s in sorted(set(self.retry_delays_s)):
            yield Queue(
                self.retry_queue(delay_s),
                {
                    "x-queue-type": "quorum",
                    "x-message-ttl": delay_s * 1000,
                    "x-dead-letter-exchange": self.returns_exchange,
                    "x-dead-letter-routing-key": EXECUTE,
                    "x-dead-letter-strategy": "at-least-once",
                    "x-overflow": "reject-publish",
                },
            )
        for name in (self.unrouted_exchange, self.dead_letters_exchange):
            yield Queue(name, {"x-queue-type": "quorum", "x-delivery-limit": NO_LIMIT})

    def bindings(self) -> Iterable[Binding]:
        yield Binding(self.commands_exchange, self.execute_queue, EXECUTE)
        yield Binding(self.returns_exchange, self.execute_queue, EXECUTE)
        for delay_s in sorted(set(self.retry_delays_s)):
            yield Binding(self.retry_exchange, self.retry_queue(delay_s), self.retry_queue(delay_s))
        yield Binding(self.unrouted_exchange, self.unrouted_exchange, "")
        yield Binding(self.dead_letters_exchange, self.dead_letters_exchange, "#")

    def definitions(self, vhost: str) -> dict[str, list[dict[str, object]]]:
        """Return the topology in the format of the broker's definitions files.

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


EXECUTE = "execute"
