"""``onenet-worker`` on the command line, as a user runs it."""

import os
import subprocess
import sys
from pathlib import Path

_PROJECT = Path(__file__).parents[2]
TARGET_OPTIONS = ("--imei", "865820030000001", "--obj-id", "1", "--obj-inst-id", "2", "--res-id", "3")


def program() -> tuple[str, ...]:
    """Return how ``onenet-worker`` is run here; measured where coverage is, because its commands run nowhere else."""
    data_file = os.environ.get("COVERAGE_OF_COMMANDS")  # set by scripts/test
    if data_file is None:
        return (sys.executable, "-m", "worker")
    options = ("--parallel-mode", f"--data-file={data_file}", f"--rcfile={_PROJECT / 'pyproject.toml'}")
    return (sys.executable, "-m", "coverage", "run", *options, "-m", "worker")


def run_cli(*arguments: str, folder: Path, stdin: str = "", **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run ``onenet-worker`` with no settings in the environment but those given."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return subprocess.run(
        [*program(), *arguments],
        cwd=folder,
        env=kept | {"COLUMNS": "200", "PYTHONPATH": str(Path.cwd())} | environment,
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
    )
