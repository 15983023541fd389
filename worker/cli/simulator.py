"""``onenet-worker simulator``."""

import asyncio
import os
import signal
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from worker.errors import SettingsError, WorkerError

if TYPE_CHECKING:
    from worker.simulator.faults import Fault


def simulator(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65535)] = 8580,
    api_key: Annotated[str, typer.Option(help="The MasterKey that it accepts.")] = "simulator-key",
    product_id: Annotated[str | None, typer.Option(help='The product id in mode "safe".')] = None,
    latency: Annotated[float, typer.Option(help="Seconds before each answer.", min=0)] = 0.0,
    offline: Annotated[list[str] | None, typer.Option(help="An IMEI that is offline; may be repeated.")] = None,
    fault: Annotated[
        list[str] | None,
        typer.Option(
            help="KIND, KIND=PROBABILITY or KIND=PROBABILITY,SECONDS; may be repeated. Kinds: refuse, hang, drop, "
            "drop_after_caching, error_500, error_500_after_caching, error_503, too_many_requests, errno, "
            "errno_after_caching, garbage, garbage_after_caching, no_uuid, redirect, not_found, slow_drip, "
            "late_caching."
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the random faults, to repeat a run.")] = None,
) -> None:
    """Run a OneNET simulator for development and tests on this machine.

    It follows the platform's documented rules and fails on request. `GET` and `PUT /control/faults` read and replace
    its faults while it runs, also those of the command history; `GET /control/commands` lists the cached commands, `GET
    /control/requests` the requests. The access key of mode "safe" is read from SIMULATOR_ACCESS_KEY. Example:

        onenet-worker simulator --latency 0.05 --fault hang=0.01,30 --fault error_500_after_caching=0.02
    """
    try:
        from worker.simulator.server import Simulator
    except ImportError as exc:
        raise WorkerError("the simulator needs an extra: pip install 'onenet-execute-worker[simulator]'") from exc
    from worker.simulator.faults import FaultPlan
    from worker.simulator.platform import Platform

    platform = Platform(
        api_key=api_key,
        product_id=product_id,
        access_key=os.environ.get("SIMULATOR_ACCESS_KEY"),
        offline=frozenset(offline or ()),
    )
    plan = FaultPlan([_parse(text) for text in fault or ()], seed)
    try:
        server = Simulator(platform, plan, latency_s=latency, host=host, port=port)
    except OSError as exc:
        raise WorkerError(f"cannot listen on {host}:{port}: {exc.strerror}") from exc
    typer.echo(f"OneNET simulator at {server.url}, faults at {server.url}/control/faults; ctrl-C stops it")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn raises the signal again after its shutdown
    try:
        asyncio.run(server.serve())
    except KeyboardInterrupt:
        typer.echo("stopped")


def _parse(text: str) -> "Fault":
    from pydantic import ValidationError

    from worker.simulator.faults import Fault

    try:
        return Fault.model_validate(text)
    except ValidationError as exc:
        reasons = "; ".join(f"{error['loc'][0]}: {error['msg']}" for error in exc.errors(include_url=False))
        raise SettingsError([f"--fault {text}: {reasons}"]) from exc
