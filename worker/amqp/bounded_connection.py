"""pika's blocking connection, which ends if the broker does not answer: pika itself waits without limit."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from pika.adapters.blocking_connection import BlockingConnection
from pika.exceptions import AMQPError

from worker.amqp.connection import CALL_S, NoAnswer

_CLOSE_S = 3  # a person waits at the terminal for the end of a connection that is of no use any more


class BoundedConnection(BlockingConnection):
    """A blocking connection whose calls wait for the broker's answer for ``CALL_S`` at most, then it is lost.

    So a queue or stream without a leader, whose node answers all else and its heartbeats, keeps nobody waiting.
    """

    _limit_s = CALL_S
    _expects_answer = True

    def process_data_events(self, time_limit: float | None = 0) -> None:
        """Process what arrives, for as long as the caller says; nothing is expected of the broker meanwhile."""
        self._expects_answer = False
        try:
            super().process_data_events(time_limit)
        finally:
            self._expects_answer = True

    def close_quietly(self) -> None:
        """Close the connection; an error, or no answer within some seconds, does not matter any more."""
        self._limit_s = _CLOSE_S
        with suppress(AMQPError):
            if self.is_open:
                self.close()

    def _flush_output(self, *waiters: Callable[[], bool]) -> None:
        pika_connection: Any = super()
        if not self._expects_answer:
            pika_connection._flush_output(*waiters)  # noqa: SLF001 - all that blocks in pika waits here
            return
        connection: Any = getattr(self, "_impl")  # noqa: B009 - pika's types do not have it
        timer = connection._adapter_call_later(  # noqa: SLF001
            self._limit_s,
            lambda: connection._terminate_stream(NoAnswer(self._limit_s)),  # noqa: SLF001 - as pika's heartbeats do
        )
        try:
            pika_connection._flush_output(*waiters)  # noqa: SLF001
        finally:
            connection._adapter_remove_timeout(timer)  # noqa: SLF001
