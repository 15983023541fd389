"""Progress bars for terminals."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[[], None]


@contextmanager
def phases(*, is_shown: bool = True) -> Iterator[Callable[[str, int], Advance]]:
    """Show progress bars on stderr if that is a terminal; yields a function that begins one, given its name and total.

    That function returns one which advances the bar by one.
    """
    from rich.console import Console
    from rich.progress import Progress

    # Lines on stdout are printed above the bars, unwrapped; but not those that do not go to the terminal.
    console = Console(stderr=True, soft_wrap=True)
    is_on = is_shown and sys.stderr.isatty()
    with Progress(console=console, disable=not is_on, redirect_stdout=sys.stdout.isatty()) as bars:

        def begin(what: str, total: int) -> Advance:
            task = bars.add_task(what, total=total)
            return lambda: bars.advance(task)

        yield begin


@contextmanager
def progress(what: str, total: int, *, is_shown: bool = True) -> Iterator[Advance]:
    """Show one progress bar; yields a function that advances it by one."""
    with phases(is_shown=is_shown) as begin:
        yield begin(what, total)
