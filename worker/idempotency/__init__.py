"""What is remembered of a command, so that one id is one command.

A claim is one atomic step. Whoever gets ``First`` or ``Again`` holds the command until it completes or releases it.
"""

from dataclasses import dataclass
from typing import Protocol

from schemas.reply import Reply


@dataclass(frozen=True, slots=True)
class First:
    """Nothing is known of this command."""


@dataclass(frozen=True, slots=True)
class Again:
    """Every former try is known not to have been sent."""


@dataclass(frozen=True, slots=True)
class Busy:
    """Somebody holds the command."""


@dataclass(frozen=True, slots=True)
class Done:
    """The command has had its outcome: this was the reply."""

    reply: Reply


@dataclass(frozen=True, slots=True)
class Conflict:
    """The id belongs to a command with another content."""


Claim = First | Again | Busy | Done | Conflict


class Store(Protocol):
    """Remembers commands by id. Every call is atomic and may come from any thread."""

    def claim(self, command_id: str, digest: bytes) -> Claim:
        """Take hold of a command, or learn why not."""

    def complete(self, command_id: str, reply: Reply) -> None:
        """Record the outcome of a command that is held."""

    def release(self, command_id: str) -> None:
        """Let go of a command that is held, and known not to have been sent."""

    def note_unsent(self, command_id: str, digest: bytes) -> None:
        """Record that a command which nobody has claimed was taken from the queue and not sent."""
