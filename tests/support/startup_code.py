"""Faults that no signal and no server can cause: code that a process of a test runs before its own."""

import os
import tempfile
from pathlib import Path


def run_at_startup(folder: Path, code: str) -> dict[str, str]:
    """Return the environment in which a Python process runs ``code`` before its own."""
    place = Path(tempfile.mkdtemp(dir=folder))
    # Python imports a module of this name at startup.
    (place / "sitecustomize.py").write_text(code)
    return {"PYTHONPATH": f"{place}{os.pathsep}{Path(__file__).parents[2]}"}
