"""The code blocks of the README, by what they show."""

import json

from scripts.documents import ROOT, code_blocks

BLOCKS = code_blocks((ROOT / "README.md").read_text())
TRY, COMPOSE, PYTHON, SEND = (
    [line.removeprefix("$ ") for line in code.splitlines()] for language, code in BLOCKS if language == "console"
)
COMMAND, REPLY = (json.loads(code) for language, code in BLOCKS if language == "json")
