"""The Docker engine, through its command line."""

import json
import os
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
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


def named_image(variable: str) -> str:
    """Return the image that an environment variable such as RABBITMQ_IMAGE names, else the one of the files in docker/.

    Theirs are pinned by digests, and can be had from a registry only.
    """
    files = "".join((ROOT / "docker" / name).read_text() for name in ("Dockerfile", "compose.yaml"))
    [pinned] = re.findall(rf"^ARG {variable}=(\S+)$|\$\{{{variable}:-(\S+)\}}", files, re.MULTILINE)
    return os.environ.get(variable) or "".join(pinned)


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
        return [line["event"] for line in self.log]

    @property
    def log(self) -> list[dict[str, Any]]:
        """What the worker in it has logged."""
        return [json.loads(line) for line in docker("logs", self.identity).splitlines()]

    def wait_for(self, event: str) -> None:
        """Wait until the worker in it has logged an event."""
        wait_until(lambda: event in self.events, PATIENCE_S, event)


@contextmanager
def container(image: str, *options: str, command: Sequence[str] = ()) -> Iterator[Container]:
    """Run an image in the background without any rights; the container is removed at the end."""
    identity = docker("run", "--detach", *WITHOUT_RIGHTS, *options, image, *command).strip()
    try:
        yield Container(identity)
    finally:
        docker("rm", "--force", "--volumes", identity)
