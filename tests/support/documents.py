"""The code blocks of the documents, which tests run as they are written."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from scripts.documents import ROOT, code_blocks

README = "README.md"
CONTRACTS = "docs/contracts/README.md"
OPERATIONS = "docs/operations.md"
SECURITY = "docs/security.md"


class Command(NamedTuple):
    """A line that a reader is to type."""

    document: str
    section: str
    line: str


def documents() -> list[Path]:
    """Return every document for people."""
    return sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / ".github").rglob("*.md")])


def section(document: str, title: str) -> str:
    """Return the text below a heading, up to the next one of its level."""
    _, found, rest = (ROOT / document).read_text().partition(f"## {title}\n")
    assert found, f"{document} has no section {title}"
    return rest.partition("\n## ")[0]


def lines(text: str) -> list[str]:
    """Return the lines that a text tells its reader to type, in their order."""
    blocks = [code for language, code in code_blocks(text) if language == "console"]
    return [line.removeprefix("$ ") for code in blocks for line in code.splitlines() if line.startswith("$ ")]


def commands(document: str) -> Iterator[Command]:
    """Yield every line of a document that its reader is to type."""
    for part in (ROOT / document).read_text().split("\n## "):
        for line in lines(part):
            yield Command(document, part.partition("\n")[0].removeprefix("# "), line)


_BLOCKS = code_blocks((ROOT / README).read_text())
TRY, COMPOSE, PYTHON, SEND = (
    [line.removeprefix("$ ") for line in code.splitlines()] for language, code in _BLOCKS if language == "console"
)
COMMAND, REPLY = (json.loads(code) for language, code in _BLOCKS if language == "json")
PYTHON_CODE, JAVA_CODE = (
    code for language, code in code_blocks((ROOT / CONTRACTS).read_text()) if language in {"python", "java"}
)
