"""What commands print of texts from outside."""

import json
from collections.abc import Callable

import pytest
from typer.testing import CliRunner

from worker.admin import checks
from worker.cli import program
from worker.errors import EXIT_CONFIG, EXIT_FAILURE, SettingsError, TopologyMismatch, WorkerError

HARMFUL = "a\x1b[2J\x9b\x7f\u2028\u202e\nok    forged: [red]x[/red]"
SHOWN = "a\\x1b[2J\\x9b\\x7f\\u2028\\u202e\\nok    forged: [red]x[/red]"


def test_check_prints_one_printable_line_for_each_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """The broker, Redis and OneNET choose the words of some."""
    monkeypatch.setattr(checks, "check_all", lambda _imei: [checks.CheckResult("broker", ok=False, detail=HARMFUL)])
    result = CliRunner().invoke(program.app, ["check"])
    assert (result.exit_code, result.stdout) == (EXIT_FAILURE, f"FAIL  broker: {SHOWN}\n")
    result = CliRunner().invoke(program.app, ["check", "--json"])
    assert result.stdout.removesuffix("\n").isprintable()
    assert json.loads(result.stdout)["detail"] == HARMFUL


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (lambda: WorkerError(HARMFUL), EXIT_FAILURE, [f"onenet-worker: {SHOWN}"]),
        (lambda: TopologyMismatch(HARMFUL), EXIT_CONFIG, [f"onenet-worker: {SHOWN}"]),
        (
            lambda: WorkerError("two lines", HARMFUL),
            EXIT_FAILURE,
            ["onenet-worker: two lines", f"onenet-worker: {SHOWN}"],
        ),
        (lambda: SettingsError(["A: no", HARMFUL]), EXIT_CONFIG, ["onenet-worker: A: no", f"onenet-worker: {SHOWN}"]),
        (lambda: WorkerError("x" * 5000), EXIT_FAILURE, ["onenet-worker: " + "x" * 1000 + "…"]),
    ],
    ids=["one line", "topology", "several lines", "settings", "long"],
)
def test_an_error_has_no_line_but_its_own(
    error: Callable[[], WorkerError],
    code: int,
    lines: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(**_: object) -> None:
        raise error()

    monkeypatch.setattr(program, "app", fail)
    assert program.run_program() == code
    assert capsys.readouterr().err.split("\n") == [*lines, ""]
