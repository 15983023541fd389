#!/usr/bin/env python3
"""The image's HEALTHCHECK: exits with 0 if the worker in this container is live, else with 1."""

import http.client
import sys
from http import HTTPStatus

from worker.settings import load_settings

TIMEOUT_S = 5


def main() -> int:
    """Return the exit code."""
    settings = load_settings()
    if settings.http_port == 0:
        return 0  # the endpoint is turned off; only the running process shows that the worker is live
    # If the worker listens on all addresses (0.0.0.0 or ::), Linux connects these names to the local machine.
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
