"""Rest while the platform is down: a circuit breaker for each product, for executions and another for histories.

Source: https://martinfowler.com/bliki/CircuitBreaker.html; "paused" is its open state, the probe its half-open one.
"""

import math
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Literal

from worker.telemetry.logs import get_logger

PROBE_CAP_S = 60.0
SLOW_DOWN_S = 1.0  # the first wait after the platform has throttled a request; doubled while it goes on
SLOW_DOWN_CAP_S = 60.0
_SEVERAL = 2  # so many devices whose requests are refused are no matter of one device
MAX_HOLD_S = 24 * 3600.0  # a wait that the platform asks for is obeyed, but one of years is an error of its clock

Admission = Literal["open", "probe", "closed"]
Subject = Literal["product", "history"]

_EVENTS: Mapping[Subject, tuple[str, str, str]] = {
    "product": ("product_paused", "probe_failed", "product_resumed"),
    "history": ("history_paused", "history_probe_failed", "history_resumed"),
}

log = get_logger()


class CircuitBreaker:
    """Whether requests of one product may be sent. Pure: the time is passed in, in monotonic seconds.

    Refusals pause a product only where several devices get them: one that does not belong to the product gets nothing
    else, and must not stop the others.

    Args:
        product: its name.
        pause_after: so many failures in a row pause it.
        probe_s: seconds until the first probe; each that fails doubles the wait, up to a minute.
    """

    def __init__(self, product: str | None, pause_after: int, probe_s: float) -> None:
        self.product = product
        self.is_paused = False
        self.failures = 0  # in a row, refusals included
        self._refusals = 0  # among them
        self._refused_devices: set[str] = set()  # up to two of them
        self._latest = ""  # failure
        self._probe_at = 0.0  # while paused: when one command may be tried
        self._pause_after = pause_after
        self._probe_s = probe_s
        self._wait_s = probe_s
        self._held_until = 0.0  # the platform asked for this wait, or throttled a request
        self._slow_down_s = 0.0  # the latest wait after a throttled request
        self._slowed_down_at = -math.inf  # when it began
        self._closed_at = 0.0
        self._is_probing = False

    @property
    def reason(self) -> str:
        """Why nothing is sent, while nothing is."""
        return f"{self.failures} failures in a row, the latest: {self._latest}" if self.is_paused else self._latest

    def admit(self, now: float) -> Admission:
        """Let a command pass, or not; who passes as the probe must end it."""
        if now < self._held_until:
            return "closed"
        if not self.is_paused:
            return "open"
        if self._is_probing or now < self._probe_at:
            return "closed"
        self._is_probing = True
        return "probe"

    def end_probe(self) -> None:
        """Let the next probe come, once it is due: at once if this one told nothing."""
        self._is_probing = False

    def due_in_s(self, now: float) -> float:
        """Return the seconds until something may be tried; while a probe is under way, that is not yet."""
        return max(0.0, self.due_at() - now, self._probe_s if self._is_probing else 0.0)

    def failed(
        self, reason: str, now: float, *, is_probe: bool = False, asked_s: float = 0, refused_device: str | None = None
    ) -> None:
        """Note a failure of the platform.

        Args:
            reason: what happened.
            now: the time.
            is_probe: it happened to the probe.
            asked_s: the wait in seconds that the platform asked for.
            refused_device: the device whose request was refused; None: it was no refusal.
        """
        was_closed = not self.is_open(now)
        self.failures += 1
        self._latest = reason
        if refused_device is not None:
            self._refusals += 1
            if len(self._refused_devices) < _SEVERAL:
                self._refused_devices.add(refused_device)
        if asked_s:
            self._hold(asked_s, now)
        if self.is_paused and is_probe:
            self._wait_s = min(2 * self._wait_s, max(PROBE_CAP_S, self._probe_s))
            self._probe_at = now + self._wait_s
        elif not self.is_paused and self._counted >= self._pause_after:
            self.is_paused = True
            self._wait_s = self._probe_s
            self._probe_at = now + self._wait_s
        if not was_closed:
            self._closed_at = now

    @property
    def _counted(self) -> int:
        """How many failures count towards a pause.

        The refusals of one device count as one beside other failures, and by themselves not at all.
        """
        if len(self._refused_devices) >= _SEVERAL:
            return self.failures
        others = self.failures - self._refusals
        return others + min(self._refusals, 1) if others else 0

    def throttled(self, reason: str, now: float, *, since: float, asked_s: float = 0) -> None:
        """Note that the platform throttled a request: nothing is sent for a while, which grows while that goes on.

        Args:
            reason: the platform's words.
            now: the time.
            since: when the request began; of those that began before the latest wait did, only the first counts.
            asked_s: the wait in seconds that the platform asked for.
        """
        was_closed = not self.is_open(now)
        self._latest = reason
        if since > self._slowed_down_at:
            self._slow_down_s = min(2 * self._slow_down_s, SLOW_DOWN_CAP_S) or SLOW_DOWN_S
            self._slowed_down_at = now
            self._held_until = max(self._held_until, now + self._slow_down_s)
        if asked_s:
            self._hold(asked_s, now)
        if not was_closed:
            self._closed_at = now

    def _hold(self, asked_s: float, now: float) -> None:
        self._held_until = max(self._held_until, now + min(asked_s, MAX_HOLD_S))
        self._latest += f", which asked for a wait of {asked_s:g} s"

    def answered(self) -> None:
        """Note that the platform gave a clear answer, yes or no."""
        self.failures = self._refusals = 0
        self._refused_devices.clear()
        self._slow_down_s = 0.0
        self.is_paused = False

    @property
    def has_trouble(self) -> bool:
        """Whether a clear answer would change anything."""
        return self.failures > 0 or self._slow_down_s > 0

    def hasten(self, now: float) -> None:
        """Let the next probe come at once, since something has changed that may end the trouble."""
        self._held_until = now
        self._slow_down_s = 0.0
        self._probe_at = now

    def is_open(self, now: float) -> bool:
        """Tell whether commands may be sent, more than one probe at a time."""
        return not self.is_paused and now >= self._held_until

    def due_at(self) -> float:
        """Return when something may be sent again."""
        return max(self._held_until, self._probe_at if self.is_paused else 0.0)

    def rest_s(self, now: float) -> float:
        """Return how long a command may well rest: until something may be sent, or as long as this has lasted."""
        return 0.0 if self.is_open(now) else max(self.due_at() - now, now - self._closed_at)


class Permit:
    """One command's way through its product's gate; what becomes of its requests is told here, in any thread."""

    def __init__(self, gates: "CircuitBreakers", gate: CircuitBreaker, *, is_probe: bool, entered_at: float) -> None:
        self.entered_at = entered_at
        self._gates = gates
        self._gate = gate
        self._is_probe = is_probe

    @property
    def is_paused(self) -> bool:
        """Whether the product is paused by now, so that no attempt is used up."""
        return self._gate.is_paused

    def failed(self, reason: str, asked_s: float | None = None) -> None:
        """Tell that the platform was not there, did not answer or had trouble of its own.

        Args:
            reason: what happened.
            asked_s: the wait in seconds that the platform asked for, if it did.
        """
        self._gates.note_failure(self._gate, reason, asked_s or 0.0, is_probe=self._is_probe)

    def refused(self, reason: str, device: str) -> None:
        """Tell that a request was refused in a way that may concern all devices.

        Args:
            reason: what was refused.
            device: whose request it was.
        """
        self._gates.note_failure(self._gate, reason, 0.0, is_probe=self._is_probe, refused_device=device)

    def throttled(self, reason: str, asked_s: float | None) -> None:
        """Tell that the platform throttled the request.

        Args:
            reason: the platform's words.
            asked_s: the wait in seconds that it asked for, if it did.
        """
        self._gates.throttle(self._gate.product, reason, self.entered_at, asked_s)

    def answered(self) -> None:
        """Tell that the platform gave a clear answer."""
        if self._gate.has_trouble:
            self._gates.note_answer(self._gate)

    def end(self) -> None:
        """Tell that the command has been handled, or needs the passage no more."""
        if self._is_probe:
            self._is_probe = False
            self._gates.end_probe(self._gate)


class CircuitBreakers:
    """The gates of all products, for executions or for histories; thread-safe.

    Args:
        products: the names; None for commands that name none.
        pause_after: so many failures in a row pause a product.
        probe_s: seconds until the first probe.
        clock: monotonic time in seconds; replaced in tests.
        subject: what is paused, as the log says it: sending the product's commands, or reading its histories.
    """

    def __init__(
        self,
        products: Iterable[str | None],
        pause_after: int,
        probe_s: float,
        clock: Callable[[], float] = time.monotonic,
        *,
        subject: Subject = "product",
    ) -> None:
        self.on_change: Callable[[], object] = lambda: None  # is called, in any thread, when a gate opens or closes
        self._pause_after = pause_after
        self._probe_s = probe_s
        self._clock = clock
        self._paused_event, self._probe_failed_event, self._resumed_event = _EVENTS[subject]
        self._lock = threading.Lock()
        self._gates = {product: self._new_gate(product) for product in products}

    def replace(self, products: Collection[str | None], changed: Collection[str | None]) -> None:
        """Take over other products; those that ``changed`` are probed at once if they are paused."""
        with self._lock:
            self._gates = {product: self._gates.get(product) or self._new_gate(product) for product in products}
            for product in changed:
                self._gates[product].hasten(self._clock())
        self.on_change()

    def enter(self, product: str | None) -> Permit | None:
        """Let a command of a product pass, or not; whoever passes ends its passage."""
        with self._lock:
            gate = self._gates.get(product) or self._new_gate(product)  # one that has just been taken away
            now = self._clock()
            admission = gate.admit(now)
        return None if admission == "closed" else Permit(self, gate, is_probe=admission == "probe", entered_at=now)

    def is_open(self, product: str | None) -> bool:
        """Tell whether commands of a product may be sent; those of one that is not configured never are."""
        gate = self._gates.get(product)
        return gate is not None and gate.is_open(self._clock())

    def paused(self) -> dict[str | None, bool]:
        """Return of each product whether nothing of it is sent."""
        now = self._clock()
        return {product: not gate.is_open(now) for product, gate in self._gates.items()}

    def is_any_open(self) -> bool:
        """Tell whether there is a product whose commands may be sent."""
        now = self._clock()
        return any(gate.is_open(now) for gate in self._gates.values())

    def due_in_s(self) -> float:
        """Return the seconds until something may be sent again; 0 if it may be now."""
        now = self._clock()
        return min(gate.due_in_s(now) for gate in self._gates.values())

    def rest_s(self, product: str | None) -> float:
        """Return how long a command of a closed product may well rest, in seconds."""
        gate = self._gates.get(product)
        return 0.0 if gate is None else gate.rest_s(self._clock())

    def reason(self) -> str:
        """Say why nothing may be sent."""
        return "; ".join(dict.fromkeys(gate.reason for gate in self._gates.values()))

    def reason_of(self, product: str | None) -> str:
        """Say why nothing of one product may be sent."""
        gate = self._gates.get(product)
        return "" if gate is None else gate.reason

    def throttle(self, product: str | None, reason: str, since: float, asked_s: float | None = None) -> None:
        """Slow down a product, of which the platform throttled a request.

        Args:
            product: its name.
            reason: the platform's words.
            since: when the request began, on the gates' clock.
            asked_s: the wait in seconds that the platform asked for, if it did.
        """
        self._slow_down(product, reason, since, asked_s or 0.0)

    def hold(self, product: str | None, reason: str, asked_s: float | None) -> None:
        """Send nothing of a product for as many seconds as the platform asked for in answer to another request."""
        if asked_s:
            self._slow_down(product, reason, -math.inf, asked_s)

    def _slow_down(self, product: str | None, reason: str, since: float, asked_s: float) -> None:
        gate = self._gates.get(product)
        if gate is None:  # it was taken away meanwhile
            return
        with self._lock:
            now = self._clock()
            was_open = gate.is_open(now)
            gate.throttled(reason, now, since=since, asked_s=asked_s)
            facts, is_open = _facts(gate, now), gate.is_open(now)
        if was_open and not is_open:
            log.warning(self._paused_event, **facts)
            self.on_change()

    def note_failure(
        self, gate: CircuitBreaker, reason: str, asked_s: float, *, is_probe: bool, refused_device: str | None = None
    ) -> None:
        """Tell a gate of a failure; see ``Passage.failed`` and ``Passage.refused``."""
        with self._lock:
            now = self._clock()
            was_open, was_paused = gate.is_open(now), gate.is_paused
            gate.failed(reason, now, is_probe=is_probe, asked_s=asked_s, refused_device=refused_device)
            facts, is_open = _facts(gate, now), gate.is_open(now)
        if is_probe and was_paused:
            log.warning(self._probe_failed_event, **facts)
        if was_open and not is_open:
            log.warning(self._paused_event, **facts)
            self.on_change()

    def note_answer(self, gate: CircuitBreaker) -> None:
        """Tell a gate of a clear answer; see ``Passage.answered``."""
        with self._lock:
            was_paused = gate.is_paused
            gate.answered()
        if was_paused:
            log.info(self._resumed_event, product=gate.product)
            self.on_change()

    def end_probe(self, gate: CircuitBreaker) -> None:
        """Tell a gate that its probe has been handled."""
        with self._lock:
            gate.end_probe()
        self.on_change()

    def _new_gate(self, product: str | None) -> CircuitBreaker:
        return CircuitBreaker(product, self._pause_after, self._probe_s)


def _facts(gate: CircuitBreaker, now: float) -> dict[str, object]:
    """Return what the log says of a gate that has closed, or stays closed."""
    return {"product": gate.product, "reason": gate.reason, "next_try_in_s": round(gate.due_at() - now, 1)}
