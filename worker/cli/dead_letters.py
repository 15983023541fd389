"""``onenet-worker dead-letters``."""

import inspect
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace as with_changes
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from worker.cli.progress import progress
from worker.core.times import parse_duration
from worker.errors import EXIT_INTERRUPTED, WorkerError
from worker.printable import printable, printable_json

if TYPE_CHECKING:
    from rich.console import Console

    from worker.dead_letters.letter import DeadLetter, Filter, Listing
    from worker.dead_letters.reader import DeadLetterReader

Kept = TypeVar("Kept")
MAX_HELD_S = 20 * 60  # the broker's consumer timeout is 30 minutes

dead_letters = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="List, show, replay or discard dead letters.\n\nListing keeps all of them, in their order. "
    "Example:\n\n    onenet-worker dead-letters list --reason outcome_unknown --newer-than 2h",
)


class Reason(StrEnum):
    """The error codes of failed commands, and ``broker`` for messages that the broker dead-lettered."""

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


def _interval_s(text: str) -> float:
    """Return the interval of a rate in seconds."""
    from worker.core.rate import Rate

    try:
        rate = Rate.parse(text)
        return rate.period_s / rate.count
    except ValueError as exc:
        raise typer.BadParameter(str(exc)) from exc


_AGE = "age, such as 90s, 15m, 2h or 7d."
Ids = Annotated[list[str] | None, typer.Argument(metavar="[COMMAND_ID]...", help="Command ids.")]
Limit = Annotated[int | None, typer.Option(help="Maximum number of dead letters, the oldest first.", min=1)]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object per line.")]
DryRunAsJson = Annotated[bool, typer.Option("--json", help="With --dry-run: one JSON object per line.")]
All = Annotated[bool, typer.Option("--all", help="All dead letters.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only list the dead letters that would be affected.")]


def _filter_of(
    command_id: Annotated[
        list[str] | None, typer.Option("--id", metavar="COMMAND_ID", help="A command id; may be repeated.")
    ] = None,
    reason: Annotated[
        list[Reason] | None,
        typer.Option("--reason", help="The reason for dead-lettering; may be repeated.", metavar="REASON"),
    ] = None,
    device: Annotated[str | None, typer.Option(help="The IMEI of a device.")] = None,
    source: Annotated[
        str | None, typer.Option(help="The upstream system that sent the command: the property app_id.")
    ] = None,
    older_than: Annotated[
        timedelta | None, typer.Option(parser=_duration, metavar="AGE", help=f"Minimum {_AGE}")
    ] = None,
    newer_than: Annotated[
        timedelta | None, typer.Option(parser=_duration, metavar="AGE", help=f"Maximum {_AGE}")
    ] = None,
) -> "Filter":
    from worker.dead_letters.letter import Filter

    return Filter(
        frozenset(command_id or ()), frozenset(map(str, reason or ())), device, source, older_than, newer_than
    )


def _with_filter(command: Callable[..., None]) -> Callable[..., None]:
    """Replace a command's first parameter, a filter, by the options that describe one."""
    options = inspect.signature(_filter_of).parameters
    _, *others = inspect.signature(command).parameters.values()

    @wraps(command)
    def called(**values: Any) -> None:
        chosen = {name: values.pop(name) for name in options if name in values}
        command(_filter_of(**chosen), **values)

    called.__dict__["__signature__"] = inspect.Signature([*options.values(), *others])  # read by Typer
    called.__annotations__ = {each.name: each.annotation for each in (*options.values(), *others)}
    return called


@dead_letters.command("list")
@_with_filter
def list_dead_letters(chosen: "Filter", limit: Limit = None, as_json: AsJson = False) -> None:
    """List dead letters, the oldest first.

    For example:

        onenet-worker dead-letters list --reason retries_exhausted --older-than 1h
    """
    with _open() as reader:
        found = _list(reader, chosen, limit)
    _print(found, as_json=as_json)


@dead_letters.command("show")
def show(
    command_id: Annotated[str, typer.Argument(help="The command id.")],
    as_json: AsJson = False,
) -> None:
    """Show the dead letters of a command in full: properties, headers and body.

    For example:

        onenet-worker dead-letters show 8f6c1d0e
    """
    from worker.dead_letters.view import details

    with _open() as reader:
        found = _fetch(reader, _filter_of([command_id]), None)
    if not found:
        raise _missing([command_id])
    for dead_letter in found:
        if as_json:
            typer.echo(printable_json(details(dead_letter)))
        else:
            _show(dead_letter)


@dead_letters.command("replay")
@_with_filter
def replay(
    chosen: "Filter",
    ids: Ids = None,
    is_all: All = False,
    limit: Limit = None,
    interval_s: Annotated[
        float | None,
        typer.Option(
            "--rate",
            parser=_interval_s,
            metavar="RATE",
            help="Maximum rate, such as 20/second; also /minute, /hour.",
        ),
    ] = None,
    dry_run: DryRun = False,
    as_json: DryRunAsJson = False,
) -> None:
    """Send dead letters to the workers again, with the same command id and starting at attempt 1.

    A command that OneNET may have cached is replayed in doubt: the worker reads the device's command history first, and
    sends the command only if the history does not contain it. The outcome is published as a reply, as always. Example:

        onenet-worker dead-letters replay --reason retries_exhausted --newer-than 2h --rate 20/second
    """
    chosen = _required(chosen, ids, is_all=is_all)
    if dry_run:
        with _open() as reader:
            listed = _list(reader, chosen, limit)
        _refuse_missing("replayed", listed, chosen, limit)
        _refuse_too_many(listed, interval_s)
        _print(listed, as_json=as_json)
        return
    _refuse_json(as_json)

    def replay_each(reader: "DeadLetterReader", found: Sequence["DeadLetter"], done: Callable[[], None]) -> None:
        _refuse_too_many(found, interval_s)
        due = 0.0
        for dead_letter in found:
            if interval_s is not None:
                reader.wait(max(0.0, due - time.monotonic()))
                due = time.monotonic() + interval_s
            reader.replay(dead_letter, datetime.now(UTC))
            done()

    _apply("replayed", chosen, limit, replay_each)


@dead_letters.command("discard")
@_with_filter
def discard(
    chosen: "Filter",
    ids: Ids = None,
    is_all: All = False,
    limit: Limit = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")] = False,
    dry_run: DryRun = False,
    as_json: DryRunAsJson = False,
) -> None:
    """Delete dead letters permanently; the others keep their order.

    For example:

        onenet-worker dead-letters discard --reason invalid_command --older-than 7d --yes
    """
    chosen = _required(chosen, ids, is_all=is_all)
    if dry_run:
        with _open() as reader:
            listed = _list(reader, chosen, limit)
        _refuse_missing("discarded", listed, chosen, limit)
        _print(listed, as_json=as_json)
        return
    _refuse_json(as_json)
    confirmed: set[bytes] | None = None
    if not yes:
        if not sys.stdin.isatty():
            raise WorkerError("without a terminal, --yes is required")
        with _open() as reader:  # closed while the question is open: the broker's consumer timeout would end it
            found = _fetch(reader, chosen, limit)
        if found:
            typer.confirm(f"Delete {_counted(len(found))} permanently?", abort=True, err=True)
        confirmed = {dead_letter.fingerprint for dead_letter in found}

    def discard_each(reader: "DeadLetterReader", found: Sequence["DeadLetter"], done: Callable[[], None]) -> None:
        for dead_letter in found:
            if confirmed is None or dead_letter.fingerprint in confirmed:
                reader.discard(dead_letter)
                done()

    _apply("discarded", chosen, limit, discard_each)


def _required(chosen: "Filter", ids: Sequence[str] | None, *, is_all: bool) -> "Filter":
    """Add ids to a filter, and require either a filter or ``--all``.

    Raises:
        WorkerError: neither is given, or both.
    """
    chosen = with_changes(chosen, ids=chosen.ids | frozenset(ids or ()))
    if chosen.is_empty and not is_all:
        raise WorkerError(
            "no dead letters selected: give ids, --reason, --device, --source, --older-than, --newer-than or --all"
        )
    if is_all and not chosen.is_empty:
        raise WorkerError("--all cannot be combined with ids or filters: use one or the other")
    return chosen


def _refuse_json(as_json: bool) -> None:
    if as_json:
        raise WorkerError("--json needs --dry-run")


def _refuse_too_many(found: Sequence["DeadLetter | Listing"], interval_s: float | None) -> None:
    if interval_s is not None and (len(found) - 1) * interval_s > MAX_HELD_S:
        largest = int(MAX_HELD_S / interval_s) + 1
        raise WorkerError(f"{len(found):,} dead letters take too long at that rate: use --limit {largest} or less")


def _open() -> "DeadLetterReader":
    from worker.cli.settings import read_settings
    from worker.dead_letters.reader import DeadLetterReader

    settings = read_settings()
    return DeadLetterReader(settings.broker_address, settings.topology, settings.platform_zone)


def _fetch(reader: "DeadLetterReader", chosen: "Filter", limit: int | None) -> list["DeadLetter"]:
    """Return the selected dead letters."""
    found: list[DeadLetter] = []
    _read(reader, chosen, limit, found, lambda dead_letter: dead_letter)
    return found


def _list(reader: "DeadLetterReader", chosen: "Filter", limit: int | None) -> list["Listing"]:
    """Return what a list shows of the selected dead letters, whose bodies may be far larger together than memory."""
    found: list[Listing] = []
    _read(reader, chosen, limit, found, lambda dead_letter: dead_letter.listing, cuts_bodies=True)
    return found


def _read(
    reader: "DeadLetterReader",
    chosen: "Filter",
    limit: int | None,
    found: list[Kept],
    kept: Callable[["DeadLetter"], Kept],
    *,
    cuts_bodies: bool = False,
) -> None:
    """Add what is to be kept of the selected dead letters to a list, as they are read."""
    now = datetime.now(UTC)

    def on_letter(dead_letter: "DeadLetter") -> None:
        if (limit is None or len(found) < limit) and chosen.matches(dead_letter, now):
            found.append(kept(dead_letter))

    read = reader.read(on_letter, cuts_bodies=cuts_bodies)
    if reader.waiting > read:
        share = f"{read:,} of {reader.waiting:,}"
        typer.echo(f"onenet-worker: only {share} dead letters can be read at once; their order is lost", err=True)


def _refuse_missing(past: str, found: Sequence["DeadLetter | Listing"], chosen: "Filter", limit: int | None) -> None:
    missing = chosen.ids - {dead_letter.command_id for dead_letter in found}
    if missing and limit is None:
        raise _missing(sorted(missing), f"; nothing was {past}")


def _apply(
    past: str,
    chosen: "Filter",
    limit: int | None,
    action: Callable[["DeadLetterReader", Sequence["DeadLetter"], Callable[[], None]], None],
) -> None:
    """Apply an action to each selected dead letter, and report how many were processed, also after an error."""
    done = 0
    with _open() as reader:
        found = _fetch(reader, chosen, limit)
        _refuse_missing(past, found, chosen, limit)
        try:
            with progress(past, len(found)) as advance:

                def count() -> None:
                    nonlocal done
                    done += 1
                    advance()

                action(reader, found, count)
        except KeyboardInterrupt:
            typer.echo(f"onenet-worker: interrupted: {past} {done:,} of {_counted(len(found))}", err=True)
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except WorkerError as exc:
            raise WorkerError(f"{exc}; {past} {done:,} of {_counted(len(found))}") from exc
    typer.echo(f"{past} {_counted(done)}")


def _missing(ids: Sequence[str], consequence: str = "") -> WorkerError:
    return WorkerError(f"no dead letter with id {', '.join(ids)}{consequence}")


def _counted(count: int) -> str:
    return f"{count:,} dead letter{'' if count == 1 else 's'}"


def _print(found: Sequence["Listing"], *, as_json: bool) -> None:
    from rich.table import Table
    from rich.text import Text

    from worker.dead_letters.view import summary, utc

    if as_json:
        for dead_letter in found:
            typer.echo(printable_json(summary(dead_letter)))
        return
    table = Table("dead-lettered", "reason", "command id", "device", "source", "expires", "error")
    now = datetime.now(UTC)
    for dead_letter in found:
        expires = utc(dead_letter.expires_at, timespec="seconds") or ""
        if dead_letter.expires_at is not None and dead_letter.expires_at <= now:
            expires = "has expired"
        cells = (
            utc(dead_letter.failed_at, timespec="seconds"), dead_letter.reason, dead_letter.command_id,
            dead_letter.imei, dead_letter.source, expires, dead_letter.error,
        )  # fmt: skip
        table.add_row(*(Text(printable((cell or "").replace("\n", " "))) for cell in cells))
    if found:
        _console().print(table)
    typer.echo(_counted(len(found)), err=True)


def _show(dead_letter: "DeadLetter") -> None:
    from rich.table import Table
    from rich.text import Text

    from worker.dead_letters.view import details

    fields = details(dead_letter)
    headers, properties = fields.pop("headers"), fields.pop("properties")
    body = json.dumps(json.loads(dead_letter.body), indent=2, ensure_ascii=False) if dead_letter.is_json else None
    fields.pop("body", None)
    fields.pop("body_base64", None)
    table = Table(show_header=False)
    for section, values in (("", fields), ("property ", properties), ("header ", headers)):
        for name, value in values.items():
            if value is not None:
                text = value if isinstance(value, str) else printable_json(value)
                table.add_row(Text(printable(section + name)), Text(printable(text)))
    table.add_row(Text("body"), Text(printable(body or dead_letter.body.decode(errors="backslashreplace"), keep="\n")))
    _console().print(table)


def _console() -> "Console":
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 10_000)  # a pipe has no width: do not wrap
