"""One HTTP response of the platform, or of something in front of it."""

import html
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import unquote

_MAX_EXCERPT_CHARS = 80
_MAX_HEADER_CHARS = 60
_MAX_READ_CHARS = 3000  # of a text that is shown in one line; what it ends with is not shown
_LOOK_AHEAD_CHARS = 1000  # in which a secret that begins in what is shown goes on; html.unescape needs less than 4,300
_MAX_UTF_8_BYTES = 4  # of one character
_REDACTED = "***"
_PIECE_CHARS = 8  # as many letters and digits of a secret tell too much of it
_MAX_DECODINGS = 3
_ESCAPED = re.compile(r"\\+(?:x([0-9a-f]{2})|u([0-9a-f]{4})|[bfnrt])", re.IGNORECASE)
_NEITHER_LETTER_NOR_DIGIT = re.compile(r"[^A-Za-z0-9]+")
_UNREADABLE = "\ufffd"  # stands for bytes that are not UTF-8
_SIGNATURE = "&sign="


@dataclass(frozen=True, slots=True)
class Response:
    """A complete response; header names are in lower case.

    ``secrets``: the request's credentials and those of its proxy, which a gateway may repeat.
    """

    status: int
    headers: Mapping[bytes, bytes]
    body: bytes
    secrets: tuple[str, ...] = ()

    def header(self, name: str) -> str | None:
        """Return the value of a header, named in lower case."""
        value = self.headers.get(name.encode())
        return None if value is None else value.decode("latin-1")

    @property
    def description(self) -> str:
        """What came, in one line for people: status, content type, encoding and the beginning of the body."""
        kind = self.one_line(self.header("content-type") or "", _MAX_HEADER_CHARS) or "no content type"
        encoding = self.one_line(self.header("content-encoding") or "", _MAX_HEADER_CHARS)
        beginning = self.body[: (_MAX_READ_CHARS + _LOOK_AHEAD_CHARS) * _MAX_UTF_8_BYTES]
        excerpt = self.one_line(beginning.decode("utf-8", "replace"), _MAX_EXCERPT_CHARS)
        encoded = f", encoded as {encoding}" if encoding else ""
        return f"HTTP {self.status}, {kind}{encoded}" + (f": {excerpt}" if excerpt else ", without a printable body")

    def redacted(self, text: str, max_chars: int) -> str:
        """Return the beginning of a text of the response; ``***`` if it repeats a secret."""
        return redacted(text, self.secrets, max_chars)

    def one_line(self, text: str, max_chars: int) -> str:
        """Return the beginning of a text of the response as one printable line; ``***`` if it repeats a secret."""
        beginning = self.redacted(text, _MAX_READ_CHARS).replace(_UNREADABLE, "")
        return " ".join("".join(char if char.isprintable() else " " for char in beginning).split())[:max_chars]


def redacted(text: str, secrets: Iterable[str], max_chars: int) -> str:
    """Return the beginning of a text; ``***`` if it repeats a part of a secret, however that is encoded.

    Only letters and digits of ASCII are compared, in any case: a secret that has none of them may be in every text.
    """
    pieces = [piece for secret in secrets if secret for piece in _pieces(secret)]
    if text and pieces:
        readings = " ".join(map(_letters_and_digits, _readings(text[: max_chars + _LOOK_AHEAD_CHARS])))
        if any(piece in readings for piece in pieces):
            return _REDACTED
    return text[:max_chars]


@lru_cache(maxsize=64)
def _pieces(secret: str) -> tuple[str, ...]:
    """Return every piece of a secret that no text may contain; the rest of a token is no secret."""
    found = _letters_and_digits(unquote(secret.rpartition(_SIGNATURE)[2]))
    return tuple(found[start : start + _PIECE_CHARS] for start in range(max(1, len(found) - _PIECE_CHARS + 1)))


def _readings(text: str) -> list[str]:
    """Return a text as it is, and with the encodings of URLs, HTML, JSON and Python literals undone again and again."""
    readings = [text]
    while len(readings) <= _MAX_DECODINGS and (decoded := _decoded(readings[-1])) != readings[-1]:
        readings.append(decoded)
    return readings


def _decoded(text: str) -> str:
    unescaped = _ESCAPED.sub(lambda escaped: chr(int(escaped[1] or escaped[2] or "0", 16)), text)
    return html.unescape(unquote(unescaped))


def _letters_and_digits(text: str) -> str:
    return _NEITHER_LETTER_NOR_DIGIT.sub("", text).lower()
