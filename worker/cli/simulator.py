"""``onenet-worker simulator``."""

import asyncio
import base64
import errno
import os
import signal
import sys
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from worker.cli.development import not_installed
from worker.cli.terminal import print_line
from worker.errors import SettingsError, WorkerError

if TYPE_CHECKING:
    from worker.simulator.faults import Fault


class _Errors(StrEnum):
    SERVICE = "service"
    API = "api"


class _QueueErrno(StrEnum):
    SYSTEM_LOGIC_LIMIT = "5006"
    SYSTEM_LIMIT = "13"


class _Body(StrEnum):
    REQUIRED = "required"
    OPTIONAL = "optional"


class _Cancel(StrEnum):
    BEFORE_VALID_TIME = "before-valid-time"
    WHILE_WAITING = "while-waiting"


def simulator(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65535)] = 8580,
    api_key: Annotated[str, typer.Option(help="The MasterKey that it accepts on v1.")] = "simulator-key",
    product_id: Annotated[str | None, typer.Option(help="Accept tokens of products/ID, signed with its key.")] = None,
    user_id: Annotated[str | None, typer.Option(help="Accept tokens of userid/ID on v2.")] = None,
    project_id: Annotated[str | None, typer.Option(help="Accept tokens of projects/ID on v2.")] = None,
    errors: Annotated[
        _Errors, typer.Option(help="The table of errno on v1: of the NB-IoT service, or of the API layer.")
    ] = _Errors.SERVICE,
    queue: Annotated[
        int, typer.Option(help="Most commands that wait for one device; 0: no limit.", min=0, max=100_000)
    ] = 10,
    queue_errno: Annotated[
        _QueueErrno | None, typer.Option(help="The errno of a full queue on v1; default: that of --errors.")
    ] = None,
    rate: Annotated[int, typer.Option(help="Most calls in a second; 0: no limit.", min=0, max=1_000_000)] = 300,
    body: Annotated[
        _Body, typer.Option(help="Whether Execute needs a body. The platform's pages contradict each other.")
    ] = _Body.REQUIRED,
    cancel: Annotated[
        _Cancel, typer.Option(help="Which commands can be cancelled. The documentation can be read both ways.")
    ] = _Cancel.BEFORE_VALID_TIME,
    clock_offset: Annotated[float, typer.Option(help="Seconds by which its clock is ahead; may be negative.")] = 0.0,
    devices: Annotated[
        str,
        typer.Option(help="What devices do: down, up, up:STATUS with a confirm status, or offline."),
    ] = "down",
    device: Annotated[
        list[str] | None, typer.Option(help="IMEI=BEHAVIOUR, what one device does; may be repeated.")
    ] = None,
    offline: Annotated[list[str] | None, typer.Option(help="Short for --device IMEI=offline; may be repeated.")] = None,
    latency: Annotated[float, typer.Option(help="Seconds before each answer.", min=0)] = 0.0,
    fault: Annotated[
        list[str] | None,
        typer.Option(
            help="KIND, KIND=PROBABILITY or KIND=PROBABILITY,SECONDS; may be repeated. Kinds: refuse, hang, drop, "
            "drop_after_caching, error_500, error_500_after_caching, error_503, too_many_requests, "
            "too_many_requests_date, errno, errno_after_caching, errno_in_chinese, garbage, "
            "garbage_after_caching, no_uuid, redirect, not_found, slow_drip, late_caching, ids_decimal, ids_text, "
            "ids_number, defaults_filled, empty_as_null, emoji_as_question_marks, quotes_escaped, blank_cut, "
            "blank_added, seconds_dropped, milliseconds_added, times_utc, time_placeholder, count_for_total, "
            "items_absent, short_page, type_number, content_object, content_empty_object, content_text, "
            "content_empty, content_null, remain_text, uuid_blank, nested_log."
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the random faults, to repeat a run.")] = None,
) -> None:
    """Run a OneNET simulator for development and tests on this machine.

    It serves both generations of the platform on one port: v1 below `/nbiot` and v2 below `/nb-iot`. It follows the
    platform's documented rules and fails on request. Access keys are read from SIMULATOR_ACCESS_KEY (of the product),
    SIMULATOR_USER_KEY and SIMULATOR_PROJECT_KEY, base64. Examples:

        onenet-worker simulator --latency 0.05 --fault hang=0.01,30 --fault error_500_after_caching=0.02

        onenet-worker simulator --errors api --queue-errno 13 --rate 20 --clock-offset=-90

        SIMULATOR_USER_KEY=a2V5 onenet-worker simulator --user-id 1 --devices up --device 865820030000001=up:TIME_OUT

    A device that is `up` executes each command as soon as it is valid, 1 s apart, and confirms it with SUCCESS or with
    STATUS; one that is `down` lets its commands wait until they expire; the commands of one that is `offline` are
    refused. It is controlled while it runs:

        curl localhost:8580/control/commands?imei=865820030000001

        curl localhost:8580/control/requests

        curl -X PUT localhost:8580/control/faults -d '[{"kind": "errno", "errno": 15, "error": "api freq", "count": 3}]'

        curl -X PUT localhost:8580/control/devices -d '{"*": "down", "865820030000001": "up:BAD_REQUEST"}'

        curl -X PUT localhost:8580/control/clock -d '{"offset_s": 3600}'

    A PUT replaces all that was set before. The kinds of faults up to late_caching affect Execute, or with "endpoint":
    "history" the command history; those from ids_decimal on change how the history is written.
    """
    try:
        from worker.simulator.server import Simulator
    except ImportError as exc:
        raise not_installed("simulator") from exc
    from worker.simulator.faults import FaultPlan
    from worker.simulator.platform import EVERY_DEVICE, Platform

    keys = {
        f"products/{product_id}": _key("SIMULATOR_ACCESS_KEY", product_id and "--product-id"),
        f"userid/{user_id}": _key("SIMULATOR_USER_KEY", user_id and "--user-id"),
        f"projects/{project_id}": _key("SIMULATOR_PROJECT_KEY", project_id and "--project-id"),
    }
    if wrong := [text for text in device or () if "=" not in text]:
        raise SettingsError([f"--device: {wrong[0]!r} is not IMEI=BEHAVIOUR, such as 865820030000001=up"])
    own = dict(text.partition("=")[::2] for text in device or ())
    try:
        platform = Platform(
            api_key=api_key,
            keys={resource: key for resource, key in keys.items() if key is not None},
            devices={EVERY_DEVICE: devices} | own | dict.fromkeys(offline or (), "offline"),
            errors=errors.value,
            queue_limit=queue or None,
            queue_errno=None if queue_errno is None else int(queue_errno),
            rate=rate or None,
            needs_body=body is _Body.REQUIRED,
            cancels_valid=cancel is _Cancel.WHILE_WAITING,
            clock_offset_s=clock_offset,
        )
    except ValueError as exc:
        raise SettingsError([f"--devices or --device: {exc}"]) from exc
    plan = FaultPlan([_parse(text) for text in fault or ()], seed)
    try:
        server = Simulator(platform, plan, latency_s=latency, host=host, port=port)
    except OSError as exc:
        raise WorkerError(f"cannot listen on {host}:{port}: {_listen_fault(exc, host)}") from exc
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn raises the signal again after its shutdown
    try:
        print_line(f"OneNET simulator at {server.url}, faults at {server.url}/control/faults; ctrl-C stops it")
        asyncio.run(server.serve())
    except KeyboardInterrupt:
        print_line("stopped")


def _key(variable: str, option: str | None) -> str | None:
    """Return the key of tokens that an environment variable has; ``option``: the given option that needs it."""
    key = os.environ.get(variable)
    if key is None and option is not None:
        raise SettingsError([f"{variable}: not set, but {option} needs it"])
    try:
        base64.b64decode(key or "", validate=True)
    except ValueError as exc:
        raise SettingsError([f"{variable}: is not base64"]) from exc
    return key


def _listen_fault(error: OSError, host: str) -> str:
    from worker.core.connection_faults import connection_fault

    if error.errno == errno.EADDRINUSE:
        return "another program listens there already: stop it, or choose another --port"
    if error.errno == errno.EADDRNOTAVAIL:
        return "this machine has no such address"
    return connection_fault(error, host)


def _parse(text: str) -> "Fault":
    from pydantic import ValidationError

    from worker.core.validation import messages
    from worker.simulator.faults import Fault

    try:
        return Fault.model_validate(text)
    except ValidationError as exc:
        reasons = "; ".join(f"{name}: {message}" for name, message in messages(exc).items())
        raise SettingsError([f"--fault {text}: {reasons}"]) from exc
