"""The rules of doubt: when the window begins within which a command may have been sent, when it grows and when it ends.

Pure functions: each returns the new window, or None where the command is known not to have been sent.
"""

from datetime import datetime

from worker.core.answer import Answer, NotSent, Refused
from worker.core.claims import KnownNotSent, Unresolved, Unseen
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
    match claim:
        case Unseen() if envelope.replay is not None:  # it may have been processed before, and its record be lost
            return DoubtWindow(min(envelope.replay.failed_at, now), now).union(doubt)
        case Unseen() if envelope.is_redelivered:
            return extended(doubt, now)
        case Unseen(_, unrecorded_until, forgotten_before) if (
            envelope.attempt > 1 or doubt is not None or is_forgotten(forgotten_before, envelope)
        ):
            return extended(doubt, unrecorded_until)
        case Unseen():
            return None
        case KnownNotSent():
            known = doubt
        case Unresolved(_, recorded):
            known = recorded.union(doubt)
    if envelope.is_redelivered and claim.unrecorded_until is not None:
        return extended(known, claim.unrecorded_until)
    return known


def is_forgotten(forgotten_before: datetime | None, envelope: Envelope) -> bool:
    """Tell whether a copy's command may have been sent before the store's records begin.

    The message that it was copied from may have been delivered again, and sent, if its worker crashed in between. A
    copy that a stopping worker returned to the queue is trusted: only two crashes, one during that stop, break this.

    Args:
        forgotten_before: when the store's records begin; None: they outlive the workers.
        envelope: what the delivery says.
    """
    if forgotten_before is None or not envelope.is_copy or envelope.is_unstarted:
        return False
    return envelope.first_arrived_at <= forgotten_before.timestamp()


def holder_may_have_crashed(claim: Unseen | KnownNotSent | Unresolved, envelope: Envelope) -> bool:
    """Tell whether an earlier attempt may have crashed its worker, as far as store and delivery know."""
    match claim:
        case Unseen():
            return envelope.is_redelivered or envelope.crash_count is not None
        case KnownNotSent(_, unrecorded_until):
            return envelope.is_redelivered and unrecorded_until is not None
        case Unresolved(_, _, holder_crashed, unrecorded_until):
            return holder_crashed or (envelope.is_redelivered and unrecorded_until is not None)


def doubt_while_in_progress(since: datetime | None, envelope: Envelope, now: datetime) -> DoubtWindow:
    """Return the doubt window of a command that another delivery holds: its copy must not depend on the record."""
    # Before a copy there was another delivery, of which the record may know nothing after a restart on ``memory://``.
    begins = since if envelope.doubt is not None or not envelope.is_copy else None
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
