"""``onenet-worker check``."""

import dataclasses
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from worker.cli.terminal import note, print_json, print_line, print_rows
from worker.errors import EXIT_FAILURE
from worker.printable import counted, printable

if TYPE_CHECKING:
    from worker.admin.checks import CheckResult


_STYLES = {"ok": "green", "warn": "bold yellow", "FAIL": "bold red"}


def check(
    imei: Annotated[
        str,
        typer.Option(metavar="IMEI", help="Whose command history is read; OneNET may refuse one that is not yours."),
    ] = "000000000000000",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per line.")] = False,
) -> None:
    """Check whether a worker could run: settings, broker, topology, idempotency store, and OneNET for each product.

    A line with "warn" says what may keep commands waiting, though a worker could run.

    It also says how many messages wait in the queues and who consumes them, whether the broker has an alarm, and what
    running workers say of themselves. Nothing is changed, and no command is sent. Exit code 1 if one fails. Example:

        onenet-worker check && onenet-worker run
    """
    from worker.admin.checks import check_all

    is_table = not as_json and sys.stdout.isatty()
    results = []
    for result in check_all(imei):
        results.append(result)
        if as_json:
            print_json(dataclasses.asdict(result))
        elif not is_table:
            print_line(f"{_mark(result):<4}  {result.check}: {printable(result.detail)}")
    failed = sum(not result.ok for result in results)
    if is_table:
        rows = [(_mark(result), result.check, result.detail) for result in results]
        print_rows(("", "check", "detail"), rows, is_last_wrapped=True, styles=_STYLES)
        obstacles = [obstacle for result in results for obstacle in result.obstacles]
        if failed:
            note(f"{failed} of {counted(len(results), 'check')} failed")
        elif obstacles:
            note(f"all checks passed, but commands may wait: {'; '.join(obstacles)}")
        else:
            note("all checks passed: onenet-worker run can start a worker")
    if failed:
        raise typer.Exit(EXIT_FAILURE)


def _mark(result: "CheckResult") -> str:
    if not result.ok:
        return "FAIL"
    return "warn" if result.obstacles else "ok"
