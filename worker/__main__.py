"""The command line, also as ``python -m worker``."""

import sys

_EXIT_INTERRUPTED = 130  # of worker.errors, which is not loaded yet


def main() -> None:
    """Run the command line. Loading it takes part of a second, in which a person may interrupt it too."""
    try:
        from worker.cli.program import run_program

        code = run_program()
    except KeyboardInterrupt:
        code = _EXIT_INTERRUPTED
    sys.exit(code)


if __name__ == "__main__":
    main()
