"""Which deliveries count as the same message, after the broker has closed a channel over a publication for one."""

from pika import BasicProperties

from worker.amqp.messages import USER_ID, Delivery
from worker.amqp.suspects import Suspects


def delivery(user_id: str, *, is_copy: bool = False, body: bytes = b"{}") -> Delivery:
    headers = {USER_ID: user_id} if is_copy else None
    properties = BasicProperties(
        message_id="1", app_id="billing", user_id=None if is_copy else user_id, headers=headers
    )
    return Delivery(1, 1, is_redelivered=False, properties=properties, body=body, is_returned=is_copy)


def test_a_suspect_is_known_by_its_copies_and_not_by_what_another_user_made_to_look_like_it() -> None:
    """Otherwise one system could have the replies to another published without their address."""
    suspects = Suspects()
    suspects.note(delivery("metering"))
    assert suspects.closures(delivery("metering", is_copy=True)) == 1
    assert suspects.closures(delivery("billing")) == 0
    assert suspects.closures(delivery("metering", body=b"[]")) == 0
