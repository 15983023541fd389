"""``onenet-worker status``."""

from typing import TYPE_CHECKING, Annotated

import typer

from worker.cli.terminal import local_time, note, print_fields, print_json, print_lines, times_note
from worker.errors import EXIT_FAILURE, WorkerError
from worker.printable import counted

if TYPE_CHECKING:
    from worker.admin.status import CommandStory
    from worker.core.records import CommandRecord
    from worker.dead_letters.letter import Listing

_STATES = {
    "in_progress": "in progress",
    "in_doubt": "in doubt: it may or may not have been sent",
    "not_sent": "not sent yet",
    "unreadable": "its record cannot be read",
}
_OUTCOMES = {
    "accepted": "accepted: OneNET keeps it for its device",
    "rejected": "rejected by OneNET",
    "failed": "failed",
}


def _command_id(text: str) -> str:
    from pydantic import TypeAdapter, ValidationError

    from schemas.command import CommandId

    try:
        return TypeAdapter[str](CommandId).validate_python(text)
    except ValidationError:
        raise typer.BadParameter("is no command id: it has 1 to 128 of the characters A-Z a-z 0-9 . _ : -") from None


def status(
    command_id: Annotated[
        str,
        typer.Argument(
            metavar="COMMAND_ID",
            parser=_command_id,
            help="The command; if it has a dead letter also the beginning of its id or of its digest.",
        ),
    ],
    source: Annotated[
        str | None,
        typer.Option(metavar="APP_ID", help="The upstream system that sent it; an id belongs to its system."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Say what became of a command: its record, its reply, its result and its dead letters, and what to do next.

    Nothing is changed and nothing is sent. Exit code 1 if nothing is known of it. Example:

        onenet-worker status order-17
    """
    from worker.admin.status import story_document, tell_story
    from worker.cli.settings import read_settings

    story = tell_story(read_settings(), command_id, source)
    if not story.is_known and story.unread:
        raise WorkerError("; ".join(story.unread))
    if as_json:
        print_json(story_document(story))
    elif story.is_known:
        _print(story)
    if not story.is_known:
        sender = f" from {source}" if source else ""
        note(f"nothing is known of {command_id}{sender}")
        if not as_json:
            print_lines("It can mean:", [(reason, ()) for reason in story.possible_reasons])
            for obstacle in story.obstacles:
                note(f"commands may wait: {obstacle}")
        raise typer.Exit(EXIT_FAILURE)
    for line in story.unread:
        note(f"could not be read: {line}")
    if story.unread:
        raise typer.Exit(EXIT_FAILURE)


def _print(story: "CommandStory") -> None:
    for record in story.records or ():
        print_fields(_title(record.command_id, record.source), _record_fields(record))
    if not story.records:
        where = "there is none" if story.has_shared_records else "is in the memory of the workers, not to be read here"
        if story.has_shared_records and story.records is None:
            where = "could not be read"
        print_fields(story.command_id, [("record", where)])
    for letter in story.dead_letters:
        print_fields(f"dead letter of {_title(story.command_id, letter.source)}", _letter_fields(letter))
    if story.next_steps:
        print_lines("Next:", [(step.text, step.commands) for step in story.next_steps])
    if story.source is None and len(story.records or ()) > 1:
        note(f"{counted(len(story.records or ()), 'system')} use this id: choose one with --source APP_ID")
    note(times_note())


def _title(command_id: str, source: str | None) -> str:
    return f"{command_id} from {source}" if source else command_id


def _record_fields(record: "CommandRecord") -> list[tuple[str, str]]:
    if record.reply is not None:
        return _outcome_fields(record)
    fields = [("state", _STATES[record.state])]
    if record.state == "in_progress":
        fields.append(("since", local_time(record.since)))
    if record.state == "in_doubt":
        fields += [("since", local_time(record.since) or "unknown"), ("until", local_time(record.until))]
    if record.was_abandoned:
        fields.append(("worker", "the one that held it ended without releasing it"))
    return [*fields, ("kept until", local_time(record.kept_until))]


def _outcome_fields(record: "CommandRecord") -> list[tuple[str, str]]:
    reply, result = record.reply, record.result
    if reply is None:
        return []
    fields = [("outcome", _OUTCOMES[reply.status]), ("completed at", local_time(reply.completed_at))]
    fields += [("device", reply.imei or ""), ("uuid", reply.uuid or "")]
    if reply.recovered:
        fields.append(("recovered", "its uuid was found in the device's history"))
    if reply.error is not None:
        number = "" if reply.error.errno is None else f", {reply.error.errno}"
        fields.append(("error", f"{reply.error.code}{number}: {reply.error.message}"))
    fields.append(("attempts", str(reply.attempts)))
    if reply.status == "accepted":
        fields.append(("result", "none is recorded" if result is None else result.result))
    if result is not None:
        fields += [
            ("confirm status", result.confirm_status or ""),
            ("sent at", local_time(result.sent_at)),
            ("confirmed at", local_time(result.confirmed_at)),
        ]
    return [*fields, ("kept until", local_time(record.kept_until))]


def _letter_fields(letter: "Listing") -> list[tuple[str, str]]:
    return [
        ("reason", letter.reason),
        ("error", letter.error or ""),
        ("failed at", local_time(letter.failed_at)),
        ("device", letter.imei or ""),
        ("expires at", local_time(letter.expires_at)),
    ]
