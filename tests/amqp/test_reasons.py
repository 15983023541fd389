"""Why a connection to the broker was lost, in words for people."""

import pytest
from pika.exceptions import AMQPHeartbeatTimeout, StreamLostError

from worker.amqp.connection import reason_of


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            StreamLostError("Stream connection lost: ConnectionResetError(104, 'Connection reset by peer')"),
            "the connection was reset by the other side",
        ),
        (
            StreamLostError("Stream connection lost: BrokenPipeError(32, 'Broken pipe')"),
            "the connection was closed by the other side",
        ),
        (StreamLostError("Transport indicated EOF"), "the other side closed the connection"),
        (AMQPHeartbeatTimeout("no activity"), "missed heartbeats: the broker did not answer in time"),
    ],
    ids=["reset", "broken pipe", "end", "heartbeats"],
)
def test_the_reason_of_a_lost_connection_is_in_plain_words(error: Exception, reason: str) -> None:
    assert reason_of(error) == reason


def test_an_error_of_the_program_that_ended_a_connection_is_named() -> None:
    """Nobody would find it otherwise."""
    error = StreamLostError("Stream connection lost: KeyError('execute')")
    assert reason_of(error) == "an error that was not expected: KeyError('execute')"
