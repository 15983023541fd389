"""Another version of the worker, from git, in a virtual environment of its own."""

import os
import subprocess
import tarfile
from io import BytesIO
from pathlib import Path

_ROOT = Path(__file__).parents[2]


def default_version() -> str:
    """Return the last release's tag, else the main branch, else the newest commit with another worker than this one.

    A main branch whose worker is the present one is no other version: so it is on a fresh clone of it.

    Raises:
        LookupError: the history, perhaps a shallow one, contains only one version.
    """
    candidates = [*_git("tag", "--list", "v*", "--sort=-version:refname").split(), "main", "origin/main"]
    candidates += _git("log", "--format=%H", "--first-parent", "-n", "2", "--", "worker").split()
    for candidate in candidates:
        if _exists(candidate) and _is_another(candidate):
            return candidate
    raise LookupError("git has no other version of the worker; name one with --other-version")


def install(version: str, folder: Path) -> Path:
    """Install a version as its own Makefile does, and return the path of its interpreter."""
    archive = subprocess.run(["git", "archive", version], cwd=_ROOT, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    subprocess.run(["make", "--silent", ".venv/.installed"], cwd=folder, env=environment, check=True)
    return folder / ".venv" / "bin" / "python"


def describe(version: str) -> str:
    """Return the version's name and its commit."""
    return f"{version} ({_git('rev-parse', '--short', f'{version}^{{commit}}').strip()})"


def _exists(version: str) -> bool:
    return subprocess.run(["git", "rev-parse", "--verify", "--quiet", version], cwd=_ROOT, check=False,
                          capture_output=True).returncode == 0  # fmt: skip


def _is_another(version: str) -> bool:
    return subprocess.run(["git", "diff", "--quiet", version, "--", "worker"], cwd=_ROOT, check=False).returncode == 1


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=_ROOT, check=True, capture_output=True, text=True).stdout
