"""The images, built once for all tests."""

from collections.abc import Iterator
from contextlib import contextmanager
from uuid import uuid4

import pytest

from tests.support.docker_engine import docker, named_image


@contextmanager
def built(target: str, name: str) -> Iterator[str]:
    """Build a target of the Dockerfile; its image is removed at the end."""
    base = f"PYTHON_IMAGE={named_image('PYTHON_IMAGE')}"
    docker("build", "--file", "docker/Dockerfile", "--build-arg", base, "--target", target, "--tag", name, ".")
    try:
        yield name
    finally:
        docker("rmi", name)


@pytest.fixture(scope="session")
def image() -> Iterator[str]:
    with built("production", f"onenet-execute-worker:test-{uuid4().hex[:8]}") as name:
        yield name


@pytest.fixture(scope="session")
def simulator_image(image: str) -> Iterator[str]:
    """Return the image of the simulator, under the name that the compose file derives from the worker's."""
    with built("simulator", f"{image}-simulator") as name:
        yield name
