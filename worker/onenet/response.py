"""One HTTP response of the platform, or of something in front of it."""

import html
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import quote, unquote

_MAX_EXCERPT_CHARS = 80
_MAX_HEADER_CHARS = 60
_MAX_EXCERPT_BYTES = 4096  # of which the excerpt is taken
_REDACTED = "***"
_LONG_CHARS = 8  # a shorter secret may be a part of any word, and the rest of that word would tell it
_WORD = re.compile(r"\S+")
_UNREADABLE = "\ufffd"  # stands for bytes that are not UTF-8
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
        excerpt = self._one_line(self.body[:_MAX_EXCERPT_BYTES].decode("utf-8", "replace"), _MAX_EXCERPT_CHARS)
        encoded = f", encoded as {encoding}" if encoding else ""
        return f"HTTP {self.status}, {kind}{encoded}" + (f": {excerpt}" if excerpt else ", without a printable body")

    def redacted(self, text: str) -> str:
        """Return a text of the response without the secrets, however they are encoded in it."""
        return redacted(text, self.secrets)

    def _one_line(self, text: str, max_chars: int) -> str:
        """Return the beginning of a text. Redacted first: half a secret could not be found any more."""
        plain = "".join(char if char.isprintable() else " " for char in self.redacted(text).replace(_UNREADABLE, ""))
        return " ".join(plain.split())[:max_chars]


def redacted(text: str, secrets: Iterable[str]) -> str:
    """Return a text without these secrets, however they are encoded in it; of a short one, without its whole word."""
    for value in secrets:
        secret = unquote(value.rpartition(_SIGNATURE)[2])  # the rest of a token is no secret
        if secret:
            text, found = _spellings(secret).subn(_REDACTED, text)
            if found and len(secret) < _LONG_CHARS:
                text = _WORD.sub(lambda word: _REDACTED if _REDACTED in word[0] else word[0], text)
    return text


@lru_cache(maxsize=64)
def _spellings(secret: str) -> re.Pattern[str]:
    """Return a pattern of a secret in which each character may be encoded for a URL, JSON, HTML or a Python literal."""
    return re.compile("".join(map(_spelling, secret)))


def _spelling(char: str) -> str:
    code = f"{ord(char):x}"
    encoded = [f"(?i:%{code:0>2}|\\\\[ux]0*{code}|&#x0*{code};)", f"&#0*{ord(char)};", rf"\\?{re.escape(char)}"]
    named = html.escape(char)
    if named != char:
        encoded.append(re.escape(named))
    if not char.isascii():  # it may have been written in another encoding than the one in which the text was read
        written = char.encode()
        encoded += [f"(?i:{quote(written)})", re.escape(written.decode("latin-1")), _UNREADABLE]
    return f"(?:{'|'.join(encoded)})"
