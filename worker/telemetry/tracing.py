"""Spans of what is done with a command, for those who follow it across systems; without the extra ``otel``, none.

Names and attributes follow OpenTelemetry's conventions.
Source: https://opentelemetry.io/docs/specs/semconv/messaging/messaging-spans/
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

Answered = Callable[[int], object]
"""Is told an answer's HTTP status."""
Consuming = AbstractContextManager[object]
Requesting = AbstractContextManager[Answered]
Publishing = tuple[Mapping[str, str], Callable[[], object]]


class Tracing(Protocol):
    """Makes spans; what is made within ``consuming`` belongs to the command that is handled there."""

    def consuming(self, headers: Mapping[str, object], command_id: str | None, attempt: int, /) -> Consuming:
        """Span the handling of one delivery, as a part of the trace that its headers name."""

    def requesting(self, method: str, url: str, /) -> Requesting:
        """Span one request over HTTP."""

    def publishing(self, exchange: str, routing_key: str, /) -> Publishing:
        """Begin the span of one publication; returns the headers that name it, and what ends it."""

    def close(self, timeout_s: float) -> None:
        """Hand on what has been collected, for so many seconds at most."""


class NoTracing:
    """Makes none."""

    def consuming(self, *_about: object) -> Consuming:
        return nullcontext()

    def requesting(self, *_about: object) -> Requesting:
        return nullcontext(_ignore)

    def publishing(self, *_about: object) -> Publishing:
        return {}, _do_nothing

    def close(self, timeout_s: float) -> None:
        pass


def _ignore(_status: int) -> None:
    pass


def _do_nothing() -> None:
    pass
