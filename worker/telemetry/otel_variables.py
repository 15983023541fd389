"""What the OpenTelemetry SDK says of its own variables, ``OTEL_*``: some faults it raises, others it only logs."""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from worker.errors import SettingsError

_PREFIX = "OTEL_"
_PLACEHOLDER = re.compile(r"%[sdr]")
_HIDDEN = "…"


@contextmanager
def checked_variables() -> Iterator[None]:
    """Refuse what the SDK raises or logs within the block about its variables, which may hold secrets.

    Raises:
        SettingsError: a variable is unusable.
    """
    faults = _Faults(logging.WARNING)
    logger = logging.getLogger("opentelemetry")
    former, logger.propagate = logger.propagate, False
    logger.addHandler(faults)
    try:
        yield
    except ValueError as exc:
        faults.note(str(exc))
    finally:
        logger.removeHandler(faults)
        logger.propagate = former
    if faults.lines:
        raise SettingsError(faults.lines)


class _Faults(logging.Handler):
    """Collects a line for each fault."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        arguments = map(str, record.args if isinstance(record.args, tuple) else ())
        shown = (argument if argument.startswith(_PREFIX) else _HIDDEN for argument in arguments)
        self.note(_PLACEHOLDER.sub(lambda _: next(shown, _HIDDEN), str(record.msg)))

    def note(self, text: str) -> None:
        """Note a fault, without the values of the variables."""
        variables = {name: value for name, value in os.environ.items() if name.startswith(_PREFIX) and value}
        names = ", ".join(name for name in variables if re.search(rf"\b{name}\b", text))
        for value in sorted(variables.values(), key=len, reverse=True):
            text = re.sub(rf"(?<!\w){re.escape(value)}(?!\w)", _HIDDEN, text, flags=re.IGNORECASE)
        self.lines.append(f"{names or _PREFIX + '*'}: OpenTelemetry cannot use this variable: {text}")
