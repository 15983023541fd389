"""A worker process and its log."""

import json
from dataclasses import dataclass
from typing import Any, Self

from tests.support.blocking import assert_nothing_blocked
from tests.support.waiting import PATIENCE_S
from worker.dev.services.ports import wait_until
from worker.dev.services.processes import LocalProcess


@dataclass
class WorkerProcess:
    """``onenet-worker run`` as a process; killed at the end of the ``with`` block."""

    process: LocalProcess

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.process.kill()  # a graceful shutdown has tests of its own
        if kind is None:
            assert_nothing_blocked(self.process.output.read_text())

    @property
    def events(self) -> list[dict[str, Any]]:
        """Return the log events so far; fails on a line that is not JSON, such as one of a traceback."""
        text = self.process.output.read_text()
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def wait_for(self, event: str, count: int = 1, **fields: Any) -> dict[str, Any]:
        """Wait until the worker has logged ``count`` such events; returns the last of them."""
        found: list[dict[str, Any]] = []

        def is_there() -> bool:
            found[:] = [line for line in self.events if line["event"] == event and fields.items() <= line.items()]
            return len(found) >= count

        try:
            wait_until(is_there, PATIENCE_S, event)
        except TimeoutError as exc:
            raise AssertionError(f"no {event}, but {self.events}") from exc
        return found[count - 1]
