"""Log lines: one JSON object each, from us and from the libraries, and never in anybody's way."""

import io
import json
import subprocess
import sys
import textwrap
import threading
from typing import Any

from worker.telemetry.logs import LineWriter


def lines_of(code: str) -> list[dict[str, Any]]:
    """Run code in a process of its own, since logging is configured once for a process; returns its lines."""
    program = "from worker.telemetry.logs import configure_logging, get_logger\n" + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_line_begins_with_what_every_line_has() -> None:
    [line] = lines_of("""
        writer = configure_logging("info", None)
        get_logger().debug("too_quiet")
        get_logger().warning("something_happened", fact=1, strange=object)
        writer.close()
    """)
    assert list(line)[:3] == ["timestamp", "level", "event"]
    assert line | {"timestamp": ""} == {
        "timestamp": "", "level": "warning", "event": "something_happened", "fact": 1, "strange": "<class 'object'>",
    }  # fmt: skip
    assert line["timestamp"].endswith("Z")


def test_an_exception_stays_in_its_line() -> None:
    [line] = lines_of("""
        writer = configure_logging("info", "json")
        try:
            1 / 0
        except ZeroDivisionError as exc:
            get_logger().critical("worker_crashed", exc_info=exc)
        writer.close()
    """)
    assert "ZeroDivisionError" in line["exception"]
    assert line["level"] == "critical"


def test_the_libraries_speak_only_where_they_are_asked_to() -> None:
    code = """
        import logging
        writer = configure_logging("{level}", "json")
        logging.getLogger("pika.adapters").error("Socket failed to connect: %s", 111)
        logging.getLogger("elsewhere").warning("of interest")
        writer.close()
    """
    assert [line["event"] for line in lines_of(code.format(level="info"))] == ["of interest"]
    first, _ = lines_of(code.format(level="debug"))
    assert (first["event"], first["level"], first["logger"]) == (
        "Socket failed to connect: 111",
        "error",
        "pika.adapters",
    )


class Stalled(io.StringIO):
    """A stream that nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.has_stalled = threading.Event()
        self.may_go_on = threading.Event()
        self.caught_up = threading.Event()

    def write(self, text: str) -> int:
        self.has_stalled.set()
        self.may_go_on.wait()
        return super().write(text)

    def flush(self) -> None:
        self.caught_up.set()


def test_a_reader_that_stalls_holds_up_nobody_and_costs_lines_not_memory() -> None:
    stream = Stalled()
    dropped: list[int] = []
    writer = LineWriter(stream, dropped.append)
    writer.write_line("0")
    assert stream.has_stalled.wait(30)
    for number in range(1, 60_000):
        writer.write_line(str(number))  # returns, although not one line has got through
    assert not dropped  # it is said once there is room again
    stream.may_go_on.set()
    assert stream.caught_up.wait(30)
    writer.write_line("last")
    writer.close(timeout_s=30)
    assert dropped == [60_000 - len(stream.getvalue().splitlines()) + 1]
    written = stream.getvalue().splitlines()
    assert written[:3] == ["0", "1", "2"]
    assert 50_000 <= len(written) < 51_000


def test_a_reader_that_goes_away_does_not_end_the_worker() -> None:
    stream = io.StringIO()
    stream.close()
    writer = LineWriter(stream, print)
    writer.write_line("a")
    writer.close()
