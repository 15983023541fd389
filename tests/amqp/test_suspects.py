"""Which deliveries count as the same message, and which replies as alike, after the broker refused one or hung."""

from pika import BasicProperties

from worker.amqp.messages import USER_ID, Delivery
from worker.amqp.suspects import HUNG_BASE_S, HUNG_CAP_S, Suspects


def delivery(user_id: str | None, *, is_copy: bool = False, body: bytes = b"{}") -> Delivery:
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


def test_a_reply_that_hung_counts_for_its_user_or_where_nobody_vouches_for_one_for_its_route() -> None:
    """Any client can set any app_id, and a client with a validated user_id can change its routing key each time."""
    suspects = Suspects()
    suspects.note_hang(delivery("metering"), "metering.1")
    assert suspects.hangs(delivery("metering", is_copy=True), "metering.2")
    assert not suspects.hangs(delivery("billing"), "metering.1")
    suspects.note_hang(delivery(None), "any.1")
    assert suspects.hangs(delivery(None, body=b"[]"), "any.1")
    assert not suspects.hangs(delivery(None), "any.2")


def test_what_hangs_again_is_put_aside_for_twice_as_long() -> None:
    now = 0.0
    suspects = Suspects(lambda: now)
    message = delivery("metering")
    for wait_s in (HUNG_BASE_S, 2 * HUNG_BASE_S, 4 * HUNG_BASE_S):
        suspects.note_hang(message, "a")
        suspects.note_hang(message, "b")  # found at the same time, it makes nothing longer
        now += wait_s - 1
        assert suspects.hangs(message, "a")
        now += 1
        assert not suspects.hangs(message, "a")
    for _ in range(10):
        suspects.note_hang(message, "a")
        now += HUNG_CAP_S
        assert not suspects.hangs(message, "a")
    now += HUNG_CAP_S + 1  # without one, it begins anew
    suspects.note_hang(message, "a")
    now += HUNG_BASE_S
    assert not suspects.hangs(message, "a")
