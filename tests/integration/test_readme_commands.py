"""The commands of the README and the code of the contracts work as they say, in a folder with only the project.

What needs Docker or Java is tested in tests/containers, what ``make demo`` runs in tests/integration/test_demo.py, and
``make test`` runs this module.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from schemas.reply import EXAMPLES
from scripts.documents import ROOT
from tests.support.documents import COMMAND, PYTHON, PYTHON_CODE, REPLY, SEND, TRY
from tests.support.simulator import API_KEY, onenet
from tests.support.upstream import Upstream
from tests.support.worker_process import WorkerProcess
from worker.amqp.topology import Topology
from worker.dev.services.broker import LocalBroker
from worker.dev.services.ports import free_port
from worker.dev.services.processes import LocalProcess
from worker.settings import Settings
from worker.simulator.server import Simulator


@pytest.fixture
def simulator() -> Iterator[Simulator]:
    with onenet() as found:
        yield found


@pytest.fixture
def upstream(own_broker: LocalBroker) -> Iterator[Upstream]:
    """An upstream system in the README's namespace; never on a broker that AMQP_URL names."""
    defaults = Settings.model_construct()
    found = Upstream(own_broker.url, Topology(defaults.worker_namespace, defaults.delay_queues_s))
    yield found
    found.close()


def environment(own_broker: LocalBroker, simulator: Simulator) -> dict[str, str]:
    return {
        "AMQP_URL": own_broker.url,
        "ONENET_API_KEY": API_KEY,
        "ONENET_URL": simulator.url,
        "HTTP_PORT": str(free_port()),
    }


def shell(line: str, folder: Path, settings: dict[str, str]) -> str:
    """Run a line in a shell; returns its output."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        line, shell=True, cwd=folder, env=kept | settings, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    return done.stdout


def test_the_two_commands_to_try_are_those_that_other_tests_run() -> None:
    assert TRY == ["make demo", "make test"]


def test_a_worker_installed_as_the_readme_shows_replies_to_a_command(
    own_broker: LocalBroker, simulator: Simulator, upstream: Upstream, tmp_path: Path
) -> None:
    place = tmp_path / "clone"
    place.mkdir()
    for name in ("requirements", "schemas", "worker"):
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, place)
    settings = environment(own_broker, simulator)
    *install, export, declare, check, run = PYTHON
    for line in install:
        shell(line, place, settings)
    assert export == "export AMQP_URL=amqp://user:password@broker:5672/ ONENET_API_KEY=the-products-master-key"
    assert "declared on" in shell(declare, place, settings)
    assert "FAIL" not in shell(check, place, settings)
    program, *arguments = run.split()
    with (place / "log").open("wb") as log:
        worker = subprocess.Popen([place / program, *arguments], cwd=place, env=os.environ | settings, stdout=log)
    try:
        [send] = SEND
        assert json.loads(shell(send, place, settings))["status"] == "accepted"
    finally:
        worker.terminate()
        assert worker.wait() == 0


@pytest.fixture
def worker(own_broker: LocalBroker, simulator: Simulator, tmp_path: Path) -> Iterator[WorkerProcess]:
    found = WorkerProcess(LocalProcess(["run"], environment(own_broker, simulator), tmp_path / "worker"))
    with found:
        found.wait_for("consumer_started")
        yield found


def test_the_python_code_of_the_contracts_sends_a_command(
    own_broker: LocalBroker, upstream: Upstream, worker: WorkerProcess, tmp_path: Path
) -> None:
    upstream.bind_replies("execute.*.billing")
    (tmp_path / "publish.py").write_text(PYTHON_CODE)
    shell(f"{ROOT}/.venv/bin/python publish.py", tmp_path, {"AMQP_URL": own_broker.url})
    assert upstream.reply().routing_key == "execute.accepted.billing"
    assert worker.wait_for("command_accepted")


def test_the_command_of_the_readme_gets_the_reply_that_the_readme_shows(
    upstream: Upstream, worker: WorkerProcess
) -> None:
    upstream.bind_replies("execute.*.billing")
    upstream.publish(COMMAND, app_id="billing")
    reply = upstream.reply().json
    assert (reply["command_id"], reply["status"]) == (COMMAND["command_id"], "accepted")
    assert reply.keys() == REPLY.keys()
    assert EXAMPLES["accepted"] | {"command_id": COMMAND["command_id"]} == REPLY
    assert worker.wait_for("command_accepted")
