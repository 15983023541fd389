"""The tests' own structure: helpers live in tests/support, and the folders mirror the worker's."""

import ast
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parent
WORKER = TESTS.parent / "worker"

# Without a package of the worker: what they test is the whole worker, or what is built around it.
WITHOUT_PACKAGE = {"chaos", "cluster", "containers", "docker", "fuzz", "integration", "support"}


def imported_modules(source: str) -> Iterator[str]:
    """Yield every name that a module's imports may load as a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def is_test_module(name: str) -> bool:
    return any(part.startswith("test_") for part in name.split("."))


def test_no_module_of_the_tests_imports_a_test_module() -> None:
    """A helper in a test module is hard to find, and breaks other tests when its own tests move."""
    importing = {
        str(path.relative_to(TESTS))
        for path in TESTS.rglob("*.py")
        if any(map(is_test_module, imported_modules(path.read_text())))
    }
    assert not importing


def test_the_folders_of_the_tests_mirror_the_packages_of_the_worker() -> None:
    folders = {path.name for path in TESTS.iterdir() if any(path.rglob("*.py"))}
    packages = {path.parent.name for path in WORKER.glob("*/__init__.py")}
    assert folders - packages == WITHOUT_PACKAGE
