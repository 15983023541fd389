"""The rules for poison messages: commands that crash the worker which processes them. Pure.

Before a suspect is tried, the attempt is announced on a copy of its message, so that a crash is counted.
"""

from worker.core.doubt_window import DoubtWindow
from worker.core.envelope import Envelope
from worker.core.outcome import Failed

MAX_CRASHES = 5  # announced attempts without an outcome, after which a command is poison
MAX_HISTORY_READS = 2  # further crashes, after which not even its history is read any more
MAX_RETURNS = 10  # half of the broker's delivery limit, beyond which it dead-letters a message without a reply


def crash_count(envelope: Envelope) -> int:
    """Return how many attempts may have crashed their worker; the broker counts those that only read the history."""
    announced = envelope.crash_count or 0
    return announced + envelope.times_returned if announced >= MAX_CRASHES else announced


def is_poison(envelope: Envelope, *, holder_crashed: bool) -> bool:
    """Tell whether a command has crashed its worker too often to be sent once more."""
    return holder_crashed and crash_count(envelope) >= MAX_CRASHES


def may_read_history(envelope: Envelope, doubt: DoubtWindow | None) -> bool:
    """Tell whether reading the history is still safe before a command is given up.

    An earlier attempt may have succeeded and replied; without a stored record only the history can tell that from an
    attempt that crashed the worker.
    """
    return doubt is not None and crash_count(envelope) < MAX_CRASHES + MAX_HISTORY_READS


def is_quarantined(envelope: Envelope) -> bool:
    """Tell whether a message is returned so often that parsing it may be what crashes the workers."""
    return envelope.is_redelivered and envelope.times_returned >= MAX_RETURNS


def crash_count_of_copy(envelope: Envelope, *, holder_crashed: bool) -> int | None:
    """Return the crash count to note on a copy: None unless the command is suspected."""
    return crash_count(envelope) if holder_crashed else None


def poisoned(envelope: Envelope) -> Failed:
    """Return the outcome of a command that has crashed its worker too often."""
    return Failed("poison_message", f"the worker crashed {crash_count(envelope)} times while it processed this command")
