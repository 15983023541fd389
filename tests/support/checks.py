"""``onenet-worker check``, as a user runs it in a deployment."""

import json
import os
import subprocess
from pathlib import Path

from tests.support.command_line import program
from tests.support.deployment import Deployment
from tests.support.simulator import API_KEY
from tests.support.waiting import PATIENCE_S


def settings_of(deployment: Deployment) -> dict[str, str]:
    """Return the settings of a deployment's workers."""
    return {
        "AMQP_URL": deployment.broker_url,
        "ONENET_URL": deployment.simulator.url,
        "ONENET_API_KEY": API_KEY,
        "WORKER_NAMESPACE": deployment.topology.namespace,
        "WORKER_RETRY_DELAYS": ",".join(str(delay_s) for delay_s in sorted(deployment.topology.delay_queues_s)),
        **deployment.result_settings,
        "NO_PROXY": "127.0.0.1",
    }


def check(deployment: Deployment, *arguments: str, **changes: str) -> tuple[int, dict[str, list[str]]]:
    """Return the exit code and the details of each failed check; under ``""`` is the raw output."""
    environment = settings_of(deployment) | {"PATH": os.environ["PATH"], "PYTHONPATH": str(Path.cwd())}
    result = subprocess.run(
        [*program(), "check", "--json", *arguments],
        cwd=deployment.folder,
        env=environment | changes,
        capture_output=True,
        text=True,
        timeout=3 * PATIENCE_S,
        check=False,
    )
    assert result.stderr == ""
    findings = [json.loads(line) for line in result.stdout.splitlines()]
    faults: dict[str, list[str]] = {"": [result.stdout]}
    for finding in findings:
        if not finding["ok"]:
            faults.setdefault(finding["check"], []).append(finding["detail"])
    return result.returncode, faults
