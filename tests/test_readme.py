"""What the README says of the code is true."""

import re
from pathlib import Path

from pydantic import SecretStr

from schemas.command import COMMAND
from worker.settings import Settings

README = Path(__file__).parent.parent / "README.md"


def settings_table() -> str:
    """Return the table of settings as the code has them."""
    rows = ["| variable | default | |", "| --- | --- | --- |"]
    for name, field in Settings.model_fields.items():
        default = field.default
        values = default if isinstance(default, tuple) else () if default is None else (default,)
        shown = ",".join(
            value.get_secret_value()
            if isinstance(value, SecretStr)
            else str(value).lower()
            if isinstance(value, bool)
            else f"{value:g}"
            if isinstance(value, float)
            else str(value)
            for value in values
        )
        rows.append(f"| `{name.upper()}` | {f'`{shown}`' if shown else ''} | {field.description} |")
    return "\n".join(rows)


def test_the_table_of_settings_is_the_codes() -> None:
    text = README.read_text()
    found = re.search(r"<!-- settings: .*? -->\n(.*?)\n?<!-- end of settings -->", text, re.DOTALL)
    assert found is not None
    assert found[1] == settings_table(), f"put this between the markers:\n{settings_table()}"


def test_every_field_of_a_command_is_described() -> None:
    described = set(re.findall(r"`([a-z_]+)`", README.read_text()))
    assert set(COMMAND.json_schema()["properties"]) <= described
