"""The image, built once for all tests."""

from collections.abc import Iterator
from uuid import uuid4

import pytest

from tests.support.docker_engine import docker


@pytest.fixture(scope="session")
def image() -> Iterator[str]:
    name = f"onenet-execute-worker:test-{uuid4().hex[:8]}"
    docker("build", "--file", "docker/Dockerfile", "--tag", name, ".")
    yield name
    docker("rmi", name)
