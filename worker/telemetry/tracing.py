"""Tracing of commands across systems. Spans need the extra ``otel``; without it there are none.

Names and attributes follow the semantic conventions of OpenTelemetry.
Source: https://opentelemetry.io/docs/specs/semconv/messaging/messaging-spans/
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

Answered = Callable[[int], object]
"""Called with the HTTP status of the response."""
Consuming = AbstractContextManager[object]
Requesting = AbstractContextManager[Answered]
Publishing = tuple[Mapping[str, str], Callable[[], object]]


class Tracing(Protocol):
    """Creates spans; spans created within ``consuming`` are its children."""

    def consuming(self, headers: Mapping[str, str], command_id: str | None, attempt: int, /) -> Consuming:
        """Create the span of one delivery's processing, as a child of the span that the trace headers name.

        Args:
            headers: the delivery's W3C trace headers, ``traceparent`` and ``tracestate``.
            command_id: the command's id, if the delivery has one.
            attempt: the number of this attempt; the first is 1.
        """

    def requesting(self, method: str, url: str, /) -> Requesting:
        """Create the span of one HTTP request."""

    def publishing(self, exchange: str, routing_key: str, /) -> Publishing:
        """Start the span of one publication; returns its trace headers and the function that ends it."""

    def close(self, timeout_s: float) -> None:
        """Export the spans that are still buffered, waiting at most this many seconds."""


class NoTracing:
    """Creates no spans."""

    def consuming(self, *_: object) -> Consuming:
        return _NOTHING

    def requesting(self, *_: object) -> Requesting:
        return _NOTHING_ANSWERED

    def publishing(self, *_: object) -> Publishing:
        return {}, lambda: None

    def close(self, timeout_s: float) -> None:
        pass


_NOTHING = nullcontext()
_NOTHING_ANSWERED: Requesting = nullcontext(lambda _status: None)
