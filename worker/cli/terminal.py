"""What all commands do alike at the terminal: encodings, times, tables, and the end of a pipe."""

import codecs
import errno
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from types import MappingProxyType
from typing import TYPE_CHECKING
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import typer

from worker.errors import EXIT_FAILURE, EXIT_INTERRUPTED, WorkerError
from worker.printable import counted, printable, printable_json

if TYPE_CHECKING:
    from rich.console import Console

OUTPUT_FULL = "no space is left where the output is written"
_ENCODING_ERRORS = "onenet-worker.terminal"
_SPELLED_OUT = {"\N{HORIZONTAL ELLIPSIS}": "...", "\N{RIGHTWARDS ARROW}": "->", "\N{MULTIPLICATION SIGN}": "x"}
_LEAST_CUT_COLUMNS = 24  # of the column that may be cut; with less a card for each row is easier to read
_PIPE_COLUMNS = 10_000  # a pipe has no width: nothing is cut
_CARD_INDENT = "  "
_BULLET = "- "


def prepare_streams() -> None:
    """Let every terminal show every text: what its encoding lacks is spelled out or escaped, and raises nothing."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:  # otherwise a test has replaced it
            reconfigure(errors=_ENCODING_ERRORS)


def flush_stdout() -> bool:
    """Write what is buffered; False: the reader of the pipe has ended, as ``head`` does, or there is no space."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        discard_stdout()
        return False
    except OSError as exc:
        if exc.errno != errno.ENOSPC:
            raise
        discard_stdout()
        return False
    return True


def discard_stdout() -> None:
    """Write nothing more to a pipe that nobody reads: the interpreter would report it at its end."""
    with suppress(OSError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())


def note(text: str) -> None:
    """Tell a person something beside the output of a command, on stderr."""
    print(f"onenet-worker: {printable(text)}", file=sys.stderr)


@contextmanager
def interruptible(what_is_known: str) -> Iterator[None]:
    """After an interrupt say what is known, and exit with 130."""
    try:
        yield
    except KeyboardInterrupt:
        note(f"interrupted: {what_is_known}")
        raise typer.Exit(EXIT_INTERRUPTED) from None


def print_line(text: str = "") -> None:
    """Print a line of output at once, for a reader that waits for it.

    Raises:
        WorkerError: there is no space where it is written.
    """
    try:
        print(text, flush=True)
    except OSError as exc:
        if exc.errno != errno.ENOSPC:
            raise
        raise WorkerError(OUTPUT_FULL) from exc


def print_json(value: object) -> None:
    """Print a value as one line of JSON, readable where the output's encoding has its characters."""
    print_json_line(printable_json(value))


def print_json_line(line: str) -> None:
    """Print one line of JSON; what the output's encoding lacks is escaped as JSON has it."""
    try:
        line.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        line = json.dumps(json.loads(line))
    print_line(line)


def require_person_or_yes(*, yes: bool) -> None:
    """Refuse to ask where nobody can answer.

    Raises:
        WorkerError: there is no terminal, and ``--yes`` was not given.
    """
    if not yes and not sys.stdin.isatty():
        raise WorkerError("without a terminal there is nobody to ask: give --yes")


def confirm(question: str, refused: str) -> None:
    """Ask a person; without a yes the command ends with exit code 1, and with 130 after an interrupt.

    Args:
        question: to be answered with y or n.
        refused: what to say then, such as "nothing was discarded".
    """
    try:
        if typer.confirm(question, err=True):
            return
    except typer.Abort:
        print(file=sys.stderr)  # the terminal has echoed ^C
        note(refused)
        raise KeyboardInterrupt from None
    note(refused)
    raise typer.Exit(EXIT_FAILURE)


def local_time(moment: datetime | None) -> str:
    """Return an instant in this machine's time zone, to the second; empty for None. JSON has UTC instead."""
    return "" if moment is None else moment.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def short_time(moment: datetime | None) -> str:
    """Return an instant in this machine's time zone without its year, for lists; empty for None."""
    return "" if moment is None else moment.astimezone().strftime("%m-%d %H:%M:%S")


def times_note() -> str:
    """Return in which time zone times are shown."""
    now = datetime.now().astimezone()
    name, digits = now.tzname() or "", now.strftime("%z")
    offset = f"UTC{digits[:3]}:{digits[3:5]}" if now.utcoffset() else "UTC"
    zone = f"{name} ({offset})" if name.isalpha() and name != offset else offset
    wanted = os.environ.get("TZ", "").removeprefix(":")
    unknown = "" if "/" not in wanted or _is_zone(wanted) else f", because TZ={wanted} is unknown here"
    return f"times are in this machine's zone, {zone}{unknown}"


def _is_zone(name: str) -> bool:
    try:
        ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        return False
    return True


def shown_of(shown: int, total: int, noun: str, *, newest_first: bool = False) -> str:
    """Return how many of how many things a list shows."""
    order = "newest" if newest_first else "oldest"
    return counted(total, noun) if shown >= total else f"showing the {order} {shown:,} of {counted(total, noun)}"


def console(*, stderr: bool = False) -> "Console":
    """Return where tables are printed: the terminal, or a pipe that has no width; stderr has what is asked."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(width=None if stream.isatty() else _PIPE_COLUMNS, highlight=False, stderr=stderr)


def print_rows(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    card: Sequence[Sequence[int]] | None = None,
    *,
    stderr: bool = False,
    is_last_wrapped: bool = False,
    styles: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Print a table, or a card for each row where the terminal is too narrow for one.

    Only the last column is cut to the width that is left; all other cells are whole. A column without any value is left
    out.

    Args:
        headings: one for each column.
        rows: the cells; the first is the title of a card.
        card: which columns, by their numbers, are on each line of a card, without headings; the last line is cut, and
            the others are whole. None: one column on each line, behind its heading.
        stderr: print it beside the output.
        is_last_wrapped: wrap what would be cut: every word matters.
        styles: how cells with these texts look, in the words of rich.
    """
    from rich.cells import cell_len
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    shown = [[_encodable(printable(cell.replace("\n", " "))) for cell in row] for row in rows]
    used = [number for number in range(len(headings)) if any(row[number] for row in shown)]
    if not used:
        return
    names = [headings[number] for number in used]
    cells = [[row[number] for number in used] for row in shown]
    target = console(stderr=stderr)
    widths = [max(map(cell_len, (name, *column))) for name, *column in zip(names, *cells, strict=True)]
    left = target.width - sum(widths[:-1]) - 3 * len(names) - 1
    if left >= min(widths[-1], _LEAST_CUT_COLUMNS):
        table = Table()
        for name in names[:-1]:
            table.add_column(name, no_wrap=True)
        table.add_column(names[-1], no_wrap=not is_last_wrapped, overflow="fold", max_width=left)
        for *whole, last in cells:
            texts = [*whole, last if is_last_wrapped else _cut(last, left)]
            table.add_row(*(Text(text, styles.get(text, "")) for text in texts))
        target.print(table)
        return
    if card is not None:
        for row in shown:
            _print_card([[row[number] for number in line if row[number]] for line in card], target)
        return
    indent = max(map(cell_len, names[1:]), default=0) + 2
    for row in cells:
        target.print(Text(row[0], styles.get(row[0], "bold")), soft_wrap=True)
        for number, (name, cell) in enumerate(zip(names[1:], row[1:], strict=True), start=1):
            is_last = number == len(names) - 1
            if is_last and is_last_wrapped and cell:
                target.print(Padding(Text(cell, overflow="fold"), (0, 0, 0, len(_CARD_INDENT))))
            elif cell:
                room = target.width - len(_CARD_INDENT) - indent
                value = _cut(cell, room) if is_last else cell
                line = Text(f"{_CARD_INDENT}{name:<{indent}}", "dim") + Text(value, "not dim")
                target.print(line, soft_wrap=True)


def _encodable(text: str) -> str:
    """Return a text as the terminal will show it, so that its width is known before it is printed."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, _ENCODING_ERRORS).decode(encoding)


def _cut(text: str, width: int) -> str:
    """Return a text of at most so many columns; what is cut ends with an ellipsis."""
    from rich.cells import cell_len, set_cell_size

    ellipsis = _encodable("\N{HORIZONTAL ELLIPSIS}")
    return text if cell_len(text) <= width else set_cell_size(text, max(0, width - len(ellipsis))) + ellipsis


def print_fields(title: str, fields: Sequence[tuple[str, str]]) -> None:
    """Print one thing: a title and its fields below each other. Long values are wrapped, and empty ones left out."""
    import textwrap

    from rich.cells import cell_len
    from rich.text import Text

    target = console()
    shown = [(name, printable(value)) for name, value in fields if value]
    indent = max((cell_len(name) for name, _ in shown), default=0) + 2
    width = max(_LEAST_CUT_COLUMNS, target.width - indent - len(_CARD_INDENT))
    target.print(Text(printable(title), "bold"), soft_wrap=True)
    for name, value in shown:
        for number, line in enumerate(textwrap.wrap(value, width, break_long_words=False, break_on_hyphens=False)):
            label = name if number == 0 else ""
            target.print(Text(f"{_CARD_INDENT}{label:<{indent}}", "dim") + Text(line, "not dim"), soft_wrap=True)


def print_lines(title: str, lines: Sequence[tuple[str, Sequence[str]]]) -> None:
    """Print a list under a title, its long lines wrapped; below each its commands, each whole on its own line."""
    import textwrap

    from rich.text import Text

    target = console()
    target.print(Text(title, "bold"))
    blanks = " " * len(_BULLET)
    for line, commands in lines:
        text = textwrap.fill(
            printable(line),
            target.width,
            initial_indent=_BULLET,
            subsequent_indent=blanks,
            break_long_words=False,
            break_on_hyphens=False,
        )
        target.print(Text(text), soft_wrap=True)
        for command in commands:
            target.print(Text(f"{blanks}{_CARD_INDENT}{printable(command)}"), soft_wrap=True)


def _print_card(lines: Sequence[Sequence[str]], target: "Console") -> None:
    from rich.text import Text

    first, *others, last = lines
    target.print(Text("  ".join(first), "bold"), soft_wrap=True)
    for line in others:
        if line:
            target.print(Text(_CARD_INDENT + "  ".join(line)), soft_wrap=True)
    if last:
        target.print(Text(_CARD_INDENT + "  ".join(last)), no_wrap=True, overflow="ellipsis", crop=True)


def _spell_out(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    wrong = error.object[error.start : error.end]
    text = "".join(_SPELLED_OUT.get(char) or char.encode("ascii", "backslashreplace").decode() for char in wrong)
    return text, error.end


codecs.register_error(_ENCODING_ERRORS, _spell_out)
