"""What docs/security.md says: the lines of its tables, and its commands, which tests run as they are written."""

import json
import re
import shlex
from typing import Any

from scripts.documents import ROOT, code_blocks

PAGE = (ROOT / "docs" / "security.md").read_text()


def _rows(title: str) -> list[list[str]]:
    _, _, rest = PAGE.partition(f"## {title}\n")
    lines = [line for line in rest.partition("\n## ")[0].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


BLOCKS = code_blocks(PAGE)
_LINES = [line for language, code in BLOCKS if language == "console" for line in code.splitlines()]
COMMANDS = [shlex.split(line.removeprefix("$ ")) for line in _LINES]
[DEFINITIONS] = [code for language, code in BLOCKS if language == "json"]
THREATS = {(who, action): result for who, action, result, _ in _rows("Who may do what")}
NETWORK = _rows("Network")


def rabbitmqctl(user: str) -> list[list[str]]:
    """Return the arguments of each command for a user, in the page's order."""
    return [arguments for program, *arguments in COMMANDS if program == "rabbitmqctl" and user in arguments]


def acl(user: str, port: str | None = None) -> list[str]:
    """Return the command that creates a user of Redis or, with the port of the Sentinels, one of theirs."""
    options = [] if port is None else ["-p", port]
    [found] = [
        arguments[len(options) :]
        for program, *arguments in COMMANDS
        if program == "redis-cli" and arguments[: len(options) + 3] == [*options, "ACL", "SETUSER", user]
    ]
    return found


def definitions(system: str, vhost: str) -> dict[str, Any]:
    """Return the queue and the bindings of an upstream system."""
    text = DEFINITIONS.replace("billing", system).replace('"vhost": "/"', f'"vhost": {json.dumps(vhost)}')
    found: dict[str, Any] = json.loads(text)
    return found
