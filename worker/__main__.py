"""The command line, also as ``python -m worker``."""

import os
import sys

_EXIT_INTERRUPTED = 130  # of worker.errors, which is not loaded yet


def main() -> None:
    """Run the command line. Loading it takes part of a second, in which a person may interrupt it too."""
    _open_closed_streams()
    try:
        from worker.cli.program import run_program

        code = run_program()
    except KeyboardInterrupt:
        code = _EXIT_INTERRUPTED
    sys.exit(code)


def _open_closed_streams() -> None:
    """Use the null device for a standard stream that was closed, as by ``>&-``: Python has none then."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))


if __name__ == "__main__":
    main()
