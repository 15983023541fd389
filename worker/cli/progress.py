"""A progress bar for terminals."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(what: str, total: int, *, is_shown: bool = True) -> Iterator[Callable[[], None]]:
    """Show a progress bar on stderr if that is a terminal; yields a function that advances it by one."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), disable=not (is_shown and sys.stderr.isatty())) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)
