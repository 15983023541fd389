"""The documents: their code blocks, and the tables that ``python -m scripts.documents`` makes from the code."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from pydantic import SecretStr

from bench.report import figure_table, target_table
from schemas.reply import MEANINGS, FailureCode, RejectionCode
from tests.support.monitoring import alerts
from worker.settings import Settings
from worker.telemetry.metrics import Metrics, State

ROOT = Path(__file__).parent.parent


def settings_table() -> str:
    """Return every setting, its default and what it is."""
    rows = ["| variable | default | |", "| --- | --- | --- |"]
    for name, field in Settings.model_fields.items():
        default = field.default
        values = default if isinstance(default, tuple) else () if default is None else (default,)
        shown = ",".join(map(_shown, values))
        rows.append(f"| `{name.upper()}` | {f'`{shown}`' if shown else ''} | {field.description} |")
    return "\n".join(rows)


def _shown(value: object) -> str:
    match value:
        case SecretStr():
            return value.get_secret_value()
        case bool():
            return str(value).lower()
        case float():
            return f"{value:g}"
        case _:
            return str(value)


def codes_table() -> str:
    """Return what may become of a command."""
    rows = ["| `status` | `error.code` | means |", "| --- | --- | --- |"]
    rows.append("| `accepted` | | OneNET cached the command under `uuid` |")
    for status, codes in (("rejected", get_args(RejectionCode)), ("failed", get_args(FailureCode))):
        rows += [f"| {f'`{status}`' if code == codes[0] else ''} | `{code}` | {MEANINGS[code]} |" for code in codes]
    return "\n".join(rows)


def metrics_table() -> str:
    """Return the worker's own metrics."""
    metrics = Metrics("0", 1)
    metrics.observe(lambda: State(paused={None: False}))
    rows = ["| `onenet_worker_…` | kind | labels | |", "| --- | --- | --- | --- |"]
    for family in metrics.registry.collect():
        if family.name.startswith("onenet_worker_"):
            labels = sorted({label for sample in family.samples for label in sample.labels} - {"le"})
            name = family.name.removeprefix("onenet_worker_") + ("_total" if family.type == "counter" else "")
            shown = ", ".join(f"`{label}`" for label in labels)
            rows.append(f"| `{name}` | {family.type} | {shown} | {family.documentation} |")
    return "\n".join(rows)


def alerts_table() -> str:
    """Return what each alert means and wants."""
    rows = ["| alert | | means | do |", "| --- | --- | --- | --- |"]
    for rule in alerts():
        notes = {name: _escaped(text) for name, text in rule["annotations"].items()}
        rows.append(f"| `{rule['alert']}` | {rule['labels']['severity']} | {notes['meaning']} | {notes['action']} |")
    return "\n".join(rows)


def _escaped(text: str) -> str:
    return re.sub(r"{{ *\$labels\.(\w+) *}}", r"*\1*", text).replace("|", "\\|").replace("_*", "_\\*")


def _measured() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "docs" / "performance.json").read_text())
    return found


def machine_line() -> str:
    """Return on what the figures were measured."""
    about = _measured()["machine"]
    return (
        f"Medians of {len(_measured()['rounds']['worker.start.s'])} rounds on {about['processors']} processors, "
        f"{about['system']}, Python {about['python']}, {about['broker']}."
    )


TABLES: dict[tuple[str, str], Callable[[], str]] = {
    ("README.md", "settings"): settings_table,
    ("README.md", "codes"): codes_table,
    ("docs/operations.md", "metrics"): metrics_table,
    ("docs/operations.md", "alerts"): alerts_table,
    ("docs/performance.md", "targets"): lambda: target_table(_measured()),
    ("docs/performance.md", "figures"): lambda: figure_table(_measured()),
    ("docs/performance.md", "machine"): machine_line,
}


def code_blocks(text: str) -> list[tuple[str, str]]:
    """Return every block of code with its language; a picture is none."""
    return re.findall(r"^```(?!mermaid)(\w+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def between(text: str, name: str) -> re.Match[str]:
    """Find a table between its markers."""
    found = re.search(rf"(?<=<!-- {name}: made by `make docs` -->\n).*?(?=<!-- end of {name} -->)", text, re.DOTALL)
    assert found is not None, name
    return found


def main() -> None:
    """Write every table."""
    for (document, name), table in TABLES.items():
        path = ROOT / document
        text = path.read_text()
        found = between(text, name)
        path.write_text(text[: found.start()] + table() + "\n" + text[found.end() :])


if __name__ == "__main__":
    main()
