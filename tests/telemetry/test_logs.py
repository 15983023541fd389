"""Log lines of the worker and its libraries: their form, and how they are written when the stream is slow or fails."""

import errno
import fcntl
import io
import json
import os
import re
import resource
import struct
import subprocess
import sys
import termios
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.support.waiting import PATIENCE_S
from worker.dev.services.ports import wait_until
from worker.telemetry.logs import BufferedLineWriter


def program(code: str) -> list[str]:
    """Return the command that runs code in another process, because logging is configured once per process."""
    imports = "from worker.telemetry.logs import configure_logging, get_logger\n"
    return [sys.executable, "-c", imports + textwrap.dedent(code)]


def output_of(code: str, **environment: str) -> bytes:
    """Run code in another process; returns its output."""
    done = subprocess.run(program(code), capture_output=True, env=os.environ | environment, check=True)
    assert done.stderr == b""
    return done.stdout


def lines_of(code: str) -> list[dict[str, Any]]:
    """Run code in another process; returns its log lines."""
    return [json.loads(line) for line in output_of(code).splitlines()]


def test_every_line_begins_with_timestamp_level_and_event() -> None:
    [line] = lines_of("""
        writer = configure_logging("info", None)
        get_logger().debug("below_the_level")
        get_logger().warning("something_happened", fact=1, strange=object)
        writer.close()
    """)
    assert list(line)[:3] == ["timestamp", "level", "event"]
    assert line | {"timestamp": ""} == {
        "timestamp": "", "level": "warning", "event": "something_happened", "fact": 1, "strange": "<class 'object'>",
    }  # fmt: skip
    assert line["timestamp"].endswith("Z")


def test_a_traceback_is_a_field_of_its_log_line() -> None:
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


def test_no_field_has_the_user_and_password_of_a_url() -> None:
    output = output_of("""
        writer = configure_logging("info", "json")
        url = "http://svc:S3cret@proxy:3128/"
        try:
            raise ValueError(url)
        except ValueError as exc:
            get_logger().exception(f"could not open {url}", reason=f"{exc}, twice: {url}", hint="a@b")
        writer.close()
    """).decode()
    assert "S3cret" not in output
    assert output.count("http://proxy:3128/") == 4
    assert "a@b" in output


def test_a_text_of_many_urls_without_users_is_read_once() -> None:
    """Looking on for the end of a user at each of them would take an hour."""
    [line] = lines_of("""
        writer = configure_logging("info", "json")
        get_logger().warning("of interest", reason="://" * 500_000)
        writer.close()
    """)
    assert line["reason"].startswith("://" * 1000)


def test_pika_logs_only_at_level_debug() -> None:
    code = """
        import logging
        writer = configure_logging("{level}", "json")
        logging.getLogger("pika.adapters").error("Socket failed to connect: %s", 111)
        logging.getLogger("another").warning("of interest")
        writer.close()
    """
    assert [line["event"] for line in lines_of(code.format(level="info"))] == ["of interest"]
    first, _ = lines_of(code.format(level="debug"))
    assert (first["event"], first["level"], first["logger"]) == (
        "Socket failed to connect: 111",
        "error",
        "pika.adapters",
    )


class StalledStream(io.StringIO):
    """A stream whose writes block until the test allows them."""

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


def test_a_stalled_reader_does_not_block_the_logger_and_bounds_the_buffer() -> None:
    stream = StalledStream()
    dropped: list[int] = []
    writer = BufferedLineWriter(stream, dropped.append)
    writer.write_line("0")
    assert stream.has_stalled.wait(PATIENCE_S)
    for number in range(1, 60_000):
        writer.write_line(str(number))  # returns although no line has been written
    assert not dropped  # reported once there is room in the buffer
    stream.may_go_on.set()
    assert stream.caught_up.wait(PATIENCE_S)
    writer.write_line("last")
    writer.close(timeout_s=PATIENCE_S)
    assert dropped == [60_000 - len(stream.getvalue().splitlines()) + 1]
    written = stream.getvalue().splitlines()
    assert written[:3] == ["0", "1", "2"]
    assert 50_000 <= len(written) < 51_000


def test_the_buffer_of_long_lines_is_bounded_by_their_length() -> None:
    """A sender or a platform may make each line as long as a line may be."""
    stream = StalledStream()
    dropped: list[int] = []
    writer = BufferedLineWriter(stream, dropped.append)
    for _ in range(600):
        writer.write_line("x" * 100_000)
    stream.may_go_on.set()
    writer.close(timeout_s=PATIENCE_S)
    written = len(stream.getvalue())
    assert 16 * 1024 * 1024 < written < 17 * 1024 * 1024
    assert dropped == [600 - written // 100_000]


def test_writing_to_a_closed_stream_raises_no_error() -> None:
    stream = io.StringIO()
    stream.close()
    writer = BufferedLineWriter(stream, print)
    writer.write_line("a")
    writer.close()


def refusal(kind: type[OSError], number: int) -> OSError:
    return kind(number, os.strerror(number))


@pytest.mark.parametrize(
    "error",
    [
        refusal(OSError, errno.ENOSPC),
        refusal(OSError, errno.EDQUOT),
        refusal(OSError, errno.EFBIG),
        refusal(OSError, errno.EIO),
        refusal(OSError, errno.EBADF),
        refusal(BlockingIOError, errno.EAGAIN),
        refusal(BrokenPipeError, errno.EPIPE),
        ValueError("I/O operation on closed file"),
        UnicodeEncodeError("ascii", "\u4e2d", 0, 1, "ordinal not in range(128)"),
    ],
    ids=repr,
)
def test_every_error_of_the_stream_is_retried_without_losing_a_line(error: Exception) -> None:
    class FailingStream(io.StringIO):
        tries = 0

        def write(self, text: str) -> int:
            self.tries += 1
            if self.tries in {1, 2, 4}:
                raise error
            return super().write(text)

    stream = FailingStream()
    writer = BufferedLineWriter(stream, print)
    writer.write_line("1")
    wait_until(lambda: stream.tries == 3, PATIENCE_S, "the third try")
    writer.write_line("2")
    assert writer.close(timeout_s=PATIENCE_S) == 0
    assert stream.getvalue() == "1\n2\n"


def test_retries_of_a_stream_that_always_fails_back_off() -> None:
    class FailingStream(io.StringIO):
        tries = 0

        def write(self, _text: str) -> int:
            self.tries += 1
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    stream = FailingStream()
    writer = BufferedLineWriter(stream, print)
    for number in range(3):
        writer.write_line(str(number))
    wait_until(lambda: stream.tries > 3, PATIENCE_S, "some retries")
    assert writer.close(timeout_s=1) == 3
    assert stream.tries < 100  # without a backoff there would be many thousands


def test_no_line_is_lost_or_cut_when_a_full_disk_gets_space_again(tmp_path: Path) -> None:
    """The limit of the file size stands for a full disk: one write is short, and the next one fails."""
    limit = 10_000
    code = f"""
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))
        writer = configure_logging("info", "json")
        for number in range(1_000):
            get_logger().info("before", number=number)
        input()
        get_logger().info("after")
        assert writer.close({PATIENCE_S}) == 0
    """
    path = tmp_path / "log"
    with path.open("wb") as log:
        process = subprocess.Popen(program(code), stdin=subprocess.PIPE, stdout=log)
    wait_until(lambda: path.stat().st_size == limit, PATIENCE_S, "a full disk")
    assert not path.read_bytes().endswith(b"\n")
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    process.communicate(b"\n", timeout=PATIENCE_S)
    assert process.returncode == 0
    *before, after = map(json.loads, path.read_text().splitlines())
    assert [line["number"] for line in before] == list(range(1_000))
    assert after["event"] == "after"


def test_lines_dropped_while_the_disk_was_full_are_counted_and_logged_afterwards() -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    reading, writing = os.pipe()
    reader = Reader(reading)
    with os.fdopen(full, "w") as stream:
        writer = BufferedLineWriter(stream, lambda count: writer.write_line(f"dropped {count}"))
        for number in range(120_000):
            writer.write_line(str(number))
        os.dup2(writing, full)
        os.close(writing)
        reader.start()
        assert writer.close(PATIENCE_S) == 0
    reader.join()
    [said] = [line for line in reader.lines if line.startswith("dropped ")]
    assert int(said.split()[1]) == 120_000 - (len(reader.lines) - 1) > 0


def test_close_returns_the_number_of_lines_that_could_not_be_written() -> None:
    with Path("/dev/full").open("w") as stream:
        writer = BufferedLineWriter(stream, print)
        for number in range(3):
            writer.write_line(str(number))
        assert writer.close(timeout_s=0.2) == 3


class Reader(threading.Thread):
    """Reads a pipe to its end."""

    def __init__(self, pipe: int) -> None:
        super().__init__()
        self._pipe = pipe
        self.lines: list[str] = []

    def run(self) -> None:
        with os.fdopen(self._pipe, encoding="utf-8") as stream:
            self.lines += stream


def waiting_bytes(pipe: int) -> int:
    """Return how many bytes of a pipe are unread."""
    found = fcntl.ioctl(pipe, termios.FIONREAD, struct.pack("i", 0))
    return int(struct.unpack("i", found)[0])


def test_every_line_is_written_whole_to_a_nonblocking_pipe_with_a_slow_reader() -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    text = "\u6587"
    lines = [f"{number} {text * (number % 97)}" for number in range(20_000)]
    with os.fdopen(writing, "w", encoding="utf-8") as stream:
        writer = BufferedLineWriter(stream, print)
        for line in lines:
            writer.write_line(line)
        wait_until(lambda: waiting_bytes(reading) > 60_000, PATIENCE_S, "a full pipe")
        reader = Reader(reading)
        reader.start()
        assert writer.close(PATIENCE_S) == 0
    reader.join()
    assert reader.lines == [f"{line}\n" for line in lines]


def test_the_next_reader_of_a_named_pipe_gets_the_lines_that_its_predecessor_did_not_read(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    first = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with path.open("w") as stream:
        writer = BufferedLineWriter(stream, print)
        for number in range(5_000):
            writer.write_line(f"{number:04} {'x' * 95}")
        wait_until(lambda: waiting_bytes(first) > 60_000, PATIENCE_S, "a full pipe")
        os.close(first)
        second = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        os.set_blocking(second, True)
        reader = Reader(second)
        reader.start()
        assert writer.close(PATIENCE_S) == 0
    reader.join()
    assert all(re.fullmatch(r"[0-9]{4} x{95}\n", line) for line in reader.lines)
    assert [int(line[:4]) for line in reader.lines] == list(range(5_000))


@pytest.mark.parametrize("log_format", ["json", "console"])
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8", "ascii:strict"])
def test_every_character_can_be_logged_in_every_encoding_of_stdout(encoding: str, log_format: str) -> None:
    code = f"""
        import logging
        writer = configure_logging("info", "{log_format}")
        get_logger().info("before", text="\\u4e2d\\u6587 \\udc80 \\U0001f600")
        logging.getLogger("another").warning("\\u4e2d\\u6587 \\udc80")
        get_logger().info("after")
        assert writer.close() == 0
    """
    said = output_of(code, PYTHONIOENCODING=encoding)
    assert len(said.splitlines()) == 3
    assert b"after" in said.splitlines()[-1]
    assert ("\u4e2d".encode() if (encoding, log_format) == ("utf-8", "console") else rb"\u4e2d") in said


def test_a_worker_without_stdout_does_not_log_into_another_file(tmp_path: Path) -> None:
    code = f"""
        import os
        writer = configure_logging("info", None)
        other = os.open({str(tmp_path / "other")!r}, os.O_CREAT | os.O_WRONLY)
        get_logger().info("lost")
        assert writer.close() == 0
    """
    without_stdout = ["sh", "-c", 'exec "$@" >&-', "sh", *program(code)]
    done = subprocess.run(without_stdout, stderr=subprocess.PIPE, check=True)
    assert done.stderr == b""
    assert (tmp_path / "other").read_bytes() == b""


@pytest.mark.parametrize(
    "statement",
    [
        'get_logger().info("odd", fact=Odd())',
        'get_logger().info("odd", fact={"deep": [Odd()]})',
        'get_logger().info("odd", fact=circular)',
        'get_logger().info("odd", fact={(1, 2): 3})',
        'get_logger().info("odd", fact=deep)',
        'logging.getLogger("another").warning("odd %d", "not a number")',
        'logging.getLogger("another").warning("odd %s", Odd())',
        'logging.getLogger("another").warning(Odd())',
        'get_logger().error("odd", exc_info=OddError())',
    ],
)
@pytest.mark.parametrize("log_format", ["json", "console"])
def test_an_event_that_cannot_be_rendered_does_not_affect_other_events(log_format: str, statement: str) -> None:
    code = f"""
        import logging
        class Odd:
            def __repr__(self):
                raise RuntimeError("none")
            __str__ = __repr__
        class OddError(Exception):
            __repr__ = __str__ = Odd.__repr__
        circular = []
        circular.append(circular)
        deep = []
        for _ in range(100_000):
            deep = [deep]
        writer = configure_logging("info", "{log_format}")
        {statement}
        get_logger().info("after")
        writer.close()
        import os
        os._exit(0)
    """
    said = output_of(code).decode().splitlines()
    assert "after" in said[-1]
    assert re.search("odd|Odd", said[0])
    if log_format == "json":
        assert [json.loads(line)["event"] for line in said][-1] == "after"


HARMFUL = "a\x1b[2J\x9bm\x7f\u2028\u202e\u2066\n2026-01-01T00:00:00Z [info] forged\r[red]x[/red]"
_LOG_IT = """
    import logging
    text = {text!r}
    class Odd:
        def __repr__(self):
            return text
    writer = configure_logging("info", "{log_format}")
    get_logger().warning("something_happened", reason=text, one=text.replace(" ", ""), several=[text], odd=Odd())
    logging.getLogger("library").warning("it said %s", text)
    try:
        raise ValueError(text)
    except ValueError:
        get_logger().exception("something_failed")
    writer.close()
"""


def test_no_text_from_outside_controls_the_console_or_forges_a_line() -> None:
    lines = output_of(_LOG_IT.format(text=HARMFUL, log_format="console")).decode().split("\n")
    assert all(line.isprintable() for line in lines)
    events = [line for line in lines if line and not line.startswith("  ")]  # the others belong to a traceback
    assert [bool(re.search(r"something_|it said", line)) for line in events] == [True, True, True]
    assert sum(line.count("\\x1b[2J\\x9bm\\x7f\\u2028\\u202e\\u2066") for line in lines) == 6


def test_a_line_of_json_is_of_ascii_without_controls() -> None:
    output = output_of(_LOG_IT.format(text=HARMFUL, log_format="json")).decode()
    assert re.fullmatch(r"(?:[ -~]+\n){3}", output)
    first, second, third = map(json.loads, output.splitlines())
    assert (first["reason"], first["odd"], second["event"]) == (HARMFUL, HARMFUL, f"it said {HARMFUL}")
    assert HARMFUL in third["exception"]


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_a_long_text_is_cut(log_format: str) -> None:
    """The end of a traceback is kept: it says what happened."""
    output = output_of(f"""
        writer = configure_logging("info", "{log_format}")
        get_logger().info("something_happened", reason="x" * 10_000_000)
        try:
            raise ValueError("y" * 10_000_000 + "END")
        except ValueError:
            get_logger().exception("something_failed")
        writer.close()
    """)
    assert len(output) < 50_000
    assert b"END" in output
