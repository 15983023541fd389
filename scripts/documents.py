"""Reads code blocks from the documents and writes the tables in them from the code: ``python -m scripts.documents``."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import SecretStr
from pydantic.fields import FieldInfo

from bench.report import SUMMARY, figure_table, target_table
from schemas.headers import DeadLetterHeaders
from schemas.reply import MEANINGS, FailureCode, RejectionCode, Reply
from schemas.result import MEANINGS as RESULT_MEANINGS
from worker.cli import contracts
from worker.core.command import Command
from worker.core.results import EntryState, await_result, decide_result
from worker.settings import Settings
from worker.telemetry.metrics import Metrics, State

ROOT = Path(__file__).parent.parent
_WAITS, _EXPIRED = 1, 4  # send_status
_MOST_VALUES = 5  # that a table lists


def settings_table() -> str:
    """Return a row for each setting: name, default and description."""
    rows = ["| variable | default | |", "| --- | --- | --- |"]
    for name, field in Settings.model_fields.items():
        default = field.default
        values = default if isinstance(default, tuple) else () if default is None else (default,)
        shown = ",".join(map(_shown, values))
        rows.append(f"| `{name.upper()}` | {f'`{shown}`' if shown else ''} | {field.description}{_range(field)} |")
    return "\n".join(rows)


def _range(field: FieldInfo) -> str:
    least, most = (
        next((getattr(each, key) for each in field.metadata if hasattr(each, key)), None) for key in ("ge", "le")
    )
    return "" if least is None else f" ({least:,} to {most:,})"


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
    """Return a row for each status and error code of a reply."""
    rows = ["| `status` | `error.code` | means |", "| --- | --- | --- |"]
    rows.append("| `accepted` | | OneNET cached the command under `uuid` |")
    for status, codes in (("rejected", get_args(RejectionCode)), ("failed", get_args(FailureCode))):
        rows += [f"| {f'`{status}`' if code == codes[0] else ''} | `{code}` | {MEANINGS[code]} |" for code in codes]
    return "\n".join(rows)


def fields_table(schema: Mapping[str, Any]) -> str:
    """Return a row for each field of a JSON Schema of an object: name, type and meaning."""
    rows = ["| field | type | |", "| --- | --- | --- |"]
    for name, field in schema["properties"].items():
        meaning = field["description"].partition("\n")[0]
        optional = "" if name in schema["required"] else "Optional. "
        rows.append(f"| `{name}` | {_type_of(field)} | {optional}{meaning} |")
    return "\n".join(rows)


def _type_of(field: Mapping[str, Any]) -> str:
    match field:
        case {"oneOf": [*types]}:
            return " or ".join(map(_type_of, types))
        case {"enum": [*values]} if len(values) <= _MOST_VALUES:
            return ", ".join(f"`{value}`" for value in values)
        case {"type": "array", "items": {"enum": [*values]}}:
            return "list of " + ", ".join(f"`{value}`" for value in values)
        case {"type": "integer", "minimum": least, "maximum": most}:
            return f"integer, {least} to {most}"
        case {"type": [*kinds]}:
            return " or ".join(kind if kind == "null" else _type_of({**field, "type": kind}) for kind in kinds)
        case {"type": "string", "format": "date-time"}:
            return "time"
        case {"type": "array"}:
            return "list"
        case {"type": str(kind)}:
            return kind
        case _:
            return "any"


def results_table() -> str:
    """Return a row for each result."""
    rows = ["| `result` | means |", "| --- | --- |"]
    return "\n".join([*rows, *(f"| `{result}` | {meaning} |" for result, meaning in RESULT_MEANINGS.items())])


def looks_until_expired(lifetime: timedelta, delays_s: Sequence[int]) -> int:
    """Return how often a command is looked up that its device never takes, at most: no look comes too late."""
    began = datetime(2026, 1, 1, tzinfo=UTC)
    command = Command("c", "865820030000001", 3311, 0, 5850, began + lifetime, None, None, None, None, None, None)
    reply = Reply(command_id="c", status="accepted", uuid="u", attempts=1, completed_at=began)
    awaited = await_result(command, "", reply, timedelta(0), delays_s)
    while decide_result(awaited, _state_at(awaited.due_at, command), awaited.due_at, awaited.due_at) is None:
        awaited = awaited.after_look(awaited.due_at, awaited.due_at, delays_s)
    return awaited.looks + 1


def _state_at(now: datetime, command: Command) -> EntryState:
    return EntryState(_EXPIRED if now >= command.expires_at else _WAITS)


def result_costs_table() -> str:
    """Return the calls that results cost: a row for each lifetime."""
    delays_s = Settings.model_fields["worker_result_delays"].default
    counts = (10_000, 100_000, 1_000_000)
    rows = [
        "| time until `expired_time` | looks for a command | "
        + " | ".join(f"{count:,} outstanding" for count in counts)
        + " |",
        "| --- | --- |" + " --- |" * len(counts),
    ]
    for name, lifetime in _LIFETIMES.items():
        looks = looks_until_expired(lifetime, delays_s)
        calls = [count * looks / lifetime.total_seconds() for count in counts]
        rows.append(f"| {name} | {looks} | " + " | ".join(f"{each:,.1f} · {each / 10:,.1f}" for each in calls) + " |")
    return "\n".join(rows)


def metrics_table() -> str:
    """Return a row for each metric of the worker."""
    metrics = Metrics("0", 1)
    metrics.observe(lambda: State(paused={None: False}, paused_by_hand={None: False}, clock_offsets_s={None: 0.0}))
    rows = ["| `onenet_worker_…` | kind | labels | |", "| --- | --- | --- | --- |"]
    for family in metrics.registry.collect():
        if family.name.startswith("onenet_worker_"):
            labels = sorted({label for sample in family.samples for label in sample.labels} - {"le"})
            name = family.name.removeprefix("onenet_worker_") + ("_total" if family.type == "counter" else "")
            shown = ", ".join(f"`{label}`" for label in labels)
            rows.append(f"| `{name}` | {family.type} | {shown} | {family.documentation} |")
    return "\n".join(rows)


def alerts() -> list[dict[str, Any]]:
    """Return every alert rule."""
    found = yaml.safe_load((ROOT / "docker" / "prometheus" / "alerts.yml").read_text())
    return [rule for group in found["groups"] for rule in group["rules"]]


def alerts_table() -> str:
    """Return a row for each alert: severity, meaning and action."""
    rows = ["| alert | | means | do |", "| --- | --- | --- | --- |"]
    for rule in alerts():
        notes = {name: _escaped(text) for name, text in rule["annotations"].items()}
        rows.append(f"| `{rule['alert']}` | {rule['labels']['severity']} | {notes['meaning']} | {notes['action']} |")
    return "\n".join(rows)


def _escaped(text: str) -> str:
    return re.sub(r"{{ *\$labels\.(\w+) *}}", r"*\1*", text).replace("|", "\\|").replace("_*", "_\\*")


def chinese_figure_table() -> str:
    """Return the table of the README in Chinese."""
    table = figure_table(_measured(), SUMMARY)
    for english, chinese in _IN_CHINESE.items():
        table = table.replace(english, chinese)
    return table


def _measured() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "docs" / "performance.json").read_text())
    return found


def machine_line() -> str:
    """Return the machine and the number of rounds behind the figures."""
    about = _measured()["machine"]
    return (
        f"Medians of {len(_measured()['rounds']['worker.start.s'])} rounds on {about['processors']} processors, "
        f"{about['system']}, Python {about['python']}, {about['broker']}."
    )


_IN_CHINESE = {
    "median (lowest to highest)": "中位数（最低至最高）",
    "this worker": "本 worker",
    "comparison": "对照",
    "saturated, 64 at a time, commands a second": "满载，64 并发，条/秒",
    "platform at 10 ms, 64 at a time, commands a second": "平台时延 10 ms，64 并发，条/秒",
    "platform at 50 ms, 32 at a time, commands a second": "平台时延 50 ms，32 并发，条/秒",
    "added latency at 320 a second, p99, ms": "每秒 320 条时的附加时延 p99，ms",
    "start until it consumes, s": "从启动到开始消费，s",
    " to ": " 至 ",
}
_LIFETIMES = {
    "10 minutes": timedelta(minutes=10),
    "1 hour": timedelta(hours=1),
    "1 day": timedelta(days=1),
    "7 days": timedelta(days=7),
}
TABLES: dict[tuple[str, str], Callable[[], str]] = {
    ("README.md", "measured"): lambda: f"{figure_table(_measured(), SUMMARY)}\n\n{machine_line()}",
    ("README.zh-CN.md", "measured"): chinese_figure_table,
    ("docs/configuration.md", "settings"): settings_table,
    ("docs/contracts/README.md", "command"): lambda: fields_table(contracts.command_schema()),
    ("docs/contracts/README.md", "reply"): lambda: fields_table(contracts.reply_schema()),
    ("docs/contracts/README.md", "error"): lambda: fields_table(contracts.reply_schema()["properties"]["error"]),
    ("docs/contracts/README.md", "codes"): codes_table,
    ("docs/contracts/README.md", "result"): lambda: fields_table(contracts.result_schema()),
    ("docs/contracts/README.md", "dead-letter"): lambda: fields_table(DeadLetterHeaders.model_json_schema()),
    ("docs/results.md", "results"): results_table,
    ("docs/results.md", "costs"): result_costs_table,
    ("docs/operations.md", "metrics"): metrics_table,
    ("docs/operations.md", "alerts"): alerts_table,
    ("docs/performance.md", "targets"): lambda: target_table(_measured()),
    ("docs/performance.md", "figures"): lambda: figure_table(_measured()),
    ("docs/performance.md", "machine"): machine_line,
}


def code_blocks(text: str) -> list[tuple[str, str]]:
    """Return each code block with its language; diagrams are left out."""
    return re.findall(r"^```(?!mermaid)(\w+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def between(text: str, name: str) -> re.Match[str]:
    """Return the match of the table between its markers."""
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
