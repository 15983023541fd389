#!/usr/bin/env python3
"""Ask the worker in this container whether it lives: exit code 0 if so, else 1. The image's HEALTHCHECK."""

import http.client
import sys
from http import HTTPStatus

from worker.settings import load_settings

TIMEOUT_S = 5


def main() -> int:
    """Return the exit code."""
    settings = load_settings()
    if settings.http_port == 0:
        return 0  # turned off: that the process runs is all that can be known
    # Where it listens on every address, 0.0.0.0 or ::, the same name leads Linux to this machine.
    connection = http.client.HTTPConnection(settings.http_host, settings.http_port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", "/livez")
        answer = connection.getresponse()
        print(answer.read().decode(errors="replace"))
    except (OSError, http.client.HTTPException) as exc:
        print(repr(exc))
        return 1
    return 0 if answer.status == HTTPStatus.OK else 1


if __name__ == "__main__":
    sys.exit(main())
