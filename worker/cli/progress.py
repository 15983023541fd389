"""A progress bar for whoever sits at a terminal."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(what: str, total: int, *, is_shown: bool = True) -> Iterator[Callable[[], None]]:
    """Show a bar on stderr, where that is a terminal; yields what advances it."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), disable=not (is_shown and sys.stderr.isatty())) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)
