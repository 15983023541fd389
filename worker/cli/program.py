"""All commands, and what their errors look like."""

import errno
import os
import re
import sys
from collections.abc import Sequence

import typer

from worker import __version__
from worker.cli import development
from worker.cli.check import check
from worker.cli.dead_letters import dead_letters
from worker.cli.demo import demo
from worker.cli.device import device
from worker.cli.pause import pause, probe, resume
from worker.cli.run import run
from worker.cli.schema import schema
from worker.cli.send import send
from worker.cli.simulator import simulator
from worker.cli.status import status
from worker.cli.terminal import OUTPUT_FULL, flush_stdout, note, prepare_streams
from worker.cli.topology import topology
from worker.cli.unrouted import unrouted
from worker.cli.usage import Program
from worker.errors import (
    EXIT_CONFIG,
    EXIT_FAILURE,
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    SettingsError,
    TopologyMismatch,
    WorkerError,
)

app = typer.Typer(
    cls=Program,
    add_completion=development.IS_INSTALLED,
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # they show local variables, which may contain secrets
    rich_markup_mode="markdown",
    help="Sends commands from RabbitMQ to devices on China Mobile's OneNET NB-IoT platform, and reports the outcome of "
    "each.",
)
for command in (run, check, topology, send, status, device, pause, resume, probe, simulator, demo, schema):
    app.command()(command)
app.add_typer(dead_letters, name="dead-letters")
app.add_typer(unrouted, name="unrouted")


def _print_version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Show the version."),
) -> None:
    """Sends Execute commands from RabbitMQ to OneNET."""


def run_program() -> int:
    """Run the command that was asked for, and return the exit code; errors of this project are printed as lines."""
    prepare_streams()
    code = _refuse_undecodable(sys.argv[1:]) or _run()
    return code if flush_stdout() else EXIT_FAILURE  # as Typer and rich do where they notice it


def _refuse_undecodable(arguments: Sequence[str]) -> int:
    """Refuse arguments that are no text in the terminal's encoding, but for names of files; 0: there is none."""
    for argument in arguments:
        if not argument.isascii() and re.search("[\ud800-\udfff]", argument) and not os.path.lexists(argument):
            note(
                f"an argument is no text in this terminal's encoding, {sys.getfilesystemencoding()}: {argument}; "
                "LC_ALL=C.UTF-8 chooses UTF-8"
            )
            return EXIT_USAGE
    return 0


def _run() -> int:
    try:
        app(prog_name="onenet-worker")
    except SystemExit as exc:
        return exc.code if isinstance(exc.code, int) else int(exc.code is not None)
    except WorkerError as exc:
        for line in exc.lines:
            print(f"onenet-worker: {line}", file=sys.stderr)
        return EXIT_CONFIG if isinstance(exc, SettingsError | TopologyMismatch) else EXIT_FAILURE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except OSError as exc:
        if exc.errno != errno.ENOSPC:
            raise
        note(OUTPUT_FULL)
        return EXIT_FAILURE
    return 0
