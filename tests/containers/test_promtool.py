"""The configuration and the alerts of Prometheus, checked by promtool."""

import pytest

from tests.support.docker_engine import docker, named_image
from tests.support.monitoring import PROMETHEUS

IMAGE = named_image("PROMETHEUS_IMAGE")


@pytest.mark.parametrize(
    "arguments",
    [
        "check config prometheus.yml",
        "check rules --lint=all --lint-fatal alerts.yml",
        "test rules alerts.test.yml",
    ],
)
def test_promtool_accepts_the_configuration_and_the_alerts(arguments: str) -> None:
    place = ("--volume", f"{PROMETHEUS}:/files:ro", "--workdir", "/files")
    docker("run", "--rm", "--network", "none", *place, "--entrypoint", "promtool", IMAGE, *arguments.split())
