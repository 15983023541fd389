"""Logs, metrics, traces and health probes."""

import importlib
import sys
from typing import Any

# structlog imports rich where it is installed, for tracebacks with local variables, which may hold secrets and are not
# used here. The import costs 4 MB and 50 ms. None in its place makes rich look uninstalled.
# Source: https://docs.python.org/3/reference/import.html#the-module-cache
_modules: dict[str, Any] = sys.modules
_rich = _modules.get("rich")
_modules["rich"] = None
importlib.import_module("structlog")
del _modules["rich"]
if _rich is not None:
    _modules["rich"] = _rich
