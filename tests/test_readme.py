"""The documents agree with the code."""

import re

import pytest

from schemas.command import COMMAND
from scripts.documents import ROOT, TABLES, between, code_blocks, codes_table, settings_table

README = (ROOT / "README.md").read_text()
CHINESE = (ROOT / "README.zh-CN.md").read_text()


@pytest.mark.parametrize(("document", "name"), TABLES)
def test_generated_tables_match_the_code(document: str, name: str) -> None:
    found = between((ROOT / document).read_text(), name)
    assert found[0] == TABLES[document, name]() + "\n", "run `make docs`"


@pytest.mark.parametrize(("name", "table"), [("settings", settings_table), ("codes", codes_table)])
def test_tables_of_the_chinese_readme_have_the_same_rows(name: str, table: object) -> None:
    assert callable(table)

    def rows(text: str) -> list[list[str]]:
        return [re.split(r"\s*\|\s*", line)[1:3] for line in text.strip().splitlines()[2:]]

    assert rows(between(CHINESE, name)[0]) == rows(table())


@pytest.mark.parametrize("text", [README, CHINESE], ids=["English", "Chinese"])
def test_each_field_of_a_command_is_described(text: str) -> None:
    described = set(re.findall(r"`([a-z_]+)`", text))
    assert set(COMMAND.json_schema()["properties"]) <= described


@pytest.mark.parametrize("text", [README, CHINESE], ids=["English", "Chinese"])
def test_each_log_event_is_listed(text: str) -> None:
    """Events are found in the source by the calls of the logger's methods."""
    sources = "".join(path.read_text() for path in (ROOT / "worker").rglob("*.py"))
    events = set(re.findall(r'log\.(?:debug|info|warning|error|critical)\(\s*"([a-z_]+)"', sources))
    assert {"command_accepted", "worker_started"} <= events
    assert events <= set(re.findall(r"`([a-z_]+)`", text))


def test_both_readmes_show_the_same_code() -> None:
    assert code_blocks(CHINESE) == code_blocks(README)


def test_relative_links_point_to_existing_files() -> None:
    documents = [ROOT / "README.md", ROOT / "README.zh-CN.md", *(ROOT / "docs").rglob("*.md")]
    for document in documents:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"
