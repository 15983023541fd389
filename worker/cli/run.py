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
    from worker.settings import load_settings

    gc.enable()
    # Exits at once: the interpreter would wait for asyncio's threads, one of which may be resolving a host name.
    os._exit(app.run(load_settings()))
