"""``onenet-worker send``."""

import codecs
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from uuid import uuid4

import typer

from worker.cli.progress import progress
from worker.errors import EXIT_INTERRUPTED, UnusableCommand, WorkerError

if TYPE_CHECKING:
    from worker.settings import Settings

_MAX_ERRORS = 20


def send(
    imei: Annotated[str | None, typer.Option(help="The device: 15 digits.")] = None,
    obj_id: Annotated[int | None, typer.Option(help="LwM2M object id.")] = None,
    obj_inst_id: Annotated[int | None, typer.Option(help="LwM2M object instance id.")] = None,
    res_id: Annotated[int | None, typer.Option(help="LwM2M resource id.")] = None,
    args: Annotated[str | None, typer.Option(help="The command's arguments.")] = None,
    expired_time: Annotated[str | None, typer.Option(help="ISO 8601; by itself a day from now.")] = None,
    valid_time: Annotated[str | None, typer.Option(help="ISO 8601; by itself at once.")] = None,
    retry: Annotated[int | None, typer.Option(help="0-10.")] = None,
    timeout: Annotated[int | None, typer.Option(help="5-40, seconds.")] = None,
    trigger_msg: Annotated[int | None, typer.Option(help="1-7: 1 REGISTER + 2 UPDATE + 4 NOTIFY.")] = None,
    product: Annotated[str | None, typer.Option(help="The configured product to use.")] = None,
    command_id: Annotated[str | None, typer.Option(help="The idempotency key; by itself a new one.")] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            help="JSON lines, one command each; none is sent unless all are valid.",
            exists=True,
            dir_okay=False,
            readable=True,
        ),
    ] = None,
    app_id: Annotated[str, typer.Option(help="The upstream system's name, for the reply's routing key.")] = "cli",
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the replies and print them, one line each.")] = False,
    wait_timeout: Annotated[float, typer.Option(help="Seconds to wait for the replies.", min=0)] = 60.0,
) -> None:
    """Send one command, or a file of them, to the worker.

    The ids go to stdout, or with --wait the replies. Exit code 1 if a command is invalid, a reply is missing or one
    does not say "accepted". Example:

        onenet-worker send --imei 865820030000001 --obj-id 3311 --obj-inst-id 0 --res-id 5850 --args on --wait
    """
    from worker.amqp.blocking import CommandClient
    from worker.amqp.topology import Topology
    from worker.settings import load_settings

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
    settings = load_settings()
    commands = _check(_from_file(file) if file is not None else _from_flags(flags), settings)
    topology = Topology(settings.worker_namespace, settings.delay_queues_s)
    with CommandClient(settings, topology, app_id=app_id, wants_replies=wait) as client:
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
            typer.echo(f"onenet-worker: interrupted: {_how_far(sent, len(commands))}", err=True)
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except WorkerError as exc:
            if len(commands) == 1:
                raise
            raise WorkerError(f"{exc}; {_how_far(sent, len(commands))}") from exc
        if not wait:
            return
        replies = 0
        all_accepted = True
        for reply in client.replies([sent_id for sent_id, _ in commands], wait_timeout):
            typer.echo(json.dumps(reply, ensure_ascii=False))
            replies += 1
            all_accepted = all_accepted and reply["status"] == "accepted"
    if replies < len(commands):
        raise WorkerError(f"{len(commands) - replies} of {len(commands)} replies did not come in {wait_timeout:g} s")
    if not all_accepted:
        raise typer.Exit(1)


def _how_far(sent: int, total: int) -> str:
    return f"{sent:,} of {total:,} were sent; send them all again: those that were sent are known by their ids"


def _from_flags(flags: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    a_day_from_now = (datetime.now(UTC) + timedelta(days=1)).strftime("%Y-%m-%dT%H:%M:%SZ")
    yield "", json.dumps({"command_id": str(uuid4()), "expired_time": a_day_from_now} | flags).encode()


def _from_file(path: Path) -> Iterator[tuple[str, bytes]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            text = (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).strip()
            if text:
                yield f"{path}:{number}: ", text


def _check(lines: Iterator[tuple[str, bytes]], settings: "Settings") -> list[tuple[str, bytes]]:
    """Return the ids and bodies of valid commands.

    Raises:
        WorkerError: a command is invalid: then none is sent, since a file that was sent in part is hard to repeat.
    """
    from worker.core.command import read_command

    commands: dict[str, bytes] = {}
    errors = []
    for place, body in lines:
        try:
            found = read_command(body, None, settings.platform_zone).command_id
        except UnusableCommand as exc:
            errors.append(f"{place}{exc.message}")
            continue
        if found in commands:
            errors.append(f"{place}command_id: {found} stands here before")
        commands[found] = body
    if len(errors) > _MAX_ERRORS:
        errors[_MAX_ERRORS:] = [f"and {len(errors) - _MAX_ERRORS:,} more"]
    if not commands and not errors:
        errors.append("there is no command in it")
    if errors:
        raise WorkerError("\n".join([*errors, "nothing was sent"]))
    return list(commands.items())
