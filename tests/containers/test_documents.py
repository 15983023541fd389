"""The commands of the documents for Docker, and the code of the contracts for Java."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from uuid import uuid4

import pytest
import yaml

from scripts.documents import code_blocks
from scripts.services import APT_INSTALL
from tests.support.deployment import Deployment
from tests.support.docker_engine import ROOT, docker, named_image
from tests.support.documents import COMPOSE, JAVA_CODE, OPERATIONS, lines, section

OF_COMPOSE = [line for line in lines(section(OPERATIONS, "Commands")) if line.startswith("docker compose ")]
[OPERATOR] = [
    yaml.safe_load(code) for language, code in code_blocks(section(OPERATIONS, "Commands")) if language == "yaml"
]
OF_KUBERNETES = [line for line in lines(section(OPERATIONS, "Commands")) if line.startswith("kubectl ")]
JARS = [Path("/usr/share/java") / name for name in ("amqp-client.jar", "slf4j-api.jar")]


def test_the_docker_commands_of_the_documents_succeed_and_leave_no_volume() -> None:
    up, send, down = COMPOSE
    ports = dict.fromkeys(("AMQP_PORT", "MANAGEMENT_PORT", "SIMULATOR_PORT"), "0")  # the default ports may be in use
    project = f"onenet-readme-{uuid4().hex[:8]}"
    images = {name: named_image(name) for name in ("PYTHON_IMAGE", "RABBITMQ_IMAGE", "REDIS_IMAGE")}
    environment = os.environ | ports | images | {"COMPOSE_PROJECT_NAME": project, "WORKER_IMAGE": project}

    def shell(line: str) -> str:
        done = subprocess.run(line, shell=True, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        return done.stdout

    try:
        shell(up)
        assert len(shell("docker compose -f docker/compose.yaml ps --quiet worker").split()) == 3
        assert json.loads(shell(send))["status"] == "accepted"
        for line in OF_COMPOSE:
            shell(line.replace(" exec ", " exec --no-TTY "))
    finally:
        shell(down)
        shell(f"docker rmi {project} {project}-simulator")
    assert not shell(f"docker volume ls --quiet --filter label=com.docker.compose.project={project}")


def test_all_commands_are_tried_here() -> None:
    assert sorted([*OF_COMPOSE, *OF_KUBERNETES]) == sorted(lines(section(OPERATIONS, "Commands")))


def test_the_commands_for_kubernetes_name_what_the_base_has() -> None:
    """There is no cluster to run them in."""
    base = (ROOT / "docker" / "kubernetes" / "deployment.yaml").read_text()
    assert "name: onenet-worker\n" in base
    assert "{app.kubernetes.io/name: onenet-worker}" in base
    execute, logs, *of_the_pod = OF_KUBERNETES
    assert execute == "kubectl exec --namespace onenet deployment/onenet-worker -- onenet-worker check"
    assert " --selector app.kubernetes.io/name=onenet-worker " in logs
    assert {line.split()[-1] for line in of_the_pod} == {"operator.yaml", OPERATOR["metadata"]["name"]}


def test_the_pod_for_operators_runs_a_command_of_the_image(deployment: Deployment, image: str) -> None:
    [container] = OPERATOR["spec"]["containers"]
    assert container["image"] == image.partition(":")[0]
    settings = {
        "AMQP_URL": deployment.broker_url,
        "IDEMPOTENCY_URL": "memory://",
        "ONENET_API_KEY": "key",
        "WORKER_NAMESPACE": deployment.topology.namespace,
    }
    environment = [f"--env={name}={value}" for name, value in settings.items()]
    with deployment.worker():
        docker("run", "--rm", "--network", "host", *environment, image, *container["args"])


@pytest.fixture(scope="session")
def java() -> str:
    """Return the class path of RabbitMQ's Java client, which the system's packages install."""
    for package, is_there in (
        ("default-jdk-headless", shutil.which("javac") is not None),
        ("librabbitmq-client-java", JARS[0].exists()),
    ):
        if not is_there:
            subprocess.run([APT_INSTALL, package], check=True)
    return ":".join(map(str, JARS))


def test_the_java_code_of_the_contracts_sends_a_command(deployment: Deployment, java: str, tmp_path: Path) -> None:
    own = JAVA_CODE.replace('"onenet.commands"', f'"{deployment.topology.commands_exchange}"')
    assert own != JAVA_CODE
    (tmp_path / "SendCommand.java").write_text(own)
    with deployment.worker():
        deployment.upstream.bind_replies("execute.*.billing")
        for command in (["javac", "-cp", java, "SendCommand.java"], ["java", "-cp", f"{java}:.", "SendCommand"]):
            url = deployment.broker_url.removesuffix("/") + "/%2F"
            done = subprocess.run(
                command, cwd=tmp_path, env=os.environ | {"AMQP_URL": url}, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stdout + done.stderr
        reply = deployment.upstream.reply()
    assert (reply.json["status"], reply.routing_key) == ("accepted", "execute.accepted.billing")
