"""What the demo shows: each phase while it lasts, and at the end what came of it. A pipe gets lines, and no bars."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from worker.amqp.topology import Topology
from worker.dev.demo_messages import Message

_EVERY_S = 5  # between two lines in a pipe
_COLOURS = {"accepted": "green", "rejected": "yellow", "failed": "red"}
_LEFT = 11  # the width of the name of a phase, with a blank
_SHOWN_HEADERS = ("x-onenet-reason", "x-onenet-error", "x-onenet-attempt")

Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class Findings:
    """What came of all messages.

    Args:
        messages: those that were sent.
        replies: all replies.
        results: the results of accepted commands.
        cached: the commands in the simulator.
        dead_letters: headers and body of each.
    """

    messages: Sequence[Message]
    replies: Sequence[dict[str, Any]]
    results: Sequence[dict[str, Any]]
    cached: Sequence[dict[str, Any]]
    dead_letters: Sequence[tuple[dict[str, Any], bytes]]

    @property
    def found(self) -> Counter[str]:
        return Counter(f"{reply['status']} {(reply['error'] or {}).get('code', '')}".strip() for reply in self.replies)

    @property
    def wanted(self) -> Counter[str]:
        return Counter(message.outcome for message in self.messages)

    @property
    def accepted(self) -> set[str]:
        """The ids of accepted commands; some were sent twice, and have two replies."""
        return {reply["command_id"] for reply in self.replies if reply["status"] == "accepted"}

    @property
    def cached_twice(self) -> int:
        times_cached = Counter(command["args"] for command in self.cached)
        return sum(1 for times in times_cached.values() if times > 1)

    @property
    def faults(self) -> list[str]:
        """What is not as expected, a line for each."""
        missing = self.accepted - {result["command_id"] for result in self.results}
        return [
            *(["the numbers of some outcomes"] if self.found != self.wanted else []),
            *([f"{self.cached_twice} commands were cached twice"] if self.cached_twice else []),
            *([f"{len(missing)} results are missing"] if missing else []),
        ]


def show(console: Console, name: str, text: str) -> None:
    """Print what there is to say of a phase; more lines of it are indented."""
    first, *more = text.split("\n")
    console.print(f"{name:<{_LEFT}}{first}", soft_wrap=True, highlight=False, markup=False)
    for line in more:
        console.print(" " * _LEFT + line, soft_wrap=True, highlight=False, markup=False)


def step(console: Console, name: str, doing: str, do: Callable[[], Made], done: Callable[[Made], str]) -> Made:
    """Do something that takes some seconds, and show that it goes on.

    Args:
        console: to print on.
        name: of the phase.
        doing: what is done, and how long that takes.
        do: does it.
        done: returns what to say of it afterwards.
    """
    started_at = time.monotonic()
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), SpinnerColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            bar.add_task(f"{name:<{_LEFT}}{doing}", total=None)
            made = do()
    else:
        show(console, name, doing)
        made = do()
    show(console, name, f"{done(made)}, after {time.monotonic() - started_at:.0f} s")
    return made


@contextmanager
def counting(console: Console, what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show how many of a number are there; yields what to call with the number so far."""
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(f"{'':<{_LEFT}}{what}", total=total)
            yield lambda count: bar.update(task, completed=count)
        return
    started_at = shown_at = time.monotonic()

    def line(count: int) -> None:
        nonlocal shown_at
        now = time.monotonic()
        if count < total and now - shown_at < _EVERY_S:
            return
        shown_at = now
        show(console, "", f"{what} {count} of {total}, after {now - started_at:.0f} s")

    yield line


def print_examples(console: Console, findings: Findings, topology: Topology) -> None:
    """Print one reply and one dead letter, and where they are."""
    accepted = next((reply for reply in findings.replies if reply["status"] == "accepted"), None)
    if accepted is not None:
        exchange = topology.replies_exchange
        console.print(f"\n[bold]a reply[/bold], on exchange {exchange}, routing key execute.accepted.<app_id>")
        console.print_json(data=accepted)
    if findings.dead_letters:
        letters = findings.dead_letters
        headers, body = next((each for each in letters if each[0]["x-onenet-reason"] == "invalid_command"), letters[0])
        queue = topology.dead_letters_exchange  # the queue is named like the exchange
        console.print(f"\n[bold]a dead letter[/bold], in queue {queue}: the original body, and why")
        console.print_json(data={name: headers[name] for name in _SHOWN_HEADERS} | {"body": body.decode()})


def print_outcomes(console: Console, findings: Findings) -> None:
    """Print the table of all outcomes, what the devices did, and whether it is all as expected."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for heading in ("status", "code", "messages", "sent as"):
        table.add_column(heading, justify="right" if heading == "messages" else "left")
    found, wanted = findings.found, findings.wanted
    for outcome in sorted(wanted | found, key=lambda each: (list(_COLOURS).index(each.split()[0]), each)):
        status, _, code = outcome.partition(" ")
        kinds = dict.fromkeys(message.kind for message in findings.messages if message.outcome == outcome)
        is_right = found[outcome] == wanted[outcome]
        number = str(found[outcome]) if is_right else f"[red]{found[outcome]}, not {wanted[outcome]}"
        table.add_row(f"[{_COLOURS[status]}]{status}", code, number, "; ".join(kinds))
    console.print()
    console.print(table)
    console.print(f"\n{_cached(findings)}", highlight=False)
    console.print(f"What the devices did: {_results(findings.results)}.", highlight=False)
    if findings.faults:
        console.print(f"[bold red]Not as expected: {'; '.join(findings.faults)}.", highlight=False)
    else:
        total = len(findings.messages)
        console.print(f"[bold green]All as expected: {total} messages, {total} outcomes.", highlight=False)


def _cached(findings: Findings) -> str:
    commands = {command["args"] for command in findings.cached}
    accepted = len(findings.accepted)
    unknown = len(commands) - accepted
    more = f"{accepted} accepted, some of them sent several times with the same id, {unknown} with outcome_unknown"
    return f"OneNET cached {len(commands)} commands, {findings.cached_twice} of them twice: {more}."


def _results(results: Sequence[dict[str, Any]]) -> str:
    found = Counter((result["result"], result["confirm_status"]) for result in results)
    return ", ".join(
        f"{number} {result}" + (f" ({status})" if result == "failed" else "")
        for (result, status), number in sorted(found.items())
    )
