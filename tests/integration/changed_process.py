"""Changes a worker's process from outside of its code, where no signal and no server could bring the fault about."""

import os
import tempfile
from pathlib import Path


def running_first(folder: Path, code: str) -> dict[str, str]:
    """Return the environment in which a process runs some code before its own."""
    place = Path(tempfile.mkdtemp(dir=folder))
    # Python imports a module of this name by itself at its start.
    (place / "sitecustomize.py").write_text(code)
    return {"PYTHONPATH": f"{place}{os.pathsep}{Path(__file__).parents[2]}"}
