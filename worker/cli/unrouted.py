"""``onenet-worker unrouted``."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated

import typer

from worker.cli.progress import progress
from worker.cli.terminal import (
    confirm,
    local_time,
    note,
    print_json_line,
    print_line,
    print_rows,
    require_person_or_yes,
    shown_of,
    times_note,
)
from worker.core.times import parse_duration
from worker.errors import EXIT_FAILURE, EXIT_INTERRUPTED, WorkerError
from worker.printable import counted, printable_json

if TYPE_CHECKING:
    from worker.admin.unrouted import Discarded, Published, Unrouted, UnroutedFilter, UnroutedGroup, UnroutedReply
    from worker.settings import Settings

_WITH_BAR = 1_000  # with fewer a bar would be gone before anybody has read it
_NOUN = "unrouted reply"

unrouted = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="List, publish or discard the replies and results that no queue was bound for.\n\nThe broker keeps them in "
    "the queue `<WORKER_NAMESPACE>.replies.unrouted`. Example:\n\n    onenet-worker unrouted list",
)


def _duration(text: str) -> timedelta:
    try:
        return parse_duration(text)
    except ValueError as exc:
        raise typer.BadParameter(str(exc)) from exc


Keys = Annotated[list[str] | None, typer.Option("--key", help="A routing key; may be repeated.", metavar="KEY")]
Source = Annotated[
    str | None, typer.Option("--source", metavar="APP_ID", help="The upstream system whom they are for.")
]
OlderThan = Annotated[
    timedelta | None,
    typer.Option("--older-than", parser=_duration, metavar="AGE", help="Minimum age, such as 90s, 15m, 2h or 7d."),
]
Limit = Annotated[int | None, typer.Option(help="Maximum number of replies, the oldest first.", min=1)]
All = Annotated[bool, typer.Option("--all", help="All unrouted replies.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only list what would be affected.")]


@unrouted.command("list")
def list_replies(
    keys: Keys = None,
    source: Source = None,
    older_than: OlderThan = None,
    limit: Limit = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object for each reply, with its body, the oldest first.")
    ] = False,
) -> None:
    """List unrouted replies by routing key; all of them stay where they are.

    A routing key is the reply_to of commands, or execute.STATUS.APP_ID, result.RESULT.APP_ID. Example:

        onenet-worker unrouted list --source billing
    """
    from worker.cli.settings import read_settings

    chosen, settings = _filter(keys, source, older_than), read_settings()
    if as_json:
        _say_count(_print_documents(settings, chosen, limit))
        return
    found = _list(settings, chosen, limit)
    _print(found.groups)
    _say_count(found)
    if found.groups:
        exchange = settings.topology.replies_exchange
        note(f"bind a queue to {exchange} for these keys, then: onenet-worker unrouted publish --key KEY")
        note("or delete them: onenet-worker unrouted discard --key KEY")


@unrouted.command("publish")
def publish(
    keys: Keys = None,
    source: Source = None,
    older_than: OlderThan = None,
    is_all: All = False,
    limit: Limit = None,
    dry_run: DryRun = False,
) -> None:
    """Publish unrouted replies again under their own routing keys, the oldest first.

    A reply that no queue is bound for by now either stays. None is lost, and one may arrive twice. Exit code 1 if some
    stay. Example:

        onenet-worker unrouted publish --source billing
    """
    from worker.admin.unrouted import Published, publish_unrouted
    from worker.cli.settings import read_settings

    chosen = _required(keys, source, older_than, is_all=is_all)
    settings, done = read_settings(), Published()
    if dry_run:
        listed = _list(settings, chosen, limit)
        _print(listed.groups)
        _say_count(listed)
        return
    with _told(done, "published"), ExitStack() as stack:
        publish_unrouted(
            settings.broker_address,
            settings.topology,
            chosen,
            datetime.now(UTC),
            limit=limit,
            done=done,
            on_selected=lambda total: stack.enter_context(progress("publishing", total, is_shown=total >= _WITH_BAR)),
        )
    if done.unbound:
        _say_unbound(done, settings.topology.replies_exchange)
        raise typer.Exit(EXIT_FAILURE)


@unrouted.command("discard")
def discard(
    keys: Keys = None,
    source: Source = None,
    older_than: OlderThan = None,
    is_all: All = False,
    limit: Limit = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Delete unrouted replies permanently; the others keep their order.

    The commands that they tell of stay as they are. Example:

        onenet-worker unrouted discard --key execute.accepted.cli --older-than 7d
    """
    from worker.admin.unrouted import Discarded, discard_unrouted
    from worker.cli.settings import read_settings

    chosen = _required(keys, source, older_than, is_all=is_all)
    settings, done, agreed = read_settings(), Discarded(), None
    if dry_run or not yes:
        require_person_or_yes(yes=dry_run)
        agreed = _list(settings, chosen, limit)
        _print(agreed.groups, stderr=not dry_run)
        _say_count(agreed)
        if dry_run or not agreed.digests:
            return
        confirm(f"Delete {counted(len(agreed.digests), _NOUN)} permanently?", "nothing was discarded")
    with _told(done, "discarded"):
        discard_unrouted(
            settings.broker_address,
            settings.topology,
            chosen,
            datetime.now(UTC),
            limit=limit,
            agreed=agreed,
            done=done,
        )
    if agreed is not None and done.selected < len(agreed.digests):
        note(f"{len(agreed.digests) - done.selected:,} of those that you confirmed were no longer there")


@contextmanager
def _told(done: "Published | Discarded", past: str) -> Iterator[None]:
    """Say how many replies were processed, also after an error or an interrupt."""

    def so_far() -> str:
        return (
            f"{past} {done.count:,} of {counted(done.selected, _NOUN)}, and perhaps the next one; "
            "the others are still there"
        )

    try:
        yield
    except KeyboardInterrupt:
        note(f"interrupted: {so_far() if done.selected else f'nothing was {past}'}")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except WorkerError as exc:
        if not done.selected:
            raise
        raise WorkerError(f"{exc}; {so_far()}") from exc
    if done.selected:
        said = counted(done.count, _NOUN) if done.count else f"none of {counted(done.selected, _NOUN)}"
        print_line(f"{past} {said}")
    else:
        note(f"nothing was {past}: {_none_of(done.waiting)}")


def _filter(keys: list[str] | None, source: str | None, older_than: timedelta | None) -> "UnroutedFilter":
    from worker.admin.unrouted import UnroutedFilter

    return UnroutedFilter(frozenset(keys or ()), source, older_than)


def _required(
    keys: list[str] | None, source: str | None, older_than: timedelta | None, *, is_all: bool
) -> "UnroutedFilter":
    """Return a filter, and require either a condition or ``--all``.

    Raises:
        BadParameter: neither is given, or both.
    """
    chosen = _filter(keys, source, older_than)
    if chosen.is_empty and not is_all:
        raise typer.BadParameter("no unrouted replies selected: give --key, --source, --older-than or --all")
    if is_all and not chosen.is_empty:
        raise typer.BadParameter("--all cannot be combined with --key, --source or --older-than: use one or the other")
    return chosen


def _list(settings: "Settings", chosen: "UnroutedFilter", limit: int | None) -> "Unrouted":
    from worker.admin.unrouted import list_unrouted

    return list_unrouted(settings.broker_address, settings.topology, chosen, datetime.now(UTC), limit=limit)


def _print_documents(settings: "Settings", chosen: "UnroutedFilter", limit: int | None) -> "Unrouted":
    """Print each reply as JSON, once all are read: whoever reads the output may be slow, and others wait to read."""
    from worker.admin.spool import Spool
    from worker.admin.unrouted import list_unrouted, unrouted_document

    with Spool() as spool:
        places: list[int] = []

        def keep(reply: "UnroutedReply") -> None:
            places.append(spool.append(printable_json(unrouted_document(reply))))

        now = datetime.now(UTC)
        found = list_unrouted(settings.broker_address, settings.topology, chosen, now, limit=limit, on_reply=keep)
        for place in places:
            print_json_line(spool.line(place))
    return found


def _print(groups: list["UnroutedGroup"], *, stderr: bool = False) -> None:
    headings = ("routing key", "a command id", "replies", "oldest", "newest")
    rows = [
        (
            group.routing_key or "(empty)",
            group.command_id or "",
            f"{group.count:,}",
            local_time(group.oldest_at),
            local_time(group.newest_at),
        )
        for group in groups
    ]
    print_rows(headings, rows, stderr=stderr)


def _say_count(found: "Unrouted") -> None:
    if not found.matching:
        note(_none_of(found.waiting))
        return
    note(f"{shown_of(len(found.digests), found.matching, _NOUN)}; {times_note()}")
    if found.waiting > found.read:
        note(f"only {found.read:,} of {found.waiting:,} can be read at once; their order is lost")


def _none_of(waiting: int) -> str:
    if waiting:
        return f"none of {counted(waiting, _NOUN)} matches"
    return "there is no unrouted reply: a queue was bound for each"


def _say_unbound(done: "Published", exchange: str) -> None:
    print_rows(("no queue is bound for", "replies"), [(key, f"{count:,}") for key, count in done.unbound.most_common()])
    stay = sum(done.unbound.values())
    note(f"{counted(stay, _NOUN)} stay{'s' if stay == 1 else ''}: bind a queue to {exchange} for the routing key")
