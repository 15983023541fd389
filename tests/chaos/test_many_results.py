"""As many commands outstanding as a large deployment has: their calls, and the worker's memory."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.deployment import Deployment
from tests.support.outstanding import deployment_with_results, look_up_twice, record_calls

MOST_MORE_MIB = 30  # held at once: if all were, the larger number would take 60 MiB more


@pytest.fixture
def deployment(broker_url: str, tmp_path: Path) -> Iterator[Deployment]:
    with deployment_with_results(broker_url, tmp_path) as found:
        yield found


def test_many_outstanding_commands_cost_a_call_for_each_device_and_no_memory(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = record_calls(monkeypatch)
    few = look_up_twice(deployment, calls, 1_000, 100)
    deployment.simulator.platform.clear()
    many = look_up_twice(deployment, calls, 20_000, 2_000)
    print(f"peak of the worker: {few:.1f} MiB with 1,000 outstanding, {many:.1f} MiB with 20,000")
    assert many - few < MOST_MORE_MIB
