"""Rest while the platform is down: a circuit breaker for each product.

Source: https://martinfowler.com/bliki/CircuitBreaker.html; "paused" is its open state, the probe its half-open one.
"""

import threading
import time
from collections.abc import Callable, Collection, Iterable
from typing import Literal

from worker.telemetry.logs import get_logger

PROBE_CAP_S = 60.0
MAX_HOLD_S = 24 * 3600.0  # a wait that the platform asks for is obeyed, but one of years is an error of its clock

Admission = Literal["open", "probe", "closed"]

log = get_logger()


class Gate:
    """Whether commands of one product may be sent. Pure: the time is passed in, in monotonic seconds.

    Args:
        product: its name.
        pause_after: so many failures in a row pause it.
        probe_s: seconds until the first probe; each that fails doubles the wait, up to a minute.
    """

    def __init__(self, product: str | None, pause_after: int, probe_s: float) -> None:
        self.product = product
        self.is_paused = False
        self.failures = 0  # in a row
        self._latest = ""  # failure
        self._probe_at = 0.0  # while paused: when one command may be tried
        self._pause_after = pause_after
        self._probe_s = probe_s
        self._wait_s = probe_s
        self._held_until = 0.0  # the platform asked for this wait
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

    def failed(self, reason: str, now: float, *, is_probe: bool = False, asked_s: float = 0) -> None:
        """Note a failure of the platform, and the wait in seconds that it asked for."""
        was_closed = not self.is_open(now)
        self.failures += 1
        self._latest = reason
        if asked_s:
            self._held_until = max(self._held_until, now + min(asked_s, MAX_HOLD_S))
            self._latest += f", which asked for a wait of {asked_s:g} s"
        if self.is_paused and is_probe:
            self._wait_s = min(2 * self._wait_s, max(PROBE_CAP_S, self._probe_s))
            self._probe_at = now + self._wait_s
        elif not self.is_paused and self.failures >= self._pause_after:
            self.is_paused = True
            self._wait_s = self._probe_s
            self._probe_at = now + self._wait_s
        if not was_closed:
            self._closed_at = now

    def answered(self) -> None:
        """Note that the platform gave a clear answer, yes or no."""
        self.failures = 0
        self.is_paused = False

    def hasten(self, now: float) -> None:
        """Let the next probe come at once, since something has changed that may end the trouble."""
        self._held_until = now
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


class Passage:
    """One command's way through its product's gate; what becomes of its requests is told here, in any thread."""

    def __init__(self, gates: "Gates", gate: Gate, *, is_probe: bool) -> None:
        self._gates = gates
        self._gate = gate
        self._is_probe = is_probe

    @property
    def is_paused(self) -> bool:
        """Whether the product is paused by now, so that no attempt is used up."""
        return self._gate.is_paused

    def failed(self, reason: str, asked_s: float | None = None) -> None:
        """Tell that the platform was not there, did not answer, had trouble of its own or let nobody in.

        Args:
            reason: what happened.
            asked_s: the wait in seconds that the platform asked for, if it did.
        """
        self._gates.note_failure(self._gate, reason, asked_s or 0.0, is_probe=self._is_probe)

    def answered(self) -> None:
        """Tell that the platform gave a clear answer."""
        if self._gate.failures:
            self._gates.note_answer(self._gate)

    def end(self) -> None:
        """Tell that the command has been handled."""
        if self._is_probe:
            self._gates.end_probe(self._gate)


class Gates:
    """The gates of all products; thread-safe.

    Args:
        products: the names; None for commands that name none.
        pause_after: so many failures in a row pause a product.
        probe_s: seconds until the first probe.
        clock: monotonic time in seconds; replaced in tests.
    """

    def __init__(
        self,
        products: Iterable[str | None],
        pause_after: int,
        probe_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.on_change: Callable[[], object] = lambda: None  # is called, in any thread, when a gate opens or closes
        self._pause_after = pause_after
        self._probe_s = probe_s
        self._clock = clock
        self._lock = threading.Lock()
        self._gates = {product: self._new_gate(product) for product in products}

    def replace(self, products: Collection[str | None], changed: Collection[str | None]) -> None:
        """Take over other products; those that ``changed`` are probed at once if they are paused."""
        with self._lock:
            self._gates = {product: self._gates.get(product) or self._new_gate(product) for product in products}
            for product in changed:
                self._gates[product].hasten(self._clock())
        self.on_change()

    def enter(self, product: str | None) -> Passage | None:
        """Let a command of a product pass, or not; whoever passes ends its passage."""
        with self._lock:
            gate = self._gates.get(product) or self._new_gate(product)  # one that has just been taken away
            admission = gate.admit(self._clock())
        return None if admission == "closed" else Passage(self, gate, is_probe=admission == "probe")

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

    def note_failure(self, gate: Gate, reason: str, asked_s: float, *, is_probe: bool) -> None:
        """Tell a gate of a failure; see ``Passage.failed``."""
        with self._lock:
            now = self._clock()
            was_open, was_paused = gate.is_open(now), gate.is_paused
            gate.failed(reason, now, is_probe=is_probe, asked_s=asked_s)
            is_open = gate.is_open(now)
            facts = {"product": gate.product, "reason": gate.reason, "next_try_in_s": round(gate.due_at() - now, 1)}
        if is_probe and was_paused:
            log.warning("probe_failed", **facts)
        if was_open and not is_open:
            log.warning("product_paused", **facts)
            self.on_change()

    def note_answer(self, gate: Gate) -> None:
        """Tell a gate of a clear answer; see ``Passage.answered``."""
        with self._lock:
            was_paused = gate.is_paused
            gate.answered()
        if was_paused:
            log.info("product_resumed", product=gate.product)
            self.on_change()

    def end_probe(self, gate: Gate) -> None:
        """Tell a gate that its probe has been handled."""
        with self._lock:
            gate.end_probe()
        self.on_change()

    def _new_gate(self, product: str | None) -> Gate:
        return Gate(product, self._pause_after, self._probe_s)
