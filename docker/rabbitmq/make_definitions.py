#!/usr/bin/env python3
"""Write the definitions that the broker imports: the worker's topology, and two users with generated passwords.

Each password is generated once and stored in its user's URL. The definitions, on another volume, have the hashes only.
"""

import base64
import hashlib
import json
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from worker.amqp.topology import Topology
from worker.settings import load_settings

WORKER, UPSTREAM, VHOST = "worker", "upstream", "/"
URLS = {name: Path(f"/run/broker-access/{name}-url") for name in (WORKER, UPSTREAM)}
DEFINITIONS = Path("/run/definitions/definitions.json")
NOTHING = "^$"


def access(passwords: Mapping[str, str], topology: Topology, *, may_declare: bool) -> dict[str, list[dict[str, Any]]]:
    """Return the vhost, its users and their permissions.

    Args:
        passwords: of each user, by its name.
        topology: what the permissions are for.
        may_declare: whether the worker declares the topology.

    Source: https://www.rabbitmq.com/docs/access-control#authorisation
    """
    # Its container is also where `send --wait` runs, which reads replies from a queue that the broker names.
    reply_queues = r"amq\.gen-"
    worker = f"^({re.escape(topology.namespace)}\\.|{reply_queues})"
    own = rf"{UPSTREAM}\."
    commands, replies = (re.escape(name) for name in (topology.commands_exchange, topology.replies_exchange))
    return {
        "vhosts": [{"name": VHOST}],
        "users": [
            _user(WORKER, passwords[WORKER], ["monitoring"]),  # to see everything in the management UI
            _user(UPSTREAM, passwords[UPSTREAM], []),
        ],
        "permissions": [
            {
                "user": WORKER,
                "vhost": VHOST,
                "configure": worker if may_declare else f"^{reply_queues}",
                "write": worker,
                "read": worker,
            },
            {
                "user": UPSTREAM,
                "vhost": VHOST,
                "configure": f"^{own}",
                "write": f"^({own}|{commands}$)",
                "read": f"^({own}|{replies}$)",
            },
        ],
        # To bind a queue to the topic exchange of replies is to read from it: the routing keys of its own replies only,
        # and one # in each, because the time to compare them grows exponentially with their number.
        "topic_permissions": [
            {
                "user": UPSTREAM,
                "vhost": VHOST,
                "exchange": topology.replies_exchange,
                "write": NOTHING,
                "read": rf"^((execute|result)\.(\*|[a-z]+)\.{UPSTREAM}|{UPSTREAM}(\.[^.#]+)*(\.#)?)$",
            }
        ],
    }


def _user(name: str, password: str, tags: list[str]) -> dict[str, Any]:
    """Return a user's definition.

    Source: https://www.rabbitmq.com/docs/passwords#computing-password-hash
    """
    salt = secrets.token_bytes(4)
    return {
        "name": name,
        "password_hash": base64.b64encode(salt + hashlib.sha256(salt + password.encode()).digest()).decode(),
        "hashing_algorithm": "rabbit_password_hashing_sha256",
        "tags": tags,
    }


def _password(name: str) -> str:
    """Return the password in a user's URL, which is generated if there is none."""
    if not URLS[name].exists():
        URLS[name].write_text(f"amqp://{name}:{secrets.token_urlsafe(24)}@rabbitmq:5672/\n")
    return urlsplit(URLS[name].read_text().strip()).password or ""


def main() -> None:
    """Write the URLs and the definitions; existing passwords are kept."""
    settings = load_settings()
    passwords = {name: _password(name) for name in (WORKER, UPSTREAM)}
    topology = settings.topology
    users = access(passwords, topology, may_declare=settings.amqp_declare)
    DEFINITIONS.write_text(json.dumps(users | topology.definitions(VHOST), indent=2))


if __name__ == "__main__":
    main()
