"""``onenet-worker`` in a real terminal of a given width, and screens that are compared with stored ones."""

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import termios
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.support.command_line import program

SCREENS = Path(__file__).parent.parent / "screens"
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b[@-Z\\-_]")
_ROWS = 50


class Screen(NamedTuple):
    """What a command has shown: all of its lines, without colours, and its exit code."""

    text: str
    exit_code: int


def show(
    arguments: Sequence[str],
    folder: Path,
    environment: Mapping[str, str],
    *,
    columns: int,
    typed: str = "",
    interrupted_at: str | None = None,
) -> Screen:
    """Run ``onenet-worker`` in a terminal, with no settings but those given.

    Args:
        arguments: of the program.
        folder: to run it in.
        environment: its settings; the time zone is UTC unless ``TZ`` says another one.
        columns: width of the terminal.
        typed: what a person types.
        interrupted_at: a person interrupts the program once it has shown this.
    """
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", _ROWS, columns, 0, 0))
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    usual = {"TERM": "xterm-256color", "LANG": "C.UTF-8", "TZ": "UTC", "PYTHONPATH": str(Path.cwd())}
    process = subprocess.Popen(
        [*program(), *arguments],
        cwd=folder,
        env=kept | usual | dict(environment),
        stdin=follower,
        stdout=follower,
        stderr=follower,
        start_new_session=True,
    )
    os.close(follower)
    os.write(leader, typed.encode())
    shown = b""
    while True:
        try:
            data = os.read(leader, 65536)
        except OSError:  # EIO: the program has ended
            break
        if not data:
            break
        shown += data
        if interrupted_at is not None and interrupted_at in shown.decode(errors="replace"):
            process.send_signal(signal.SIGINT)
            interrupted_at = None
    os.close(leader)
    text = _ESCAPES.sub("", shown.decode(errors="replace")).replace("\r\n", "\n")
    return Screen("\n".join(line.rstrip() for line in text.split("\n")), process.wait())


def assert_screen(name: str, screen: str, replaced: Mapping[str, str] | None = None) -> None:
    """Compare a screen with ``tests/screens/<name>.txt``; ``WRITE_SCREENS=1`` writes the file instead.

    Args:
        name: of the file, without its ending.
        screen: what was shown.
        replaced: texts that differ in each run, such as a namespace, and texts of the same length in their place.
    """
    for text, stand_in in (replaced or {}).items():
        assert len(text) == len(stand_in), f"{text!r} and {stand_in!r}: a table would have another width"
        screen = screen.replace(text, stand_in)
    path = SCREENS / f"{name}.txt"
    if os.environ.get("WRITE_SCREENS"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(screen)
    assert screen == path.read_text()
