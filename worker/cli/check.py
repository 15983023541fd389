"""``onenet-worker check``."""

import dataclasses
import sys
from typing import Annotated

import typer

from worker.cli.terminal import print_rows
from worker.errors import EXIT_FAILURE
from worker.printable import printable, printable_json

_MARKS = {True: "ok", False: "FAIL"}


def check(
    imei: Annotated[
        str, typer.Option(help="The device whose command history is read; OneNET may refuse one that is not yours.")
    ] = "000000000000000",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per line.")] = False,
) -> None:
    """Check whether a worker could run: settings, broker, topology, idempotency store, and OneNET for each product.

    It also says how many messages wait in the queues, and who consumes them. Nothing is changed, and no command is
    sent. Exit code 1 if a check fails. Example:

        onenet-worker check && onenet-worker run
    """
    from worker.cli.checks import check_all

    all_ok = True
    results = []
    for result in check_all(imei):
        all_ok = all_ok and result.ok
        if as_json:
            typer.echo(printable_json(dataclasses.asdict(result)))
        elif sys.stdout.isatty():
            results.append(result)
        else:
            typer.echo(f"{_MARKS[result.ok]:<4}  {result.check}: {printable(result.detail)}")
    rows = [(_MARKS[result.ok], result.check, result.detail) for result in results]
    print_rows(("", "check", "detail"), rows, is_last_wrapped=True, styles={"ok": "green", "FAIL": "bold red"})
    if not all_ok:
        raise typer.Exit(EXIT_FAILURE)
