"""Which dead letters are meant by ids, digests, their beginnings, and limits."""

from collections.abc import Sequence
from datetime import UTC, datetime

import pytest

from tests.support.a_dead_letter import a_dead_letter
from worker.dead_letters.letter import DeadLetter, Filter
from worker.dead_letters.selection import Choice, Selected, Selection, ShortDigests
from worker.errors import WorkerError

NOW = datetime(2026, 8, 5, 12, tzinfo=UTC)
ONE, TWO = "8f6c0a52-1", "8f6c1111-2"
LETTERS = [a_dead_letter(command_id=name) for name in (ONE, TWO, "8f6c", "short")]
SAME_ID = [a_dead_letter(reason, command_id=ONE) for reason in ("expired", "outcome_unknown")]
INVALID = a_dead_letter("invalid_message", body=b"no JSON")


def select(
    letters: Sequence[DeadLetter], *names: str, limit: int | None = None, is_newest_first: bool = False
) -> Selected[DeadLetter]:
    selection = Selection[DeadLetter](Choice(frozenset(names)), NOW, limit, is_newest_first=is_newest_first)
    for letter in letters:
        if selection.wants(letter):
            selection.hold(letter)
    return selection.result()


def test_without_names_all_are_selected_up_to_the_limit_and_all_are_counted() -> None:
    assert select(LETTERS).kept == tuple(LETTERS)
    oldest, newest = select(LETTERS, limit=2), select(LETTERS, limit=2, is_newest_first=True)
    assert (oldest.kept, oldest.matching) == (tuple(LETTERS[:2]), 4)
    assert (newest.kept, newest.matching) == ((LETTERS[3], LETTERS[2]), 4)


def test_an_id_selects_all_its_dead_letters_and_a_digest_one() -> None:
    letters = [*SAME_ID, *LETTERS[1:]]
    assert select(letters, ONE).kept == tuple(SAME_ID)
    assert select(letters, "8f6c0").kept == tuple(SAME_ID)
    assert select(letters, SAME_ID[1].digest).kept == (SAME_ID[1],)
    assert select(letters, SAME_ID[1].digest[:8]).kept == (SAME_ID[1],)
    limited = select(letters, ONE, "short", limit=2)
    assert (limited.kept, limited.matching) == (tuple(SAME_ID), 3)


def test_a_dead_letter_without_an_id_is_selected_by_its_digest() -> None:
    assert select([*LETTERS, INVALID], INVALID.digest[:8]).kept == (INVALID,)


def test_a_whole_id_counts_before_the_beginning_of_others() -> None:
    assert select(LETTERS, "8f6c").kept == (LETTERS[2],)


def test_the_beginning_of_several_ids_selects_none_and_lists_them() -> None:
    with pytest.raises(WorkerError, match=f"8f6c is the beginning of {ONE}, {TWO}: give more of it"):
        select(LETTERS[:2], "8f6c")
    many = [a_dead_letter(command_id=f"many-{number}") for number in range(30)]
    with pytest.raises(WorkerError, match="many-0, many-1, many-2, many-3, many-4 and 25 more dead letters"):
        select(many, "many-")


def test_only_what_may_be_selected_is_held_while_a_beginning_is_ambiguous() -> None:
    """Thousands of ids may have it, with bodies of 64 KiB."""
    selection = Selection[DeadLetter](Choice(frozenset({"many-"})), NOW)
    wanted = [selection.wants(a_dead_letter(command_id=f"many-{number}")) for number in range(5)]
    assert wanted == [True, False, False, False, False]


@pytest.mark.parametrize("name", ["sho", "nothing", ""])
def test_too_short_a_beginning_and_an_unknown_name_are_missing(name: str) -> None:
    """An empty name, such as that of an unset variable, would be the beginning of all."""
    assert select(LETTERS, name).missing == (name,)
    assert select(LETTERS, name).kept == ()


def test_names_are_looked_for_among_what_meets_the_conditions() -> None:
    choice = Choice(frozenset({ONE}), Filter(reasons=frozenset({"expired"})))
    selection = Selection[DeadLetter](choice, NOW)
    assert [selection.wants(letter) for letter in SAME_ID] == [True, False]


def test_a_digest_is_shown_as_long_as_it_needs_to_be() -> None:
    short = ShortDigests()
    for digest in ("12345678aa", "12345678ab", "87654321aa", "87654321aa"):
        short.add(digest)
    assert [short(each) for each in ("12345678aa", "12345678ab", "87654321aa")] == [
        "12345678aa", "12345678ab", "87654321",
    ]  # fmt: skip
