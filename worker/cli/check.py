"""``onenet-worker check``."""

import dataclasses
import json
import sys
from typing import Annotated

import typer

from worker.errors import EXIT_FAILURE


def check(
    imei: Annotated[
        str, typer.Option(help="Whose command history OneNET is asked for: a device of yours, or OneNET may refuse.")
    ] = "000000000000000",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per line.")] = False,
) -> None:
    """Look whether a worker could run: settings, broker, topology, idempotency store, and OneNET for each product.

    Nothing is changed, and no command is sent. Exit code 1 if anything is not well. Example:

        onenet-worker check && onenet-worker run
    """
    from worker.cli.checks import check_all

    all_well = True
    findings = []
    for finding in check_all(imei):
        all_well = all_well and finding.is_well
        if as_json:
            typer.echo(json.dumps(dataclasses.asdict(finding), ensure_ascii=False))
        elif sys.stdout.isatty():
            findings.append(finding)
        else:
            typer.echo(f"{'ok  ' if finding.is_well else 'FAIL'}  {finding.check}: {finding.detail}")
    if findings:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table("", "check", "detail")
        for finding in findings:
            mark = Text("ok", "green") if finding.is_well else Text("FAIL", "bold red")
            table.add_row(mark, Text(finding.check), Text(finding.detail))
        Console().print(table)
    if not all_well:
        raise typer.Exit(EXIT_FAILURE)
