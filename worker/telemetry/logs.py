"""Structured logs: one JSON object per line on stdout, or colours on a terminal, for our events and the libraries'."""

import json
import logging
import sys
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Literal, TextIO

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

_MAX_WAITING_LINES = 50_000
_GATHER_S = 0.02
_LIBRARIES = ("pika", "urllib3", "asyncio", "uvicorn")


class LineWriter:
    """Writes lines from a thread of its own, so that a reader which stalls holds up nobody else.

    What is logged within a few hundredths of a second is written at once: waking a thread for each line would cost
    more than the line. Beyond 50,000 waiting lines new ones are dropped; how many is said once there is room again.

    Args:
        stream: where the lines go.
        on_dropped: logs how many.
    """

    def __init__(self, stream: TextIO, on_dropped: Callable[[int], None]) -> None:
        self._stream = stream
        self._on_dropped = on_dropped
        self._lines: deque[str] = deque()
        self._dropped = 0
        self._has_lines = threading.Event()
        self._is_closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="log-writer", daemon=True)
        self._thread.start()

    def write_line(self, line: str) -> None:
        """Take one line, without its line break; never waits."""
        if len(self._lines) > _MAX_WAITING_LINES:
            self._dropped += 1
            return
        if self._dropped:
            dropped, self._dropped = self._dropped, 0
            self._on_dropped(dropped)
        self._lines.append(line)
        if not self._has_lines.is_set():
            self._has_lines.set()

    def close(self, timeout_s: float = 2) -> None:
        """Write what is waiting, for so many seconds at most."""
        self._is_closing.set()
        self._has_lines.set()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            while self._lines or not self._is_closing.is_set():
                self._has_lines.wait()
                self._is_closing.wait(_GATHER_S)
                self._has_lines.clear()  # before the lines are taken, so that whatever comes from here on sets it again
                lines = [self._lines.popleft() for _ in range(len(self._lines))]
                self._stream.write("".join([f"{line}\n" for line in lines]))
                if not self._lines:
                    self._stream.flush()
        except (OSError, ValueError):
            pass  # nobody reads any more: the worker goes on, its commands matter more than its log


class _LineLogger:
    """What structlog calls at the end of its chain, whatever the level."""

    def __init__(self, writer: LineWriter) -> None:
        self._write = writer.write_line

    def msg(self, line: str) -> None:
        self._write(line)

    debug = info = warning = error = critical = exception = log = msg


class _LineHandler(logging.Handler):
    """The standard library's way to the same writer."""

    def __init__(self, writer: LineWriter) -> None:
        super().__init__()
        self._write = writer.write_line

    def emit(self, record: logging.LogRecord) -> None:
        self._write(self.format(record))


def configure_logging(
    level: Literal["debug", "info", "warning", "error"], log_format: Literal["json", "console"] | None
) -> LineWriter:
    """Set up structlog and the standard library's logging; returns the writer, to be closed at the end.

    Args:
        level: the least that is logged. The libraries log every step of each reconnection as an error; what matters of
            it is in our own events, so they speak only at ``debug``.
        log_format: None chooses ``console`` on a terminal and ``json`` elsewhere.
    """
    writer = LineWriter(sys.stdout, lambda count: get_logger().warning("log_lines_dropped", count=count))
    as_console = log_format == "console" or (log_format is None and sys.stdout.isatty())
    shared: list[Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    last: list[Processor]
    if as_console:
        # Not the default traceback: it shows local variables, and so secrets.
        plain = structlog.dev.plain_traceback
        last = [structlog.dev.ConsoleRenderer(colors=sys.stdout.isatty(), exception_formatter=plain)]
    else:
        write = json.JSONEncoder(default=repr).encode
        as_json = structlog.processors.JSONRenderer(lambda event, **_: write(event))
        last = [structlog.processors.format_exc_info, _put_first, as_json]
    structlog.configure(
        processors=[*shared, *last],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda *_: _LineLogger(writer),
        cache_logger_on_first_use=True,
    )
    handler = _LineHandler(writer)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.add_logger_name],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    for name in _LIBRARIES:
        logging.getLogger(name).setLevel(logging.DEBUG if level == "debug" else logging.CRITICAL)
    return writer


def _put_first(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Begin each line with what every line has."""
    return {"timestamp": event.pop("timestamp"), "level": event.pop("level"), "event": event.pop("event"), **event}


def get_logger() -> Any:
    """Return a logger for events; bound late, so that it may be made at import."""
    return structlog.get_logger()
