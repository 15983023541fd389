"""``onenet-worker send``."""

import codecs
import itertools
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, NamedTuple
from uuid import uuid4

import typer

from worker.cli.progress import Advance, phases
from worker.cli.terminal import discard_stdout, interruptible, note, print_json, print_line
from worker.errors import (
    EXIT_FAILURE,
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    BrokerUnavailable,
    Unconfirmed,
    UnusableCommand,
    WorkerError,
)
from worker.printable import counted

if TYPE_CHECKING:
    from worker.amqp.blocking import CommandClient
    from worker.settings import Settings

_STDIN = Path("-")
_MAX_NAMED = 10
_MAX_ERRORS = 20
_FIRST_REPLY_S = 3.0  # without a reply for so long there may be a reason that can be told
_RESULT_S = 120.0  # after the first look: for the device, and for the rate limit
_MAX_LINE_BYTES = 128 * 1024  # twice what a command may have, for blanks around it


def send(
    imei: Annotated[str | None, typer.Option(help="The device: 15 digits, or 4.")] = None,
    obj_id: Annotated[int | None, typer.Option(help="LwM2M object id.")] = None,
    obj_inst_id: Annotated[int | None, typer.Option(help="LwM2M object instance id.")] = None,
    res_id: Annotated[int | None, typer.Option(help="LwM2M resource id.")] = None,
    args: Annotated[str | None, typer.Option(help="The arguments of the command.")] = None,
    expired_time: Annotated[
        str | None, typer.Option(help="ISO 8601; required with --command-id; default: a day from now.")
    ] = None,
    valid_time: Annotated[str | None, typer.Option(help="ISO 8601; default: now.")] = None,
    retry: Annotated[int | None, typer.Option(help="0-10.")] = None,
    timeout: Annotated[int | None, typer.Option(help="5-40, seconds.")] = None,
    trigger_msg: Annotated[int | None, typer.Option(help="1-7: 1 REGISTER + 2 UPDATE + 4 NOTIFY.")] = None,
    product: Annotated[str | None, typer.Option(help="The configured product to use.")] = None,
    command_id: Annotated[str | None, typer.Option(help="The idempotency key; default: a new one.")] = None,
    file: Annotated[
        Path | None,
        typer.Option(help="JSON lines, one command per line; - reads stdin. Nothing is sent unless all are valid."),
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
    wait_timeout: Annotated[
        float | None, typer.Option(help="Seconds to wait for the replies; default: 60.", min=0)
    ] = None,
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
    is invalid or was not sent, a reply or a result is missing, or one is not "accepted" or "executed"; 2 if options are
    missing. Ids that were already sent may be sent again with the same fields, which has no second effect. Example:

        onenet-worker send --imei 865820030000001 --obj-id 3311 --obj-inst-id 0 --res-id 5850 --args on --wait
    """
    from worker.amqp.blocking import SENDER, CommandClient
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
        raise typer.BadParameter(f"--file and --{next(iter(flags)).replace('_', '-')}: use one or the other")
    waits = wait or wait_result
    if wait_timeout is not None and not waits:
        raise typer.BadParameter("--wait-timeout needs --wait or --wait-result")
    if result_timeout is not None and not wait_result:
        raise typer.BadParameter("--result-timeout needs --wait-result")
    if command_id is not None and expired_time is None:
        note(
            "--command-id needs --expired-time: the default is a day from now, with which the same command would have "
            "another content each time"
        )
        note(f"add --expired-time {_a_day_from_now()}")
        raise typer.Exit(EXIT_USAGE)
    settings = read_settings()
    is_isolated = settings.worker_tenants == "isolated"
    first_s = settings.worker_result_delays[0]
    with ExitStack() as stack:
        with interruptible("nothing was sent"):
            commands = _check(_from_flags(flags) if file is None else _from_file(file), settings)
            connecting = CommandClient(
                settings.broker_address,
                settings.topology,
                app_id=app_id or (None if is_isolated else SENDER),
                wants_replies=waits,
                names_user=is_isolated,
                keeps_replies=True,
            )
            client = stack.enter_context(connecting)
        sending = _Sending(client, settings, commands, is_file=file is not None)
        try:
            with phases(is_shown=file is not None) as begin:
                sending.send(begin, prints_ids=not waits)
                if waits and not sending.has_no_reader:
                    sending.read_replies(begin, 60.0 if wait_timeout is None else wait_timeout)
                if wait_result and not sending.has_no_reader:
                    sending.read_results(begin, first_s + _RESULT_S if result_timeout is None else result_timeout)
        except KeyboardInterrupt:
            for line in sending.interrupted():
                note(line)
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except WorkerError as exc:
            raise WorkerError(*exc.args, *sending.progress(exc)) from exc
        sending.end()


class _Command(NamedTuple):
    id: str
    body: bytes
    product: str | None
    expired_time: str


@dataclass
class _Sending:
    """Sends commands, reads what becomes of them, and says how far that has come.

    Args:
        client: sends them.
        settings: of the worker.
        commands: in their order.
        is_file: they come from a file; otherwise there is one.
    """

    client: "CommandClient"
    settings: "Settings"
    commands: Sequence[_Command]
    is_file: bool
    has_no_reader: bool = False  # of stdout
    _confirmed: int = 0  # of the first commands
    _is_next_unknown: bool = False
    _reads: bool = False
    _replies: dict[str, dict[str, Any]] = field(default_factory=dict)
    _results: dict[str, dict[str, Any]] | None = None

    def send(self, begin: Callable[[str, int], Advance], *, prints_ids: bool) -> None:
        """Send all commands. A reader of the output that ends, as ``head`` does, stops none of them."""
        self._reads = not prints_ids
        if prints_ids and self.client.not_kept:
            note(f"the reply goes to the queues bound for it, or is unrouted: {self.client.not_kept}")
        advance = begin("sending", len(self.commands))
        for command in self.commands:
            self._is_next_unknown = True
            self.client.send(command.id, command.body)
            self._confirmed += 1
            self._is_next_unknown = False
            advance()
            if prints_ids:
                self._print(command.id)

    def read_replies(self, begin: Callable[[str, int], Advance], timeout_s: float) -> None:
        """Print the replies as they arrive.

        Raises:
            WorkerError: some did not arrive in time.
        """
        if not self.is_file and sys.stderr.isatty():
            note(f"sent {self.commands[0].id}; waiting for its reply")
        advance = begin("replies", len(self.commands))
        deadline = time.monotonic() + timeout_s
        self._take_replies(advance, min(timeout_s, _FIRST_REPLY_S))
        if not self._replies and timeout_s > _FIRST_REPLY_S:
            for line in self._obstacles(self.commands):
                note(line)
        self._take_replies(advance, deadline - time.monotonic())
        if len(self._replies) < len(self.commands) and not self.has_no_reader:
            raise WorkerError(f"{self._absent('reply', self._replies, len(self.commands))} within {timeout_s:g} s")

    def _take_replies(self, advance: Advance, timeout_s: float) -> None:
        missing = [each.id for each in self.commands if each.id not in self._replies]
        for reply in self.client.replies(missing, timeout_s):
            self._replies[reply["command_id"]] = reply
            advance()
            self._print(reply)
            if self.has_no_reader:
                return

    def read_results(self, begin: Callable[[str, int], Advance], timeout_s: float) -> None:
        """Print the results of the accepted commands as they arrive.

        Raises:
            WorkerError: some did not arrive in time.
        """
        self._results = {}
        accepted = [name for name, reply in self._replies.items() if reply["status"] == "accepted"]
        advance = begin("results", len(accepted))
        for result in self.client.results(accepted, timeout_s):
            self._results[result["command_id"]] = result
            advance()
            self._print(result)
            if self.has_no_reader:
                return
        if len(self._results) < len(accepted):
            raise WorkerError(
                f"{self._absent('result', self._results, len(accepted))} within {timeout_s:g} s",
                f"workers publish results with WORKER_RESULTS=on, {self.settings.worker_result_delays[0]} s after the "
                "reply at the earliest",
            )

    def end(self) -> None:
        """Say what became of all commands.

        Raises:
            Exit: one was not accepted or not executed, or nobody read the output.
        """
        for line in self._summary():
            note(line)
        if self.is_file and not self._reads and not self.has_no_reader:
            note(self._how_many_sent())
        if self.has_no_reader:
            note(f"nobody reads the output any more: {self._how_many_sent()}")
            raise typer.Exit(EXIT_FAILURE)
        accepted = [reply for reply in self._replies.values() if reply["status"] == "accepted"]
        executed = [result for result in (self._results or {}).values() if result["result"] == "executed"]
        is_missing = self._reads and len(accepted) < len(self.commands)
        if is_missing or (self._results is not None and len(executed) < len(self.commands)):
            raise typer.Exit(EXIT_FAILURE)

    def interrupted(self) -> list[str]:
        """Return what a person who interrupts this has to know."""
        if self._confirmed < len(self.commands):
            first, *others = self.progress(None)
            return [f"interrupted: {first}", *others]
        absent = self._absent("reply", self._replies, len(self.commands))
        if len(self._replies) == len(self.commands):
            absent = self._absent("result", self._results or {}, sum(map(self._is_accepted, self._replies)))
        return [f"interrupted: {absent}", *self.progress(None)]

    def progress(self, error: WorkerError | None) -> list[str]:
        """Return what is known of the commands after an error or an interrupt, and what to do."""
        self._is_next_unknown = self._is_next_unknown and (error is None or isinstance(error, Unconfirmed))
        if self._confirmed < len(self.commands):
            return [self._how_many_sent(), *([self._where_replies_are()] if self._confirmed else [])]
        if not self._reads:
            return [self._how_many_sent()]
        missing = [each for each in self.commands if each.id not in self._replies]
        known = self._results or {}
        missing = missing or [each for each in self.commands if self._is_accepted(each.id) and each.id not in known]
        if not missing:
            return self._summary()
        what = "reply" if len(self._replies) < len(self.commands) else "result"
        return [
            *self._summary(),
            *([f"no {what} yet to {_named([each.id for each in missing])}"] if self.is_file else []),
            f"{self._how_many_sent()}, so that {'each' if self.is_file else 'its'} {what} "
            f"{'still comes' if what == 'reply' else 'may still come'}: " + self._where_replies_are(),
            *self._obstacles(missing),
        ]

    def _absent(self, what: str, arrived: Sized, expected: int) -> str:
        if not self.is_file:
            return f"the {what} of {self.commands[0].id} has not arrived"
        return f"{expected - len(arrived):,} of {counted(expected, what)} have not arrived"

    def _is_accepted(self, command_id: str) -> bool:
        return bool(self._replies.get(command_id, {}).get("status") == "accepted")

    def _print(self, said: str | dict[str, Any]) -> None:
        if self.has_no_reader:
            return
        try:
            if isinstance(said, str):
                print_line(said)
            else:
                print_json(said)
        except BrokenPipeError:
            discard_stdout()
            self.has_no_reader = True

    def _how_many_sent(self) -> str:
        sent, total = self._confirmed, len(self.commands)
        if sent == total:
            return f"all {total:,} commands were sent" if self.is_file else f"{self.commands[0].id} was sent"
        following = self.commands[sent]
        if not self.is_file:
            again = f"--command-id {following.id} --expired-time {following.expired_time}"
            if self._is_next_unknown:
                return (
                    f"it is not known whether the broker stored {following.id}: send it again with {again}, which has "
                    "no second effect"
                )
            return f"{following.id} was not sent"
        parts = [f"{sent:,} of {total:,} were sent"]
        not_sent = self.commands[sent + self._is_next_unknown :]
        if self._is_next_unknown:
            parts.append(f"it is not known whether the broker stored {following.id}")
        if not_sent:
            parts.append(f"{len(not_sent):,} were not sent, from {not_sent[0].id} on")
        return "; ".join([*parts, "send all of them again: ids that were already sent have no second effect"])

    def _where_replies_are(self) -> str:
        from worker.settings import MEMORY

        kept = f"; late replies are kept for a day in {self.client.kept_queue}" if self.client.kept_queue else ""
        which, what = ("COMMAND_ID", "a command") if self.is_file else (self.commands[0].id, "it")
        if self.settings.idempotency_url.get_secret_value() == MEMORY:
            return f"with IDEMPOTENCY_URL=memory:// nothing else tells what became of {what}{kept}"
        return f"onenet-worker status {which} tells what became of {what}{kept}"

    def _obstacles(self, missing: Sequence[_Command]) -> list[str]:
        from worker.admin.obstacles import Obstacle, find_obstacles

        found: list[Obstacle] = []
        with suppress(BrokerUnavailable):
            products = {each.product for each in missing}
            found = find_obstacles(self.settings.broker_address, self.settings.topology, products)
        return [f"commands may wait: {each}" for each in found]

    def _summary(self) -> list[str]:
        """Return how many commands had which outcome, and which result; a single one is on the screen already."""
        if not self.is_file or not self._reads or self._confirmed < len(self.commands):
            return []
        outcomes = Counter(map(_outcome, self._replies.values()))
        lines = [_tally("replies", outcomes, "none yet", len(self.commands))]
        if self._results is not None:
            accepted = sum(map(self._is_accepted, self._replies))
            lines.append(
                _tally("results", Counter(each["result"] for each in self._results.values()), "none yet", accepted)
            )
        return lines


def _outcome(reply: dict[str, Any]) -> str:
    return reply["status"] if reply["error"] is None else f"{reply['status']} {reply['error']['code']}"


def _tally(what: str, counts: Counter[str], rest: str, total: int) -> str:
    left = total - counts.total()
    parts = [f"{name} {count:,}" for name, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
    return f"{what}: " + ", ".join([*parts, *([f"{rest} {left:,}"] if left else [])])


def _named(ids: Sequence[str]) -> str:
    more = len(ids) - _MAX_NAMED
    return ", ".join(ids[:_MAX_NAMED]) + (f" and {more:,} more" if more > 0 else "")


def _a_day_from_now() -> str:
    return (datetime.now(UTC) + timedelta(days=1)).strftime("%Y-%m-%dT%H:%M:%SZ")


def _from_flags(flags: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    yield "", json.dumps({"command_id": str(uuid4()), "expired_time": _a_day_from_now()} | flags).encode()


def _from_file(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the place and the text of each line. The file may be a pipe; ``-`` is stdin.

    Raises:
        WorkerError: a line is too long, or the file cannot be read.
    """
    is_stdin = path == _STDIN
    name = "stdin" if is_stdin else str(path)
    if is_stdin and sys.stdin.isatty():
        note("reads one command per line; ends with Ctrl-D")
    try:
        with nullcontext(_binary_stdin()) if is_stdin else path.open("rb") as lines:
            for number in itertools.count(1):
                line = lines.readline(_MAX_LINE_BYTES + 1)
                if not line:
                    return
                if len(line) > _MAX_LINE_BYTES:  # it may never end, as that of /dev/zero
                    raise WorkerError(f"{name}:{number}: the line has more than {_MAX_LINE_BYTES} bytes")
                text = (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).strip()
                if text:
                    yield f"{name}:{number}: ", text
    except OSError as exc:
        raise WorkerError(f"{name}: cannot be read: {exc.strerror}") from exc


def _binary_stdin() -> BinaryIO:
    return sys.stdin.buffer


def _check(lines: Iterator[tuple[str, bytes]], settings: "Settings") -> list[_Command]:
    """Return the commands.

    Raises:
        WorkerError: a command is invalid; none is sent then, since a partly sent file is hard to repeat.
    """
    from worker.core.parsing import read_command

    commands: dict[str, _Command] = {}
    errors: list[str] = []
    more = 0
    is_other_format = False
    for place, body in lines:
        try:
            found = read_command(body, None, settings.platform_zone)
        except UnusableCommand as exc:
            error = exc.message
            is_other_format = is_other_format or (bool(place) and exc.code == "invalid_message")
        else:
            name = found.command_id
            error = f"command_id: {name} is a duplicate" if name in commands else ""
            commands[name] = _Command(name, body, found.product, found.expires_at.isoformat())
        if error and len(errors) < _MAX_ERRORS:
            errors.append(f"{place}{error}")
        elif error:
            more += 1
    if more:
        errors.append(f"and {more:,} more")
    if not commands and not errors:
        errors.append("the file contains no command")
    if is_other_format:
        errors.append("a file has one command on each line, as a JSON object in UTF-8, not a list and not CSV")
    if errors:
        raise WorkerError(*errors, "nothing was sent")
    return list(commands.values())
