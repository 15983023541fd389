"""How the worker is watched."""

import importlib
import sys

# structlog takes rich along where that is installed, for tracebacks with local variables, which are not wanted here:
# 4 MB and a twentieth of a second. Source: https://docs.python.org/3/reference/import.html#the-module-cache
_rich = sys.modules.get("rich")
sys.modules["rich"] = None  # type: ignore[assignment]
importlib.import_module("structlog")
del sys.modules["rich"]
if _rich is not None:
    sys.modules["rich"] = _rich
