"""How the worker is watched."""

import importlib
import sys
from typing import Any

# structlog takes rich along where that is installed, for tracebacks with local variables, which are not wanted here:
# 4 MB and a twentieth of a second. None in its place makes it seem not installed.
# Source: https://docs.python.org/3/reference/import.html#the-module-cache
_modules: dict[str, Any] = sys.modules
_rich = _modules.get("rich")
_modules["rich"] = None
importlib.import_module("structlog")
del _modules["rich"]
if _rich is not None:
    _modules["rich"] = _rich
