"""Every input that failed once holds, and new ones near it do: ``make fuzz`` takes more time for the same."""

from collections.abc import Iterator

import pytest

from tests.fuzz.__main__ import TARGETS
from tests.fuzz.target import Check, Servers, Target, fuzz, run_corpus

SECONDS = 1.0  # for new inputs; it ends the search for a failure, and none found is a pass


@pytest.fixture(scope="module", params=[*TARGETS.values()], ids=[*TARGETS])
def target(request: pytest.FixtureRequest) -> Target:
    found: Target = request.param
    return found


@pytest.fixture(scope="module")
def check(target: Target, request: pytest.FixtureRequest) -> Iterator[Check]:
    servers = Servers(
        lambda: str(request.getfixturevalue("broker_url")), lambda: str(request.getfixturevalue("redis_url"))
    )
    with target.open(servers) as opened:
        yield opened


@pytest.mark.xdist_group("fuzz")
def test_every_input_of_the_corpus_holds(target: Target, check: Check) -> None:
    for failure in run_corpus(target, check):
        failure.error.add_note(f"the input is in {failure.file}")
        raise failure.error


@pytest.mark.xdist_group("fuzz")
def test_new_inputs_hold(target: Target, check: Check) -> None:
    _, failure = fuzz(target, check, SECONDS, seed_of_run=18)
    assert failure is None, failure
