"""The tree of errors."""

import re

from worker import errors
from worker.errors import WorkerError


def _tree(error: type[Exception], depth: int = 0) -> list[tuple[int, str]]:
    own = [kind for kind in error.__subclasses__() if kind.__module__ == errors.__name__]
    return [(depth, error.__name__), *(line for kind in own for line in _tree(kind, depth + 1))]


def test_the_tree_in_the_module_docstring_is_the_class_hierarchy() -> None:
    drawn = re.findall(r"^ {4}((?:[│├└─ ]{4})*)(\w+)", errors.__doc__ or "", re.MULTILINE)
    assert [(len(indent) // 4, name) for indent, name in drawn] == _tree(WorkerError)
