"""Lines that are too many for memory: in a temporary file without a name, which nobody else can read."""

import tempfile
from types import TracebackType
from typing import Self

from worker.errors import WorkerError

_MAX_HELD_BYTES = 8 * 1024 * 1024


class Spool:
    """Keeps lines, the first few MiB of them in memory, and gives them back in any order.

    So the broker's messages are held only as long as it takes to read them, however slowly their reader reads.
    """

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(_MAX_HELD_BYTES)  # noqa: SIM115 - closed by __exit__

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def append(self, line: str) -> int:
        """Keep a line that has no line break; returns where.

        Raises:
            WorkerError: there is no room.
        """
        try:
            place = self._file.tell()
            self._file.write(f"{line}\n".encode())
        except OSError as exc:
            raise WorkerError(f"no room for temporary files: {exc.strerror}: use --limit, or set TMPDIR") from exc
        return place

    def line(self, place: int) -> str:
        """Return the line that was kept at a place."""
        self._file.seek(place)
        return self._file.readline().decode().removesuffix("\n")
