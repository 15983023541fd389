"""The documents agree with the code, with each other, and with the tests that run what they say."""

import re
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest

from scripts.documents import ROOT, TABLES, between, code_blocks, metrics_table, settings_table
from tests.support.documents import CONTRACTS, OPERATIONS, README, SECURITY, commands, documents
from worker.simulator.faults import Failure
from worker.simulator.writings import Writing

EN_AND_ZH = ["README.md", "README.zh-CN.md"]
PAIRS = [
    (README, "README.zh-CN.md"),
    ("docs/operations.md", "docs/operations.zh-CN.md"),
    ("docs/configuration.md", "docs/configuration.zh-CN.md"),
]
# Who runs the commands of a section; a new section with commands needs a test.
RUN_BY = {
    (README, "Run it"): "tests/integration/test_readme_commands.py",
    (README, "Send a command"): "tests/integration/test_readme_commands.py",
    (OPERATIONS, "Commands"): "tests/containers/test_documents.py",
    (OPERATIONS, "Pause, resume and probe by hand"): "tests/integration/test_operations_commands.py",
    (OPERATIONS, "What became of one command, or of one device"): "tests/integration/test_operations_commands.py",
    (OPERATIONS, "Unrouted replies"): "tests/integration/test_operations_commands.py",
    (OPERATIONS, "Dead letters"): "tests/integration/test_operations_commands.py",
    (OPERATIONS, "RabbitMQ on three nodes"): "tests/cluster/test_recipes.py",
    (OPERATIONS, "Redis with Sentinel"): "tests/cluster/test_recipes.py",
    (OPERATIONS, "Rotate a key or a password"): "tests/integration/test_operations_commands.py",
    (SECURITY, "RabbitMQ"): "tests/integration/test_security.py",
    (SECURITY, "Redis"): "tests/integration/test_security.py",
    ("docs/simulator.md", "The simulator"): "tests/integration/test_operations_commands.py",
    ("docs/simulator.md", "Control it while it runs"): "tests/integration/test_operations_commands.py",
}
# What a test run cannot do, or does by being run.
NOT_RUN = {
    (README, "Try it"): "make demo runs onenet-worker demo, as test_demo.py does, and make test runs this",
    ("docs/development.md", "Set up"): "make test, which runs this",
    ("docs/development.md", "Run some tests"): "pytest, which runs this",
    ("docs/performance.md", "Measure"): "make bench takes a quarter of an hour",
    ("docs/releasing.md", "Steps"): "needs a published release",
}


def _text(document: str) -> str:
    return (ROOT / document).read_text()


@pytest.mark.parametrize(("document", "name"), TABLES)
def test_generated_tables_match_the_code(document: str, name: str) -> None:
    found = between(_text(document), name)
    assert found[0] == TABLES[document, name]() + "\n", "run `make docs`"


def _names(table: str) -> list[str]:
    return [line.split("|")[1].strip(" `") for line in table.strip().splitlines()[2:]]


def _marked(document: str, name: str) -> str:
    found = re.search(rf"<!-- {name}.*? -->\n(.*?)<!-- end of {name} -->", _text(document), re.DOTALL)
    assert found is not None, name
    return found[1]


@pytest.mark.parametrize(
    ("document", "name", "table"),
    [
        ("docs/configuration.zh-CN.md", "settings", settings_table),
        ("docs/operations.zh-CN.md", "metrics", metrics_table),
        ("docs/operations.zh-CN.md", "alerts", TABLES["docs/operations.md", "alerts"]),
    ],
)
def test_chinese_tables_have_the_same_rows(document: str, name: str, table: Callable[[], str]) -> None:
    assert _names(_marked(document, name)) == _names(table())


def test_the_chinese_settings_have_the_same_defaults_and_ranges() -> None:
    def facts(table: str, bounds: str) -> list[tuple[list[str], list[str]]]:
        return [(row.split(" | ")[:2], re.findall(bounds, row)) for row in table.strip().splitlines()[2:]]

    chinese = facts(_marked("docs/configuration.zh-CN.md", "settings"), r"（([\d.,]+) 至 ([\d.,]+)） \|$")  # noqa: RUF001 - Chinese brackets
    assert [names for names, _ in chinese] == [names for names, _ in facts(settings_table(), "")]
    assert [found for _, found in chinese] == [
        found for _, found in facts(settings_table(), r" \(([\d.,]+) to ([\d.,]+)\) \|$")
    ]


@pytest.mark.parametrize("document", EN_AND_ZH)
def test_a_readme_is_read_in_one_go(document: str) -> None:
    assert len(_text(document).splitlines()) <= 150


@pytest.mark.parametrize(("english", "chinese"), PAIRS)
def test_both_languages_show_the_same_code(english: str, chinese: str) -> None:
    assert code_blocks(_text(chinese)) == code_blocks(_text(english))


def test_each_log_event_is_described_with_its_level() -> None:
    """Events are found in the source by the calls of the logger's methods, and those of variables by their names."""
    sources = "".join(path.read_text() for path in (ROOT / "worker").rglob("*.py"))
    found = re.findall(r'log\.(debug|info|warning|error|critical|exception)\(\s*"([a-z_]+)"', sources)
    levels = {event: "error" if level == "exception" else level for level, event in found}
    assert {"command_accepted", "worker_started"} <= levels.keys()
    rows = re.findall(r"^\| `([a-z_]+)` \| (\w+) \| ", _marked(CONTRACTS, "events"), re.MULTILINE)
    described = dict(rows)
    assert len(described) == len(rows)
    assert {event: described.get(event) for event in levels} == levels
    assert {event for event in described if f'"{event}"' not in sources} == set()


def test_each_fault_of_the_simulator_is_described() -> None:
    described = [name.strip("` ") for row in _names(_marked("docs/simulator.md", "faults")) for name in row.split(",")]
    assert sorted(described) == sorted([*get_args(Failure), *get_args(Writing)])


def _targets(document: Path) -> list[str]:
    text = re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"\]\(([^)\s]+)\)", text)


def _anchors(document: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_no_relative_link_is_dead() -> None:
    for document in documents():
        for target in _targets(document):
            path, _, anchor = target.partition("#")
            if ":" in path:
                continue
            place = (document.parent / path).resolve() if path else document
            assert place.exists(), f"{document.name}: {target}"
            assert not anchor or anchor in _anchors(place), f"{document.name}: {target}"


def test_every_document_is_in_an_index() -> None:
    indexes = [ROOT / "README.md", ROOT / "docs" / "README.md", ROOT / "docs" / "decisions" / "README.md"]
    linked = {(index.parent / target.partition("#")[0]).resolve() for index in indexes for target in _targets(index)}
    english = {path for path in (ROOT / "docs").rglob("*.md") if not path.name.endswith("zh-CN.md")}
    assert english <= linked


def test_every_command_of_every_document_is_run_by_a_test() -> None:
    found = {
        (command.document, command.section)
        for document in documents()
        if not document.name.endswith("zh-CN.md")  # whose code is that of the English one
        for command in commands(str(document.relative_to(ROOT)))
    }
    assert found == RUN_BY.keys() | NOT_RUN.keys()
    for (document, section), module in RUN_BY.items():
        assert (ROOT / module).exists(), f"{document}, {section}"


def test_each_folder_and_file_of_the_tests_that_is_named_exists() -> None:
    named = set(re.findall(r"tests/[\w/]+(?:\.\w+)*", _text("docs/development.md")))
    assert "tests/integration/test_flow.py" in named
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("document", ["docs/operations.md", "docs/operations.zh-CN.md"])
def test_each_line_of_check_is_described(document: str) -> None:
    checks = set(re.findall(r'CheckResult\(\s*"(\w+)"', _text("worker/admin/checks.py")))
    _, _, table = _text(document).partition("| `settings` | ")
    described = re.findall(r"^\| `(\w+)`", "| `settings` | " + table.partition("\n\n")[0], re.MULTILINE)
    assert "permissions" in checks
    assert sorted(described) == sorted({*checks, "OneNET"})


def test_the_picture_of_the_demo_shows_what_the_demo_shows() -> None:
    """It is made by ``make docs``."""
    root = ET.fromstring(_text("docs/demo.svg"))
    shown = "".join(root.itertext()).replace("\u00a0", " ")
    for words in ("accepted", "outcome_unknown", "onenet_rejected", "stopped"):
        assert words in shown
    assert "http://" not in re.sub(r'xmlns="[^"]*"|http://127\.0\.0\.1:\d+', "", _text("docs/demo.svg"))


def test_the_version_is_said_in_one_place_and_repeated_where_it_must_be() -> None:
    version = tomllib.loads(_text("pyproject.toml"))["project"]["version"]
    assert f"newTag: {version}\n" in _text("docker/kubernetes/kustomization.yaml")
    assert f"| status | {version}, " in _text(README)
    assert f"| 状态 | {version}" in _text("README.zh-CN.md")


def test_a_tag_that_is_not_the_version_is_not_released() -> None:
    version = tomllib.loads(_text("pyproject.toml"))["project"]["version"]
    check = [sys.executable, str(ROOT / "scripts" / "release-version")]
    right = subprocess.run([*check, f"v{version}"], capture_output=True, text=True, check=False)
    assert (right.stdout, right.stderr) == (f"version={version}\n", "")
    wrong = subprocess.run([*check, "v9.9.9"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 1
    assert "the tag is v9.9.9" in wrong.stderr
    notes = subprocess.run([ROOT / "scripts" / "release-notes", version], capture_output=True, text=True, check=True)
    assert notes.stdout.strip()
