"""Decides which uuid of a device's command history belongs to a command in doubt. Pure: the store supplies the facts.

The history does not name the command that caused an entry. Commands that it cannot tell apart (lookalikes: another id,
the same match key) compete for the same entries, so an entry is assigned only if each entry without an owner can be
explained by a command on record.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Owner:
    """The command that a uuid is recorded for.

    ``owner_id``: that of its lease; None where it is not known: such an owner is never the command that asks.
    ``is_certain``: False where a lookalike could equally own the uuid, where the owner cannot be read, or where the
    uuid was recorded in a spelling that may be another uuid.
    """

    owner_id: str | None
    is_certain: bool


@dataclass(frozen=True, slots=True)
class OwnershipFacts:
    """What a store knows of the candidates of one command while that command's lease is held.

    ``owners``: per uuid its owner, None where it has none. ``lookalikes``: how many other commands with the same match
    key are held or in doubt. ``is_lookalike_held``: whether one of them is being processed right now.
    """

    owners: Mapping[str, Owner | None]
    lookalikes: int
    is_lookalike_held: bool

    def is_available(self, uuid: str, owner_id: str) -> bool:
        """Return whether a uuid has no owner, or is recorded for this command already."""
        owner = self.owners[uuid]
        return owner is None or owner.owner_id == owner_id

    def is_guess(self, uuid: str) -> bool:
        """Return whether a uuid has an owner that is not certain."""
        owner = self.owners[uuid]
        return owner is not None and not owner.is_certain


@dataclass(frozen=True, slots=True)
class Assigned:
    """The uuid is the command's own. ``is_guess``: a lookalike could equally own it."""

    uuid: str
    is_guess: bool


@dataclass(frozen=True, slots=True)
class NoCandidate:
    """Every uuid belongs to another command for certain: the command was not cached."""


@dataclass(frozen=True, slots=True)
class LookalikeInProgress:
    """A lookalike is being processed, and its request may have caused one of the entries."""


@dataclass(frozen=True, slots=True)
class Ambiguous:
    """The entries neither prove that the command was cached nor that it was not."""


Assignment = Assigned | NoCandidate | LookalikeInProgress | Ambiguous


def assign_uuid(owner_id: str, likely: Sequence[str], unlikely: Sequence[str], facts: OwnershipFacts) -> Assignment:
    """Choose which uuid of its device's history belongs to a command in doubt.

    A uuid that is recorded for the command already comes first. If a lookalike could equally own the chosen uuid, the
    assignment is a guess. A command for which only uuids with a guessed owner are left is ambiguous: it is neither
    found nor proven absent. Nothing is recorded here: the store refuses the outcome if the uuid has got another owner
    meanwhile.

    Args:
        owner_id: of the lease of the command in doubt.
        likely: uuids of the entries that match in every respect, the best match first.
        unlikely: uuids of the entries that match except for their time. None of them is ever assigned, but each without
            an owner must be explained by another command.
        facts: cover every uuid of both lists.
    """
    available = [uuid for uuid in likely if facts.is_available(uuid, owner_id)]
    unexplained = len(available) + sum(facts.is_available(uuid, owner_id) for uuid in unlikely)
    if not unexplained:
        return Ambiguous() if any(map(facts.is_guess, [*likely, *unlikely])) else NoCandidate()
    if facts.is_lookalike_held:
        return LookalikeInProgress()
    if not available or unexplained > facts.lookalikes + 1:
        return Ambiguous()
    for uuid in available:
        if facts.owners[uuid] is not None:
            return Assigned(uuid, is_guess=facts.is_guess(uuid))
    return Assigned(available[0], is_guess=unexplained > 1)
