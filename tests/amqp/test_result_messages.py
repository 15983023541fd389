"""In which delay queue an accepted command waits for the look at its result."""

from datetime import UTC, datetime, timedelta

import pytest
from pika import BasicProperties

from worker.amqp.messages import Delivery
from worker.amqp.result_messages import ResultMessages
from worker.amqp.topology import Topology
from worker.core.results import Awaited

NOW = datetime(2026, 11, 22, 8, 0, tzinfo=UTC)
DELAYS_S = (60, 300, 900, 3600)
MESSAGES = ResultMessages(Topology("onenet", (), DELAYS_S), DELAYS_S)
DELIVERY = Delivery(1, 1, False, BasicProperties(), b"", True)


@pytest.mark.parametrize(
    ("wait_s", "queue_s", "expiration"),
    [
        (3600, 3600, None),
        (3599.9, 3600, None),  # some time passes before it is published: not 900, 900, 900, 300, 300, 60, …
        (5000, 3600, None),
        (1400, 900, None),
        (59.5, 60, None),
        (20, 60, "20000"),
        (0, 60, "0"),
        (-5, 60, "0"),
    ],
)
def test_a_wait_is_the_longest_delay_that_is_not_too_long(wait_s: float, queue_s: int, expiration: str | None) -> None:
    awaited = Awaited(
        command_id="c",
        uuid="u",
        imei="865820030000001",
        product=None,
        accepted_at=NOW,
        expires_at=NOW + timedelta(days=1),
        last_answer_at=NOW + timedelta(days=1),
        due_at=NOW + timedelta(seconds=wait_s),
    )
    publication = MESSAGES.later(DELIVERY, awaited, NOW)
    assert publication.routing_key == f"onenet.results.{queue_s}s"
    assert publication.properties.expiration == expiration
