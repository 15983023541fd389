"""What a command loads: most commands need no part of the worker that processes commands."""

import subprocess
import sys

import pytest

LISTING = """
import sys
from worker.cli.program import app
from worker.errors import WorkerError
try:
    app(sys.argv[1:])
except (SystemExit, WorkerError):
    pass
print(*sys.modules, file=sys.stderr)
"""
OF_THE_WORKER = {"worker.app", "worker.processing", "worker.flow", "worker.onenet", "worker.idempotency", "worker.dev"}


@pytest.mark.parametrize("arguments", [("topology", "--json"), ("schema", "asyncapi"), ("dead-letters", "list")])
def test_a_command_that_processes_nothing_does_not_load_the_worker(arguments: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LISTING, *arguments],
        env={"AMQP_URL": "amqp://127.0.0.1:1/", "ONENET_API_KEY": "key"},
        capture_output=True,
        text=True,
        check=False,
    )
    loaded = set((done.stderr.splitlines() or [""])[-1].split())
    assert "worker.amqp.topology" in loaded, done.stderr
    assert not {name for name in loaded if any(f"{name}.".startswith(f"{part}.") for part in OF_THE_WORKER)}


def test_the_command_topology_prints_the_definitions_without_a_broker() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "worker", "topology", "--json"],
        env={"ONENET_API_KEY": "key"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert '"onenet.execute"' in done.stdout
