"""``onenet-worker dead-letters``."""

import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from dataclasses import replace as replaced
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any

import typer

from worker.cli.progress import progress
from worker.cli.terminal import (
    confirm,
    console,
    interruptible,
    local_time,
    note,
    print_json,
    print_json_line,
    print_line,
    print_rows,
    require_person_or_yes,
    short_time,
    shown_of,
    times_note,
)
from worker.core.times import parse_duration
from worker.errors import EXIT_FAILURE, EXIT_INTERRUPTED, WorkerError
from worker.printable import counted, printable, printable_json

if TYPE_CHECKING:
    from worker.admin.dead_letters import Count, DeadLetters, Found, Replay, Shown
    from worker.admin.obstacles import Obstacle
    from worker.dead_letters.groups import Group
    from worker.dead_letters.letter import Listing
    from worker.dead_letters.selection import Choice

_MAX_NAMES = 20  # in one line
_BAR_FROM = 100  # dead letters: fewer take no time
_MAX_ROWS = 10  # of what is to be deleted; more are counted by reason and error

dead_letters = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="List, count, show, replay or discard dead letters.\n\nListing keeps all of them, in their order. "
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
_NAME = "A command id, a digest from the list, or the beginning of either (at least 4 characters)."
Ids = Annotated[list[str] | None, typer.Argument(metavar="ID", help=f"Which: {_NAME}")]
Limit = Annotated[int | None, typer.Option(help="Maximum number of dead letters.", min=1)]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object per line.")]
DryRunAsJson = Annotated[bool, typer.Option("--json", help="With --dry-run: one JSON object per line.")]
All = Annotated[bool, typer.Option("--all", help="All dead letters.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only list the dead letters that would be affected.")]


def _choice_of(
    name: Annotated[list[str] | None, typer.Option("--id", metavar="ID", help=f"{_NAME} May be repeated.")] = None,
    reason: Annotated[
        list[Reason] | None,
        typer.Option("--reason", help="The reason for dead-lettering; may be repeated.", metavar="REASON"),
    ] = None,
    device: Annotated[str | None, typer.Option(metavar="IMEI", help="The device.")] = None,
    source: Annotated[
        str | None,
        typer.Option(metavar="APP_ID", help="The upstream system that sent the command: the property app_id."),
    ] = None,
    older_than: Annotated[
        timedelta | None, typer.Option(parser=_duration, metavar="AGE", help=f"Minimum {_AGE}")
    ] = None,
    newer_than: Annotated[
        timedelta | None, typer.Option(parser=_duration, metavar="AGE", help=f"Maximum {_AGE}")
    ] = None,
) -> "Choice":
    from worker.dead_letters.letter import Filter
    from worker.dead_letters.selection import Choice

    conditions = Filter(frozenset(map(str, reason or ())), device, source, older_than, newer_than)
    return Choice(frozenset(name or ()), conditions)


def _with_choice(command: Callable[..., None]) -> Callable[..., None]:
    """Replace a command's first parameter, a choice, by the options that describe one."""
    options = inspect.signature(_choice_of).parameters
    _, *others = inspect.signature(command).parameters.values()

    @wraps(command)
    def called(**values: Any) -> None:
        given = {name: values.pop(name) for name in options if name in values}
        command(_choice_of(**given), **values)

    called.__dict__["__signature__"] = inspect.Signature([*options.values(), *others])  # read by Typer
    called.__annotations__ = {each.name: each.annotation for each in (*options.values(), *others)}
    return called


@dead_letters.command("list")
@_with_choice
def list_dead_letters(
    choice: "Choice",
    limit: Limit = None,
    newest_first: Annotated[
        bool, typer.Option("--newest-first/--oldest-first", help="The order, and which ones a limit shows.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List dead letters, the oldest first. Each has a digest, which works wherever a command id does.

    With --json each has its body too. For example:

        onenet-worker dead-letters list --reason retries_exhausted --newest-first --limit 20
    """
    _list(choice, limit, newest_first=newest_first, as_json=as_json)


@dead_letters.command("summary")
@_with_choice
def summary(choice: "Choice", as_json: AsJson = False) -> None:
    """Count dead letters by reason and error; errors that differ only in numbers, ids and times count as one.

    For example:

        onenet-worker dead-letters summary --newer-than 1d
    """
    from worker.dead_letters.view import group

    found = _service().summarize(choice)
    _warn_of_missing(found.missing, choice=choice)
    if as_json:
        for each in found.groups:
            print_json(group(each))
        _warn_of_unread(found.count)
        return
    _print_groups(found.groups, found.short)
    _say_count(found.count, found.count.matching, choice)


@dead_letters.command("show")
def show(
    name: Annotated[str, typer.Argument(metavar="ID", help=f"{_NAME}")],
    as_json: AsJson = False,
) -> None:
    """Show a dead letter in full, and what to do with it; of a command id all dead letters.

    For example:

        onenet-worker dead-letters show 8f6c1d0e
    """
    found = _service().show(name)
    if not found:
        raise _missing([name])
    for number, each in enumerate(found):
        if as_json:
            print_json(each.document | {"advice": asdict(each.advice)})
        else:
            if number:
                print_line()
            _show(each)
    if len(found) > 1 and not as_json:
        digests = {each.listing.digest for each in found}
        note(
            f"{counted(len(found), 'dead letter')} of {name}: "
            + (
                "the digest of each names it alone"
                if len(digests) == len(found)
                else "some are alike, and failed at the same time, so that one digest names them together"
            )
        )
    if not as_json:
        note(times_note())


@dead_letters.command("replay")
@_with_choice
def replay(
    choice: "Choice",
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
    include_expired: Annotated[
        bool, typer.Option("--include-expired", help="Also those that have expired, which fail again at once.")
    ] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the outcomes, and print them as they arrive.")] = False,
    wait_timeout: Annotated[float, typer.Option(help="Seconds to wait for them, after the last replay.", min=0)] = 60.0,
    dry_run: DryRun = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object per line: what was replayed, or with --wait its outcome.")
    ] = False,
) -> None:
    """Send dead letters to the workers again, with the same command id and starting at attempt 1.

    A command that OneNET may have cached is replayed in doubt: the worker reads the device's command history first, and
    sends the command only if the history does not contain it. The outcome is published as a reply, as always. What has
    expired, and was certainly not sent, stays where it is. Exit code 1 if all that was chosen has expired, and with
    --wait if an outcome is missing or not "accepted". Example:

        onenet-worker dead-letters replay --reason retries_exhausted --newer-than 2h --rate 20/second --wait
    """
    from worker.admin.dead_letters import refuse_too_many

    choice = _required(choice, ids, is_all=is_all)
    if dry_run:
        count = _list(choice, limit, as_json=as_json, undone="replayed", leaves_hopeless=not include_expired)
        refuse_too_many(count, interval_s)
        return
    begun = _service().replay(
        choice, limit=limit, interval_s=interval_s, leaves_hopeless=not include_expired, is_watched=wait
    )
    with ExitStack() as stack:
        with interruptible("nothing was replayed"):
            under_way = stack.enter_context(begun)
        _refuse_missing("replayed", under_way.missing, choice)
        if not under_way.letters and not under_way.hopeless:
            _say_count(under_way.count, 0, choice)
            return
        _warn_of_unread(under_way.count)
        _say_hopeless(under_way.hopeless)
        if not under_way.letters:
            raise WorkerError("nothing was replayed")
        obstacles = under_way.find_obstacles() if wait else []
        _say_obstacles(obstacles)
        try:
            _run_replay(under_way, as_json=as_json and not wait)
            if wait:
                _print_outcomes(under_way, wait_timeout, obstacles, as_json=as_json)
        except KeyboardInterrupt:
            _say_progress("interrupted", under_way)
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except WorkerError as exc:
            raise WorkerError(*_progress_of(str(exc), under_way)) from exc
        if wait:
            _end_wait(under_way, wait_timeout, as_json=as_json)
        else:
            _end_replay(under_way, as_json=as_json)


@dead_letters.command("discard")
@_with_choice
def discard(
    choice: "Choice",
    ids: Ids = None,
    is_all: All = False,
    limit: Limit = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")] = False,
    dry_run: DryRun = False,
    as_json: DryRunAsJson = False,
) -> None:
    """Delete dead letters permanently, after a question that shows them; the others keep their order.

    For example:

        onenet-worker dead-letters discard --reason invalid_command --older-than 7d --yes
    """
    choice = _required(choice, ids, is_all=is_all)
    if dry_run:
        _list(choice, limit, as_json=as_json, undone="discarded")
        return
    if as_json:
        raise typer.BadParameter("--json needs --dry-run")
    service, plan = _service(), None
    if not yes:
        require_person_or_yes(yes=yes)
        with interruptible("nothing was discarded"):
            plan = service.plan_to_discard(choice, limit=limit)  # held by nobody while the question is open
        _refuse_missing("discarded", plan.found.missing, choice)
        if not plan.found.letters:
            _say_count(plan.found.count, 0, choice)
            return
        _show_plan(plan.found)
        confirm(f"Delete {_these(len(plan.found.letters))} permanently?", "nothing was discarded")
    with ExitStack() as stack:
        with interruptible("nothing was discarded"):
            under_way = stack.enter_context(service.discard(choice, limit=limit, plan=plan))
        _refuse_missing("discarded", under_way.missing, choice)
        total = len(under_way.letters)
        try:
            with progress("discarding", total, is_shown=total >= _BAR_FROM) as advance:
                for _ in under_way.run():
                    advance()
        except KeyboardInterrupt:
            note(f"interrupted: discarded {under_way.deleted:,} of {counted(total, 'dead letter')}")
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except WorkerError as exc:
            raise WorkerError(f"{exc}; discarded {under_way.deleted:,} of {counted(total, 'dead letter')}") from exc
    print_line(f"discarded {counted(total, 'dead letter')}")
    if plan is not None and total < len(plan.found.letters):
        note(f"{len(plan.found.letters) - total:,} of those that you confirmed were no longer there")


def _required(choice: "Choice", ids: Sequence[str] | None, *, is_all: bool) -> "Choice":
    """Add ids to a choice, and require either a choice or ``--all``.

    Raises:
        BadParameter: neither is given, or both.
    """
    choice = replaced(choice, names=choice.names | frozenset(ids or ()))
    if choice.is_empty and not is_all:
        raise typer.BadParameter(
            "no dead letters selected: give ids, --reason, --device, --source, --older-than, --newer-than or --all"
        )
    if is_all and not choice.is_empty:
        raise typer.BadParameter("--all cannot be combined with ids or filters: use one or the other")
    return choice


def _service() -> "DeadLetters":
    from worker.admin.dead_letters import DeadLetters
    from worker.cli.settings import read_settings

    settings = read_settings()
    return DeadLetters(settings.broker_address, settings.topology, settings.platform_zone)


def _list(
    choice: "Choice",
    limit: int | None,
    *,
    newest_first: bool = False,
    as_json: bool,
    undone: str | None = None,
    leaves_hopeless: bool = False,
) -> int:
    """Print dead letters; returns how many.

    Args:
        choice: which.
        limit: how many at most.
        newest_first: the newest, and these first.
        as_json: whole, as JSON.
        undone: of a dry run: what is not done to them. Then a missing id is an error, as it is without a dry run.
        leaves_hopeless: leave out what fails again at once if it is replayed, and say so.
    """
    if as_json:
        from worker.admin.spool import Spool

        with Spool() as spool:
            documents = _service().find_documents(
                choice, spool, limit=limit, is_newest_first=newest_first, leaves_hopeless=leaves_hopeless
            )
            _warn_of_missing(documents.missing, undone, choice)
            _say_hopeless(documents.hopeless)
            for line in documents:
                print_json_line(line)
            shown = len(documents.places)
            if shown < documents.count.matching:
                _say_count(documents.count, shown, choice, newest_first=newest_first)
            else:
                _warn_of_unread(documents.count)
            return shown
    found = _service().find(choice, limit=limit, is_newest_first=newest_first, leaves_hopeless=leaves_hopeless)
    _warn_of_missing(found.missing, undone, choice)
    _say_hopeless(found.hopeless)
    _print_letters(found.letters, found.short)
    _say_count(found.count, len(found.letters), choice, newest_first=newest_first)
    return len(found.letters)


def _print_letters(letters: Sequence["Listing"], short: Callable[[str], str], *, stderr: bool = False) -> None:
    now = datetime.now(UTC)
    rows = []
    for letter in letters:
        error = letter.error or ""
        if letter.expires_at is not None and letter.expires_at <= now and letter.reason != "expired":
            error = f"has expired; {error}" if error else "has expired"
        rows.append(
            (
                short(letter.digest), short_time(letter.failed_at), letter.reason, letter.command_id or "",
                letter.imei or "", letter.source or "", error,
            )
        )  # fmt: skip
    headings = ("digest", "failed at", "reason", "command id", "device", "source", "error")
    print_rows(headings, rows, ((0, 1, 2), (3, 4, 5), (6,)), stderr=stderr)


def _print_groups(groups: Sequence["Group"], short: Callable[[str], str], *, stderr: bool = False) -> None:
    rows = [
        (counted(each.count, "letter"), each.reason, _span(each), short(each.example), each.error or "")
        for each in groups
    ]
    headings = ("number", "reason", "failed at", "for example", "its error")
    print_rows(headings, rows, ((0, 1, 2), (3, 4)), stderr=stderr)


def _span(group: "Group") -> str:
    if group.oldest == group.newest:
        return short_time(group.oldest)
    return f"{short_time(group.oldest)} to {short_time(group.newest)}"


def _say_count(count: "Count", shown: int, choice: "Choice", *, newest_first: bool = False) -> None:
    """Say how many dead letters there are, whatever a limit shows of them, and what to do where there is none."""
    _warn_of_unread(count)
    total = counted(count.read, "dead letter")
    if not count.read:
        note("there are no dead letters: no command has failed, or all were replayed or discarded")
    elif not count.matching:
        note(f"0 of {total} match: onenet-worker dead-letters summary shows what there is")
    else:
        shown_text = shown_of(shown, count.matching, "dead letter", newest_first=newest_first)
        matches = "that matches" if count.matching == 1 else "that match"
        among = "" if choice.is_empty else f" {matches}, of {count.read:,} in all"
        note(f"{shown_text}{among}; {times_note()}")


def _warn_of_unread(count: "Count") -> None:
    if count.waiting > count.read:
        share = f"{count.read:,} of {count.waiting:,}"
        note(f"only {share} dead letters can be read at once; their order is lost")


def _refuse_missing(past: str, missing: Sequence[str], choice: "Choice | None") -> None:
    if missing:
        raise _missing(missing, f"; nothing was {past}", choice)


def _warn_of_missing(missing: Sequence[str], undone: str | None = None, choice: "Choice | None" = None) -> None:
    if undone is not None:
        _refuse_missing(undone, missing, choice)
    elif missing:
        note(str(_missing(missing, choice=choice)))


def _missing(names: Sequence[str], consequence: str = "", choice: "Choice | None" = None) -> WorkerError:
    from worker.dead_letters.selection import SHORTEST_BEGINNING

    short = any(len(name) < SHORTEST_BEGINNING for name in names)
    hint = f" (the beginning of an id needs {SHORTEST_BEGINNING} characters)" if short else ""
    is_filtered = choice is not None and not choice.conditions.is_empty
    among = " among those that the other options choose" if is_filtered else ""
    return WorkerError(f"no dead letter with id {_some(names)}{hint}{among}{consequence}")


def _some(names: Sequence[str]) -> str:
    """Return names for people: the first of very many."""
    more = len(names) - _MAX_NAMES
    return ", ".join(names[:_MAX_NAMES]) + (f" and {more:,} more" if more > 0 else "")


def _show_plan(found: "Found") -> None:
    """Show what is to be deleted."""
    if len(found.letters) <= _MAX_ROWS:
        _print_letters(found.letters, found.short, stderr=True)
    else:
        from worker.dead_letters.groups import Groups

        groups = Groups()
        for letter in found.letters:
            groups.add(letter)
        _print_groups(groups.largest_first(), found.short, stderr=True)


def _these(count: int) -> str:
    return "this dead letter" if count == 1 else f"these {counted(count, 'dead letter')}"


def _say_hopeless(letters: Sequence["Listing"]) -> None:
    """Say what is not replayed because it has expired."""
    if not letters:
        return
    which = f"{counted(len(letters), 'dead letter')}: {_some([letter.name for letter in letters])}"
    note(f"not replayed, because expired_time has passed and a replay would fail again at once: {which}")
    note(
        "let the upstream system publish new commands, then discard these; --include-expired replays them all the same"
    )


def _say_obstacles(obstacles: Sequence["Obstacle"]) -> None:
    for obstacle in obstacles:
        note(f"commands may wait: {obstacle}")


def _run_replay(under_way: "Replay", *, as_json: bool) -> None:
    """Replay, and print each as JSON once it is replayed, if that is wanted."""
    from worker.dead_letters.view import summary as fields_of

    total = len(under_way.letters)
    with progress("replaying", total, is_shown=not as_json and total >= _BAR_FROM) as advance:
        for letter in under_way.run():
            advance()
            if as_json:
                print_json(fields_of(letter))


def _end_replay(under_way: "Replay", *, as_json: bool) -> None:
    """Say how many were replayed, and why they are not sent."""
    if not as_json:
        print_line(f"replayed {counted(under_way.replayed, 'dead letter')}")
    if under_way.replayed:
        _say_obstacles(under_way.find_obstacles())


def _print_outcomes(under_way: "Replay", timeout_s: float, known: Sequence["Obstacle"], *, as_json: bool) -> None:
    kinds = {(each.kind, each.scope) for each in known}

    def on_obstacle(obstacle: "Obstacle") -> None:
        if (obstacle.kind, obstacle.scope) not in kinds:
            _say_obstacles([obstacle])

    if not as_json:
        note(f"replayed {counted(under_way.replayed, 'dead letter')}: waiting for the outcomes")
    for outcome in under_way.outcomes(timeout_s, on_obstacle):
        if as_json:
            _print_outcome(outcome.letter, outcome.reply)
            continue
        uuid, error = outcome.reply.get("uuid"), outcome.error
        about = f"uuid {uuid}" if uuid else f"{error.get('code')}: {error.get('message')}"
        cells = (f"{outcome.status:<8}", outcome.letter.name, outcome.letter.imei or "", about)
        print_line(printable("  ".join(cell for cell in cells if cell)))


def _print_outcome(letter: "Listing", reply: dict[str, Any] | None) -> None:
    print_json({"digest": letter.digest, "command_id": letter.command_id, "reply": reply})


def _end_wait(under_way: "Replay", timeout_s: float, *, as_json: bool) -> None:
    """Say what became of the replayed ones, by outcome, and which have none.

    Raises:
        WorkerError: an outcome is missing.
    """
    by_outcome = under_way.count_outcomes()
    waiting = under_way.without_outcome
    parts = [f"{count:,} {outcome}" for outcome, count in by_outcome.items()]
    if waiting:
        parts.append(f"{len(waiting):,} without an outcome")
    if not as_json:
        said = f": {', '.join(parts)}" if parts else ""
        print_line(f"replayed {counted(under_way.replayed, 'dead letter')}{said}")
    if waiting:
        if as_json:
            for letter in waiting:
                _print_outcome(letter, None)
        raise WorkerError(
            f"no outcome after {timeout_s:g} s of {_some([letter.name for letter in waiting])}",
            *(f"commands may wait: {obstacle}" for obstacle in under_way.find_obstacles()),
            "nothing is lost: workers go on trying, and reply to the upstream system; "
            "onenet-worker status COMMAND_ID tells what is known",
        )
    if set(by_outcome) - {"accepted"}:
        raise typer.Exit(EXIT_FAILURE)


def _say_progress(what: str, under_way: "Replay") -> None:
    for line in _progress_of(what, under_way):
        note(line)


def _progress_of(what: str, under_way: "Replay") -> list[str]:
    """Return how far a replay came, for its end in the middle: what was replayed, what was not, and what is unsure."""
    ids = Counter(letter.name for letter in under_way.letters)
    names = [
        letter.name if ids[letter.name] == 1 else f"{letter.name} ({under_way.short(letter.digest)})"
        for letter in under_way.letters
    ]
    done, left = names[: under_way.replayed], names[under_way.replayed :]
    lines = [f"{what}: replayed {len(done):,} of {counted(len(names), 'dead letter')}"]
    if under_way.is_unsure and left:
        unsure, *left = left
        lines.append(f"perhaps replayed as well: {unsure}; if it is still there, replaying it again does no harm")
    if done and left:
        lines.append(f"replayed: {_some(done)}")
    if left:
        lines.append(f"not replayed, and still in the queue: {_some(left)}")
    elif under_way.is_watched and (waiting := under_way.without_outcome):
        lines.append(f"without an outcome so far: {_some([letter.name for letter in waiting])}")
    return lines


def _show(shown: "Shown") -> None:
    from rich.table import Table
    from rich.text import Text

    listing, document = shown.listing, shown.document
    expires = local_time(listing.expires_at)
    if listing.expires_at is not None and listing.expires_at <= datetime.now(UTC):
        expires += " (has expired)"
    said = (("x-onenet-error", listing.error), ("x-onenet-reason", listing.reason))
    values = {
        "digest": listing.digest,
        "command id": listing.command_id,
        "device": listing.imei,
        "reason": listing.reason,
        "error": listing.error,
        "failed at": local_time(listing.failed_at),
        "expires at": expires,
        "source": listing.source,
        "routing key": document["routing_key"],
        **{f"property {name}": value for name, value in document["properties"].items()},
        **{
            f"header {name}": value
            for name, value in document["headers"].items()
            if name != "x-delivery-count" and (name, value) not in said
        },
    }
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in values.items():
        if value not in (None, ""):
            text = value if isinstance(value, str) else printable_json(value)
            table.add_row(Text(printable(name), "dim"), Text(printable(text)))
    target = console()
    target.print(Text(f"dead letter {shown.short}", "bold"))
    target.print(table)
    target.print(Text("body", "bold"))
    target.print(Text(printable(shown.text, keep="\n")), overflow="fold")
    target.print(Text("what it means", "bold"))
    target.print(Text(printable(shown.advice.meaning)))
    target.print(Text("replay it?", "bold"))
    target.print(Text(printable(shown.advice.replay) + "."))
    for command in shown.advice.commands:
        target.print(Text(printable(f"  {command}")), soft_wrap=True)
