"""The image: how it runs, and what it contains."""

import json
import re
import subprocess
import tarfile
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO

import pytest

from tests.support.docker_engine import ROOT, WITHOUT_RIGHTS, container, docker, inspect, named_image
from tests.support.waiting import PATIENCE_S
from worker.dev.services.ports import wait_until
from worker.errors import EXIT_CONFIG

BASE = named_image("PYTHON_IMAGE")
NOWHERE = ("--network", "none", "--env", "ONENET_API_KEY=a-key")  # without a broker the worker keeps trying
SET_ID = 0o6000
PACKAGES = PurePosixPath("app/lib/python3.13/site-packages")
DEVELOPMENT = ("worker/dev", "worker/simulator")

# Runs the command line, and at its end prints which of the installed distributions have a module that was imported.
PROBE = """
import atexit, json, os, sys
from importlib.metadata import distributions

def show():
    loaded = {os.path.realpath(module.__file__) for module in [*sys.modules.values()] if getattr(module, "__file__", 0)}
    imported = {
        found.name: any(os.path.realpath(found.locate_file(file)) in loaded for file in found.files)
        for found in distributions()
    }
    print("imported:", json.dumps(imported), flush=True)

leave = os._exit
os._exit = lambda code: (show(), leave(code))
atexit.register(show)

from worker.__main__ import main
main()
"""
# Without a broker, a store and a collector: what is imported only later is not seen, and would be reported as unused.
EVERYTHING = {
    "AMQP_URL": "amqp://127.0.0.1:1/",
    "IDEMPOTENCY_URL": "redis://127.0.0.1:1/0",
    "ONENET_API_KEY": "a-key",
    "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1/",
}
UNUSED = {
    "googleapis-common-protos",  # required by OpenTelemetry's exporter, which imports it nowhere
    "tzdata",  # read, not imported
}


@dataclass(frozen=True, slots=True)
class File:
    """One file of an image."""

    mode: int
    content: bytes | None


def files_of(image: str) -> Mapping[str, File]:
    """Return every file of an image by its path, with the content of the worker's files."""
    identity = docker("create", image).strip()
    try:
        with subprocess.Popen(["docker", "export", identity], stdout=subprocess.PIPE) as export:
            assert export.stdout is not None
            return _read(export.stdout)
    finally:
        docker("rm", identity)


def _read(stream: IO[bytes]) -> Mapping[str, File]:
    found = {}
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            is_ours = PACKAGES in (path := PurePosixPath(member.name)).parents and path.suffix == ".py"
            content = archive.extractfile(member) if is_ours and member.isfile() else None
            if not member.isdir():
                found[member.name] = File(member.mode, None if content is None else content.read())
    return found


@pytest.fixture(scope="module")
def files(image: str) -> Mapping[str, File]:
    return files_of(image)


@pytest.fixture(scope="module")
def base() -> Mapping[str, File]:
    return files_of(BASE)


@pytest.fixture(scope="module")
def added(files: Mapping[str, File], base: Mapping[str, File]) -> set[str]:
    """The files of the image that its base does not have, without those that the engine adds to every container."""
    return set(files) - set(base) - {".dockerenv"}


def test_the_image_runs_a_command_without_capabilities_on_a_read_only_file_system(image: str) -> None:
    schema = docker("run", "--rm", *WITHOUT_RIGHTS, "--network", "none", image, "schema", "command")
    assert json.loads(schema)["$schema"].startswith("https://json-schema.org/")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", inspect(image)["Config"]["User"])  # a number shows that it is not root


def test_the_image_without_credentials_exits_with_the_workers_exit_code(image: str) -> None:
    result = subprocess.run(
        ["docker", "run", "--rm", *WITHOUT_RIGHTS, image], capture_output=True, text=True, check=False
    )
    assert result.returncode == EXIT_CONFIG
    assert "ONENET_API_KEY" in result.stderr


def test_the_labels_of_the_image_equal_the_metadata_of_the_package(image: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    labels = inspect(image)["Config"]["Labels"]
    for label, field in (("title", "name"), ("description",) * 2, ("licenses", "license")):
        assert labels[f"org.opencontainers.image.{label}"] == project[field]
    assert labels["org.opencontainers.image.version"] == "unreleased"  # a release says what it was built from


def test_the_image_has_the_size_that_the_documents_name(image: str) -> None:
    added_mb = (inspect(image)["Size"] - inspect(BASE)["Size"]) / 1e6
    for document in ("docs/operations.md", "docs/operations.zh-CN.md"):
        [result] = re.findall(r"(?:adds|增加) (\d+) MB", (ROOT / document).read_text())
        assert added_mb == pytest.approx(float(result), rel=0.1)


def test_the_image_adds_only_the_worker_to_its_base(added: set[str]) -> None:
    """No cache, no home folder, no build tree."""
    assert not {name for name in added if not name.startswith("app/")}


def test_the_image_contains_the_compiled_code_of_this_repository(files: Mapping[str, File]) -> None:
    there = {
        path: path.read_bytes()
        for package in ("worker", "schemas")
        for path in ROOT.joinpath(package).rglob("*.py")
        if not any(path.is_relative_to(ROOT / folder) for folder in DEVELOPMENT)
    }
    for path, content in there.items():
        name = PACKAGES / path.relative_to(ROOT)
        assert files[str(name)].content == content
        assert str(name.parent / "__pycache__" / f"{name.stem}.cpython-313.pyc") in files
    ours = {name for name in files if re.match(rf"{PACKAGES}/(worker|schemas)/.*\.py$", name)}
    assert len(ours) == len(there)


def _imported(output: str) -> dict[str, bool]:
    """Return what the probe has printed: whether each installed distribution was imported."""
    [line] = re.findall("^imported: (.*)$", output, re.MULTILINE)
    found: dict[str, bool] = json.loads(line)
    return found


def test_every_distribution_in_the_image_is_imported_by_one_of_its_commands(image: str) -> None:
    """So those of the simulator are not there, nor those of building and testing."""
    settings = [option for name, value in EVERYTHING.items() for option in ("--env", f"{name}={value}")]
    options = ("--network", "none", "--entrypoint", "python", *settings)
    with container(image, *options, command=("-c", PROBE, "run")) as worker:
        worker.wait_for("worker_started")
        docker("stop", worker.identity)
        found = [_imported(docker("logs", worker.identity))]
    for command in ("check", "send --help", "dead-letters list", "topology --json", "schema asyncapi"):
        run = ["docker", "run", "--rm", *WITHOUT_RIGHTS, *options, image, "-c", PROBE, *command.split()]
        found.append(_imported(subprocess.run(run, capture_output=True, text=True, check=False).stdout))
    assert {name for name in found[0] if not any(imported[name] for imported in found)} == UNUSED


@pytest.mark.parametrize("command", ["simulator", "demo"])
def test_a_command_that_is_not_in_the_image_says_how_to_get_it(image: str, command: str) -> None:
    run = ["docker", "run", "--rm", *WITHOUT_RIGHTS, "--network", "none", image, command]
    result = subprocess.run(run, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (1, "")
    [line] = result.stderr.splitlines()
    assert line.startswith(f"onenet-worker: {command} is not in the image for production")
    assert "--target simulator" in line


def test_the_image_has_no_shell_completion(image: str) -> None:
    assert "completion" not in docker("run", "--rm", *WITHOUT_RIGHTS, "--network", "none", image, "--help")


def test_the_image_of_the_simulator_has_the_simulator_and_the_demo(simulator_image: str) -> None:
    code = "import worker.dev.demo, worker.simulator.server"
    docker("run", "--rm", *WITHOUT_RIGHTS, "--network", "none", "--entrypoint", "python", simulator_image, "-c", code)


def test_the_image_contains_no_installer_no_compiler_and_no_documents(
    files: Mapping[str, File], added: set[str]
) -> None:
    programs = re.compile(r"(^|/)s?bin/(pip[^/]*|gcc[^/]*|g\+\+[^/]*|cc|c\+\+|clang[^/]*|ld|as|make|cargo|git)$")
    packages = re.compile(r"(^|/)(pip|ensurepip|setuptools|wheel|pkg_resources)/|(^|/)(pip|setuptools|wheel)-[^/]*$")
    assert not [name for name in files if programs.search(name) or packages.search(name)]
    left_over = re.compile(
        r"(^|/)(\.git|\.env|\.cache|README[^/]*|CHANGELOG[^/]*|docs|Dockerfile|[^/]*\.(key|lock|whl))(/|$)"
    )
    assert not [name for name in added if left_over.search(name)]
    assert not [name for name in added if name.startswith(f"{PACKAGES}/tests/")]


def test_the_image_adds_no_setuid_or_setgid_file_to_its_base(
    files: Mapping[str, File], base: Mapping[str, File]
) -> None:
    def giving(image: Mapping[str, File]) -> set[str]:
        return {name for name, file in image.items() if file.mode & SET_ID}

    assert giving(files) <= giving(base)


def test_the_image_contains_time_zones_of_its_own(image: str) -> None:
    code = "import zoneinfo; zoneinfo.reset_tzpath([]); print(zoneinfo.ZoneInfo('Asia/Shanghai'))"
    assert docker("run", "--rm", "--entrypoint", "python", image, "-c", code).strip() == "Asia/Shanghai"


@pytest.mark.parametrize("port", ["", "9200", "0"])
def test_the_container_becomes_healthy_on_any_http_port_and_on_none(image: str, port: str) -> None:
    with container(image, *NOWHERE, "--env", f"HTTP_PORT={port}") as worker:
        wait_until(lambda: worker.health == "healthy", PATIENCE_S, "a healthy container")


def test_a_container_with_a_hanging_worker_is_not_healthy(image: str) -> None:
    with container(image, *NOWHERE) as worker:
        worker.wait_for("worker_started")
        check = ["docker", "exec", worker.identity, "python", "/app/healthcheck.py"]
        assert subprocess.run(check, check=False).returncode == 0
        docker("kill", "--signal", "STOP", worker.identity)
        assert subprocess.run(check, check=False).returncode == 1


def test_sigterm_stops_the_container_gracefully(image: str) -> None:
    """The worker is process 1 of its container, to which the kernel delivers no signal without a handler."""
    with container(image, *NOWHERE) as worker:
        worker.wait_for("worker_started")
        docker("stop", worker.identity)
        assert worker.exit_code == 0
        assert worker.events[-1] == "worker_stopped"
