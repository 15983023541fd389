"""Faults that no signal and no server can cause: code that a process under test runs before its own."""

import os
import sys
import tempfile
import traceback
from pathlib import Path

from tests.support.blocking import watch_event_loop


def run_at_startup(folder: Path, code: str) -> dict[str, str]:
    """Return the environment in which a Python process runs ``code`` first; the code may call ``replace``."""
    place = Path(tempfile.mkdtemp(dir=folder))
    # Python imports a module of this name at startup.
    (place / "sitecustomize.py").write_text(f"from {__name__} import run\nrun({code!r})\n")
    return {"PYTHONPATH": f"{place}{os.pathsep}{Path(__file__).parents[2]}"}


def run(code: str) -> None:
    """Run startup code; if it fails, end the process, since Python would go on without it."""
    try:
        if "PYTHONASYNCIODEBUG" in os.environ:
            watch_event_loop()
        exec(code, {"replace": replace})
    except Exception:  # noqa: BLE001 - with any error the fault under test is missing
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def replace(owner: object, name: str, value: object) -> None:
    """Set an attribute that exists, so that a renamed one is noticed."""
    getattr(owner, name)
    setattr(owner, name, value)
