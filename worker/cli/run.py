"""``onenet-worker run``."""

import typer


def run() -> None:
    """Run the worker until SIGTERM or SIGINT.

    Everything is set by environment variables, or a file `.env`. Example:

        ONENET_API_KEY=... AMQP_URL=amqp://user:password@broker/ onenet-worker run
    """
    from worker import app
    from worker.settings import load_settings

    raise typer.Exit(app.run(load_settings()))
