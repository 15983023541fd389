"""``onenet-worker run``."""

import os


def run() -> None:
    """Run the worker until SIGTERM or SIGINT.

    Everything is set by environment variables, or a file `.env`. Example:

        ONENET_API_KEY=... AMQP_URL=amqp://user:password@broker/ onenet-worker run
    """
    from worker import app
    from worker.settings import load_settings

    # At once: the interpreter would wait for asyncio's threads, one of which may be looking up a broker's name.
    os._exit(app.run(load_settings()))
