"""How pytest-xdist shares the tests among its processes."""

import os

import pytest


@pytest.mark.xdist_group("group")
def test_the_tests_of_a_group_run_in_one_process(request: pytest.FixtureRequest) -> None:
    """Otherwise each process plays the whole table of crash points: pytest-xdist 3.8 ignored groups with pytest 9.2.

    Tests of a group are those that pytest-xdist has renamed so.
    """
    is_alone = "PYTEST_XDIST_WORKER" not in os.environ
    assert is_alone or request.node.nodeid.endswith("@group")
