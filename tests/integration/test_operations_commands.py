"""Each command of docs/operations.md and docs/simulator.md does what the page says, typed as it stands there."""

import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from scripts.services import APT_INSTALL
from tests.support.builders import AN_IMEI, a_command
from tests.support.dead_letters import publish_dead_letters
from tests.support.deployment import SOON_CERTAIN, Deployment
from tests.support.documents import OPERATIONS, lines, section
from tests.support.terminal import show
from worker.dev.services.broker import LocalBroker
from worker.dev.services.ports import free_port
from worker.dev.services.processes import LocalProcess
from worker.dev.services.redis import LocalRedis

COMMANDS_OF_THE_WORKER = [
    line
    for title in (
        "Pause, resume and probe by hand",
        "What became of one command, or of one device",
        "Unrouted replies",
        "Dead letters",
    )
    for line in lines(section(OPERATIONS, title))
]
OF_SECRETS = lines(section(OPERATIONS, "Rotate a key or a password"))
SIMULATOR = lines((Path(__file__).parents[2] / "docs" / "simulator.md").read_text())
COMMAND_ID, LETTER_ID = "order-17", "failed-1"


@pytest.fixture(scope="module")
def curl() -> None:
    if shutil.which("curl") is None:
        subprocess.run([APT_INSTALL, "curl"], check=True)


def test_the_commands_of_an_operator_succeed(deployment: Deployment, redis_url: str, tmp_path: Path) -> None:
    """In their order, at a terminal at which a person says yes."""
    settings = {
        "AMQP_URL": deployment.broker_url,
        "WORKER_NAMESPACE": deployment.topology.namespace,
        "IDEMPOTENCY_URL": redis_url,
        "ONENET_URL": deployment.simulator.url,
        "ONENET_API_KEY": "the-master-key",
    }
    deployment.simulator.platform.cancels_valid = True
    with deployment.worker(IDEMPOTENCY_URL=redis_url, **SOON_CERTAIN) as worker:
        deployment.upstream.publish(a_command(command_id=COMMAND_ID), app_id="billing")
        worker.wait_for("command_accepted", command_id=COMMAND_ID)
        publish_dead_letters(deployment, LETTER_ID)
        [cached] = deployment.simulator.platform.commands
        words = {"COMMAND_ID": COMMAND_ID, "IMEI": AN_IMEI, "UUID": cached.uuid, "ID": LETTER_ID}
        for line in COMMANDS_OF_THE_WORKER:
            program, *arguments = [words.get(word, word) for word in shlex.split(line)]
            assert program == "onenet-worker"
            screen = show(arguments, tmp_path, settings, columns=120, typed="y\n")
            assert screen.exit_code == 0, f"{line}\n{screen.text}"


@pytest.fixture
def worker_of_redis(own_redis: LocalRedis) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(own_redis.url) as client:
        client.execute_command("ACL", "SETUSER", "worker", "reset", "on", ">PASSWORD", "+ping")
        yield client
        client.execute_command("ACL", "DELUSER", "worker")


def test_passwords_are_replaced_as_the_page_says(own_broker: LocalBroker, worker_of_redis: redis.Redis) -> None:
    broker, add, remove = (shlex.split(line) for line in OF_SECRETS)
    own_broker.control("add_user", "worker", "PASSWORD")
    try:
        assert broker[0] == "rabbitmqctl"
        own_broker.control(*broker[1:])
        own_broker.control("authenticate_user", "worker", "NEW-PASSWORD")
    finally:
        own_broker.control("delete_user", "worker")

    def may_connect(password: str) -> bool:
        where = worker_of_redis.connection_pool.connection_kwargs
        with redis.Redis(where["host"], where["port"], username="worker", password=password) as client:
            try:
                return bool(client.ping())
            except redis.AuthenticationError:
                return False

    execute: Any = worker_of_redis.execute_command
    execute(*add[1:])
    assert [may_connect(password) for password in ("PASSWORD", "NEW-PASSWORD")] == [True, True]
    execute(*remove[1:])
    assert [may_connect(password) for password in ("PASSWORD", "NEW-PASSWORD")] == [False, True]


@pytest.mark.usefixtures("curl")
def test_the_simulator_is_started_and_controlled_as_its_page_says(tmp_path: Path) -> None:
    start, *controls = SIMULATOR
    port = free_port()
    simulator = LocalProcess([*shlex.split(start)[1:], "--port", str(port)], {}, tmp_path / "simulator")
    try:
        simulator.wait_for_port(port)
        for line in controls:
            here = line.replace("curl ", "curl --silent --show-error --fail ").replace(":8580", f":{port}")
            done = subprocess.run(here, shell=True, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    finally:
        simulator.stop()
