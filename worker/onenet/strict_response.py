"""A response that http.client reads, if it can be understood in one way only and its lines are short."""

import io
from http import HTTPStatus
from http.client import HTTPException, HTTPResponse, responses
from typing import Any

from worker.onenet.history_memory import MAX_BODY_BYTES

_MAX_HEAD_BYTES = 32 * 1024


class _BoundedLines(io.BufferedReader):
    """What a server sends, with a bound for the sum of its lines.

    http.client bounds each line and the number of headers, but not the number of chunks and of trailers.
    """

    left = _MAX_HEAD_BYTES

    def readline(self, size: int | None = -1, /) -> bytes:
        line = super().readline(-1 if size is None else size)
        self.left -= len(line)
        if self.left < 0:
            raise HTTPException("the headers of the response, or the lines between its chunks, are too long")
        return line


class StrictResponse(HTTPResponse):
    """A response with a short header, which can be understood in one way only."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lines = _BoundedLines(self.fp.detach())
        self.fp = self._lines

    def _read_status(self) -> tuple[str, int, str]:
        """Put HTTP's own words for a status in the place of the server's, which the library quotes in its errors."""
        version, status, _ = super()._read_status()  # type: ignore[misc]  # urllib3 calls it too
        return version, status, responses.get(status, "")

    def begin(self) -> None:
        super().begin()
        self._lines.left = MAX_BODY_BYTES  # for the sizes of chunks and for trailers
        lengths = self.headers.get_all("content-length", [])
        is_clear = all(length.isascii() and length.isdecimal() for length in lengths)
        if len(lengths) > 1 or not is_clear or (lengths and "transfer-encoding" in self.headers):
            raise HTTPException("ambiguous length of the response")
        if self.headers.defects or any("\0" in value for value in self.headers.values()):
            raise HTTPException("malformed header")
        if self.status < HTTPStatus.OK:
            raise HTTPException(f"HTTP {self.status} in the place of a final response")
