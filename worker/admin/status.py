"""What became of one command: its record, its dead letters, its result, and what to do next."""

import asyncio
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

from worker.admin.obstacles import Obstacle, find_obstacles
from worker.admin.queues import QueueCounts, count_queues_of
from worker.amqp.queue_reader import MAX_PREFETCH
from worker.core.records import CommandRecord
from worker.core.redis_address import RedisAddress
from worker.dead_letters.advice import advise
from worker.dead_letters.letter import DeadLetter, Listing
from worker.dead_letters.reader import DeadLetterReader
from worker.dead_letters.selection import SHORTEST_BEGINNING, ShortDigests, names_that_begin
from worker.dead_letters.view import summary
from worker.errors import WorkerError
from worker.printable import utc
from worker.settings import MEMORY, Settings

Found = TypeVar("Found")

_MAX_NAMED = 5  # of several dead letters that a text could mean
_DISCARDED = "its dead letter was discarded, or replayed and is waiting"
_UNREAD = "its dead letter was not found, because not all of them could be read: look again in a moment"


@dataclass(frozen=True, slots=True)
class NextStep:
    """What a person may do next.

    Attributes:
        text: one sentence or two.
        commands: what to type, in this order.
    """

    text: str
    commands: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CommandStory:
    """What is known of a command.

    Attributes:
        command_id: the command.
        source: the upstream system that was asked for; None: any.
        records: of the command; several only if several systems use its id, none if there is none; None: not read.
        has_shared_records: False: records are in the memory of the workers, and cannot be read from outside.
        dead_letters: the dead letters with this id, the oldest first.
        queue_waiting: how many messages of all commands wait in the queue, not yet taken by a worker; None: unknown.
        queue_delayed: how many wait in the delay queues; None: unknown.
        obstacles: why commands may not be sent now.
        unread: what could not be read, with the reason.
        next_steps: what a person may do; empty if nothing is known.
        possible_reasons: what it can mean that nothing is known; empty otherwise.
    """

    command_id: str
    source: str | None
    records: tuple[CommandRecord, ...] | None
    has_shared_records: bool
    dead_letters: tuple[Listing, ...]
    queue_waiting: int | None
    queue_delayed: int | None
    obstacles: tuple[Obstacle, ...]
    unread: tuple[str, ...]
    next_steps: tuple[NextStep, ...]
    possible_reasons: tuple[str, ...]

    @property
    def is_known(self) -> bool:
        """Whether anything is known of the command itself."""
        return bool(self.records or self.dead_letters)


def tell_story(settings: Settings, command_id: str, source: str | None) -> CommandStory:
    """Find out what became of a command. Nothing is changed and nothing is sent.

    What cannot be read is named in the story, and the rest is told all the same.

    Args:
        settings: of the deployment.
        command_id: the command, or its dead letter: the digest of that, or the beginning of its digest or its id.
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
    letters: list[Listing] | None = None
    meant: dict[str, Listing] = {}  # by digest: dead letters that the text may mean
    short = ShortDigests()
    obstacles: list[Obstacle] = []
    if counts is not None:  # otherwise there is no broker to read anything of
        letters = tried("the dead letters", lambda: _dead_letters(settings, command_id, source, short, meant))
    has_read_letters, letters = letters is not None, letters or []
    if counts is not None:
        products = {letter.product for letter in letters} or None  # a record does not say whose product it is
        found = tried("what keeps commands from being sent", lambda: find_obstacles(broker, topology, products))
        obstacles = found or []
    has_shared_records = settings.idempotency_url.get_secret_value() != MEMORY
    read: list[CommandRecord] | None = None
    if has_shared_records:
        others = {letter.source for letter in letters if letter.source}
        read = tried("the record", lambda: _records(settings, command_id, source, others))
    records = read or []
    is_known = bool(records or letters)
    ids = {letter.command_id for letter in meant.values()}
    if not is_known and len(ids) == 1 and (only := ids.pop()) is not None:
        return tell_story(settings, only, source)
    steps = _next_steps(records, letters, short, obstacles, settings.worker_reconcile_delay) if is_known else []
    if not letters and any(map(_has_failed, records)):
        steps.append(NextStep(_DISCARDED if has_read_letters else _UNREAD))
    return CommandStory(
        command_id,
        source,
        None if read is None else tuple(read),
        has_shared_records,
        tuple(letters),
        None if counts is None else counts.commands,
        None if counts is None else counts.delayed,
        tuple(obstacles),
        tuple(unread),
        tuple(dict.fromkeys(steps)),
        () if is_known else (*_reasons_of(meant), *_reasons_for_nothing(settings, source, counts)),
    )


def story_document(story: CommandStory) -> dict[str, Any]:
    """Return what became of a command as a JSON object, with times in UTC and null for what is unknown."""
    return {
        "command_id": story.command_id,
        "source": story.source,
        "is_known": story.is_known,
        "records_are_shared": story.has_shared_records,
        "records": None if story.records is None else [_record_document(record) for record in story.records],
        "dead_letters": [summary(letter) for letter in story.dead_letters],
        "queue_waiting": story.queue_waiting,
        "queue_delayed": story.queue_delayed,
        "obstacles": [asdict(obstacle) for obstacle in story.obstacles],
        "unread": list(story.unread),
        "next_steps": [asdict(step) for step in story.next_steps],
        "possible_reasons": list(story.possible_reasons),
    }


def _next_steps(
    records: Collection[CommandRecord],
    letters: Collection[Listing],
    short: ShortDigests,
    obstacles: Collection[Obstacle],
    reconcile_delay_s: int,
) -> list[NextStep]:
    steps: list[NextStep] = []
    imei = next((letter.imei for letter in letters if letter.imei), "IMEI")
    history = f"onenet-worker device {imei}"
    for record in records:
        match record.state:
            case "in_progress":
                steps.append(NextStep("a worker is processing it: look again in a moment"))
            case "in_doubt":
                text = (
                    "it may have been sent, and a worker reads the device's history before it sends anything: look "
                    f"again after {reconcile_delay_s} s, or see the history"
                )
                steps.append(NextStep(text, (history,)))
            case "not_sent":
                steps.append(NextStep("it waits for its next attempt, in the queue or in a delay queue"))
            case "unreadable":
                text = "its record cannot be read, so it counts as in doubt: see the device's history"
                steps.append(NextStep(text, (history,)))
            case "finished":
                steps += _after_outcome(record, letters, short)
    is_over = bool(records) and all(record.state == "finished" for record in records)
    if not any(record.state == "finished" for record in records):
        steps += _about_dead_letters(letters, short)
    is_waiting = any(record.state != "finished" for record in records)
    can_be_replayed = not is_over and any(map(_is_replay_useful, letters))
    if is_waiting or can_be_replayed:
        steps += [NextStep(f"commands may wait: {obstacle}") for obstacle in obstacles]
    return steps


def _after_outcome(record: CommandRecord, letters: Collection[Listing], short: ShortDigests) -> list[NextStep]:
    reply = record.reply
    if reply is None:
        return []
    match reply.status:
        case "accepted" if record.result is None:
            text = "OneNET keeps it for its device: see there what became of it"
            return [NextStep(text, (f"onenet-worker device {reply.imei or 'IMEI'}",))]
        case "accepted":
            return []
        case "rejected":
            return [NextStep("nothing was cached: correct the cause, and send a new command with another id")]
        case _:
            return _about_dead_letters(letters, short)


def _has_failed(record: CommandRecord) -> bool:
    return record.reply is not None and record.reply.status == "failed"


def _about_dead_letters(letters: Collection[Listing], short: ShortDigests) -> list[NextStep]:
    """Return what to do with the dead letters of a command, as ``dead-letters show`` says.

    They are named by their digests: another system may have used the same command id.
    """
    steps = []
    for letter in letters:
        advice = advise(letter, short(letter.digest), is_valid=letter.expires_at is not None)
        steps.append(NextStep(f"replay its dead letter? {advice.replay}", advice.commands))
    return steps


def _is_replay_useful(letter: Listing) -> bool:
    return advise(letter, letter.name, is_valid=letter.expires_at is not None).is_replay_useful


def _reasons_of(meant: Mapping[str, Listing]) -> list[str]:
    """Return what a text can mean that is no command id."""
    named = [letter.name for letter in meant.values()]
    if not named:
        return []
    some = ", ".join(dict.fromkeys(named[:_MAX_NAMED])) + (" and more" if len(named) > _MAX_NAMED else "")
    return [f"it means one of the dead letters {some}: see onenet-worker dead-letters show"]


def _reasons_for_nothing(settings: Settings, source: str | None, counts: QueueCounts | None) -> list[str]:
    reasons = []
    if counts is not None and counts.commands:
        reasons.append(f"it is one of {counts.commands:,} that wait in the queue and that no worker has taken yet")
    if counts is not None and counts.delayed:
        reasons.append(f"it is one of {counts.delayed:,} that wait in the delay queues")
    reasons.append("it never arrived: ask its sender for the publisher confirm")
    if settings.idempotency_url.get_secret_value() == MEMORY:
        reasons.append(
            "a worker has its record: with IDEMPOTENCY_URL=memory:// records are in the workers' memory and cannot be "
            "read from outside; read the worker's log"
        )
    else:
        reasons.append(
            "its record has expired, or Redis has lost it: it is kept for IDEMPOTENCY_TTL, "
            f"{settings.idempotency_ttl} s"
        )
        if source is None:
            reasons.append("another system used this id first: name the sender with --source APP_ID")
        else:
            reasons.append(f"{source} did not send it: leave out --source to look for any sender's")
    namespace, where = settings.worker_namespace, "at the broker of AMQP_URL"
    if settings.idempotency_url.get_secret_value() != MEMORY:
        where += " and the Redis of IDEMPOTENCY_URL"
    reasons.append(f"it belongs elsewhere: looked in the namespace {namespace}, {where}")
    return reasons


def _dead_letters(
    settings: Settings, command_id: str, source: str | None, short: ShortDigests, meant: dict[str, Listing]
) -> list[Listing]:
    """Return the dead letters of a command, and add to ``meant`` a few that its id may mean instead."""
    found: list[Listing] = []
    is_beginning = len(command_id) >= SHORTEST_BEGINNING

    def on_letter(letter: DeadLetter) -> None:
        short.add(letter.digest)
        if source not in {None, letter.source}:
            return
        if letter.command_id == command_id:
            found.append(letter.listing(datetime.now(UTC)))
        elif is_beginning and len(meant) <= _MAX_NAMED and names_that_begin(letter, command_id):
            meant[letter.digest] = letter.listing(datetime.now(UTC))

    with DeadLetterReader(settings.broker_address, settings.topology, settings.platform_zone) as reader:
        reader.read(on_letter, cuts_bodies=True)
        if not found and reader.waiting > MAX_PREFETCH:
            raise WorkerError(f"only the first {MAX_PREFETCH:,} of {reader.waiting:,} were read")
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


def _record_document(record: CommandRecord) -> dict[str, Any]:
    return {
        "source": record.source or None,
        "state": record.state,
        "since": utc(record.since),
        "until": utc(record.until),
        "was_abandoned": record.was_abandoned,
        "kept_until": utc(record.kept_until),
        "reply": None if record.reply is None else record.reply.model_dump(mode="json"),
        "result": None if record.result is None else record.result.model_dump(mode="json"),
    }
