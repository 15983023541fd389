"""The Docker engine, through its command line."""

import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.waiting import PATIENCE_S
from worker.dev.services.ports import wait_until

ROOT = Path(__file__).parents[2]
WITHOUT_RIGHTS = ("--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges")


def docker(*arguments: str, environment: Mapping[str, str] | None = None) -> str:
    """Run ``docker`` and return its stdout; fails with all its output."""
    result = subprocess.run(
        ["docker", *arguments],
        cwd=ROOT,
        env=os.environ | (environment or {}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, f"docker {' '.join(arguments)}\n{result.stdout}{result.stderr}"
    return result.stdout


def inspect(name: str) -> Any:
    """Return the engine's description of a container or an image."""
    (found,) = json.loads(docker("inspect", name))
    return found


class Container:
    """One container."""

    def __init__(self, identity: str) -> None:
        self.identity = identity

    @property
    def health(self) -> str:
        return str(inspect(self.identity)["State"]["Health"]["Status"])

    @property
    def exit_code(self) -> int | None:
        """Its exit code; None while it runs."""
        state = inspect(self.identity)["State"]
        return None if state["Running"] else int(state["ExitCode"])

    @property
    def events(self) -> list[str]:
        """The log events of the worker in it."""
        return [json.loads(line)["event"] for line in docker("logs", self.identity).splitlines()]

    def wait_for(self, event: str) -> None:
        """Wait until the worker in it has logged an event."""
        wait_until(lambda: event in self.events, PATIENCE_S, event)


@contextmanager
def container(image: str, *options: str) -> Iterator[Container]:
    """Run an image in the background without any rights; the container is removed at the end."""
    identity = docker("run", "--detach", *WITHOUT_RIGHTS, *options, image).strip()
    try:
        yield Container(identity)
    finally:
        docker("rm", "--force", "--volumes", identity)
