"""How many deliveries to ask the broker for. Pure: state in, numbers out."""

from dataclasses import dataclass

# Deliveries held behind busy devices, and the memory of their messages: half of what may be held at all, since whatever
# is read beside them must fit too. Further ones are postponed.
MAX_WAITING = 2_000
MAX_WAITING_BYTES = 6 * 1024 * 1024
SWEEP_S = 30.0


@dataclass(frozen=True, slots=True)
class Demand:
    """What decides how many deliveries are asked for.

    Attributes:
        is_idle: nothing new is taken, because the worker stops or the broker takes no publications.
        allows_any: there is a product whose commands may be sent.
        retry_in_s: seconds until something may be sent again.
        look_in_s: seconds until the next look for a probe.
        has_probe: a probe is in progress.
        has_unstarted: some held deliveries have not been started yet.
    """

    is_idle: bool
    allows_any: bool
    retry_in_s: float
    look_in_s: float
    has_probe: bool
    has_unstarted: bool


def wanted(demand: Demand, full: int) -> int:
    """Return how many deliveries to ask for: ``full`` while commands are sent, 1 to find a probe, otherwise 0."""
    if demand.is_idle:
        return 0
    if demand.allows_any:
        return full
    is_due = demand.retry_in_s == 0 and demand.look_in_s <= 0
    return 1 if is_due and not demand.has_probe and not demand.has_unstarted else 0


def is_too_much(waiting: int, waiting_bytes: int) -> bool:
    """Tell whether more deliveries wait behind busy devices than may be held."""
    return waiting > MAX_WAITING or waiting_bytes > MAX_WAITING_BYTES


def patience_s(demand: Demand, prefetch: int, *, is_blocked: bool) -> float:
    """Return for how many seconds nothing has to be done unless something changes."""
    if prefetch or is_blocked or demand.has_probe:
        return SWEEP_S
    return min(SWEEP_S, max(demand.retry_in_s, demand.look_in_s))
