"""The rules of doubt: when the window begins, grows and ends."""

from datetime import UTC, datetime, timedelta

import pytest

from worker.core.answer import Answer, Cached, InDoubt, NotSent, Refused
from worker.core.claims import Key, KnownNotSent, Lease, Loss, Unresolved, Unseen
from worker.core.doubt import (
    doubt_after_answer,
    doubt_after_claim,
    doubt_of_copy,
    doubt_while_in_progress,
    doubt_while_sending,
    extended,
    holder_may_have_crashed,
)
from worker.core.doubt_window import DoubtWindow
from worker.core.envelope import Envelope, Replay

NOW = datetime(2026, 8, 5, 12, tzinfo=UTC)
EARLIER, LATER = NOW - timedelta(hours=1), NOW + timedelta(hours=1)
BEGAN = NOW - timedelta(minutes=1)  # when the process, and so its records in memory, began
LEASE = Lease(Key("a", b"", b""), 1, 0.0, "a")
NOTED = DoubtWindow(EARLIER, EARLIER)  # what the message says
RECORDED = DoubtWindow(BEGAN, BEGAN)  # what the store says

FRESH = Envelope()
REDELIVERED = Envelope(is_redelivered=True)
DOUBTED = Envelope(is_copy=True, doubt=NOTED)
SECOND_ATTEMPT = Envelope(is_copy=True, attempt=2, first_arrived_at=NOW.timestamp())
OLD_COPY = Envelope(is_copy=True, first_arrived_at=EARLIER.timestamp())
NEW_COPY = Envelope(is_copy=True, first_arrived_at=NOW.timestamp())
RETURNED = Envelope(is_copy=True, is_unstarted=True, first_arrived_at=EARLIER.timestamp())
REPLAYED = Envelope(is_copy=True, replay=Replay(EARLIER, None))
REPLAYED_FROM_THE_FUTURE = Envelope(is_copy=True, replay=Replay(LATER, None))
SUSPECTED = Envelope(is_copy=True, crash_count=0)

IN_MEMORY = Unseen(LEASE, BEGAN, forgotten_before=BEGAN)
SHARED = Unseen(LEASE, NOW, loss=Loss.NONE)
SHARED_BEFORE_LONG = Unseen(LEASE, NOW, forgotten_before=BEGAN, loss=Loss.NONE)
SHARED_BEFORE = Unseen(LEASE, NOW, forgotten_before=BEGAN, loss=Loss.OF_REDELIVERIES)
SHARED_JUST_LOST = Unseen(LEASE, NOW, forgotten_before=LATER, loss=Loss.ANY)
RELEASED, RELEASED_AND_PERHAPS_LOST = KnownNotSent(LEASE), KnownNotSent(LEASE, Loss.ANY)
RELEASED_ON_AN_UNKNOWN_SERVER = KnownNotSent(LEASE, Loss.OF_REDELIVERIES)
DOUBTFUL, CRASHED = Unresolved(LEASE, RECORDED, False), Unresolved(LEASE, RECORDED, True)
DOUBTFUL_AND_PERHAPS_LOST = Unresolved(LEASE, RECORDED, False, Loss.ANY)


@pytest.mark.parametrize(
    ("claim", "envelope", "expected"),
    [
        # Nothing is known of the command.
        (IN_MEMORY, FRESH, None),
        (SHARED, FRESH, None),
        (IN_MEMORY, REDELIVERED, DoubtWindow(None, NOW)),
        (SHARED, REDELIVERED, None),  # it was never claimed: its worker was killed before that
        (SHARED_BEFORE, REDELIVERED, DoubtWindow(None, NOW)),
        (SHARED_BEFORE, FRESH, None),
        (SHARED_JUST_LOST, REDELIVERED, DoubtWindow(None, NOW)),
        (SHARED_JUST_LOST, FRESH, DoubtWindow(None, NOW)),  # upstream may have published it again
        (SHARED_JUST_LOST, DOUBTED, DoubtWindow(EARLIER, NOW)),
        (IN_MEMORY, DOUBTED, DoubtWindow(EARLIER, BEGAN)),
        (SHARED, DOUBTED, DoubtWindow(EARLIER, NOW)),
        (IN_MEMORY, SECOND_ATTEMPT, DoubtWindow(None, BEGAN)),
        (SHARED, SECOND_ATTEMPT, DoubtWindow(None, NOW)),
        # A copy of the first attempt: its original may have been sent by a process whose memory is gone.
        (IN_MEMORY, OLD_COPY, DoubtWindow(None, BEGAN)),
        (IN_MEMORY, NEW_COPY, None),
        (IN_MEMORY, RETURNED, None),  # by a worker that stopped before it started the command
        (SHARED, OLD_COPY, None),
        (SHARED_BEFORE_LONG, OLD_COPY, DoubtWindow(None, NOW)),  # its original may have been sent before the loss
        (SHARED_BEFORE_LONG, NEW_COPY, None),
        (IN_MEMORY, Envelope(first_arrived_at=EARLIER.timestamp()), None),
        # An operator's replay may have been processed before.
        (IN_MEMORY, REPLAYED, DoubtWindow(EARLIER, NOW)),
        (SHARED, REPLAYED_FROM_THE_FUTURE, DoubtWindow(NOW, NOW)),
        # Every recorded attempt is known not to have been sent.
        (RELEASED, FRESH, None),
        (RELEASED, REDELIVERED, None),
        (RELEASED, DOUBTED, NOTED),
        (RELEASED_AND_PERHAPS_LOST, SECOND_ATTEMPT, DoubtWindow(None, NOW)),
        (RELEASED_ON_AN_UNKNOWN_SERVER, SECOND_ATTEMPT, None),
        (RELEASED_ON_AN_UNKNOWN_SERVER, REDELIVERED, DoubtWindow(None, NOW)),
        (RELEASED_AND_PERHAPS_LOST, REDELIVERED, DoubtWindow(None, NOW)),
        # An attempt ended without an outcome.
        (DOUBTFUL, FRESH, RECORDED),
        (DOUBTFUL, DOUBTED, DoubtWindow(EARLIER, BEGAN)),
        (DOUBTFUL, REDELIVERED, RECORDED),
        (DOUBTFUL_AND_PERHAPS_LOST, REDELIVERED, DoubtWindow(BEGAN, NOW)),
        (DOUBTFUL_AND_PERHAPS_LOST, FRESH, DoubtWindow(BEGAN, NOW)),
    ],
)
def test_a_claim_and_its_delivery_decide_what_is_in_doubt(
    claim: Unseen | KnownNotSent | Unresolved, envelope: Envelope, expected: DoubtWindow | None
) -> None:
    assert doubt_after_claim(claim, envelope, NOW) == expected


@pytest.mark.parametrize(
    ("claim", "envelope", "expected"),
    [
        (SHARED, FRESH, False),
        (SHARED, REDELIVERED, False),
        (SHARED_BEFORE, REDELIVERED, True),
        (SHARED_JUST_LOST, FRESH, False),
        (SHARED, SUSPECTED, True),
        (SHARED, DOUBTED, False),
        (RELEASED, REDELIVERED, False),
        (RELEASED, SUSPECTED, False),
        (RELEASED_AND_PERHAPS_LOST, REDELIVERED, True),
        (RELEASED_AND_PERHAPS_LOST, FRESH, False),
        (DOUBTFUL, REDELIVERED, False),
        (DOUBTFUL_AND_PERHAPS_LOST, REDELIVERED, True),
        (CRASHED, FRESH, True),
    ],
)
def test_a_claim_and_its_delivery_tell_whether_a_worker_may_have_crashed(
    claim: Unseen | KnownNotSent | Unresolved, envelope: Envelope, expected: bool
) -> None:
    assert holder_may_have_crashed(claim, envelope) is expected


@pytest.mark.parametrize(
    ("doubt", "answer", "expected"),
    [
        (None, NotSent("refused"), None),
        (None, Refused("onenet_rejected", "no"), None),
        (NOTED, NotSent("refused"), NOTED),
        (NOTED, Refused("onenet_rejected", "no"), NOTED),
        (None, InDoubt("timeout"), DoubtWindow(BEGAN, NOW)),
        (NOTED, InDoubt("timeout"), DoubtWindow(EARLIER, NOW)),
        (None, Cached("u"), DoubtWindow(BEGAN, NOW)),  # until the outcome is recorded
        (NOTED, Cached("u"), DoubtWindow(EARLIER, NOW)),
    ],
)
def test_a_request_adds_to_the_doubt_unless_it_is_known_not_to_have_been_cached(
    doubt: DoubtWindow | None, answer: Answer, expected: DoubtWindow | None
) -> None:
    assert doubt_after_answer(doubt, answer, BEGAN, NOW) == expected


@pytest.mark.parametrize(("doubt", "expected"), [(None, DoubtWindow(NOW, NOW)), (NOTED, DoubtWindow(EARLIER, NOW))])
def test_a_request_is_in_doubt_from_its_beginning(doubt: DoubtWindow | None, expected: DoubtWindow) -> None:
    assert doubt_while_sending(doubt, NOW) == expected


@pytest.mark.parametrize(
    ("since", "envelope", "expected"),
    [
        (BEGAN, FRESH, DoubtWindow(BEGAN, NOW)),
        (None, FRESH, DoubtWindow(None, NOW)),
        (BEGAN, DOUBTED, DoubtWindow(EARLIER, NOW)),
        (BEGAN, Envelope(is_copy=True, attempt=2), DoubtWindow(None, NOW)),
        (BEGAN, REDELIVERED, DoubtWindow(None, NOW)),
    ],
)
def test_a_command_that_another_delivery_holds_is_in_doubt_since_its_claim(
    since: datetime | None, envelope: Envelope, expected: DoubtWindow
) -> None:
    assert doubt_while_in_progress(since, envelope, NOW) == expected


@pytest.mark.parametrize(
    ("doubt", "envelope", "expected"),
    [
        (None, FRESH, None),
        (NOTED, DOUBTED, NOTED),
        (None, REDELIVERED, DoubtWindow(None, NOW)),
        (NOTED, REDELIVERED, DoubtWindow(None, NOW)),
    ],
)
def test_a_copy_of_a_redelivered_message_says_that_it_may_have_been_sent(
    doubt: DoubtWindow | None, envelope: Envelope, expected: DoubtWindow | None
) -> None:
    """The copy does not look redelivered."""
    assert doubt_of_copy(doubt, envelope, NOW) == expected


@pytest.mark.parametrize(
    ("doubt", "expected"),
    [
        (None, DoubtWindow(None, NOW)),
        (DoubtWindow(EARLIER, BEGAN), DoubtWindow(EARLIER, NOW)),
        (DoubtWindow(EARLIER, LATER), DoubtWindow(EARLIER, LATER)),
    ],
)
def test_unrecorded_attempts_move_only_the_end_of_the_window(doubt: DoubtWindow | None, expected: DoubtWindow) -> None:
    assert extended(doubt, NOW) == expected
