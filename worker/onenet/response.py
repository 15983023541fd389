"""One HTTP response of the platform, or of something in front of it."""

import html
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import unquote

_MAX_EXCERPT_CHARS = 80
_MAX_HEADER_CHARS = 60
_MAX_EXCERPT_BYTES = 4096  # of which the excerpt is taken
_MIN_SECRET_CHARS = 8  # a shorter one could be a part of any word
_SIGNATURE = "sign="


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
        kind = self._one_line(self.header("content-type") or "", _MAX_HEADER_CHARS) or "no content type"
        encoding = self._one_line(self.header("content-encoding") or "", _MAX_HEADER_CHARS)
        excerpt = self._one_line(self.body[:_MAX_EXCERPT_BYTES].decode("utf-8", "ignore"), _MAX_EXCERPT_CHARS)
        encoded = f", encoded as {encoding}" if encoding else ""
        return f"HTTP {self.status}, {kind}{encoded}" + (f": {excerpt}" if excerpt else ", without a printable body")

    def redacted(self, text: str) -> str:
        """Return a text of the response without the secrets, however they are encoded in it."""
        return redacted(text, self.secrets)

    def _one_line(self, text: str, max_chars: int) -> str:
        """Return the beginning of a text. Redacted first: half a secret could not be found any more."""
        plain = "".join(char if char.isprintable() else " " for char in self.redacted(text))
        return " ".join(plain.split())[:max_chars]


def redacted(text: str, secrets: Iterable[str]) -> str:
    """Return a text without these secrets, however they are encoded in it."""
    for value in secrets:
        secret = unquote(value.rpartition(_SIGNATURE)[2])  # the rest of a token is no secret
        if len(secret) >= _MIN_SECRET_CHARS:
            text = _spellings(secret).sub("***", text)
    return text


@lru_cache(maxsize=64)
def _spellings(secret: str) -> re.Pattern[str]:
    """Return a pattern of a secret in which each character may be encoded for a URL, for JSON or for HTML."""
    return re.compile("".join(map(_spelling, secret)))


def _spelling(char: str) -> str:
    code = f"{ord(char):x}"
    encoded = [f"(?i:%{code:0>2}|\\\\u{code:0>4}|&#x0*{code};)", f"&#0*{ord(char)};", rf"\\?{re.escape(char)}"]
    named = html.escape(char)
    return f"(?:{'|'.join([*encoded, re.escape(named)] if named != char else encoded)})"
