"""Stop sending while the platform fails: one circuit breaker for each product, for requests and for history reads.

The states are the pattern's: *closed* lets every request pass, *open* lets none pass, *half-open* lets one probe pass.
A breaker is open after too many failures in a row (the product is *paused*), after a throttled request, or while a
Retry-After of the platform lasts. A wait of more than a minute is probed once a minute, since it may be a mistake.
A product that an operator has paused lets nothing pass, no probe either.
Source: https://martinfowler.com/bliki/CircuitBreaker.html
"""

import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Literal

from worker.core.pauses import Order, Pauses, ProductState
from worker.errors import HistoryUnreadable
from worker.telemetry.logs import get_logger

MAX_PROBE_INTERVAL_S = 60.0
THROTTLE_BACKOFF_S = 1.0  # after the first throttled request; doubles while requests are throttled
MAX_THROTTLE_BACKOFF_S = 60.0
_MIN_DEVICES = 2  # what fewer devices get may concern those devices only

Subject = Literal["product", "history"]

_EVENTS: Mapping[Subject, tuple[str, str, str]] = {
    "product": ("product_paused", "probe_failed", "product_resumed"),
    "history": ("history_paused", "history_probe_failed", "history_resumed"),
}

log = get_logger()


class CircuitBreaker:
    """The circuit breaker of one product.

    Failures that may concern one device open it only if at least two devices have them: a device that does not belong
    to the product gets nothing but refusals, and must not stop the other devices.

    Args:
        product: name of the product; None for the default one.
        pause_after_failures: failures in a row that pause the product.
        probe_interval_s: seconds until the first probe; doubles after each failed probe, up to a minute.
        clock: monotonic time in seconds.
        subject: what a pause stops; chooses the log events.
        on_change: called when the breaker opens or closes and when a probe is released.
    """

    def __init__(
        self,
        product: str | None,
        pause_after_failures: int,
        probe_interval_s: float,
        clock: Callable[[], float],
        subject: Subject,
        on_change: Callable[[], object],
    ) -> None:
        self.is_paused = False
        self.pause_by_hand = ""
        """Who paused the product by hand, and why; empty while that is not so."""
        self._product = product
        self._failures = 0  # in a row, refusals included
        self._device_failures = 0  # of these failures
        self._failing_devices: set[str] = set()  # at most _MIN_DEVICES of them
        self._last_failure = ""
        self._probe_at = 0.0  # while paused: when the next probe may be sent
        self._pause_after_failures = pause_after_failures
        self._first_interval_s = probe_interval_s
        self._interval_s = probe_interval_s
        self._retry_after_until = 0.0  # end of the platform's Retry-After, or of the backoff after throttling
        self._held_at = -math.inf  # when the platform asked for the wait that lasts
        self._hold_probe_at = 0.0  # while it lasts: when the next probe may be sent
        self._throttle_backoff_s = 0.0  # the last backoff after a throttled request
        self._throttled_at = -math.inf  # when that backoff began
        self._opened_at = 0.0
        self._is_probing = False
        self._clock = clock
        self._paused_event, self._probe_failed_event, self._resumed_event = _EVENTS[subject]
        self._on_change = on_change

    @property
    def reason(self) -> str:
        """Why nothing passes; only meaningful while nothing does."""
        if self.pause_by_hand:
            return self.pause_by_hand
        if self.is_paused:
            return f"{self._failures} failures in a row, the latest: {self._last_failure}"
        return self._last_failure

    @property
    def is_open(self) -> bool:
        """Whether no request passes but a probe."""
        return bool(self.pause_by_hand) or self.is_paused or self._clock() < self._retry_after_until

    def try_acquire(self) -> "Permit | None":
        """Return a permit to send a request, which must be released, or None while nothing may be sent."""
        now = self._clock()
        is_probe = self.is_open
        if self.pause_by_hand or now < self._platform_retry_at() or (is_probe and self._is_probing):
            return None
        self._is_probing = self._is_probing or is_probe
        return Permit(self, is_probe=is_probe, acquired_at=now)

    def release_probe(self) -> None:
        """Allow the next probe when it is due: at once if this one recorded neither success nor failure."""
        self._is_probing = False
        self._on_change()

    def record_success(self, *, since: float) -> None:
        """Close the breaker after a clear answer of the platform, accepted or rejected.

        Args:
            since: when the request began. A Retry-After that the platform asked for later still runs to its end.
        """
        ends_hold = self._held_at < since and self._clock() < self._retry_after_until
        if ends_hold:
            self._retry_after_until = self._clock()
        self._failures = self._device_failures = 0
        self._failing_devices.clear()
        self._throttle_backoff_s = 0.0
        if self.is_paused or ends_hold:
            self.is_paused = False
            log.info(self._resumed_event, product=self._product)
            self._on_change()

    def record_failure(self, reason: str, retry_after_s: float | None, *, is_probe: bool, device: str | None) -> None:
        """Count a failure of the platform; see ``Permit.record_failure``."""
        now, was_open, was_paused = self._clock(), self.is_open, self.is_paused
        self._failures += 1
        if is_probe:
            self._hold_probe_at = now + MAX_PROBE_INTERVAL_S
        self._last_failure = reason
        if device is not None:
            self._device_failures += 1
            if len(self._failing_devices) < _MIN_DEVICES:
                self._failing_devices.add(device)
        self._wait(retry_after_s, now)
        if self.is_paused and is_probe:
            self._interval_s = min(2 * self._interval_s, max(MAX_PROBE_INTERVAL_S, self._first_interval_s))
            self._probe_at = now + self._interval_s
            self._warn(self._probe_failed_event, now)
        elif not self.is_paused and self._counted_failures >= self._pause_after_failures:
            self.is_paused = True
            self._interval_s = self._first_interval_s
            self._probe_at = now + self._interval_s
        if not was_open:
            self._note_opening(now)
        elif self.is_paused and not was_paused:  # while it was open for another reason
            self._warn(self._paused_event, now)

    def record_throttling(self, reason: str, retry_after_s: float | None, *, since: float) -> None:
        """Open the breaker after a throttled request, for longer each time until a request succeeds.

        Args:
            reason: the platform's words.
            retry_after_s: the wait in seconds that the platform asked for, if any.
            since: when the request began. Requests that were in flight together count once: one that began before the
                current backoff does not prolong it.
        """
        now, was_open = self._clock(), self.is_open
        self._last_failure = reason
        self._held_at, self._hold_probe_at = now, now + MAX_PROBE_INTERVAL_S
        if since > self._throttled_at:
            self._throttle_backoff_s = min(2 * self._throttle_backoff_s, MAX_THROTTLE_BACKOFF_S) or THROTTLE_BACKOFF_S
            self._throttled_at = now
            self._retry_after_until = max(self._retry_after_until, now + self._throttle_backoff_s)
        self._wait(retry_after_s, now)
        if not was_open:
            self._note_opening(now)

    def set_pause_by_hand(self, reason: str) -> None:
        """Let nothing pass from now on, not even a probe, for a reason; without a reason: end that."""
        if reason and not self.is_open:
            self._opened_at = self._clock()
        self.pause_by_hand = reason

    def allow_probe(self) -> None:
        """Allow the next probe at once, and one only: a wait that the platform asked for goes on if that fails."""
        self._hold_probe_at = self._probe_at = self._clock()

    def reset(self) -> None:
        """Allow the next probe at once, because something changed that may end the failures."""
        self._retry_after_until = self._probe_at = self._clock()
        self._throttle_backoff_s = 0.0

    def retry_in_s(self) -> float:
        """Return the seconds until the next request may be sent; infinity if that is an operator's decision."""
        return math.inf if self.pause_by_hand else self.platform_retry_in_s()

    def platform_retry_in_s(self) -> float:
        """Return the seconds until the next request, as far as the platform decides.

        At least one interval while a probe is in flight.
        """
        in_flight_s = self._first_interval_s if self._is_probing else 0.0
        return max(0.0, self._platform_retry_at() - self._clock(), in_flight_s)

    def suggested_delay_s(self) -> float:
        """Suggest a delay: until the next probe, or the length of the outage so far, whichever is longer."""
        if not self.is_open:
            return 0.0
        now = self._clock()
        until_probe_s = self._first_interval_s if self.pause_by_hand else self._platform_retry_at() - now
        return max(until_probe_s, now - self._opened_at)

    @property
    def _counted_failures(self) -> int:
        """The failures that count towards a pause.

        Those that may concern one device count as one while only one has them, and only if there are others too.
        """
        if len(self._failing_devices) >= _MIN_DEVICES:
            return self._failures
        others = self._failures - self._device_failures
        return others + min(self._device_failures, 1) if others else 0

    def _platform_retry_at(self) -> float:
        """Return when the next request, or the next probe, may be sent, as far as the platform decides."""
        held_until = min(self._retry_after_until, self._hold_probe_at)
        return max(held_until, self._probe_at if self.is_paused else 0.0)

    def _wait(self, retry_after_s: float | None, now: float) -> None:
        if retry_after_s:
            self._held_at, self._hold_probe_at = now, now + MAX_PROBE_INTERVAL_S
            self._retry_after_until = max(self._retry_after_until, now + retry_after_s)
            self._last_failure += f", which asked for a wait of {retry_after_s:g} s"

    def _note_opening(self, now: float) -> None:
        """Note and log that the breaker has opened, if it has."""
        if self.is_open:
            self._opened_at = now
            self._warn(self._paused_event, now)
            self._on_change()

    def _warn(self, event: str, now: float) -> None:
        next_try_in_s = None if self.pause_by_hand else round(self._platform_retry_at() - now, 1)
        log.warning(event, product=self._product, reason=self.reason, next_try_in_s=next_try_in_s)


class Permit:
    """The permission to send one command's requests, and the place to record what became of them."""

    def __init__(self, breaker: CircuitBreaker, *, is_probe: bool, acquired_at: float) -> None:
        self._breaker = breaker
        self._is_probe = is_probe
        self._acquired_at = acquired_at

    @property
    def is_paused(self) -> bool:
        """Whether the product is paused now or this is a probe, so that a failed request uses up no attempt."""
        return self._breaker.is_paused or self._is_probe

    @property
    def is_revoked(self) -> bool:
        """Whether an operator has paused the product since, so that nothing more may be sent."""
        return bool(self._breaker.pause_by_hand)

    def record_success(self) -> None:
        """Record a clear answer of the platform; see ``CircuitBreaker.record_success``."""
        self._breaker.record_success(since=self._acquired_at)

    def record_failure(self, reason: str, retry_after_s: float | None = None, *, device: str | None = None) -> None:
        """Record that the platform was unreachable, did not answer, reported an error of its own or refused a request.

        Args:
            reason: what happened.
            retry_after_s: the wait in seconds that the platform asked for, if any.
            device: the IMEI, if the failure may concern this device only, as a refusal may; None: it concerns the
                platform.
        """
        self._breaker.record_failure(reason, retry_after_s, is_probe=self._is_probe, device=device)

    def record_throttling(self, reason: str, retry_after_s: float | None = None) -> None:
        """Record that the platform throttled the request; see ``CircuitBreaker.record_throttling``."""
        self._breaker.record_throttling(reason, retry_after_s, since=self._acquired_at)

    def release(self) -> None:
        """Give the permit back, once the command is processed or will send nothing more. May be called repeatedly."""
        if self._is_probe:
            self._is_probe = False
            self._breaker.release_probe()


class CircuitBreakers:
    """The circuit breakers of all products, either for requests or for history reads.

    Args:
        products: their names; None for commands that name no product.
        pause_after_failures: failures in a row that pause a product.
        probe_interval_s: seconds until the first probe.
        clock: monotonic time in seconds; replaced in tests.
        subject: what a pause stops: sending the product's commands, or reading its command histories. Chooses the log
            events.
    """

    def __init__(
        self,
        products: Iterable[str | None],
        pause_after_failures: int,
        probe_interval_s: float,
        clock: Callable[[], float] = time.monotonic,
        *,
        subject: Subject = "product",
    ) -> None:
        self.on_change: Callable[[], object] = lambda: None
        """Called when a breaker opens or closes and when a probe is released."""
        self._options = (pause_after_failures, probe_interval_s, clock, subject, self._notify)
        self._breakers = {product: CircuitBreaker(product, *self._options) for product in products}
        self._pauses = Pauses()

    def replace(self, products: Collection[str | None], changed: Collection[str | None]) -> None:
        """Replace the set of products; paused products among ``changed`` are probed at once."""
        self._breakers = {product: self._of(product) for product in products}
        for product in changed:
            self._breakers[product].reset()
        self.pause_by_hand(self._pauses)

    def pause_by_hand(self, pauses: Pauses) -> None:
        """Send nothing of the products that are paused by hand, and of all others what else allows."""
        self._pauses = pauses
        for product, breaker in self._breakers.items():
            order = pauses.of(product)
            breaker.set_pause_by_hand("" if order is None else _by_hand(order))
        self.on_change()

    def probe_at_once(self, order: Order) -> None:
        """Allow the next probe at once of each paused product that an order is about."""
        for product, breaker in self._breakers.items():
            if order.concerns(product) and breaker.is_open:
                breaker.allow_probe()
        self.on_change()

    def states(self) -> tuple[ProductState, ...]:
        """Return for each product whether its commands are sent."""
        return tuple(
            ProductState(
                product=product,
                is_paused=breaker.is_open,
                is_by_hand=bool(breaker.pause_by_hand),
                reason=breaker.reason if breaker.is_open else "",
                next_try_in_s=finite_s(breaker.retry_in_s()) if breaker.is_open else None,
            )
            for product, breaker in self._breakers.items()
        )

    def try_acquire(self, product: str | None) -> Permit | None:
        """Return a permit to send a product's command, which must be released, or None while nothing may be sent."""
        return self._of(product).try_acquire()

    def allows(self, product: str | None) -> bool:
        """Tell whether a product's commands may be sent, not only a probe; False for an unknown product."""
        return product in self._breakers and not self._breakers[product].is_open

    def allows_reading(self, product: str | None) -> bool:
        """Tell whether the platform answers for a product, or a probe is due: a pause by hand stops no reading."""
        return not self._of(product).platform_retry_in_s()

    def allows_any(self) -> bool:
        """Tell whether the commands of at least one product may be sent."""
        return not all(breaker.is_open for breaker in self._breakers.values())

    def paused(self) -> dict[str | None, bool]:
        """Return for each product whether its commands are held back."""
        return {product: breaker.is_open for product, breaker in self._breakers.items()}

    def paused_by_hand(self) -> dict[str | None, bool]:
        """Return for each product whether an operator has paused it."""
        return {product: bool(breaker.pause_by_hand) for product, breaker in self._breakers.items()}

    def retry_in_s(self) -> float:
        """Return the seconds until a request of any product may be sent; 0: one may be sent now."""
        return min(breaker.retry_in_s() for breaker in self._breakers.values())

    def suggested_delay_s(self, product: str | None) -> float:
        """Suggest how long to delay a product's command, in seconds; 0 if it may be sent now."""
        return self._of(product).suggested_delay_s()

    def reason(self) -> str:
        """Return why no product's commands may be sent."""
        return "; ".join(dict.fromkeys(breaker.reason for breaker in self._breakers.values()))

    def reason_of(self, product: str | None) -> str:
        """Return why a product's commands may not be sent."""
        return self._of(product).reason

    def why_paused(self, product: str | None) -> str:
        """Return why nothing of a product is sent, as the reason of a postponement."""
        return f"nothing is sent for now: {self.reason_of(product)}"

    def hold(self, product: str | None, reason: str, retry_after_s: float | None) -> None:
        """Send nothing of a product until a Retry-After ends that the platform gave to another kind of request."""
        if retry_after_s and product in self._breakers:
            self._breakers[product].record_throttling(reason, retry_after_s, since=-math.inf)

    def _of(self, product: str | None) -> CircuitBreaker:
        """Return the breaker of a product, a new one if the product was removed meanwhile."""
        return self._breakers.get(product) or CircuitBreaker(product, *self._options)

    def _notify(self) -> None:
        self.on_change()


def finite_s(seconds: float) -> float | None:
    """Return a wait for a log line or a report, rounded; None if it has no end that is known."""
    return round(seconds, 1) if math.isfinite(seconds) else None


def _by_hand(order: Order) -> str:
    """Return in words who paused a product, and why."""
    return "paused by hand" + (f" by {order.by}" if order.by else "") + (f": {order.reason}" if order.reason else "")


def record_unreadable(
    error: HistoryUnreadable, permit: Permit, breakers: CircuitBreakers, product: str | None, imei: str
) -> None:
    """Tell the breakers what an unreadable history says of the platform.

    Args:
        error: why it cannot be read.
        permit: of the histories' breaker.
        breakers: of requests.
        product: whose device it is.
        imei: the device.
    """
    reason = f"the command history: {error}"
    if error.is_throttled:
        permit.record_throttling(reason, error.retry_after_s)
        breakers.hold(product, reason, error.retry_after_s)
    elif error.is_outage:
        permit.record_failure(reason, error.retry_after_s)
    elif error.is_refused:
        permit.record_failure(reason, device=imei)
