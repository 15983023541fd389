"""``onenet-worker demo``."""

from typing import Annotated

import typer

from worker.cli.development import not_installed


def demo(
    commands: Annotated[
        int, typer.Option(help="How many commands to send; 20 of them are sent twice.", min=150, max=5_000)
    ] = 400,
    keep: Annotated[
        bool,
        typer.Option("--keep", help="At the end keep everything running until ctrl-C, and say what can be tried."),
    ] = False,
) -> None:
    """Run a broker, a OneNET simulator and the real worker, and send valid and faulty commands of every kind.

    No configuration is needed. The broker is the one in AMQP_URL, or else one in Docker, or else a private node of the
    installed rabbitmq-server. Everything that was started or declared is removed at the end, also if it ends early.
    Takes half a minute to a minute. Exit code 1 if an outcome is not as expected. Example:

        onenet-worker demo --keep
    """
    from rich.console import Console

    from worker.cli.settings import note_unknown_settings

    note_unknown_settings()
    try:
        from worker.dev.demo import run_demo
    except ImportError as exc:
        raise not_installed("demo") from exc
    all_ok = run_demo(Console(), commands, keep=keep)
    raise typer.Exit(0 if all_ok else 1)
