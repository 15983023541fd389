"""What became of one command: its record, its dead letters, its result, and what to do next."""

import asyncio
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TypeVar

from worker.admin.obstacles import find_obstacles
from worker.admin.queues import count_queues_of
from worker.core.records import CommandRecord
from worker.core.redis_address import RedisAddress
from worker.dead_letters.advice import advise
from worker.dead_letters.letter import DeadLetter, Listing
from worker.dead_letters.reader import DeadLetterReader
from worker.errors import WorkerError
from worker.settings import MEMORY, Settings

Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class CommandStory:
    """What is known of a command.

    Attributes:
        command_id: the command.
        source: the upstream system that was asked for; None: any.
        records: of the command; several only if several systems use its id, none if there is none.
        has_shared_records: False: records are in the memory of the workers, and cannot be read from outside.
        dead_letters: the dead letters with this id, the oldest first.
        waiting: how many messages wait in the queue of commands, not yet taken by a worker; None: unknown.
        delayed: how many wait in the delay queues; None: unknown.
        obstacles: why commands are not sent now.
        unread: what could not be read, with the reason.
    """

    command_id: str
    source: str | None
    records: tuple[CommandRecord, ...]
    has_shared_records: bool
    dead_letters: tuple[Listing, ...]
    waiting: int | None
    delayed: int | None
    obstacles: tuple[str, ...]
    unread: tuple[str, ...]

    @property
    def is_known(self) -> bool:
        """Whether anything is known of the command itself."""
        return bool(self.records or self.dead_letters)


def tell_story(settings: Settings, command_id: str, source: str | None) -> CommandStory:
    """Find out what became of a command. Nothing is changed and nothing is sent.

    What cannot be read is named in the story, and the rest is told all the same.

    Args:
        settings: of the deployment.
        command_id: the command.
        source: the upstream system that sent it, to which the id belongs; None: any.
    """
    unread: list[str] = []

    def tried(what: str, read: Callable[[], Found]) -> Found | None:
        try:
            return read()
        except WorkerError as exc:
            unread.append(f"{what}: {exc}")
            return None

    broker, topology = settings.broker_address, settings.topology
    counts = tried("the queues", lambda: count_queues_of(broker, topology))
    letters, obstacles = None, None
    if counts is not None:  # otherwise there is no broker to read anything of
        letters = tried("the dead letters", lambda: _dead_letters(settings, command_id, source))
        obstacles = tried("what keeps commands from being sent", lambda: find_obstacles(broker, topology))
    has_shared_records = settings.idempotency_url.get_secret_value() != MEMORY
    others = {letter.source for letter in letters or () if letter.source}
    records = None
    if has_shared_records:
        records = tried("the record", lambda: _records(settings, command_id, source, others))
    return CommandStory(
        command_id,
        source,
        tuple(records or ()),
        has_shared_records,
        tuple(letters or ()),
        None if counts is None else counts.commands,
        None if counts is None else counts.delayed,
        tuple(obstacles or ()),
        tuple(unread),
    )


def next_steps(story: CommandStory, reconcile_delay_s: int) -> list[str]:
    """Return what a person may do next, one line for each step.

    Args:
        story: of the command.
        reconcile_delay_s: for how long a command in doubt waits, in seconds.
    """
    steps: list[str] = []
    for record in story.records:
        match record.state:
            case "in_progress":
                steps.append("a worker is processing it: look again in a moment")
            case "in_doubt":
                steps.append(
                    "it may have been sent: a worker reads the device's history before it sends anything; "
                    f"look again after {reconcile_delay_s} s, or see the history with onenet-worker device IMEI"
                )
            case "not_sent":
                steps.append("it waits for its next attempt, in the queue or in a delay queue")
            case "unreadable":
                steps.append("its record cannot be read, so it counts as in doubt: look at onenet-worker device IMEI")
            case "finished":
                steps += _after_outcome(record, story)
    if story.dead_letters and not any(record.state == "finished" for record in story.records):
        steps += _about_dead_letters(story)
    if story.is_known and not _is_over(story):
        steps += [f"commands are not sent now: {obstacle}" for obstacle in story.obstacles]
    return list(dict.fromkeys(steps))


def reasons_for_nothing(story: CommandStory, ttl_s: int, namespace: str) -> list[str]:
    """Return what it can mean that nothing is known of a command.

    Args:
        story: of the command.
        ttl_s: for how long a record is kept, in seconds.
        namespace: in which was looked.
    """
    reasons = ["it never arrived: ask its sender for the publisher confirm"]
    if story.waiting:
        reasons.append(f"it is one of {story.waiting:,} that wait in the queue and that no worker has taken yet")
    if story.delayed:
        reasons.append(f"it is one of {story.delayed:,} that wait in the delay queues")
    if not story.has_shared_records:
        reasons.append(
            "a worker has its record: with IDEMPOTENCY_URL=memory:// records are in the workers' memory and cannot be "
            "read from outside; read the worker's log"
        )
    else:
        reasons.append(f"its record has expired: it is kept for IDEMPOTENCY_TTL, {ttl_s} s")
        if story.source is None:
            reasons.append("another system used this id first: name the sender with --source APP_ID")
        else:
            reasons.append(f"{story.source} did not send it: leave out --source to look for any sender's")
    where = "at the broker and Redis of AMQP_URL and IDEMPOTENCY_URL"
    reasons.append(f"it belongs elsewhere: looked in the namespace {namespace}, {where}")
    return reasons


def _after_outcome(record: CommandRecord, story: CommandStory) -> list[str]:
    reply = record.reply
    if reply is None:
        return []
    match reply.status:
        case "accepted" if record.result is None:
            return [f"OneNET keeps it for its device; what became of it: onenet-worker device {reply.imei or 'IMEI'}"]
        case "accepted":
            return []
        case "rejected":
            return ["nothing was cached: correct the cause and send a new command, with another id"]
        case _ if story.dead_letters:
            return _about_dead_letters(story)
        case _:
            return ["its dead letter was discarded, or replayed and is waiting"]


def _about_dead_letters(story: CommandStory) -> list[str]:
    """Return what to do with the dead letters of a command, as ``dead-letters show`` says."""
    steps = []
    for letter in story.dead_letters:
        advice = advise(letter, letter.name, is_valid=letter.expires_at is not None)
        steps.append(f"replay its dead letter? {advice.replay}: {'; '.join(advice.commands)}")
    return list(dict.fromkeys(steps))


def _is_over(story: CommandStory) -> bool:
    return bool(story.records) and all(record.state == "finished" for record in story.records)


def _dead_letters(settings: Settings, command_id: str, source: str | None) -> list[Listing]:
    found: list[Listing] = []

    def on_letter(letter: DeadLetter) -> None:
        if letter.command_id == command_id and source in {None, letter.source}:
            found.append(letter.listing(datetime.now(UTC)))

    with DeadLetterReader(settings.broker_address, settings.topology, settings.platform_zone) as reader:
        reader.read(on_letter, cuts_bodies=True)
    return found


def _records(settings: Settings, command_id: str, source: str | None, others: Collection[str]) -> list[CommandRecord]:
    from worker.idempotency.records import RecordReader  # an optional dependency

    async def look() -> list[CommandRecord]:
        address = RedisAddress.parse(settings.idempotency_url.get_secret_value())
        reader = RecordReader(address, settings.worker_namespace)
        try:
            return await reader.look(command_id, source, others)
        finally:
            await reader.close()

    return asyncio.run(look())
