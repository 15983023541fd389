"""``onenet-worker dead-letters``."""

import base64
import json
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from worker.cli.progress import progress
from worker.core.times import parse_duration
from worker.errors import EXIT_INTERRUPTED, WorkerError

if TYPE_CHECKING:
    from rich.console import Console

    from worker.dead_letters.letter import DeadLetter, Filter
    from worker.dead_letters.reader import DeadLetterReader

MAX_HELD_S = 20 * 60  # the broker takes back after 30 minutes what is held unacknowledged

dead_letters = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="List, show, replay or discard what was set aside.\n\nLooking at it loses nothing and keeps its order. "
    "Example:\n\n    onenet-worker dead-letters list --reason outcome_unknown --newer-than 2h",
)


class Reason(StrEnum):
    """The codes of failures, and what the broker set aside by itself."""

    INVALID_MESSAGE = "invalid_message"
    INVALID_COMMAND = "invalid_command"
    UNKNOWN_PRODUCT = "unknown_product"
    EXPIRED = "expired"
    RETRIES_EXHAUSTED = "retries_exhausted"
    OUTCOME_UNKNOWN = "outcome_unknown"
    POISON_MESSAGE = "poison_message"
    COMMAND_ID_CONFLICT = "command_id_conflict"
    BROKER = "broker"


def _duration(text: str) -> timedelta:
    try:
        return parse_duration(text)
    except ValueError as exc:
        raise typer.BadParameter(str(exc)) from exc


def _gap_s(text: str) -> float:
    """Return the seconds from one to the next."""
    from worker.core.rate import Rate

    try:
        rate = Rate.parse(text)
        return rate.period_s / rate.count
    except ValueError as exc:
        raise typer.BadParameter(str(exc)) from exc


Ids = Annotated[list[str] | None, typer.Argument(metavar="[COMMAND_ID]...", help="The commands that are meant.")]
Id = Annotated[list[str] | None, typer.Option("--id", metavar="COMMAND_ID", help="A command; may be repeated.")]
Reasons = Annotated[
    list[Reason] | None, typer.Option("--reason", help="Why it was set aside; may be repeated.", metavar="REASON")
]
Device = Annotated[str | None, typer.Option(help="The IMEI of a device.")]
Source = Annotated[str | None, typer.Option(help="The upstream system that sent it: the property app_id.")]
_AGE = "such as 90s, 15m, 2h or 7d."
Older = Annotated[timedelta | None, typer.Option(parser=_duration, metavar="AGE", help=f"Set aside before: {_AGE}")]
Newer = Annotated[timedelta | None, typer.Option(parser=_duration, metavar="AGE", help=f"Set aside since: {_AGE}")]
Limit = Annotated[int | None, typer.Option(help="So many of them at most, the oldest first.", min=1)]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object per line.")]
DryRunAsJson = Annotated[bool, typer.Option("--json", help="With --dry-run: one JSON object per line.")]
All = Annotated[bool, typer.Option("--all", help="All of them.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only list those that are meant.")]


@dead_letters.command("list")
def list_letters(
    command_id: Id = None,
    reason: Reasons = None,
    device: Device = None,
    source: Source = None,
    older_than: Older = None,
    newer_than: Newer = None,
    limit: Limit = None,
    as_json: AsJson = False,
) -> None:
    """List dead letters, the oldest first.

    For example:

        onenet-worker dead-letters list --reason retries_exhausted --older-than 1h
    """
    selection = _selection(command_id, reason, device, source, older_than, newer_than)
    _print(_look(selection, limit), as_json=as_json)


@dead_letters.command("show")
def show(
    command_id: Annotated[str, typer.Argument(help="The command.")],
    as_json: AsJson = False,
) -> None:
    """Show all there is of a command's dead letters: properties, headers and body.

    For example:

        onenet-worker dead-letters show 8f6c1d0e
    """
    found = _look(_selection([command_id], None, None, None, None, None), None)
    if not found:
        raise _missing([command_id])
    for letter in found:
        if as_json:
            typer.echo(json.dumps(_everything(letter), ensure_ascii=False))
        else:
            _show(letter)


@dead_letters.command("replay")
def replay(
    ids: Ids = None,
    command_id: Id = None,
    reason: Reasons = None,
    device: Device = None,
    source: Source = None,
    older_than: Older = None,
    newer_than: Newer = None,
    is_all: All = False,
    limit: Limit = None,
    gap_s: Annotated[
        float | None,
        typer.Option(
            "--rate",
            parser=_gap_s,
            metavar="RATE",
            help="How fast, such as 20/second; also /minute, /hour.",
        ),
    ] = None,
    dry_run: DryRun = False,
    as_json: DryRunAsJson = False,
) -> None:
    """Have the worker try again what was set aside, under the same id and from its first attempt.

    What may have been cached goes back in doubt: its device's history is read first, and it is sent only if it is not
    there. What comes of it is told in a reply, like any outcome. Example:

        onenet-worker dead-letters replay --reason retries_exhausted --newer-than 2h --rate 20/second
    """
    selection = _selection([*(ids or ()), *(command_id or ())], reason, device, source, older_than, newer_than)
    _require(selection, is_all=is_all)
    if dry_run:
        letters = _meant("replayed", selection, limit)
        _refuse_too_many(letters, gap_s)
        _print(letters, as_json=as_json)
        return
    _refuse_json(as_json)

    def carry_out(look: "DeadLetterReader", letters: Sequence["DeadLetter"], done: Callable[[], None]) -> None:
        _refuse_too_many(letters, gap_s)
        due = 0.0
        for letter in letters:
            if gap_s is not None:
                look.wait(max(0.0, due - time.monotonic()))
                due = time.monotonic() + gap_s
            look.replay(letter, datetime.now(UTC))
            done()

    _carry_out("replayed", selection, limit, carry_out)


@dead_letters.command("discard")
def discard(
    ids: Ids = None,
    command_id: Id = None,
    reason: Reasons = None,
    device: Device = None,
    source: Source = None,
    older_than: Older = None,
    newer_than: Newer = None,
    is_all: All = False,
    limit: Limit = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    dry_run: DryRun = False,
    as_json: DryRunAsJson = False,
) -> None:
    """Delete dead letters for good; the others keep their places.

    For example:

        onenet-worker dead-letters discard --reason invalid_command --older-than 7d --yes
    """
    selection = _selection([*(ids or ()), *(command_id or ())], reason, device, source, older_than, newer_than)
    _require(selection, is_all=is_all)
    if dry_run:
        _print(_meant("discarded", selection, limit), as_json=as_json)
        return
    _refuse_json(as_json)
    confirmed: set[bytes] | None = None
    if not yes:
        if not sys.stdin.isatty():
            raise WorkerError("--yes is required where nobody can be asked")
        found = _look(selection, limit)  # not held while somebody thinks: the broker would take them back
        if found:
            typer.confirm(f"Delete {_counted(len(found))} for good?", abort=True, err=True)
        confirmed = {letter.fingerprint for letter in found}

    def carry_out(look: "DeadLetterReader", letters: Sequence["DeadLetter"], done: Callable[[], None]) -> None:
        for letter in letters:
            if confirmed is None or letter.fingerprint in confirmed:
                look.discard(letter)
                done()

    _carry_out("discarded", selection, limit, carry_out)


def _selection(
    ids: Sequence[str] | None,
    reasons: Sequence[Reason] | None,
    device: str | None,
    source: str | None,
    older_than: timedelta | None,
    newer_than: timedelta | None,
) -> "Filter":
    from worker.dead_letters.letter import Filter

    return Filter(frozenset(ids or ()), frozenset(map(str, reasons or ())), device, source, older_than, newer_than)


def _require(selection: "Filter", *, is_all: bool) -> None:
    """Have it said which letters are meant.

    Raises:
        WorkerError: nothing is selected, or both all and some.
    """
    if selection.is_everything and not is_all:
        raise WorkerError(
            "which ones? Name ids, or say --reason, --device, --source, --older-than, --newer-than or --all"
        )
    if is_all and not selection.is_everything:
        raise WorkerError("--all and a selection: use one or the other")


def _refuse_json(as_json: bool) -> None:
    if as_json:
        raise WorkerError("--json goes with --dry-run")


def _refuse_too_many(letters: Sequence["DeadLetter"], gap_s: float | None) -> None:
    if gap_s is not None and (len(letters) - 1) * gap_s > MAX_HELD_S:
        most = int(MAX_HELD_S / gap_s) + 1
        raise WorkerError(f"{len(letters):,} of them would take too long at that rate: --limit {most} is the most")


def _open() -> "DeadLetterReader":
    from worker.dead_letters.reader import DeadLetterReader
    from worker.settings import load_settings

    settings = load_settings()
    return DeadLetterReader(settings.broker_address, settings.topology, settings.platform_zone)


def _select(look: "DeadLetterReader", selection: "Filter", limit: int | None) -> list["DeadLetter"]:
    now = datetime.now(UTC)
    taken = look.take()
    if look.waiting > len(taken):
        held = f"{len(taken):,} of {look.waiting:,}"
        typer.echo(f"onenet-worker: only {held} can be looked at, and of so many the order is not kept", err=True)
    return [letter for letter in taken if selection.takes(letter, now)][:limit]


def _look(selection: "Filter", limit: int | None) -> list["DeadLetter"]:
    with _open() as look:
        return _select(look, selection, limit)


def _choose(past: str, look: "DeadLetterReader", selection: "Filter", limit: int | None) -> list["DeadLetter"]:
    """Return the selected letters.

    Raises:
        WorkerError: there is none of an id that is named.
    """
    letters = _select(look, selection, limit)
    missing = selection.ids - {letter.command_id for letter in letters}
    if missing and limit is None:
        raise _missing(sorted(missing), f"; nothing was {past}")
    return letters


def _meant(past: str, selection: "Filter", limit: int | None) -> list["DeadLetter"]:
    with _open() as look:
        return _choose(past, look, selection, limit)


def _carry_out(
    past: str,
    selection: "Filter",
    limit: int | None,
    act: Callable[["DeadLetterReader", Sequence["DeadLetter"], Callable[[], None]], None],
) -> None:
    """Do something with each selected letter, and say with how many it was done, however it ends."""
    done = 0
    with _open() as look:
        letters = _choose(past, look, selection, limit)
        try:
            with progress(past, len(letters)) as advance:

                def count() -> None:
                    nonlocal done
                    done += 1
                    advance()

                act(look, letters, count)
        except KeyboardInterrupt:
            typer.echo(f"onenet-worker: interrupted: {past} {done:,} of {_counted(len(letters))}", err=True)
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except WorkerError as exc:
            raise WorkerError(f"{exc}; {past} {done:,} of {_counted(len(letters))}") from exc
    typer.echo(f"{past} {_counted(done)}")


def _missing(ids: Sequence[str], consequence: str = "") -> WorkerError:
    return WorkerError(f"no dead letter of {', '.join(map(_printable, ids))}{consequence}")


def _counted(count: int) -> str:
    return f"{count:,} dead letter{'' if count == 1 else 's'}"


def _summary(letter: "DeadLetter") -> dict[str, Any]:
    """Return what a list says of a letter."""
    return {
        "command_id": letter.command_id,
        "reason": letter.reason,
        "error": letter.error,
        "failed_at": _utc(letter.failed_at),
        "device": letter.imei,
        "source": letter.source,
        "expires_at": _utc(letter.expires_at),
    }


def _everything(letter: "DeadLetter") -> dict[str, Any]:
    """Return all there is of a letter; a body that is no UTF-8 in base64."""
    properties = {name: _plain(value) for name, value in vars(letter.properties).items() if value is not None}
    headers = properties.pop("headers", {})
    try:
        body = {"body": letter.body.decode()}
    except UnicodeDecodeError:
        body = {"body_base64": base64.b64encode(letter.body).decode()}
    return _summary(letter) | {"routing_key": letter.routing_key, "properties": properties, "headers": headers} | body


def _print(letters: Sequence["DeadLetter"], *, as_json: bool) -> None:
    from rich.table import Table
    from rich.text import Text

    if as_json:
        for letter in letters:
            typer.echo(json.dumps(_summary(letter), ensure_ascii=False))
        return
    table = Table("set aside", "reason", "command id", "device", "source", "expires", "error")
    now = datetime.now(UTC)
    for letter in letters:
        expires = _utc(letter.expires_at, timespec="seconds") or ""
        if letter.expires_at is not None and letter.expires_at <= now:
            expires = "has expired"
        cells = (
            _utc(letter.failed_at, timespec="seconds"), letter.reason, letter.command_id, letter.imei, letter.source,
            expires, letter.error,
        )  # fmt: skip
        table.add_row(*(Text(_printable(cell or "").replace("\n", " ")) for cell in cells))
    if letters:
        _console().print(table)
    typer.echo(_counted(len(letters)), err=True)


def _show(letter: "DeadLetter") -> None:
    from rich.table import Table
    from rich.text import Text

    found = _everything(letter)
    headers, properties = found.pop("headers"), found.pop("properties")
    body = json.dumps(json.loads(letter.body), indent=2, ensure_ascii=False) if letter.is_json else None
    found.pop("body", None)
    found.pop("body_base64", None)
    table = Table(show_header=False)
    for section, fields in (("", found), ("property ", properties), ("header ", headers)):
        for name, value in fields.items():
            if value is not None:
                text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
                table.add_row(Text(_printable(section + name)), Text(_printable(text)))
    table.add_row(Text("body"), Text(_printable(body or letter.body.decode(errors="backslashreplace"))))
    _console().print(table)


def _console() -> "Console":
    from rich.console import Console

    # Where it is no terminal there is no width to keep to.
    return Console(width=None if sys.stdout.isatty() else 10_000)


def _utc(moment: datetime | None, timespec: str = "milliseconds") -> str | None:
    return None if moment is None else moment.astimezone(UTC).isoformat(timespec=timespec)


def _plain(value: Any) -> Any:
    """Return a header's value as JSON has it."""
    from worker.amqp.field_table import RawFieldValue

    match value:
        case bytes():
            return value.decode(errors="backslashreplace")
        case dict():
            return {str(_plain(name)): _plain(item) for name, item in value.items()}
        case list():
            return [_plain(item) for item in value]
        case None | bool() | int() | float() | str():
            return value
        case RawFieldValue(moment=datetime() as moment):
            return _utc(moment)
        case _:
            return str(value)


def _printable(text: str) -> str:
    """Show what could steer a terminal as what it is."""
    return "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in text)
