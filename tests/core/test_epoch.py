"""What a store may have lost, by its epoch."""

from datetime import UTC, datetime, timedelta

import pytest

from worker.core.claims import Key, Lease, Loss
from worker.core.epoch import LONG_TTL_S, REDELIVERED_S, Epoch, Retention

BEGAN = datetime(2026, 8, 5, 12, tzinfo=UTC)
LEASE = Lease(Key("a", b"", b""), 1, 0.0, "a")
SETTLED_S = 40 + 60


@pytest.mark.parametrize(
    ("follows_loss", "age_s", "ttl_s", "expected"),
    [
        (True, 0, LONG_TTL_S, Loss.ANY),
        (True, SETTLED_S - 1, LONG_TTL_S, Loss.ANY),
        (True, SETTLED_S, LONG_TTL_S, Loss.OF_REDELIVERIES),
        (True, REDELIVERED_S - 1, LONG_TTL_S, Loss.OF_REDELIVERIES),
        (True, REDELIVERED_S, LONG_TTL_S, Loss.NONE),
        (False, 0, LONG_TTL_S, Loss.OF_REDELIVERIES),
        (False, REDELIVERED_S - 1, LONG_TTL_S, Loss.OF_REDELIVERIES),
        (False, REDELIVERED_S, LONG_TTL_S, Loss.NONE),
        (False, REDELIVERED_S, LONG_TTL_S - 1, Loss.OF_REDELIVERIES),  # the record may have expired
    ],
)
def test_which_deliveries_may_miss_their_record(follows_loss: bool, age_s: float, ttl_s: float, expected: Loss) -> None:
    now = BEGAN + timedelta(seconds=age_s)
    assert Epoch(BEGAN, follows_loss).unseen(LEASE, now, Retention(40, 60, ttl_s)).loss is expected


@pytest.mark.parametrize(("follows_loss", "expected_s"), [(True, SETTLED_S), (False, 0)])
def test_copies_of_what_arrived_before_an_epoch_had_settled_may_miss_their_record(
    follows_loss: bool, expected_s: float
) -> None:
    claim = Epoch(BEGAN, follows_loss).unseen(LEASE, BEGAN + timedelta(days=1), Retention(40, 60, LONG_TTL_S))
    assert claim.forgotten_before == BEGAN + timedelta(seconds=expected_s)


@pytest.mark.parametrize(
    ("follows_loss", "age_s", "expected_s"), [(True, 0, 40), (True, 41, 41), (False, 0, 40), (False, 41, 41)]
)
def test_a_lease_that_was_lost_may_still_have_been_used_until_its_end(
    follows_loss: bool, age_s: float, expected_s: float
) -> None:
    now = BEGAN + timedelta(seconds=age_s)
    until = Epoch(BEGAN, follows_loss).unrecorded_until(now, Retention(40, 60, LONG_TTL_S))
    assert until == BEGAN + timedelta(seconds=expected_s)
