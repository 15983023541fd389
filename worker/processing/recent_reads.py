"""What the latest looks at devices said of further commands: they may be due too, and be on their way here."""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from worker.core.results import EntryState

MAX_STATES = 20_000  # of about 400 bytes


@dataclass(frozen=True, slots=True)
class Read:
    """What one read of a device's history said.

    Attributes:
        began_at: when it began, on our clock, aware.
        platform_began_at: the same on the platform's clock, aware.
        observed_at: when it ended, on our clock, aware.
        states: by canonical uuid.
    """

    began_at: datetime
    platform_began_at: datetime
    observed_at: datetime
    states: Mapping[str, EntryState]


class RecentReads:
    """The last read of each device, as far as it has more than what was looked for; the oldest go first."""

    def __init__(self) -> None:
        self._reads: OrderedDict[tuple[str | None, str], Read] = OrderedDict()
        self._count = 0

    def get(self, product: str | None, imei: str) -> Read | None:
        """Return the last read of a device, None if it is not known."""
        return self._reads.get((product, imei))

    def add(self, product: str | None, imei: str, read: Read) -> None:
        """Keep a read in the place of the former one of the device."""
        former = self._reads.pop((product, imei), None)
        self._count += len(read.states) - (0 if former is None else len(former.states))
        if read.states:
            self._reads[product, imei] = read
        while self._count > MAX_STATES:
            _, oldest = self._reads.popitem(last=False)
            self._count -= len(oldest.states)
