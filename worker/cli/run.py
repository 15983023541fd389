"""``onenet-worker run``."""

import gc
import os


def run() -> None:
    """Run the worker until SIGTERM or SIGINT.

    Settings come from environment variables or a file `.env`. Example:

        ONENET_API_KEY=... AMQP_URL=amqp://user:password@broker/ onenet-worker run
    """
    gc.disable()  # imports leave no garbage, and each collection would look at all that was imported so far

    from worker.telemetry import import_structlog_without_rich

    import_structlog_without_rich()

    from worker import app
    from worker.cli.settings import note_unknown_settings
    from worker.errors import SettingsError
    from worker.settings import load_settings

    gc.enable()
    try:
        exit_code = app.run(load_settings())
    except SettingsError:
        note_unknown_settings()  # a worker that starts logs them; one of them may be the setting that is missing
        raise
    # Exits at once: the interpreter would wait for asyncio's threads, one of which may be resolving a host name.
    os._exit(exit_code)
