"""Structured logs: one JSON object per line on stdout, or colours on a terminal, for our events and the libraries'."""

import json
import logging
import os
import re
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TextIO

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

_MAX_WAITING_LINES = 50_000
_CHUNK_BYTES = 64 * 1024
_GATHER_S = 0.02
_FIRST_PAUSE_S = 0.02  # before a write that failed is tried again; doubled each time, up to the longest
_LONGEST_PAUSE_S = 1.0
_USER_INFO = re.compile(r"(?<=://)\S+@")
_LIBRARIES = ("pika", "urllib3", "asyncio", "uvicorn")


class BufferedLineWriter:
    """Writes lines from a thread of its own, so that a reader which stalls holds up nobody else.

    What is logged within a few hundredths of a second is written at once: waking a thread for each line would cost
    more than the line. Whatever error the stream raises, writing is tried again after a pause of a second at most, and
    goes on behind the last byte that was taken, so that no line is cut. Meanwhile lines wait. Beyond 50,000 of them new
    ones are dropped; how many is logged once lines are written again.

    Args:
        stream: where the lines go. A file is written to directly, since Python's own buffer repeats what it could not
            write, and with it the error.
        on_dropped: logs how many.
    """

    def __init__(self, stream: TextIO, on_dropped: Callable[[int], None]) -> None:
        self._stream = stream
        self._write_some = _writing_to(stream)
        self._encoding = stream.encoding or "utf-8"
        self._on_dropped = on_dropped
        self._lines: deque[str] = deque()
        self._dropped = 0
        self._dropping = threading.Lock()
        self._unwritten = 0  # lines that have been taken from those that wait
        self._has_lines = threading.Event()
        self._is_closing = threading.Event()
        self._has_given_up = threading.Event()
        self._thread = threading.Thread(target=self._run, name="log-writer", daemon=True)
        self._thread.start()

    def write_line(self, line: str) -> None:
        """Take one line, without its line break; never waits."""
        if len(self._lines) > _MAX_WAITING_LINES:
            with self._dropping:
                self._dropped += 1
            return
        self._lines.append(line)
        if not self._has_lines.is_set():
            self._has_lines.set()

    def close(self, timeout_s: float = 2) -> int:
        """Write what is waiting, for so many seconds at most; returns how many lines were lost."""
        self._is_closing.set()
        self._has_lines.set()
        self._thread.join(timeout_s)
        self._has_given_up.set()
        return self._unwritten + len(self._lines) + self._dropped

    def _run(self) -> None:
        while self._lines or not self._is_closing.is_set():
            self._has_lines.wait()
            self._is_closing.wait(_GATHER_S)
            self._has_lines.clear()  # before the lines are taken, so that whatever comes from here on sets it again
            while self._lines and not self._has_given_up.is_set():
                self._write(self._take())
                self._report_dropped()
            if self._has_given_up.is_set():
                return
            with suppress(OSError, ValueError):
                self._stream.flush()

    def _take(self) -> bytes:
        """Take as many lines as are written at once."""
        taken = bytearray()
        while self._lines and len(taken) < _CHUNK_BYTES:
            # No character that the stream's encoding lacks, nor a lone surrogate, may cost a line.
            taken += f"{self._lines.popleft()}\n".encode(self._encoding, "backslashreplace")
            self._unwritten += 1
        return bytes(taken)

    def _write(self, data: bytes) -> None:
        """Write all of it, however often that must be tried."""
        written, pause_s = 0, _FIRST_PAUSE_S
        while written < len(data):
            try:
                count = self._write_some(data[written:])
            except BlockingIOError:
                count, pause_s = 0, _FIRST_PAUSE_S  # the reader is there, and slow
            except (OSError, ValueError):
                count = 0
            if count:
                written, pause_s = written + count, _FIRST_PAUSE_S
            elif self._has_given_up.wait(pause_s):
                self._unwritten = data.count(b"\n", written)
                return
            else:
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        self._unwritten = 0

    def _report_dropped(self) -> None:
        if self._dropped and len(self._lines) < _MAX_WAITING_LINES // 2:  # so that there is room for this line too
            with self._dropping:
                dropped, self._dropped = self._dropped, 0
            self._on_dropped(dropped)


def _writing_to(stream: TextIO) -> Callable[[bytes], int]:
    """Return what writes to a stream, and returns how many bytes it took."""
    with suppress(OSError, ValueError):  # raised by what is not a file, such as a StringIO
        descriptor = stream.fileno()
        return lambda data: os.write(descriptor, data)

    def write(data: bytes) -> int:
        stream.write(data.decode(stream.encoding or "utf-8"))
        return len(data)

    return write


class _LineLogger:
    """What structlog calls at the end of its chain, whatever the level."""

    def __init__(self, writer: BufferedLineWriter) -> None:
        self._write = writer.write_line

    def msg(self, line: str) -> None:
        self._write(line)

    debug = info = warning = error = critical = exception = log = msg


class _LineHandler(logging.Handler):
    """The standard library's way to the same writer."""

    def __init__(self, writer: BufferedLineWriter) -> None:
        super().__init__()
        self._write = writer.write_line

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except Exception as exc:  # noqa: BLE001 - of any kind: what a library logs wrongly costs that line only
            get_logger().error(_name_of(record.msg), logger=record.name, rendering_failed=type(exc).__name__)
        else:
            self._write(line)


def configure_logging(
    level: Literal["debug", "info", "warning", "error"], log_format: Literal["json", "console"] | None
) -> BufferedLineWriter:
    """Set up structlog and the standard library's logging; returns the writer, to be closed at the end.

    Args:
        level: the least that is logged. The libraries log every step of each reconnection as an error; what matters of
            it is in our own events, so they speak only at ``debug``.
        log_format: None chooses ``console`` on a terminal and ``json`` elsewhere.
    """
    # A process may be started without stdout; its number then belongs to whatever is opened next.
    stream = sys.stdout or Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - for good
    writer = BufferedLineWriter(stream, lambda count: get_logger().error("log_lines_dropped", count=count))
    as_console = log_format == "console" or (log_format is None and stream.isatty())
    shared: list[Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    last: list[Processor]
    if as_console:
        # Not the default traceback: it shows local variables, and so secrets.
        plain = structlog.dev.plain_traceback
        last = [structlog.dev.ConsoleRenderer(colors=stream.isatty(), exception_formatter=plain)]
    else:
        write = json.JSONEncoder(default=repr).encode
        last = [_put_first, structlog.processors.JSONRenderer(lambda event, **_: write(event))]
    render = _Rendering([structlog.processors.format_exc_info, _hide_user_info, *last])
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
    """The last processors as one, of which an event that cannot be rendered costs its own line only."""

    def __init__(self, processors: Sequence[Processor]) -> None:
        self._processors = processors

    def __call__(self, logger: WrappedLogger, method: str, event: EventDict) -> str:
        rendered: Any = dict(event)
        try:
            for process in self._processors:
                rendered = process(logger, method, rendered)
        except Exception as exc:  # noqa: BLE001 - of any kind: it comes from whatever object was logged
            named = {name: _name_of(event.get(name)) for name in ("timestamp", "level", "event")}
            return json.dumps({**named, "rendering_failed": type(exc).__name__})
        return str(rendered)


def _name_of(event: object) -> str:
    """Return what is surely a text, where the conversion to one may be what failed."""
    return event if isinstance(event, str) else type(event).__name__


def _hide_user_info(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Hide user and password of each URL that a library quotes, in its own words or in those of its errors."""
    for name in ("event", "exception"):
        text = event.get(name)
        if isinstance(text, str) and "://" in text:
            event[name] = _USER_INFO.sub("", text)
    return event


def _put_first(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Begin each line with what every line has."""
    return {"timestamp": event.pop("timestamp"), "level": event.pop("level"), "event": event.pop("event"), **event}


def get_logger() -> Any:
    """Return a logger for events; bound late, so that it may be made at import."""
    return structlog.get_logger()
