"""``onenet-worker demo``."""

import signal
import sys
from typing import Annotated

import typer


def demo(
    commands: Annotated[int, typer.Option(help="How many commands to send.", min=150, max=5_000)] = 400,
) -> None:
    """Show all of it at once: a broker, a OneNET simulator, the real worker and commands of all kinds, good and bad.

    Nothing has to be configured. The broker is the one that AMQP_URL names, else one in Docker, else a private node of
    the rabbitmq-server on this machine. Whatever is started is stopped, whatever is declared is deleted. Example:

        onenet-worker demo --commands 1000
    """
    from rich.console import Console

    from worker.dev.demo import run_demo

    for number in (signal.SIGTERM, signal.SIGHUP):  # so that what was started is stopped then too
        signal.signal(number, lambda caught, _frame: sys.exit(128 + caught))
    console = Console()
    try:
        all_well = run_demo(console, commands)
    except KeyboardInterrupt:
        console.print("\ninterrupted: everything that was started has been stopped")
        raise
    raise typer.Exit(0 if all_well else 1)
