"""A person's order to try a failed command once more."""

from dataclasses import dataclass
from datetime import datetime

from worker.core.doubt import DoubtWindow


@dataclass(frozen=True, slots=True)
class Replay:
    """Which failure is not to be the last word any more, and what may have been sent before it.

    ``failed_at``: when the command failed, to the millisecond, so that each failure is replayed once however often the
    order comes. ``doubt``: None where nothing of it was cached until then.
    """

    failed_at: datetime
    doubt: DoubtWindow | None
