"""``onenet-worker device``."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from worker.cli.terminal import (
    confirm,
    interruptible,
    local_time,
    note,
    print_json,
    print_rows,
    require_person_or_yes,
    shown_of,
    times_note,
)
from worker.errors import EXIT_FAILURE
from worker.printable import counted

if TYPE_CHECKING:
    from worker.admin.device import Cancelling, DeviceEntry
    from worker.core.records import UuidOwner
    from worker.settings import Settings

_USUAL_LIMIT = 20


def _imei(text: str) -> str:
    from pydantic import TypeAdapter, ValidationError

    from schemas.command import Imei

    try:
        return TypeAdapter[str](Imei).validate_python(text)
    except ValidationError:
        raise typer.BadParameter("is no IMEI: it has 15 digits, or 4 of a test device") from None


def device(
    imei: Annotated[str, typer.Argument(metavar="IMEI", parser=_imei, help="The device.")],
    product: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The configured product whose device it is; default: the default."),
    ] = None,
    limit: Annotated[int, typer.Option(help="Maximum number of commands.", min=1)] = _USUAL_LIMIT,
    newest_first: Annotated[bool, typer.Option("--newest-first/--oldest-first", help="The order.")] = True,
    cancel: Annotated[
        list[str] | None,
        typer.Option(
            "--cancel",
            metavar="UUID",
            help="Cancel this command, which may be named by the unique beginning of its uuid; may be repeated.",
        ),
    ] = None,
    cancel_all: Annotated[bool, typer.Option("--cancel-all", help="Cancel all commands that wait.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Cancel without asking.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per line.")] = False,
) -> None:
    """Show what waits for a device at OneNET and what became of it, or cancel what waits.

    Nothing is sent. A command that is cancelled has the result "cancelled" later, where results are on. Exit code 1 if
    a command was not cancelled. Example:

        onenet-worker device 865820030000001 --cancel 42742677
    """
    from worker.cli.settings import read_settings

    if cancel and cancel_all:
        raise typer.BadParameter("--cancel cannot be combined with --cancel-all: use one or the other")
    if yes and not cancel and not cancel_all:
        raise typer.BadParameter("--yes is for --cancel or --cancel-all")
    settings = read_settings()
    if cancel or cancel_all:
        _cancel(settings, imei, product, cancel or [], yes=yes, as_json=as_json)
        return
    from worker.admin.device import entry_document, list_device

    found = list_device(settings, imei, product, limit=limit, newest_first=newest_first)
    if as_json:
        for entry in found.entries:
            print_json(entry_document(entry, found))
    else:
        _print(found.entries)
    if not found.entries:
        note(f"OneNET has no command of the last 180 days for device {imei}")
        return
    shown = len(found.entries)
    more = "; --limit shows more" if shown < found.total else ""
    note(shown_of(shown, found.total, "command", newest_first=newest_first) + more)
    if found.owners_unread is not None:
        note(f"without command ids: {found.owners_unread}")
    if not as_json:
        note(times_note())


def _cancel(
    settings: "Settings", imei: str, product: str | None, beginnings: Sequence[str], *, yes: bool, as_json: bool
) -> None:
    from worker.admin.device import cancel, cancelling_document, find_waiting

    require_person_or_yes(yes=yes)
    with interruptible("nothing was cancelled"):
        waiting = find_waiting(settings, imei, product, beginnings)
    if not waiting.entries:
        note(f"no command waits for device {imei}: nothing was cancelled")
        return
    if not yes:
        _print(waiting.entries, stderr=True)
        confirm(f"Cancel {counted(len(waiting.entries), 'command')} of device {imei}?", "nothing was cancelled")
    with interruptible(f"some may be cancelled; look with onenet-worker device {imei}"):
        done = cancel(settings, imei, product, waiting.entries)
    if as_json:
        for each in done:
            print_json(cancelling_document(each, waiting))
    else:
        print_rows(("uuid", "command id", "is now"), [_row_after(each) for each in done])
        for each in done:
            if not each.is_cancelled:
                note(f"{each.before.cached.uuid}: {_why_not(each)}")
    cancelled = sum(each.is_cancelled for each in done)
    note(f"cancelled {cancelled:,} of {counted(len(done), 'command')}")
    if cancelled < len(done):
        raise typer.Exit(EXIT_FAILURE)


def _row_after(done: "Cancelling") -> tuple[str, ...]:
    state = "not in its history any more" if done.after is None else _state(done.after)
    return done.before.cached.uuid, _command_id(done.before.owner), state


def _why_not(done: "Cancelling") -> str:
    if done.unanswered is not None:
        return f"OneNET gave no clear answer, so that it may be cancelled all the same: {done.unanswered}"
    if done.refusal is None:
        return "OneNET said that it is cancelled, but its history says otherwise"
    is_waiting = done.after is not None and done.after.state == "waiting"
    why = "; perhaps it cancels only commands whose valid_time has not come" if is_waiting else ""
    return f"OneNET did not cancel it: {done.refusal}{why}"


def _print(entries: Sequence["DeviceEntry"], *, stderr: bool = False) -> None:
    times = ("created at", "valid from", "expires at", "sent at", "confirmed at")
    print_rows(("uuid", "command id", "state", "kind", *times), [_row(entry) for entry in entries], stderr=stderr)


def _row(entry: "DeviceEntry") -> tuple[str, ...]:
    cached = entry.cached
    is_later = cached.valid_at is not None and (cached.created_at is None or cached.valid_at > cached.created_at)
    return (
        cached.uuid or "(no uuid)",
        _command_id(entry.owner),
        _state(entry),
        "" if cached.kind == "EXECUTE" else cached.kind or "unknown",
        local_time(cached.created_at),
        local_time(cached.valid_at) if is_later else "",
        local_time(cached.expires_at),
        local_time(cached.state.sent_at),
        local_time(cached.state.confirmed_at),
    )


def _state(entry: "DeviceEntry") -> str:
    status = entry.cached.state.confirm_status
    is_said = status in {None, "SUCCESS"}
    return entry.state if is_said else f"{entry.state}: {status}"


def _command_id(owner: "UuidOwner | None") -> str:
    if owner is None:
        return ""
    source = f" from {owner.source}" if owner.source else ""
    return f"{owner.command_id}{source}{'' if owner.is_certain else ' (perhaps)'}"
