"""Dead letters in a deployment, and the commands with which operators see them."""

import json
import os
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pika

from tests.support.builders import a_command
from tests.support.command_line import program
from tests.support.deployment import Deployment

NOW = datetime.now(UTC)


def publish_dead_letters(
    deployment: Deployment,
    *ids: str,
    reason: str = "retries_exhausted",
    failed_at: datetime = NOW,
    app_id: str = "billing",
    error: str = "as it is",
    **fields: Any,
) -> None:
    """Publish dead letters as a worker does."""
    headers = {"x-onenet-reason": reason, "x-onenet-error": error, "x-onenet-failed-at": failed_at.isoformat()}
    for command_id in ids:
        body = json.dumps(a_command(command_id=command_id, **fields)).encode()
        properties = pika.BasicProperties(delivery_mode=2, headers=headers, app_id=app_id)
        deployment.upstream.channel.basic_publish(
            deployment.topology.dead_letters_exchange, f"execute.{reason}", body, properties
        )


class DeadLettersCommand:
    """``onenet-worker dead-letters`` in one namespace."""

    def __init__(self, deployment: Deployment, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            "AMQP_URL": deployment.broker_url,
            "WORKER_NAMESPACE": deployment.topology.namespace,
            "COLUMNS": "200",
            "PYTHONPATH": str(Path.cwd()),
            "PATH": os.environ["PATH"],
        }

    def __call__(self, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [*program(), "dead-letters", *arguments],
            cwd=self.folder,
            env=self.environment | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )

    def listed(self, *arguments: str) -> list[Any]:
        """Return the lines of ``list --json``."""
        result = self("list", "--json", *arguments)
        assert result.returncode == 0, result.stderr
        return [json.loads(line) for line in result.stdout.splitlines()]

    def ids(self, *arguments: str) -> list[str]:
        return [line["command_id"] for line in self.listed(*arguments)]
