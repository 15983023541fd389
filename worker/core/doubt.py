"""The rules of doubt: when the window begins within which a command may have been sent, when it grows and when it ends.

Pure functions: each returns the new window, or None where the command is known not to have been sent.
"""

from datetime import datetime

from worker.core.answer import Answer, NotSent, Refused
from worker.core.claims import KnownNotSent, Loss, Unresolved, Unseen
from worker.core.doubt_window import DoubtWindow
from worker.core.envelope import Envelope


def extended(doubt: DoubtWindow | None, until: datetime) -> DoubtWindow:
    """Return a window that also covers unrecorded attempts until then; none began before a recorded window does."""
    return DoubtWindow(None, until) if doubt is None else DoubtWindow(doubt.since, max(doubt.until, until))


def doubt_after_claim(
    claim: Unseen | KnownNotSent | Unresolved, envelope: Envelope, now: datetime
) -> DoubtWindow | None:
    """Return the doubt window of a command that has just been claimed.

    Args:
        claim: what the store knows of earlier attempts.
        envelope: what the delivery says of them.
        now: the time of the claim, aware.
    """
    doubt = envelope.doubt
    if isinstance(claim, Unresolved):
        doubt = claim.doubt.union(doubt)
    if isinstance(claim, Unseen) and envelope.replay is not None:  # it may have been processed, and its record be lost
        return DoubtWindow(min(envelope.replay.failed_at, now), now).union(doubt)
    if may_be_lost(claim, envelope):
        return extended(doubt, max(now, claim.unrecorded_until or now))
    if isinstance(claim, Unseen) and (
        envelope.attempt > 1 or doubt is not None or is_forgotten(claim.forgotten_before, envelope)
    ):
        return extended(doubt, claim.unrecorded_until)
    return doubt


def may_be_lost(claim: Unseen | KnownNotSent | Unresolved, envelope: Envelope) -> bool:
    """Tell whether the store may have lost the record of an attempt at a command, later than the one that it has."""
    return claim.loss is Loss.ANY or (claim.loss is Loss.OF_REDELIVERIES and envelope.is_redelivered)


def is_forgotten(forgotten_before: datetime | None, envelope: Envelope) -> bool:
    """Tell whether a copy's command may have been sent before the store's records begin, through its twin.

    Args:
        forgotten_before: when the store's records begin; None: they outlive the workers.
        envelope: what the delivery says.
    """
    if forgotten_before is None or not envelope.may_have_twin:
        return False
    return envelope.first_arrived_at <= forgotten_before.timestamp()


def holder_may_have_crashed(claim: Unseen | KnownNotSent | Unresolved, envelope: Envelope) -> bool:
    """Tell whether an earlier attempt may have crashed its worker, as far as store and delivery know."""
    if envelope.is_redelivered and may_be_lost(claim, envelope):
        return True
    match claim:
        case Unseen():
            return envelope.crash_count is not None
        case KnownNotSent():
            return False
        case Unresolved():
            return claim.holder_crashed


def doubt_while_in_progress(since: datetime | None, envelope: Envelope, now: datetime) -> DoubtWindow:
    """Return the doubt window of a command that another delivery holds: its copy must not depend on the record.

    Before a copy, and before a redelivery, there was another delivery. Unless the message says when that was in doubt,
    nothing tells when the window begins: the record may know nothing of it, such as after a restart on ``memory://``.
    """
    is_first = not (envelope.is_copy or envelope.is_redelivered)
    begins = since if is_first or envelope.doubt is not None else None
    return DoubtWindow(begins, now).union(envelope.doubt)


def doubt_while_sending(doubt: DoubtWindow | None, began_at: datetime) -> DoubtWindow:
    """Return the doubt window from the beginning of a request on."""
    return DoubtWindow(began_at, began_at).union(doubt)


def doubt_after_answer(
    doubt: DoubtWindow | None, answer: Answer, began_at: datetime, now: datetime
) -> DoubtWindow | None:
    """Return the doubt window after the answer to a request.

    Args:
        doubt: the doubt window before the request.
        answer: what became of the request.
        began_at: when the request began, aware.
        now: the time of the answer, aware.
    """
    if isinstance(answer, NotSent | Refused):
        return doubt
    return DoubtWindow(began_at, now).union(doubt)


def doubt_of_copy(doubt: DoubtWindow | None, envelope: Envelope, now: datetime) -> DoubtWindow | None:
    """Return the doubt window for a copy: the broker does not mark a copy as redelivered."""
    return DoubtWindow(None, now).union(doubt) if envelope.is_redelivered else doubt
