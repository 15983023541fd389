"""A misspelt setting is said by every command, and logged by a worker."""

from pathlib import Path

import pytest

from tests.support.command_line import TARGET_OPTIONS, run_cli
from tests.support.deployment import Deployment
from worker.dev.services.ports import free_port


@pytest.mark.parametrize(
    "arguments", [("topology", "--json"), ("topology",), ("send", *TARGET_OPTIONS), ("dead-letters", "list")]
)
def test_commands_say_it_on_stderr(arguments: tuple[str, ...], tmp_path: Path) -> None:
    settings = {"AMQP_URL": f"amqp://127.0.0.1:{free_port()}/", "ONENET_API_KEY": "k", "WORKER_NAMESPCE": "aSecret"}
    result = run_cli(*arguments, folder=tmp_path, **settings)
    note, *_ = result.stderr.splitlines()
    assert note == (
        "onenet-worker: WORKER_NAMESPCE: is not a setting, and has no effect (the environment): "
        "did you mean WORKER_NAMESPACE?"
    )
    assert "NAMESPCE" not in result.stdout
    assert "aSecret" not in result.stdout + result.stderr


def test_a_worker_that_cannot_start_says_it_too(tmp_path: Path) -> None:
    """The misspelt setting may be the one that is missing."""
    result = run_cli("run", folder=tmp_path, ONENET_APIKEY="aSecret")
    assert result.returncode == 78
    said, missing = result.stderr.splitlines()
    assert "did you mean ONENET_API_KEY?" in said
    assert "ONENET_API_KEY: not set" in missing
    assert "aSecret" not in result.stderr


def test_a_worker_logs_each_when_it_starts(deployment: Deployment) -> None:
    with deployment.worker(WORKER_CONCURENCY="aSecret", CONSOLE_PORT="1") as worker:
        said = [line for line in worker.events if line["event"] == "setting_unknown"]
        assert {(line["level"], line["name"], line["suggestion"]) for line in said} == {
            ("warning", "WORKER_CONCURENCY", "WORKER_CONCURRENCY"),
            ("warning", "CONSOLE_PORT", None),
        }
        assert "aSecret" not in worker.process.output.read_text()
