"""Servers for demo, tests and benchmark: installs the system's package of each that could not be started otherwise.

The package of a server is needed where neither the server is installed nor a Docker engine has its image. Run it as
``python -m scripts.services rabbitmq redis``.
"""

import argparse
import subprocess
from pathlib import Path
from typing import Literal

from worker.dev.services import broker, redis

Server = Literal["rabbitmq", "redis"]
APT_INSTALL = Path(__file__).with_name("apt-install")
_IS_INSTALLED = {"rabbitmq": broker.is_installed, "redis": redis.is_installed}
_AVAILABLE = {"rabbitmq": broker.is_available, "redis": redis.is_available}


def provide(*servers: Server) -> None:
    """Install what is missing; where that is not allowed, starting the server fails and names the alternatives."""
    for server in servers:
        if not _AVAILABLE[server]():
            subprocess.run([APT_INSTALL, f"{server}-server"], check=False)


def provide_installed(*servers: Server) -> None:
    """Install what is not installed: a cluster consists of private processes, not of containers."""
    for server in servers:
        if not _IS_INSTALLED[server]():
            subprocess.run([APT_INSTALL, f"{server}-server"], check=False)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m scripts.services", description=__doc__)
    parser.add_argument("server", nargs="+", choices=sorted(_AVAILABLE))
    provide(*parser.parse_args().server)


if __name__ == "__main__":
    main()
