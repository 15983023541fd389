"""``onenet-worker send``."""

import codecs
import itertools
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from uuid import uuid4

import typer

from worker.cli.progress import progress
from worker.errors import EXIT_INTERRUPTED, UnusableCommand, WorkerError
from worker.printable import printable_json

if TYPE_CHECKING:
    from worker.settings import Settings

_MAX_ERRORS = 20
_RESULT_S = 120.0  # after the first look: for the device, and for the rate limit
_MAX_LINE_BYTES = 128 * 1024  # twice what a command may have, for blanks around it


def send(
    imei: Annotated[str | None, typer.Option(help="The device: 15 digits, or 4.")] = None,
    obj_id: Annotated[int | None, typer.Option(help="LwM2M object id.")] = None,
    obj_inst_id: Annotated[int | None, typer.Option(help="LwM2M object instance id.")] = None,
    res_id: Annotated[int | None, typer.Option(help="LwM2M resource id.")] = None,
    args: Annotated[str | None, typer.Option(help="The arguments of the command.")] = None,
    expired_time: Annotated[str | None, typer.Option(help="ISO 8601; default: a day from now.")] = None,
    valid_time: Annotated[str | None, typer.Option(help="ISO 8601; default: now.")] = None,
    retry: Annotated[int | None, typer.Option(help="0-10.")] = None,
    timeout: Annotated[int | None, typer.Option(help="5-40, seconds.")] = None,
    trigger_msg: Annotated[int | None, typer.Option(help="1-7: 1 REGISTER + 2 UPDATE + 4 NOTIFY.")] = None,
    product: Annotated[str | None, typer.Option(help="The configured product to use.")] = None,
    command_id: Annotated[str | None, typer.Option(help="The idempotency key; default: a new one.")] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            help="JSON lines, one command per line; /dev/stdin too. Nothing is sent unless all are valid.",
            exists=True,
            dir_okay=False,
            readable=True,
        ),
    ] = None,
    app_id: Annotated[
        str | None,
        typer.Option(
            help="The upstream system's name; default: cli, or with WORKER_TENANTS=isolated the broker's user, "
            "the only one that is taken then."
        ),
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the replies and print them, one per line.")] = False,
    wait_result: Annotated[
        bool,
        typer.Option(
            "--wait-result",
            help="Wait for the replies, and then for the results of accepted commands, which workers publish with "
            "WORKER_RESULTS=on.",
        ),
    ] = False,
    wait_timeout: Annotated[float, typer.Option(help="Seconds to wait for the replies.", min=0)] = 60.0,
    result_timeout: Annotated[
        float | None,
        typer.Option(
            help="Seconds to wait for the results after that; default: two minutes more than until the first look at "
            "the platform (the first of WORKER_RESULT_DELAYS).",
            min=0,
        ),
    ] = None,
) -> None:
    """Send one command, or a file of commands, to the worker.

    Prints the command ids, or with --wait the replies, and with --wait-result the results too. Exit code 1 if a command
    is invalid, a reply or a result is missing, or one is not "accepted" or "executed". Example:

        onenet-worker send --imei 865820030000001 --obj-id 3311 --obj-inst-id 0 --res-id 5850 --args on --wait
    """
    from worker.amqp.blocking import CommandClient
    from worker.cli.settings import read_settings

    given = {
        "command_id": command_id,
        "imei": imei,
        "obj_id": obj_id,
        "obj_inst_id": obj_inst_id,
        "res_id": res_id,
        "expired_time": expired_time,
        "valid_time": valid_time,
        "retry": retry,
        "timeout": timeout,
        "trigger_msg": trigger_msg,
        "args": args,
        "product": product,
    }
    flags = {name: value for name, value in given.items() if value is not None}
    if file is not None and flags:
        raise WorkerError(f"--file and --{next(iter(flags)).replace('_', '-')}: use one or the other")
    settings = read_settings()
    commands = _check(_from_file(file) if file is not None else _from_flags(flags), settings)
    wait = wait or wait_result
    is_isolated = settings.worker_tenants == "isolated"
    with CommandClient(
        settings.broker_address,
        settings.topology,
        app_id=app_id or (None if is_isolated else "cli"),
        wants_replies=wait,
        names_user=is_isolated,
    ) as client:
        sent = 0
        try:
            with progress("sending", len(commands), is_shown=file is not None) as advance:
                for sent_id, body in commands:
                    client.send(sent_id, body)
                    sent += 1
                    advance()
                    if not wait:
                        typer.echo(sent_id)
        except KeyboardInterrupt:
            typer.echo(f"onenet-worker: interrupted: {_progress_of(sent, len(commands))}", err=True)
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except WorkerError as exc:
            if len(commands) == 1:
                raise
            raise WorkerError(f"{exc}; {_progress_of(sent, len(commands))}") from exc
        if not wait:
            return
        replies = 0
        accepted: list[str] = []
        for reply in client.replies([sent_id for sent_id, _ in commands], wait_timeout):
            typer.echo(printable_json(reply))
            replies += 1
            if reply["status"] == "accepted":
                accepted.append(reply["command_id"])
        results = executed = 0
        first_s = settings.worker_result_delays[0]
        result_timeout = first_s + _RESULT_S if result_timeout is None else result_timeout
        for result in client.results(accepted, result_timeout) if wait_result else ():
            typer.echo(printable_json(result))
            results += 1
            executed += result["result"] == "executed"
    missing = []
    if replies < len(commands):
        missing.append(f"{len(commands) - replies} of {len(commands)} replies did not arrive in {wait_timeout:g} s")
    if wait_result and results < len(accepted):
        missing += [
            f"{len(accepted) - results} of {len(accepted)} results did not arrive in {result_timeout:g} s",
            f"workers publish results with WORKER_RESULTS=on, {first_s} s after the reply at the earliest",
        ]
    if missing:
        raise WorkerError(*missing)
    if len(accepted) < len(commands) or (wait_result and executed < len(commands)):
        raise typer.Exit(1)


def _progress_of(sent: int, total: int) -> str:
    return f"{sent:,} of {total:,} were sent; send all of them again: ids that were already sent have no second effect"


def _from_flags(flags: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    a_day_from_now = (datetime.now(UTC) + timedelta(days=1)).strftime("%Y-%m-%dT%H:%M:%SZ")
    yield "", json.dumps({"command_id": str(uuid4()), "expired_time": a_day_from_now} | flags).encode()


def _from_file(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the place and the text of each line. The file may be a pipe.

    Raises:
        WorkerError: a line is too long, or the file cannot be read.
    """
    try:
        with path.open("rb") as lines:
            for number in itertools.count(1):
                line = lines.readline(_MAX_LINE_BYTES + 1)
                if not line:
                    return
                if len(line) > _MAX_LINE_BYTES:  # it may never end, as that of /dev/zero
                    raise WorkerError(f"{path}:{number}: the line has more than {_MAX_LINE_BYTES} bytes")
                text = (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).strip()
                if text:
                    yield f"{path}:{number}: ", text
    except OSError as exc:
        raise WorkerError(f"{path}: cannot be read: {exc.strerror}") from exc


def _check(lines: Iterator[tuple[str, bytes]], settings: "Settings") -> list[tuple[str, bytes]]:
    """Return the ids and bodies of the commands.

    Raises:
        WorkerError: a command is invalid; none is sent then, since a partly sent file is hard to repeat.
    """
    from worker.core.parsing import read_command

    commands: dict[str, bytes] = {}
    errors: list[str] = []
    more = 0
    for place, body in lines:
        try:
            found = read_command(body, None, settings.platform_zone).command_id
        except UnusableCommand as exc:
            error = exc.message
        else:
            error = f"command_id: {found} is a duplicate" if found in commands else ""
            commands[found] = body
        if error and len(errors) < _MAX_ERRORS:
            errors.append(f"{place}{error}")
        elif error:
            more += 1
    if more:
        errors.append(f"and {more:,} more")
    if not commands and not errors:
        errors.append("the file contains no command")
    if errors:
        raise WorkerError(*errors, "nothing was sent")
    return list(commands.items())
