"""Stop sending while the platform fails: one circuit breaker for each product, for requests and for history reads.

The states are the pattern's: *closed* lets every request pass, *open* lets none pass, *half-open* lets one probe pass.
A breaker is open after too many failures in a row (the product is *paused*), after a throttled request, or while a
Retry-After of the platform lasts.
Source: https://martinfowler.com/bliki/CircuitBreaker.html
"""

import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Literal

from worker.telemetry.logs import get_logger

MAX_PROBE_INTERVAL_S = 60.0
THROTTLE_BACKOFF_S = 1.0  # after the first throttled request; doubles while requests are throttled
MAX_THROTTLE_BACKOFF_S = 60.0
MAX_RETRY_AFTER_S = 24 * 3600.0  # longer waits are an error of the platform's clock
_MIN_REFUSED_DEVICES = 2  # refusals of fewer devices may concern those devices only

Admission = Literal["granted", "probe", "denied"]
Subject = Literal["product", "history"]

_EVENTS: Mapping[Subject, tuple[str, str, str]] = {
    "product": ("product_paused", "probe_failed", "product_resumed"),
    "history": ("history_paused", "history_probe_failed", "history_resumed"),
}

log = get_logger()


class CircuitBreaker:
    """The circuit breaker of one product. Pure: times are passed in, in monotonic seconds.

    Refusals open it only if at least two devices get them: a device that does not belong to the product gets nothing
    but refusals, and must not stop the other devices.

    Args:
        product: name of the product; None for the default one.
        pause_after_failures: failures in a row that pause the product.
        probe_interval_s: seconds until the first probe; doubles after each failed probe, up to a minute.
    """

    def __init__(self, product: str | None, pause_after_failures: int, probe_interval_s: float) -> None:
        self.product = product
        self.is_paused = False
        self.failures = 0  # in a row, refusals included
        self._refusals = 0  # of these failures
        self._refused_devices: set[str] = set()  # at most _MIN_REFUSED_DEVICES of them
        self._last_failure = ""
        self._probe_at = 0.0  # while paused: when the next probe may be sent
        self._pause_after_failures = pause_after_failures
        self._first_interval_s = probe_interval_s
        self._interval_s = probe_interval_s
        self._retry_after_until = 0.0  # end of the platform's Retry-After, or of the backoff after throttling
        self._throttle_backoff_s = 0.0  # the last backoff after a throttled request
        self._throttled_at = -math.inf  # when that backoff began
        self._opened_at = 0.0
        self._is_probing = False

    @property
    def reason(self) -> str:
        """Why nothing passes; only meaningful while nothing does."""
        if self.is_paused:
            return f"{self.failures} failures in a row, the latest: {self._last_failure}"
        return self._last_failure

    @property
    def needs_success(self) -> bool:
        """Whether ``record_success`` would change anything."""
        return self.failures > 0 or self._throttle_backoff_s > 0

    def allows(self, now: float) -> bool:
        """Tell whether the breaker is closed: requests pass, not only a probe."""
        return not self.is_paused and now >= self._retry_after_until

    def try_acquire(self, now: float) -> Admission:
        """Decide whether a request passes, and whether it is the probe; a probe must be released."""
        if now < self._retry_after_until:
            return "denied"
        if not self.is_paused:
            return "granted"
        if self._is_probing or now < self._probe_at:
            return "denied"
        self._is_probing = True
        return "probe"

    def release_probe(self) -> None:
        """Allow the next probe when it is due: at once if this one recorded neither success nor failure."""
        self._is_probing = False

    def record_success(self) -> None:
        """Close the breaker after a clear answer of the platform, accepted or rejected.

        A Retry-After that the platform asked for still runs to its end.
        """
        self.failures = self._refusals = 0
        self._refused_devices.clear()
        self._throttle_backoff_s = 0.0
        self.is_paused = False

    def record_failure(
        self,
        reason: str,
        now: float,
        *,
        is_probe: bool = False,
        retry_after_s: float = 0,
        refused_device: str | None = None,
    ) -> None:
        """Count a failure of the platform.

        Args:
            reason: what happened.
            now: the time.
            is_probe: the probe failed.
            retry_after_s: the wait in seconds that the platform asked for; 0: none.
            refused_device: the device whose request was refused; None: the failure is no refusal.
        """
        was_open = not self.allows(now)
        self.failures += 1
        self._last_failure = reason
        if refused_device is not None:
            self._refusals += 1
            if len(self._refused_devices) < _MIN_REFUSED_DEVICES:
                self._refused_devices.add(refused_device)
        if retry_after_s:
            self._wait(retry_after_s, now)
        if self.is_paused and is_probe:
            self._interval_s = min(2 * self._interval_s, max(MAX_PROBE_INTERVAL_S, self._first_interval_s))
            self._probe_at = now + self._interval_s
        elif not self.is_paused and self._counted_failures >= self._pause_after_failures:
            self.is_paused = True
            self._interval_s = self._first_interval_s
            self._probe_at = now + self._interval_s
        if not was_open:
            self._opened_at = now

    def record_throttling(self, reason: str, now: float, *, since: float, retry_after_s: float = 0) -> None:
        """Open the breaker after a throttled request, for longer each time until a request succeeds.

        Args:
            reason: the platform's words.
            now: the time.
            since: when the request began. Requests that were in flight together count once: one that began before the
                current backoff does not prolong it.
            retry_after_s: the wait in seconds that the platform asked for; 0: none.
        """
        was_open = not self.allows(now)
        self._last_failure = reason
        if since > self._throttled_at:
            self._throttle_backoff_s = min(2 * self._throttle_backoff_s, MAX_THROTTLE_BACKOFF_S) or THROTTLE_BACKOFF_S
            self._throttled_at = now
            self._retry_after_until = max(self._retry_after_until, now + self._throttle_backoff_s)
        if retry_after_s:
            self._wait(retry_after_s, now)
        if not was_open:
            self._opened_at = now

    def reset(self, now: float) -> None:
        """Allow the next probe at once, because something changed that may end the failures."""
        self._retry_after_until = now
        self._throttle_backoff_s = 0.0
        self._probe_at = now

    def retry_at(self) -> float:
        """Return when the next request, or the next probe, may be sent."""
        return max(self._retry_after_until, self._probe_at if self.is_paused else 0.0)

    def retry_in_s(self, now: float) -> float:
        """Return the seconds until the next request may be sent; at least one interval while a probe is in flight."""
        return max(0.0, self.retry_at() - now, self._first_interval_s if self._is_probing else 0.0)

    def suggested_delay_s(self, now: float) -> float:
        """Suggest a delay: until the next probe, or the length of the outage so far, whichever is longer."""
        return 0.0 if self.allows(now) else max(self.retry_at() - now, now - self._opened_at)

    @property
    def _counted_failures(self) -> int:
        """The failures that count towards a pause.

        While only one device is refused, its refusals count as one, and only if there are other failures too.
        """
        if len(self._refused_devices) >= _MIN_REFUSED_DEVICES:
            return self.failures
        others = self.failures - self._refusals
        return others + min(self._refusals, 1) if others else 0

    def _wait(self, retry_after_s: float, now: float) -> None:
        self._retry_after_until = max(self._retry_after_until, now + min(retry_after_s, MAX_RETRY_AFTER_S))
        self._last_failure += f", which asked for a wait of {retry_after_s:g} s"


class Permit:
    """The permission to send one command's requests, and the place to record what became of them."""

    def __init__(
        self, breakers: "CircuitBreakers", breaker: CircuitBreaker, *, is_probe: bool, acquired_at: float
    ) -> None:
        self._breakers = breakers
        self._breaker = breaker
        self._is_probe = is_probe
        self._acquired_at = acquired_at

    @property
    def is_paused(self) -> bool:
        """Whether the product is paused now, so that a failed request uses up no attempt."""
        return self._breaker.is_paused

    def record_success(self) -> None:
        """Record that the platform gave a clear answer, accepted or rejected."""
        if self._breaker.needs_success:
            self._breakers.record_success(self._breaker)

    def record_failure(self, reason: str, retry_after_s: float | None = None) -> None:
        """Record that the platform was unreachable, did not answer or reported an error of its own.

        Args:
            reason: what happened.
            retry_after_s: the wait in seconds that the platform asked for, if any.
        """
        self._breakers.record_failure(self._breaker, reason, retry_after_s or 0.0, is_probe=self._is_probe)

    def record_refusal(self, reason: str, device: str) -> None:
        """Record that a request was refused for a reason that may concern all devices.

        Args:
            reason: what was refused.
            device: the IMEI of the request.
        """
        self._breakers.record_failure(self._breaker, reason, 0.0, is_probe=self._is_probe, refused_device=device)

    def record_throttling(self, reason: str, retry_after_s: float | None = None) -> None:
        """Record that the platform throttled the request.

        Args:
            reason: the platform's words.
            retry_after_s: the wait in seconds that the platform asked for, if any.
        """
        self._breakers.record_throttling(self._breaker.product, reason, self._acquired_at, retry_after_s or 0.0)

    def release(self) -> None:
        """Give the permit back, once the command is processed or will send nothing more. May be called repeatedly."""
        if self._is_probe:
            self._is_probe = False
            self._breakers.release_probe(self._breaker)


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
        self._pause_after_failures = pause_after_failures
        self._probe_interval_s = probe_interval_s
        self._clock = clock
        self._paused_event, self._probe_failed_event, self._resumed_event = _EVENTS[subject]
        self._breakers = {product: self._new_breaker(product) for product in products}

    def replace(self, products: Collection[str | None], changed: Collection[str | None]) -> None:
        """Replace the set of products; paused products among ``changed`` are probed at once."""
        self._breakers = {product: self._breakers.get(product) or self._new_breaker(product) for product in products}
        for product in changed:
            self._breakers[product].reset(self._clock())
        self.on_change()

    def try_acquire(self, product: str | None) -> Permit | None:
        """Return a permit to send a product's command, which must be released, or None while nothing may be sent."""
        breaker = self._breakers.get(product) or self._new_breaker(product)  # the product was removed meanwhile
        now = self._clock()
        admission = breaker.try_acquire(now)
        return None if admission == "denied" else Permit(self, breaker, is_probe=admission == "probe", acquired_at=now)

    def allows(self, product: str | None) -> bool:
        """Tell whether a product's commands may be sent, not only a probe; False for an unknown product."""
        breaker = self._breakers.get(product)
        return breaker is not None and breaker.allows(self._clock())

    def allows_any(self) -> bool:
        """Tell whether the commands of at least one product may be sent."""
        now = self._clock()
        return any(breaker.allows(now) for breaker in self._breakers.values())

    def paused(self) -> dict[str | None, bool]:
        """Return for each product whether its commands are held back."""
        now = self._clock()
        return {product: not breaker.allows(now) for product, breaker in self._breakers.items()}

    def retry_in_s(self) -> float:
        """Return the seconds until a request of any product may be sent; 0: one may be sent now."""
        now = self._clock()
        return min(breaker.retry_in_s(now) for breaker in self._breakers.values())

    def suggested_delay_s(self, product: str | None) -> float:
        """Suggest how long to delay a product's command, in seconds; 0 if it may be sent now."""
        breaker = self._breakers.get(product)
        return 0.0 if breaker is None else breaker.suggested_delay_s(self._clock())

    def reason(self) -> str:
        """Return why no product's commands may be sent."""
        return "; ".join(dict.fromkeys(breaker.reason for breaker in self._breakers.values()))

    def reason_of(self, product: str | None) -> str:
        """Return why a product's commands may not be sent."""
        breaker = self._breakers.get(product)
        return "" if breaker is None else breaker.reason

    def why_paused(self, product: str | None) -> str:
        """Return why nothing of a product is sent, as the reason of a postponement."""
        return f"nothing is sent for now: {self.reason_of(product)}"

    def hold(self, product: str | None, reason: str, retry_after_s: float | None) -> None:
        """Send nothing of a product until a Retry-After ends that the platform gave to another kind of request."""
        if retry_after_s:
            self.record_throttling(product, reason, -math.inf, retry_after_s)

    def record_success(self, breaker: CircuitBreaker) -> None:
        """Record a clear answer; see ``Permit.record_success``."""
        was_paused = breaker.is_paused
        breaker.record_success()
        if was_paused:
            log.info(self._resumed_event, product=breaker.product)
            self.on_change()

    def record_failure(
        self,
        breaker: CircuitBreaker,
        reason: str,
        retry_after_s: float,
        *,
        is_probe: bool,
        refused_device: str | None = None,
    ) -> None:
        """Record a failure; see ``Permit.record_failure`` and ``Permit.record_refusal``."""
        now = self._clock()
        allowed, was_paused = breaker.allows(now), breaker.is_paused
        breaker.record_failure(
            reason, now, is_probe=is_probe, retry_after_s=retry_after_s, refused_device=refused_device
        )
        has_opened, fields = allowed and not breaker.allows(now), _log_fields(breaker, now)
        if is_probe and was_paused:
            log.warning(self._probe_failed_event, **fields)
        if has_opened:
            log.warning(self._paused_event, **fields)
            self.on_change()

    def record_throttling(self, product: str | None, reason: str, since: float, retry_after_s: float) -> None:
        """Record a throttled request that began at ``since``; see ``Permit.record_throttling``."""
        breaker = self._breakers.get(product)
        if breaker is None:  # the product was removed meanwhile
            return
        now = self._clock()
        allowed = breaker.allows(now)
        breaker.record_throttling(reason, now, since=since, retry_after_s=retry_after_s)
        has_opened, fields = allowed and not breaker.allows(now), _log_fields(breaker, now)
        if has_opened:
            log.warning(self._paused_event, **fields)
            self.on_change()

    def release_probe(self, breaker: CircuitBreaker) -> None:
        """Release a breaker's probe; see ``Permit.release``."""
        breaker.release_probe()
        self.on_change()

    def _new_breaker(self, product: str | None) -> CircuitBreaker:
        return CircuitBreaker(product, self._pause_after_failures, self._probe_interval_s)


def _log_fields(breaker: CircuitBreaker, now: float) -> dict[str, object]:
    """Return the fields of a log line about a breaker that is open."""
    return {
        "product": breaker.product,
        "reason": breaker.reason,
        "next_try_in_s": round(breaker.retry_at() - now, 1),
    }
