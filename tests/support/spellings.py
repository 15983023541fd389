"""How a server may write what it repeats of a request."""

import html
import json
import textwrap
from collections.abc import Callable
from urllib.parse import quote


def _percent_encoded(text: str) -> str:
    return "".join(f"%{byte:02x}" for byte in text.encode())


def _referenced(text: str, form: str) -> str:
    """Return a text as character references of HTML."""
    return "".join(form.format(ord(char)) for char in text)


def _between(mark: str) -> Callable[[str], bytes]:
    return lambda text: mark.join(text).encode()


SPELLINGS: dict[str, Callable[[str], bytes]] = {
    "as it is": str.encode,
    "in Latin-1": lambda text: text.encode("latin-1"),
    "in UTF-16": lambda text: text.encode("utf-16"),
    "in UTF-16, big endian": lambda text: text.encode("utf-16-be"),
    "in UTF-32": lambda text: text.encode("utf-32"),
    "in upper case": lambda text: text.upper().encode(),
    "in lower case": lambda text: text.lower().encode(),
    "NUL between": _between("\0"),
    "backspace between": _between("\b"),
    "blank between": _between(" "),
    "line break between": _between("\r\n"),
    "zero-width space between": _between("\u200b"),
    "soft hyphen between": _between("\xad"),
    "soft hyphen of HTML between": _between("&shy;"),
    "zero-width space of JSON between": _between("\\u200b"),
    "backspace of JSON between": _between("\\b"),
    "NUL of Python between": _between("\\x00"),
    "NUL of a URL between": _between("%00"),
    "folded": _between("\r\n "),
    "in lines of 5": lambda text: "\n".join(textwrap.wrap(text, 5)).encode(),
    "over the end of a line": lambda text: f"{text[:4]}\r\n{text[4:]}".encode(),
    "over the end of a line, quoted-printable": lambda text: f"{text[:4]}=\r\n{text[4:]}".encode(),
    "URL": lambda text: quote(text, safe="").encode(),
    "URL in lower case": lambda text: quote(text, safe="").lower().encode(),
    "URL, Latin-1": lambda text: quote(text, safe="", encoding="latin-1").encode(),
    "URL, each character": lambda text: _percent_encoded(text).encode(),
    "URL, twice": lambda text: quote(quote(text, safe=""), safe="").encode(),
    "URL, each character twice": lambda text: _percent_encoded(_percent_encoded(text)).encode(),
    "JSON": lambda text: json.dumps(text).encode(),
    "JSON, slashes escaped": lambda text: text.replace("/", r"\/").encode(),
    "JSON in JSON": lambda text: json.dumps(json.dumps(text.replace("/", r"\/"))).encode(),
    "JSON, each character": lambda text: "".join(f"\\u{ord(char):04X}" for char in text).encode(),
    "JSON in JSON, each character": lambda text: "".join(f"\\\\u{ord(char):04x}" for char in text).encode(),
    "Python": lambda text: ascii(text).encode(),
    "Python, each character": lambda text: "".join(f"\\x{ord(char):02x}" for char in text).encode(),
    "HTML": lambda text: html.escape(text).encode(),
    "HTML, decimal": lambda text: _referenced(text, "&#{};").encode(),
    "HTML, decimal with zeros": lambda text: _referenced(text, "&#00{};").encode(),
    "HTML, decimal without semicolons": lambda text: _referenced(text, "&#{}").encode(),
    "HTML, hexadecimal": lambda text: _referenced(text, "&#x{:X};").encode(),
    "HTML, hexadecimal with zeros": lambda text: _referenced(text, "&#X00{:x};").encode(),
    "HTML, twice": lambda text: html.escape(_referenced(text, "&#{};")).encode(),
    "HTML, three times": lambda text: html.escape(html.escape(_referenced(text, "&#{};"))).encode(),
    "HTML in a URL": lambda text: quote(_referenced(text, "&#{};"), safe="").encode(),
    "URL in HTML": lambda text: _referenced(quote(text, safe=""), "&#{};").encode(),
    "JSON in a URL": lambda text: quote("".join(f"\\u{ord(char):04x}" for char in text), safe="").encode(),
    "without what is neither letter nor digit": lambda text: "".join(filter(str.isalnum, text)).encode(),
}
