"""``onenet-worker`` on the command line, as a user runs it."""

import os
import subprocess
import sys
from pathlib import Path

TARGET_OPTIONS = ("--imei", "865820030000001", "--obj-id", "1", "--obj-inst-id", "2", "--res-id", "3")


def run_cli(*arguments: str, folder: Path, stdin: str = "", **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run ``onenet-worker`` with no settings in the environment but those given."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return subprocess.run(
        [sys.executable, "-m", "worker", *arguments],
        cwd=folder,
        env=kept | {"COLUMNS": "200", "PYTHONPATH": str(Path.cwd())} | environment,
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
    )
