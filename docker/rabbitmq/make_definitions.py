#!/usr/bin/env python3
"""Write the definitions that the broker imports: the worker's topology, and a user with a generated password.

The password is generated once and stored in the worker's URL. The definitions, on another volume, have its hash only.
"""

import base64
import hashlib
import json
import secrets
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from worker.settings import load_settings

NAME, VHOST = "onenet", "/"
URL = Path("/run/broker-access/amqp-url")
DEFINITIONS = Path("/run/definitions/definitions.json")


def access(password: str) -> dict[str, list[dict[str, Any]]]:
    """Return the vhost, and its only user with all permissions.

    Source: https://www.rabbitmq.com/docs/passwords#computing-password-hash
    """
    salt = secrets.token_bytes(4)
    user = {
        "name": NAME,
        "password_hash": base64.b64encode(salt + hashlib.sha256(salt + password.encode()).digest()).decode(),
        "hashing_algorithm": "rabbit_password_hashing_sha256",
        "tags": ["monitoring"],  # to see everything in the management UI
    }
    rights = {"user": NAME, "vhost": VHOST, "configure": ".*", "write": ".*", "read": ".*"}
    return {"vhosts": [{"name": VHOST}], "users": [user], "permissions": [rights]}


def main() -> None:
    """Write both files; an existing password is kept."""
    if not URL.exists():
        URL.write_text(f"amqp://{NAME}:{secrets.token_urlsafe(24)}@rabbitmq:5672/\n")
    password = urlsplit(URL.read_text().strip()).password or ""
    definitions = access(password) | load_settings().topology.definitions(VHOST)
    DEFINITIONS.write_text(json.dumps(definitions, indent=2))


if __name__ == "__main__":
    main()
