"""Which uuid of a history is assigned to a command in doubt: every rule as a row of a table."""

from collections.abc import Mapping, Sequence

import pytest

from worker.core.ownership import (
    Ambiguous,
    Assigned,
    Assignment,
    LookalikeInProgress,
    NoCandidate,
    Owner,
    OwnershipFacts,
    assign_uuid,
)

FREE = None
MINE, MINE_GUESSED = Owner("a", is_certain=True), Owner("a", is_certain=False)
OTHER, OTHER_GUESSED = Owner("b", is_certain=True), Owner("b", is_certain=False)
UNNAMED = Owner(None, is_certain=True)  # another command whose id the store no longer has
UNREADABLE = Owner(None, is_certain=False)

Owners = Mapping[str, Owner | None]

# (likely entries, unlikely entries, number of lookalikes, expected assignment)
NO_LOOKALIKE_HELD: list[tuple[Owners, Owners, int, Assignment]] = [
    # Every entry belongs to another command for certain: the command was not cached.
    ({}, {}, 0, NoCandidate()),
    ({}, {}, 3, NoCandidate()),
    ({"1": OTHER}, {}, 0, NoCandidate()),
    ({"1": UNNAMED}, {"2": OTHER}, 1, NoCandidate()),
    ({}, {"1": OTHER}, 0, NoCandidate()),
    # An owner that is a guess, or cannot be read, proves nothing.
    ({"1": OTHER_GUESSED}, {}, 0, Ambiguous()),
    ({"1": OTHER, "2": OTHER_GUESSED}, {}, 0, Ambiguous()),
    ({"1": OTHER}, {"2": OTHER_GUESSED}, 0, Ambiguous()),
    ({"1": UNREADABLE}, {}, 0, Ambiguous()),
    ({}, {"1": UNREADABLE}, 0, Ambiguous()),
    # One entry without an owner is the command's own, whatever belongs to others.
    ({"1": FREE}, {}, 0, Assigned("1", is_guess=False)),
    ({"1": FREE}, {}, 2, Assigned("1", is_guess=False)),
    ({"1": OTHER, "2": FREE}, {}, 0, Assigned("2", is_guess=False)),
    ({"1": FREE}, {"2": OTHER}, 0, Assigned("1", is_guess=False)),
    ({"1": OTHER_GUESSED, "2": FREE}, {}, 0, Assigned("2", is_guess=False)),
    ({"1": FREE}, {"2": UNREADABLE}, 0, Assigned("1", is_guess=False)),
    # Each entry without an owner must be explained by a command on record; which is whose remains a guess.
    ({"1": FREE, "2": FREE}, {}, 0, Ambiguous()),
    ({"1": FREE, "2": FREE}, {}, 1, Assigned("1", is_guess=True)),
    ({"1": FREE, "2": FREE, "3": FREE}, {}, 1, Ambiguous()),
    ({"1": FREE, "2": FREE, "3": FREE}, {}, 2, Assigned("1", is_guess=True)),
    ({"1": FREE}, {"2": FREE}, 0, Ambiguous()),
    ({"1": FREE}, {"2": FREE}, 1, Assigned("1", is_guess=True)),
    # An entry with an unlikely time is never assigned, not even if it is recorded for the command.
    ({}, {"1": FREE}, 0, Ambiguous()),
    ({}, {"1": FREE}, 5, Ambiguous()),
    ({"1": OTHER}, {"2": FREE}, 1, Ambiguous()),
    ({}, {"1": MINE}, 1, Ambiguous()),
    # The entry that is recorded for the command comes before those without an owner, and stays as certain as it is.
    ({"1": MINE}, {}, 0, Assigned("1", is_guess=False)),
    ({"1": MINE_GUESSED}, {}, 0, Assigned("1", is_guess=True)),
    ({"1": FREE, "2": MINE}, {}, 1, Assigned("2", is_guess=False)),
    ({"1": FREE, "2": MINE_GUESSED}, {}, 1, Assigned("2", is_guess=True)),
    ({"1": OTHER, "2": MINE}, {"3": FREE}, 1, Assigned("2", is_guess=False)),
    ({"1": FREE}, {"2": MINE}, 1, Assigned("1", is_guess=True)),
    ({"1": MINE, "2": FREE}, {}, 0, Ambiguous()),
]


@pytest.mark.parametrize(("likely", "unlikely", "lookalikes", "expected"), NO_LOOKALIKE_HELD)
def test_a_uuid_is_assigned_by_its_owner_and_the_number_of_lookalikes(
    likely: Owners, unlikely: Owners, lookalikes: int, expected: Assignment
) -> None:
    facts = OwnershipFacts({**likely, **unlikely}, lookalikes, is_lookalike_held=False)
    assert assign_uuid("a", list(likely), list(unlikely), facts) == expected


@pytest.mark.parametrize(("likely", "unlikely", "lookalikes", "expected"), NO_LOOKALIKE_HELD)
def test_no_entry_is_assigned_while_a_lookalike_is_held_and_an_entry_has_no_owner(
    likely: Owners, unlikely: Owners, lookalikes: int, expected: Assignment
) -> None:
    """Its request may have caused the entry, and its answer be about to arrive."""
    facts = OwnershipFacts({**likely, **unlikely}, lookalikes, is_lookalike_held=True)
    is_available = any(owner in {FREE, MINE, MINE_GUESSED} for owner in facts.owners.values())
    assignment = assign_uuid("a", list(likely), list(unlikely), facts)
    assert assignment == (LookalikeInProgress() if is_available else expected)


@pytest.mark.parametrize("likely", [["1", "2", "3"], ["3", "1", "2"]])
def test_the_best_match_is_assigned_first(likely: Sequence[str]) -> None:
    facts = OwnershipFacts(dict.fromkeys(likely), 2, is_lookalike_held=False)
    assert assign_uuid("a", likely, [], facts) == Assigned(likely[0], is_guess=True)
