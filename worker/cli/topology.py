"""``onenet-worker topology``."""

import json
from typing import Annotated

import typer

from worker.cli.terminal import print_line


def topology(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print them in the broker's definitions format instead.")
    ] = False,
) -> None:
    """Declare the exchanges, queues and bindings on the broker, or print them.

    Example, for a broker that imports definitions at its start:

        onenet-worker topology --json > definitions.json
    """
    from worker.amqp.blocking import declare
    from worker.amqp.connection import connection_parameters, printable_address
    from worker.cli.settings import read_settings

    settings = read_settings()
    wanted = settings.topology
    if as_json:
        vhost = connection_parameters(settings.broker_address)[0].virtual_host
        print_line(json.dumps(wanted.definitions(vhost), indent=2))
        return
    parameters = declare(settings.broker_address, wanted)
    lines = [f"exchange  {exchange.name}" for exchange in wanted.exchanges()]
    lines += [f"queue     {queue.name}" for queue in wanted.queues()]
    print_line(f"declared on {printable_address(parameters)}:\n  " + "\n  ".join(lines))
