"""What the broker refuses, in words for people: with neither its user nor its vhost, in any version of the broker."""

import pytest

from worker.amqp.refusals import refusal

OTHER = "PRECONDITION_FAILED - inequivalent arg"
NONE = "but current is none"
UPGRADES = 'see "Upgrades" in docs/operations.md (406 PRECONDITION_FAILED)'


@pytest.mark.parametrize(
    ("code", "text", "words"),
    [
        (403, "ACCESS_REFUSED - access to exchange 'x' in vhost 'S3' refused for user 'S3'",
         "this user has no right to use the exchange x (403 ACCESS_REFUSED)"),
        (403, "ACCESS_REFUSED - configure access to queue 'q' in vhost 'S3'S3' refused for user 'S3'cret' by backend b",
         "this user has no right to configure the queue q (403 ACCESS_REFUSED)"),
        (403, "ACCESS_REFUSED - write access to topic 'k' in exchange 'x' in vhost 'S3' refused for user 'S3'",
         "this user has no right to write the routing key k of exchange x (403 ACCESS_REFUSED)"),
        (404, "NOT_FOUND - no queue 'q' in vhost 'S3'", "the queue q does not exist (404 NOT_FOUND)"),
        (404, "NOT_FOUND - no exchange 'x' in vhost 'S3' or 'S3'", "the exchange x does not exist (404 NOT_FOUND)"),
        (405, "RESOURCE_LOCKED - cannot obtain exclusive access to locked queue 'q' in vhost 'S3'. It could be",
         "another connection holds the queue q for itself (405 RESOURCE_LOCKED)"),
        (406, f"{OTHER} 'x-delivery-limit' for queue 'q' in vhost 'S3': received the value '20' of type 'long' {NONE}",
         f"the queue q exists with another x-delivery-limit: none, and not 20: {UPGRADES}"),
        (406, f"{OTHER} 'type' for exchange 'x' in vhost 'S3': received 'direct' but current is 'topic'",
         f"the exchange x exists with another type: topic, and not direct: {UPGRADES}"),
        (530, "NOT_ALLOWED - vhost S3 cret not found", "the vhost of AMQP_URL does not exist (530 NOT_ALLOWED)"),
        (530, "NOT_ALLOWED - access to vhost 'S3' refused for user 'S3'",
         "this user has no permissions in the vhost of AMQP_URL (530 NOT_ALLOWED)"),
        (530, "NOT_ALLOWED - access to vhost 'S3' refused for user 'S3': connection limit (1) is reached",
         "the broker's limit of connections is reached (530 NOT_ALLOWED)"),
        (541, "INTERNAL_ERROR - access to vhost 'S3' refused for user 'S3': vhost 'S3' is down",
         "the vhost of AMQP_URL is down on this node (541 INTERNAL_ERROR)"),
        (320, "CONNECTION_FORCED - broker forced connection closure with reason 'shutdown'",
         "the broker says: broker forced connection closure with reason 'shutdown' (320 CONNECTION_FORCED)"),
        (406, "PRECONDITION_FAILED - user_id property set to 'x' but authenticated user was 'S3cret'",
         "the broker says: user_id property set to 'x' but authenticated (406 PRECONDITION_FAILED)"),
        (540, "NOT_IMPLEMENTED - no queue in vhost 'S3', said user 'S3'",
         "the broker says: no queue (540 NOT_IMPLEMENTED)"),
        (500, "what", "the broker says: what (500)"),
        (500, "", "the broker says: nothing (500)"),
    ],
)  # fmt: skip
def test_a_refusal_is_said_in_words_for_people(code: int, text: str, words: str) -> None:
    assert refusal(code, text) == words
