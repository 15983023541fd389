"""What a shared store may have lost, judged by the epoch of its records. Pure.

An epoch is a time during which the store has lost nothing. Another one begins with a failover or a restart of its
server, and where nothing tells what was before.
"""

import math
from dataclasses import dataclass
from datetime import datetime, timedelta

from worker.core.claims import Lease, Loss, Unseen

# A delivery that nobody acknowledges is returned after the broker's consumer_timeout, 30 minutes by default; until then
# its redelivery may miss a record that was lost before the epoch began.
REDELIVERED_S = 3600.0
LONG_TTL_S = 24 * 3600.0  # a record that lives shorter may have expired before its command is redelivered


@dataclass(frozen=True, slots=True)
class Retention:
    """How long claims last, in seconds.

    ``lease_s``: a lease. ``reconcile_delay_s``: for which the effect of a request may stay invisible. ``ttl_s``: a
    record after its last write.
    """

    lease_s: float
    reconcile_delay_s: float
    ttl_s: float

    @property
    def unsettled_s(self) -> float:
        """How long after a loss an attempt may be in progress, or invisible, whose record was lost."""
        return self.lease_s + self.reconcile_delay_s

    @property
    def risky_s(self) -> float:
        """How long after an epoch began a redelivery may miss its record; infinite if records live shortly."""
        return max(REDELIVERED_S, self.unsettled_s) if self.ttl_s >= LONG_TTL_S else math.inf


@dataclass(frozen=True, slots=True)
class Epoch:
    """The present epoch at a claim.

    ``began_at``: on the clock of the claims. ``follows_loss``: records were lost before; otherwise it may be the first.
    """

    began_at: datetime
    follows_loss: bool

    def age_s(self, now: datetime) -> float:
        """Return how long ago it began, in seconds."""
        return (now - self.began_at).total_seconds()

    def unseen(self, lease: Lease, now: datetime, retention: Retention) -> Unseen:
        """Return the claim of a command without a record."""
        unsettled_s = retention.unsettled_s
        age_s = self.age_s(now)
        if self.follows_loss and age_s < unsettled_s:
            loss = Loss.ANY
        else:
            loss = Loss.OF_REDELIVERIES if age_s < retention.risky_s else Loss.NONE
        forgotten_before = self.began_at + timedelta(seconds=unsettled_s if self.follows_loss else 0)
        return Unseen(lease, self.unrecorded_until(now, retention), forgotten_before, loss)

    def unrecorded_until(self, now: datetime, retention: Retention) -> datetime:
        """Return until when an attempt may have been in progress whose record is lost.

        Its lease was granted before the epoch began, also before one that seems to be the first: a worker that hangs
        may know an earlier one.
        """
        return max(now, self.began_at + timedelta(seconds=retention.lease_s))
