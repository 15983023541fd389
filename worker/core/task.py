"""One delivery and what was read from it: what waits, is handed back, or is handled."""

from dataclasses import dataclass

from worker.amqp.messages import Delivery
from worker.core.command import Command
from worker.errors import UnusableCommand


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """A delivery on its way through this process.

    ``read``: its command, or why it is none; None where reading it may be what ends workers. ``arrived_at``: monotonic.
    """

    delivery: Delivery
    read: Command | UnusableCommand | None
    arrived_at: float

    @property
    def command(self) -> Command | None:
        return self.read if isinstance(self.read, Command) else None

    @property
    def looks_in_doubt(self) -> bool:
        """Whether its command may have been sent, for all that the message says: the history comes before a request."""
        return self.command is not None and (self.delivery.is_redelivered or self.delivery.doubt is not None)
