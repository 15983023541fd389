"""Structured logs of the worker and its libraries on stdout: one JSON object per line, or coloured text."""

import json
import logging
import os
import re
import sys
import textwrap
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from worker.printable import printable

_MAX_BUFFERED_LINES = 50_000
_MAX_BUFFERED_BYTES = 16 * 1024 * 1024  # of memory
_CHUNK_BYTES = 64 * 1024
_BATCH_DELAY_S = 0.02
_FIRST_BACKOFF_S = 0.02  # before a failed write is repeated; doubles up to the maximum
_MAX_BACKOFF_S = 1.0
_MAX_CHARS = 4096  # of a field; most texts from outside are much shorter
_MAX_TRACEBACK_CHARS = 32 * 1024
_USER_INFO = re.compile(r"(?<=://)(?:(?P<user>\S+@)|\S+)")  # what has no user is passed over as a whole
# Vhost, number and options: where a password is not escaped, they may be parts of it.
_BEHIND_THE_PORT = re.compile(r"((?:amqps?|rediss?(?:\+sentinel)?)://[^\s/?#'\")]+)[/?#][^\s'\")]*")
_LIBRARIES = ("pika", "urllib3", "asyncio", "uvicorn")


class BufferedLineWriter:
    """Writes lines from a background thread, so that a slow reader of the log never blocks the caller.

    Lines logged within 20 ms are written together: waking the thread for each line would cost more than writing it. A
    write that fails, with whatever error, is repeated after a backoff of at most a second, and continues after the last
    byte written, so that no line is cut. Meanwhile lines are buffered. When 50,000 lines or 16 MiB are
    buffered, new lines are dropped; their number is logged once there is room again.

    Args:
        stream: where the lines go. A file is written through its descriptor: Python's own buffer would keep the data
            of a failed write, and raise its error again.
        on_dropped: logs the number of dropped lines.
    """

    def __init__(self, stream: TextIO, on_dropped: Callable[[int], None]) -> None:
        self._stream = stream
        self._write_once = _writer_to(stream)
        self._encoding = stream.encoding or "utf-8"
        self._on_dropped = on_dropped
        self._lines: deque[str] = deque()
        self._buffered_bytes = 0
        self._dropped = 0
        self._counting = threading.Lock()
        self._unwritten = 0  # lines taken from the buffer and not written yet
        self._has_lines = threading.Event()
        self._is_closing = threading.Event()
        self._has_given_up = threading.Event()
        self._thread = threading.Thread(target=self._run, name="log-writer", daemon=True)
        self._thread.start()

    def write_line(self, line: str) -> None:
        """Buffer one line, without its line break; never blocks."""
        with self._counting:
            if len(self._lines) > _MAX_BUFFERED_LINES or self._buffered_bytes > _MAX_BUFFERED_BYTES:
                self._dropped += 1
                return
            self._lines.append(line)
            self._buffered_bytes += sys.getsizeof(line)
        if not self._has_lines.is_set():
            self._has_lines.set()

    def close(self, timeout_s: float = 2) -> int:
        """Write the buffered lines, for at most this many seconds; returns how many lines were lost."""
        self._is_closing.set()
        self._has_lines.set()
        self._thread.join(timeout_s)
        self._has_given_up.set()
        return self._unwritten + len(self._lines) + self._dropped

    def _run(self) -> None:
        while self._lines or not self._is_closing.is_set():
            self._has_lines.wait()
            self._is_closing.wait(_BATCH_DELAY_S)
            self._has_lines.clear()  # before the lines are taken, so that a line added from here on sets it again
            while self._lines and not self._has_given_up.is_set():
                self._write(self._take())
                self._report_dropped()
            if self._has_given_up.is_set():
                return
            with suppress(OSError, ValueError):
                self._stream.flush()

    def _take(self) -> bytes:
        """Take the lines of one write from the buffer."""
        taken = bytearray()
        while self._lines and len(taken) < _CHUNK_BYTES:
            line = self._lines.popleft()
            with self._counting:
                self._buffered_bytes -= sys.getsizeof(line)
            # A character that the stream's encoding lacks, or a lone surrogate, must not lose the line.
            taken += f"{line}\n".encode(self._encoding, "backslashreplace")
            self._unwritten += 1
        return bytes(taken)

    def _write(self, data: bytes) -> None:
        """Write all of the data, with as many retries as it takes, unless the writer is closed meanwhile."""
        written, backoff_s = 0, _FIRST_BACKOFF_S
        while written < len(data):
            try:
                count = self._write_once(data[written:])
            except BlockingIOError:
                count, backoff_s = 0, _FIRST_BACKOFF_S  # the pipe is full: its reader is slow
            except (OSError, ValueError):
                count = 0
            if count:
                written, backoff_s = written + count, _FIRST_BACKOFF_S
            elif self._has_given_up.wait(backoff_s):
                self._unwritten = data.count(b"\n", written)
                return
            else:
                backoff_s = min(2 * backoff_s, _MAX_BACKOFF_S)
        self._unwritten = 0

    def _report_dropped(self) -> None:
        has_room = len(self._lines) < _MAX_BUFFERED_LINES // 2 and self._buffered_bytes < _MAX_BUFFERED_BYTES // 2
        if self._dropped and has_room:  # so that the report has room too
            with self._counting:
                dropped, self._dropped = self._dropped, 0
            self._on_dropped(dropped)


def _writer_to(stream: TextIO) -> Callable[[bytes], int]:
    """Return a function that writes to a stream and returns the number of bytes written."""
    with suppress(OSError, ValueError):  # raised by a stream without a file, such as a StringIO
        descriptor = stream.fileno()
        return lambda data: os.write(descriptor, data)

    def write(data: bytes) -> int:
        stream.write(data.decode(stream.encoding or "utf-8"))
        return len(data)

    return write


class _LineLogger:
    """The logger that structlog calls at the end of its chain, whatever the level."""

    def __init__(self, writer: BufferedLineWriter) -> None:
        self._write = writer.write_line

    def msg(self, line: str) -> None:
        self._write(line)

    debug = info = warning = error = critical = exception = log = msg


class _LineHandler(logging.Handler):
    """Sends the standard library's log records to the same writer."""

    def __init__(self, writer: BufferedLineWriter) -> None:
        super().__init__()
        self._write = writer.write_line

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except Exception as exc:  # noqa: BLE001 - of any kind: a record that cannot be formatted costs its own line only
            get_logger().error(_name_of(record.msg), logger=record.name, rendering_failed=type(exc).__name__)
        else:
            self._write(line)


def configure_logging(
    level: Literal["debug", "info", "warning", "error"], log_format: Literal["json", "console"] | None
) -> BufferedLineWriter:
    """Configure structlog and the standard library's logging; returns the writer, which must be closed at the end.

    Args:
        level: the lowest level that is logged. pika, urllib3, asyncio and uvicorn log only at ``debug``: they report
            every step of a reconnection as an error, and the worker's own events say the same once.
        log_format: None chooses ``console`` on a terminal and ``json`` elsewhere.
    """
    # A process may be started without stdout; file descriptor 1 then belongs to whatever is opened next.
    stream = sys.stdout or Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - open until the process ends
    writer = BufferedLineWriter(stream, lambda count: get_logger().error("log_lines_dropped", count=count))
    as_console = log_format == "console" or (log_format is None and stream.isatty())
    shared: list[Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    last: list[Processor]
    if as_console:
        # Not the default traceback: it shows local variables, which may hold secrets.
        plain = structlog.dev.plain_traceback
        last = [_escape, structlog.dev.ConsoleRenderer(colors=stream.isatty(), exception_formatter=plain)]
    else:
        write = json.JSONEncoder(default=repr).encode
        last = [_put_first, lambda _logger, _method, event: write(event)]
    render = _Rendering([structlog.processors.format_exc_info, _hide_user_info, _shorten, *last])
    structlog.configure(
        processors=[*shared, render],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda *_: _LineLogger(writer),
        cache_logger_on_first_use=True,
    )
    handler = _LineHandler(writer)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.add_logger_name],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, render],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    for name in _LIBRARIES:
        logging.getLogger(name).setLevel(logging.DEBUG if level == "debug" else logging.CRITICAL)
    return writer


class _Rendering:
    """Runs the last processors as one, so that an event that cannot be rendered costs its own line only."""

    def __init__(self, processors: Sequence[Processor]) -> None:
        self._processors = processors

    def __call__(self, logger: WrappedLogger, method: str, event: EventDict) -> str:
        rendered: Any = dict(event)
        try:
            for process in self._processors:
                rendered = process(logger, method, rendered)
        except Exception as exc:  # noqa: BLE001 - of any kind: any logged object may raise it
            named = {name: _name_of(event.get(name)) for name in ("timestamp", "level", "event")}
            return json.dumps({**named, "rendering_failed": type(exc).__name__})
        return str(rendered)


def _name_of(event: object) -> str:
    """Return an event that is a string, else its type's name: converting it may be what failed."""
    return event if isinstance(event, str) else type(event).__name__


def _hide_user_info(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Remove user and password from every URL in a text, such as a reason or a traceback; libraries quote URLs.

    Of URLs of the broker and of Redis only hosts and ports are left.
    """
    for name, text in event.items():
        if isinstance(text, str) and "://" in text:
            without_user = _USER_INFO.sub(lambda found: "" if found["user"] else found[0], text)
            event[name] = _BEHIND_THE_PORT.sub(r"\1", without_user)
    return event


def _shorten(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Cut long texts: at their ends, and a traceback at its beginning, since its last lines tell most."""
    for name, value in event.items():
        if isinstance(value, str) and len(value) > _MAX_CHARS:
            if name != "exception":
                event[name] = f"{value[:_MAX_CHARS]}…"
            elif len(value) > _MAX_TRACEBACK_CHARS:
                event[name] = f"…{value[-_MAX_TRACEBACK_CHARS:]}"
    return event


def _escape(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Make every field printable, so that a text from outside controls no terminal and forges no line.

    A traceback keeps its lines. They are indented, so that none of them looks like another event.
    """
    for name, value in event.items():
        if name == "exception":
            event[name] = textwrap.indent(printable(str(value), keep="\n"), "  ")
        elif not isinstance(value, str) or not value.isprintable():
            event[name] = _Shown(printable(repr(value)))
    return event


@dataclass(frozen=True, slots=True)
class _Shown:
    """A value as it is to be shown; the renderer would quote a text once more."""

    text: str

    def __repr__(self) -> str:
        return self.text


def _put_first(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Put the fields that every line has first."""
    return {"timestamp": event.pop("timestamp"), "level": event.pop("level"), "event": event.pop("event"), **event}


def get_logger() -> Any:
    """Return a logger for events; it binds at its first use, so that modules can create it at import."""
    return structlog.get_logger()
